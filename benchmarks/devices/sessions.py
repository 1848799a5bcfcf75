"""Parity on a device: the artifact's file runs there, in the runtime found there; the comparison stays here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mvit_export.benchmarks.devices.base import Device
from mvit_export.benchmarks.devices.table import open_device


@contextmanager
def device_sessions(spec: str, *, python: str | None = None, binary: Path | None = None) -> Iterator[dict[str, Any]]:
    """Keywords for `parity.verify` that make it check on the device `spec`, which stays open meanwhile."""
    with open_device(spec, python=python, binary=binary) as device:
        yield checked_on(device)


def checked_on(device: Device) -> dict[str, Any]:
    """Keywords for `parity.verify` that make it check on an entered device."""
    return {"device": device.name, "sessions": lambda _: (device.open,)}
