"""What a user names: pictures, arrays, labels, recipes, Python files; and records that others wrote."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from attack import CRASHED, HARMLESS, REFUSED, SEED, Arguments, Case, Sandbox, rng
from attack_manifests import EVIL, put
from conftest import LABELS, TESTS
from PIL import Image

PICTURES = "mvit_export/data/pictures.py"


# Arrays


def arrays(**changed: Any) -> Callable[[Path], None]:
    sound = {"images": np.zeros((10, 8, 8, 3), np.uint8), "labels": np.arange(10)}

    def write(path: Path) -> None:
        np.savez(path, **{key: value for key, value in {**sound, **changed}.items() if value is not None})

    return write


def with_header(text: bytes, data: bytes = b"", claimed: int | None = None) -> Callable[[Path], None]:
    """`images.npy` with any header."""

    def write(path: Path) -> None:
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) % 65536) + text + data
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr("images.npy", content)

    return write


def bomb(path: Path) -> None:
    """5 GB of zeros."""
    text = str({"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 64, 64, 3)}).encode() + b"\n"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed,
        packed.open("images.npy", "w") as file,
    ):
        file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(10**7))
    data = path.read_bytes().replace(struct.pack("<I", 10**7 + 10 + len(text)), struct.pack("<I", 2**32 - 2))
    path.write_bytes(data)


def npy_header(shape: str, descr: str = "'|u1'") -> bytes:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()


NPZ: dict[str, Callable[[Path], None]] = {
    "bomb": bomb, "empty": Path.touch, "not a zip": lambda path: path.write_bytes(b"x" * 100) and None,
    "no images": arrays(images=None), "no labels": arrays(labels=None), "pickled": arrays(images=np.array([{}], object)),
    "pickled labels": arrays(labels=np.array([None] * 10, object)), "floats": arrays(images=np.zeros((10, 8, 8, 3))),
    "uint64 labels": arrays(labels=np.full(10, 2**64 - 1, np.uint64)), "negative": arrays(labels=-np.arange(10)),
    "large labels": arrays(labels=np.full(10, 10**9)), "class 10": arrays(labels=np.arange(10) + 1),
    "text labels": arrays(labels=np.array(list("abcdefghij"))), "float labels": arrays(labels=np.arange(10.0)),
    "few labels": arrays(labels=np.arange(3)), "scalar": arrays(images=np.uint8(1)), "no pictures": arrays(images=np.zeros((0, 8, 8, 3), np.uint8)),
    "no pixels": arrays(images=np.zeros((10, 0, 8, 3), np.uint8)), "gray": arrays(images=np.zeros((10, 8, 8, 1), np.uint8)),
    "a pixel": arrays(images=np.zeros((10, 1, 1, 3), np.uint8)), "a line": arrays(images=np.zeros((10, 1, 60000, 3), np.uint8)),
    "evil classes": arrays(classes=np.array([EVIL] * 10)), "few classes": arrays(classes=np.array(["a"])),
    "pickled classes": arrays(classes=np.array([{}] * 10, object)), "evil name": arrays(images=None, labels=None, **{EVIL: np.zeros(1)}),
    "huge shape": with_header(npy_header("(10**9, 64, 64, 3)")), "negative shape": with_header(npy_header("(-1, 8, 8, 3)")),
    "overflow": with_header(npy_header("(4611686018427387904, 4, 1, 3)")), "code": with_header(b"__import__('os').system('true')\n"),
    "deep header": with_header(b"(" * 9000 + b"\n"), "long header": with_header(b" " * 60000 + b"{}\n"),
    "odd type": with_header(npy_header("(1, 8, 8, 3)", "'O'")), "nested type": with_header(npy_header("(1,)", "[('a','<f4',(10**9,))]")),
}  # fmt: skip


def eval_npz(sandbox: Sandbox, write: Callable[[Path], None]) -> Arguments:
    path = sandbox.files / "data.npz"
    write(path)
    return (
        "eval",
        sandbox.artifact(),
        "--data",
        path,
        "--reference",
        sandbox.artifact(name="reference"),
        "--jobs",
        "1",
    )


def calibrate(sandbox: Sandbox, write: Callable[[Path], None]) -> Arguments:
    """Labels cannot be read, so that sound pictures end soon as well."""
    path = sandbox.files / "data.npz"
    write(path)
    return (
        *XXS,
        "--precision",
        "int8",
        "--calibration",
        path,
        "--labels",
        sandbox.files / "absent",
        "--out",
        sandbox.out,
    )


XXS = ("--to", "onnx", "--variant", "xxs")


def npz() -> Iterator[Case]:
    usable = ("a pixel", "a line", "evil classes", "few classes", "class 10", "large labels", "no labels", "few labels")
    for name, write in NPZ.items():
        reads = (f"{PICTURES}:read_npz",)
        yield Case(
            "npz",
            f"{name}, eval",
            lambda box, w=write: eval_npz(box, w),
            HARMLESS if name in usable else REFUSED,
            reads,
        )
        yield Case("npz", f"{name}, calibration", lambda box, w=write: calibrate(box, w))


# Pictures


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, data: bytes = b"") -> bytes:
    """Of any claimed size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + b"".join(extra)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def encoded(size: tuple[int, int], mode: str = "RGB", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"", "text": lambda: b"no picture", "a bomb": lambda: png(60_000, 60_000), "2^31": lambda: png(2**31 - 1, 2**31 - 1),
    "no size": lambda: png(0, 0), "2M x 1": lambda: encoded((2_000_000, 1), "L"), "1 x 2M": lambda: encoded((1, 2_000_000), "L"),
    "a pixel": lambda: encoded((1, 1)), "cut": lambda: encoded((64, 64))[:80], "cut jpeg": lambda: encoded((64, 64), kind="JPEG")[:-200],
    "gif as png": lambda: encoded((64, 64), "P", "GIF"), "tiff": lambda: encoded((64, 64), "F", "TIFF"), "floats": lambda: encoded((64, 64), "I;16"),
    "bits": lambda: encoded((64, 64), "1"), "cmyk": lambda: encoded((64, 64), "CMYK", "JPEG"), "alpha": lambda: encoded((64, 64), "LA"),
    "text bomb": lambda: png(8, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8))), data=bytes(8 * 25)),
    "profile bomb": lambda: png(8, 8, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(10**8))), data=bytes(8 * 25)),
    "evil text": lambda: png(8, 8, chunk(b"tEXt", b"k\0" + EVIL.encode("utf-8")), data=bytes(8 * 25)),
    "ppm": lambda: b"P6 99999999 99999999 255\n", "eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch x) run\n",
    "svg": lambda: b"<svg/>", "bmp": lambda: b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 2**31 - 1, -(2**31), 1, 24, 0) + bytes(20),
    "fli": lambda: bytes(4) + b"\x11\xaf" + b"\xff" * 122, "webp": lambda: b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(50),
}  # fmt: skip


