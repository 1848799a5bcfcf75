"""`verify --locate`: one layer of the exported file is wrong, and the report must name that layer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TESTS, Finished
from torch import nn

from mvit_export import export, load_model, verify
from mvit_export.checks.locate import distance, first_divergence
from mvit_export.checks.reference_layers import record
from mvit_export.errors import UsageError
from mvit_export.readers.session import Intermediate
from mvit_export.readers.tflite import tflite_modules
from mvit_export.results.parity import Located, ParityResult

pytestmark = pytest.mark.slow

FORMATS = ("onnx", "coreml", "tflite")


# One wrong layer each. In the tiny network:


def perturb_conv(model: nn.Module) -> None:
    model.stages[1][1].depthwise.conv.weight.data[3] *= 1.5


def change_activation(model: nn.Module) -> None:
    model.stages[3][1].encoders[1].mlp.act = nn.GELU()


TINY_PLACES = {
    perturb_conv: "stages.1.1.depthwise.norm",  # folded: the convolution's own output is nowhere
    change_activation: "stages.3.1.encoders.1.mlp.act",  # of two encoders
}

# In the small one:


def transpose_small(model: nn.Module) -> None:
    proj = model.stages[0][1].encoders[0].attention.proj
    proj.weight.data = proj.weight.data.T.contiguous()


def drop_small_norm(model: nn.Module) -> None:
    model.stages[0][1].norm = nn.Identity()


def perturb_small_conv(model: nn.Module) -> None:
    model.stages[0][0].depthwise.conv.weight.data[3] *= 1.5


def change_small_activation(model: nn.Module) -> None:
    model.stages[0][1].encoders[0].mlp.act = nn.GELU()


def change_activation_after_norm(model: nn.Module) -> None:
    model.stages[0][0].expand.act = nn.ReLU()


def shift_queries(model: nn.Module) -> None:
    model.stages[0][1].encoders[0].attention.qkv.bias.data[0] += 0.5


def swap_channels(model: nn.Module) -> None:
    model.stem.conv.weight.data = model.stem.conv.weight.data.flip(1)


def bear_nan(model: nn.Module) -> None:
    model.classifier.bias.data[3] = float("nan")


PLACES = {
    transpose_small: "stages.0.1.encoders.0.attention.proj",
    drop_small_norm: "stages.0.1.norm",
    perturb_small_conv: "stages.0.0.depthwise.norm",
    change_small_activation: "stages.0.1.encoders.0.mlp.act",
    change_activation_after_norm: "stages.0.0.expand.act",
    shift_queries: "stages.0.1.encoders.0.attention.qkv",
    swap_channels: "stem.norm",
    bear_nan: "classifier",
}
CASES = [(fmt, mutate) for fmt in FORMATS for mutate in PLACES]
# TFLite makes these one op with the layer before them: the report names both.
FUSED = {("tflite", change_activation_after_norm), ("tflite", shift_queries)}


def export_mutant(model: Any, mutate: Callable[[nn.Module], None], fmt: str, out: Path, **options: Any) -> Path:
    """An artifact whose file holds the mutant, in the form it was written in, while its manifest tells of the original.

    A changed block would keep that form in any case, while the original would be compared in another.
    """
    module = copy.deepcopy(model.module)
    mutate(module)
    (result,) = export(replace(model, module=module), to=fmt, form="plain", out=out, verify=False, **options)
    return result.artifact.path


def locate_in(path: Path) -> tuple[ParityResult, Located]:
    (result,) = verify(path, find_layer=True)
    assert result.located is not None
    assert result.located.case == result.worst_case
    return result, result.located


@pytest.mark.parametrize("mutate", TINY_PLACES)
def test_wrong_layer_is_named(mutate: Callable[[nn.Module], None], tiny_model: Any, tmp_path: Path) -> None:
    result, found = locate_in(export_mutant(tiny_model, mutate, "onnx", tmp_path, precision="fp32"))
    assert result.status == "fail"
    assert found.diverges
    assert found.module == TINY_PLACES[mutate]
    assert found.error_before is not None and found.error_before < 1e-5
    assert found.error_after is not None and found.error_after > 1e-2


@pytest.mark.parametrize(("fmt", "mutate"), CASES, ids=lambda part: getattr(part, "__name__", part))
def test_kinds_of_layers(fmt: str, mutate: Callable[[nn.Module], None], small_model: Any, tmp_path: Path) -> None:
    result, found = locate_in(export_mutant(small_model, mutate, fmt, tmp_path, precision="fp32"))
    assert result.status == "fail"
    assert found.diverges
    assert PLACES[mutate] == (found.fused_with if (fmt, mutate) in FUSED else found.module)
    assert (found.seen_in is not None) == (mutate is drop_small_norm or (fmt, mutate) == ("tflite", bear_nan))
    assert found.error_before is not None and found.error_before < 1e-5
    if mutate is bear_nan:
        assert found.error_after is None
        assert "NaN or Inf after" in str(found)
    else:
        assert found.error_after is not None and found.error_after > 1e-2


@pytest.mark.parametrize("mutate", [transpose_small, drop_small_norm, perturb_small_conv])
def test_wrong_layer_is_named_in_half_precision(mutate: Any, small_model: Any, tmp_path: Path) -> None:
    _, found = locate_in(export_mutant(small_model, mutate, "coreml", tmp_path, precision="fp16"))
    assert found.diverges
    assert found.module == PLACES[mutate]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_clean_file_has_no_wrong_layer(fmt: str, precision: str, small_model: Any, tmp_path: Path) -> None:
    (made,) = export(small_model, to=fmt, precision=precision, out=tmp_path, verify=False)
    result, found = locate_in(made.artifact.path)
    assert result.status == "pass"
    assert not found.diverges
    assert found.error_before is None
    assert found.error_after is not None and 0 < found.error_after < result.tolerance.max_rel
    assert str(found).startswith("no layer diverges: largest error ")


def test_image_input_is_located_too(small_model: Any, tmp_path: Path) -> None:
    _, found = locate_in(export_mutant(small_model, transpose_small, "onnx", tmp_path, input="image"))
    assert found.module == PLACES[transpose_small]


OTHER = """
from torch import nn
import torch

