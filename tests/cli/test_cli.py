"""The command line as scripts rely on it: what is printed where, exit codes, and one line for every mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LABELS, TINY, Finished

pytestmark = pytest.mark.slow

Cli = Callable[..., Finished]
FIGURES = r"\d+\.\d dB, max error \d\.\de-\d\d of scale  9 inputs vs pytorch in"


@pytest.fixture(scope="module")
def exported(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """The tiny model exported to ONNX by the command line."""
    out = tmp_path_factory.mktemp("cli")
    return out, cli("--to", "onnx", "--model", TINY, "--out", out)


def test_export_prints_verdict_and_next_commands(exported: tuple[Path, Finished]) -> None:
    out, done = exported
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "tiny: 38,178 parameters, 2.0M MACs, input 1x3x64x64"
    assert re.fullmatch(rf"PASS    {out}/tiny/onnx-fp32  0\.\d MB  {FIGURES} onnxruntime [\d.]+ CPU", lines[1])
    assert lines[2:] == [
        f"Next:  mvit-export verify {out}/tiny",
        f"       mvit-export inspect {out}/tiny/onnx-fp32",
    ]


def test_untrained_network_is_said_loudly(cli: Cli, tmp_path: Path) -> None:
    done = cli("--to", "onnx", "--variant", "xxs", "--image-size", "32", "--no-verify", "--out", tmp_path, "--seed", 3)
    assert done.code == 0
    assert "UNTRAINED: random weights from seed 3; pass --pretrained or --weights for real ones" in done.out
    manifest = json.loads((tmp_path / "mobilevit_xxs/onnx-fp32/manifest.json").read_text())
    assert manifest["weights"]["trained"] is False
    assert manifest["weights"]["seed"] == 3


def test_declined_verification_is_not_called_a_pass(cli: Cli, tmp_path: Path) -> None:
    done = cli("--to", "onnx", "--model", TINY, "--out", tmp_path, "--no-verify", "--json")
    assert done.code == 0
    assert done.json["status"] == "not-run"
    assert done.json["artifacts"][0]["parity"] == []
    assert "NOT-RUN" in done.err
    assert not list(tmp_path.rglob("parity.json"))


def test_verify_prints_one_line_per_artifact(cli: Cli, exported: tuple[Path, Finished]) -> None:
    out, _ = exported
    for argument in (out, out / "tiny/onnx-fp32", out / "tiny/onnx-fp32/tiny.onnx"):
        done = cli("verify", argument)
        assert (done.code, done.err) == (0, "")
        assert re.fullmatch(rf"PASS    {out}/tiny/onnx-fp32  {FIGURES} onnxruntime [\d.]+ CPU\n", done.out)


def test_verify_json_is_the_only_thing_on_stdout(cli: Cli, exported: tuple[Path, Finished]) -> None:
    done = cli("verify", "--json", exported[0])
    (artifact,) = done.json["artifacts"]
    assert done.json["status"] == "pass"
    assert {"path", "format", "precision", "status", "reason", "runtime", "inputs", "metrics", "tolerance"} <= {
        *artifact
    }
    assert {*artifact["metrics"]} == {
        "max_abs", "max_rel", "psnr_db", "cosine", "kl", "top1_agreement", "top5_agreement", "max_of_spread",
        "mean_kl", "delta_p",
    }  # fmt: skip
    assert artifact["metrics"]["psnr_db"] > 100
    assert artifact["inputs"] == 9
    assert done.err.startswith("PASS")
    stored = json.loads((exported[0] / "tiny/onnx-fp32/parity.json").read_text())
    assert stored == done.json


def test_flags_may_stand_before_the_command(cli: Cli, exported: tuple[Path, Finished]) -> None:
    assert cli("--json", "verify", exported[0]).json["status"] == "pass"
    quiet = cli("-q", "verify", exported[0])
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_verify_against_golden(cli: Cli, exported: tuple[Path, Finished]) -> None:
    done = cli("verify", "--against", "golden", exported[0])
    assert done.code == 0
    assert "4 inputs vs golden in onnxruntime" in done.out


def test_changed_file_is_refused(cli: Cli, tmp_path: Path) -> None:
    cli("--to", "onnx", "--model", TINY, "--out", tmp_path, "--no-verify")
    file = tmp_path / "tiny/onnx-fp32/tiny.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for command in ("verify", "inspect"):
        done = cli(command, tmp_path)
        assert (done.code, done.out) == (2, "")
        assert re.fullmatch(
            rf"mvit-export: error: {file} was changed after the export: sha256 is \w+…, manifest.json says \w+…; "
            r"export again with --overwrite\n",
            done.err,
        )


def test_failed_parity_exits_1(cli: Cli, tmp_path: Path) -> None:
    """The model's file changes its mind about a constant after the export."""
    source = tmp_path / "net.py"
    text = (
        "import torch\ndef net():\n    torch.manual_seed(0)\n    return torch.nn.Sequential(torch.nn.Flatten(), {})\n"
    )
    source.write_text(text.format("torch.nn.Linear(12, 3)"))
    args = ("--to", "onnx", "--model", f"{source}:net", "--input-shape", "1,3,2,2", "--out", tmp_path)
    assert cli(*args).code == 0
    source.write_text(text.format("torch.nn.Linear(12, 3), torch.nn.Hardtanh(-0.5, 0.5)"))
    done = cli("verify", tmp_path, "--trust-code")
    assert done.code == 1
    assert done.out.startswith("FAIL")
    assert "at least 100 expected" in done.out


