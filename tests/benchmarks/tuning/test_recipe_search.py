"""The search over recipes, with commands made up here, and its records: what is kept, resumed, refused and chosen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mvit_export.artifact import read_artifact
from mvit_export.benchmarks.tuning.recipe_search import (
    CandidateFailed,
    Search,
    ablations,
    best_of,
    open_search,
    pareto,
    parts_of,
    run_command,
    tune,
)
from mvit_export.errors import UsageError
from mvit_export.formats.recipes import read_recipe
from mvit_export.formats.tflite import TFLITE


class Commands:
    """Stand-ins for export, eval and bench. Stage 3 in int8 costs 3 points, attention nothing; float costs time."""

    def __init__(self, refuse: str = "") -> None:
        self.calls: list[list[str]] = []
        self.refuse = refuse

    def __call__(self, arguments):
        self.calls.append(list(arguments))
        return getattr(self, arguments[0])(list(arguments))

    def export(self, arguments):
        self.recipe = read_recipe(Path(arguments[arguments.index("--recipe") + 1]))
        if self.recipe.name == self.refuse:
            raise CandidateFailed("the converter gave up")
        return {"artifacts": [{"path": "made", "bytes": 1000}]}

    def eval(self, arguments):
        lost = 0.03 * (self.recipe.use("linear", "stages.3.1.encoders.0.mlp.expand") != "float")
        lost += 0.005 * (self.recipe.use("conv", "stem.conv") == "static")
        return {"results": [{"top1": 0.99, "mean_kl": 0.0}, {"top1": 0.99 - lost, "mean_kl": lost}]}

    def bench(self, arguments):
        parts = [f"stages.{i}.x" for i in range(5)] + ["stem.conv"]
        kinds = ("linear", "conv", "depthwise")
        integer = sum(self.recipe.use(k, p) in ("static", "dynamic") for k in kinds for p in parts)
        ratio = 1 - 0.5 * integer / (len(kinds) * len(parts))
        return {"results": [{"ratio": None}, {"ratio": {"median": ratio, "interval": [ratio - 0.01, ratio + 0.01]}}]}


@pytest.fixture
def search(tiny_artifact, tmp_path) -> Search:
    base = read_artifact(tiny_artifact("tflite"))
    return Search(base, tmp_path / "data", tmp_path / "calibration", max_drop=1.0, folder=tmp_path / "tune")


def test_best_recipe_keeps_the_drop_and_is_the_cheapest_that_does(search):
    outcomes, errors = tune(search, run=Commands())
    assert not errors
    best = best_of(search, outcomes)
    assert best.drop <= 1.0
    assert all(o.cost >= best.cost for o in outcomes if o.drop <= 1.0)
    assert min(outcomes, key=lambda o: o.cost).drop > 1.0  # there was something to find
    written = read_recipe(search.folder / "best.toml")
    assert written.rules == best.recipe.rules and "top-1 drop" in written.note


def test_front_is_what_no_other_beats(search):
    outcomes, _ = tune(search, run=Commands())
    front = pareto(outcomes)
    for one in front:
        assert not any(o.cost < one.cost and o.drop <= one.drop for o in outcomes)
    assert [o.cost for o in front] == sorted(o.cost for o in front)
    document = json.loads((search.folder / "front.json").read_text())
    assert [row["on_front"] for row in document["outcomes"]] == [o in front for o in outcomes]
    assert (search.folder / "front.svg").read_bytes().startswith(b"<?xml")
    assert all(o.recipe.name in (search.folder / "front.md").read_text() for o in outcomes)


def test_search_that_was_stopped_goes_on_without_repeating(search):
    class Stops(Commands):
        def bench(self, arguments):
            if len(self.calls) > 12:
                raise KeyboardInterrupt
            return super().bench(arguments)

    first = Stops()
    with pytest.raises(KeyboardInterrupt):
        tune(search, run=first)
    second, whole = Commands(), Commands()
    resumed, _ = tune(search, run=second)
    fresh, _ = tune(Search(**{**vars(search), "folder": search.folder.with_name("again")}), run=whole)
    assert [o.recipe for o in resumed] == [o.recipe for o in fresh]
    assert len(second.calls) == len(whole.calls) - 12


def test_other_data_is_another_search(search, tmp_path):
    tune(search, run=Commands())
    again = Commands()
    tune(Search(**{**vars(search), "data": tmp_path / "other"}), run=again)
    assert again.calls


def test_refused_recipe_is_told_and_the_search_goes_on(search):
    outcomes, errors = tune(search, run=Commands(refuse="accurate"))
    assert errors == ["accurate: the converter gave up"]
    assert {"fast", "small"} <= {o.recipe.name for o in outcomes}


def test_number_of_candidates_is_kept(search):
    commands = Commands()
    outcomes, _ = tune(Search(**{**vars(search), "candidates": 5}), run=commands)
    assert len(outcomes) == 5


def test_no_recipe_is_good_enough(search):
    outcomes, _ = tune(Search(**{**vars(search), "max_drop": -1.0}), run=Commands())
    assert best_of(Search(**{**vars(search), "max_drop": -1.0}), outcomes) is None
    assert not (search.folder / "best.toml").exists()


def test_parts_cover_the_network_once(tiny_artifact, tiny_model):
    parts = parts_of(read_artifact(tiny_artifact("tflite")))
    assert len(parts) <= 12
    for name, _ in tiny_model.module.named_parameters():
        assert sum(name == part or name.startswith(f"{part}.") for part in parts) == 1


def test_ablation_leaves_exactly_one_thing_in_float(tiny_artifact):
    fast = TFLITE.recipes["fast"]
    found = ablations(fast, ["stages.1"])
    assert found[-1].use("linear", "stages.1.0.x") == "float"
    assert found[-1].use("linear", "stages.10.x") == fast.use("linear", "stages.10.x")
    assert len({tuple(recipe.rules) for recipe in found}) == len(found)


def test_tune_starts_from_fp32_alone(tiny_artifact, tmp_path):
    with pytest.raises(UsageError, match="starts from one fp32 artifact"):
        open_search(tiny_artifact("onnx", "fp16"), data=tmp_path, calibration=tmp_path, max_drop=1, folder=tmp_path)


def test_failed_command_is_its_own_line(tmp_path):
    with pytest.raises(CandidateFailed, match="does not exist, expected an artifact directory"):
        run_command(["verify", str(tmp_path / "nowhere")])


def test_like_exports_the_same_model_again(cli, tiny_artifact, tmp_path):
    base = shutil.copytree(tiny_artifact("onnx"), tmp_path / "onnx-fp32")
    done = cli("--to", "onnx", "--like", base, "--precision", "fp16", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    (made,) = done.json["artifacts"]
    weights = [read_artifact(Path(path)).manifest.weights.state_sha256 for path in (base, made["path"])]
    assert weights[0] == weights[1]
    refused = cli("--to", "onnx", "--like", base, "--variant", "xxs", "--out", tmp_path / "out")
    assert refused.code == 2 and "leave out --variant" in refused.err