def folder(sandbox: Sandbox, content: bytes, name: str, *, only: bool) -> Arguments:
    for label in LABELS:
        place = sandbox.files / "data" / label
        place.mkdir(parents=True)
        if only or label == LABELS[3]:
            (place / name).write_bytes(content)
        if not only:
            (place / "sound.png").write_bytes(encoded((64, 64)))
    return (
        "eval",
        sandbox.artifact(),
        "--data",
        sandbox.files / "data",
        "--reference",
        sandbox.artifact(name="reference"),
        "--jobs",
        "1",
    )


def pictures() -> Iterator[Case]:
    reads = (f"{PICTURES}:read",)
    for name, content in FILES.items():
        for only in (False, True):
            label = f"{name}, {'alone' if only else 'among others'}"
            yield Case(
                "picture", label, lambda box, c=content, o=only: folder(box, c(), "odd.png", only=o), HARMLESS, reads
            )
    for name in (
        f"x{EVIL}.png",
        "::error::.png",
        "-rf.png",
        "x" * 200 + ".png",
        "\udcff.png",
        "[bold].png",
        "{0}%s.png",
    ):
        yield Case(
            "picture",
            f"named {name[:20]!a}",
            lambda box, n=name: folder(box, b"no picture", n, only=False),
            frozenset({0}),
            reads,
        )
    for index in range(10):
        yield Case(
            "picture",
            f"damaged {index}",
            lambda box, i=index: folder(box, spoilt(i), "odd.png", only=False),
            HARMLESS,
            (*reads, f"{PICTURES}:digest"),
        )


def spoilt(index: int) -> bytes:
    dice = rng("picture", index)
    noise = np.frombuffer(dice.randbytes(48 * 48 * 3), np.uint8).reshape(48, 48, 3)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, ("PNG", "JPEG", "WEBP", "TIFF", "GIF")[index % 5])
    data = bytearray(buffer.getvalue())
    for _ in range(8):
        data[dice.randrange(min(len(data), 600))] = dice.randrange(256)
    return bytes(data)


# Labels and recipes

