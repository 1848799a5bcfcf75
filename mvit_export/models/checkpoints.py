"""Read a checkpoint file or folder safely: nothing in it is ever executed.

The first bytes say what a file is; the suffix is no evidence. Which network the tensors belong to is not checked here.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mvit_export.errors import WeightsError
from mvit_export.models.entries import find_entry
from mvit_export.models.plain_data import allowed
from mvit_export.models.prefixes import align
from mvit_export.system.files import NOT_UTF8, is_utf8
from mvit_export.system.reading import (
    GB,
    UNPACKED,
    WEIGHTS,
    Unreadable,
    check_regular,
    check_zip,
    open_regular,
    sha256_file,
)

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # the first one found in a model folder is read
DOWNLOAD_AGAIN = "download it again"


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one file as stored, its text metadata (safetensors only) and the file's sha256.

    `ema` and `notes` as in `Entry`: which set of weights it is, and what was decided.
    """

    tensors: Mapping[str, Tensor]
    sha256: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    ema: bool | None = None
    notes: tuple[str, ...] = ()

    def aligned(self, names: Iterable[str], ema: bool | None) -> Checkpoint:
        """With the names of a network, see `align`."""
        found = align(self.tensors, names, ema)
        which = self.ema if found.ema is None else found.ema
        return replace(self, tensors=found.tensors, ema=which, notes=(*self.notes, *found.notes))


@contextmanager
def blame(source: str | Path) -> Iterator[None]:
    """Put the checkpoint's name before any WeightsError from inside, and keep the message to one line."""
    try:
        yield
    except WeightsError as error:
        line = " ".join(f"{source}: {error}".split())
        # Damaged files put odd bytes into names.
        raise WeightsError("".join(c if c.isprintable() else "?" for c in line)) from (error.__cause__ or error)


def read_checkpoint(path: str | Path, *, ema: bool | None = True) -> Checkpoint:
    """Read a safetensors file or a pickle of tensors (.pt, .pth, .bin) onto the CPU. Raises WeightsError.

    `ema` as in `find_entry`.
    """
    path = Path(path)
    with blame(path):
        try:
            if file_kind(path) == "safetensors":
                tensors, metadata = read_safetensors(path)
                return Checkpoint(tensors, sha256_file(path), metadata)
            entry = find_entry(read_pickle(path), ema)
            return Checkpoint(entry.tensors, sha256_file(path), {}, entry.ema, entry.notes)
        except OSError as error:
            raise WeightsError(f"cannot be read ({error.strerror or error}): check the path and its rights") from error


def file_kind(path: Path) -> str:
    """ "safetensors" or "pickle", by the first bytes."""
    if not is_utf8(path):
        raise WeightsError(NOT_UTF8)
    if not path.exists():
        raise WeightsError("no such file, expected a checkpoint: check the path")
    if not path.is_file():
        raise WeightsError("not a regular file, expected a checkpoint (.safetensors, .pt, .pth, .bin)")
    with open_regular(path, WEIGHTS) as file:
        head = file.read(512)
    if not head:
        raise WeightsError(f"the file is empty, expected a checkpoint: {DOWNLOAD_AGAIN}")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise WeightsError(f"an HTML or XML page, expected a checkpoint: {DOWNLOAD_AGAIN} from the file's direct link")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError("a Git LFS pointer, expected the weights that it points to: run `git lfs pull`")
    # Eight bytes of header length, small enough to be one, then the JSON header.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30:
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80")):  # torch's zip, or a bare pickle of protocol 2 and later
        return "pickle"
    raise WeightsError(f"begins with {head[:8]!r}, expected safetensors or a PyTorch pickle: {DOWNLOAD_AGAIN}")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        check_regular(path, WEIGHTS)
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            metadata = dict(file.metadata() or {})
    except (SafetensorError, ValueError) as error:  # ValueError: a header that is not UTF-8
        reason = f"a damaged or truncated safetensors file ({error})"
        raise WeightsError(f"{reason}, expected a whole one: {DOWNLOAD_AGAIN}") from error
    if not tensors:
        raise WeightsError("a safetensors file without tensors, expected a state dict")
    return tensors, metadata


def read_pickle(path: Path) -> Any:
    """What a pickle holds: tensors and plain data."""
    try:
        # Given a path, torch would go by its suffix. Its warnings are about how the file was written.
        check_zip(path, max(GB, UNPACKED * path.stat().st_size))
        with open_regular(path, WEIGHTS) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with allowed():
                return torch.load(file, map_location="cpu", weights_only=True)
    except Unreadable as error:
        raise WeightsError(f"{error.strerror}: {DOWNLOAD_AGAIN}") from error
    except pickle.UnpicklingError as error:
        raise WeightsError(refusal(str(error))) from error
    except Exception as error:  # damaged bytes fail anywhere in torch, by anything from struct.error to AssertionError
        if "TorchScript" in str(error):
            message = "a TorchScript archive, which holds code; expected a state dict: save model.state_dict() instead"
            raise WeightsError(message) from error
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        message = f"a damaged or truncated PyTorch file ({reason}), expected a whole one: {DOWNLOAD_AGAIN}"
        raise WeightsError(message) from error


def refusal(reason: str) -> str:
    """Why torch's restricted unpickler stopped: a global that it will not call, or bytes that are not a pickle."""
    named = re.search(r"GLOBAL (\S+)", reason) or re.search(r"(?:function|class|type) ([\w.]+\.\w+)", reason)
    if named:
        return (
            f"this pickle wants to call {named[1]}, refused because a checkpoint that runs code could do anything here;"
            " expected tensors only: save model.state_dict(), best as safetensors"
        )
    return f"a pickle of something other than tensors, or a damaged one: expected a state dict, {DOWNLOAD_AGAIN}"


def find_weights(folder: Path) -> Path:
    """The weights of a model folder as transformers and timm write it, or the index of several; else WeightsError."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return index
    raise WeightsError(f"a folder without weights, expected {' or '.join(WEIGHT_FILES)} in it")
