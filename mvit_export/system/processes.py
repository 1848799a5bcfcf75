"""Work in other processes. None is waited for beyond a given limit, and none outlives its parent."""

from __future__ import annotations

import ctypes
import functools
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, TypeVar

from mvit_export import errors
from mvit_export.errors import DeviceError, MvitExportError, first_line
from mvit_export.system.machine import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")
Make = Callable[[], Callable[[Item], Result]]
Task = Callable[[], Any]  # pickled, as is its result

START_TIMEOUT = 600.0  # seconds for a process to prepare: several runtimes import and load their files


class Pool:
    """Processes that are started together, one for each of `prepare`, and then do tasks. Use as a context manager.

    Errors other than a task's own are of type `error`: a lost process, for which the message names `suspects`, and a
    task that cannot be pickled, which the message calls `subject`.
    """

    def __init__(
        self, prepare: Sequence[Task], *, error: type[MvitExportError], suspects: str, subject: str = "the work"
    ) -> None:
        self.prepare, self.error, self.suspects, self.subject = prepare, error, suspects, subject
        self.processes: dict[Connection, SpawnProcess] = {}

    def __enter__(self) -> Pool:
        self.scratch = tempfile.TemporaryDirectory(prefix="mvit-export-")  # removed with what killed processes leave
        threads = max(1, usable_cores() // len(self.prepare))
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads of runtimes hold
        try:
            for prepare in self.prepare:
                near, far = context.Pipe()
                args = (far, prepare, threads, self.scratch.name)
                self.processes[near] = context.Process(target=serve, args=args, daemon=True)
                self.processes[near].start()
                far.close()  # so that the end of the process is the end of the pipe
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.dismiss_all()
        self.scratch.cleanup()

    def dismiss_all(self) -> None:
        for near in list(self.processes):
            self.dismiss(near)

    def dismiss(self, near: Connection) -> None:
        """Kill at once: a process has nothing to tidy up, and one that is inside a converter would not react."""
        if self.processes[near].pid is not None:  # an interruption may have come before its start
            self.processes[near].kill()
            self.processes[near].join()
        near.close()
        del self.processes[near]

    def hand_over(self, near: Connection, task: Task) -> None:
        """Pickle plainly: torch's reducers for pipes would move weights to shared memory, which may be small."""
        try:
            content = pickle.dumps(task)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise self.error(
                f"{self.subject} cannot be handed to another process ({first_line(error)}); try --jobs 1"
            ) from error
        with suppress(BrokenPipeError, ConnectionResetError):  # the process is lost, which `receive` reports
            near.send_bytes(content)

    def receive(self, near: Connection) -> Any:
        """A task's result; its error is raised here."""
        result, failure = self.outcome(near)
        if failure is not None:
            raise failure
        return result

    def outcome(self, near: Connection) -> tuple[Any, Exception | None]:
        """A task's result or its error, with the other process's traceback as the cause. Raises if that was lost."""
        try:
            answer = near.recv_bytes()
        except (EOFError, OSError) as error:
            self.processes[near].join()
            raise self.error(
                f"a process was lost (exit code {self.processes[near].exitcode}): {self.suspects}; try --jobs 1"
            ) from error
        result, failure, text = pickle.loads(answer)
        if failure is None:
            return result, None
        kind, message = failure
        raised: Exception = kind(message)
        raised.__cause__ = ProcessTraceback(text)
        return None, raised


class ProcessTraceback(Exception):
    """The traceback of another process, as text."""


def wait_for(waiting: Iterable[Connection], *, timeout: float | None = None) -> list[Connection]:
    """Connections that have an answer, or whose process is gone; none after `timeout` seconds."""
    return [near for near in wait(list(waiting), timeout=timeout) if isinstance(near, Connection)]


# Many items for one function


def spread_over(
    make: Make[Item, Result], items: Iterable[Item], *, jobs: int, timeout: float
) -> Generator[tuple[int, Result], None, None]:
    """(index, result) of every item, in order of completion. `make` is called once in each of `jobs` processes.

    A single job runs in this process. With more, `make`, items and results are pickled, and `timeout` is the most
    seconds that an item may take. An error in a process is raised here; a lost process raises DeviceError.
    """
    if jobs == 1:
        yield from enumerate(map(make(), items))
        return
    suspects = "a runtime crashed or memory ran out"
    with Pool([nothing] * jobs, error=DeviceError, suspects=suspects) as pool:
        yield from hand_out(pool, make, enumerate(items), timeout)


def hand_out(
    pool: Pool, make: Make[Any, Any], queue: Iterator[tuple[int, Any]], timeout: float
) -> Iterator[tuple[int, Any]]:
    """Give each process an item whenever it has none."""
    deadlines = dict.fromkeys(pool.processes, time.monotonic() + START_TIMEOUT)
    at: dict[Connection, int] = {}
    for near in pool.processes:
        pool.hand_over(near, functools.partial(prepare_function, make))
    while deadlines:
        ready = wait_for(deadlines, timeout=max(0.0, min(deadlines.values()) - time.monotonic()))
        if not ready:
            raise DeviceError(f"a process gave no answer within {timeout:.0f} s and was stopped; try --jobs 1")
        for near in ready:
            result = pool.receive(near)
            if near in at:
                yield at.pop(near), result
            del deadlines[near]
            with suppress(StopIteration):
                at[near], item = next(queue)
                pool.hand_over(near, functools.partial(apply_function, item))
                deadlines[near] = time.monotonic() + timeout


prepared: list[Callable[[Any], Any]] = []  # in a process of `spread_over`: its function


def prepare_function(make: Make[Any, Any]) -> None:
    prepared.append(make())


def apply_function(item: Any) -> Any:
    return prepared[-1](item)


# Inside a process


def serve(far: Connection, prepare: Task, threads: int, scratch: str) -> None:
    """What a process does: prepare, then do tasks until it is ended."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # these also reach the whole group; the parent decides
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    die_with_parent()
    # A share of the cores, so that processes do not compete for them, and a folder for temporary files.
    os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), TMPDIR=scratch)
    tempfile.tempdir = scratch
    with no_collection():
        prepare()
    gc.freeze()  # what was imported stays
    if torch := sys.modules.get("torch"):  # a re-imported script may have loaded it already
        torch.set_num_threads(threads)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            far.send_bytes(answer(far.recv_bytes()))


def nothing() -> None:
    """Needs no preparation."""


@contextmanager
def no_collection() -> Iterator[None]:
    """Postpone Python's search for cyclic garbage until the end.

    Captured graphs are many small objects that stay alive, and the search went through all of them again and again:
    27 % of a TFLite conversion's time. Without it the conversion took 744 MB instead of 712. What already exists is
    left out of the searches that coremltools requests, which otherwise go through all of torch.
    """
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
        if enabled:
            gc.enable()


def answer(request: bytes) -> bytes:
    """(result, None, "") or (None, (type, message), traceback), pickled."""
    try:
        return pickle.dumps((pickle.loads(request)(), None, ""))
    except (Exception, SystemExit) as error:
        return pickle.dumps((None, portable(error), "\n" + "".join(traceback.format_exception(error))))


def portable(error: BaseException) -> tuple[type[Exception], str]:
    """Type and message, since not every exception can be pickled; any type that is not ours means a bug of ours."""
    if isinstance(error, MvitExportError):
        return next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__), str(error)
    return RuntimeError, f"{type(error).__name__}: {error}"


def die_with_parent() -> None:
    """End this process when its parent is gone, even by kill -9, whatever this process is doing.

    The pipe to the parent shows this too, but only once it is read. A thread watches the parent; on Linux the kernel
    does as well, since a converter's C++ may keep Python's threads from running.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    if sys.platform == "linux":
        set_pdeathsig = 1  # prctl(2)
        ctypes.CDLL(None).prctl(set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent.pid:  # it was gone before, so no signal comes
            os._exit(1)
    threading.Thread(target=leave_after, args=(parent.sentinel,), daemon=True).start()


def leave_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)  # at once: nobody is left to read a result
