"""How much of this machine a process may use: cores and memory, inside a container those of the container.

Control groups are read from their files, version 1 and 2. A quota may be set in the process's own group or in one
above it, and a container may see its own group as the root.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def usable_cores(root: Path = ROOT) -> int:
    """Cores that this process may keep busy: its affinity, or fewer if a control group grants less time."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [cpu_quota(folder) for folder in control_groups("cpu", root)]
    return max(1, math.floor(min([own, *quotas])))


def available_memory(root: Path = ROOT) -> int:
    """Bytes available without swapping: the machine's, or fewer if a control group's limit is closer."""
    left = [memory_left(folder) for folder in control_groups("memory", root)]
    return int(max(0, min([free_memory(root), *left])))


def free_memory(root: Path) -> int:
    """MemAvailable on Linux; elsewhere half of the installed memory, since no better figure is available."""
    for line in read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def control_groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the groups that bind this process, of either version, from its own upwards."""
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")  # version 2 has one tree for all
        own = Path(group.lstrip("/"))
        yield from (top / place for place in (own, *own.parents))


def cpu_quota(folder: Path) -> float:
    """Cores' worth of time that a group grants; infinite if it sets no limit."""
    words = read(folder / "cpu.max").split() or read(folder / "cpu.cfs_quota_us").split()
    if len(words) == 1:  # version 1 has the period in a separate file
        words += read(folder / "cpu.cfs_period_us").split()
    if len(words) != 2 or not all(word.isdecimal() for word in words):  # "max" or -1: no limit
        return math.inf
    return int(words[0]) / int(words[1])


def memory_left(folder: Path) -> float:
    """Bytes left until a group's limit, not counting reclaimable cache; infinite if it sets no limit."""
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        total, used = read(folder / limit).strip(), read(folder / usage).strip()
        if total.isdecimal() and used.isdecimal():
            stat = dict(line.split() for line in read(folder / "memory.stat").splitlines())
            return int(total) - int(used) + int(stat.get(cache, 0))
    return math.inf


def read(path: Path) -> str:
    """A control file's text, empty if it does not exist: most machines have only some of them."""
    try:
        return path.read_text()
    except OSError:
        return ""
