"""Each op alone, shapes, slices, gathers and scatters, against torch or numpy, through a saved package."""

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
X = floats(2, 3, 4, 5)


def t(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x)


@pytest.mark.parametrize("target", [iOS15, iOS17])
@pytest.mark.parametrize("shape", [[6, 20], [-1, 5], [2, 3, 20, 1], [0, 0, -1, 5]])
def test_reshape(target: ct.target, shape: list[int]) -> None:
    known = [X.shape[i] if n == 0 else n for i, n in enumerate(shape)]
    check(lambda x: mb.reshape(x=x, shape=shape), {"x": X}, X.reshape(known), target)


def test_reshape_zero_counts_from_the_right_since_ios17() -> None:
    x = floats(2, 50)
    check(lambda x: mb.reshape(x=x, shape=[1, 0, -1, 0]), {"x": x}, x.reshape(1, 1, 2, 50), iOS17)


def test_reshape_like() -> None:
    ref = floats(5, 4, 9)

    def build(x, ref):
        return mb.reshape_like(x=x, ref_tensors=(x, ref), begins=(0, 0), ends=(2, 2), end_masks=(False, False))

    check(build, {"x": X, "ref": ref}, X.reshape(2, 3, 5, 4), iOS16)


def test_shape_that_is_computed() -> None:
    def build(x):
        sizes = mb.shape(x=x)
        last = mb.slice_by_index(x=sizes, begin=[-1], end=[0], end_mask=[True])
        return mb.reshape(x=x, shape=mb.concat(values=[np.array([-1], np.int32), last], axis=0))

    check(build, {"x": X}, X.reshape(-1, 5))
    check(lambda x: mb.shape(x=x), {"x": X}, np.array(X.shape, np.int32))


def test_axes_of_size_one() -> None:
    y = floats(2, 1, 3, 1)
    check(lambda y: mb.squeeze(x=y, axes=[-1]), {"y": y}, y.squeeze(-1))
    check(lambda y: mb.squeeze(x=y), {"y": y}, y.squeeze())
    check(lambda x: mb.expand_dims(x=x, axes=[0, -1]), {"x": X[0]}, X[:1, ..., None])
    check(lambda x: mb.expand_dims(x=x, axes=[-1, -3]), {"x": X[0]}, X[0][:, :, None, :, None])
    check(lambda x: mb.flatten2d(x=x, axis=2), {"x": X}, X.reshape(6, 20))


@pytest.mark.parametrize("perm", [[0, 2, 3, 1], [3, 2, 1, 0], [-1, 0, 1, 2]])
def test_transpose(perm: list[int]) -> None:
    check(lambda x: mb.transpose(x=x, perm=perm), {"x": X}, X.transpose(perm))


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_slice_by_index(data: st.DataObject, shape: list[int]) -> None:
    x, rank = floats(*shape), len(shape)
    begin = [data.draw(st.integers(0, n - 1)) for n in shape]
    end = [data.draw(st.integers(b + 1, n)) for b, n in zip(begin, shape, strict=True)]
    stride = [data.draw(st.integers(1, 3)) for _ in shape]
    masks = [[data.draw(st.booleans()) for _ in range(rank)] for _ in range(3)]
    masks[2][data.draw(st.integers(0, rank - 1))] = False  # a scalar result is not what this test is about
    want = tuple(
        b if drop else slice(None if open_begin else b, None if open_end else e, s)
        for b, e, s, open_begin, open_end, drop in zip(begin, end, stride, *masks, strict=True)
    )
    # the builder refuses open begins on dropped axes, and so does the semantics: the index is `begin`
    masks[0] = [m and not drop for m, drop in zip(masks[0], masks[2], strict=True)]
    names = ("begin_mask", "end_mask", "squeeze_mask")
    kwargs = dict(begin=begin, end=end, stride=stride, **dict(zip(names, masks, strict=True)))
    check(lambda x: mb.slice_by_index(x=x, **kwargs), {"x": x}, x[want])


def test_slice_backwards_and_from_the_end() -> None:
    ends = dict(end=[1, 0, 0, 0], end_mask=[False, True, False, True])
    build = lambda x: mb.slice_by_index(x=x, begin=[0, -1, 3, -2], stride=[1, -1, -2, 1], **ends)  # noqa: E731
    check(build, {"x": X}, X[0:1, ::-1, 3:0:-2, -2:])


def test_slice_by_size_and_update() -> None:
    check(lambda x: mb.slice_by_size(x=x, begin=[0, 1, 2, 0], size=[2, 2, -1, 3]), {"x": X}, X[:, 1:3, 2:, :3])
    update = floats(2, 3, 2, 5, seed=1)
    expected = X.copy()
    expected[:, :, 1:4:2] = update

    def build(x, update):
        return mb.slice_update(x=x, update=update, begin=[0, 0, 1, 0], end=[2, 3, 4, 5], stride=[1, 1, 2, 1])

    check(build, {"x": X, "update": update}, expected, iOS18)