class Branches(nn.Module):
    "Two branches, an activation that is called twice and works in place, code outside of modules, a tuple between."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.ModuleList([nn.Conv2d(3, 8, 3)]), nn.ModuleList([nn.Conv2d(3, 8, 3)])
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.pair = Pair()
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        left = self.act(self.norm(self.a[0](x)))
        right = self.act(self.b[0](x))
        return self.head(sum(self.pair(left, right)).mean((2, 3)))

class Pair(nn.Module):
    def forward(self, a, b):
        return a * 2, b + 1

def net():
    torch.manual_seed(0)
    module = Branches()
    module.norm.running_mean.normal_()
    return module.eval()

"""


@pytest.fixture(scope="module")
def branches(tmp_path_factory: pytest.TempPathFactory) -> Any:
    source = tmp_path_factory.mktemp("net") / "branches.py"
    source.write_text(OTHER)
    return load_model(model=f"{source}:net", input_shape=(1, 3, 16, 16))


def scale_left(model: nn.Module) -> None:
    model.a[0].weight.data *= 1.1


def scale_right(model: nn.Module) -> None:
    model.b[0].weight.data *= 1.1


@pytest.mark.parametrize(("mutate", "place"), [(scale_left, "norm"), (scale_right, "b.0")])
@pytest.mark.parametrize("fmt", FORMATS)
def test_branch_at_fault(fmt: str, mutate: Any, place: str, branches: Any, tmp_path: Path) -> None:
    """A branch that runs later and matches does not excuse the one that runs before it."""
    _, found = locate_in(export_mutant(branches, mutate, fmt, tmp_path, precision="fp32"))
    assert found.diverges
    assert found.module == place


def scale_stage(model: nn.Module) -> None:
    model.blocks[1][0].conv_exp.weight.data *= 1.2


@pytest.mark.parametrize("fmt", ["onnx", "coreml"])
def test_timm_model(fmt: str, tmp_path: Path) -> None:
    """Its norms include their activation."""
    model = load_model(model="timm:test_efficientnet")
    (clean,) = export(model, to=fmt, precision="fp32", out=tmp_path / "clean", verify=False)
    assert not locate_in(clean.artifact.path)[1].diverges
    _, found = locate_in(export_mutant(model, scale_stage, fmt, tmp_path, precision="fp32"))
    assert found.module == "blocks.1.0.bn1"


# Overflow


def test_overflow_is_named(tmp_path: Path) -> None:
    overflowing = load_model(model=f"{TESTS / 'small.py'}:loud", input_shape=(1, 3, 16, 16))
    half, full = export(overflowing, to="coreml", precision=["fp16", "fp32"], out=tmp_path)
    assert full.parity is not None and full.parity.status == "pass"
    assert half.parity is not None and half.parity.status == "fail"
    overflow = half.parity.overflow
    assert overflow is not None
    assert overflow.module == "stages.0.0.depthwise.conv"
    assert overflow.op_type == "conv"
    assert overflow.largest > 65504
    assert "fp16 overflow first at stages.0.0.depthwise.conv (op conv2d_2" in half.parity.reason
    _, found = locate_in(half.artifact.path)
    assert found.module == "stages.0.0.depthwise.norm"


# The command line


def test_command_line(small_model: Any, tmp_path: Path, cli: Callable[..., Finished]) -> None:
    path = export_mutant(small_model, transpose_small, "onnx", tmp_path)
    plain = cli("verify", path)
    assert plain.code == 1
    assert f"mvit-export verify --locate {path}" in plain.out
    done = cli("verify", "--locate", path, "--json")
    assert done.code == 1
    located = done.json["artifacts"][0]["located"]
    assert located["module"] == PLACES[transpose_small]
    assert {*located} == {*Located.__dataclass_fields__}
    line = f"        first diverging layer: {PLACES[transpose_small]} (op node_linear_1, Add): error "
    assert line in done.err
    assert json.loads((path / "parity.json").read_text())["artifacts"][0]["located"] == located


def test_golden_vectors_have_no_layers(tiny_artifact: Callable[..., Path]) -> None:
    path = tiny_artifact("onnx")
    with pytest.raises(UsageError, match="--locate compares with PyTorch's layers"):
        verify(path, against="golden", find_layer=True)
    (result,) = verify(path)
    assert result.located is None
    assert asdict(result)["located"] is None


# Matching


def test_layouts() -> None:
    reference = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    for form in (reference, reference.transpose(0, 2, 3, 1), reference.transpose(0, 3, 1, 2), reference.reshape(6, 20)):
        assert distance(reference, form) == 0
    assert distance(reference, reference.transpose(0, 1, 3, 2)) > 0.1
    assert distance(reference, reference + np.inf) == np.inf


def test_names_of_tflite_tensors() -> None:
    chains = {"": (), "a.0": ("0",), "b.norm": ("b", "norm"), "b.x_norm": ("b", "x_norm")}
    names = {
        "p.Exportable/q.Net_model;3": ("",),
        "p.Exportable/q.Net_model/torch.nn.Conv2d_0;1": ("a.0",),
        "p.Exportable/q.Net_model/q.B_b/q.N_x_norm;": ("b.x_norm",),
        "p.Exportable/q.Net_model/q.B_b/q.N_norm;;p.Exportable/q.Net_model/torch.nn.Conv2d_0;1": ("b.norm", "a.0"),
        "p.Exportable/q.Normalise_normalise;": (),
        "serving_default_logits_output": (),
    }
    assert {name: tflite_modules(name, chains) for name in names} == names


def test_moved_scale_is_no_fault() -> None:
    """A file may scale a layer's output and undo it in the next: the layer differs, what depends on it does not."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    calls = record(model, np.ones((1, 4), np.float32)).calls
    assert [call.module for call in calls] == ["0", "1", "2", ""]

    def run(*factors: float) -> Located | None:
        items = [
            Intermediate(f"op{i}", "Linear", (call.module,), call.output * factor)
            for i, (call, factor) in enumerate(zip(calls, factors, strict=False))
        ]
        return first_divergence(calls, items, 1e-5)

    clean, moved, wrong = run(1, 1, 1), run(1, 3, 1), run(1, 3, 3)
    assert clean is not None and not clean.diverges
    assert moved is not None and not moved.diverges
    assert wrong is not None and wrong.diverges and (wrong.module, wrong.op) == ("1", "op1")
    assert first_divergence(calls, [], 1e-5) is None


def test_reference_keeps_values_that_are_overwritten() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Identity()).eval()
    model[0].bias.data = torch.tensor([-9.0, 9, 9, 9])
    calls = record(model, np.ones((1, 4), np.float32)).calls
    assert [call.module for call in calls] == ["0", "1", ""]
    assert calls[0].output.min() < 0 <= calls[1].output.min()
    assert calls[0].output.max() == calls[1].output.max()
