"""Model files: bits flipped, words swapped, ends cut off; labels and names inside; data outside; golden vectors."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from attack import CRASHED, HARMLESS, REFUSED, Arguments, Case, Sandbox, rng
from attack_manifests import COMMANDS, EVIL
from conftest import rehash
from safetensors.numpy import load_file, save_file

MODEL = {
    "onnx": "tiny.onnx", "tflite": "tiny.tflite", "coreml": "tiny.mlpackage/Data/com.apple.CoreML/model.mlmodel",
    "coreml weights": "tiny.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
}  # fmt: skip
READERS = {
    ("onnx", "inspect"): ("mvit_export/readers/onnx.py:read_contents",),
    ("onnx", "locate"): ("mvit_export/readers/onnx.py:read_layers",),
    ("tflite", "inspect"): (
        "mvit_export/readers/tflite.py:read_contents",
        "mvit_export/readers/tflite_graph.py:read_graph",
    ),
    ("coreml", "inspect"): ("mvit_export/mil/package.py:parse_model", "mvit_export/mil/package.py:read_manifest"),
    ("coreml weights", "golden"): ("mvit_export/mil/blob.py:__init__",),
}
WAYS: dict[str, Callable[[Path], Arguments]] = {
    "inspect": COMMANDS["inspect"], "golden": COMMANDS["golden"], "bench": COMMANDS["bench"],
    "locate": lambda place: ("verify", place, "--locate"),
}  # fmt: skip


def flip(data: bytearray, dice: Any) -> None:
    for _ in range(3):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def flip_structure(data: bytearray, dice: Any) -> None:
    """Where a graph's structure begins or ends, and not only weights."""
    for _ in range(4):
        offset = dice.randrange(min(len(data), 4096))
        data[offset if dice.random() < 0.5 else -1 - offset] = dice.randrange(256)


