"""Manifests: every field with every kind of wrong value, paths that lead away, and code that nobody asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attack import HARMLESS, REFUSED, Arguments, Case, Sandbox, rng
from conftest import TINY, rehash

from mvit_export.system.reading import MB

EVIL = "\x1b[2J\x1b]0;pwned\x07\r\n::error::evil\x9b31m\u202e\u2028"
LONG = "x" * 10_000
TEXTS = {
    "escapes": EVIL, "newline": "a\n::error::b", "long": LONG, "nul": "a\0b", "surrogate": "\udcff", "empty": "",
    "path": "../../canary/x", "absolute": "/etc/passwd", "format": "%s{0}{x!r}[bold]",
}  # fmt: skip
NUMBERS = {
    "huge": 10**30, "negative": -1, "nan": float("nan"), "infinite": float("inf"), "zero": 0, "half": 0.5,
    "digits": 10**4000,
}  # fmt: skip
OTHERS: dict[str, Any] = {"null": None, "true": True, "list": [], "object": {}, "lists": [[1], ["x"]], "nested": None}
PLACEHOLDER = "the place of something nested"
# What a command may take: any text is as good as another there, or nothing is.
NULLABLE = {
    "model.variant", "model.num_classes", "model.patch_config", "model.output_stride", "model.labels", "weights.source",
    "weights.family", "weights.sha256", "weights.trained", "weights.seed", "weights.revision", "preprocessing",
    "preprocessing.resize_ratio", "quantization", "tuning", "target.opset", "target.deployment_target",
    "target.recipe", "target.form", "inputs.0.shape.0", "outputs.0.shape.0",
}  # fmt: skip
COMMANDS: dict[str, Callable[[Path], Arguments]] = {
    "inspect": lambda place: ("inspect", place),
    "golden": lambda place: ("verify", place, "--against", "golden"),
    "verify": lambda place: ("verify", place),
    "report": lambda place: ("report", place, "--format", "markdown"),
    "junit": lambda place: ("report", place, "--format", "junit"),
    "bench": lambda place: ("bench", place, "--budget", "0.1", "--no-roofline"),
}
MANIFEST: dict[str, Any] = {  # the shape of one; the values come from the artifact itself
    "schema_version": 1,
    "model": dict.fromkeys(
        ("name", "source", "task", "params", "macs", "variant", "num_classes", "patch_config", "output_stride", "labels")
    ),
    "weights": dict.fromkeys(("source", "family", "sha256", "state_sha256", "trained", "seed", "revision")),
    "preprocessing": {
        **dict.fromkeys(("channel_order", "resize_ratio", "interpolation", "source")),
        "crop": [0], "mean": [0], "std": [0],
    },
    "inputs": [dict.fromkeys(("name", "dtype", "layout", "enumerated")) | {"shape": [0, 0, 0]}],
    "outputs": [dict.fromkeys(("name", "dtype", "layout", "enumerated")) | {"shape": [0, 0]}],
    "format": 0, "precision": 0,
    "target": dict.fromkeys(
        ("format", "precision", "input", "opset", "dynamic_batch", "ort", "deployment_target", "recipe", "form")
    ),
    "capture": 0, "files": [dict.fromkeys(("path", "sha256", "bytes"))], "tools": {"torch": 0},
    "created": 0, "quantization": 0, "form": 0, "tuning": 0,
}  # fmt: skip
ANYTHING = ("quantization", "tuning")  # objects that are shown, not read


def places(data: Any, above: str = "") -> Iterator[str]:
    """`model.name`, `inputs.0.shape`, `inputs.0.shape.1`, ..."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        yield f"{above}{key}"
        yield from places(value, f"{above}{key}.")


def put(data: Any, place: str, value: Any) -> Any:
    """Replace what stands at `place`; what stood there."""
    *above, last = place.split(".")
    for key in above:
        data = data[int(key) if isinstance(data, list) else key]
    key: Any = int(last) if isinstance(data, list) else last
    before, data[key] = data[key], value
    return before