def test_coreml_is_checked_by_the_reference_executor(cli: Cli, tiny_artifact: Callable[..., Path]) -> None:
    done = cli("verify", tiny_artifact("coreml"), "--json")
    assert (done.code, done.json["status"]) == (0, "pass")
    (verdict,) = done.json["artifacts"]
    assert verdict["runtime"] == "mil-reference"
    assert verdict["note"].startswith("proves graph and weights, not Apple's kernels")
    assert verdict["note"] in done.err


@pytest.mark.parametrize("fmt", ["coreml", "onnx", "tflite"])
def test_inspect_counts_operators(cli: Cli, tiny_artifact: Callable[..., Path], fmt: str) -> None:
    (report,) = cli("inspect", tiny_artifact(fmt), "--json").json["artifacts"]
    convolutions = {"coreml": ["conv"], "onnx": ["Conv"], "tflite": ["CONV_2D", "DEPTHWISE_CONV_2D"]}[fmt]
    linear = 6 if fmt == "tflite" else 0  # two 1x1 convolutions of each block are linear layers there
    assert sum(report["operators"][name] for name in convolutions) == 35 - linear
    assert report["operator_count"] == sum(report["operators"].values())
    assert not {name for name in report["operators"] if "norm" in name.lower() and "batch" in name.lower()}  # BN folded
    assert report["inputs"] == [{"name": "image", "shape": [1, 3, 64, 64], "dtype": "float32", "layout": "NCHW"}]
    assert report["outputs"] == [{"name": "logits", "shape": [1, 10], "dtype": "float32", "layout": "NC"}]
    assert report["model"]["params"] == 38178
    assert report["preprocessing"]["channel_order"] == "BGR"


def test_inspect_tells_what_accelerators_take(cli: Cli, tiny_artifact: Callable[..., Path]) -> None:
    done = cli("inspect", tiny_artifact("onnx"))
    count = cli("inspect", tiny_artifact("onnx"), "--json").json["artifacts"][0]["operator_count"]
    assert f"phones      Core ML: {count} of {count} nodes in 1 partitions (" in done.out
    assert "  file        onnx fp32, form flat, " in done.out
    assert "phones      NNAPI: " in done.out and "partitions, not ai.onnx:LayerNormalization (" in done.out


def test_accelerators_see_a_batch_of_any_size_as_one(tiny_model: Any, tmp_path: Path) -> None:
    from mvit_export import export
    from mvit_export.readers.inspect import inspect_path

    (made,) = export(tiny_model, to="onnx", dynamic_batch=True, out=tmp_path, verify=False)
    (report,) = inspect_path(made.artifact.path)
    assert report["phones"]["Core ML"]["supported"] == report["operator_count"]


