"""The reference: PyTorch in float64, float32's own distance from it, and what that excuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mvit_export import export, load_model, verify
from mvit_export.artifact import load_golden, read_artifact
from mvit_export.checks.comparison import Outcome, constant_reference, find_worst, judge_outcomes
from mvit_export.checks.figures import measure, psnr_db
from mvit_export.checks.reference import FLOAT32_PREFIX, Pair, Reference
from mvit_export.checks.sums import LANES, InSequence
from mvit_export.errors import ArtifactError, ModelError
from mvit_export.formats.base import SAME_ARITHMETIC
from mvit_export.results.parity import Metrics
from mvit_export.system.trust import TRUST_ALL
from mvit_export.tasks.unknown import UNKNOWN

NETWORKS = """
import torch
from torch import nn
from torch.nn import functional as F

class Maps(nn.Module):
    def __init__(self, middle):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.middle = nn.Conv2d(3, 8, 3, 2, 1), middle

    def forward(self, x):
        return self.middle(self.stem(x))

class Noise(nn.Module):
    def forward(self, x):
        return x + 1e-3 * torch.randn_like(x)

class Dropout(nn.Module):
    def forward(self, x):
        return F.dropout(x)  # training=True is its default

class Float32(nn.Module):
    def forward(self, x):
        return x @ torch.eye(x.shape[-1])  # made in float32, whatever x is

class InPlace(Maps):
    def forward(self, x):
        return super().forward(x.sub_(0.5).div_(0.2))

class Keeps(Maps):
    def __init__(self, middle):
        super().__init__(middle)
        self.register_buffer("kept", torch.zeros(1, 8, 32, 32))

    def forward(self, x):
        return self.kept.copy_(super().forward(x))