def write_manifest(artifact: Path, manifest: Any, *, nested: bool = False) -> None:
    text = json.dumps(manifest)
    if nested:
        text = text.replace(json.dumps(PLACEHOLDER), "[" * 100_000 + "]" * 100_000)
    (artifact / "manifest.json").write_text(text)


def mutate(sandbox: Sandbox, place: str, name: str, command: str, fmt: str) -> Arguments:
    artifact = sandbox.artifact(fmt)
    manifest = json.loads((artifact / "manifest.json").read_text())
    put(manifest, place, PLACEHOLDER if name == "nested" else {**TEXTS, **NUMBERS, **OTHERS}[name])
    write_manifest(artifact, manifest, nested=name == "nested")
    return COMMANDS[command](artifact)


FLAGS = {"target.dynamic_batch", "target.ort", "weights.trained"}
WHOLE = {
    "schema_version", "model.params", "model.macs", "model.num_classes", "model.output_stride", "weights.seed",
    "target.opset", "files.0.bytes",
}  # fmt: skip
LISTS = {"preprocessing.crop", "preprocessing.mean", "preprocessing.std", "files"}


def kind_of(place: str) -> str:
    """What the format of manifests says is at a place."""
    last = place.rpartition(".")[2]
    if place in FLAGS:
        return "flag"
    if place in WHOLE or (last.isdigit() and "shape" in place):
        return "whole"
    if last in ("shape", "enumerated", "labels", "inputs", "outputs") or place in LISTS:
        return "list"
    if place == "preprocessing.resize_ratio" or (last.isdigit() and place.startswith("preprocessing")):
        return "whole" if "crop" in place else "number"
    if place in ("model", "weights", "preprocessing", "target", "tools", *ANYTHING) or last.isdigit():
        return "object"
    return "text"


def codes(place: str, name: str) -> frozenset[int]:
    """A value of another type than the field's is refused. One of its type may be as good as what was there."""
    found = "text" if name in TEXTS else "list" if name in ("list", "lists") else "object" if name == "object" else name
    if name in NUMBERS:
        found = "whole" if name in ("huge", "negative", "zero", "digits") else "number"
    expected = kind_of(place)
    fits = {
        "flag": ("true",), "whole": ("whole",), "number": ("whole", "number"), "list": ("list",),
        "object": ("object",), "text": ("text",),
    }[expected]  # fmt: skip
    if name == "null":
        return HARMLESS if place in NULLABLE else REFUSED
    if name in ("huge", "digits", "nan", "infinite", "nested"):
        return REFUSED if place not in ANYTHING or name == "nested" else HARMLESS
    return HARMLESS if found in fits else REFUSED


def mutations() -> Iterator[Case]:
    """Every field, with some of the values each; in all, every value and every command many times."""
    names = [*TEXTS, *NUMBERS, *OTHERS]
    for place in places(MANIFEST):
        chosen = rng("manifest", place)
        for name in chosen.sample(names, 2):
            command = chosen.choice(["inspect"] * 4 + ["golden"] * 2 + ["report"] * 2 + ["verify", "junit", "bench"])
            fmt = chosen.choice(("onnx", "tflite", "coreml")) if command != "bench" else "onnx"
            yield Case(
                "manifest", f"{place} is {name}, {command} {fmt}",
                lambda box, p=place, n=name, c=command, f=fmt: mutate(box, p, n, c, f),
                codes(place, name),
            )  # fmt: skip


def path_tricks() -> Iterator[Case]:
    """`files[].path` and the model's name lead elsewhere."""
    tricks: dict[str, str] = {
        "up": "../secret", "absolute": "/etc/passwd", "deep": "a/../../secret", "long": LONG, "nul": "tiny\0.onnx",
        "escapes": EVIL, "empty": "", "dot": ".", "backslash": "..\\secret", "surrogate": "\udcff", "proc": "/proc/self/mem",
        "manifest": "manifest.json", "link": "link", "linked folder": "folder/secret", "tilde": "~/.ssh/id_rsa",
        "many parts": "a/" * 3000 + "b", "drive": "C:\\secret",
    }  # fmt: skip
    for name, path in tricks.items():
        for command in ("inspect", "golden"):
            yield Case(
                "path",
                f"{name}, {command}",
                lambda box, p=path, c=command: trick(box, p, c),
                HARMLESS if name in ("link", "linked folder") else REFUSED,
            )


