"""`verify --against golden` on a device: numpy 1, safetensors and tflite-runtime, and no torch.

One virtual environment has nothing but those, which must do for the library; a second one adds the package and what
its command line needs.
"""

from __future__ import annotations

import json
import shutil
import venv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import NEEDS_TFLITE_RUNTIME, ROOT, Environment, fetch, rehash

from mvit_export.artifact import GOLDEN, load_golden, read_artifact, save_golden

pytestmark = [pytest.mark.slow, *NEEDS_TFLITE_RUNTIME]
COMMAND = ("typer>=0.16,<0.30", "rich>=13.9,<16")
KINDS = [("fp32", "tensor"), ("fp16", "tensor"), ("fp32", "image")]


@pytest.fixture(scope="module")
def device(device_environment: Environment) -> Environment:
    """The bare environment: the package is not installed, its source stands alone in `source`."""
    return device_environment


@pytest.fixture(scope="module")
def command(device: Environment, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """On top of `device` the installed package and its command line; still without Pillow and torch."""
    environment = Environment(tmp_path_factory.mktemp("command"))
    venv.create(environment.folder)
    below, here = (next(e.folder.glob("lib/python*/site-packages")) for e in (device, environment))
    (here / "device.pth").write_text(str(below))
    fetch(device, environment, *COMMAND)
    done = device.run("pip", "--python", environment.folder / "bin" / "python", "install", "-q", "--no-deps", wheel)
    assert done.code == 0, done.err
    return environment


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source of the core package and nothing beside it."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "mvit_export", folder / "mvit_export", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def alter_golden(place: Path) -> None:
    """Change one stored output a little and fix the manifest's hash, so that only the numbers can tell."""
    cases = load_golden(read_artifact(place))
    name = next(iter(cases))
    cases[name]["logits"] = cases[name]["logits"] + np.float32(1e-3)
    save_golden(place / GOLDEN, cases)
    rehash(place)


VERIFY = """if True:
    import json, sys
    from mvit_export import verify
    (result,) = verify(sys.argv[1], against="golden")
    print(json.dumps(result.to_json()))
"""


# The library


def test_library_needs_numpy_safetensors_and_the_runtime_alone(
    device: Environment, source: Path, copy: Callable[..., Path]
) -> None:
    assert device.installed() - {"pip", "setuptools"} == {"tflite-runtime", "numpy", "safetensors"}
    for kind in KINDS:
        place = copy("tflite", *kind)
        done = device.run("python", "-c", VERIFY, place, source=source)
        assert (done.code, done.err.replace("INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\n", "")) == (0, "")
        assert done.json["status"] == "pass", done.json
        assert done.json["runtime"] == "tflite-runtime 2.14.0 CPU"
        assert done.json["against"] == "golden"
        assert done.json["inputs"] == len(load_golden(read_artifact(place))) >= 3
        assert json.loads((place / "parity.json").read_text()) == {"status": "pass", "artifacts": [done.json]}


def test_library_fails_altered_golden_outputs(device: Environment, source: Path, copy: Callable[..., Path]) -> None:
    place = copy("tflite", "fp32", "tensor")
    alter_golden(place)
    done = device.run("python", "-c", VERIFY, place, source=source)
    assert done.code == 0, done.err
    assert done.json["status"] == "fail"
    assert done.json["reason"].startswith("PSNR ")
    assert json.loads((place / "parity.json").read_text())["status"] == "fail"


# The command line


def test_command_passes(command: Environment, copy: Callable[..., Path]) -> None:
    assert not {"torch", "pillow", "onnxruntime", "ai-edge-litert"} & command.installed()
    places = [copy("tflite", *kind) for kind in KINDS]
    done = command.run("mvit-export", "verify", "--against", "golden", *places)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [line.split()[:2] for line in lines] == [["PASS", str(place)] for place in places]
    assert all(line.endswith("inputs vs golden in tflite-runtime 2.14.0 CPU") for line in lines)


def test_command_fails_altered_golden_outputs(command: Environment, copy: Callable[..., Path]) -> None:
    place = copy("tflite", "fp32", "tensor")
    alter_golden(place)
    done = command.run("mvit-export", "verify", "--against", "golden", "--json", place)
    assert done.code == 1, done.err
    assert (done.json["status"], done.json["artifacts"][0]["status"]) == ("fail", "fail")


@pytest.mark.parametrize(
    ("arguments", "purpose", "extra"),
    [
        (["verify", "ARTIFACT"], "to build a model", "all"),
        (["--to", "onnx", "--variant", "xxs"], "to write ONNX files", "onnx"),
        (["--to", "all", "--model", "net.py:net"], "to write Core ML files", "coreml"),
    ],
)
def test_what_needs_torch_says_so_in_one_line(
    command: Environment, copy: Callable[..., Path], arguments: list[str], purpose: str, extra: str
) -> None:
    place = str(copy("tflite", "fp32", "tensor"))
    (Path(place) / "parity.json").unlink(missing_ok=True)  # another test may have verified the shared original
    done = command.run("mvit-export", *[place if word == "ARTIFACT" else word for word in arguments])
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"mvit-export: error: torch is not installed, needed {purpose}: pip install 'mvit-export[{extra}]'\n"
    )
    assert not (command.folder / "artifacts").exists()
    assert not (Path(place) / "parity.json").exists()


def test_formats_without_a_runtime_are_not_run(command: Environment, copy: Callable[..., Path]) -> None:
    onnx, coreml, tflite = copy("onnx", "fp32"), copy("coreml", "fp32"), copy("tflite", "fp32", "tensor")
    done = command.run("mvit-export", "verify", "--against", "golden", onnx, coreml, tflite)
    assert (done.code, done.err) == (3, "")
    lines = done.out.splitlines()
    assert lines[0] == (
        f"NOT-RUN {onnx}  onnxruntime does not import (No module named 'onnxruntime'): pip install onnxruntime"
    )
    assert lines[1].startswith(f"NOT-RUN {coreml}  torch does not import (No module named 'torch')")
    assert lines[2].startswith(f"PASS    {tflite}  ")
    assert json.loads((onnx / "parity.json").read_text())["status"] == "not-run"


def test_doctor_tells_what_works(command: Environment) -> None:
    done = command.run("mvit-export", "doctor", "--json")
    assert done.code == 0, done.err
    works = {(finding["kind"], finding["name"]): finding["works"] for finding in done.json["findings"]}
    assert works["runtime", "litert"]
    assert not works["target", "onnx"]
    assert not works["runtime", "pytorch"]
