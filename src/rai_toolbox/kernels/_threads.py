"""Share out pieces of data among threads, each with torch's operators on one thread.

An operator that all threads share is a parallel region: it ends with its slowest thread, and where another process has
taken a core, each of a step's dozens of operators waits for it. A thread that has its own data waits for nobody, and
the data stay in its core's cache from one operator to the next.

What a piece is must not depend on the number of threads: then neither does any result.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_lock = threading.Lock()
_is_fork = False  # then OpenMP's threads are gone without its knowing, and it would wait for them

# Not a product of literals, which the compiler would compute.
_least_normal, _half = sys.float_info.min, 0.5

# How long the end of the interpreter waits for a thread that is at work.
_PATIENCE_S = 10.0


def thread_count() -> int:
    """How many threads `share_out` would use here and now: 1 is none but the caller's own.

    They are torch's (`torch.get_num_threads`), where nothing that only the caller's thread knows about has to see the
    operators: a mode, a transform of `torch.func`, a compiler, autocast.
    """
    if torch.compiler.is_compiling():
        return 1
    count = torch.get_num_threads()
    return count if count > 1 and not _is_watched() else 1


def share_out(
    function: Callable[[Piece], Result], pieces: Sequence[Piece], fewest: int = 2, one_thread_each: bool = False
) -> list[Result]:
    """`[function(piece) for piece in pieces]`, the pieces shared out among threads.

    function: called once for each piece, in this thread or another, in any order, several at a time. It runs in the
        grad and inference mode of the caller.
    pieces: pieces of work that share nothing that is written to. How they are cut must not depend on the number of
        threads.
    fewest: from how many pieces on it is worth it.
    one_thread_each: whether torch's operators use one thread also where this thread does all pieces.

    Returns the results, in the order of the pieces.

    Raises BaseException: what `function` raised, for the first of the pieces that it raised for; pieces not begun by
        then are left out. No thread works on any piece once this function has returned or raised.
    """
    count = min(thread_count(), len(pieces)) if len(pieces) >= fewest else 1
    if count <= 1:
        with _on_one_thread() if one_thread_each and thread_count() > 1 else contextlib.nullcontext():
            return [function(piece) for piece in pieces]
    return _Work(function, pieces).done_by(count)


@contextlib.contextmanager
def _on_one_thread() -> Iterator[None]:
    count = torch.get_num_threads()
    _use_one_thread()
    try:
        yield
    finally:
        if _set_openmp_threads is not None:
            _set_openmp_threads(count)


class _Work:
    """Pieces that several threads take one after the other."""

    def __init__(self, function: Callable[[Any], Any], pieces: Sequence[Any]) -> None:
        self._function = function
        self._pieces = pieces
        self._to_do = deque(range(len(pieces)))
        self._results: list[Any] = [None] * len(pieces)
        self._errors: list[tuple[int, BaseException]] = []
        self._door = threading.Lock()  # of `_is_open` and `_begun`
        self._is_open = True
        self._begun = 0
        self._ended: list[None] = []
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._flushes = _flushes_denormals()

    def done_by(self, count: int) -> list[Any]:
        """Have `count` threads do it, this one among them, wait for the others, and return the results."""
        threads_of_operators = torch.get_num_threads()
        try:
            helps = _use_one_thread()
            _end_openmp_threads()
            are_called = _call_helpers(self.help, count - helps)
            if helps or not are_called:
                self._take_pieces()
            else:
                self._bell.get()  # of the first that found nothing left to do
        except BaseException as error:
            self._stop(error)
        while self._is_open or len(self._ended) < self._begun:
            try:
                self._wait_for_helpers()
            except BaseException as error:  # noqa: PERF203 - an interrupt: the others must not write on behind its back
                self._stop(error)
        if _set_openmp_threads is not None:
            _set_openmp_threads(threads_of_operators)
        self._pieces = ()  # a helper that has yet to answer holds this
        if self._errors:
            try:
                raise min(self._errors, key=lambda entry: entry[0])[1]
            finally:
                self._errors.clear()  # they hold this frame, and all its tensors
        return self._results

    def _wait_for_helpers(self) -> None:
        with self._door:  # who did not begin until now has nothing to do
            self._is_open = False
        while len(self._ended) < self._begun:
            self._bell.get()

    def help(self) -> None:
        """Take pieces until none is left, in a thread of the team."""
        with self._door:
            if not self._is_open:
                return
            self._begun += 1
        try:
            self._take_pieces()
        finally:
            self._ended.append(None)
            self._bell.put(None)

    def _take_pieces(self) -> None:
        function, pieces, results, take = self._function, self._pieces, self._results, self._to_do.popleft
        try:
            with self._as_the_caller():
                while True:
                    try:
                        i = take()
                    except IndexError:
                        return
                    try:
                        results[i] = function(pieces[i])
                    except BaseException as error:
                        self._stop(error, i)
        except BaseException as error:
            self._stop(error)

    def _stop(self, error: BaseException, i: int = -1) -> None:
        self._errors.append((i, error))
        self._to_do.clear()

    @contextlib.contextmanager
    def _as_the_caller(self) -> Iterator[None]:
        if self._flushes != _flushes_denormals():
            torch.set_flush_denormal(self._flushes)  # of this thread
        with torch.inference_mode(self._inference), torch.set_grad_enabled(self._grad):
            yield


class _Team:
    """Threads that wait to be called. They do not keep the process alive, and none outlives the interpreter."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._members: list[threading.Thread] = []
        self._is_dismissed = False

    def call(self, help_: Callable[[], None], count: int) -> bool:
        """Have `count` threads call `help_`; return whether any will. Called with the lock held."""
        with contextlib.suppress(RuntimeError):  # no thread can be had, or the interpreter is about to end
            while len(self._members) < count and not self._is_dismissed:
                is_ready = threading.Event()
                member = threading.Thread(target=_answer, args=(self._calls, is_ready), name="rai_toolbox", daemon=True)
                member.start()
                self._members.append(member)
                is_ready.wait()  # it may have changed, for a moment, what other new threads start with
        available = 0 if self._is_dismissed else min(count, len(self._members))
        for _ in range(available):
            self._calls.put(help_)
        return available > 0

    def dismiss(self) -> None:
        """End the threads, each after the piece that it is at."""
        with _lock:
            self._is_dismissed = True
        for _ in self._members:
            self._calls.put(None)
        for member in self._members:
            member.join(_PATIENCE_S)


