"""Several targets at once, each in a process of its own, while everything that counts stays with the parent.

A process is given a converter's call and gives back how the graph was captured; later it is given an artifact to
judge. The parent alone builds the model, makes the golden vectors from it, stages, hashes and renames: so a process
cannot vouch for its own mistake, and it owns nothing that must be tidied up and can be killed at any moment.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from mvit_export import errors
from mvit_export.errors import ConversionError, MvitExportError, UsageError, first_line
from mvit_export.formats import Target
from mvit_export.machine import available_memory, usable_cores
from mvit_export.processes import die_with_parent

if TYPE_CHECKING:
    from mvit_export.models.load import LoadedModel

Task = Callable[[], Any]  # what a process does; pickled, as is its result
Result = TypeVar("Result")
Work = Generator[Task, Any, Result]  # yields tasks, is sent their results, returns the whole

LONGEST_FIRST = ("tflite", "coreml", "onnx")  # so that the others fill the cores beside it
PARENT_MEMORY = 512 * 2**20  # torch, the model and its reference
PROCESS_MEMORY = 1024 * 2**20  # a converter's packages and graphs: 0.7 GiB were seen for TFLite
MODEL_COPIES = 20  # of the weights, in a converter at work


def choose_jobs(asked: int | None, model: LoadedModel, targets: Sequence[Target]) -> int:
    """How many processes convert; 1 is this very process. None asks for what cores and memory allow.

    Raises UsageError where several were asked for and the model cannot leave this process.
    """
    if asked is not None and asked < 1:
        raise UsageError(f"--jobs is {asked}, expected at least 1 process")
    if not can_be_handed_over(model):
        if asked not in (None, 1):
            raise UsageError(
                f"--jobs {asked}: a model from a Python file stays in the process that ran it, as another would not "
                "have run its factory; leave out --jobs"
            )
        return 1
    if asked is None:
        each = PROCESS_MEMORY + MODEL_COPIES * 4 * model.info.params
        asked = max(1, min(usable_cores(), (available_memory() - PARENT_MEMORY) // each))
    return min(asked, len(targets))


def can_be_handed_over(model: LoadedModel) -> bool:
    """Whether classes and settings of the model are the same in every process: MobileViT and timm's models.

    A user's file may set globals, read the environment or define classes anywhere; that is not for us to repeat.
    """
    return model.info.variant is not None or model.info.source.startswith("timm:")


def order_of(targets: Sequence[Target]) -> list[int]:
    """Indices of the targets, longest work first."""
    return sorted(range(len(targets)), key=lambda index: LONGEST_FIRST.index(targets[index].format))


def packages_of(target: Target) -> tuple[str, ...]:
    return tuple(target.packages.values())


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's search for cyclic garbage, put off until the end.

    Captured graphs are many small objects that stay, and it went through all of them again and again: 27 % of a TFLite
    conversion's time. Without it the conversion took 744 MB instead of 712.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def do_in_turn(works: Sequence[Work[Result]]) -> list[Result]:
    """Every task in this process, one work after the other."""
    return [do_here(work) for work in works]


def do_here(work: Work[Result]) -> Result:
    try:
        task = next(work)
        while True:
            task = work.send(task())
    except StopIteration as end:
        result: Result = end.value
        return result
    finally:
        work.close()  # an error of a task is not raised inside of it


class Crew:
    """Processes that are started at once, each importing the packages named for it. Use as a context manager."""

    def __init__(self, packages: Sequence[Sequence[str]]) -> None:
        self.packages = packages
        self.pool: dict[Connection, SpawnProcess] = {}

    def __enter__(self) -> Crew:
        self.scratch = tempfile.TemporaryDirectory(prefix="mvit-export-")  # what a killed converter leaves goes with it
        threads = max(1, usable_cores() // len(self.packages))
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that torch's threads hold
        try:
            for packages in self.packages:
                near, far = context.Pipe()
                args = (far, packages, threads, self.scratch.name)
                self.pool[near] = context.Process(target=serve, args=args, daemon=True)
                self.pool[near].start()
                far.close()  # so that the end of the process is the end of the pipe
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for near in list(self.pool):
            self.dismiss(near)
        self.scratch.cleanup()

    def dismiss(self, near: Connection) -> None:
        """Without grace: a process has nothing to tidy up, and one that is inside a converter would not listen."""
        if self.pool[near].pid is not None:  # an interruption may have come before its start
            self.pool[near].kill()
            self.pool[near].join()
        near.close()
        del self.pool[near]

    def do(self, works: Sequence[Work[Result]], order: Sequence[int]) -> list[Result]:
        """The results in the order of `works`, which are begun in `order`. After an error no process is left."""
        queue = deque(order)
        results: dict[int, Result] = {}
        active: dict[Connection, int] = {}
        try:
            for near in list(self.pool):
                self.next_work(near, works, queue, active)
            while active:
                for near in [near for near in wait(list(active)) if isinstance(near, Connection)]:
                    try:
                        task = works[active[near]].send(self.receive(near))
                    except StopIteration as end:
                        results[active.pop(near)] = end.value
                        self.next_work(near, works, queue, active)
                    else:
                        hand_over(near, task)
        except BaseException:
            for near in list(self.pool):  # first, as they write where the works are about to tidy up
                self.dismiss(near)
            raise
        finally:
            for index in reversed(active.values()):
                works[index].close()
        return [results[index] for index in range(len(works))]

    def next_work(
        self, near: Connection, works: Sequence[Work[Result]], queue: deque[int], active: dict[Connection, int]
    ) -> None:
        """Begin the next work; where there is none, the process ends and gives its memory back."""
        if not queue:
            self.dismiss(near)
            return
        active[near] = queue.popleft()
        hand_over(near, next(works[active[near]]))

    def receive(self, near: Connection) -> Any:
        """What a task gave. Its error is raised here, with the other process's traceback as the cause."""
        try:
            answer = near.recv_bytes()
        except (EOFError, OSError) as error:
            self.pool[near].join()
            raise ConversionError(
                f"a process was lost (exit code {self.pool[near].exitcode}): a converter crashed, memory ran out, or a "
                'script lacks `if __name__ == "__main__":`; try --jobs 1'
            ) from error
        result, failure, text = pickle.loads(answer)
        if failure is not None:
            kind, message = failure
            raise kind(message) from ProcessTraceback(text)
        return result


