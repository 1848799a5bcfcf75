"""Damaged, foreign and hostile packages: each gives one line that says what is wrong, and never a crash."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from coremltools.converters.mil import Builder as mb
from coremltools.proto.Model_pb2 import Model
from mil_build import floats, save_program

import mvit_export.mil as mil
from mvit_export.errors import ArtifactError, MvitExportError, UsageError
from mvit_export.mil import ExecutionError

SPEC, BLOB = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"
X = floats(1, 3, 8, 8)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small package with weights in its blob."""

    def build(x):
        y = mb.conv(x=x, weight=floats(16, 3, 3, 3), bias=floats(16), name="conv_1")
        return mb.relu(x=y, name="out")

    return save_program(build, {"x": X}, tmp_path_factory.mktemp("whole") / "m.mlpackage")


@pytest.fixture
def package(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "m.mlpackage"))


def edit_bytes(name: str, change: Callable[[bytearray], bytes | bytearray]) -> Callable[[Path], None]:
    def damage(package: Path) -> None:
        data = bytearray((package / name).read_bytes())
        (package / name).write_bytes(change(data) or data)

    return damage


def edit_spec(change: Callable[[Model], object]) -> Callable[[Path], None]:
    def damage(package: Path) -> None:
        spec = Model.FromString((package / SPEC).read_bytes())
        change(spec)
        (package / SPEC).write_bytes(spec.SerializeToString())

    return damage


def edit_manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(package: Path) -> None:
        manifest = json.loads((package / "Manifest.json").read_text())
        change(manifest)
        (package / "Manifest.json").write_text(json.dumps(manifest))

    return damage


def operations(spec: Model):
    function = spec.mlProgram.functions["main"]
    return function.block_specializations[function.opset].operations


def first_blob(spec: Model):
    return next(o.attributes["val"] for o in operations(spec) if o.attributes["val"].HasField("blobFileValue"))


def set_blob(**fields: object) -> Callable[[Path], None]:
    return edit_spec(lambda s: [setattr(first_blob(s).blobFileValue, k, v) for k, v in fields.items()])


def set_path(path: str) -> Callable[[Path], None]:
    return edit_manifest(lambda m: m["itemInfoEntries"][m["rootModelIdentifier"]].update(path=path))


def u64(data: bytearray, at: int, value: int) -> bytearray:
    data[at : at + 8] = value.to_bytes(8, "little")
    return data


def link_out(package: Path) -> None:
    outside = package.parent / "weight.bin"
    shutil.move(package / BLOB, outside)
    (package / BLOB).symlink_to(outside)


def first_op(kind: str) -> Callable[[Model], object]:
    return lambda spec: next(o for o in operations(spec) if o.type == kind)