def _answer(calls: SimpleQueue[Callable[[], None] | None], is_ready: threading.Event) -> None:
    _prepare_thread()
    is_ready.set()
    while True:
        help_ = calls.get()
        if help_ is None:
            return
        help_()
        del help_  # it holds the pieces


def _call_helpers(help_: Callable[[], None], count: int) -> bool:
    with _lock:
        return _team.call(help_, count)


def _is_watched() -> bool:
    """Whether somebody looks at the operators of this thread, and would not see those of another."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or torch.is_autocast_enabled("cpu")
        or not all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
    )


def _flushes_denormals() -> bool:
    return _least_normal * _half == 0


def _torch_function(name: str) -> Callable[[int], int] | None:
    """A function of the libraries that torch was linked with, or None where they cannot be looked into."""
    try:
        return getattr(ctypes.CDLL(torch._C.__file__), name)
    except (OSError, AttributeError):
        return None


_pause_openmp = _torch_function("omp_pause_resource_all")
_set_openmp_threads = _torch_function("omp_set_num_threads")
_set_mkl_threads = _torch_function("MKL_Set_Num_Threads_Local")


def _end_openmp_threads() -> None:
    """End the threads of this thread's earlier parallel regions, 20 µs; the next one starts anew, 40 µs.

    After a region they wait for the next by spinning, for 6 ms and more: a core less for us (an L2 step on images right
    after one of SGD took twice the time).
    """
    if _pause_openmp is not None and not _is_fork:
        _pause_openmp(1)  # omp_pause_soft


def _prepare_thread() -> None:
    """Have torch's operators in this thread use no other, and change nothing of any other thread's.

    `torch.set_num_threads` sets the number of this thread, but also that with which threads to come start.
    """
    count = torch.get_num_threads()  # torch sets it when first asked, and not again
    if _set_mkl_threads is not None:
        _set_mkl_threads(1)
    if not _use_one_thread():
        torch.set_num_threads(1)
        restoring = threading.Thread(target=torch.set_num_threads, args=(count,))
        restoring.start()
        restoring.join()


def _use_one_thread() -> bool:
    """Have OpenMP use one thread for what this thread asks of it, and return whether torch's operators follow."""
    if _set_openmp_threads is not None:
        _set_openmp_threads(1)
    return torch.get_num_threads() == 1


def _forget_team() -> None:
    global _lock, _team, _is_fork
    _lock, _team, _is_fork = threading.Lock(), _Team(), True


# A thread that comes back from an operator while the interpreter ends would be ended inside of C++.
_team = _Team()
atexit.register(lambda: _team.dismiss())

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_team)  # a fork has one thread
