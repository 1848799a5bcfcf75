"""The README's latency table: the variants in ONNX Runtime and LiteRT with one thread and two, measured twice.

Twice, because a figure that the next run does not confirm is worth nothing: the ratios between artifacts of the two
runs are shown beside each other, and their largest difference last. Ends with one JSON line.

    python -m mvit_export.benchmarks.tables.latency [FOLDER] [--form plain] [--threads 1 2] [--budget SECONDS]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from mvit_export import export, load_model
from mvit_export.benchmarks.harness.bench import Options, run_bench
from mvit_export.benchmarks.harness.timing import Plan
from mvit_export.families.mobilevit.variants import VARIANT_NAMES
from mvit_export.formats.table import TIMED
from mvit_export.formats.targets import plan_targets
from mvit_export.results.latency import Measurement

COLUMNS = ("variant", "runtime", "threads", "median ms", "p99 ms", "to the first", "again", "MACs", "of peak", "memory")
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"
AGREEMENT = 0.03  # between the ratios of two runs


def prepare(folder: Path, form: str | None = None) -> list[Path]:
    """The artifacts in one form, by default each format's own; missing ones are exported."""
    targets = plan_targets(TIMED, precision="fp32", form=form)
    places = [folder / f"mobilevit_{variant}" / target.name for variant in VARIANT_NAMES for target in targets]
    for variant in VARIANT_NAMES:
        missing = [place.name.split("-")[0] for place in places if variant_of(place) == variant and not place.exists()]
        if missing:
            export(load_model(variant), to=missing, precision="fp32", form=form, out=folder)
    return places


def variant_of(place: Path) -> str:
    return place.parent.name.removeprefix("mobilevit_")


def line(row: Measurement, again: Measurement) -> str:
    assert row.median_interval_ms and row.macs and row.roofline
    low, high = row.median_interval_ms
    cells = [
        str(row.variant), " ".join(row.runtime.split()[:2]), str(row.threads),
        f"{row.median_ms:.2f} [{low:.2f}, {high:.2f}]", f"{row.p99_ms:.1f}", str(row.ratio or 1), str(again.ratio or 1),
        f"{row.macs / 1e6:.0f}M", f"{100 * row.roofline.peak_share:.0f} %", f"{row.peak_rss_mb:.0f} MB",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def disagreement(first: Measurement, second: Measurement) -> float:
    if first.ratio is None or second.ratio is None:
        return 0.0
    return abs(second.ratio.median / first.ratio.median - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--form")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--budget", type=float, default=30.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        places = prepare(arguments.folder or Path(scratch), arguments.form)
        options = Options(Plan(budget_s=arguments.budget))
        runs = [run_bench(places, threads=arguments.threads, options=options) for _ in range(2)]
    rows = list(zip(runs[0].results, runs[1].results, strict=True))
    print(HEADER)
    for first, second in rows:
        print(line(first, second))
    worst = max(disagreement(first, second) for first, second in rows)
    print(f"largest difference between the ratios of the two runs: {worst:.1%}")
    print(json.dumps({"environment": runs[0].environment, "worst": worst, "agree": worst <= AGREEMENT}))


if __name__ == "__main__":
    main()
