"""How long until the command answers: `mvit-export --help` and `import mvit_export`.

Each runs in a fresh process, in turn, so that a noisy machine slows all alike; a bare Python start is timed
beside them and is part of both. Bounds: 0.4 s and 0.2 s. Ends with one JSON line.

    python -m mvit_export.benchmarks.tables.startup
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

ROUNDS = 15
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import mvit_export": [sys.executable, "-c", "import mvit_export"],
    "mvit-export --help": [sys.executable, "-m", "mvit_export", "--help"],
}


def main() -> None:
    samples: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            samples[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[1:]) for name, times in samples.items()}  # the first fills disk caches
    for name, seconds in medians.items():
        print(f"{name:<20} {seconds * 1000:6.0f} ms  (median of {ROUNDS}, max {max(samples[name][1:]) * 1000:.0f} ms)")
    print(json.dumps({name: round(seconds, 4) for name, seconds in medians.items()}))


if __name__ == "__main__":
    main()
