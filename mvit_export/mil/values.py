"""Values of the specification (MIL.proto `Value`) as torch tensors.

Floats are held as float32: a FLOAT16 value is a float32 tensor whose numbers are all representable in fp16, because
CPUs multiply fp32 faster and because the executor itself decides where to round. Unsigned integers that torch lacks
are held in the next wider signed type. `to_numpy` restores the declared type.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mvit_export.errors import ArtifactError
from mvit_export.mil.blob import PACKINGS, BlobFile, unpack
from mvit_export.mil.package import Package

if TYPE_CHECKING:
    from coremltools.proto.MIL_pb2 import TensorType, TensorValue, Value, ValueType

# name in MIL.proto: (numpy type as declared, torch type that holds it)
HELD = {
    "BOOL": ("bool", torch.bool),
    "FLOAT16": ("float16", torch.float32),
    "FLOAT32": ("float32", torch.float32),
    "FLOAT64": ("float64", torch.float64),
    "INT8": ("int8", torch.int8),
    "INT16": ("int16", torch.int16),
    "INT32": ("int32", torch.int32),
    "INT64": ("int64", torch.int64),
    "UINT8": ("uint8", torch.uint8),
    "UINT16": ("uint16", torch.int32),
    "UINT32": ("uint32", torch.int64),
    "INT4": ("int8", torch.int8),
    **{f"UINT{bits}": ("uint8", torch.uint8) for bits in (1, 2, 3, 4, 6)},
}


def type_name(number: int) -> str:
    """Name of a `DataType` number, e.g. 10 -> "FLOAT16"."""
    from coremltools.proto import MIL_pb2

    names = MIL_pb2.DataType.keys()
    return MIL_pb2.DataType.Name(number) if number in MIL_pb2.DataType.values() else f"unknown type {number} of {names}"


def tensor_type(value_type: ValueType) -> tuple[str, tuple[int | None, ...]]:
    """Name of the element type and the shape (None: flexible) of a tensor or state type."""
    kind = value_type.WhichOneof("type")
    if kind == "stateType":
        return tensor_type(value_type.stateType.wrappedType)
    if kind != "tensorType":
        return kind or "no type", ()
    tensor = value_type.tensorType
    return type_name(tensor.dataType), dimensions(tensor)


def dimensions(tensor: TensorType) -> tuple[int | None, ...]:
    return tuple(d.constant.size if d.HasField("constant") else None for d in tensor.dimensions)


def to_numpy(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    """A tensor as a numpy array of the declared type."""
    return tensor.numpy().astype(HELD[dtype][0])


class ValueReader:
    """Reads constants of one package; blob files are opened once."""

    def __init__(self, package: Package) -> None:
        self._package = package
        self._blobs: dict[Path, BlobFile] = {}

    def read(self, value: Value) -> Any:
        """A tensor, or a str, or a list of such for MIL lists. ArtifactError if it cannot be read."""
        kind = value.type.WhichOneof("type")
        if kind == "listType":
            return [self.read(item) for item in value.immediateValue.list.values]
        if kind != "tensorType":
            raise self._damaged(f"a constant is a {kind}, expected a tensor or a list")
        dtype, shape = tensor_type(value.type)
        if None in shape:
            raise self._damaged("a constant has an unknown dimension")
        sizes = [size for size in shape if size is not None]
        if dtype == "STRING":
            return self._string(value)
        if dtype not in HELD:
            raise self._damaged(f"a constant has the element type {dtype}, which is not known here")
        array = (
            self._blob(value, dtype, sizes) if value.HasField("blobFileValue") else self._immediate(value, dtype, sizes)
        )
        return torch.from_numpy(array.copy()).to(HELD[dtype][1]).reshape(sizes)

    def _string(self, value: Value) -> str:
        strings = value.immediateValue.tensor.strings.values
        if len(strings) != 1:
            raise self._damaged(f"a string constant has {len(strings)} values, expected 1")
        return strings[0]

    def _blob(self, value: Value, dtype: str, shape: list[int]) -> np.ndarray:
        if dtype not in PACKINGS:
            raise self._damaged(f"a weight has the element type {dtype}, which blobs do not hold")
        reference = value.blobFileValue
        path = self._package.resolve(reference.fileName)
        if path not in self._blobs:
            self._blobs[path] = BlobFile(path)
        return self._blobs[path].read(reference.offset, dtype, math.prod(shape))

    def _immediate(self, value: Value, dtype: str, shape: list[int]) -> np.ndarray:
        tensor, count = value.immediateValue.tensor, math.prod(shape)
        field = tensor.WhichOneof("value")
        if field is None and count:
            raise self._damaged("a constant has no value")
        try:
            return elements(tensor, field, dtype, count) if count else np.zeros(0, HELD[dtype][0])
        except (ValueError, OverflowError, KeyError) as error:
            raise self._damaged(f"a constant of shape {shape} does not have {count} elements of {dtype}") from error

    def _damaged(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self._package.path} is damaged: {what}; export it again")


def elements(tensor: TensorValue, field: str, dtype: str, count: int) -> np.ndarray:
    """(count,) elements written out in the specification; ValueError if there are not that many."""
    if field == "bytes":
        return unpack(np.frombuffer(tensor.bytes.values, np.uint8), PACKINGS[dtype], count)
    values = np.array(getattr(tensor, field).values, HELD[dtype][0])
    if values.size != count:
        raise ValueError(f"{values.size} elements, expected {count}")
    return values
