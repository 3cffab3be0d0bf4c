"""Processes that run functions together: a pool for each number of ranks, on gloo over the loopback.

The functions live in modules of their own (`on_ranks_*.py`), since the processes find them by name.
"""

from __future__ import annotations

import datetime
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

_PRELOADED = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint.state_dict",
    "rai_toolbox.optim",
]


class RankError(AssertionError):
    """A function failed on a rank, or did not return in time."""


class Ranks:
    """So many processes, started when they are first needed and ended whatever happens.

    Parameters
    ----------
    size : int
        How many ranks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._connections: list[multiprocessing.connection.Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
        """Call `function(*args)` on every rank and return what each returned.

        Raises
        ------
        RankError
            A rank raised, or one did not return within `timeout` seconds; all processes are then ended.
        """
        if not self._processes:
            self._start()
        try:
            return self._results(function, args, timeout)
        except BaseException:  # a failure, or the test was interrupted: answers would be taken for later ones
            self.stop()
            raise

    def _results(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        for connection in self._connections:
            connection.send((function, args))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < self.size and time.monotonic() < deadline:
            waiting = [c for i, c in enumerate(self._connections) if i not in results and i not in failures]
            for connection in multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic())):
                rank = self._connections.index(connection)  # pyright: ignore[reportArgumentType]
                try:
                    fine, value = connection.recv()  # pyright: ignore[reportAttributeAccessIssue]
                except EOFError:
                    fine, value = False, "the process ended"
                (results if fine else failures)[rank] = value
                if not fine:  # the others may be waiting for it
                    deadline = min(deadline, time.monotonic() + 2.0)
        if len(results) == self.size:
            return [results[rank] for rank in range(self.size)]
        for rank in range(self.size):
            if rank not in results and rank not in failures:
                failures[rank] = "did not return in time"
        raise RankError("\n".join(f"--- rank {rank} of {self.size}\n{text}" for rank, text in sorted(failures.items())))

    def _start(self) -> None:
        # Forked from a process that has imported torch once: a rank starts in milliseconds instead of seconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._folder = tempfile.TemporaryDirectory()
        meeting_point = os.path.join(self._folder.name, "store")
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.size, meeting_point, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)

    def stop(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(0.2)
            if process.is_alive():
                process.kill()
            process.join(10)
            process.close()
        self._processes, self._connections = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def has_fsdp2_on_a_cpu() -> bool:
    """Whether this torch's `fully_shard` runs on a CPU: that of torch 2.6, in a build for CUDA, does not."""
    import torch

    return hasattr(torch.cpu.current_stream(), "record_event")


def _work(rank: int, size: int, meeting_point: str, connection: multiprocessing.connection.Connection) -> None:
    import torch
    import torch.distributed as dist

    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "DTensor random operators may not have complete support")  # of torch 2.6
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch 2.9, by its own checkpoints
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=120),
    )
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            os._exit(0)  # the test run is over: no farewell to ranks that may be gone already
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        try:
            connection.send(answer)
        except OSError:
            os._exit(1)
