"""Plain data that training scripts save beside the weights, which torch's restricted unpickler does not know.

Every row is a name as it stands in a pickle and what is made for it. Nothing here runs code of the file's, opens a path
or imports a package that the file names: where the class is another package's, or could do more than hold data, a
stand-in holds its content. What is not listed stays refused.
"""

from __future__ import annotations

import argparse
import datetime
import decimal
import fractions
import pathlib
import types
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def empty_dict(factory: Any = None, *items: Any) -> OrderedDict[Any, Any]:
    """In place of a defaultdict: torch fills its own kinds of dictionaries only, and nothing asks for its defaults."""
    return OrderedDict(*items)


def numpy_functions() -> dict[str, Any]:
    """Scalars and arrays, under the names of numpy 1 and 2."""
    names = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(0).__reduce__()[0]}
    return {f"numpy.{core}.multiarray.{name}": f for core in ("core", "_core") for name, f in names.items()}


def numpy_types() -> dict[str, Any]:
    kinds = [getattr(np.dtypes, name) for name in np.dtypes.__all__ if name not in ("ObjectDType", "VoidDType")]
    return {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype} | {f"numpy.dtypes.{k.__name__}": k for k in kinds}


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
    "decimal.Decimal": decimal.Decimal,
    "fractions.Fraction": fractions.Fraction,
    "uuid.UUID": uuid.UUID,
    **PATHS,
    **dict.fromkeys(ATTRIBUTE_DICTS, OrderedDict),  # their entries are enough
    **numpy_functions(),
    **numpy_types(),
}


@contextmanager
def allowed() -> Iterator[None]:
    """Let torch.load(weights_only=True) make these; what else the caller has allowed stays as it is."""
    rows = [(made, name) for name, made in PLAIN_DATA.items()]
    before = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([row for row in rows if row not in before]):
        yield