def test_doctor_names_every_target_and_runtime(cli: Cli) -> None:
    done = cli("doctor", "--json")
    assert done.code == 0
    found = {(finding["kind"], finding["name"]): finding for finding in done.json["findings"]}
    for target in ("coreml", "onnx", "tflite"):
        assert found["target", target]["works"], found["target", target]
    assert found["runtime", "onnxruntime"]["detail"].startswith("onnxruntime 1.")
    assert found["runtime", "coreml"] == {
        "kind": "runtime", "name": "coreml", "works": False,
        "detail": "Core ML predicts on macOS only, this is Linux",
    }  # fmt: skip


def test_help_and_version(cli: Cli) -> None:
    done = cli("--help")
    assert done.code == 0
    for command in ("export", "verify", "inspect", "doctor"):
        assert re.search(rf"^  {command} ", done.out, re.MULTILINE)
    assert cli().out == done.out
    assert cli("--version").out.startswith("mvit-export ")
    options = cli("export", "--help").out
    for option in (
        "--to", "--variant", "--model", "--weights", "--pretrained", "--no-ema", "--num-classes", "--image-size", "--patch-config",
        "--precision", "--opset", "--deployment-target", "--labels", "--input", "--out", "--overwrite", "--no-verify",
        "--seed", "--json",
    ):  # fmt: skip
        assert option in options