def test_split_concat_stack() -> None:
    check(lambda x: mb.split(x=x, num_splits=2, axis=2), {"x": X}, np.split(X, 2, 2))
    check(lambda x: mb.split(x=x, split_sizes=[1, 4], axis=-1), {"x": X}, [X[..., :1], X[..., 1:]])
    y = floats(2, 3, 4, 5, seed=1)
    check(lambda x, y: mb.concat(values=[x, y, x], axis=1), {"x": X, "y": y}, np.concatenate([X, y, X], 1))
    check(lambda x, y: mb.stack(values=[x, y], axis=-1), {"x": X, "y": y}, np.stack([X, y], -1))
    mixed = np.stack([X, y], 2).reshape(2, 6, 4, 5)
    check(lambda x, y: mb.concat(values=[x, y], axis=1, interleave=True), {"x": X, "y": y}, mixed)


@settings(max_examples=12, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(3, 5), min_size=1, max_size=5))
@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate"])
def test_pad(mode: str, data: st.DataObject, shape: list[int]) -> None:
    axes = data.draw(st.integers(1, len(shape)))
    pads = [data.draw(st.integers(0, 2)) for _ in range(2 * axes)]
    pairs = [(0, 0)] * (len(shape) - axes) + list(zip(pads[::2], pads[1::2], strict=True))
    x = floats(*shape)
    options = dict(constant_values=1.5) if mode == "constant" else {}
    expected = np.pad(x, pairs, {"replicate": "edge"}.get(mode, mode), **options)
    check(lambda x: mb.pad(x=x, pad=pads, mode=mode, constant_val=1.5), {"x": x}, expected)


def test_blocks() -> None:
    x = floats(2, 8, 4, 6)
    check(lambda x: mb.pixel_shuffle(x=x, upscale_factor=2), {"x": x}, F.pixel_shuffle(t(x), 2).numpy())
    expected = F.pixel_unshuffle(t(x), 2).numpy()
    check(lambda x: mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(2)), {"x": x}, expected, iOS16)
    deep = x.reshape(2, 8, 2, 2, 3, 2).transpose(0, 3, 5, 1, 2, 4).reshape(2, 32, 2, 3)  # TensorFlow's order
    check(lambda x: mb.space_to_depth(x=x, block_size=2), {"x": x}, deep)
    check(lambda x: mb.depth_to_space(x=x, block_size=2), {"x": deep}, x)
    many = np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0))).reshape(2, 8, 3, 2, 3, 2).transpose(3, 5, 0, 1, 2, 4)
    many = np.ascontiguousarray(many.reshape(8, 8, 3, 3))
    check(lambda x: mb.space_to_batch(x=x, block_shape=[2, 2], paddings=[[1, 1], [0, 0]]), {"x": x}, many)
    check(lambda x: mb.batch_to_space(x=x, block_shape=[2, 2], crops=[[1, 1], [0, 0]]), {"x": many}, x)


def test_reverse_tile_windows_crop() -> None:
    check(lambda x: mb.reverse(x=x, axes=[1, -1]), {"x": X}, X[:, ::-1, :, ::-1])
    check(lambda x: mb.reverse(x=x), {"x": X}, X[::-1, ::-1, ::-1, ::-1])
    check(lambda x: mb.tile(x=x, reps=[1, 2, 1, 3]), {"x": X}, np.tile(X, (1, 2, 1, 3)))
    check(lambda x: mb.crop(x=x, crop_height=[1, 2], crop_width=[0, 3]), {"x": X}, X[:, :, 1:2, :2])
    windows = np.stack([X[..., 0:2, :], X[..., 2:4, :]], 2)
    check(lambda x: mb.sliding_windows(x=x, axis=2, size=2, stride=2), {"x": X}, windows)


@pytest.mark.parametrize("target", [iOS15, iOS16, iOS17])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gather(target: ct.target, axis: int) -> None:
    indices = np.array([[0, 1], [1, 0]], np.int32)
    check(lambda x, i: mb.gather(x=x, indices=i, axis=axis), {"x": X, "i": indices}, X.take(indices, axis), target)
    scalar = X.take(1, axis)
    check(lambda x: mb.gather(x=x, indices=np.int32(1), axis=axis), {"x": X}, scalar, target)
    row = X[0, 0, 0]
    check(lambda x: mb.add(x=mb.gather(x=x, indices=np.int32(2)), y=x), {"x": row}, row + row[2], target)


def test_gather_negative_indices_only_before_ios17() -> None:
    indices = np.array([-1, 0], np.int32)
    build = lambda x, i: mb.gather(x=x, indices=i, axis=1)  # noqa: E731
    check(build, {"x": X, "i": indices}, X[:, [-1, 0]], iOS16)
    with pytest.raises(ExecutionError, match="index -1 is outside of an axis with 3 elements"):
        run_op(build, {"x": X, "i": indices}, iOS17)