def trick(sandbox: Sandbox, path: str, command: str) -> Arguments:
    artifact = sandbox.artifact()
    secret = sandbox.files / "secret"
    secret.write_text("secret")
    (artifact / "link").symlink_to(secret)
    (artifact / "folder").symlink_to(sandbox.files)
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["files"].append({"path": path, "sha256": "0" * 64, "bytes": 6})
    write_manifest(artifact, manifest)
    return COMMANDS[command](artifact)


WHOLES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"", "not JSON": lambda: b"{", "a list": lambda: b"[]", "a number": lambda: b"1",
    "null": lambda: b"null", "not UTF-8": lambda: b"\xff\xfe{}", "deep": lambda: b"[" * 10**6,
    "deep objects": lambda: b'{"a":' * 10**5, "BOM": lambda: b"\xef\xbb\xbf{}", "a long number": lambda: b"1" * 10**6,
    "a long key": lambda: b'{"' + b"k" * 10**6 + b'": 1}', "NULs": lambda: bytes(1000),
    "too large": lambda: b" " * (17 * MB), "many keys": lambda: json.dumps({f"k{i}": i for i in range(10**5)}).encode(),
}  # fmt: skip


def whole_files() -> Iterator[Case]:
    for name, content in WHOLES.items():
        for command in ("inspect", "report"):
            yield Case("manifest", f"{name}, {command}", lambda box, f=content, c=command: replace_whole(box, f(), c))


def replace_whole(sandbox: Sandbox, content: bytes, command: str) -> Arguments:
    artifact = sandbox.artifact()
    (artifact / "manifest.json").write_bytes(content)
    return COMMANDS[command](artifact)


# Code and weights that a manifest names

CODE = "from pathlib import Path\nPath({canary!r}).touch()\ndef tiny():\n    Path({canary!r}).touch()\n"


def named_code() -> Iterator[Case]:
    sources = {
        "beside it": "{artifact}/evil.py:tiny", "relative": "evil.py:tiny", "up": "{artifact}/../onnx-fp32/evil.py:tiny",
        "link": "{artifact}/link.py:tiny", "escapes": "{artifact}/evil.py:tiny\x1b[2J", "known name": TINY.replace("tiny.py", "../tests/tiny.py"),
        "timm": "timm:../../evil", "another function": TINY.replace(":tiny", ":raises"), "nul": "evil.py\0:tiny", "os": "os.py:system",
    }  # fmt: skip
    for name, source in sources.items():
        for command in ("verify", "like", "eval", "bench") if name != "timm" else ("verify",):  # timm is slow to import
            yield Case(
                "code of a manifest",
                f"{name}, {command}",
                lambda box, s=source, c=command: name_code(box, s, c),
                frozenset({2, 3}),
            )
    for name, source in {
        "file": "/etc/passwd",
        "hub": "hf:evil/evil",
        "fifo": "{artifact}/fifo",
        "pickle": "{artifact}/evil.pt",
        "escapes": EVIL,
        "home": "~/x",
    }.items():
        for command in ("verify", "like"):
            yield Case(
                "code of a manifest",
                f"weights from {name}, {command}",
                lambda box, s=source, c=command: name_weights(box, s, c),
                frozenset({2, 3}),
            )


def follow(sandbox: Sandbox, artifact: Path, command: str) -> Arguments:
    import numpy as np

    data = sandbox.files / "data.npz"
    np.savez(data, images=np.zeros((2, 64, 64, 3), np.uint8), labels=np.arange(2))
    return {
        "verify": ("verify", artifact),
        "like": ("export", "--to", "onnx", "--like", artifact, "--out", sandbox.out),
        "eval": ("eval", artifact, "--data", data, "--jobs", "1"),
        "bench": ("bench", artifact, "--runtime", "pytorch", "--budget", "0.1"),
    }[command]


