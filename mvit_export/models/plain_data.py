"""Plain data that training scripts save beside the weights, which torch's restricted unpickler does not know.

Every row is a name as it stands in a pickle and what is made for it. Nothing here runs code of the file's, opens a path
or imports a package that the file names: where the class is another package's, or could do more than hold data, a
stand-in holds its content. What is not listed stays refused.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def empty_dict(factory: Any = None, *items: Any) -> OrderedDict[Any, Any]:
    """In place of a defaultdict: torch fills its own kinds of dictionaries only, and nothing asks for its defaults."""
    return OrderedDict(*items)


class Unread:
    """In place of a value that only its own library should make from a file's bytes, and that nothing here uses.

    numpy's arrays take pointers from a pickle, and a fraction's text may stand for a number of a billion digits.
    """

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def numpy_names() -> Iterator[str]:
    """Scalars and arrays, under the names of numpy 1 and 2."""
    for core in ("core", "_core"):
        yield from (f"numpy.{core}.multiarray.{name}" for name in ("scalar", "_reconstruct"))
    yield from ("numpy.ndarray", "numpy.dtype")
    yield from (f"numpy.dtypes.{name}" for name in np.dtypes.__all__)


PATHS = {
    f"pathlib{where}.{kind}{system}Path": getattr(pathlib, f"Pure{system}Path")
    for where in ("", "._local")  # Python 3.13
    for kind in ("", "Pure")
    for system in ("Posix", "Windows")
}
ATTRIBUTE_DICTS = (
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "easydict.EasyDict",
    "yacs.config.CfgNode",
    "addict.addict.Dict",
)
PLAIN_DATA: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": types.SimpleNamespace,
    "collections.defaultdict": empty_dict,
    **{f"builtins.{kind.__name__}": kind for kind in (int, float, bool, str, list, dict, tuple, frozenset)},
    **{f"datetime.{kind}": getattr(datetime, kind) for kind in ("date", "datetime", "time", "timedelta", "timezone")},
    **dict.fromkeys(("decimal.Decimal", "fractions.Fraction", "uuid.UUID"), Unread),
    **PATHS,
    **dict.fromkeys(ATTRIBUTE_DICTS, OrderedDict),  # their entries are enough
    **dict.fromkeys(numpy_names(), Unread),
}


@contextmanager
def allowed() -> Iterator[None]:
    """Let torch.load(weights_only=True) make these; what else the caller has allowed stays as it is."""
    rows = [(made, name) for name, made in PLAIN_DATA.items()]
    before = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([row for row in rows if row not in before]):
        yield