LABEL_FILES = {
    "empty": b"", "one": b"a", "not UTF-8": b"\xff\xfe" * 100, "UTF-16": "a\n".encode("utf-16"), "NULs": bytes(1000),
    "escapes": EVIL.encode() * 1000, "empty lines": b"\n" * 1000 + b"a", "one long line": b"a" * 10**7, "a million": b"a\n" * 10**6,
    "too large": b"a" * (17 * 10**6), "carriage returns": b"a\r" * 500, "separators": "\u2028".join("abc").encode(),
}  # fmt: skip
RECIPES: dict[str, bytes] = {
    "empty": b"", "no TOML": b"{", "deep": b"a = " + b"[" * 10**5, "deep tables": b"[" + b"a." * 10**4 + b"a]", "not UTF-8": b"\xff",
    "rules a number": b"rules = 5", "rules of numbers": b"rules = [1]", "rules of lists": b"rules = [[1]]", "rule without use": b"[[rules]]\nkinds = ['conv']",
    "use a list": b"[[rules]]\nuse = []", "use a table": b"[[rules]]\nuse = {a = 1}", "kinds a number": b"[[rules]]\nuse = 'float'\nkinds = 5",
    "kinds of lists": b"[[rules]]\nuse = 'float'\nkinds = [[1]]", "kinds text": b"[[rules]]\nuse = 'float'\nkinds = 'conv'",
    "modules a number": b"[[rules]]\nuse = 'float'\nmodules = 5", "no regex": b"[[rules]]\nuse = 'float'\nmodules = '('",
    "large regex": b"[[rules]]\nuse = 'float'\nmodules = '((a{1,1000}){1,1000}){1,1000}'", "deep regex": b"[[rules]]\nuse = 'float'\nmodules = '" + b"(" * 10**4 + b")" * 10**4 + b"'",
    "evil name": b"name = '\\u001b'\n[[rules]]\nuse = 'x\\u001b'", "evil use": b'[[rules]]\nuse = "\\u001b[2J\\n::error::x"', "evil key": b'"\\u001b[2J\\n::error::x" = 1',
    "unknown": b"x = 1", "name a table": b"[name]\na = 1\n[[rules]]\nuse = 1", "huge number": b"rules = " + b"9" * 10**5, "date": b"rules = 1979-05-27",
    "NaN": b"rules = nan", "large": b"#" * (17 * 10**6), "twice": b"name = 'a'\nname = 'b'",
}  # fmt: skip


def with_file(sandbox: Sandbox, name: str, content: bytes, *options: str) -> Arguments:
    path = sandbox.files / name
    path.write_bytes(content)
    return (*XXS, *(str(path) if word == "{}" else word for word in options), "--out", sandbox.out)


def texts() -> Iterator[Case]:
    for name, content in LABEL_FILES.items():
        yield Case("labels", name, lambda box, c=content: with_file(box, "labels.txt", c, "--labels", "{}"))
    for name, content in RECIPES.items():
        yield Case(
            "recipe",
            name,
            lambda box, c=content: with_file(
                box, "r.toml", c, "--precision", "int8", "--recipe", "{}", "--labels", "absent"
            ),
        )


# Python files of the user's own

FACTORIES = {
    "os._exit(0)": "import os; os._exit(0)", "os._exit(1)": "import os; os._exit(1)", "GeneratorExit": "raise GeneratorExit",
    "SystemExit": "raise SystemExit(0)", "SystemExit text": f"raise SystemExit({EVIL!r})", "KeyboardInterrupt": "raise KeyboardInterrupt",
    "own": "raise Own('x')", "evil": f"raise RuntimeError({EVIL!r})", "evil name": f"raise type({'E' + EVIL!r}, (Exception,), {{}})('x')",
    "no text": "raise RuntimeError()", "no str": "raise NoStr()", "recursion": "return net()", "prints": f"print({EVIL!r} * 10**5); raise RuntimeError('x')",
    "stderr": f"import sys; sys.stderr.write({EVIL!r} * 1000); raise RuntimeError('x')", "descriptor": f"import os; os.write(1, {EVIL!r}.encode() * 1000); os.write(2, b'x'); raise RuntimeError('x')",
    "closes": "import sys; sys.stdout.close(); sys.stderr.close(); raise RuntimeError('x')", "closes descriptors": "import os; os.close(1); os.close(2); raise RuntimeError('x')",
    "None": "return None", "class": "return nn.Module", "text": "return 'x'", "empty": "return nn.Module()", "memory": "return bytearray(10**11)",
    "evil repr": "return Repr()", "other folder": "import os; os.chdir('/'); raise RuntimeError('x')", "threads": "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start(); raise RuntimeError('x')",
    "syntax": "return (", "killed": "import os; os.kill(os.getpid(), 9)", "aborts": "import os; os.abort()", "group": "raise ExceptionGroup('x', [ValueError('y')])",
    "no state": "m = nn.Linear(2, 2); m.state_dict = None; return m", "evil preprocessing": "m = nn.Conv2d(3, 4, 3); m.preprocessing = Repr(); return m",
    "list output": "return Odd([1])", "evil output": f"return Odd({{{EVIL!r}: torch.zeros(1, 2)}})", "generator": "return Odd(x for x in 'a')", "integers": "return Odd(torch.zeros(1, 2, dtype=torch.int64))",
}  # fmt: skip
FILE = """
import torch
from torch import nn
class Own(BaseException): pass
class NoStr(Exception):
    def __str__(self): raise ValueError('no')
class Repr:
    def __repr__(self): return {evil!r}
class Odd(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output, self.layer = output, nn.Linear(2, 2)
    def forward(self, x): return self.output
def net():
    {body}
"""


