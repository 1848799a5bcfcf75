"""Each op alone, elementwise, reductions, shapes and gathers, against torch or numpy, through a saved package."""

from __future__ import annotations

import coremltools as ct
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb
from hypothesis import given, settings
from hypothesis import strategies as st
from mil_build import check, floats, run_op

from mvit_export.mil import ExecutionError

iOS15, iOS16, iOS17, iOS18 = (getattr(ct.target, f"iOS{n}") for n in (15, 16, 17, 18))
X = floats(2, 3, 4, 5)
UNIT = floats(3, 4, low=-0.9, high=0.9)
POSITIVE = floats(3, 4, low=0.1, high=3.0)


def t(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x)


UNARY = {
    "abs": (X, np.abs),
    "acos": (UNIT, np.arccos),
    "asin": (UNIT, np.arcsin),
    "atan": (X, np.arctan),
    "atanh": (UNIT, np.arctanh),
    "ceil": (X, np.ceil),
    "cos": (X, np.cos),
    "cosh": (X, np.cosh),
    "erf": (X, lambda x: torch.erf(t(x)).numpy()),
    "exp": (X, np.exp),
    "exp2": (X, np.exp2),
    "floor": (X, np.floor),
    "identity": (X, lambda x: x),
    "inverse": (POSITIVE, lambda x: 1 / (x + 1e-4)),
    "log": (POSITIVE, np.log),
    "relu": (X, lambda x: np.maximum(x, 0)),
    "relu6": (4 * X, lambda x: np.clip(x, 0, 6)),
    "round": (np.array([-2.5, -0.5, 0.5, 1.5, 2.4], np.float32), np.round),
    "rsqrt": (POSITIVE, lambda x: 1 / np.sqrt(x)),
    "sigmoid": (X, lambda x: 1 / (1 + np.exp(-x))),
    "sign": (X, np.sign),
    "silu": (X, lambda x: x / (1 + np.exp(-x))),
    "sin": (X, np.sin),
    "sinh": (X, np.sinh),
    "softplus": (30 * X, lambda x: np.logaddexp(0, x)),
    "softsign": (X, lambda x: x / (1 + np.abs(x))),
    "sqrt": (POSITIVE, np.sqrt),
    "square": (X, np.square),
    "tan": (UNIT, np.tan),
    "tanh": (X, np.tanh),
}


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str) -> None:
    x, reference = UNARY[name]
    check(lambda x: getattr(mb, name)(x=x), {"x": x}, reference(x))


@pytest.mark.parametrize("name", ["silu", "tanh", "exp", "sqrt", "relu", "sigmoid"])
def test_unary_fp16_is_rounded_once(name: str) -> None:
    x, reference = UNARY[name]
    x = x.astype(np.float16)
    expected = reference(x.astype(np.float64)).astype(np.float16)
    check(lambda x: getattr(mb, name)(x=x), {"x": x}, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("dtype", "kept"), [(np.float16, False), (np.float32, True)])
def test_every_fp16_intermediate_is_rounded(dtype: type, kept: bool) -> None:
    x = np.array([0.6], dtype)

    def build(x):
        return mb.sub(x=mb.add(x=x, y=dtype(2048)), y=dtype(2048))

    (y,) = run_op(build, {"x": x})
    assert y == pytest.approx(0.6, abs=1e-3) if kept else y == 0  # fp16 counts in twos from 2048 on


@pytest.mark.parametrize("epsilon", [1e-3, 0.5])
def test_epsilon(epsilon: float) -> None:
    check(lambda x: mb.inverse(x=x, epsilon=epsilon), {"x": POSITIVE}, 1 / (POSITIVE + epsilon))
    check(lambda x: mb.log(x=x, epsilon=epsilon), {"x": POSITIVE}, np.log(POSITIVE + epsilon))
    check(lambda x: mb.rsqrt(x=x, epsilon=epsilon), {"x": POSITIVE}, 1 / np.sqrt(POSITIVE + epsilon))