MISTAKES = [
    ("--variant xxs", "Missing option '--to'; see mvit-export --help"),
    ("--to onnx", "no model named; pass --variant xxs|xs|s, --weights or --model"),
    ("--to onix --variant xxs", "format 'onix' is not known, expected one of coreml, onnx, tflite, all; did you mean onnx?"),
    ("--to , --variant xxs", "--to names no format, expected one or more of coreml, onnx, tflite, or all"),
    ("--to onnx --variant xxxs", "variant 'xxxs' is not known, expected one of xxs, xs, s; did you mean xxs?"),
    ("--to onnx --variant s --precision fp64", "ONNX precision 'fp64' is not known, expected one of fp32, fp16, int8-weight, int8-dynamic, int8, int4-weight; did you mean fp16?"),
    ("--to tflite --variant s --opset 18", "--opset does not apply to tflite; only onnx takes it"),
    ("--to coreml,tflite --variant s --dynamic-batch", "--dynamic-batch does not apply to coreml, tflite; only onnx takes it"),
    ("--to tflite --variant s --ort", "--ort does not apply to tflite; only onnx takes it"),
    ("--to onnx --variant s --ort --precision fp32,fp16", "--ort is for fp32, optimizing takes fp16 back to fp32; use --precision fp32"),
    ("--to onnx --variant s --deployment-target iOS17", "--deployment-target does not apply to onnx; only coreml takes it"),
    ("--to coreml --variant s --deployment-target iOS9", "deployment target 'iOS9' is not known, expected one of iOS15, iOS16, iOS17, iOS18, iOS26; did you mean iOS26?"),
    ("--to onnx --variant s --opset 12", "--opset is 12, expected 18 to 23"),
    ("--to onnx --variant s --input picture", "input kind 'picture' is not known, expected one of tensor, image"),
    ("--to onnx --variant s --image-size 16", "--image-size is 16x16, expected at least 32 on each side"),
    ("--to onnx --variant s --image-size big", "--image-size is 'big', expected N or HxW in pixels, such as 256 or 240x320"),
    ("--to onnx --variant s --image-size 224 --image-size 256", "ONNX takes one --image-size, 2 given; coreml takes several"),
    ("--to onnx --variant s --num-classes 0", "--num-classes is 0, expected at least 1"),
    ("--to onnx --variant s --patch-config C", "patch configuration 'C' is not known, expected one of A, B"),
    ("--to onnx --variant s --pretrained --weights x.pt", "--weights and --pretrained both say where the weights come from; pass one of them"),
    ("--to onnx --pretrained", "no model named; pass --variant xxs|xs|s, --weights or --model"),
    ("--to onnx --variant s --input-shape 1,3,64,64", "--input-shape belongs to --model; MobileViT takes --image-size"),
    ("--to onnx --variant s --weights /nowhere/x.pt", "/nowhere/x.pt: "),
    ("--to onnx --variant s --labels /nowhere/labels.txt", "/nowhere/labels.txt cannot be read as labels"),
    ("--to onnx --model {tiny} --variant s", "--variant belongs to MobileViT; with --model, set it in the model's own factory"),
    ("--to onnx --model {tiny} --labels {short}", "{short} holds 2 labels, the model has 10 classes"),
    ("--to coreml --model {tiny} --labels {twice}", "label 'same' appears twice, which a Core ML classifier cannot tell apart; rename one"),
    ("--to onnx --model {tiny} --input-shape 1,3,x", "--input-shape is '1,3,x', expected positive numbers with commas, such as 1,3,224,224"),
    ("--to onnx --model {tiny} --input-shape 1,4,64,64", "the model, called on a float32 tensor (1, 4, 64, 64), raised RuntimeError: "),
    ("--to onnx --model tiny.py", "--model is 'tiny.py', expected FILE.py:FACTORY or timm:NAME"),
    ("--to onnx --model /nowhere/net.py:net", "/nowhere/net.py does not exist, expected a Python file with a function net()"),
    ("--to onnx --model {faulty}:absent", "{faulty} defines no function 'absent', expected one that returns a torch.nn.Module"),
    ("--to onnx --model {faulty}:nothing", "{faulty}:nothing() returned NoneType, expected a torch.nn.Module"),
    ("--to onnx --model {faulty}:raises", "{faulty}:raises() raised ValueError: no such backbone"),
    ("--to onnx --model {faulty}:leaves", "{faulty}:leaves() raised SystemExit: 0"),
    ("--to onnx --model {faulty}:integers --input-shape 1,6", "output 'output_0' is int64 of shape [1], expected floats with a batch axis"),
    ("--to onnx --model {faulty}:scalar --input-shape 1,6", "output 'output_0' is float32 of shape [], expected floats with a batch axis"),
    *((f"--to onnx --model {{faulty}}:{odd} --input-shape 1,6",
       f"output 'output_0' is a {odd} tensor, expected a dense one on the CPU; convert it in forward")
      for odd in ("sparse", "nested", "meta")),
    ("--to onnx --variant s --seed -1", "Invalid value for '--seed': Input should be greater than or equal to 0; see mvit-export --help"),
    ("--to onnx --model {faulty}:text", "the model returned str, expected a tensor, or tuple or dict of tensors"),
    ("--to onnx --model {broken}:net", "{broken} raised SyntaxError: "),
    ("--to onnx --model timm:mobilevit_xxxs", "timm has no model 'mobilevit_xxxs'; it has "),
    ("verify /nowhere", "/nowhere does not exist, expected an artifact directory; mvit-export --to … makes one"),
    ("verify {empty}", "{empty} holds no manifest.json, expected an artifact directory or a directory of them"),
    ("verify {empty} --against gold", "--against is 'gold', expected one of pytorch, golden"),
    ("verify", "Missing argument 'ARTIFACT...'; see mvit-export --help"),
    ("verfy x", "No such command 'verfy'. Did you mean 'verify'?; see mvit-export --help"),
    ("--to onnx --variant s --seed one", "Invalid value for '--seed': Input should be a valid integer, unable to parse string as an integer; see mvit-export --help"),
]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "empty").mkdir()
    (folder / "short.txt").write_text("a\nb\n")
    (folder / "twice.txt").write_text("same\n" * 2 + "".join(f"{label}\n" for label in LABELS[:8]))
    (folder / "broken.py").write_text("def net(:\n")
    (folder / "faulty.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def nothing(): pass\n"
        "def raises(): raise ValueError('no such backbone\\nand more')\n"
        "class Text(nn.Module):\n    def forward(self, x): return 'text'\n"
        "def text(): return Text()\n"
        "def leaves(): raise SystemExit(0)\n"
        "class Integers(nn.Module):\n    def forward(self, x): return x.argmax(1)\n"
        "def integers(): return Integers()\n"
        "class Scalar(nn.Module):\n    def forward(self, x): return x.sum()\n"
        "def scalar(): return Scalar()\n"
        "class Made(nn.Module):\n"
        "    def __init__(self, make):\n        super().__init__()\n        self.make = make\n"
        "    def forward(self, x): return self.make(x)\n"
        "def sparse(): return Made(lambda x: x.to_sparse())\n"
        "def nested(): return Made(lambda x: torch.nested.nested_tensor([x[0]]))\n"
        "def meta(): return Made(lambda x: x.to('meta'))\n"
    )
    names = {"empty": "empty", "short": "short.txt", "twice": "twice.txt", "broken": "broken.py", "faulty": "faulty.py"}
    return {key: str(folder / name) for key, name in names.items()} | {"tiny": TINY}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[arguments for arguments, _ in MISTAKES])
