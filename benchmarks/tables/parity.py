"""The README's result table: every variant, format and precision exported and checked, as Markdown.

Weights are random, seed 0, BatchNorm statistics and biases too, since an untrained network's are trivial and would hide
faults. They are wide enough that the outputs depend on the input. Ends with one JSON line.

    python -m mvit_export.benchmarks.tables.parity [FOLDER]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from mvit_export import export, load_model, save_weights
from mvit_export.benchmarks.tables.random_weights import randomize
from mvit_export.data.preprocessing import FAMILY_PREPROCESSING
from mvit_export.families.mobilevit.network import create_mobilevit
from mvit_export.families.mobilevit.variants import VARIANT_NAMES
from mvit_export.results.parity import ParityResult

COLUMNS = ("variant", "format", "precision", "size", "PSNR", "max error / scale", "KL", "verdict")
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def rows(folder: Path) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for variant in VARIANT_NAMES:
        model = randomize(create_mobilevit(variant))
        weights = folder / f"{variant}.safetensors"
        save_weights(model, weights, preprocessing=FAMILY_PREPROCESSING["hf"])
        for result in export(load_model(weights=weights), precision=["fp32", "fp16"], out=folder, overwrite=True):
            assert result.parity is not None
            found.append({"variant": variant, "bytes": result.artifact.model_bytes, "verdict": result.parity})
    return found


def line(row: dict[str, Any]) -> str:
    verdict: ParityResult = row["verdict"]
    figures = ["", "", ""]
    if metrics := verdict.metrics:
        figures = [f"{metrics.psnr_db:.1f} dB", f"{metrics.max_rel:.1e}", f"{metrics.of_task['kl']:.0e}"]
    cells = [row["variant"], verdict.format, verdict.precision, f"{row['bytes'] / 1e6:.1f} MB", *figures]
    return "| " + " | ".join([*cells, verdict.status.upper()]) + " |"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        table = rows(Path(sys.argv[1] if len(sys.argv) > 1 else scratch))
    print(HEADER)
    for row in table:
        print(line(row))
    plain = [{"variant": row["variant"], "bytes": row["bytes"], **row["verdict"].to_json()} for row in table]
    print(json.dumps(plain))


if __name__ == "__main__":
    main()
