"""Reductions, normalisations, softmax and sorting. Semantics: coremltools' `reduction.py`, `normalization.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mvit_export.mil.ops.elementwise import channelwise

Reduce = Callable[[Tensor, list[int], bool], Tensor]


def over_axes(reduce: Reduce) -> Callable[..., Tensor]:
    """A MIL reduction from a torch one: `axes` None means all axes."""

    def op(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
        return reduce(x, list(range(x.dim())) if axes is None else axes, keep_dims)

    return op


def mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """For integers the mean's fraction is dropped, since the result is declared as integer."""
    return x.mean(axes, keep) if x.is_floating_point() else x.double().mean(axes, keep).to(x.dtype)


def product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def total(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keep, dtype=x.dtype)  # torch would widen integers to int64


def reduce_argmax(
    x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: Literal["int32", "uint16"] = "int32"
) -> Tensor:
    return x.argmax(axis, keep_dims).int()


def reduce_argmin(
    x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: Literal["int32", "uint16"] = "int32"
) -> Tensor:
    return x.argmin(axis, keep_dims).int()


def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


def instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    """Every channel of every sample separately, (n, C, *d)."""
    y = normalise(x, list(range(2, x.dim())), epsilon)
    y = y if gamma is None else y * channelwise(gamma, x)
    return y if beta is None else y + channelwise(beta, x)


def layer_norm(
    x: Tensor,
    axes: list[int] | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """`gamma` and `beta` have the shape of `x` at `axes`, in the order of the tensor's axes."""
    dims = sorted(range(x.dim()) if axes is None else (axis % x.dim() for axis in axes))
    if dims == list(range(x.dim() - len(dims), x.dim())):
        return F.layer_norm(x, x.shape[dims[0] :], gamma, beta, epsilon)
    shape = [size if axis in dims else 1 for axis, size in enumerate(x.shape)]
    y = normalise(x, dims, epsilon)
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


def normalise(x: Tensor, axes: list[int], epsilon: float) -> Tensor:
    variance, average = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - average) * torch.rsqrt(variance + epsilon)


def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Over the last three axes."""
    return x / (x.square().sum((-3, -2, -1), keepdim=True) + epsilon).sqrt()


def local_response_norm(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    return F.local_response_norm(x, size, alpha, beta, k)


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return x.softmax(axis)


def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    x = x.flip(axis) if reverse else x
    y = x.cumsum(axis, dtype=x.dtype)
    y = y - x if exclusive else y
    return y.flip(axis) if reverse else y


def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: Literal["int32", "uint16"] = "int32",
) -> tuple[Tensor, ...]:
    """The `k` largest (smallest if `ascending`) along `axis`; k = -1 means all. Ties go to the lower index."""
    order = argsort(x, axis, ascending).long()
    order = order if k == -1 else order.narrow(axis, 0, k)
    values = x.gather(axis, order)
    return (values, order.int()) if return_indices else (values,)


def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    return x.argsort(dim=axis, descending=not ascending, stable=True).int()


OPS: dict[str, Callable[..., Any]] = {
    "argsort": argsort,
    "batch_norm": batch_norm,
    "cumsum": cumsum,
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "layer_norm": layer_norm,
    "local_response_norm": local_response_norm,
    "reduce_argmax": reduce_argmax,
    "reduce_argmin": reduce_argmin,
    "reduce_l1_norm": over_axes(lambda x, axes, keep: total(x.abs(), axes, keep)),
    "reduce_l2_norm": over_axes(lambda x, axes, keep: total(x * x, axes, keep).sqrt().to(x.dtype)),
    "reduce_log_sum": over_axes(lambda x, axes, keep: total(x, axes, keep).log().to(x.dtype)),
    "reduce_log_sum_exp": over_axes(lambda x, axes, keep: x.logsumexp(axes, keep).to(x.dtype)),
    "reduce_max": over_axes(lambda x, axes, keep: x.amax(axes, keep)),
    "reduce_mean": over_axes(mean),
    "reduce_min": over_axes(lambda x, axes, keep: x.amin(axes, keep)),
    "reduce_prod": over_axes(product),
    "reduce_sum": over_axes(total),
    "reduce_sum_square": over_axes(lambda x, axes, keep: total(x * x, axes, keep)),
    "softmax": softmax,
    "topk": topk,
}
