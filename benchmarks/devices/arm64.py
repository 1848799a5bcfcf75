"""ARM kernels without an ARM: Debian's arm64 Python and the runtimes' aarch64 wheels under qemu's user emulation.

`setup` builds the root once, in the user's cache, with apt (its state private to us, no root rights needed) and pip.
The arithmetic is that of the real kernels, chosen for the core that qemu emulates; the time is not, so latencies are
refused.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mvit_export.artifact import MANIFEST, now, write_json
from mvit_export.benchmarks.devices.commands import PIPES, finish
from mvit_export.benchmarks.devices.local import LocalFolder
from mvit_export.benchmarks.devices.worker import START_TIMEOUT
from mvit_export.doctor import Finding
from mvit_export.errors import ArtifactError, DeviceError
from mvit_export.system.reading import read_json
from mvit_export.system.staging import staged_directory

RECIPE = 1  # version of everything below that shapes the root; a new number rebuilds old roots
CPU = "cortex-a76"  # ARMv8.2 with fp16 and dot products: a Raspberry Pi 5, a phone of 2019
RELEASE, PYTHON = "bookworm", "3.11"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SUITES = {"debian": (RELEASE, f"{RELEASE}-updates"), "debian-security": (f"{RELEASE}-security",)}
PACKAGES = (
    f"python{PYTHON}-minimal", f"libpython{PYTHON}-minimal", f"libpython{PYTHON}-stdlib", "libc6", "libgcc-s1",
    "libstdc++6", "libbz2-1.0", "libexpat1", "libffi8", "liblzma5", "zlib1g",
)  # fmt: skip
WHEELS = ("numpy>=1.26,<2.4", "onnxruntime>=1.22,<1.33", "ai-edge-litert>=2.3,<2.4")  # as in pyproject.toml
PLATFORMS = tuple(f"manylinux_2_{minor}_aarch64" for minor in range(17, 37))  # the release's glibc is 2.36
FETCH_TIMEOUT = 1200.0  # seconds; 80 MB over a slow line
# pytorch/cpuinfo, which XNNPACK and ONNX Runtime use, would read the host's and crash: this is one core of CPU.
CPUINFO = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""
IMPORT_ALL = f"""if True:
    import importlib.metadata, json, platform
    import numpy, onnxruntime, ai_edge_litert.interpreter
    runtimes = {{name: importlib.metadata.version(name) for name in {[wheel.split(">")[0] for wheel in WHEELS]}}}
    print(json.dumps({{"python": platform.python_version(), "machine": platform.machine(), "runtimes": runtimes}}))
"""
APT_CONF = """APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::Cache "%(state)s";
Dir::State "%(state)s";
Dir::State::status "%(state)s/status";
Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::sourcelist "%(state)s/sources.list";
Dir::Etc::sourceparts "/dev/null";
"""


class Arm64(LocalFolder):
    """An emulated ARM core on this machine; the scratch folder is a local one."""

    name = "arm64"
    latency_refusal = "arm64 is emulated here, and qemu's time says nothing about any ARM core; bench on ssh: or adb:"
    note = "real ARM kernels, emulated"

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

    def arrive(self) -> None:
        check_host()
        if read_versions(self.root) is None:
            raise DeviceError(f"no ARM system in {self.root}; mvit-export doctor --setup arm64 builds one")
        super().arrive()

    def run(self, command: Sequence[str], *, timeout: float) -> str:
        """`command` starts with an ARM program's path."""
        return finish(emulated(self.root, *command), where=self.name, timeout=timeout, env=environment(self.root))

    def start(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        command = python_command(self.root, arguments)
        return subprocess.Popen(command, env=environment(self.root), start_new_session=True, **PIPES)

    def describe(self, hello: Mapping[str, Any]) -> str:
        if hello["machine"] != "aarch64":
            raise DeviceError(
                f"{self.root} runs a {hello['machine']} Python, expected aarch64; delete it and set it up again"
            )
        return f"emulated aarch64 (qemu {CPU})"


def default_root() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "mvit-export", "arm64")


def emulator() -> str | None:
    return shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


def check_host() -> None:
    """Raises DeviceError, with what to do, if ARM programs cannot be emulated."""
    if platform.machine() in ("aarch64", "arm64"):
        raise DeviceError("this machine is arm64 already; nothing needs emulation: --device local")
    if platform.system() != "Linux":
        raise DeviceError(f"arm64 needs qemu's user emulation, which exists on Linux only; this is {platform.system()}")
    if emulator() is None:
        raise DeviceError("qemu-aarch64-static is not on the path: apt-get install qemu-user-static")


def emulated(root: Path, *command: str) -> list[str]:
    program = emulator()
    assert program is not None
    return [program, "-cpu", CPU, "-L", str(root), *command]