def factory(sandbox: Sandbox, body: str) -> Arguments:
    path = sandbox.files / "model.py"
    path.write_text(FILE.format(evil=EVIL, body=body), errors="surrogateescape")
    return ("--to", "onnx", "--model", f"{path}:net", "--image-size", "32", "--out", sandbox.out)


def factories() -> Iterator[Case]:
    codes = {"killed": frozenset({-9}), "aborts": CRASHED, "KeyboardInterrupt": frozenset({2, 130})}
    codes |= {"evil preprocessing": HARMLESS, "evil output": HARMLESS}
    for name, body in FACTORIES.items():
        yield Case("factory", name, lambda box, b=body: factory(box, b), codes.get(name, REFUSED))


# Records

RECORDS = {
    "accuracy": "golden/accuracy.json", "latency": "golden/latency.json",
}  # fmt: skip
VALUES: dict[str, Any] = {
    "null": None, "escapes": EVIL, "markup": "<script>alert(1)</script>|`x`\n# y", "a list": [[1]], "an object": {"a": 1}, "true": True,
    "negative": -1, "huge": 10**30, "NaN": float("nan"), "digits": 10**4000, "empty": "", "long": "x" * 10**5, "zero": 0,
}  # fmt: skip
FORMATS = (("--format", "markdown"), ("--format", "junit"), ("--format", "html", "-o"))
PARITY = {
    "status": "pass",
    "artifacts": [
        {
            "path": "x", "format": "onnx", "precision": "fp32", "status": "pass", "reason": "", "runtime": "onnxruntime", "against": "pytorch",
            "inputs": 9, "metrics": {"max_abs": 1e-6, "max_rel": 1e-6, "psnr_db": 120.0, "cosine": 1.0, "kl": 0.0, "top1_agreement": 1.0, "top5_agreement": 1.0},
            "tolerance": {"psnr_db": 100, "max_rel": 1e-5, "cosine": 0.99, "kl": 1e-8, "reason": "x"}, "note": "", "worst_case": "white",
            "overflow": None, "located": None, "device": "local",
        }
    ],
}  # fmt: skip


def record(kind: str) -> Any:
    if kind == "parity":
        return json.loads(json.dumps(PARITY))
    found = json.loads((TESTS / RECORDS[kind]).read_text())
    found["results"] = [row for row in found["results"] if row["format"] == "onnx"][:1]
    return found


def spots(data: Any, above: str = "") -> Iterator[str]:
    """Places in a record; of a list, the first."""
    pairs = data.items() if isinstance(data, dict) else list(enumerate(data))[:1] if isinstance(data, list) else ()
    for key, value in pairs:
        yield f"{above}{key}"
        yield from spots(value, f"{above}{key}.")


def report(sandbox: Sandbox, kind: str, content: str, options: tuple[str, ...]) -> Arguments:
    artifact = sandbox.artifact()
    (artifact / f"{kind}.json").write_text(content)
    page = (sandbox.out,) if options[-1] == "-o" else ()
    return ("report", artifact, *options, *page)


def mutate(sandbox: Sandbox, kind: str, place: str, value: Any, options: tuple[str, ...]) -> Arguments:
    data = record(kind)
    put(data, place, value)
    return report(sandbox, kind, json.dumps(data), options)


def rows(count: int) -> str:
    data = record("latency")
    data["results"] = data["results"] * count
    return json.dumps(data)


