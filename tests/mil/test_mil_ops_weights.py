"""Each op alone: compressed weights of both generations, quantized activations, state, classifier, value types."""

from __future__ import annotations

from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, types
from coremltools.converters.mil.mil import Program as MilProgram
from coremltools.converters.mil.mil.ops.defs.iOS16 import constexpr_ops as old
from coremltools.converters.mil.mil.ops.defs.iOS18 import compression as new
from hypothesis import given, settings
from hypothesis import strategies as st
from mil_build import check, floats

import mvit_export.mil as mil
from mvit_export.errors import UsageError
from mvit_export.mil.blob import PACKINGS, Packing, unpack

iOS16, iOS17, iOS18 = (getattr(ct.target, f"iOS{n}") for n in (16, 17, 18))
RNG = np.random.default_rng(0)
ONE = np.zeros((1,), np.float32)


def weight(build, expected: np.ndarray, target: ct.target) -> None:
    """Check a constant: added to a zero, since a program must compute something."""
    check(lambda x: mb.add(x=x, y=build()), {"x": ONE}, ONE + expected.astype(np.float32), target)


def sub_byte(values: np.ndarray, dtype: str) -> np.ndarray:
    return values.astype(types.nptype_from_builtin(types.string_to_builtin(dtype)))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("vector", [False, True])
def test_affine_dequantize(dtype: str, vector: bool) -> None:
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    data = RNG.integers(low, high, (4, 3, 5)).astype(dtype)
    scale = floats(3, low=0.1) if vector else np.float32(0.3)
    zero = RNG.integers(low, high, 3).astype(dtype) if vector else np.array(7, dtype)
    kwargs = dict(quantized_data=data, scale=scale, zero_point=zero, axis=np.int32(1))
    expected = old.constexpr_affine_dequantize.decompress(data, zero, scale, 1)
    weight(lambda: mb.constexpr_affine_dequantize(**kwargs), expected, iOS16)


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_lut_packed_in_bytes(bits: int) -> None:
    shape = np.array([3, 5, 7], np.uint32)
    packed = RNG.integers(0, 256, -(-105 * bits // 8)).astype(np.uint8)
    lut = floats(2**bits)
    expected = old.constexpr_lut_to_dense.decompress(lut, packed, shape)
    weight(lambda: mb.constexpr_lut_to_dense(indices=packed, lut=lut, shape=shape), expected, iOS16)


def test_sparse_packed_in_bytes() -> None:
    dense = floats(3, 5, 7) * (RNG.random((3, 5, 7)) > 0.6)
    mask = np.packbits(dense.ravel() != 0, bitorder="little")
    kwargs = dict(nonzero_data=dense[dense != 0], mask=mask, shape=np.array(dense.shape, np.uint32))
    weight(lambda: mb.constexpr_sparse_to_dense(**kwargs), dense, iOS16)


def test_constexpr_cast() -> None:
    half = floats(20).astype(np.float16)
    weight(lambda: mb.constexpr_cast(source_val=half, output_dtype="fp32"), half, iOS16)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "uint8"])
