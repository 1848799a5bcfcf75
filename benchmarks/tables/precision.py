"""The README's precision tables: what fewer bits cost and bring, for every format.

The first is accuracy: the trained digits checkpoint in every format and precision, its held-out top-1, mean KL to fp32,
bytes, and latency against the fp32 file of the format at the checkpoint's own 64x64. The second is speed at 256x256:
the recipe `fast` for the three variants against the fp32 file, whose weights are random. Static files are calibrated on
training digits. fp32 and fp16 files are in the plain form, so that the gain of fewer bits is not mixed with the gain of
another form of fp32. Ends with one JSON line.

    python -m mvit_export.benchmarks.tables.precision [FOLDER] [--to coreml onnx tflite]
        [--threads 1] [--budget SECONDS]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mvit_export.benchmarks.tuning.recipe_search import run_command
from mvit_export.families.mobilevit.variants import VARIANT_NAMES
from mvit_export.formats.base import PLAIN
from mvit_export.formats.table import FORMATS, FULL, TIMED

EXAMPLES = Path(__file__).parents[2] / "examples"


def jobs(formats: Sequence[str]) -> list[tuple[str, str, str | None]]:
    """(format, precision, recipe), fp32 first in each format, because the others are compared with it."""
    found: list[tuple[str, str, str | None]] = []
    for fmt in (FORMATS[name] for name in formats):
        for precision in sorted(fmt.precisions, key=lambda p: p != "fp32"):
            found += [
                (fmt.name, precision, name)
                for name in (fmt.recipes if fmt.precisions[precision].with_recipe else (None,))
            ]
    return found


def digits(folder: Path) -> tuple[Path, Path]:
    """(training pictures, held-out pictures) as .npz files."""
    paths = folder / "train.npz", folder / "held_out.npz"
    for path, part in zip(paths, ("train", "val"), strict=True):
        if not path.exists():
            subprocess.run([sys.executable, str(EXAMPLES / "digits.py"), str(path), "--part", part], check=True)
    return paths


def export(source: list[str], out: Path, job: tuple[str, str, str | None], calibration: Path | None) -> dict[str, Any]:
    """Export one artifact; the exporter's own row."""
    fmt, precision, recipe = job
    arguments = ["export", "--to", fmt, "--precision", precision, *source, "--out", str(out), "--overwrite"]
    arguments += ["--recipe", recipe] if recipe else []
    arguments += ["--form", PLAIN] if precision in FULL else []
    arguments += ["--calibration", str(calibration)] if calibration and precision not in FULL else []
    return run_command(arguments)["artifacts"][0]


def latency_ratio(base: str, path: str, *, threads: int, budget: float) -> str:
    bench = ["bench", base, path, "--threads", str(threads), "--budget", str(budget), "--no-roofline"]
    ratio = run_command(bench)["results"][1]["ratio"]
    return "{:.3f} [{:.3f}, {:.3f}]".format(ratio["median"], *ratio["interval"])


def accuracy_table(folder: Path, formats: Sequence[str], *, threads: int, budget: float) -> list[dict[str, Any]]:
    training, held_out = digits(folder)
    source = ["--weights", str(EXAMPLES / "digits_xxs.safetensors"), "--image-size", "64"]
    rows: list[dict[str, Any]] = []
    base: dict[str, Any] = {}
    for job in jobs(formats):
        fmt, precision, recipe = job
        made = export(source, folder / "digits", job, training)
        base = made if precision == "fp32" else base
        found = run_command(["eval", made["path"], "--data", str(held_out)])["results"][0]
        timed = fmt in TIMED and made is not base
        row = {
            "format": fmt, "precision": precision, "recipe": recipe or "", "bytes": made["bytes"],
            "share": made["bytes"] / base["bytes"], "top1": found["top1"], "mean_kl": found["mean_kl"],
            "latency": latency_ratio(base["path"], made["path"], threads=threads, budget=budget) if timed else "",
            "parity": made["parity"][0]["status"],
        }  # fmt: skip
        rows.append(row)
        print(accuracy_line(row), flush=True)
    return rows


def accuracy_line(row: dict[str, Any]) -> str:
    cells = [
        row["format"], row["precision"], row["recipe"], f"{row['bytes'] / 1e6:.2f} MB", f"{row['share']:.2f}",
        f"{100 * row['top1']:.2f} %", f"{row['mean_kl']:.1e}", row["latency"] or "-", row["parity"].upper(),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def speed_table(folder: Path, formats: Sequence[str], *, threads: int, budget: float) -> list[dict[str, Any]]:
    training, _ = digits(folder)
    rows = []
    for variant in VARIANT_NAMES:
        for fmt in (name for name in formats if name in TIMED):
            source, out = ["--variant", variant, "--no-verify"], folder / "speed"
            base = export(source, out, (fmt, "fp32", None), None)
            made = export(source, out, (fmt, "int8", "fast"), training)
            ratio = latency_ratio(base["path"], made["path"], threads=threads, budget=budget)
            rows.append({"variant": variant, "format": fmt, "share": made["bytes"] / base["bytes"], "latency": ratio})
            print(f"| {variant} | {fmt} | {rows[-1]['share']:.2f} | {ratio} |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--to", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=20.0)
    arguments = parser.parse_args()
    measured = {"threads": arguments.threads, "budget": arguments.budget}
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        print("| format | precision | recipe | size | of fp32 | top-1 | mean KL | latency of fp32's | parity |")
        print("|---" * 9 + "|")
        accuracy = accuracy_table(folder, arguments.to, **measured)
        print("\n| variant | format | size of fp32's | latency of fp32's |\n|---|---|---|---|")
        speed = speed_table(folder, arguments.to, **measured)
    print(json.dumps({"accuracy": accuracy, "speed": speed}))


if __name__ == "__main__":
    main()
