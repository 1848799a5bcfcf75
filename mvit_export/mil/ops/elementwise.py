"""Elementwise ops, activations, logic and casts. Semantics: coremltools' `elementwise_*.py`, `activation.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CastType = Literal["fp16", "fp32", "int8", "int16", "int32", "uint8", "uint16", "bool"]
CAST = {
    "fp16": torch.float32,  # held as float32, rounded by the executor
    "fp32": torch.float32,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "uint16": torch.int32,  # torch lacks arithmetic on uint16
    "bool": torch.bool,
}


def channelwise(parameter: Tensor, x: Tensor) -> Tensor:
    """(C,) -> (C, 1, 1, ...) so that it applies to axis 1 of `x`."""
    return parameter.reshape(-1, *[1] * (x.dim() - 2))


def cast(x: Tensor, dtype: CastType) -> Tensor:
    """Floats become integers by dropping the fraction, as in C."""
    return x.to(CAST[dtype])


def real_div(x: Tensor, y: Tensor) -> Tensor:
    """Floats divide; for integers the quotient's fraction is dropped, since the result is declared as integer."""
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def power(x: Tensor, y: Tensor) -> Tensor:
    return torch.pow(x, y)


def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    """min(max(x, alpha), beta)."""
    return x.clamp(alpha, beta)


def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return (x + epsilon).reciprocal()


def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return (x + epsilon).log()


def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return (x + epsilon).rsqrt()


def threshold(x: Tensor, alpha: float) -> Tensor:
    """max(x, alpha)."""
    return x.clamp(min=alpha)


def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    """min(beta, x) for x >= 0, min(beta, alpha * x) below."""
    return torch.where(x >= 0, x, alpha * x).clamp(max=beta)


def elu(x: Tensor, alpha: float) -> Tensor:
    return F.elu(x, alpha)


def gelu(x: Tensor, mode: Literal["EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"] = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    return F.leaky_relu(x, alpha)


def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * x + beta


def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """`alpha` (C,) is the slope below 0 of each channel, axis 1."""
    return torch.where(x > 0, x, channelwise(alpha, x) * x)


def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * torch.tanh(beta * x)


def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=float("inf"))  # torch's shortcut for large values is not part of the op


def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return channelwise(alpha, x) * softplus(channelwise(beta, x) * x)


def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= alpha, x, torch.zeros_like(x))


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


OPS: dict[str, Callable[..., Any]] = {
    "abs": lambda x: x.abs(),
    "acos": lambda x: x.acos(),
    "add": lambda x, y: x + y,
    "asin": lambda x: x.asin(),
    "atan": lambda x: x.atan(),
    "atanh": lambda x: x.atanh(),
    "cast": cast,
    "ceil": lambda x: x.ceil(),
    "clamped_relu": clamped_relu,
    "clip": clip,
    "cos": lambda x: x.cos(),
    "cosh": lambda x: x.cosh(),
    "elu": elu,
    "equal": lambda x, y: x == y,
    "erf": lambda x: x.erf(),
    "exp": lambda x: x.exp(),
    "exp2": lambda x: x.exp2(),
    "floor": lambda x: x.floor(),
    "floor_div": lambda x, y: x // y,
    "gelu": gelu,
    "greater": lambda x, y: x > y,
    "greater_equal": lambda x, y: x >= y,
    "inverse": inverse,
    "leaky_relu": leaky_relu,
    "less": lambda x, y: x < y,
    "less_equal": lambda x, y: x <= y,
    "linear_activation": linear_activation,
    "log": log,
    "logical_and": lambda x, y: x & y,
    "logical_not": lambda x: ~x,
    "logical_or": lambda x, y: x | y,
    "logical_xor": lambda x, y: x ^ y,
    "maximum": lambda x, y: torch.maximum(x, y),
    "minimum": lambda x, y: torch.minimum(x, y),
    "mod": lambda x, y: torch.remainder(x, y),  # sign of the divisor, as Python's %
    "mul": lambda x, y: x * y,
    "not_equal": lambda x, y: x != y,
    "pow": power,
    "prelu": prelu,
    "real_div": real_div,
    "relu": lambda x: x.relu(),
    "relu6": lambda x: x.clamp(0, 6),
    "round": lambda x: x.round(),  # half to even
    "rsqrt": rsqrt,
    "scaled_tanh": scaled_tanh,
    "select": select,
    "sigmoid": lambda x: x.sigmoid(),
    "sigmoid_hard": sigmoid_hard,
    "sign": lambda x: x.sign(),
    "silu": lambda x: F.silu(x),
    "sin": lambda x: x.sin(),
    "sinh": lambda x: x.sinh(),
    "softplus": softplus,
    "softplus_parametric": softplus_parametric,
    "softsign": lambda x: F.softsign(x),
    "sqrt": lambda x: x.sqrt(),
    "square": lambda x: x * x,
    "sub": lambda x, y: x - y,
    "tan": lambda x: x.tan(),
    "tanh": lambda x: x.tanh(),
    "threshold": threshold,
    "thresholded_relu": thresholded_relu,
}
