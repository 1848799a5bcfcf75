"""`tune --latency`: which form wins, what is not timed, what is written and what is refused. Times are made up here,
but for one run of the command; forms are real exports of the tiny network."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Finished, swap_weights

from mvit_export import export
from mvit_export.artifact import read_artifact, write_json
from mvit_export.benchmarks.devices.arm64 import Arm64
from mvit_export.benchmarks.devices.base import FileRefused
from mvit_export.benchmarks.harness.bench import store
from mvit_export.benchmarks.tuning import form_search
from mvit_export.benchmarks.tuning.form_search import LEFT_OUT, Choice, Setup, Tried, choose, tune_forms
from mvit_export.errors import ArtifactError, ConversionError, DeviceError, UsageError
from mvit_export.formats.table import FORMATS
from mvit_export.results.latency import LatencyReport, Measurement, Ratio
from mvit_export.system import staging

pytestmark = pytest.mark.slow

OWN, OTHER = FORMATS["onnx"].forms
FASTER, SLOWER, SAME = (0.8, 0.75, 0.85), (1.2, 1.1, 1.3), (0.97, 0.93, 1.01)
ENVIRONMENT = {"cpu": "a core", "cores": 2, "system": "Linux", "machine": "aarch64", "device": "local"}


@pytest.fixture(scope="module")
def other(tiny_artifact: Callable[..., Path]) -> Path:
    """The tiny network in the form that is not ONNX's default."""
    return tiny_artifact("onnx", form=OTHER)