def test_gather_batched() -> None:
    indices = np.array([[0, 2, 1], [1, 1, 0]], np.int32)
    expected = np.stack([X[b].take(indices[b], axis=1) for b in range(2)])
    check(lambda x, i: mb.gather(x=x, indices=i, axis=2, batch_dims=1), {"x": X, "i": indices}, expected, iOS17)


def test_gather_along_axis_and_nd() -> None:
    indices = np.random.default_rng(0).integers(0, 3, (2, 2, 4, 5)).astype(np.int32)
    expected = np.take_along_axis(X, indices, 1)
    check(lambda x, i: mb.gather_along_axis(x=x, indices=i, axis=1), {"x": X, "i": indices}, expected)
    rows = np.array([[0, 1], [1, 2], [1, 0]], np.int32)
    check(lambda x, i: mb.gather_nd(x=x, indices=i), {"x": X, "i": rows}, X[rows[:, 0], rows[:, 1]])
    rows = np.array([[[0, 1]], [[2, 3]]], np.int32)
    expected = np.stack([X[0][[0], [1]], X[1][[2], [3]]])
    check(lambda x, i: mb.gather_nd(x=x, indices=i, batch_dims=1), {"x": X, "i": rows}, expected, iOS16)


MODES = {
    "update": lambda d, u: u,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}


@pytest.mark.parametrize("mode", MODES)
def test_scatter(mode: str) -> None:
    indices, updates = np.array([2, 0], np.int32), floats(2, 2, 4, 5, seed=1, low=0.5)
    expected = X.copy()
    expected[:, [2, 0]] = MODES[mode](X[:, [2, 0]], updates)
    given = {"x": X, "i": indices, "u": updates}
    check(lambda x, i, u: mb.scatter(data=x, indices=i, updates=u, axis=1, mode=mode), given, expected)

    along = np.random.default_rng(0).permuted(np.tile(np.arange(3), (2, 4, 5, 1)), axis=-1).transpose(0, 3, 1, 2)
    along = np.ascontiguousarray(along[:, :2]).astype(np.int32)
    expected = X.copy()
    np.put_along_axis(expected, along, MODES[mode](np.take_along_axis(X, along, 1), updates), 1)
    given = {"x": X, "i": along, "u": updates}
    check(lambda x, i, u: mb.scatter_along_axis(data=x, indices=i, updates=u, axis=1, mode=mode), given, expected)

    places, updates = np.array([[0, 1], [1, 2]], np.int32), floats(2, 4, 5, seed=2, low=0.5)
    expected = X.copy()
    expected[[0, 1], [1, 2]] = MODES[mode](X[[0, 1], [1, 2]], updates)
    given = {"x": X, "i": places, "u": updates}
    check(lambda x, i, u: mb.scatter_nd(data=x, indices=i, updates=u, mode=mode), given, expected)


def test_numbers_made_from_nothing() -> None:
    x = np.array([1, 0, 2], np.int32)
    check(lambda x: mb.fill(shape=[2, 3], value=1.5), {"x": x}, np.full((2, 3), 1.5, np.float32))
    check(lambda x: mb.fill(shape=mb.shape(x=x), value=np.int32(7)), {"x": x}, np.full(3, 7, np.int32))
    check(lambda x: mb.fill_like(ref_tensor=x, value=2.5), {"x": X}, np.full_like(X, 2.5), iOS16)
    end = np.array(9, np.int32)
    check(lambda x: mb.range_1d(start=np.int32(1), end=end, step=np.int32(3)), {"x": x}, np.arange(1, 9, 3))
    hot = np.where(np.eye(4)[x].astype(bool), 5.0, -1.0).astype(np.float32)
    build = lambda x, a: mb.one_hot(indices=x, one_hot_vector_size=4, axis=a, on_value=5.0, off_value=-1.0)  # noqa: E731
    check(lambda x: build(x, -1), {"x": x}, hot)
    check(lambda x: build(x, 0), {"x": x}, hot.T)
    check(lambda x: mb.non_zero(x=x), {"x": x}, np.argwhere(x))


@pytest.mark.parametrize(("lower", "upper"), [(0, -1), (-1, 0), (0, 0), (1, 2), (-1, -1)])
def test_band_part(lower: int, upper: int) -> None:
    expected = X if upper < 0 else np.tril(X, upper)
    expected = expected if lower < 0 else np.triu(expected, -lower)
    check(lambda x: mb.band_part(x=x, lower=lower, upper=upper), {"x": X}, expected)


def test_unsupported_ops_are_all_named_at_load() -> None:
    def build(x):
        boxes = np.zeros((2, 4), np.float32)
        y = mb.crop_resize(x=x, boxes=boxes, target_height=2, target_width=2, name="cropped")
        return mb.random_normal(shape=mb.shape(x=y), name="noise")

    with pytest.raises(UnsupportedOpError) as error:
        run_op(build, {"x": X})
    message = str(error.value)
    assert "\n" not in message and "crop_resize 'cropped' at main[" in message and "random_normal 'noise'" in message