ACTIVATIONS = {
    "clamped_relu": (dict(alpha=0.5, beta=1.0), lambda x: np.minimum(1.0, np.where(x >= 0, x, 0.5 * x))),
    "clip": (dict(alpha=-0.5, beta=0.7), lambda x: np.clip(x, -0.5, 0.7)),
    "elu": (dict(alpha=0.7), lambda x: np.where(x > 0, x, 0.7 * (np.exp(x) - 1))),
    "leaky_relu": (dict(alpha=0.1), lambda x: np.where(x > 0, x, 0.1 * x)),
    "linear_activation": (dict(alpha=2.0, beta=-1.0), lambda x: 2 * x - 1),
    "scaled_tanh": (dict(alpha=1.5, beta=0.5), lambda x: 1.5 * np.tanh(0.5 * x)),
    "sigmoid_hard": (dict(alpha=0.2, beta=0.5), lambda x: np.clip(0.2 * x + 0.5, 0, 1)),
    "threshold": (dict(alpha=0.3), lambda x: np.maximum(x, 0.3)),
    "thresholded_relu": (dict(alpha=0.3), lambda x: np.where(x >= 0.3, x, 0)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str) -> None:
    attributes, reference = ACTIVATIONS[name]
    check(lambda x: getattr(mb, name)(x=x, **attributes), {"x": X}, reference(X).astype(np.float32))


@pytest.mark.parametrize("mode", ["EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"])
def test_gelu(mode: str) -> None:
    reference = {
        "EXACT": lambda x: F.gelu(x),
        "TANH_APPROXIMATION": lambda x: F.gelu(x, approximate="tanh"),
        "SIGMOID_APPROXIMATION": lambda x: x * torch.sigmoid(1.702 * x),
    }
    check(lambda x: mb.gelu(x=x, mode=mode), {"x": X}, reference[mode](t(X)).numpy())


def test_channelwise_activations() -> None:
    alpha, beta = floats(3, seed=1), floats(3, seed=2)
    a, b = alpha.reshape(1, 3, 1, 1), beta.reshape(1, 3, 1, 1)
    check(lambda x: mb.prelu(x=x, alpha=alpha), {"x": X}, np.where(X > 0, X, a * X))
    expected = a * np.log1p(np.exp(b * X))
    check(lambda x: mb.softplus_parametric(x=x, alpha=alpha, beta=beta), {"x": X}, expected)


BINARY = {
    "add": np.add,
    "floor_div": np.floor_divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "mod": np.mod,
    "mul": np.multiply,
    "real_div": np.divide,
    "sub": np.subtract,
}
COMPARE = {
    "equal": np.equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "not_equal": np.not_equal,
}


@pytest.mark.parametrize("name", BINARY)
@settings(max_examples=5, deadline=None)
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
def test_binary_broadcasts(name: str, shape: list[int], data: st.DataObject) -> None:
    other = [n if data.draw(st.booleans()) else 1 for n in shape][data.draw(st.integers(0, len(shape) - 1)) :]
    x, y = floats(*shape), floats(*other, seed=1, low=0.5)
    check(lambda x, y: getattr(mb, name)(x=x, y=y), {"x": x, "y": y}, BINARY[name](x, y), rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in BINARY if name != "real_div"])
def test_binary_integers(name: str) -> None:
    x, y = np.array([-7, 7, 5, 0], np.int32), np.array([2, -2, 5, 3], np.int32)
    check(lambda x, y: getattr(mb, name)(x=x, y=y), {"x": x, "y": y}, BINARY[name](x, y))


@pytest.mark.parametrize("name", COMPARE)
def test_compare(name: str) -> None:
    x, y = np.array([1, 2, 3], np.int32), np.array([2, 2, 2], np.int32)
    expected = COMPARE[name](x, y).astype(np.int32)
    check(lambda x, y: mb.cast(x=getattr(mb, name)(x=x, y=y), dtype="int32"), {"x": x, "y": y}, expected)


