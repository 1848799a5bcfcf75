"""What a command costs: its wall time from start to end and the peak memory of its process, seen from outside.

Linux counts the memory of the process that starts a command towards the command's peak, so a small process starts it:
this module, which imports nothing large.

    python -m mvit_export.benchmarks.tables.process_cost SECONDS COMMAND...  # the limit first; prints one JSON document
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

TIMED_OUT = 124  # as in timeout(1)


@dataclass(frozen=True)
class Cost:
    """A finished command. `peak_rss_mb` is of the largest process among it and those it waited for."""

    code: int
    seconds: float
    peak_rss_mb: float
    out: str
    err: str


def cost_of(command: Sequence[str], *, limit: float = 1800.0) -> Cost:
    """Run a command in a fresh process, for at most `limit` seconds."""
    launcher = [sys.executable, "-m", __name__, str(limit), *command]
    return Cost(**json.loads(subprocess.run(launcher, check=True, capture_output=True, text=True).stdout))


def run(command: Sequence[str], limit: float) -> Cost:
    """In the small process: run the command as its only child."""
    import resource  # not on Windows, where nothing here is measured

    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        code, out, err = TIMED_OUT, "", f"it took longer than {limit:.0f} s and was stopped"
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return Cost(code, seconds, peak / (1e6 if sys.platform == "darwin" else 1024), out, err)  # bytes there, else KB


def main() -> None:
    limit, *command = sys.argv[1:]
    print(json.dumps(asdict(run(command, float(limit)))))


if __name__ == "__main__":
    main()