@pytest.fixture
def exports(other: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for `export`, which gives what was made once: `damage` may change it, `error` is raised instead."""
    stand_in = SimpleNamespace(damage=lambda place: None, error=None, calls=[])

    def give(model: Any, *, out: Path, form: str, **options: Any) -> tuple[SimpleNamespace]:
        stand_in.calls.append({"form": form, **options})
        if stand_in.error:
            raise stand_in.error
        place = Path(shutil.copytree(other, out / "tiny" / f"onnx-fp32-{form}"))
        stand_in.damage(place)
        return (SimpleNamespace(artifact=read_artifact(place)),)

    monkeypatch.setattr(form_search, "export", give)
    return stand_in


class Bench:
    """Stands in for `run_bench`: ratios by form, made up. `refuses` is a form that the runtime rejects."""

    def __init__(self, ratios: dict[str, tuple[float, float, float]], *, rounds: int = 30, refuses: str = "") -> None:
        self.ratios, self.rounds, self.refuses = ratios, rounds, refuses
        self.timed: list[list[str]] = []

    def __call__(self, paths: list[Path], **options: Any) -> LatencyReport:
        forms = [read_artifact(path).manifest.form for path in paths]
        self.timed.append(forms)
        for path, form in zip(paths, forms, strict=True):
            if form == self.refuses:
                raise FileRefused(path / "tiny.onnx", "is rejected by a delegate: no such op")
        results = (self.row(path, form, first=path == paths[0]) for path, form in zip(paths, forms, strict=True))
        return store(LatencyReport("pass", dict(ENVIRONMENT), tuple(results)))

    def row(self, path: Path, form: str, *, first: bool) -> Measurement:
        median, *interval = self.ratios.get(form, (1.0, 1.0, 1.0))
        ratio = None if first else Ratio(median, tuple(interval), f"{path} in x")
        return Measurement(
            path=str(path), model="tiny", format="onnx", precision="fp32", status="measured",
            runtime="onnxruntime 1.2.3 CPU", threads=1, rounds=self.rounds, ratio=ratio,
            median_ms=10 * median, median_interval_ms=(9 * median, 11 * median),
        )  # fmt: skip


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    """`bench({form: ratio})` -> the stand-in, in place."""

    def use(ratios: dict[str, tuple[float, float, float]], **options: Any) -> Bench:
        stand_in = Bench(ratios, **options)
        monkeypatch.setattr(form_search, "run_bench", stand_in)
        return stand_in

    return use


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """`mvit-export tune --latency ARGUMENTS` in this process, where stand-ins count."""
    from mvit_export.cli.main import main

    def run(*arguments: str | Path) -> Finished:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["tune", "--latency", *map(str, arguments)])
        return Finished(stop.value.code, *capfd.readouterr())  # type: ignore[arg-type]

    return run


def tuned(base: Path) -> Path:
    """Where the kept form goes by default."""
    return base.with_name(f"{base.name}-tuned")


def contents(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


# The rule


def timed(form: str, ratio: tuple[float, float, float] | None) -> Tried:
    found = None if ratio is None else Ratio(ratio[0], ratio[1:])
    row = Measurement(
        path=form, model="tiny", format="onnx", precision="fp32", status="measured", runtime="x", ratio=found,
        median_ms=1.0,
    )  # fmt: skip
    return Tried(form, "pass", row=row)


@pytest.mark.parametrize(
    ("ratios", "chosen"),
    [
        ([], "own"),
        ([FASTER], "0"),
        ([SLOWER], "own"),
        ([SAME], "own"),  # its median is below 1, its interval is not
        ([(0.9, 0.8, 1.0)], "own"),
        ([(0.9, 0.89, 0.91), FASTER, SLOWER], "1"),
        ([(0.7, 0.4, 1.1), (0.95, 0.94, 0.96)], "1"),  # the smallest median is not shown to be below 1
    ],
)
def test_own_form_stays_unless_another_is_shown_to_be_faster(
    ratios: list[tuple[float, float, float]], chosen: str
) -> None:
    tried = [timed("own", None), *(timed(str(index), ratio) for index, ratio in enumerate(ratios))]
    kept = choose([*tried, Tried("left", LEFT_OUT), Tried("broken", "fail")])
    assert kept is not None
    assert kept.form == chosen


def test_nothing_is_chosen_where_the_own_form_has_no_time() -> None:
    assert choose([Tried("own", "not-run"), timed("other", FASTER)]) is None


# What is written


def test_faster_form_is_written_beside_with_its_record(
    copy: Callable[..., Path], exports: SimpleNamespace, bench: Callable[..., Bench], other: Path
) -> None:
    base = copy("onnx")
    before = contents(base)
    bench({OTHER: FASTER})
    choice = tune_forms(base, setup=Setup(threads=1))
    place = tuned(base)
    kept = read_artifact(place)  # which checks every hash
    assert (choice.place, choice.kept.form, kept.manifest.form) == (place, OTHER, OTHER)
    assert kept.model_path.read_bytes() == (other / "tiny.onnx").read_bytes()
    assert contents(base) == before
    assert {path.name for path in base.parent.iterdir()} == {base.name, place.name}, "nothing else is left"
    tuning = kept.manifest.tuning
    assert {key: tuning[key] for key in ("device", "runtime", "threads", "reference")} == {
        "device": "local", "runtime": "onnxruntime 1.2.3 CPU", "threads": 1, "reference": OWN,
    }  # fmt: skip
    assert tuning["machine"] == {"cpu": "a core", "cores": 2, "system": "Linux", "machine": "aarch64"}
    own, faster = tuning["forms"]
    assert (own["form"], own["ratio"], own["parity"]) == (OWN, None, "pass")
    assert (faster["form"], faster["parity"]) == (OTHER, "pass")
    assert faster["ratio"] == {"median": 0.8, "interval": [0.75, 0.85]}
    assert faster["psnr_db"] > 100


def test_records_speak_of_the_place(
    copy: Callable[..., Path], exports: SimpleNamespace, bench: Callable[..., Bench], tmp_path: Path
) -> None:
    bench({OTHER: FASTER})
    place = tmp_path / "deep/kept"
    tune_forms(copy("onnx"), out=place)
    (verdict,) = json.loads((place / "parity.json").read_text())["artifacts"]
    (row,) = json.loads((place / "latency.json").read_text())["results"]
    assert (verdict["status"], verdict["path"], row["path"]) == ("pass", str(place), str(place))
    assert row["ratio"]["to"] == f"its form {OWN}"


def test_own_form_stays_and_the_record_is_written(
    copy: Callable[..., Path], exports: SimpleNamespace, bench: Callable[..., Bench]
) -> None:
    base = copy("onnx")
    write_json(base / "accuracy.json", {"still": "true"})
    model = (base / "tiny.onnx").read_bytes()
    bench({OTHER: SAME})
    choice = tune_forms(base, overwrite=True)
    manifest = read_artifact(base).manifest
    assert (choice.place, choice.kept.form, manifest.form, manifest.target.form) == (base, OWN, OWN, None)
    assert [form["form"] for form in manifest.tuning["forms"]] == [OWN, OTHER]
    assert (base / "tiny.onnx").read_bytes() == model
    assert (base / "accuracy.json").exists(), "what is known of the same file stays"


def test_overwrite_puts_the_faster_form_in_the_artifact_s_place(
    copy: Callable[..., Path], exports: SimpleNamespace, bench: Callable[..., Bench]
) -> None:
    base = copy("onnx")
    write_json(base / "accuracy.json", {"of": "the old file"})
    bench({OTHER: FASTER})
    tune_forms(base, overwrite=True)
    assert read_artifact(base).manifest.form == OTHER
    assert not (base / "accuracy.json").exists(), "what is known of the old file goes"
    assert [path.name for path in base.parent.iterdir()] == [base.name]


@pytest.mark.parametrize("overwrite", [False, True])
def test_whole_or_not_at_all(
    copy: Callable[..., Path], exports: SimpleNamespace, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch,
    overwrite: bool,
) -> None:  # fmt: skip
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    base = copy("onnx")
    before = contents(base)
    bench({OTHER: FASTER})
    monkeypatch.setattr(staging, "_sync", fail)
    with pytest.raises(ArtifactError, match=r"cannot be written: No space left on device$"):
        tune_forms(base, overwrite=overwrite)
    assert contents(base) == before
    assert [path.name for path in base.parent.iterdir()] == [base.name]


def test_lost_device_leaves_everything_as_it_was(
    copy: Callable[..., Path], exports: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: Any, **__: Any) -> None:
        raise DeviceError("ssh:pi was lost")

    base = copy("onnx")
    before = contents(base)
    monkeypatch.setattr(form_search, "run_bench", lose)
    with pytest.raises(DeviceError):
        tune_forms(base, overwrite=True)
    assert contents(base) == before
    assert [path.name for path in base.parent.iterdir()] == [base.name]


def test_scratch_of_a_killed_run_goes_with_the_next(
    copy: Callable[..., Path], exports: SimpleNamespace, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path] = []

    def see(paths: list[Path], **_: Any) -> None:
        places.extend(next(p for p in paths[0].parents if p.parent == base.parent).iterdir())
        raise DeviceError("ssh:pi was lost")

    base = copy("onnx")
    monkeypatch.setattr(form_search, "run_bench", see)
    with pytest.raises(DeviceError):
        tune_forms(base)
    for place in places:
        place.mkdir(parents=True)  # as if nobody had cleaned up
    bench({})
    tune_forms(base, out=base.with_name("elsewhere"))
    assert {path.name for path in base.parent.iterdir()} == {base.name, "elsewhere"}


def test_places_that_are_taken(copy: Callable[..., Path], exports: SimpleNamespace, tmp_path: Path) -> None:
    base = copy("onnx")
    taken = Path(shutil.copytree(base, tuned(base)))
    with pytest.raises(ArtifactError, match=rf"^{taken} exists; pass another --out, or --overwrite to replace {base}"):
        tune_forms(base)
    with pytest.raises(ArtifactError, match=rf"^{taken} exists; pass --overwrite to replace it, or another --out$"):
        tune_forms(base, out=taken)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ArtifactError, match=r"pictures exists and is not an artifact directory"):
        tune_forms(base, out=tmp_path / "pictures", overwrite=True)
    assert not exports.calls, "before any work"


# Forms that are not timed


def test_broken_form_is_not_timed_and_fails(
    copy: Callable[..., Path], exports: SimpleNamespace, bench: Callable[..., Bench], command: Callable[..., Finished]
) -> None:
    exports.damage = swap_weights
    timer = bench({OTHER: FASTER})
    done = command(copy("onnx"), "--json")
    assert timer.timed == [[OWN]]
    assert done.code == 1
    own, broken = done.json["forms"]
    assert (done.json["status"], done.json["chosen"], own["status"]) == ("fail", OWN, "pass")
    assert (broken["status"], broken["parity"], broken["ratio"], broken["path"]) == ("fail", "fail", None, None)
    assert broken["reason"].startswith("PSNR ")
    assert f"FAIL    {OTHER}  parity " in done.err
    assert "not timed: PSNR " in done.err


def test_broken_artifact_is_told_and_nothing_is_written(
    copy: Callable[..., Path], exports: SimpleNamespace, bench: Callable[..., Bench], command: Callable[..., Finished]
) -> None:
    base = copy("onnx")
    swap_weights(base)
    before = contents(base)
    timer = bench({OTHER: FASTER})
    done = command(base, "--overwrite")
    assert (done.code, timer.timed, exports.calls) == (1, [], [])
    assert done.out.splitlines()[-1] == f"nothing was chosen or written: {base} itself has no latency here"
    assert contents(base) == before


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            UsageError(f"--form {OTHER} needs a single image size; leave it out"),
            f"--form {OTHER} needs a single image size",
        ),
        (ConversionError("ONNX fp32: the converter failed: x; -v shows more"), "ONNX fp32: the converter failed: x"),
    ],
)
def test_form_that_does_not_apply_is_left_out_in_words(
    copy: Callable[..., Path], exports: SimpleNamespace, bench: Callable[..., Bench], command: Callable[..., Finished],
    error: Exception, reason: str,
) -> None:  # fmt: skip
    """One that the converter fails on applies, and is a check that did not run."""
    exports.error = error
    bench({})
    base = copy("onnx")
    done = command(base)
    fails = isinstance(error, ConversionError)
    assert (done.code, done.err) == (3 if fails else 0, "")
    assert reason in done.out
    assert fails or f"left out {OTHER}  {reason}\n" in done.out
    record = read_artifact(tuned(base)).manifest.tuning
    assert record["forms"][1] == {
        "form": OTHER, "status": "not-run" if fails else "left-out", "reason": reason, "parity": None,
        "psnr_db": None, "ratio": None, "median_ms": None, "bytes": None,
    }  # fmt: skip


def test_network_without_blocks_has_one_form(bench: Callable[..., Bench], tmp_path: Path) -> None:
    """A real export, for which `choose_network` gives the reason."""
    from mvit_export import load_model

    source = tmp_path / "net.py"
    source.write_text(
        "import torch\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 5))\n"
    )
    model = load_model(model=f"{source}:net", input_shape=(1, 3, 8, 8))
    (made,) = export(model, to="onnx", out=tmp_path, verify=False)
    bench({})
    choice = tune_forms(made.artifact.path)
    assert [(one.form, one.status) for one in choice.tried] == [("plain", "pass"), ("flat", LEFT_OUT)]
    assert choice.tried[1].reason == "--form flat needs MobileViT blocks, net has none"


def test_form_that_the_runtime_rejects_is_left_out(
    copy: Callable[..., Path], exports: SimpleNamespace, bench: Callable[..., Bench]
) -> None:
    timer = bench({}, refuses=OTHER)
    choice = tune_forms(copy("onnx"))
    assert timer.timed == [[OWN, OTHER], [OWN], [OTHER], [OWN]]
    refused = choice.tried[1]
    assert (refused.status, refused.to_json()["parity"]) == (LEFT_OUT, "pass")
    assert refused.reason == f"{OTHER} tiny.onnx is rejected by a delegate: no such op"
    assert (choice.status, choice.kept.form) == ("pass", OWN)


def test_runtime_that_rejects_the_artifact_is_an_error(
    copy: Callable[..., Path], exports: SimpleNamespace, bench: Callable[..., Bench]
) -> None:
    bench({}, refuses=OWN)
    with pytest.raises(ArtifactError, match="is rejected by a delegate"):
        tune_forms(copy("onnx"))


def test_too_few_rounds_are_no_latency(
    copy: Callable[..., Path], exports: SimpleNamespace, bench: Callable[..., Bench], command: Callable[..., Finished]
) -> None:
    bench({OTHER: FASTER}, rounds=3)
    done = command(copy("onnx"))
    assert done.code == 3
    assert "not timed: 3 rounds in the time budget are too few for an interval; give a longer --budget" in done.out


@pytest.mark.skipif(sys.platform == "darwin", reason="there it is timed")
def test_coreml_off_macos_is_not_run(
    copy: Callable[..., Path], exports: SimpleNamespace, command: Callable[..., Finished]
) -> None:
    """The harness itself says so."""
    exports.error = UsageError("not exported here")
    base = copy("coreml")
    done = command(base, "--json")
    assert done.code == 3
    assert (done.json["status"], done.json["chosen"], done.json["path"]) == ("not-run", None, None)
    own = done.json["forms"][0]
    assert (own["status"], own["parity"], own["path"]) == ("not-run", "pass", str(base))
    assert own["reason"].startswith("Core ML runs on macOS only")
    assert [path.name for path in base.parent.iterdir()] == [base.name]


# The command


@pytest.mark.parametrize("options", [{"precision": "fp16", "ort": False}, {"precision": "fp32", "ort": True}])
def test_form_is_exported_as_the_artifact_was(
    options: dict[str, Any], tiny_model: Any, exports: SimpleNamespace, bench: Callable[..., Bench], tmp_path: Path
) -> None:
    (made,) = export(
        tiny_model, to="onnx", input="image", opset=20, dynamic_batch=True, out=tmp_path, verify=False, **options
    )
    exports.error = UsageError("not needed")
    bench({})
    tune_forms(made.artifact.path)
    assert exports.calls == [
        {
            "form": OTHER, "to": "onnx", "input": "image", "opset": 20, "dynamic_batch": True,
            "deployment_target": None, "verify": False, **options,
        }
    ]  # fmt: skip


def test_command_end_to_end(cli: Callable[..., Finished], copy: Callable[..., Path]) -> None:
    base = copy("onnx")
    done = cli("tune", "--latency", base, "--budget", "1.5", "--json")
    assert done.code == 0, done.err
    document = done.json
    assert (document["status"], document["device"], document["threads"]) == ("pass", "local", 1)
    assert document["runtime"].startswith("onnxruntime ")
    assert [form["form"] for form in document["forms"]] == [OWN, OTHER]
    own, other = document["forms"]
    low, high = other["ratio"]["interval"]
    assert 0 < low <= other["ratio"]["median"] <= high
    assert own["median_ms"] > 0 < own["bytes"]
    assert all(form["parity"] == "pass" and form["checks"][0]["device"] == "local" for form in document["forms"])
    kept = read_artifact(tuned(base))
    assert document["path"] == str(kept.path)
    assert document["chosen"] == kept.manifest.form == (OTHER if high < 1 else OWN)
    assert {form["form"]: form["path"] for form in document["forms"]}[document["chosen"]] == str(kept.path)
    assert kept.manifest.tuning["forms"][1]["ratio"] == other["ratio"]
    assert cli("verify", kept.path).code == 0


def test_words(
    copy: Callable[..., Path], exports: SimpleNamespace, bench: Callable[..., Bench], command: Callable[..., Finished]
) -> None:
    bench({OTHER: FASTER})
    base = copy("onnx")
    done = command(base, "--threads", 2, "--runtime", "onnxruntime:cpu")
    lines = done.out.splitlines()
    assert lines[0].startswith(f"PASS    {OWN}  median 10.00 ms [9.00, 11.00]  as the artifact is  parity 1")
    assert f"PASS    {OTHER}  median 8.00 ms [7.20, 8.80]  0.800 [0.750, 0.850] times the time of {OWN}  " in lines[1]
    assert lines[1].endswith(" dB  0.2 MB")
    assert lines[2].endswith("; in onnxruntime:cpu only the time was measured")
    assert lines[3] == (
        f"chosen: {OTHER}, 0.800 [0.750, 0.850] times the time of {OWN} in onnxruntime 1.2.3 CPU on local, 2 threads; "
        f"written to {base}-tuned"
    )


MISTAKES = [
    ("tune --latency {onnx} --max-drop 1", "--max-drop does not apply to --latency; leave it out"),
    ("tune --latency {onnx} --data x", "--data does not apply to --latency; leave it out"),
    ("tune --latency {onnx} --calibration x", "--calibration does not apply to --latency; leave it out"),
    ("tune --latency {onnx} --candidates 5", "--candidates does not apply to --latency; leave it out"),
    ("tune --latency {onnx} --limit 5", "--limit does not apply to --latency; leave it out"),
    ("tune {onnx} --runtime litert", "--runtime applies only to tune --latency; pass --latency too, or leave it out"),
    ("tune {onnx} --device local", "--device applies only to tune --latency; pass --latency too, or leave it out"),
    ("tune {onnx} --overwrite", "--overwrite applies only to tune --latency; pass --latency too, or leave it out"),
    ("tune {onnx}", "tune takes --data and --calibration to search recipes, or --latency to choose a form"),
    ("tune {onnx} --data x", "tune takes --data and --calibration to search recipes, or --latency to choose a form"),
    ("tune --latency {int8}", "tune --latency is for fp32 and fp16, whose form can be chosen; {int8} is int8-weight"),
    ("tune --latency {both}", "tune --latency starts from one artifact, {both} holds 2"),
    ("tune --latency {onnx} --runtime litert", "--runtime litert takes tflite files, given: onnx"),
    ("tune --latency {onnx} --runtime pytorch",
     "--runtime pytorch does not run the exported file, so all forms are the same there"),
    ("tune --latency {onnx} --runtime litert,pytorch", "--runtime is 'litert,pytorch', tune --latency takes one"),
    ("tune --latency {onnx} --device-python p", "--device-python is for ssh:HOST, the device is 'local'"),
    ("tune --latency {onnx} --device arm64", Arm64.latency_refusal),
]  # fmt: skip


@pytest.fixture(scope="module")
def places(tiny_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("places")
    onnx = shutil.copytree(tiny_artifact("onnx"), folder / "both/onnx-fp32")
    shutil.copytree(onnx, folder / "both/again")
    return {"onnx": onnx, "both": folder / "both", "int8": tiny_artifact("onnx", "int8-weight")}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[arguments for arguments, _ in MISTAKES])
def test_mistake_is_one_line(
    capfd: pytest.CaptureFixture[str], exports: SimpleNamespace, places: dict[str, Path], arguments: str, message: str
) -> None:
    from mvit_export.cli.main import main

    before = contents(places["both"])
    with pytest.raises(SystemExit) as stop:
        main([word.format(**places) for word in arguments.split()])
    printed = capfd.readouterr()
    assert (stop.value.code, printed.out) == (2, "")
    assert printed.err == f"mvit-export: error: {message.format(**places)}\n"
    assert not exports.calls, "before any work"
    assert contents(places["both"]) == before


def test_choice_knows_where_files_are_now(copy: Callable[..., Path]) -> None:
    base = read_artifact(copy("onnx"))
    own, other = timed(OWN, None), timed(OTHER, FASTER)
    beside = Choice(base, Setup(), (own, other), kept=other, place=Path("kept"))
    replaced = Choice(base, Setup(), (own, other), kept=other, place=base.path)
    assert [beside.path_of(one) for one in (own, other)] == [str(base.path), "kept"]
    assert [replaced.path_of(one) for one in (own, other)] == [None, str(base.path)]