def rename_input(spec: Model) -> None:
    spec.description.input[0].name = "other"


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda p: (p / "Manifest.json").unlink(), "is not a .mlpackage: it has no Manifest.json"),
    "manifest no json": (lambda p: (p / "Manifest.json").write_text("{"), "Manifest.json is damaged: it is not JSON"),
    "manifest a list": (lambda p: (p / "Manifest.json").write_text("[]"), "is not a JSON object"),
    "manifest binary": (lambda p: (p / "Manifest.json").write_bytes(b"\xff\xfe{"), "is not JSON"),
    "no root": (edit_manifest(lambda m: m.pop("rootModelIdentifier")), "rootModelIdentifier names no item"),
    "wrong root": (edit_manifest(lambda m: m.update(rootModelIdentifier="x")), "rootModelIdentifier names no item"),
    "items a list": (edit_manifest(lambda m: m.update(itemInfoEntries=[])), "rootModelIdentifier names no item"),
    "item without path": (edit_manifest(lambda m: m["itemInfoEntries"].update(a={})), "item a has no path"),
    "path up": (set_path("../../../etc/passwd"), "refers to '../../../etc/passwd', a path outside of the package"),
    "path absolute": (set_path("/etc/passwd"), "refers to '/etc/passwd', a path outside of the package: refused"),
    "path missing": (set_path("com.apple.CoreML/no.mlmodel"), "no.mlmodel is missing: the package is damaged"),
    "path a folder": (set_path("com.apple.CoreML"), "is a folder, expected the model's specification"),
    "spec missing": (lambda p: (p / SPEC).unlink(), "model.mlmodel is missing"),
    "spec empty": (lambda p: (p / SPEC).write_bytes(b""), "its specification holds no model"),
    "spec truncated": (edit_bytes(SPEC, lambda d: d[: len(d) // 2]), "it is not a Core ML specification"),
    "spec noise": (lambda p: (p / SPEC).write_bytes(b"\x93" * 999), "it is not a Core ML specification"),
    "old kind": (edit_spec(lambda s: s.neuralNetwork.SetInParent()), "holds a neuralNetwork, expected an ML Program"),
    "newer version": (
        edit_spec(lambda s: setattr(s, "specificationVersion", 99)),
        "has specification version 99, known",
    ),
    "older version": (edit_spec(lambda s: setattr(s, "specificationVersion", 4)), "has specification version 4, known"),
    "program version": (edit_spec(lambda s: setattr(s.mlProgram, "version", 2)), "has ML Program version 2"),
    "no functions": (edit_spec(lambda s: s.mlProgram.functions.clear()), "has no function 'main'; it has: none"),
    "opset": (
        edit_spec(lambda s: setattr(s.mlProgram.functions["main"], "opset", "CoreML99")),
        "opset 'CoreML99', known",
    ),
    "no block": (
        edit_spec(lambda s: s.mlProgram.functions["main"].block_specializations.clear()),
        "function 'main' has no block",
    ),
    "inputs renamed": (edit_spec(rename_input), "it declares inputs ['other'], the program has ['x']"),
    "undefined name": (
        edit_spec(lambda s: setattr(first_op("relu")(s).inputs["x"].arguments[0], "name", "gone")),
        "refers to 'gone', which nothing has defined",
    ),
    "unknown op": (
        edit_spec(lambda s: setattr(first_op("relu")(s), "type", "crelu")),
        "not supported: crelu 'out' at main[",
    ),
    "unknown parameter": (
        edit_spec(lambda s: first_op("relu")(s).inputs["alpha"].CopyFrom(first_op("relu")(s).inputs["x"])),
        "relu 'out' at main[8] (parameter alpha)",
    ),
    "missing parameter": (edit_spec(lambda s: first_op("relu")(s).inputs.clear()), "(no parameter x)"),
    "blob missing": (lambda p: (p / BLOB).unlink(), "weight.bin is missing"),
    "blob folder missing": (lambda p: shutil.rmtree((p / BLOB).parent), "weights is missing"),
    "blob empty": (lambda p: (p / BLOB).write_bytes(b""), "weight.bin is damaged: 0 bytes"),
    "blob header": (edit_bytes(BLOB, lambda d: d[:4] + b"\x07" + d[5:]), "has blob version 7, expected 2"),
    "blob truncated": (edit_bytes(BLOB, lambda d: d[:200]), "past the end (200 bytes)"),
    "blob metadata cut": (edit_bytes(BLOB, lambda d: d[:70]), "an entry at 64 lies past the end (70 bytes)"),
    "sentinel": (edit_bytes(BLOB, lambda d: d[:64] + b"\x00" + d[65:]), "expected 0xdeadbeef"),
    "blob type": (edit_bytes(BLOB, lambda d: d[:68] + b"\x03" + d[69:]), "data type 3, the program expects 2"),
    "blob size huge": (edit_bytes(BLOB, lambda d: u64(d, 72, 2**63)), "past the end"),
    "blob size small": (edit_bytes(BLOB, lambda d: u64(d, 72, 8)), "has 8 bytes, too few for 432 elements of FLOAT32"),
    "blob data offset": (edit_bytes(BLOB, lambda d: u64(d, 80, 2**40)), "past the end"),
    "offset past end": (set_blob(offset=2**40), "lies past the end"),
    "offset past 64 bit": (set_blob(offset=2**64 - 8), "lies past the end"),
    "offset wrong": (set_blob(offset=72), "no entry at 72"),
    "blob path up": (set_blob(fileName="@model_path/../../../../etc/passwd"), "a path outside of the package: refused"),
    "blob path absolute": (set_blob(fileName="/etc/passwd"), "expected a path under @model_path/; refused"),
    "blob path hidden": (set_blob(fileName="@model_path//etc/passwd"), "a path outside of the package: refused"),
    "blob path zero": (set_blob(fileName="@model_path/a\0b"), "a path outside of the package: refused"),
    "blob path a folder": (set_blob(fileName="@model_path/weights"), "is a folder, expected a weight blob"),
    "blob link": (link_out, "is a link to outside of the package: refused"),
    "weight shape": (
        edit_spec(lambda s: setattr(first_blob(s).type.tensorType.dimensions[0].constant, "size", 2**40)),
        "too few for",
    ),
    "weight type": (
        edit_spec(lambda s: setattr(first_blob(s).type.tensorType, "dataType", 2)),
        "a string constant has 0",
    ),
}


def test_link_of_the_specification_out_of_the_package(package: Path) -> None:
    shutil.move(package / SPEC, package.parent / "model.mlmodel")
    (package / SPEC).symlink_to(package.parent / "model.mlmodel")
    with pytest.raises(ArtifactError, match=r"model\.mlmodel is a link to outside of the package: refused"):
        mil.load(package)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_in_one_line(name: str, package: Path) -> None:
    damage, message = DAMAGE[name]
    damage(package)
    with pytest.raises(MvitExportError) as error:
        mil.load(package)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert str(package) in str(error.value)


@pytest.mark.parametrize(("field", "value"), [("size", 7), ("dtype", 32)])
def test_result_that_was_declared_otherwise(field: str, value: int, package: Path) -> None:
    def change(spec: Model) -> None:
        declared = first_op("relu")(spec).outputs[0].type.tensorType
        if field == "size":
            declared.dimensions[1].constant.size = value
        else:
            declared.dataType = value  # UINT16

    edit_spec(change)(package)
    with pytest.raises(
        ExecutionError, match=r"relu 'out' at main\[8\] failed: it makes float32 \[1, 16, 6, 6\], declared"
    ):
        mil.load(package)(x=X)


def test_not_a_package_at_all(package: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.mlpackage", "w") as z:
        z.write(package / SPEC)
    (tmp_path / "old.mlmodel").write_bytes((package / SPEC).read_bytes())
    (tmp_path / "file.mlpackage").write_text("hello")
    for path, message in {
        tmp_path / "none.mlpackage": "does not exist",
        tmp_path / "z.mlpackage": "is a zip file: unpack it first",
        tmp_path / "old.mlmodel": r"is a single .mlmodel file",
        tmp_path / "file.mlpackage": "is a file, expected a folder",
        tmp_path: "is not a .mlpackage",
    }.items():
        with pytest.raises(ArtifactError, match=message):
            mil.load(path)


@pytest.mark.parametrize("file", [SPEC, BLOB])
def test_flipped_and_cut_bytes_never_crash(file: str, package: Path) -> None:
    """Whatever a byte becomes: a program that runs, or an error of ours; flipped weight data cannot be seen here."""
    original = (package / file).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(original)
        for place in rng.integers(0, len(data) if file == SPEC else 256, rng.integers(1, 4)):
            data[place] = rng.integers(256)
        (package / file).write_bytes(data[: rng.integers(1, len(data))] if rng.random() < 0.2 else data)
        try:
            program = mil.load(package)
            program(**dict.fromkeys(program.inputs, X))
        except MvitExportError as error:
            assert "\n" not in str(error)


def test_wrong_inputs(whole: Path) -> None:
    program = mil.load(whole)
    for inputs, message in (
        ({}, "input 'x' is missing; the program takes: x"),
        ({"x": X, "y": X}, "no input 'y'; the program takes: x"),
        ({"x": X[0]}, r"input 'x' has shape \[3, 8, 8\], expected \[1, 3, 8, 8\]"),
        ({"x": X.astype(np.uint8)}, "input 'x' has dtype uint8, expected float32"),
        ({"x": "text"}, "input 'x' has dtype <U4, expected float32"),
    ):
        with pytest.raises(UsageError, match=message):
            program(**inputs)


def test_unknown_function(whole: Path) -> None:
    with pytest.raises(ArtifactError, match="has no function 'extra'; it has: main"):
        mil.load(whole, "extra")
