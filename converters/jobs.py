"""Several targets at once, each in a process of its own, while everything that counts stays with the parent.

A process is given a converter's call and returns how the graph was captured; later it is given an artifact to judge.
Only the parent builds the model, makes the golden vectors from it, stages, hashes and renames. So a process cannot
vouch for its own mistakes, owns nothing that must be tidied up, and can be killed at any moment.
"""

from __future__ import annotations

import functools
import importlib
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, TypeVar

from mvit_export.errors import ConversionError, UsageError
from mvit_export.families.table import family_of
from mvit_export.formats.targets import Target
from mvit_export.system.machine import available_memory, usable_cores
from mvit_export.system.processes import Pool, Task, wait_for

if TYPE_CHECKING:
    from mvit_export.models.loaded import LoadedModel

Result = TypeVar("Result")
Work = Generator[Task, Any, Result]  # yields tasks, is sent their results or thrown their errors, returns the whole

PARENT_MEMORY = 512 * 2**20  # torch, the model and its reference
PROCESS_MEMORY = 1024 * 2**20  # a converter's packages and graphs: up to 0.7 GiB seen for TFLite
MODEL_COPIES = 20  # of the weights, in a running converter


def choose_jobs(asked: int | None, model: LoadedModel, targets: Sequence[Target]) -> int:
    """How many processes convert; 1 means this process. None asks for as many as cores and memory allow.

    Raises UsageError if several were requested and the model cannot leave this process.
    """
    if asked is not None and asked < 1:
        raise UsageError(f"--jobs is {asked}, expected at least 1 process")
    family = family_of(model.info.source)
    if not family.repeatable:
        if asked not in (None, 1):
            raise UsageError(
                f"--jobs {asked}: a model from {family.title} stays in the process that ran it, since another would "
                "not have run its factory; leave out --jobs"
            )
        return 1
    if asked is None:
        each = PROCESS_MEMORY + MODEL_COPIES * 4 * model.info.params
        asked = max(1, min(usable_cores(), (available_memory() - PARENT_MEMORY) // each))
    return min(asked, len(targets))


def order_of(targets: Sequence[Target]) -> list[int]:
    """Indices of the targets, longest work first, so that the others fill the cores beside it."""
    return sorted(range(len(targets)), key=lambda index: -targets[index].row.work)


def packages_of(target: Target) -> tuple[str, ...]:
    return tuple(target.packages.values())


def do_in_turn(works: Sequence[Work[Result]]) -> list[Result]:
    """Every task in this process, one work after the other; the first error that a work does not handle ends it."""
    return [do_here(work) for work in works]


def do_here(work: Work[Result]) -> Result:
    try:
        task = next(work)
        while True:
            try:
                answer = task()
            except Exception as error:
                task = work.throw(error)
            else:
                task = work.send(answer)
    except StopIteration as end:
        result: Result = end.value
        return result
    finally:
        work.close()  # an interruption is not raised inside it


class Crew(Pool):
    """Processes that are started at once, each importing the packages named for it. Use as a context manager.

    Each calls `before` first, if there is one; it is pickled.
    """

    def __init__(self, packages: Sequence[Sequence[str]], before: Callable[[], object] | None = None) -> None:
        super().__init__(
            [functools.partial(prepare, before, names) for names in packages],
            error=ConversionError,
            suspects='a converter crashed, memory ran out, or a script lacks `if __name__ == "__main__":`',
            subject="the model",
        )

    def do(self, works: Sequence[Work[Result]], order: Sequence[int]) -> list[Result]:
        """The results in the order of `works`, which are started in `order`.

        A task's error is its work's to handle. One that it does not handle ends all of them and is raised, and so does
        the loss of a process; no process is left.
        """
        queue = deque(order)
        results: dict[int, Result] = {}
        active: dict[Connection, int] = {}
        try:
            for near in list(self.processes):
                self.next_work(near, works, queue, active, results)
            while active:
                for near in wait_for(active):
                    answer, error = self.outcome(near)
                    work = works[active[near]]
                    try:
                        task = work.send(answer) if error is None else work.throw(error)
                    except StopIteration as end:
                        results[active.pop(near)] = end.value
                        self.next_work(near, works, queue, active, results)
                    else:
                        self.hand_over(near, task)
        except BaseException:
            self.dismiss_all()  # first, because they write where the works are about to tidy up
            raise
        finally:
            for index in reversed(active.values()):
                works[index].close()
        return [results[index] for index in range(len(works))]

    def next_work(
        self,
        near: Connection,
        works: Sequence[Work[Result]],
        queue: deque[int],
        active: dict[Connection, int],
        results: dict[int, Result],
    ) -> None:
        """Start the next work that has a task; if there is none, the process ends and frees its memory."""
        while queue:
            index = queue.popleft()
            try:
                task = next(works[index])
            except StopIteration as end:  # it failed before its first task
                results[index] = end.value
                continue
            active[near] = index
            self.hand_over(near, task)
            return
        self.dismiss(near)


def prepare(before: Callable[[], object] | None, packages: Sequence[str]) -> None:
    for call in (before, *(functools.partial(importlib.import_module, package) for package in packages)):
        with suppress(Exception):  # reported when the network or the converter needs it
            if call is not None:
                call()