@pytest.mark.parametrize("name", ["logical_and", "logical_or", "logical_xor", "logical_not"])
def test_logic(name: str) -> None:
    x, y = np.array([0, 0, 1, 1], np.int32), np.array([0, 1, 0, 1], np.int32)
    names = ["x"] if name == "logical_not" else ["x", "y"]

    def build(**inputs):
        booleans = {n: mb.cast(x=inputs[n], dtype="bool") for n in names}
        return mb.cast(x=getattr(mb, name)(**booleans), dtype="int32")

    inputs = {"x": x, "y": y} if len(names) == 2 else {"x": x}
    reference = getattr(np, name)(*(a.astype(bool) for a in inputs.values()))
    check(build, inputs, reference.astype(np.int32))


def test_pow_and_select() -> None:
    y = floats(3, 4, seed=1)
    check(lambda x, y: mb.pow(x=x, y=y), {"x": POSITIVE, "y": y}, POSITIVE**y)
    check(lambda x, y: mb.select(cond=mb.less(x=x, y=y), a=x, b=y), {"x": UNIT, "y": y}, np.minimum(UNIT, y))


@pytest.mark.parametrize("dtype", ["int32", "fp16", "bool", "int8", "uint8", "int16", "uint16"])
def test_cast(dtype: str) -> None:
    x = np.array([0.0, 1.7, 2.2, 100.1], np.float32)
    numpy = {"fp16": np.float16}.get(dtype) or np.dtype(dtype)
    expected = x.astype(numpy).astype(np.float32)
    check(lambda x: mb.cast(x=mb.cast(x=x, dtype=dtype), dtype="fp32"), {"x": x}, expected, rtol=0, atol=0)


REDUCE = {
    "reduce_l1_norm": lambda x, **k: np.abs(x).sum(**k),
    "reduce_l2_norm": lambda x, **k: np.sqrt((x * x).sum(**k)),
    "reduce_log_sum": lambda x, **k: np.log(x.sum(**k)),
    "reduce_log_sum_exp": lambda x, **k: np.log(np.exp(x).sum(**k)),
    "reduce_max": np.max,
    "reduce_mean": np.mean,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_sum": np.sum,
    "reduce_sum_square": lambda x, **k: (x * x).sum(**k),
}


@pytest.mark.parametrize("name", REDUCE)
@pytest.mark.parametrize("axes", [None, [1], [-1, 0], [2, 3]])
@pytest.mark.parametrize("keep", [False, True])
def test_reduce(name: str, axes: list[int] | None, keep: bool) -> None:
    x = floats(2, 3, 2, 3, low=0.1)
    expected = REDUCE[name](x, axis=None if axes is None else tuple(axes), keepdims=keep)
    check(lambda x: getattr(mb, name)(x=x, axes=axes, keep_dims=keep), {"x": x}, expected, rtol=1e-4)


@pytest.mark.parametrize("target", [iOS15, iOS17])
@pytest.mark.parametrize("keep", [False, True])
def test_argmax_argmin(target: ct.target, keep: bool) -> None:
    for axis in (0, -1):
        high = np.argmax(X, axis, keepdims=keep)
        check(lambda x, a=axis: mb.reduce_argmax(x=x, axis=a, keep_dims=keep), {"x": X}, high, target)
        low = np.argmin(X, axis, keepdims=keep)
        check(lambda x, a=axis: mb.reduce_argmin(x=x, axis=a, keep_dims=keep), {"x": X}, low, target)


