"""What class scores are: logits, probabilities or independent answers, and what follows from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvit_export import evaluate, export, load_model
from mvit_export.artifact import MANIFEST, Manifest, read_artifact
from mvit_export.errors import ModelError, UsageError
from mvit_export.families.answers import INDEPENDENT, kind_of_scores
from mvit_export.readers.session import openers
from mvit_export.tasks.classification import LOGITS, PROBABILITIES, check_classifier

NETWORKS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, last):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.last = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5), last

    def forward(self, x):
        return self.last(8 * self.head(self.stem(x).relu().mean((2, 3))))

class Table(nn.Module):
    # Takes pixels alone: what no picture holds is no index.
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(256, 5)
        self.table.weight.data.uniform_(0, 1)

    def forward(self, x):
        return self.table((x.clamp(min=0) * 255).long()).mean((1, 2, 3)).softmax(1)

class Nothing(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x.flatten(1)[:, :0] * self.scale

def table(): return Table()
def nothing(): return Nothing()
def softmax(): return Net(nn.Softmax(1))
def sigmoid(): return Net(nn.Sigmoid())
def logits(): return Net(nn.Identity())
"""
LABELS = ("ant", "bee", "cat", "dog", "elk")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("networks") / "net.py"
    path.write_text(NETWORKS)
    return path


def test_scores_are_told_apart_by_calling(networks: Path) -> None:
    found = {name: load_model(model=f"{networks}:{name}", image_size=32) for name in ("logits", "softmax", "sigmoid")}
    assert [model.info.scores for model in found.values()] == [None, "probabilities", None]
    assert [model.output_names for model in found.values()] == [("logits",), ("scores",), ("output_0",)]
    assert [model.info.task for model in found.values()] == ["image-classification"] * 2 + ["unknown"]
    assert found["logits"].notes == ()
    assert "the outputs are probabilities: no softmax is added" in found["softmax"].notes[0]
    assert "as after a sigmoid" in found["sigmoid"].notes[0]


@pytest.mark.parametrize(
    ("samples", "kind"),
    [
        ([[0.2, 0.8], [1.0, 0.0]], PROBABILITIES),
        ([[0.2, 0.9], [0.3, 0.3]], INDEPENDENT),
        ([[0.2, 0.8], [1.2, -0.2]], LOGITS),  # the sum alone is no proof
        ([[0.2, 0.8], [np.nan, 0.0]], PROBABILITIES),
        ([[0.0, 0.0], [0.0, 0.0]], LOGITS),  # an untrained head
    ],
)
def test_kind_of_scores(samples: list[list[float]], kind: str) -> None:
    assert kind_of_scores([np.array([sample]) for sample in samples]) == kind


def test_network_may_refuse_what_no_picture_holds(networks: Path) -> None:
    assert load_model(model=f"{networks}:table", image_size=32).info.scores == "probabilities"


def test_empty_output_is_named(networks: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing's output output_0 is empty, shape \(1, 0\), expected numbers"):
        load_model(model=f"{networks}:nothing", image_size=32)


def test_labels_of_a_sigmoid_are_refused(networks: Path) -> None:
    with pytest.raises(UsageError, match=r"labels need scores of one class among several, but .* a sigmoid"):
        load_model(model=f"{networks}:sigmoid", image_size=32, labels=LABELS)


@pytest.mark.slow
def test_core_ml_classifier_takes_probabilities_as_they_are(networks: Path, tmp_path: Path) -> None:
    model = load_model(model=f"{networks}:softmax", image_size=32, labels=LABELS)
    (result,) = export(model, to="coreml", precision="fp32", out=tmp_path)
    assert result.parity is not None
    assert (result.parity.status, result.parity.reason) == ("pass", "")
    artifact = read_artifact(result.artifact.path)
    noise = np.random.default_rng(0).random((1, 3, 32, 32), np.float32)
    (open_file, *_) = openers(artifact)
    scores = open_file(artifact).run(noise)["scores"]
    given: dict[str, Any] = {"scores": scores, "label": LABELS[int(scores.argmax())]}
    check_classifier({**given, "odds": dict(zip(LABELS, scores[0].tolist(), strict=True))}, artifact.manifest)
    twice = np.exp(scores[0]) / np.exp(scores[0]).sum()
    with pytest.raises(ValueError, match="the classifier's probabilities are not the model's"):
        check_classifier({**given, "odds": dict(zip(LABELS, twice.tolist(), strict=True))}, artifact.manifest)


@pytest.mark.slow
def test_accuracy_does_not_take_a_softmax_twice(networks: Path, tmp_path: Path) -> None:
    """The same network with and without its softmax: the same confidence, and the same KL of nothing."""
    pictures = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "data.npz", images=pictures, labels=np.arange(40) % 5)
    rows = {}
    for name in ("logits", "softmax"):
        export(load_model(model=f"{networks}:{name}", image_size=32), to="onnx", out=tmp_path)
        rows[name] = evaluate(tmp_path / name, data=tmp_path / "data.npz")["results"][0]
    assert rows["softmax"]["ece"] == pytest.approx(rows["logits"]["ece"], abs=1e-6)
    assert rows["softmax"]["mean_kl"] == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_manifest_records_what_the_scores_are(networks: Path, tmp_path: Path) -> None:
    (result,) = export(load_model(model=f"{networks}:softmax", image_size=32), to="onnx", out=tmp_path)
    data = json.loads((result.artifact.path / MANIFEST).read_text())
    assert data["model"]["scores"] == "probabilities"
    assert result.parity is not None
    assert result.parity.metrics is not None
    assert result.parity.metrics.of_task["kl"] < 1e-9
    del data["model"]["scores"]  # as earlier versions wrote it
    assert Manifest.from_json(data).model.scores is None
