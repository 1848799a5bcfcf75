"""Each op alone, convolution, pooling, products, attention and resizing, against torch, through a saved package."""

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

from mvit_export.mil import ExecutionError, UnsupportedOpError

iOS15, iOS16, iOS17, iOS18 = (getattr(ct.target, f"iOS{n}") for n in (15, 16, 17, 18))
SIZES = {1: (9,), 2: (9, 8), 3: (6, 5, 7)}
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def t(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x)


def torch_pad(x: np.ndarray, pad: list[int], value: float = 0.0) -> torch.Tensor:
    pairs = list(zip(pad[::2], pad[1::2], strict=True))
    return F.pad(t(x), [n for pair in reversed(pairs) for n in pair], value=value)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(data=st.data(), nd=st.integers(1, 3), groups=st.sampled_from([1, 2, 4]), bias=st.booleans())
def test_conv_custom_padding(data: st.DataObject, nd: int, groups: int, bias: bool) -> None:
    x = floats(2, 4, *SIZES[nd])
    strides, dilations = ([data.draw(st.integers(1, 2)) for _ in range(nd)] for _ in range(2))
    pad = [data.draw(st.integers(0, 2)) for _ in range(2 * nd)]
    w = floats(8, 4 // groups, *[data.draw(st.integers(1, 3)) for _ in range(nd)], seed=1)
    b = floats(8, seed=2) if bias else None
    expected = CONV[nd](torch_pad(x, pad), t(w), None if b is None else t(b), strides, 0, dilations, groups)
    kwargs = dict(strides=strides, dilations=dilations, groups=groups, pad_type="custom", pad=pad)
    check(lambda x: mb.conv(x=x, weight=w, bias=b, **kwargs), {"x": x}, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("pad_type", ["valid", "same", "same_lower"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_conv_named_padding(pad_type: str, stride: int, kernel: int) -> None:
    x, w = floats(1, 2, 9, 8), floats(3, 2, kernel, kernel, seed=1)
    pad = [0, 0, 0, 0]
    if pad_type != "valid":
        totals = [max(0, (-(-n // stride) - 1) * stride + kernel - n) for n in x.shape[2:]]
        pad = [n for total in totals for n in (total // 2, total - total // 2)]
        pad = [pad[1], pad[0], pad[3], pad[2]] if pad_type == "same_lower" else pad
    expected = F.conv2d(torch_pad(x, pad), t(w), stride=stride).numpy()
    kwargs = dict(strides=[stride] * 2, pad_type=pad_type)
    check(lambda x: mb.conv(x=x, weight=w, **kwargs), {"x": x}, expected, iOS16, atol=1e-4)


@pytest.mark.parametrize("nd", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv_transpose(nd: int, groups: int, stride: int) -> None:
    x, w = floats(2, 4, *SIZES[nd]), floats(4, 3, *[3] * nd, seed=1)
    b = floats(3 * groups, seed=2)
    whole = TRANSPOSED[nd](t(x), t(w), t(b), stride, 0, 0, groups, 1)
    kwargs = dict(weight=w, bias=b, strides=[stride] * nd, groups=groups)
    check(lambda x: mb.conv_transpose(x=x, **kwargs), {"x": x}, whole.numpy(), atol=1e-4)
    padded = TRANSPOSED[nd](t(x), t(w), t(b), stride, 1, 0, groups, 1).numpy()
    build = lambda x: mb.conv_transpose(x=x, pad_type="custom", pad=[1, 1] * nd, **kwargs)  # noqa: E731
    check(build, {"x": x}, padded, atol=1e-4)
    if stride == 2:
        longer = TRANSPOSED[nd](t(x), t(w), t(b), stride, 1, 1, groups, 1).numpy()  # output_padding
        shape = list(longer.shape)
        build = lambda x: mb.conv_transpose(x=x, pad_type="custom", pad=[1, 1] * nd, output_shape=shape, **kwargs)  # noqa: E731
        check(build, {"x": x}, longer, atol=1e-4)
        same = whole[(..., *[slice(0, 2 * n) for n in SIZES[nd]])].numpy()
        check(lambda x: mb.conv_transpose(x=x, pad_type="same", **kwargs), {"x": x}, same, atol=1e-4)


POOLS = {"max_pool": {1: F.max_pool1d, 2: F.max_pool2d}, "avg_pool": {1: F.avg_pool1d, 2: F.avg_pool2d}}


@pytest.mark.parametrize(("name", "exclude"), [("max_pool", False), ("avg_pool", False), ("avg_pool", True)])
@pytest.mark.parametrize("nd", [1, 2])
@pytest.mark.parametrize("ceil", [False, True])
def test_pool_as_torch(name: str, exclude: bool, nd: int, ceil: bool) -> None:
    x, options = floats(2, 3, *SIZES[nd]), dict(kernel_sizes=[3] * nd, strides=[2] * nd, ceil_mode=ceil)
    averaging = dict(count_include_pad=not exclude) if name == "avg_pool" else {}
    expected = POOLS[name][nd](t(x), 3, 2, 1, ceil_mode=ceil, **averaging).numpy()
    extra = dict(exclude_padding_from_average=True) if exclude else {}
    build = lambda x: getattr(mb, name)(x=x, pad_type="custom", pad=[1, 1] * nd, **options, **extra)  # noqa: E731
    check(build, {"x": x}, expected)


@pytest.mark.parametrize("pad_type", ["same", "same_lower", "custom"])
def test_pool_uneven_padding(pad_type: str) -> None:
    x = floats(2, 3, 9, 8)
    pad = {"same": [0, 0, 0, 1], "same_lower": [0, 0, 1, 0], "custom": [0, 2, 1, 0]}[pad_type]
    kernel, strides = [1, 3], [1, 2]
    options = dict(kernel_sizes=kernel, strides=strides, pad_type=pad_type)
    options |= dict(pad=pad) if pad_type == "custom" else {}
    expected = F.max_pool2d(torch_pad(x, pad, -np.inf), kernel, strides)
    check(lambda x: mb.max_pool(x=x, **options), {"x": x}, expected.numpy(), iOS16)
    total = F.avg_pool2d(torch_pad(x, pad), kernel, strides)
    check(lambda x: mb.avg_pool(x=x, **options), {"x": x}, total.numpy(), iOS16)
    share = F.avg_pool2d(torch_pad(np.ones_like(x), pad), kernel, strides)
    if pad_type != "custom":
        build = lambda x: mb.avg_pool(x=x, exclude_padding_from_average=True, **options)  # noqa: E731
        check(build, {"x": x}, (total / share).numpy(), iOS16)
    expected = F.avg_pool2d(torch_pad(x, pad) ** 2, kernel, strides).mul(3).sqrt()
    check(lambda x: mb.l2_pool(x=x, **options), {"x": x}, expected.numpy(), iOS16)


@settings(max_examples=10, deadline=None)
@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    n=st.integers(1, 4),
    k=st.integers(1, 5),
    flip=st.tuples(*[st.booleans()] * 2),
)
def test_matmul(batch: list[int], n: int, k: int, flip: tuple[bool, bool]) -> None:
    x, y = floats(*batch, n, k), floats(k, 3, seed=1)
    inputs = {"x": np.ascontiguousarray(x.swapaxes(-1, -2)) if flip[0] else x, "y": y.T.copy() if flip[1] else y}
    build = lambda x, y: mb.matmul(x=x, y=y, transpose_x=flip[0], transpose_y=flip[1])  # noqa: E731
    check(build, inputs, x @ y)


def test_linear_einsum() -> None:
    x, w, b = floats(2, 5, 4), floats(3, 4, seed=1), floats(3, seed=2)
    check(lambda x: mb.linear(x=x, weight=w, bias=b), {"x": x}, x @ w.T + b)
    check(lambda x: mb.linear(x=x, weight=w), {"x": x}, x @ w.T)
    for equation, shapes in {
        "nchw,nwhu->nchu": ((2, 3, 4, 5), (2, 5, 4, 6)),
        "chw,whr->chr": ((3, 4, 5), (5, 4, 6)),
    }.items():
        x, y = floats(*shapes[0]), floats(*shapes[1], seed=1)
        expected = np.einsum(equation, x, y)
        check(lambda x, y, e=equation: mb.einsum(values=(x, y), equation=e), {"x": x, "y": y}, expected)


@pytest.mark.parametrize("mask", [None, "float", "bool"])
def test_attention(mask: str | None) -> None:
    q, k, v = floats(2, 2, 5, 4), floats(2, 2, 6, 4, seed=1), floats(2, 2, 6, 3, seed=2)
    bias = floats(5, 6, seed=3)
    scores = q @ k.swapaxes(-1, -2) / 2.0
    scores = scores + (bias if mask == "float" else np.where(bias > -1, 0, -np.inf) if mask == "bool" else 0)

    def build(q, k, v):
        given = {"float": bias, "bool": bias > -1}.get(mask or "")
        return mb.scaled_dot_product_attention(
            query=q, key=k, value=v, **({} if given is None else dict(attn_mask=given))
        )

    expected = (t(scores).float().softmax(-1) @ t(v)).numpy()
    check(build, {"q": q, "k": k, "v": v}, expected, iOS18)


def reference_grid(n: int, m: int, mode: str) -> np.ndarray:
    """The sampling grids as coremltools writes them down."""
    i = np.arange(m)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        points = i * (n - 1) / max(m - 1, 1)
        points = np.array([(n - 1) / 2]) if m == 1 and mode == "ALIGN_CORNERS" else points
    elif mode == "DEFAULT":
        points = i * ((n - n / m) / max(m - 1, 1))
    elif mode == "OFFSET_CORNERS":
        delta = max(1, n - 1) / m
        points = 0.5 * delta + i * delta
    else:
        points = i * n / m + 0.5 * n / m - 0.5
    return np.clip(points, 0, n - 1)


def reference_bilinear(x: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    for axis, m in zip((-2, -1), size, strict=True):
        n = x.shape[axis]
        points = reference_grid(n, m, mode)
        x = np.apply_along_axis(lambda row, p=points, n=n: np.interp(p, np.arange(n), row), axis, x)
    return x.astype(np.float32)


MODES = ["STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(5, 6), (8, 3), (1, 1), (4, 4), (9, 1)])
def test_resize_bilinear(mode: str, size: tuple[int, int]) -> None:
    x = floats(2, 3, 4, 6)
    expected = reference_bilinear(x, size, mode)
    kwargs = dict(target_size_height=size[0], target_size_width=size[1], sampling_mode=mode)
    check(lambda x: mb.resize_bilinear(x=x, **kwargs), {"x": x}, expected)
    shape = np.array([0, *size], np.int32)
    build = lambda x: mb.resize(x=x, shape=shape, resized_dims=np.uint32(2), sampling_mode=mode)  # noqa: E731
    check(build, {"x": x}, expected)


@pytest.mark.parametrize("size", [(7, 9), (3, 2), (14, 12)])
def test_resize_as_torch(size: tuple[int, int]) -> None:
    x = floats(2, 3, 7, 6)
    kwargs = dict(target_size_height=size[0], target_size_width=size[1])
    half = F.interpolate(t(x), size, mode="bilinear", align_corners=False).numpy()
    check(lambda x: mb.resize_bilinear(x=x, sampling_mode="UNALIGN_CORNERS", **kwargs), {"x": x}, half)
    corners = F.interpolate(t(x), size, mode="bilinear", align_corners=True).numpy()
    check(lambda x: mb.resize_bilinear(x=x, sampling_mode="STRICT_ALIGN_CORNERS", **kwargs), {"x": x}, corners)
    near = F.interpolate(t(x), size, mode="nearest").numpy()
    check(lambda x: mb.resize_nearest_neighbor(x=x, **kwargs), {"x": x}, near)
    shape = np.array(size, np.int32)
    kwargs = dict(shape=shape, resized_dims=np.uint32(2), interpolation_mode="NEAREST_NEIGHBOR")
    check(lambda x: mb.resize(x=x, **kwargs), {"x": x}, near)


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("factor", [2, 1.5])
def test_upsample(corners: bool, factor: float) -> None:
    x = floats(2, 3, 4, 6)
    size = (int(4 * factor), int(6 * factor))
    kwargs = dict(scale_factor_height=factor, scale_factor_width=factor)
    expected = F.interpolate(t(x), size, mode="bilinear", align_corners=corners).numpy()
    check(lambda x: mb.upsample_bilinear(x=x, align_corners=corners, **kwargs), {"x": x}, expected)
    near = F.interpolate(t(x), size, mode="nearest").numpy()
    check(lambda x: mb.upsample_nearest_neighbor(x=x, **kwargs), {"x": x}, near)


def test_upsample_half_pixel_centers() -> None:
    x = floats(2, 3, 4, 6)
    kwargs = dict(scale_factor_height=2, scale_factor_width=2, align_corners=False, half_pixel_centers=False)
    check(lambda x: mb.upsample_bilinear(x=x, **kwargs), {"x": x}, reference_bilinear(x, (8, 12), "DEFAULT"), iOS16)


def test_sampling_without_a_rule_is_refused() -> None:
    x, shape = floats(1, 1, 4, 4), np.array([3, 3], np.int32)
    kwargs = dict(shape=shape, resized_dims=np.uint32(2), interpolation_mode="NEAREST_NEIGHBOR")
    with pytest.raises(ExecutionError, match="UNALIGN_CORNERS has no written rule"):
        run_op(lambda x: mb.resize(x=x, sampling_mode="UNALIGN_CORNERS", **kwargs), {"x": x})
    with pytest.raises(ExecutionError, match="grid is not defined"):
        run_op(lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=1.3, scale_factor_width=1.0), {"x": x})


@pytest.mark.parametrize("name", ["conv", "depthwise", "linear", "matmul", "reduce_sum", "reduce_mean", "einsum"])
def test_fp16_accumulation(name: str) -> None:
    """fp32 sums round once; fp16 sums stagnate: 4096 ones in fp16 stop growing at 2048."""
    n = 4096
    ones, row = np.ones((1, n), np.float16), np.ones((1, n, 1, 1), np.float16)
    builds = {
        "conv": (lambda x: mb.conv(x=x, weight=np.ones((2, n, 1, 1), np.float16)), row),
        "depthwise": (
            lambda x: mb.conv(x=x, weight=np.ones((1, 1, 64, 64), np.float16), groups=1),
            np.ones((1, 1, 64, 64), np.float16),
        ),
        "linear": (lambda x: mb.linear(x=x, weight=np.ones((2, n), np.float16)), ones),
        "matmul": (lambda x: mb.matmul(x=x, y=np.ones((n, 2), np.float16)), ones),
        "reduce_sum": (lambda x: mb.reduce_sum(x=x, axes=[-1]), ones),
        "reduce_mean": (lambda x: mb.reduce_mean(x=x, axes=[-1], keep_dims=True), ones),
        "einsum": (
            lambda x: mb.einsum(values=(x, np.ones((n, 1, 2), np.float16)), equation="chw,whr->chr"),
            ones[None],
        ),
    }
    build, x = builds[name]
    wide, narrow = run_op(build, {"x": x})[0], run_op(build, {"x": x}, accumulate="fp16")[0]
    scale = n if name == "reduce_mean" else 1
    assert wide.shape == narrow.shape and wide.dtype == narrow.dtype == np.float16
    assert np.all(wide * scale == n) and np.all(narrow * scale == 2048)


@pytest.mark.parametrize(
    "kwargs", [dict(groups=2), dict(strides=[2, 1]), dict(dilations=[2, 2]), dict(pad_type="same")]
)
def test_fp16_accumulation_is_the_same_convolution(kwargs: dict) -> None:
    x, b = floats(2, 4, 7, 6).astype(np.float16), floats(6, seed=2).astype(np.float16)
    w = floats(6, 4 // kwargs.get("groups", 1), 3, 2, seed=1).astype(np.float16)
    build = lambda x: mb.conv(x=x, weight=w, bias=b, **kwargs)  # noqa: E731
    wide, narrow = run_op(build, {"x": x})[0], run_op(build, {"x": x}, accumulate="fp16")[0]
    np.testing.assert_allclose(narrow, wide, rtol=0.05, atol=0.05)
    assert not np.array_equal(wide, narrow)


def test_unknown_value_of_an_attribute_is_refused_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    from coremltools.converters.mil.mil.ops.defs.iOS15.activation import gelu

    monkeypatch.setattr(gelu, "type_inference", lambda self: self.x.sym_type)
    with pytest.raises(UnsupportedOpError, match=r"gelu 'g' at main\[\d\] \(mode = 'NEWER', supported: EXACT, TANH"):
        run_op(lambda x: mb.gelu(x=x, mode="NEWER", name="g"), {"x": floats(3)})
