"""What lies beside the weights in a pickle: plain data is read, everything else stays refused, and no code runs."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import fractions
import pathlib
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvit_export.errors import WeightsError
from mvit_export.models.checkpoints import read_checkpoint

WEIGHT = torch.arange(4.0)
SETTINGS = argparse.Namespace(lr=np.float64(0.1), out=pathlib.Path("runs"), sizes=[1, 2], inner=argparse.Namespace(a=1))


def read_beside(data: Any, folder: Path) -> torch.Tensor:
    torch.save({"epoch": 3, "beside": data, "state_dict": {"w": WEIGHT}}, folder / "w.pt")
    return read_checkpoint(folder / "w.pt").tensors["w"]


@pytest.mark.parametrize(
    "data",
    [
        SETTINGS,
        types.SimpleNamespace(args=SETTINGS),
        [kind(3) for kind in (np.float16, np.float32, np.float64, np.int8, np.int64, np.uint8, np.bool_)],
        {"best": np.float32(0.5), "history": np.arange(6.0).reshape(2, 3)},
        np.array(["a", "bc"]),
        np.datetime64("2024-01-01"),
        collections.OrderedDict(a=1),
        collections.defaultdict(list, a=[1.5]),
        collections.defaultdict(float, {"loss": 1.0}),
        collections.Counter("aab"),
        [datetime.datetime.now(datetime.timezone.utc), datetime.date(2024, 1, 2), datetime.timedelta(seconds=3)],
        [pathlib.PurePosixPath("/a/b"), pathlib.PureWindowsPath("C:/a")],
        [decimal.Decimal("1.5"), frozenset({1}), {1, 2}, 1j, b"bytes"],
    ],
    ids=lambda data: type(data).__name__,
)
def test_plain_data_is_read(data: Any, tmp_path: Path) -> None:
    before = {*torch.serialization.get_safe_globals()}
    assert torch.equal(read_beside(data, tmp_path), WEIGHT)
    assert {*torch.serialization.get_safe_globals()} == before, "what torch allows elsewhere is the caller's"


def test_what_the_caller_allows_stays_allowed(tmp_path: Path) -> None:
    with torch.serialization.safe_globals([(argparse.Namespace, "argparse.Namespace")]):
        read_beside(SETTINGS, tmp_path)
        assert (argparse.Namespace, "argparse.Namespace") in torch.serialization.get_safe_globals()


def test_settings_of_a_package_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's hyperparameters are a dictionary of its own kind, which is neither imported nor needed."""
    name = "lightning.fabric.utilities.data"
    module: Any = types.ModuleType(name)
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": name})
    with monkeypatch.context() as patch:
        for parent in ("lightning", "lightning.fabric", "lightning.fabric.utilities"):
            patch.setitem(sys.modules, parent, types.ModuleType(parent))
        patch.setitem(sys.modules, name, module)
        torch.save({"hyper_parameters": module.AttributeDict(lr=0.1), "state_dict": {"w": WEIGHT}}, tmp_path / "w.ckpt")
    assert torch.equal(read_checkpoint(tmp_path / "w.ckpt").tensors["w"], WEIGHT)
    assert name not in sys.modules


class Calls:
    """Pickled as a call of a function with arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [eval, exec, getattr, open, __import__, np.load, np.fromfile, pathlib.Path.touch])
def test_what_is_no_plain_data_is_refused(function: Any, tmp_path: Path) -> None:
    for data in (Calls(function, "canary"), SETTINGS.__class__(inner=[Calls(function, "canary")])):
        with pytest.raises(WeightsError, match=r"^[^\n]*this pickle wants to call|is blocked|something other than"):
            read_beside(data, tmp_path)


def test_namespaces_cannot_smuggle_objects(tmp_path: Path) -> None:
    """An object array is pickled by the same rules as what it holds."""
    with pytest.raises(WeightsError, match=r"refused|something other than tensors"):
        read_beside(np.array([Calls(eval, "1")], dtype=object), tmp_path)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Calls(eval, "1"), protocol=2))
    with pytest.raises(WeightsError, match="refused"):
        read_checkpoint(tmp_path / "bare.pt")


class Array:
    """Pickled as numpy's own call, with an object array over bytes that the file chose: pointers, once it is read."""

    def __reduce__(self) -> Any:
        return list, (Forged(),)


class Forged:
    def __reduce__(self) -> Any:
        return np.ndarray, ((1,), "O", b"A" * 8)


class Long:
    """A fraction of a billion digits in twelve characters."""

    def __reduce__(self) -> Any:
        return fractions.Fraction, ("1e999999999",)


@pytest.mark.parametrize("data", [Forged(), Long()], ids=["pointer", "digits"])
def test_values_are_not_made_from_what_a_file_says(data: Any, tmp_path: Path) -> None:
    """Either would end this process, by a wrong pointer or by its memory."""
    assert torch.equal(read_beside(data, tmp_path), WEIGHT)


def test_a_list_over_forged_pointers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"w\.pt"):
        read_beside(Array(), tmp_path)
