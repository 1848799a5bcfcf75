"""The README's result table: every variant, format and precision exported and checked, as Markdown.

Weights are random, seed 0, with random BatchNorm statistics and biases, since an untrained network's are trivial and
would hide faults. Ends with one JSON line.

    python -m mvit_export.benchmarks.parity_table [FOLDER]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mvit_export import export, load_model, save_weights
from mvit_export.models.load import VARIANT_NAMES
from mvit_export.models.mobilevit import create_mobilevit
from mvit_export.preprocessing import FAMILY_PREPROCESSING

COLUMNS = ("variant", "format", "precision", "size", "PSNR", "max error / scale", "KL", "verdict")
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def stir(model: nn.Module) -> None:
    """Random statistics and biases, in place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif name.endswith(("running_mean", "bias")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)


def rows(folder: Path) -> list[dict[str, Any]]:
    found = []
    for variant in VARIANT_NAMES:
        torch.manual_seed(0)
        model = create_mobilevit(variant)
        stir(model)
        weights = folder / f"{variant}.safetensors"
        save_weights(model, weights, preprocessing=FAMILY_PREPROCESSING["hf"])
        for result in export(load_model(weights=weights), precision=["fp32", "fp16"], out=folder, overwrite=True):
            assert result.parity is not None
            found.append({"variant": variant, "bytes": result.artifact.model_bytes, **result.parity.to_json()})
    return found


def line(row: dict[str, Any]) -> str:
    metrics, figures = row["metrics"], ["", "", ""]
    if row["status"] != "not-run":
        figures = [f"{metrics['psnr_db']:.1f} dB", f"{metrics['max_rel']:.1e}", f"{metrics['kl']:.0e}"]
    cells = [row["variant"], row["format"], row["precision"], f"{row['bytes'] / 1e6:.1f} MB", *figures]
    return "| " + " | ".join([*cells, row["status"].upper()]) + " |"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        table = rows(Path(sys.argv[1] if len(sys.argv) > 1 else scratch))
    print(HEADER)
    for row in table:
        print(line(row))
    print(json.dumps(table))


if __name__ == "__main__":
    main()
