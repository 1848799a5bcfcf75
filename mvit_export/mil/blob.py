"""Weight blobs (`weights/weight.bin`) of an ML Program, read without coremltools.

The layout is that of coremltools' open storage format (mlmodel/src/MILBlob/Blob/StorageFormat.hpp), little endian:

    0   64 bytes   header: u32 count of entries, u32 version (2), zeros
    ..  64 bytes   metadata of one entry, where a reference's offset points: u32 sentinel 0xDEADBEEF,
                   u32 data type, u64 size in bytes, u64 offset of the data, u64 padding in bits (sub-byte types)

This has its own parser because coremltools' reader trusts what it reads: here every number is checked against the
file's size before it is used.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mvit_export.errors import ArtifactError
from mvit_export.system.reading import WEIGHTS, check_regular

HEADER = struct.Struct("<II")
METADATA = struct.Struct("<IIQQQ")
BLOCK = 64
VERSION = 2
SENTINEL = 0xDEADBEEF


@dataclass(frozen=True)
class Packing:
    """How elements of one type are packed in bytes: `bits` each, least significant first if several share a byte."""

    code: int  # in the blob's metadata
    bits: int
    numpy: str  # the type that holds one unpacked element

    @property
    def signed(self) -> bool:
        return np.dtype(self.numpy).kind == "i"


# fmt: off
PACKINGS = {  # by the name of the type in MIL.proto
    "FLOAT16": Packing( 1, 16, "float16"), "FLOAT32": Packing( 2, 32, "float32"),
    "UINT8":   Packing( 3,  8, "uint8"),   "INT8":    Packing( 4,  8, "int8"),
    "INT16":   Packing( 6, 16, "int16"),   "UINT16":  Packing( 7, 16, "uint16"),
    "INT4":    Packing( 8,  4, "int8"),    "UINT1":   Packing( 9,  1, "uint8"),
    "UINT2":   Packing(10,  2, "uint8"),   "UINT4":   Packing(11,  4, "uint8"),
    "UINT3":   Packing(12,  3, "uint8"),   "UINT6":   Packing(13,  6, "uint8"),
    "INT32":   Packing(14, 32, "int32"),   "UINT32":  Packing(15, 32, "uint32"),
}
# fmt: on


def unpack(data: np.ndarray, packing: Packing, count: int) -> np.ndarray:
    """`count` elements from bytes, uint8 (N,) -> (count,) of `packing.numpy`. ValueError if there are too few."""
    if packing.bits >= 8:
        return np.frombuffer(data.tobytes(), np.dtype(packing.numpy).newbyteorder("<"), count)
    bits = np.unpackbits(data, bitorder="little", count=count * packing.bits).reshape(count, packing.bits)
    values = np.packbits(bits, axis=1, bitorder="little")[:, 0]
    if not packing.signed:
        return values
    return (values.astype(np.int8) ^ (1 << (packing.bits - 1))) - np.int8(1 << (packing.bits - 1))


class BlobFile:
    """One open weight blob. Raises ArtifactError for a file that is not a blob of a known version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            check_regular(path, WEIGHTS)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
        size = path.stat().st_size
        if size < BLOCK:
            raise ArtifactError(f"{path} is damaged: {size} bytes, a weight blob has {BLOCK} or more; export it again")
        self._bytes = np.memmap(path, np.uint8, "r")
        _, version = HEADER.unpack(self._bytes[: HEADER.size].tobytes())
        if version != VERSION:
            raise ArtifactError(
                f"{path} has blob version {version}, expected {VERSION}: damaged, or made by newer tools"
            )

    def read(self, offset: int, dtype: str, count: int) -> np.ndarray:
        """The entry whose metadata is at `offset`: (count,) elements of MIL's `dtype`. ArtifactError if damaged."""
        packing = PACKINGS[dtype]
        start, size = self._locate(offset, packing)
        if size < (count * packing.bits + 7) // 8:
            raise self._damaged(f"entry at {offset} has {size} bytes, too few for {count} elements of {dtype}")
        return unpack(self._bytes[start : start + size], packing, count)

    def _locate(self, offset: int, packing: Packing) -> tuple[int, int]:
        if offset + METADATA.size > len(self._bytes):
            raise self._damaged(f"an entry at {offset} lies past the end ({len(self._bytes)} bytes)")
        fields = METADATA.unpack(self._bytes[offset : offset + METADATA.size].tobytes())
        sentinel, code, size, start, _ = fields
        if sentinel != SENTINEL:
            raise self._damaged(f"no entry at {offset}: found {sentinel:#x}, expected {SENTINEL:#x}")
        if code != packing.code:
            raise self._damaged(f"entry at {offset} has data type {code}, the program expects {packing.code}")
        if start + size > len(self._bytes):
            raise self._damaged(f"entry at {offset} ends at {start + size}, past the end ({len(self._bytes)} bytes)")
        return start, size

    def _damaged(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.path} is damaged: {what}; export it again")