def test_mistake_is_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, places: dict[str, str],
    arguments: str, message: str,
) -> None:  # fmt: skip
    """In this process, for speed: importing torch for each would take minutes."""
    from mvit_export.cli.main import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments.format(**places).split())
    printed = capfd.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    expected = "mvit-export: error: " + message.format(**places)
    assert (
        printed.err.startswith(expected) if expected.endswith((": ", " ", "labels")) else printed.err == expected + "\n"
    )
    assert not list(tmp_path.iterdir())  # nothing left on disk


def test_error_under_json_is_one_document(cli: Cli, tmp_path: Path) -> None:
    done = cli("verify", tmp_path / "absent", "--json")
    assert done.code == 2
    assert done.json["status"] == "error"
    assert done.json["error"]["type"] == "ArtifactError"
    assert "Traceback" not in done.err


def test_strange_names_and_closed_pipes(cli: Cli, exported: tuple[Path, Finished]) -> None:
    """A name that is no UTF-8 is one line and JSON; a reader that leaves early changes no exit code."""
    done = cli("verify", "/nowhere/\udcff", "--json")
    assert done.code == 2
    assert done.json["error"]["message"].startswith("/nowhere/")
    command = f"{sys.executable} -m mvit_export verify {exported[0]} | true; echo ${{PIPESTATUS[0]}}"
    piped = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert (piped.stdout, piped.stderr) == ("0\n", "")
    closed = subprocess.run(["bash", "-c", command.split("|")[0] + ">&-"], capture_output=True, text=True, timeout=300)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_verbose_adds_the_traceback(cli: Cli, tmp_path: Path) -> None:
    done = cli("verify", tmp_path / "absent", "-v")
    assert done.code == 2
    assert done.err.startswith("mvit-export: error: ")
    assert "Traceback (most recent call last)" in done.err


def test_existing_artifact_is_kept_without_overwrite(cli: Cli, exported: tuple[Path, Finished]) -> None:
    out, _ = exported
    before = (out / "tiny/onnx-fp32/manifest.json").read_bytes()
    done = cli("--to", "onnx", "--model", TINY, "--out", out)
    assert done.code == 2
    message = f"{out}/tiny/onnx-fp32 exists; pass --overwrite to replace it, or another --out"
    assert done.err == f"mvit-export: error: {message}\n"
    assert (out / "tiny/onnx-fp32/manifest.json").read_bytes() == before


def test_defaults_are_those_of_the_python_api() -> None:
    """The command's defaults and the functions' stand in two places; they must agree."""
    import inspect

    import mvit_export
    from mvit_export.cli import main as cli_main

    command = inspect.signature(cli_main.export).parameters
    for function in (mvit_export.load_model, mvit_export.export):
        for name, parameter in inspect.signature(function).parameters.items():
            if name in command and name not in ("model", "to", "jobs"):
                default = command[name].default
                assert str(default) == str(parameter.default), name
