"""Pieces of data shared out among threads: whatever may happen in one, around one, and to the caller's settings."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rai_toolbox.kernels import _threads
from rai_toolbox.kernels._threads import share_out


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def meet(barrier: threading.Barrier, result: object = None) -> object:
    """Return only when another thread is here too."""
    barrier.wait(timeout=60)
    return result


def threads_of(pieces: int = 8) -> set[int]:
    """The threads that take part in work of some length."""

    def piece(_: int) -> int:
        time.sleep(0.01)
        return threading.get_ident()

    return set(share_out(piece, range(pieces)))


def threads_of_operators_elsewhere() -> int:
    """How many threads torch's operators use in a thread that is started now."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_results_come_in_the_order_of_the_pieces() -> None:
    assert share_out(lambda i: i * i, range(100)) == [i * i for i in range(100)]
    assert share_out(lambda i: i, []) == []


def test_as_many_threads_work_at_once_as_torch_is_set_to() -> None:
    for count in (2, 3):
        torch.set_num_threads(count)
        barrier = threading.Barrier(count)
        assert share_out(lambda i, b=barrier: meet(b, i), range(count)) == list(range(count))


def test_what_one_thread_does_alone_uses_one_thread_on_request_and_gives_the_others_back() -> None:
    before = torch.get_num_threads()
    assert share_out(lambda _: torch.get_num_threads(), [0]) == [before]
    assert share_out(lambda _: torch.get_num_threads(), [0], one_thread_each=True) == [1]
    with pytest.raises(ZeroDivisionError):
        share_out(lambda i: 1 // i, [0], one_thread_each=True)
    assert torch.get_num_threads() == before


def test_operators_of_a_piece_use_one_thread_and_nobody_elses_number_changes() -> None:
    assert share_out(lambda _: torch.get_num_threads(), range(50)) == [1] * 50
    assert torch.get_num_threads() == 2
    assert threads_of_operators_elsewhere() == 2


@pytest.mark.skipif(torch.version.cuda is not None, reason="open: a CUDA build counts 1 thread in a new thread here")
def test_without_the_functions_of_openmp_nothing_else_is_different(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_set_openmp_threads", "_set_mkl_threads", "_pause_openmp"):
        monkeypatch.setattr(_threads, name, None)
    monkeypatch.setattr(_threads, "_team", team := _threads._Team())
    assert share_out(lambda _: torch.get_num_threads(), range(50)) == [1] * 50
    assert torch.get_num_threads() == 2
    assert threads_of_operators_elsewhere() == 2
    assert threading.get_ident() not in threads_of()
    team.dismiss()
    assert not any(thread.is_alive() for thread in team._members)
    assert threads_of() == {threading.get_ident()}


def test_one_thread_means_the_callers() -> None:
    torch.set_num_threads(1)
    assert threads_of() == {threading.get_ident()}


def test_pieces_of_a_piece_stay_in_its_thread() -> None:
    def outer(_: int) -> bool:
        return set(share_out(lambda _: threading.get_ident(), range(4))) == {threading.get_ident()}

    assert all(share_out(outer, range(20)))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("inference", [True, False])
def test_a_piece_is_in_the_mode_of_the_caller(grad: bool, inference: bool) -> None:
    def modes(_: int) -> tuple[bool, bool]:
        time.sleep(0.001)
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
        assert set(share_out(modes, range(20))) == {(grad, inference)}


def test_a_piece_flushes_denormals_as_the_caller_does() -> None:
    def least(_: int) -> float:
        time.sleep(0.001)
        return torch.full((64,), 1e-310, dtype=torch.float64).mul_(0.5).sum().item()

    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        assert set(share_out(least, range(20))) == {0.0}
    finally:
        torch.set_flush_denormal(False)
    assert all(value > 0 for value in share_out(least, range(20)))


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_every_operator() -> None:
    x, y = torch.ones(8, 4), torch.ones(8, 4)
    with Watching() as once:
        y.detach().mul_(2)
    with Watching() as seen:
        share_out(lambda row: row.detach().mul_(2), [x] * 20)
    assert seen.calls == 20 * once.calls > 20
    with torch.autocast("cpu"):
        assert threads_of() == {threading.get_ident()}
    with torch.device("cpu"):  # a function mode that concerns nobody here
        assert len(threads_of()) == 2
    assert (
        torch.func.vmap(lambda row: torch.stack(share_out(lambda c: row * c, [1, 2])).sum(0))(x).sum()
        == 8 * 4 * 2**20 * 3
    )


def test_the_first_error_comes_out_and_what_was_not_begun_is_left() -> None:
    done: list[int] = []

    def piece(i: int) -> None:
        if i >= 3:
            time.sleep(0.01)
            raise ValueError(f"piece {i}")
        done.append(i)

    with pytest.raises(ValueError, match="piece 3"):
        share_out(piece, range(10_000))
    assert sorted(done) == [0, 1, 2]
    assert torch.get_num_threads() == 2
    assert share_out(lambda i: i, range(4)) == [0, 1, 2, 3]


def test_an_error_keeps_no_tensor_alive() -> None:
    pieces = [torch.ones(3), torch.ones(3)]
    gone = weakref.ref(pieces[0])

    def fail(piece: torch.Tensor) -> None:
        raise RuntimeError(piece.sum())

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(RuntimeError):
            share_out(fail, pieces)
        pieces.clear()
        for _ in range(100):  # the other thread drops what it held a moment later
            if gone() is None:
                break
            time.sleep(0.01)
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals of threads")
def test_after_an_interrupt_no_thread_writes_on() -> None:
    running: set[int] = set()

    def piece(i: int) -> None:
        running.add(i)
        if i == 2:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.02)
        running.discard(i)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            share_out(piece, range(1000))
    finally:
        signal.signal(signal.SIGINT, before)
    left = set(running)  # the interrupted piece itself does not reach its end
    time.sleep(0.1)
    assert running == left
    assert len(left) <= 1
    assert torch.get_num_threads() == 2


def test_several_threads_of_the_user_share_out_at_once() -> None:
    found: dict[int, list[int]] = {}

    def user(n: int) -> None:
        for _ in range(20):
            found[n] = share_out(lambda i: n * i, range(50))

    users = [threading.Thread(target=user, args=(n,)) for n in range(6)]
    for thread in users:
        thread.start()
    for thread in users:
        thread.join()
    assert found == {n: [n * i for i in range(50)] for n in range(6)}


def in_another_process(program: str) -> str:
    done = subprocess.run(
        # Python 3.12 and newer warn of forks of what has threads, which is what is tested
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_has_threads_of_its_own() -> None:
    program = """
import os, threading, time, torch
from rai_toolbox.kernels._threads import share_out
torch.set_num_threads(2)
def piece(i):
    time.sleep(.005)
    return threading.get_ident()
assert len(set(share_out(piece, range(8)))) == 2
torch.randn(2**20).add_(1)  # OpenMP has threads too
child = os.fork()
if child == 0:
    assert len(set(share_out(piece, range(8)))) == 2 and torch.get_num_threads() == 2
    print("child", flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert len(set(share_out(piece, range(8)))) == 2
print("parent")
"""
    assert in_another_process(program).split() == ["child", "parent"]


def test_the_end_of_the_interpreter_waits_for_nothing_and_work_is_still_done() -> None:
    program = """
import atexit, torch
from rai_toolbox.kernels._threads import share_out
torch.set_num_threads(2)
atexit.register(lambda: print(share_out(lambda i: i, range(4))))
print(share_out(lambda i: i, range(4)))
"""
    assert in_another_process(program) == "[0, 1, 2, 3]\n" * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_many_processes_that_have_just_shared_out_work_end_in_order() -> None:
    program = """
import os, sys, torch
from rai_toolbox.kernels._threads import share_out
torch.set_num_threads(3)
rows = list(torch.ones(9, 2**14))
share_out(lambda row: row.mul_(2).sum(), rows)
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        for _ in range(10):
            share_out(lambda row: row.mul_(0.5).sum(), rows)
        sys.exit()
    children.append(child)
print({os.waitpid(child, 0)[1] for child in children})
"""
    assert in_another_process(program) == "{0}\n"


def test_no_thread_to_be_had_means_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_threads, "_team", _threads._Team())
    monkeypatch.setattr(threading.Thread, "start", lambda thread: _refuse(thread))
    assert set(share_out(lambda _: threading.get_ident(), range(8))) == {threading.get_ident()}
    assert torch.get_num_threads() == 2


def _refuse(*_: object) -> None:
    raise RuntimeError("can't start new thread")
