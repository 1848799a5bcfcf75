"""Files that are none, in place of every file that a command reads: pipes, devices, folders, links to themselves."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from attack import HARMLESS, REFUSED, Arguments, Case, Sandbox, rng
from conftest import LABELS, TINY
from odd_files import ODD

from mvit_export.system import trust


def huge(path: Path) -> None:
    """A terabyte that takes no room."""
    with path.open("wb") as file:
        file.truncate(10**12)


def cut(path: Path) -> None:
    path.write_bytes(b"\x00\xff")


KINDS: dict[str, Callable[[Path], object]] = {
    **{name: ODD[name] for name in ("fifo", "zero", "random", "folder", "loop", "socket", "proc")},
    "nothing": lambda path: path.symlink_to("/nonexistent/file"), "empty": Path.touch, "cut": cut, "huge": huge,
}  # fmt: skip


@dataclass(frozen=True)
class Read:
    """A file that a command reads. `lay` returns its path and the command; `by` are the functions that read it."""

    name: str
    lay: Callable[[Sandbox], tuple[Path, Arguments]]
    by: tuple[str, ...] = ()
    codes: frozenset[int] = REFUSED
    environment: dict[str, str] = field(default_factory=dict)
    never: tuple[str, ...] = ()  # kinds that are sound there


def in_artifact(name: str, *command: str, fmt: str = "onnx") -> Callable[[Sandbox], tuple[Path, Arguments]]:
    def lay(box: Sandbox) -> tuple[Path, Arguments]:
        artifact = box.artifact(fmt)
        words = [artifact if word == "{}" else word for word in command]
        return artifact / name, words

    return lay


def named(name: str, *command: str) -> Callable[[Sandbox], tuple[Path, Arguments]]:
    """A file that the user names: {} in the command; {artifact} is an ONNX artifact."""

    def lay(box: Sandbox) -> tuple[Path, Arguments]:
        path = box.files / name
        artifact = box.artifact() if "{artifact}" in command else Path()
        return path, [word.replace("{}", str(path)).replace("{artifact}", str(artifact)) for word in command]

    return lay


def picture(box: Sandbox, *command: str) -> tuple[Path, Arguments]:
    from PIL import Image

    for label in LABELS:
        (box.files / "data" / label).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(box.files / "data" / label / "sound.png")
    words = [str(box.artifact()) if word == "{artifact}" else word for word in command]
    return box.files / "data" / LABELS[3] / "odd.png", [*words, box.files / "data"]


def settings(box: Sandbox, file: str) -> tuple[Path, Arguments]:
    from attack_weights import sound

    folder = box.files / "folder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(sound("hf"))
    (folder / "config.json").write_text("{}")
    (folder / file).unlink(missing_ok=True)
    return folder / file, ("--to", "onnx", "--weights", folder, "--labels", box.files / "absent", "--out", box.out)


def shards(box: Sandbox, file: str) -> tuple[Path, Arguments]:
    """A folder of a Vision Transformer whose weights are in two files."""
    from attack_weights import save

    folder = box.files / "folder"
    folder.mkdir()
    names = ("model-1.safetensors", "model-2.safetensors")
    for name in names:
        (folder / name).write_bytes(save({f"{name}.weight": torch.zeros(2)}))
    index = {"weight_map": {f"{name}.weight": name for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "vit"}')
    (folder / file).unlink()
    return folder / file, ("--to", "onnx", "--weights", folder, "--out", box.out)


def package(box: Sandbox, inner: str, *, bare: bool) -> tuple[Path, Arguments]:
    """A Core ML package by itself, or in an artifact."""
    artifact = box.artifact("coreml")
    if bare:
        (artifact / "manifest.json").unlink()
    return artifact / "tiny.mlpackage" / inner, ("inspect", artifact / "tiny.mlpackage")


def remembered(box: Sandbox) -> tuple[Path, Arguments]:
    """The entry of what this user has exported from, in a state folder of the case's own."""
    name = trust.place(f"code:{TINY}").name
    folder = box.files / "state/mvit-export/named"
    folder.mkdir(parents=True)
    return folder / name, ("verify", box.artifact())


