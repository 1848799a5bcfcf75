"""The machine that this process runs on: its processor, cores and memory, and the runtimes installed there."""

from __future__ import annotations

import glob
import os
import platform

from .common import Refusal, distribution_version


def found_runtimes() -> dict[str, str]:
    names = ("numpy", "onnxruntime", "ai-edge-litert", "tflite-runtime", "coremltools", "torch")
    versions = {name: distribution_version(name) for name in names}
    return {name: version for name, version in versions.items() if version}


def cpu_name() -> str:
    """The processor's model, or its architecture if the system does not say."""
    try:
        with open("/proc/cpuinfo") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        named = {key.strip(): value.strip() for key, value in fields.items()}
        return named.get("model name") or named.get("Model") or named.get("Hardware") or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def allowed_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def pin_to(threads: int) -> list[int] | None:
    """Stay on the last `threads` cores, which on big.LITTLE boards are the big ones; None if that is not possible."""
    cpus = allowed_cpus()
    if threads > len(cpus):
        raise Refusal("misuse", f"{threads} threads were asked for, this process may use {len(cpus)} cores")
    if not hasattr(os, "sched_setaffinity"):
        return None
    os.sched_setaffinity(0, cpus[-threads:])
    return cpus[-threads:]


def load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def involuntary_switches() -> int | None:
    """How often a core was taken from this process so far; None where the system does not count it."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def memory_mb(*, peak: bool = False) -> float:
    """Resident memory of this process. Linux's ru_maxrss would count the parent's, which exec does not reset."""
    try:
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        return int(fields["VmHWM" if peak else "VmRSS"].split()[0]) / 1024
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS; the peak for both


def evict(model: str) -> bool:
    """Drop a model's files from the page cache; False if the system has no call for it."""
    if not hasattr(os, "posix_fadvise"):
        return False
    paths = glob.glob(os.path.join(model, "**"), recursive=True) if os.path.isdir(model) else [model]
    for path in filter(os.path.isfile, paths):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # only clean pages can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True