def reports() -> Iterator[Case]:
    """A record that is damaged is a gap of the report, which says so."""
    done = frozenset({0})
    for kind in ("parity", "latency", "accuracy"):
        for place in [*spots(record(kind))][SEED % 2 :: 2]:
            dice = rng("record", kind, place)
            for name in dice.sample(list(VALUES), 1):
                options = FORMATS[0] if dice.random() < 0.6 else FORMATS[2] if dice.random() < 0.5 else FORMATS[1]
                codes = done if "junit" not in options else HARMLESS
                yield Case(
                    "record",
                    f"{kind} {place} is {name}, {options[1]}",
                    lambda box, k=kind, p=place, n=name, o=options: mutate(box, k, p, VALUES[n], o),
                    codes,
                )
    yield from whole_records()


def whole_records() -> Iterator[Case]:
    done = frozenset({0})
    whole = {
        "empty": "",
        "deep": "[" * 10**6,
        "a list": "[]",
        "a number": "5",
        "deep objects": '{"a":' * 10**5,
        "no rows": '{"results": [], "artifacts": []}',
    }
    for name, content in whole.items():
        for kind in ("parity", "latency", "accuracy"):
            yield Case(
                "record", f"{kind} is {name}", lambda box, k=kind, c=content: report(box, k, c, FORMATS[0]), done
            )
    for options in FORMATS[::2]:
        yield Case(
            "record",
            f"3,000 rows of latency, {options[1]}",
            lambda box, o=options: report(box, "latency", rows(3000), o),
            frozenset({0, 2}),
        )
    for name, content in {
        "empty": "",
        "deep": "[" * 10**6,
        "a list": "[]",
        "text": '{"results": "x"}',
        "rows": '{"results": [5]}',
        "escapes": json.dumps({EVIL: 1}),
    }.items():
        yield Case("record", f"baseline is {name}", lambda box, c=content: baseline(box, c))


def baseline(sandbox: Sandbox, content: str) -> Arguments:
    path = sandbox.files / "baseline.json"
    path.write_text(content)
    return ("bench", sandbox.artifact(), "--baseline", path, "--budget", "0.1", "--no-roofline")


# Names that speak to a terminal or a CI

NAMES = (f"m{EVIL}", "::error::x", "-x", "[bold]x[red]", "{0}%s", "x\ty", "\udcffx", "a b;'\"$(touch x)`", "x" * 250)


def named(sandbox: Sandbox, name: str, command: str) -> Arguments:
    artifact = sandbox.artifact(name="plain")
    place = artifact.rename(artifact.with_name(name))
    data = sandbox.files / f"{name[:100]}.npz"
    arrays()(data)
    return {
        "inspect": ("inspect", place), "golden": ("verify", place, "--against", "golden"), "report": ("report", place, "--format", "markdown"),
        "junit": ("report", place, "--format", "junit"), "html": ("report", place, "-o", sandbox.out / f"{name[:100]}.html"),
        "verify": ("verify", place), "eval": ("eval", place, "--data", data, "--reference", place, "--jobs", "1"),
        "missing": ("inspect", place / "absent"), "labels": (*XXS, "--labels", place / "absent"), "weights": (*XXS, "--weights", place),
        "option": ("inspect", f"--{name}"), "variant": ("--to", "onnx", "--variant", name), "format": ("--to", name), "device": ("verify", place, "--device", f"ssh:{name}"),
        "hub": (*XXS, "--weights", f"hf:{name}"), "model": ("--to", "onnx", "--model", f"{place}/m.py:{name}"),
    }[command]  # fmt: skip


def names() -> Iterator[Case]:
    commands = (
        "inspect",
        "golden",
        "report",
        "junit",
        "html",
        "verify",
        "eval",
        "missing",
        "labels",
        "weights",
        "option",
        "variant",
        "format",
        "device",
        "hub",
        "model",
    )
    for name in NAMES:
        for command in rng("names", name).sample(commands, 6):
            yield Case("name", f"{name[:30]!a}, {command}", lambda box, n=name, c=command: named(box, n, c), HARMLESS)


def linked_record(sandbox: Sandbox, kind: str) -> Arguments:
    """A record that is a link elsewhere is replaced, not written through."""
    artifact = sandbox.artifact()
    (sandbox.files / "precious").write_text("precious")
    (artifact / f"{kind}.json").symlink_to(sandbox.files / "precious")
    return (
        ("verify", artifact, "--against", "golden")
        if kind == "parity"
        else ("bench", artifact, "--budget", "0.1", "--no-roofline")
    )


def links() -> Iterator[Case]:
    for kind in ("parity", "latency"):
        yield Case("link", f"{kind}.json leads elsewhere", lambda box, k=kind: linked_record(box, k), frozenset({0}))


def cases() -> Iterator[Case]:
    yield from npz()
    yield from pictures()
    yield from texts()
    yield from factories()
    yield from reports()
    yield from names()
    yield from links()