def environment(root: Path) -> dict[str, str]:
    """Our environment, without what would lead the ARM Python or loader to files of this machine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LD_"))}
    return {**kept, "PYTHONPATH": str(root / "site")}


def python_command(root: Path, arguments: Sequence[str]) -> list[str]:
    # -s: the packages in the user's own site folder are for this machine.
    return emulated(root, str(root / f"usr/bin/python{PYTHON}"), "-s", *arguments)


def read_versions(root: Path) -> dict[str, Any] | None:
    """The record of a finished root of this recipe."""
    try:
        record = read_json(root / MANIFEST)
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("recipe") == RECIPE else None


# Setting up


def setup(cache: Path | None = None, on_step: Callable[[str], None] = lambda step: None) -> Path:
    """Build the ARM system in the user's cache, or in `cache`, and return its folder. An existing one is left alone.

    `on_step(text)` is called for progress. Raises DeviceError if a tool is missing or a download fails; a folder that
    exists is complete.
    """
    check_host()
    check_tools()
    root = cache or default_root()
    if read_versions(root) is not None:
        return root
    try:
        with staged_directory(root, overwrite=True) as staging:
            on_step("fetching Debian's arm64 Python")
            install_packages(staging)
            on_step("fetching the runtimes' aarch64 wheels")
            install_wheels(staging)
            (staging / "proc").mkdir()
            (staging / "proc/cpuinfo").write_text(CPUINFO)
            on_step("starting the ARM Python")
            write_json(staging / MANIFEST, {"recipe": RECIPE, "created": now(), **try_out(staging)})
    except ArtifactError as error:
        raise DeviceError(error.without_advice) from error
    return root


def setup_here(on_step: Callable[[str], None]) -> Path:
    """`setup` in the user's cache."""
    return setup(on_step=on_step)


def check_tools() -> None:
    for tool in ("apt-get", "apt-config", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DeviceError(f"{tool} is not on the path; setting up arm64 needs a Debian or Ubuntu machine")
    if importlib.util.find_spec("pip") is None:
        raise DeviceError(f"pip is not installed beside {sys.executable}: {sys.executable} -m ensurepip")
    if not KEYRING.is_file():
        raise DeviceError(f"{KEYRING}, which vouches for packages, is missing: apt-get install debian-archive-keyring")


def install_packages(root: Path) -> None:
    """Debian's packages for arm64, checked by apt, unpacked without being installed."""
    with private_apt(root) as (state, variables):
        finish(["apt-get", "-q", "update"], where="arm64", timeout=FETCH_TIMEOUT, env=variables)
        fetch = ["apt-get", "-q", "download", *PACKAGES]
        finish(fetch, where="arm64", timeout=FETCH_TIMEOUT, env=variables, cwd=state)
        for package in sorted(state.glob("*.deb")):
            finish(["dpkg-deb", "-x", str(package), str(root)], where="arm64", timeout=FETCH_TIMEOUT)
    for part in ("doc", "man", "lintian"):
        shutil.rmtree(root / "usr/share" / part, ignore_errors=True)


@contextmanager
def private_apt(root: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """An apt state of our own below `root`, gone afterwards: (its folder, the variables that make apt use it).

    It has only the proxies of the system's configuration; the system's hooks and package lists are not touched.
    """
    state = root / "apt"
    for part in ("lists/partial", "archives/partial"):
        (state / part).mkdir(parents=True)
    (state / "status").touch()
    sources = [
        f"deb [signed-by={KEYRING}] http://deb.debian.org/{archive} {suite} main\n"
        for archive, suites in SUITES.items()
        for suite in suites
    ]
    (state / "sources.list").write_text("".join(sources))
    settings = finish(["apt-config", "dump"], where="arm64", timeout=60).splitlines(keepends=True)
    proxies = [line for line in settings if line.startswith("Acquire::http")]
    (state / "apt.conf").write_text(APT_CONF % {"state": state} + "".join(proxies))
    try:
        yield state, {**os.environ, "APT_CONFIG": str(state / "apt.conf"), "LC_ALL": "C"}
    finally:
        shutil.rmtree(state)


def install_wheels(root: Path) -> None:
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    options = ["--quiet", "--no-compile", "--no-warn-conflicts", "--only-binary=:all:", "--implementation", "cp"]
    target = ["--target", str(root / "site"), "--python-version", PYTHON]
    command = [sys.executable, "-m", "pip", "install", *options, *platforms, *target, *WHEELS]
    # PIP_USER and a configured --user do not work with --target.
    finish(command, where="arm64", timeout=FETCH_TIMEOUT, env={**os.environ, "PIP_USER": "0"})


def try_out(root: Path) -> dict[str, Any]:
    """The versions of what was built, from the ARM Python itself: it starts, and every runtime imports.

    Importing also fills Python's caches, which takes seconds under emulation.
    """
    command = python_command(root, ["-c", IMPORT_ALL])
    return json.loads(finish(command, where="arm64", timeout=START_TIMEOUT, env=environment(root)).splitlines()[-1])


def finding() -> Finding:
    """Its row in `doctor`."""
    try:
        check_host()
    except DeviceError as error:
        return Finding("device", "arm64", False, str(error))
    record = read_versions(default_root())
    if record is None:
        return Finding("device", "arm64", False, "mvit-export doctor --setup arm64 builds it, 230 MB in your cache")
    versions = ", ".join(f"{name} {version}" for name, version in record["runtimes"].items())
    return Finding("device", "arm64", True, f"emulated: Python {record['python']}, {versions}")