class ProcessTraceback(Exception):
    """The traceback of another process, as text."""


def hand_over(near: Connection, task: Task) -> None:
    """Pickled plainly: torch's own way for pipes would move the weights to shared memory, of which there may be little.

    Raises ConversionError where the model holds something that no other process can have.
    """
    try:
        content = pickle.dumps(task)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConversionError(
            f"the model cannot be handed to another process ({first_line(error)}); try --jobs 1"
        ) from error
    with suppress(BrokenPipeError, ConnectionResetError):  # it is lost, which `receive` is told too
        near.send_bytes(content)


def serve(far: Connection, packages: Sequence[str], threads: int, scratch: str) -> None:
    """What a process does: import what it will need, then do tasks until it is ended."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # sent to a whole group as well; the parent decides
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    die_with_parent()
    # A share of the cores, so that processes do not fight for them, and a folder for temporary files.
    os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), TMPDIR=scratch)
    tempfile.tempdir = scratch
    with no_collection():
        for package in packages:
            with suppress(Exception):  # told when the converter asks for it
                importlib.import_module(package)
    gc.freeze()  # what was imported stays
    if torch := sys.modules.get("torch"):  # a script that is imported anew may have brought it before
        torch.set_num_threads(threads)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            far.send_bytes(answer(far.recv_bytes()))


def answer(request: bytes) -> bytes:
    """(result, None, "") or (None, (type, message), traceback), pickled."""
    try:
        return pickle.dumps((pickle.loads(request)(), None, ""))
    except (Exception, SystemExit) as error:
        return pickle.dumps((None, portable(error), "\n" + "".join(traceback.format_exception(error))))


def portable(error: BaseException) -> tuple[type[Exception], str]:
    """Type and message: one of ours as it is, any other is a bug of ours; not every exception can be pickled."""
    if isinstance(error, MvitExportError):
        return next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__), str(error)
    return RuntimeError, f"{type(error).__name__}: {error}"