def in_place(): return InPlace(nn.ReLU())
def keeps(): return Keeps(nn.ReLU())
def plain(): return Maps(nn.ReLU())
def instance_norm(): return Maps(nn.InstanceNorm2d(8, affine=True))
def pooled(): return Maps(nn.AdaptiveAvgPool2d(1))
def group_norm(): return Maps(nn.GroupNorm(4, 8))
def noise(): return Maps(Noise())
def dropout(): return Maps(Dropout())
def float32(): return Maps(Float32())
"""


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("networks") / "net.py"
    path.write_text(NETWORKS)
    return path


def verdict_on(networks: Path, name: str, out: Path) -> Any:
    model = load_model(model=f"{networks}:{name}", image_size=64)
    (result,) = export(model, to="onnx", out=out)
    assert result.parity is not None
    return result.parity


@pytest.mark.slow
def test_reference_is_float64_and_float32_is_measured_against_it(networks: Path, tmp_path: Path) -> None:
    verdict = verdict_on(networks, "plain", tmp_path)
    assert (verdict.status, verdict.reference_dtype, verdict.noisy_inputs, verdict.note) == ("pass", "float64", (), "")
    assert 1e-9 < verdict.float32_max_rel < 1e-6
    stored = json.loads((tmp_path / "plain" / "onnx-fp32" / "parity.json").read_text())["artifacts"][0]
    assert stored["reference_dtype"] == "float64"
    assert stored["float32_max_rel"] == verdict.float32_max_rel
    golden = load_golden(read_artifact(tmp_path / "plain" / "onnx-fp32"))
    exact = load_model(model=f"{networks}:plain", image_size=64).module.double()
    with torch.no_grad():
        for case in golden.values():
            assert set(case) == {"image", "output_0"}
            expected = exact(torch.from_numpy(case["image"]).double()).numpy().astype(np.float32)
            np.testing.assert_array_equal(case["output_0"], expected)


@pytest.mark.slow
def test_right_file_passes_where_float32_is_noise(networks: Path, tmp_path: Path) -> None:
    """InstanceNorm of a black picture multiplies the rounding of a mean by 1 / sqrt(eps)."""
    verdict = verdict_on(networks, "instance_norm", tmp_path)
    assert verdict.status == "pass"
    assert verdict.noisy_inputs == ("black",)
    assert verdict.note.startswith("black: float32 itself is up to ")
    assert verdict.metrics.max_rel < 1e-5  # of the other inputs
    assert verdict.float32_max_rel > 1
    assert verdict_on(networks, "group_norm", tmp_path).status == "pass"


@pytest.mark.slow
def test_golden_vectors_know_where_float32_is_noise(
    networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvit_export.converters.golden.GOLDEN_CASES", ("noise-0", "black"))
    verdict_on(networks, "instance_norm", tmp_path)
    (place,) = (tmp_path / "instance_norm").iterdir()
    stored = load_golden(read_artifact(place))
    assert FLOAT32_PREFIX + "output_0" in stored["black"]
    assert set(stored["noise-0"]) == {"image", "output_0"}
    (verdict,) = verify(place, against="golden")
    assert (verdict.status, verdict.noisy_inputs, verdict.reference_dtype) == ("pass", ("black",), None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["other", "output_0"])
def test_golden_float32_of_another_name_or_shape_is_the_files_fault(
    name: str, networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (result,) = export(load_model(model=f"{networks}:plain", image_size=64), to="onnx", out=tmp_path, verify=False)
    cases = load_golden(result.artifact)
    cases["noise-0"][FLOAT32_PREFIX + name] = np.zeros((1, 2), np.float32)
    monkeypatch.setattr("mvit_export.checks.parity.load_golden", lambda _: cases)
    with pytest.raises(ArtifactError, match="'noise-0' has other float32 outputs; export again"):
        verify(result.artifact.path, against="golden")


def off_by(error: float) -> Metrics:
    """The figures of an output whose every value is off by `error` of the scale."""
    exact = np.linspace(0.5, 1, 16)[None]
    return measure(exact, exact + error * np.resize([1.0, -1.0], 16), UNKNOWN)


@pytest.mark.parametrize(
    ("file", "float32", "status"),
    [
        (3e-5, 2e-5, "pass"),  # float32 itself is beyond the bound of 1e-5, the file at most twice as far
        (5e-5, 2e-5, "fail"),  # more than twice
        (3e-5, 4e-6, "fail"),  # float32 is well-behaved: the bound stays
        (3e-2, 3e-2, "fail"),  # float32 is so far off that nothing can be compared
        (5e-6, 3e-2, "pass"),  # within the bound anyhow
    ],
)
def test_bound_is_twice_the_error_of_float32(file: float, float32: float, status: str) -> None:
    good = Outcome("good", (), off_by(1e-7), float32=off_by(1e-8), widest=lambda: off_by(1e-8), scale=1.0)
    noisy = Outcome("noisy", (), off_by(file), float32=off_by(1e-8), widest=lambda: off_by(float32), scale=1.0)
    judged = judge_outcomes([good, noisy], SAME_ARITHMETIC, UNKNOWN)
    assert ("fail" if judged.reasons else "pass") == status
    excused = status == "pass" and file > 1e-5
    assert judged.noisy_inputs == (("noisy",) if excused else ())
    assert judged.metrics is not None
    assert judged.metrics.max_rel == pytest.approx(1e-7 if excused else file)


def test_float32_that_is_too_far_off_is_named() -> None:
    far = Outcome("far", (), off_by(3e-2), float32=off_by(2e-2), widest=lambda: off_by(2e-2), scale=1.0)
    judged = judge_outcomes([far], SAME_ARITHMETIC, UNKNOWN)
    assert judged.reasons[-1] == "far: float32 itself is 2.0e-02 from float64, too far to compare"


def test_a_noisy_output_does_not_hide_a_wrong_one_of_the_same_input() -> None:
    noisy = Outcome("black", (), off_by(3e-5), float32=off_by(2e-5), widest=lambda: off_by(2e-5), scale=1.0)
    wrong = Outcome("black", (), off_by(2e-5), float32=off_by(1e-8), widest=lambda: off_by(1e-8), scale=1.0)
    right = Outcome("white", (), off_by(1e-8), float32=off_by(1e-8), widest=lambda: off_by(1e-8), scale=1.0)
    judged = judge_outcomes([noisy, wrong, right], SAME_ARITHMETIC, UNKNOWN)
    assert judged.reasons
    assert judged.noisy_inputs == ("black",)
    assert find_worst([noisy, wrong, right], judged) is wrong


@pytest.mark.slow
def test_noise_on_one_input_does_not_excuse_another(networks: Path, tmp_path: Path) -> None:
    """A network whose float32 is noise on black is still held to 1e-5 on every other picture."""
    model = load_model(model=f"{networks}:instance_norm", image_size=64)
    wrong = copy.deepcopy(model.module)
    wrong.middle.bias.data += 1e-3
    (result,) = export(replace(model, module=wrong), to="onnx", out=tmp_path)
    assert result.parity is not None
    assert result.parity.status == "fail"
    assert result.parity.noisy_inputs == ()


@pytest.mark.parametrize("name", ["noise", "dropout"])
def test_network_that_answers_differently_is_refused(name: str, networks: Path) -> None:
    message = f"{name} gives different answers for the same input, .* of the scale of output_0; is there dropout"
    with pytest.raises(ModelError, match=message):
        load_model(model=f"{networks}:{name}", image_size=64)


@pytest.mark.slow
def test_verify_refuses_a_network_that_has_become_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "net.py"
    source.write_text(NETWORKS)
    export(load_model(model=f"{source}:plain", image_size=64), to="onnx", out=tmp_path, verify=False)
    source.write_text(NETWORKS.replace("Maps(nn.ReLU())", "Maps(nn.Sequential(nn.ReLU(), Noise()))"))
    monkeypatch.setenv(TRUST_ALL, "1")
    with pytest.raises(ModelError, match="plain gives different answers for the same input"):
        verify(tmp_path / "plain")


@pytest.mark.slow
def test_network_that_cannot_run_in_float64_says_so(networks: Path, tmp_path: Path) -> None:
    verdict = verdict_on(networks, "float32", tmp_path)
    assert (verdict.status, verdict.reference_dtype, verdict.float32_max_rel) == ("pass", "float32", None)
    assert verdict.note.startswith("the reference is float32, the network does not run in float64: ")


@pytest.mark.slow
def test_weights_that_overflow_float32_alone_are_named(tmp_path: Path) -> None:
    source = tmp_path / "net.py"
    source.write_text(
        NETWORKS.replace("Maps(nn.ReLU())", "Maps(Square())")
        + """