def source(box: Sandbox) -> tuple[Path, Arguments]:
    from attack_manifests import set_one

    path = box.files / "model.py"
    return path, set_one(box, "model.source", f"{path}:tiny", "verify")


def emulated(box: Sandbox) -> tuple[Path, Arguments]:
    """The record of an ARM system in the user's cache; qemu is a program that does nothing."""
    (box.files / "bin").mkdir()
    program = box.files / "bin/qemu-aarch64-static"
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    folder = box.files / "cache/mvit-export/arm64"
    folder.mkdir(parents=True)
    return folder / "manifest.json", ("verify", box.artifact(), "--device", "arm64", "--against", "golden")


def search(box: Sandbox, name: str) -> tuple[Path, Arguments]:
    data = box.files / "data.npz"
    np.savez(data, images=np.zeros((2, 64, 64, 3), np.uint8), labels=np.arange(2))
    path = box.files / f"odd{Path(name).suffix}"
    words = {"--data": data, "--calibration": data, name.partition(".")[0]: path}
    return path, ("tune", box.artifact(), *(w for pair in words.items() for w in pair), "--out", box.out)


CHECKPOINT = "mvit_export/models/checkpoints.py"
PACKAGE, PICTURES, REPORT = (
    "mvit_export/mil/package.py",
    "mvit_export/data/pictures.py",
    ("report", "{}", "--format", "markdown"),
)
XXS = ("--to", "onnx", "--variant", "xxs")
DONE = frozenset({0})
SOME = 3  # kinds for a file whose reader meets all of them elsewhere
READS = (
    Read(
        "manifest, inspect", in_artifact("manifest.json", "inspect", "{}"), ("mvit_export/artifact.py:read_manifest",)
    ),
    Read("manifest, bench", in_artifact("manifest.json", "bench", "{}"), ("mvit_export/artifact.py:read_manifest",)),
    Read("manifest, eval", in_artifact("manifest.json", "eval", "{}", "--data", "x.npz")),
    Read("manifest, tune", in_artifact("manifest.json", "tune", "{}", "--latency")),
    Read("manifest, like", in_artifact("manifest.json", "export", "--to", "onnx", "--like", "{}")),
    Read("onnx, verify", in_artifact("tiny.onnx", "verify", "{}"), ("mvit_export/artifact.py:read_artifact",)),
    Read("onnx, report", in_artifact("tiny.onnx", *REPORT), ("mvit_export/artifact.py:read_artifact",)),
    Read("tflite, bench", in_artifact("tiny.tflite", "bench", "{}", fmt="tflite")),
    Read("golden, golden", in_artifact("golden.safetensors", "verify", "{}", "--against", "golden")),
    Read("golden, inspect", in_artifact("golden.safetensors", "inspect", "{}")),
    Read("parity, report", in_artifact("parity.json", *REPORT), ("mvit_export/report/reading.py:read_file",), DONE),
    Read("latency, report", in_artifact("latency.json", *REPORT), ("mvit_export/report/reading.py:read_file",), DONE),
    Read("accuracy, report", in_artifact("accuracy.json", *REPORT), (), DONE),
    Read(
        "latency of a device",
        in_artifact("latency.ssh-x.json", *REPORT),
        ("mvit_export/report/reading.py:read_file",),
        DONE,
    ),
    Read("parity, junit", in_artifact("parity.json", "report", "{}", "--format", "junit"), (), frozenset({0, 2})),
    Read("parity, verify", in_artifact("parity.json", "verify", "{}", "--against", "golden"), (), HARMLESS),
    Read(
        "latency, bench", in_artifact("latency.json", "bench", "{}", "--budget", "0.1", "--no-roofline"), (), HARMLESS
    ),
    Read("labels", named("labels.txt", *XXS, "--labels", "{}"), ("mvit_export/models/outputs.py:read_labels",)),
    Read("weights", named("weights.pt", *XXS, "--weights", "{}"), (f"{CHECKPOINT}:file_kind",)),
    Read("weights, safetensors", named("w.safetensors", *XXS, "--weights", "{}"), ()),
    Read("weights, verify", named("w.pt", "verify", "{artifact}", "--weights", "{}"), (), frozenset({2, 3})),
    Read(
        "recipe",
        named("r.toml", *XXS, "--precision", "int8", "--recipe", "{}"),
        ("mvit_export/formats/recipes.py:read_recipe",),
    ),
    Read("calibration", named("c.npz", *XXS, "--precision", "int8", "--calibration", "{}"), (f"{PICTURES}:read_npz",)),
    Read("data, eval", named("d.npz", "eval", "{artifact}", "--data", "{}", "--jobs", "1"), (f"{PICTURES}:read_npz",)),
    Read("data, tune", lambda box: search(box, "--data.npz"), ()),
    Read("calibration, tune", lambda box: search(box, "--calibration.npz"), ()),
    Read("model", named("m.py", "--to", "onnx", "--model", "{}:net"), ()),
    Read(
        "baseline",
        named("b.json", "bench", "{artifact}", "--baseline", "{}", "--budget", "0.1"),
        ("benchmarks/harness/baseline.py:read_report",),
    ),
    Read("binary", named("b", "bench", "{artifact}", "--device", "adb", "--benchmark-binary", "{}"), ()),
    Read("reference", named("r", "eval", "{artifact}", "--data", "x.npz", "--reference", "{}"), ()),
    Read("picture, eval", lambda box: picture(box, "eval", "{artifact}", "--jobs", "1", "--data"), (), HARMLESS),
    Read(
        "config.json",
        lambda box: settings(box, "config.json"),
        ("mvit_export/models/settings.py:read_json",),
    ),
    Read(
        "preprocessor_config.json",
        lambda box: settings(box, "preprocessor_config.json"),
        ("mvit_export/models/settings.py:read_json",),
    ),
    Read("index of weights", lambda box: shards(box, "model.safetensors.index.json"), ()),
    Read("one of the weights", lambda box: shards(box, "model-2.safetensors"), ()),
    Read("config.json beside an index", lambda box: shards(box, "config.json"), ()),
    Read("picture, predict", named("p.png", "predict", "{artifact}", "{}"), ()),
    Read("hf weights", lambda box: settings(box, "model.safetensors"), ()),
    Read("package manifest", lambda box: package(box, "Manifest.json", bare=True), ()),
    Read("package model", lambda box: package(box, "Data/com.apple.CoreML/model.mlmodel", bare=True), ()),
    Read(
        "package weights", lambda box: package(box, "Data/com.apple.CoreML/weights/weight.bin", bare=True), (), HARMLESS
    ),
    Read("package of an artifact", lambda box: package(box, "Data/com.apple.CoreML/model.mlmodel", bare=False), ()),
    Read("a file as package", named("x.mlpackage", "inspect", "{}"), (f"{PACKAGE}:check_kind",)),
    Read(
        "remembered",
        remembered,
        ("mvit_export/system/trust.py:is_trusted",),
        frozenset({2}),
        {"XDG_STATE_HOME": "{root}/files/state"},
    ),
    Read("source of a manifest", source, ("mvit_export/system/trust.py:digest_of",), frozenset({2})),
    Read(
        "emulated",
        emulated,
        ("benchmarks/devices/arm64.py:read_versions",),
        frozenset({2}),
        {"XDG_CACHE_HOME": "{root}/files/cache", "PATH": "{root}/files/bin:/usr/bin:/bin"},
    ),
)


def lay_odd(read: Read, kind: str, box: Sandbox) -> Arguments:
    path, command = read.lay(box)
    if path.is_dir() and not path.is_symlink():
        raise AssertionError(f"{path} is a folder already")
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    return command


def cases() -> Iterator[Case]:
    for read in READS:
        for kind in (
            rng("read", read.name).sample(list(KINDS), SOME)
            if not read.by
            else ("cut", "empty", "fifo", "zero", "loop", "folder")
        ):
            by = read.by if kind in ("cut", "empty") else ()
            yield Case(
                "file replaced", f"{read.name} is {kind}", lambda box, r=read, k=kind: lay_odd(r, k, box),
                read.codes, by, read.environment,
            )  # fmt: skip
