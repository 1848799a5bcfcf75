"""Work spread over processes that each prepare once. None is waited for endlessly, and none outlives its parent."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from mvit_export.errors import DeviceError, MvitExportError

Task = TypeVar("Task")
Result = TypeVar("Result")
Make = Callable[[], Callable[[Task], Result]]

START_TIMEOUT = 600.0  # seconds until a process has prepared: several runtimes import and load their files
GRACE = 5.0  # seconds to end, once told to


def spread_over(
    make: Make[Task, Result], tasks: Iterable[Task], *, jobs: int, timeout: float
) -> Generator[tuple[int, Result], None, None]:
    """(index, result) of every task, as they are done. `make` is called once in each of `jobs` processes.

    One job works in this very process. `make`, tasks and results are pickled for more; `timeout` is the most seconds
    that a task may take then. An error that a process raises is raised here; DeviceError where a process is lost.
    """
    if jobs == 1:
        yield from enumerate(map(make(), tasks))
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that runtimes' threads hold
    pool: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(jobs):
            near, far = context.Pipe()
            process = context.Process(target=serve, args=(far, make), daemon=True)
            process.start()
            far.close()  # so that the end of the process is the end of the pipe
            pool[near] = process
        yield from hand_out(pool, tasks, timeout)
    finally:
        for process in pool.values():
            end(process)


def hand_out(pool: dict[Connection, SpawnProcess], tasks: Iterable[Task], timeout: float) -> Iterator[tuple[int, Any]]:
    """Give each process a task whenever it has none."""
    queue = enumerate(tasks)
    busy = dict.fromkeys(pool, time.monotonic() + START_TIMEOUT)
    at: dict[Connection, int] = {}
    while busy:
        ready = wait(list(busy), timeout=max(0.0, min(busy.values()) - time.monotonic()))
        if not ready:
            raise DeviceError(f"a process gave no answer within {timeout:.0f} s and was stopped; try --jobs 1")
        for near in ready:
            assert isinstance(near, Connection)
            result = receive(near, pool[near])
            if near in at:
                yield at.pop(near), result
            del busy[near]
            with suppress(StopIteration):
                at[near], task = next(queue)
                near.send(task)
                busy[near] = time.monotonic() + timeout


def receive(near: Connection, process: SpawnProcess) -> Any:
    try:
        answer = near.recv()
    except (EOFError, OSError) as error:
        process.join(GRACE)
        raise DeviceError(
            f"a process was lost (exit code {process.exitcode}): a runtime crashed or memory ran out; try --jobs 1"
        ) from error
    if isinstance(answer, BaseException):
        raise answer
    return answer


def serve(far: Connection, make: Make[Task, Result]) -> None:
    """What a process does: prepare, then answer tasks until the parent has no more or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    die_with_parent()
    with suppress(EOFError, BrokenPipeError):
        try:
            work = make()
            far.send(None)
            while True:
                far.send(work(far.recv()))
        except MvitExportError as error:
            far.send(error)
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:  # not every exception can be pickled
            far.send(RuntimeError(f"{type(error).__name__}: {error}"))


def die_with_parent() -> None:
    """End this process when its parent is gone, even by kill -9, whatever this one is doing then.

    The pipe to the parent tells so too, but only once it is read. A thread watches the parent; on Linux the kernel
    does as well, as a converter's C++ may keep Python's threads from running.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    if sys.platform == "linux":
        set_pdeathsig = 1  # prctl(2); the thread watches from before, should the parent have gone already
        ctypes.CDLL(None).prctl(set_pdeathsig, signal.SIGKILL)
    threading.Thread(target=leave_after, args=(parent.sentinel,), daemon=True).start()


def leave_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)  # at once: nobody is left to read a result


def end(process: SpawnProcess) -> None:
    process.terminate()
    process.join(GRACE)
    if process.is_alive():
        process.kill()
        process.join()