class Square(nn.Module):
    def forward(self, x):
        return (x * 1e30) * (x * 1e30) * 1e-60
"""
    )
    verdict = verdict_on(source, "plain", tmp_path)
    assert verdict.status == "fail"
    assert "the reference itself holds NaN or Inf in output_0; the weights overflow in fp32" in verdict.reason


def test_answers_below_float32_prove_nothing() -> None:
    """Initial weights that are small in every layer: answers of 1e-43, a few denormal steps from zero."""
    tiny, usual = np.array([[1e-43, 3e-43]]), np.array([[1e-3, 3e-3]])
    said = constant_reference([Pair("a", np.zeros(1), {"logits": tiny}), Pair("b", np.zeros(1), {"logits": 2 * tiny})])
    assert said is not None
    assert said.startswith("the reference's logits are below what float32 holds with all digits")
    assert constant_reference([Pair(str(i), np.zeros(1), {"logits": i * usual}) for i in (1, 2)]) is None


@pytest.mark.parametrize(("peak", "noise"), [(1e200, 1e10), (1e-170, 0.0), (1e-170, 1e-320), (1e308, 1e308)])
def test_psnr_of_what_float32_cannot_hold(peak: float, noise: float) -> None:
    assert np.isfinite(psnr_db(peak, noise))


def test_network_that_does_not_run_in_sequence_keeps_the_narrow_bound(
    networks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no such operator in this mode")

    reference = Reference(load_model(model=f"{networks}:instance_norm", image_size=64))
    black = np.zeros((1, 3, 64, 64), np.float32)
    pair = reference.answer("black", black, black)
    assert pair.in_sequence is not None
    monkeypatch.setattr("mvit_export.checks.sums.normalize", refuse)
    (only,) = pair.in_sequence()
    np.testing.assert_array_equal(only["output_0"], pair.float32["output_0"])  # type: ignore[index]


def test_the_widest_error_is_that_of_runtimes_with_the_channels_last(networks: Path) -> None:
    """LiteRT adds a map's pixels one by one: on a black picture a global mean is further off than in eight lanes."""
    model = load_model(model=f"{networks}:pooled", image_size=128)
    black = np.zeros((1, 3, 128, 128), np.float32)
    pair = Reference(model).answer("black", black, black)
    with InSequence(1), torch.no_grad():
        found = model.module(torch.from_numpy(black)).numpy()
    (name,) = pair.outputs
    off = np.abs(found - pair.outputs[name]).max()
    usual, widest = (pair.float32_error(name, UNKNOWN, 0.0, widest=wide) for wide in (False, True))
    assert usual and widest and widest.max_abs == off > 3 * usual.max_abs


