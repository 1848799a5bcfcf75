"""Every kind of device: a row each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mvit_export.benchmarks.devices import arm64, local, phone, ssh
from mvit_export.benchmarks.devices.base import Device
from mvit_export.doctor import Finding
from mvit_export.errors import UsageError, printable

OnStep = Callable[[str], None]


@dataclass(frozen=True)
class Kind:
    """One kind of device. `open` is given what follows the colon, and the option if the kind takes one."""

    name: str
    spec: str  # as help texts show it
    pattern: str  # of the specs that name such a device
    open: Callable[..., Device]
    finding: Callable[[], Finding]  # its row of doctor
    takes: str = ""  # the option that belongs to this kind: python or binary
    setup: Callable[[OnStep], Path] | None = None  # builds what the device needs


KINDS = (
    Kind("local", "local", r"local", lambda _: local.Local(), local.finding),
    Kind("ssh", "ssh:HOST", r"ssh(:.*)?", ssh.open_host, ssh.finding, takes="python"),
    Kind("adb", "adb:SERIAL", r"adb(:.+)?", phone.open_phone, phone.finding, takes="binary"),
    Kind("arm64", "arm64", r"arm64", lambda _: arm64.Arm64(), arm64.finding, setup=arm64.setup_here),
)
SPECS = ", ".join(kind.spec for kind in KINDS)
BELONGS = {  # option: the flag, and whose it is
    "python": ("--device-python", "ssh:HOST"),
    "binary": ("--benchmark-binary", "phones behind adb"),
}


def open_device(spec: str, *, python: str | None = None, binary: Path | None = None) -> Device:
    """The device that a user means; it connects only when it is entered.

    `spec` is local, arm64, ssh:HOST with HOST as OpenSSH accepts it (an alias of ~/.ssh/config, user@host or
    ssh://user@host:port), adb (the only phone) or adb:SERIAL. `python` is an ssh device's interpreter, `binary` the
    benchmark tool for a phone.
    """
    name, _, place = spec.partition(":")
    kind = next((kind for kind in KINDS if kind.name == name), None)
    options = {"python": python, "binary": binary}
    for option, (flag, owner) in BELONGS.items():
        if options[option] is not None and (kind is None or kind.takes != option):
            raise UsageError(f"{flag} is for {owner}, the device is {spec!r}")
    if kind is None or not re.fullmatch(kind.pattern, spec, re.DOTALL):
        raise UsageError(f"device {printable(spec)!r} is not known, expected one of {SPECS}")
    return kind.open(place, options[kind.takes]) if kind.takes else kind.open(place)


def findings() -> list[Finding]:
    """Which devices can be used from here."""
    return [kind.finding() for kind in KINDS]


def setups() -> dict[str, Callable[[OnStep], Path]]:
    """What `doctor --setup` can build."""
    return {kind.name: kind.setup for kind in KINDS if kind.setup}
