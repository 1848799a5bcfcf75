"""One op, ready to run, and how it runs: call, check against the declaration, round, store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mvit_export.errors import first_line
from mvit_export.mil.errors import ExecutionError
from mvit_export.mil.signature import to_python
from mvit_export.mil.values import HELD

# What an op's function may raise for values that it cannot handle.
CANNOT = (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, AttributeError, MemoryError)


@dataclass(frozen=True)
class Op:
    """One operation, as reports and errors name it."""

    type: str
    outputs: tuple[str, ...]
    dtypes: tuple[str, ...]  # of the outputs, in MIL's names, e.g. "FLOAT16"
    place: str  # function and index in its block, e.g. "main[12]"
    module: str | None  # of the PyTorch model, if the package says so

    def __str__(self) -> str:
        module = f", module {self.module}" if self.module else ""
        return f"{self.type} {self.outputs[0] if self.outputs else ''!r} at {self.place}{module}"


@dataclass(frozen=True)
class Step:
    """An op, ready to run: `call` takes the slots and returns the op's outputs."""

    op: Op
    call: Callable[[list[Any]], Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    half: tuple[bool, ...]  # which outputs are to be rounded to fp16
    shapes: tuple[tuple[int | None, ...], ...]  # of the outputs, as declared
    dies: tuple[int, ...] = ()  # slots that nothing reads after this step


def caller(
    function: Callable[..., Any], one: dict[str, int], many: dict[str, list[int]], late: dict[str, tuple[int, str]]
) -> Callable[[list[Any]], Any]:
    """A function of only the slots. The common case, tensors only, does nothing but look up."""
    singles = tuple(one.items())
    if not many and not late:
        return lambda slots: function(**{name: slots[i] for name, i in singles})

    def call(slots: list[Any]) -> Any:
        arguments: dict[str, Any] = {name: slots[i] for name, i in singles}
        arguments |= {name: [slots[i] for i in group] for name, group in many.items()}
        arguments |= {name: to_python(slots[i], kind) for name, (i, kind) in late.items()}
        return function(**arguments)

    return call


def evaluate(step: Step, slots: list[Any]) -> tuple[Any, ...]:
    """The op's outputs, not rounded. ExecutionError names the op if it fails or outputs are not as declared."""
    try:
        made = step.call(slots)
    except CANNOT as error:
        raise ExecutionError(f"{step.op} failed: {first_line(error)}") from error
    outputs = made if isinstance(made, tuple) else (made,)
    if len(outputs) != len(step.writes):
        raise ExecutionError(f"{step.op} failed: it makes {len(outputs)} values, declared: {len(step.writes)}")
    for value, shape, dtype in zip(outputs, step.shapes, step.op.dtypes, strict=True):
        if isinstance(value, Tensor) and not fits(value, shape, dtype):
            made_is = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            raise ExecutionError(f"{step.op} failed: it makes {made_is}, declared: {dtype} {list(shape)}")
    return outputs


def fits(value: Tensor, shape: tuple[int | None, ...], dtype: str) -> bool:
    """Whether a tensor has the declared type and shape; None means any size."""
    if value.dtype != HELD[dtype][1] or len(value.shape) != len(shape):
        return False
    return value.shape == shape or all(want is None or want == n for want, n in zip(shape, value.shape, strict=True))


def store(step: Step, outputs: tuple[Any, ...], slots: list[Any]) -> None:
    """Put an op's outputs into their slots, rounded if the program says fp16."""
    for slot, half, output in zip(step.writes, step.half, outputs, strict=True):
        slots[slot] = output.half().float() if half else output


def with_lifetimes(steps: list[Step], *, keep: set[int]) -> list[Step]:
    """The same steps, each knowing which slots can be emptied after it."""
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        last.update(dict.fromkeys((*step.reads, *step.writes), index))
    dies: list[list[int]] = [[] for _ in steps]
    for slot, index in last.items():
        if slot not in keep:
            dies[index].append(slot)
    return [dataclasses.replace(step, dies=tuple(dead)) for step, dead in zip(steps, dies, strict=True)]