@pytest.mark.parametrize("network", ["in_place", "keeps"])
def test_network_that_writes_where_it_should_not(networks: Path, network: str) -> None:
    """Into its input, or into a buffer that it returns at every call."""
    reference = Reference(load_model(model=f"{networks}:{network}", image_size=64))
    one, two = (np.full((1, 3, 64, 64), value, np.float32) for value in (0.1, 0.9))
    first, second = (reference.answer("x", array, array) for array in (one, two))
    assert one.min() == one.max() == np.float32(0.1)
    for pair in (first, second):
        np.testing.assert_allclose(pair.outputs["output_0"], pair.float32["output_0"], rtol=1e-5, atol=1e-6)  # type: ignore[index]
    assert np.abs(first.outputs["output_0"] - second.outputs["output_0"]).max() > 1e-3


# Sums in sequence


def errors(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, lanes: int) -> tuple[float, float]:
    """How far float32 is from float64, as PyTorch adds and in sequence, of the largest value."""
    exact = call(x.double())
    with InSequence(lanes):
        found = call(x)
    assert found.dtype == torch.float32
    assert found.shape == exact.shape
    return tuple(float((y - exact).abs().max() / exact.abs().max()) for y in (call(x), found))  # type: ignore[return-value]


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum((2, 3)),
        lambda x: x.sum(1, keepdim=True),
        lambda x: x.mean((-1, -2), keepdim=True),
        lambda x: nn.functional.adaptive_avg_pool2d(x, 1),
        lambda x: nn.functional.group_norm(x, 2, torch.ones(8).to(x), torch.arange(8).to(x)),
        lambda x: nn.functional.layer_norm(x, x.shape[2:], torch.full(x.shape[2:], 2.0).to(x)),
        lambda x: nn.functional.instance_norm(x, weight=torch.arange(8).to(x), bias=torch.ones(8).to(x)),
        lambda x: nn.functional.batch_norm(x, torch.zeros(8).to(x), torch.ones(8).to(x), torch.ones(8).to(x)),
    ],
    ids=["sum", "sum-kept", "mean", "pool", "group", "layer", "instance", "batch"],
)
def test_sums_in_sequence_are_the_same_function(call: Callable[[torch.Tensor], torch.Tensor], lanes: int) -> None:
    x = torch.rand(2, 8, 9, 13, generator=torch.Generator().manual_seed(0))
    assert max(errors(call, x, lanes)) < 1e-5


def test_sums_in_sequence_lose_more_where_terms_are_alike() -> None:
    """65,536 terms near 0.1, as a norm of a white picture adds them."""
    x = torch.full((1, 1, 256, 256), 0.1)
    (pairwise, in_lanes), (_, in_one) = (errors(lambda x: x.mean((2, 3)), x, lanes) for lanes in LANES)
    assert pairwise < 1e-6 < in_lanes < in_one < 1e-3


def test_sums_keep_the_type_that_they_ask_for() -> None:
    with InSequence():
        found = torch.ones(4, 4).mean(1, dtype=torch.float64), torch.ones(4, 4).sum(1, dtype=torch.float64)
    assert [tensor.dtype for tensor in found] == [torch.float64] * 2