def name_code(sandbox: Sandbox, source: str, command: str) -> Arguments:
    artifact = sandbox.artifact()
    (artifact / "evil.py").write_text(CODE.format(canary=str(sandbox.canary / "ran")))
    (sandbox.root / "work/evil.py").write_text(CODE.format(canary=str(sandbox.canary / "ran")))
    (artifact / "link.py").symlink_to(artifact / "evil.py")
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["model"]["source"] = source.replace("{artifact}", str(artifact))
    write_manifest(artifact, manifest)
    return follow(sandbox, artifact, command)


def name_weights(sandbox: Sandbox, source: str, command: str) -> Arguments:
    import os

    from attack_weights import pickled

    artifact = sandbox.artifact()
    os.mkfifo(artifact / "fifo")
    (artifact / "evil.pt").write_bytes(pickled("os.system", f"touch {sandbox.canary}/ran"))
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["weights"]["source"] = source.replace("{artifact}", str(artifact))
    write_manifest(artifact, manifest)
    return follow(sandbox, artifact, command)


def resources() -> Iterator[Case]:
    """Sizes that nobody has."""
    changes: dict[str, tuple[str, Any]] = {
        "a large batch": ("inputs.0.shape", [100_000, 3, 32, 32]), "2^62": ("inputs.0.shape", [1, 3, 2**31, 2**31]),
        "float": ("inputs.0.shape", [1, 3, 64, 64.5]), "many axes": ("inputs.0.shape", [1] * 1000),
        "scalar": ("inputs.0.shape", []), "many shapes": ("inputs.0.enumerated", [[1, 3, 64, 64]] * 10**5),
        "other shapes": ("inputs.0.enumerated", [[1, 3, 64]]), "large ratio": ("preprocessing.resize_ratio", 1e9),
        "no ratio": ("preprocessing.resize_ratio", 0), "tiny ratio": ("preprocessing.resize_ratio", 1e-300),
        "large crop": ("preprocessing.crop", [10**6, 10**6]), "zero std": ("preprocessing.std", [0, 0, 0]),
        "many labels": ("model.labels", ["a"] * 10**6), "labels with escapes": ("model.labels", [EVIL] * 10),
        "two inputs": ("inputs", [{"name": "image", "shape": [1, 3, 64, 64], "dtype": "float32", "layout": "NCHW"}] * 2),
        "many outputs": ("outputs", [{"name": "logits", "shape": [1, 10], "dtype": "float32", "layout": "NC"}] * 10**4),
        "evil output": ("outputs.0.name", EVIL), "evil input": ("inputs.0.name", EVIL),
        "uint16 input": ("inputs.0.dtype", "uint16"), "uint8 input": ("inputs.0.dtype", "uint8"),
        "object input": ("inputs.0.dtype", "object"), "evil dtype": ("inputs.0.dtype", EVIL),
        "many tools": ("tools", {f"t{i}": "1" for i in range(10**5)}), "evil tools": ("tools", {EVIL: EVIL}),
        "evil quantization": ("quantization", {EVIL: {EVIL: [EVIL]}}), "evil tuning": ("tuning", {"runtime": EVIL}),
        "odd quantization": ("quantization", {"recipe": 5, "calibration": []}), "odd tuning": ("tuning", {"forms": 5, "rows": [None]}),
    }  # fmt: skip
    for name, (place, value) in changes.items():
        for command in rng("sizes", name).sample(("inspect", "verify", "report"), 2):
            yield Case(
                "sizes in a manifest",
                f"{name}, {command}",
                lambda box, p=place, v=value, c=command: set_one(box, p, v, c),
                HARMLESS,
            )


def set_one(sandbox: Sandbox, place: str, value: Any, command: str) -> Arguments:
    artifact = sandbox.artifact()
    manifest = json.loads((artifact / "manifest.json").read_text())
    put(manifest, place, value)
    write_manifest(artifact, manifest)
    return COMMANDS[command](artifact)


def cases() -> Iterator[Case]:
    yield from mutations()
    yield from whole_files()
    yield from path_tricks()
    yield from named_code()
    yield from resources()


__all__ = ["COMMANDS", "EVIL", "cases", "rehash"]