def swap_words(data: bytearray, dice: Any) -> None:
    for _ in range(2):
        a, b = (4 * dice.randrange(min(len(data), 20_000) // 4) for _ in range(2))
        data[a : a + 4], data[b : b + 4] = data[b : b + 4], data[a : a + 4]


def extremes(data: bytearray, dice: Any) -> None:
    """A size or an offset that is as large or as small as it can be."""
    offset = 4 * dice.randrange(min(len(data), 8000) // 4)
    data[offset : offset + 4] = dice.choice((b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80"))


def cut(data: bytearray, dice: Any) -> None:
    del data[dice.randrange(len(data)) :]


def blank(data: bytearray, dice: Any) -> None:
    start = dice.randrange(len(data))
    data[start : start + 256] = bytes(len(data[start : start + 256]))


DAMAGE = (flip, flip_structure, swap_words, extremes, cut, blank)


def damage(sandbox: Sandbox, what: str, how: Callable[..., None], index: int, command: str) -> Arguments:
    artifact = sandbox.artifact(what.partition(" ")[0])
    file = artifact / MODEL[what]
    data = bytearray(file.read_bytes())
    how(data, rng("damage", what, how.__name__, index))
    file.write_bytes(data)
    rehash(artifact)
    return WAYS[command](artifact)


def damages() -> Iterator[Case]:
    for what in MODEL:
        for how in DAMAGE:
            for index in range(4):
                command = ("inspect", "golden", "locate" if how is cut else "bench", "golden")[index]
                if what.startswith("coreml") and command == "bench":
                    command = "inspect"
                yield Case(
                    f"{what} damaged", f"{how.__name__} {index}, {command}",
                    lambda box, w=what, h=how, i=index, c=command: damage(box, w, h, i, c), HARMLESS | CRASHED,
                )  # fmt: skip


def sound(sandbox: Sandbox, what: str, command: str) -> Arguments:
    return WAYS[command](sandbox.artifact(what.partition(" ")[0]))


def as_they_were() -> Iterator[Case]:
    """Nothing is damaged: that every reader of models is come by, and that `judge` finds no fault where none is."""
    for (what, command), reads in READERS.items():
        codes = frozenset({0, 3})
        yield Case("sound", f"{what}, {command}", lambda box, w=what, c=command: sound(box, w, c), codes, reads)


# Texts and paths inside an ONNX file


def onnx_file(sandbox: Sandbox, change: Callable[[Any, Path], None], command: str) -> Arguments:
    import onnx

    artifact = sandbox.artifact()
    file = artifact / "tiny.onnx"
    model = onnx.load(str(file))
    change(model, artifact)
    file.write_bytes(model.SerializeToString())
    rehash(artifact)
    return WAYS[command](artifact)


def external(where: str) -> Callable[[Any, Path], None]:
    """The largest tensor's data lies in another file."""

    def change(model: Any, artifact: Path) -> None:
        os.mkfifo(artifact / "fifo")
        (artifact / "zero").symlink_to("/dev/zero")
        (artifact / "secret").symlink_to("/etc/passwd")
        tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        for key, value in (("location", where), ("offset", "0"), ("length", str(len(tensor.raw_data)))):
            tensor.external_data.add(key=key, value=value)
        tensor.ClearField("raw_data")
        tensor.data_location = 1

    return change


def labels(text: str) -> Callable[[Any, Path], None]:
    return lambda model, _: model.metadata_props.add(key="labels", value=text) and None


def evil_names(model: Any, _: Path) -> None:
    model.producer_name = model.domain = model.doc_string = EVIL
    for node in model.graph.node:
        node.name += EVIL
    model.opset_import.add(domain=EVIL, version=1)
    model.metadata_props.add(key=EVIL, value=EVIL)


def evil_operator(model: Any, _: Path) -> None:
    model.graph.node[0].op_type = EVIL


def evil_scopes(model: Any, _: Path) -> None:
    """The names of modules are read as a Python literal."""
    for node in model.graph.node:
        for entry in node.metadata_props:
            entry.value = "[" * 3000 if len(entry.key) % 2 else "__import__('os').system('true')"


def circle(model: Any, _: Path) -> None:
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def many_nodes(model: Any, _: Path) -> None:
    for index in range(20_000):
        model.graph.node.add(op_type="Identity", input=["image"], output=[f"x{index}"])


def evil_output(model: Any, _: Path) -> None:
    old, new = model.graph.output[0].name, EVIL
    model.graph.output[0].name = new
    for node in model.graph.node:
        node.output[:] = [new if name == old else name for name in node.output]


def inside_onnx() -> Iterator[Case]:
    changes = {
        **{f"data in {name!a}": external(name) for name in ("../secret", "/etc/passwd", "fifo", "zero", "secret", EVIL, "", ".")},
        **{f"labels {text[:12]!a}": labels(text) for text in ("{", "null", "5", '["a", 1]', '{"a": 1}', "[" * 10**5, json.dumps([EVIL] * 10), "[]", "")},
        "evil names": evil_names, "evil operator": evil_operator, "evil scopes": evil_scopes, "a circle": circle,
        "evil output": evil_output, "20,000 nodes": many_nodes,
    }  # fmt: skip
    for name, change in changes.items():
        for command in ("inspect", "golden", "locate") if "labels" not in name else ("inspect", "golden"):
            yield Case(
                "inside onnx", f"{name}, {command}", lambda box, f=change, c=command: onnx_file(box, f, c), HARMLESS
            )


def tflite_labels(
    sandbox: Sandbox, files: dict[str, bytes], command: str, spoil: Callable[[bytearray], None]
) -> Arguments:
    artifact = sandbox.artifact("tflite")
    file = artifact / "tiny.tflite"
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    data = bytearray(file.read_bytes())
    spoil(data)
    file.write_bytes(data)
    rehash(artifact)
    return COMMANDS[command](artifact)


def nothing(_: bytearray) -> None:
    pass


def encrypt(data: bytearray) -> None:
    data[data.rindex(b"PK\x03\x04") + 6] |= 1
    data[data.rindex(b"PK\x01\x02") + 8] |= 1


def unknown_method(data: bytearray) -> None:
    data[data.rindex(b"PK\x03\x04") + 8] = data[data.rindex(b"PK\x01\x02") + 10] = 77


def wrong_offset(data: bytearray) -> None:
    data[data.rindex(b"PK\x01\x02") + 42 : data.rindex(b"PK\x01\x02") + 46] = b"\xff\xff\xff\x7f"


def inside_tflite() -> Iterator[Case]:
    files: dict[str, tuple[dict[str, bytes], Callable[[bytearray], None]]] = {
        "not UTF-8": ({"labels.txt": b"\xff\xfe"}, nothing), "escapes": ({"labels.txt": EVIL.encode() * 10}, nothing),
        "bomb": ({"labels.txt": bytes(10**8)}, nothing), "encrypted": ({"labels.txt": b"a\n"}, encrypt),
        "another method": ({"labels.txt": b"a\n"}, unknown_method), "a wrong offset": ({"labels.txt": b"a\n"}, wrong_offset),
        "many files": ({f"f{i}": b"" for i in range(3000)}, nothing), "path": ({"../../canary/x": b"a"}, nothing),
        "a million labels": ({"labels.txt": b"a\n" * 10**6}, nothing), "evil names": ({EVIL: b"a"}, nothing),
    }  # fmt: skip
    for name, (content, spoil) in files.items():
        for command in ("inspect", "golden"):
            yield Case(
                "inside tflite",
                f"{name}, {command}",
                lambda box, f=content, s=spoil, c=command: tflite_labels(box, f, c, s),
                HARMLESS,
            )


# Core ML packages

PACKAGES: dict[str, Any] = {
    "no items": {}, "a list": [], "items are a list": {"itemInfoEntries": []}, "deep": None,
    "root is a number": {"itemInfoEntries": {}, "rootModelIdentifier": 5},
    "path up": "../../../../files/secret", "absolute": "/etc/passwd", "path is a list": [1], "empty path": "",
    "NUL": "a\0b", "escapes": EVIL, "long": "x" * 10**4, "surrogate": "\udcff", "root": ".", "null": None,
}  # fmt: skip


def package(sandbox: Sandbox, value: Any, deep: bool) -> Arguments:
    artifact = sandbox.artifact("coreml")
    file = artifact / "tiny.mlpackage/Manifest.json"
    manifest = json.loads(file.read_text())
    if isinstance(value, dict):
        manifest = value
    else:
        for item in manifest["itemInfoEntries"].values():
            item["path"] = value
    file.write_text("[" * 10**6 if deep else json.dumps(manifest))
    rehash(artifact)
    return ("inspect", artifact)


def packages() -> Iterator[Case]:
    for name, value in PACKAGES.items():
        yield Case("inside a package", name, lambda box, n=name, v=value: package(box, v, n == "deep"))


# Golden vectors


def golden(sandbox: Sandbox, change: Callable[[dict[str, Any]], Any], fmt: str) -> Arguments:
    artifact = sandbox.artifact(fmt)
    file = artifact / "golden.safetensors"
    tensors = load_file(file)
    metadata = {"cases": json.dumps(sorted({key.split("/")[0] for key in tensors}))}
    changed = change(tensors)
    if isinstance(changed, bytes):
        file.write_bytes(changed)
    else:
        save_file(tensors, file, metadata=metadata if changed is None else changed)
    rehash(artifact)
    return ("verify", artifact, "--against", "golden")


def every(part: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, Any]], None]:
    def apply(tensors: dict[str, Any]) -> None:
        tensors.update(
            {key: np.ascontiguousarray(change(value)) for key, value in tensors.items() if key.endswith(part)}
        )

    return apply


def without(part: str) -> Callable[[dict[str, Any]], None]:
    def apply(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if key.endswith(part)]:
            del tensors[key]

    return apply


def renamed(name: str) -> Callable[[dict[str, Any]], None]:
    def apply(tensors: dict[str, Any]) -> None:
        key = sorted(tensors)[0]
        tensors[name] = tensors.pop(key)

    return apply


def goldens() -> Iterator[Case]:
    arrays: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "scalar": lambda a: np.float32(1).reshape(()), "NaN": lambda a: np.full_like(a, np.nan), "infinite": lambda a: np.full_like(a, np.inf),
        "float64": lambda a: a.astype(np.float64), "int8": lambda a: a.astype(np.int8), "bool": lambda a: a > 0, "uint8": lambda a: a.astype(np.uint8),
        "empty": lambda a: a[:0], "other shape": lambda a: a.reshape(-1), "more axes": lambda a: a[None, None],
        "huge values": lambda a: np.full_like(a, 3e38), "larger": lambda a: np.concatenate([a, a], 1), "batch": lambda a: np.concatenate([a] * 300),
    }  # fmt: skip
    wholes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "no metadata": lambda t: {}, "cases a number": lambda t: {"cases": "5"}, "cases null": lambda t: {"cases": "null"},
        "cases deep": lambda t: {"cases": "[" * 10**5}, "cases no JSON": lambda t: {"cases": "{"}, "no cases": lambda t: {"cases": "[]"},
        "cases of lists": lambda t: {"cases": "[[1]]"}, "evil cases": lambda t: {"cases": json.dumps([EVIL])},
        "a case more": lambda t: {"cases": json.dumps([*{k.split("/")[0] for k in t}, "more"])},
        "empty": lambda t: b"", "cut": lambda t: bytes(100), "no images": without("/image"), "no logits": without("/logits"),
        "no slash": renamed("x"), "evil name": renamed(EVIL), "another case": renamed("x/y"),
        "NaN in one": lambda t: t.update({sorted(t)[0]: np.full_like(t[sorted(t)[0]], np.nan)}),
    }  # fmt: skip
    changes = {
        **{f"{part} {name}": every(part, change) for name, change in arrays.items() for part in ("/image", "/logits")},
        **wholes,
    }
    reads = ("mvit_export/artifact.py:load_golden",)
    for index, (name, change) in enumerate(changes.items()):
        fmt = ("onnx", "tflite", "coreml")[index % 3]
        codes = HARMLESS if name.startswith("/") or name in ("NaN in one",) else REFUSED
        yield Case("golden vectors", f"{name} {fmt}", lambda box, f=change, m=fmt: golden(box, f, m), codes, reads)


def cases() -> Iterator[Case]:
    yield from as_they_were()
    yield from damages()
    yield from inside_onnx()
    yield from inside_tflite()
    yield from packages()
    yield from goldens()
