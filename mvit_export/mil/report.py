"""Statistics of every tensor in a run: which op leaves fp16's range first, and what loses precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mvit_export.mil.steps import Op

HALF_OVERFLOW = 65520.0  # from here on, fp16 rounds to infinity: half a step above its largest number, 65504
LARGE, SMALL = 1e2, 1e-4  # activations outside lose precision on the Neural Engine, according to Apple


@dataclass(frozen=True)
class TensorStats:
    """One tensor, before it was rounded. Shares are of its non-zero finite elements; counts are of elements."""

    op: Op
    name: str
    dtype: str  # as declared: "FLOAT16" or "FLOAT32"
    shape: tuple[int, ...]
    max_abs: float  # of the finite elements
    share_large: float  # above 1e2
    share_small: float  # below 1e-4
    overflow: int  # finite, but infinite in fp16
    infinite: int  # infinite although no input of the op was
    nan: int

    @property
    def overflows(self) -> bool:
        """Whether the declared type cannot hold the tensor."""
        return self.infinite > 0 or (self.dtype == "FLOAT16" and self.overflow > 0)


@dataclass(frozen=True)
class Trace:
    """All floating tensors of a run in the order in which they were made, and the outputs."""

    tensors: tuple[TensorStats, ...]
    outputs: dict[str, Any]

    @property
    def first_overflow(self) -> TensorStats | None:
        """The first tensor that its own type cannot hold; None if there is none."""
        return self._first(lambda t: t.overflows)

    @property
    def first_beyond_half(self) -> TensorStats | None:
        """The first tensor that fp16 could not hold, whatever its type here: the reason not to export as fp16."""
        return self._first(lambda t: t.overflow > 0 or t.infinite > 0)

    @property
    def first_nan(self) -> TensorStats | None:
        return self._first(lambda t: t.nan > 0)

    def _first(self, condition: Callable[[TensorStats], bool]) -> TensorStats | None:
        return next((t for t in self.tensors if condition(t)), None)

    def __str__(self) -> str:
        """One line: the verdict, with op, place, module and size."""
        bad = self.first_overflow
        if bad is None:
            worst = max((t.max_abs for t in self.tensors), default=0.0)
            return f"no overflow in {len(self.tensors)} tensors, largest value {worst:.4g}"
        return f"{bad.op} overflows {bad.dtype}: {bad.overflow + bad.infinite} elements, largest {bad.max_abs:.4g}"


def tensor_stats(op: Op, name: str, dtype: str, value: Tensor, *, inputs_finite: bool) -> TensorStats:
    """Statistics of one tensor; `inputs_finite` says whether an infinity in it would be new."""
    size = value.abs()
    finite = size.isfinite()
    present = size[finite & (size > 0)]
    count = max(present.numel(), 1)
    return TensorStats(
        op,
        name,
        dtype,
        tuple(value.shape),
        max_abs=float(present.max()) if present.numel() else 0.0,
        share_large=int((present > LARGE).sum()) / count,
        share_small=int((present < SMALL).sum()) / count,
        overflow=int((present >= HALF_OVERFLOW).sum()),
        infinite=int((size == math.inf).sum()) if inputs_finite else 0,
        nan=int(value.isnan().sum()),
    )