@pytest.mark.parametrize("target", [iOS15, iOS16, iOS17])
@pytest.mark.parametrize("ascending", [False, True])
def test_topk_argsort(target: ct.target, ascending: bool) -> None:
    order = np.argsort(X if ascending else -X, axis=1, kind="stable")
    expected = [np.take_along_axis(X, order, 1)[:, :2], order[:, :2]]
    check(lambda x: mb.topk(x=x, k=2, axis=1, ascending=ascending), {"x": X}, expected, target)
    check(lambda x: mb.argsort(x=x, axis=1, ascending=ascending), {"x": X}, order, target)
    if target != iOS15:
        build = lambda x: mb.topk(x=x, k=2, axis=1, ascending=ascending, return_indices=False)  # noqa: E731
        check(build, {"x": X}, expected[0], target)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_softmax_cumsum(axis: int) -> None:
    check(lambda x: mb.softmax(x=x, axis=axis), {"x": X}, t(X).softmax(axis).numpy())
    check(lambda x: mb.cumsum(x=x, axis=axis), {"x": X}, X.cumsum(axis))
    backwards = np.flip(np.flip(X, axis).cumsum(axis), axis) - X
    build = lambda x: mb.cumsum(x=x, axis=axis, exclusive=True, reverse=True)  # noqa: E731
    check(build, {"x": X}, backwards)


def test_softmax_fp16_is_fp32_inside() -> None:
    x = np.full((1, 70000), 1.0, np.float16)  # the sum of exponentials is far beyond fp16
    check(lambda x: mb.softmax(x=x), {"x": x}, np.full_like(x, 1 / 70000), rtol=1e-2, atol=0)


@pytest.mark.parametrize("axes", [[-1], [1, 2, 3], [1], [0, 1, 2, 3]])
def test_layer_norm(axes: list[int]) -> None:
    dims = tuple(axes)
    shape = [X.shape[axis] for axis in dims]
    gamma, beta = floats(*shape, seed=1), floats(*shape, seed=2)
    kept = [n if axis in {d % 4 for d in dims} else 1 for axis, n in enumerate(X.shape)]
    mean, var = X.mean(dims, keepdims=True), X.var(dims, keepdims=True)
    expected = (X - mean) / np.sqrt(var + 1e-3) * gamma.reshape(kept) + beta.reshape(kept)
    build = lambda x: mb.layer_norm(x=x, axes=axes, gamma=gamma, beta=beta, epsilon=1e-3)  # noqa: E731
    check(build, {"x": X}, expected, atol=1e-4)
    check(lambda x: mb.layer_norm(x=x, axes=axes), {"x": X}, (X - mean) / np.sqrt(var + 1e-5), atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("affine", [False, True])
def test_batch_instance_norm(shape: tuple[int, ...], affine: bool) -> None:
    x, mean, var = floats(*shape), floats(3, seed=1), floats(3, seed=2, low=0.5)
    scale = dict(gamma=floats(3, seed=3), beta=floats(3, seed=4)) if affine else {}
    weights = [t(v) for v in scale.values()] or [None, None]
    expected = F.batch_norm(t(x), t(mean), t(var), *weights, eps=1e-3).numpy()
    build = lambda x: mb.batch_norm(x=x, mean=mean, variance=var, epsilon=1e-3, **scale)  # noqa: E731
    check(build, {"x": x}, expected)
    expected = F.instance_norm(t(x), weight=weights[0], bias=weights[1], eps=1e-3).numpy()
    check(lambda x: mb.instance_norm(x=x, epsilon=1e-3, **scale), {"x": x}, expected, atol=1e-4)


def test_l2_and_response_norm() -> None:
    expected = X / np.sqrt((X * X).sum((1, 2, 3), keepdims=True) + 1e-3)
    check(lambda x: mb.l2_norm(x=x, epsilon=1e-3), {"x": X}, expected)
    expected = F.local_response_norm(t(X), 3, 0.1, 0.5, 2.0).numpy()
    check(lambda x: mb.local_response_norm(x=x, size=3, alpha=0.1, beta=0.5, k=2.0), {"x": X}, expected)


def test_failing_op_is_named() -> None:
    x, i = floats(3, 2), np.array([5], np.int32)
    with pytest.raises(ExecutionError, match=r"^gather 'gather_0' at main\[\d+\] failed: index 5 is outside"):
        run_op(lambda x, i: mb.gather(x=x, indices=i, axis=0, name="gather_0"), {"x": x, "i": i})