@pytest.mark.parametrize("blocks", [(1, 1), (8, 1), (8, 4), (1, 2)])
@pytest.mark.parametrize("offset", [False, True])
def test_blockwise_shift_scale(dtype: str, blocks: tuple[int, int], offset: bool) -> None:
    low, high = (-8, 8) if dtype == "int4" else (0, 16)
    data = sub_byte(RNG.integers(low, high, (8, 12)), dtype)
    scale = floats(*blocks, low=0.1)
    extra = dict(offset=sub_byte(RNG.integers(low, high, blocks), dtype)) if offset else {}
    expected = new.constexpr_blockwise_shift_scale.decompress(data, scale, extra.get("offset"))
    weight(lambda: mb.constexpr_blockwise_shift_scale(data=data, scale=scale, **extra), expected, iOS18)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("groups", [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_lut_blocks(bits: int, groups: tuple[int, int]) -> None:
    indices = sub_byte(RNG.integers(0, 2**bits, (6, 8)), f"uint{bits}")
    lut = floats(*groups, 2**bits, 1)
    expected = new.constexpr_lut_to_dense.decompress(indices, lut, None)
    weight(lambda: mb.constexpr_lut_to_dense(indices=indices, lut=lut), expected, iOS18)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("groups", [(1, 1), (3, 1)])
def test_lut_vectors(axis: int, groups: tuple[int, int]) -> None:
    indices = sub_byte(RNG.integers(0, 4, (6, 8)), "uint2")
    lut = floats(*groups, 4, 3)
    expected = new.constexpr_lut_to_dense.decompress(indices, lut, np.int32(axis))
    build = lambda: mb.constexpr_lut_to_dense(indices=indices, lut=lut, vector_axis=np.int32(axis))  # noqa: E731
    weight(build, expected, iOS18)


def sparse(dtype: str, high: int) -> tuple[np.ndarray, np.ndarray]:
    mask = RNG.random((6, 8)) > 0.5
    return sub_byte(mask, "uint1"), sub_byte(RNG.integers(0, high, int(mask.sum())), dtype)


def test_sparse_to_dense() -> None:
    mask, data = sparse("uint8", 200)
    values = data.astype(np.float32)
    expected = new.constexpr_sparse_to_dense.decompress(values, mask)
    weight(lambda: mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask), expected, iOS18)


def test_sparse_quantized_and_palettized() -> None:
    mask, data = sparse("int8", 100)
    scale = floats(6, 1, low=0.1)

    def quantized():
        parts = mb.constexpr_sparse_blockwise_shift_scale(data_mask=mask, nonzero_data=data, scale=scale)
        return mb.constexpr_sparse_to_dense(nonzero_data=parts[1], mask=parts[0])

    parts = new.constexpr_sparse_blockwise_shift_scale.decompress(mask, data, scale, None)
    weight(quantized, new.constexpr_sparse_to_dense.decompress(parts[1], parts[0]), iOS18)
    mask, data = sparse("uint2", 4)
    for lut, options in ((floats(3, 1, 4, 1), {}), (floats(1, 1, 4, 2), dict(vector_axis=np.int32(0)))):

        def palettized(lut=lut, options=options):
            kwargs = dict(indices_mask=mask, indices_nonzero_data=data, lut=lut, **options)
            parts = mb.constexpr_lut_to_sparse(**kwargs)
            return mb.constexpr_sparse_to_dense(nonzero_data=parts[1], mask=parts[0])

        parts = new.constexpr_lut_to_sparse.decompress(mask, data, lut, options.get("vector_axis"))
        weight(palettized, new.constexpr_sparse_to_dense.decompress(parts[1], parts[0]), iOS18)


def test_lut_of_int8_then_scale() -> None:
    indices, lut = sub_byte(RNG.integers(0, 4, (6, 8)), "uint2"), RNG.integers(-100, 100, (1, 1, 4, 1)).astype(np.int8)
    scale = floats(6, 1, low=0.1)

    def build():
        return mb.constexpr_blockwise_shift_scale(data=mb.constexpr_lut_to_dense(indices=indices, lut=lut), scale=scale)

    weight(build, lut.ravel()[indices.astype(int)] * scale, iOS18)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_quantize_dequantize(dtype: str, vector: bool, zero: bool) -> None:
    x = floats(2, 3, 4, low=-50, high=50)
    scale = np.array([0.1, 0.25, 0.5], np.float32) if vector else np.float32(0.25)
    extra = dict(zero_point=np.full(3, 5, dtype) if vector else np.array(5, dtype)) if zero else {}
    extra |= dict(axis=np.int32(1)) if vector else {}

    def build(x):
        q = mb.quantize(input=x, scale=scale, output_dtype=dtype, **extra)
        return mb.dequantize(input=q, scale=scale, **extra)

    s, z = (scale.reshape(1, 3, 1) if vector else scale), 5 if zero else 0
    limits = np.iinfo(dtype)
    check(build, {"x": x}, s * (np.clip(np.round(x / s) + z, limits.min, limits.max) - z), iOS17)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(PACKINGS)), count=st.integers(1, 40), data=st.data())
def test_unpacked_bits_are_those_that_were_packed(name: str, count: int, data: st.DataObject) -> None:
    packing: Packing = PACKINGS[name]
    if packing.bits >= 8:
        values = RNG.integers(0, 100, count).astype(packing.numpy)
        packed = np.frombuffer(values.tobytes(), np.uint8)
    else:
        values = RNG.integers(0, 2**packing.bits, count)
        bits = (values[:, None] >> np.arange(packing.bits)) & 1
        packed = np.packbits(bits.ravel().astype(np.uint8), bitorder="little")
        if packing.signed:
            values = np.where(values >= 2 ** (packing.bits - 1), values - 2**packing.bits, values)
    np.testing.assert_array_equal(unpack(packed, packing, count), values)


@pytest.mark.parametrize("size", [4, 40])  # written into the specification, and into the blob
@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "int16", "uint16", "int8", "uint8", "bool"])
def test_constants_of_every_type(dtype: str, size: int) -> None:
    numbers = RNG.integers(0, 100, size) if dtype != "bool" else RNG.integers(0, 2, size)
    values = numbers.astype(dtype)
    if values.dtype.kind in "iu":  # to the ends of the type, as far as float32 counts in ones
        values[:2] = max(np.iinfo(dtype).min, -(2**24)), min(np.iinfo(dtype).max, 2**24)
    build = lambda x: mb.add(x=x, y=mb.cast(x=mb.identity(x=values), dtype="fp32"))  # noqa: E731
    check(build, {"x": ONE}, values.astype(np.float32), iOS18)


def test_state(tmp_path: Path) -> None:
    inputs = {"x": mb.placeholder((2,), types.fp16), "total": mb.state_tensor_placeholder((2,), types.fp16)}
    with Function(inputs, opset_version=iOS18) as function:
        x, total = function.inputs["x"], function.inputs["total"]
        added = mb.add(x=mb.read_state(input=total), y=x)
        function.set_outputs(
            [mb.mul(x=mb.coreml_update_state(state=total, value=added), y=np.float16(2), name="double")]
        )
    program = MilProgram()
    program.add_function("main", function)
    options = dict(minimum_deployment_target=iOS18, pass_pipeline=ct.PassPipeline.EMPTY, skip_model_load=True)
    ct.convert(program, source="milinternal", convert_to="mlprogram", **options).save(str(tmp_path / "s.mlpackage"))
    loaded = mil.load(tmp_path / "s.mlpackage")
    one = np.ones(2, np.float16)
    state = loaded.make_state()
    assert [float(loaded.run({"x": one}, state)["double"][0]) for _ in range(3)] == [2.0, 4.0, 6.0]
    assert float(loaded.run({"x": one}, loaded.make_state())["double"][0]) == 2.0
    with pytest.raises(UsageError, match=r"has state \(total\): call run\(inputs, state=program.make_state\(\)\)"):
        loaded(x=one)
