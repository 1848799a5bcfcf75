"""Checkpoints and the settings beside them: pickles with code, bombs, headers that lie, JSON of every kind."""

from __future__ import annotations

import functools
import io
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from attack import Arguments, Case, Sandbox, rng
from safetensors.torch import save

CALLS = {
    "os.system": "touch {canary}/ran", "builtins.eval": "open('{canary}/ran', 'w')",
    "builtins.exec": "open('{canary}/ran', 'w')", "builtins.open": "{canary}/ran",
    "subprocess.getoutput": "touch {canary}/ran", "pathlib.Path": "{canary}/ran",
    "torch.load": "{canary}/ran", "torch.hub.load": "{canary}", "runpy.run_path": "{canary}/ran",
    "torch._utils._rebuild_tensor_v2": "x", "collections.OrderedDict": "x", "torch.storage._load_from_bytes": "x",
    "importlib.import_module": "antigravity",
}  # fmt: skip


def pickled(function: str, argument: str) -> bytes:
    """A pickle that calls `module.function(argument)`, by hand: no such object is needed."""
    module, _, name = function.rpartition(".")
    text = argument.encode()
    return (
        b"\x80\x02" + b"c" + module.encode() + b"\n" + name.encode() + b"\n"
        + b"X" + struct.pack("<I", len(text)) + text + b"\x85R."
    )  # fmt: skip


def in_archive(content: bytes, **others: bytes) -> bytes:
    """As torch writes it: a zip file with data.pkl."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("archive/data.pkl", content)
        packed.writestr("archive/version", "3\n")
        packed.writestr("archive/byteorder", "little")
        for name, data in others.items():
            packed.writestr(f"archive/data/{name}", data)
    return buffer.getvalue()


def torch_bytes(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def header(tensors: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": list(offsets)}


HEADERS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: header(b"{}"), "a list": lambda: header(b"[1]"), "null": lambda: header(b"null"),
    "no JSON": lambda: header(b"{" * 50), "deep": lambda: header(b'{"a":' * 10**5),
    "long header": lambda: header(b"{}", length=2**62), "header past the end": lambda: header(b"{}", length=10**6),
    "header of a gigabyte": lambda: header(b"{}", length=10**9), "minus one": lambda: header(b"{}", length=2**64 - 1),
    "overlapping": lambda: header({"a": entry(), "b": entry()}, bytes(8)),
    "a gap": lambda: header({"a": entry(), "b": entry(offsets=(16, 24))}, bytes(24)),
    "past the end": lambda: header({"a": entry(offsets=(0, 800))}, bytes(8)),
    "backwards": lambda: header({"a": entry(offsets=(8, 0))}, bytes(8)),
    "negative": lambda: header({"a": entry(offsets=(-8, 0))}, bytes(8)),
    "huge shape": lambda: header({"a": entry(shape=(2**62, 2**62))}, bytes(8)),
    "huge product": lambda: header({"a": entry(shape=(2**32, 2**32))}, bytes(8)),
    "text shape": lambda: header({"a": entry(shape="x")}, bytes(8)), "no such type": lambda: header({"a": entry("X9")}, bytes(8)),
    "evil type": lambda: header({"a": entry("\x1b[2J")}, bytes(8)), "trailing data": lambda: header({"a": entry()}, bytes(80)),
    "truncated data": lambda: header({"a": entry()}, bytes(4)), "NUL name": lambda: header({"\0": entry()}, bytes(8)),
    "evil name": lambda: header({"\x1b[2J\n::error::x": entry()}, bytes(8)),
    "long name": lambda: header({"x" * 10**6: entry()}, bytes(8)),
    "metadata of lists": lambda: header({"__metadata__": [1], "a": entry()}, bytes(8)),
    "metadata of numbers": lambda: header({"__metadata__": {"a": 1}, "a": entry()}, bytes(8)),
    "our metadata": lambda: header({"__metadata__": {"mvit-export": "[" * 10**5}, "a": entry()}, bytes(8)),
    "many tensors": lambda: header({f"t{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(50_000)}),
    "not UTF-8": lambda: header(b'{"\xff": 1}'), "twice the name": lambda: header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
}  # fmt: skip
SHARED = torch.zeros(4)
FILES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"", "NULs": lambda: bytes(100), "html": lambda: b"<html>", "lfs": lambda: b"version https://git-lfs",
    "an empty zip": lambda: b"PK\x05\x06" + bytes(18), "a zip without a pickle": lambda: zip_of({"a": b"b"}),
    "recursive": lambda: torch_bytes(recursive()), "a number": lambda: torch_bytes(5), "a list": lambda: torch_bytes([1]),
    "a module": lambda: torch_bytes(torch.nn.Linear(2, 2)), "nothing in it": lambda: torch_bytes({}),
    "evil keys": lambda: torch_bytes({"\x1b[2J\n::error::x": 1}), "odd keys": lambda: torch_bytes({(1, 2): SHARED}),
    "evil tensors": lambda: torch_bytes({"\x1b[2J\n::error::x": SHARED}),
    "sparse": lambda: torch_bytes({"a": SHARED.to_sparse()}), "complex": lambda: torch_bytes({"a": SHARED.to(torch.complex64)}),
    "quantized": lambda: torch_bytes({"a": quantized()}),
    "meta": lambda: torch_bytes({"a": SHARED.to("meta")}), "stretched": lambda: torch_bytes({"a": torch.zeros(1).expand(2**40)}),
    "shared": lambda: torch_bytes({"a": SHARED, "b": SHARED[1:]}), "old": lambda: torch_bytes({"a": SHARED}, _use_new_zipfile_serialization=False),
    "deep pickle": lambda: b"\x80\x02" + b"(" * 10**6 + b".", "deep lists": lambda: b"\x80\x02" + b"]" + b"]a" * 0 + b"\x85" * 10**5 + b".",
    "a large string": lambda: b"\x80\x02X\xff\xff\xff\x7f" + b"a" * 100, "a large memo": lambda: b"\x80\x02]r\xff\xff\xff\x7f.",
    "a number of a million digits": lambda: b"\x80\x02I" + b"9" * 10**6 + b"\n.", "protocol 9": lambda: b"\x80\x09N.",
    "storage that is absent": lambda: in_archive(pickle.dumps({}, 2)),
    "wrapped often": lambda: torch_bytes(functools.reduce(lambda inner, _: {"state_dict": inner}, range(200), {"a": SHARED})),
    "wrapped in itself": lambda: torch_bytes(itself()), "weights in itself": lambda: torch_bytes(itself(a=SHARED)),
    "diamonds": lambda: torch_bytes(functools.reduce(lambda inner, _: {"a": inner, "b": inner}, range(60), {})),
}  # fmt: skip


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch gives them up
        return torch.quantize_per_tensor(SHARED, 0.1, 0, torch.qint8)


def itself(**others: Any) -> dict[str, Any]:
    content: dict[str, Any] = {**others}
    content["state_dict"] = content
    return content


def recursive() -> list[Any]:
    content: list[Any] = []
    content.append(content)
    return content


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return buffer.getvalue()


def export(sandbox: Sandbox, content: bytes, name: str = "weights.pt") -> Arguments:
    """No labels can be read, so weights that are harmless end soon as well."""
    file = sandbox.files / name
    file.write_bytes(content)
    return (
        "--to",
        "onnx",
        "--variant",
        "xxs",
        "--weights",
        file,
        "--labels",
        sandbox.files / "absent",
        "--out",
        sandbox.out,
    )


CHECKPOINTS = "mvit_export/models/checkpoints.py"
READS = {
    "shared": (f"{CHECKPOINTS}:read_pickle", f"{CHECKPOINTS}:read_checkpoint"),
    "overlapping": (f"{CHECKPOINTS}:file_kind", f"{CHECKPOINTS}:read_safetensors"),
}


def checkpoints() -> Iterator[Case]:
    for function, argument in CALLS.items():
        for name, wrap in {"bare": bytes, "in an archive": in_archive}.items():
            yield Case(
                "checkpoint",
                f"{function} {name}",
                lambda box, f=function, a=argument, w=wrap: export(box, w(pickled(f, a.format(canary=box.canary)))),
            )
    for name, make in HEADERS.items():
        yield Case(
            "checkpoint",
            f"safetensors, {name}",
            lambda box, m=make: export(box, m(), "weights.safetensors"),
            reads=READS.get(name, ()),
        )
    for name, make in FILES.items():
        yield Case("checkpoint", name, lambda box, m=make: export(box, m()), reads=READS.get(name, ()))
    for index in range(12):
        yield Case("checkpoint", f"damaged {index}", lambda box, i=index: export(box, damaged(i)))
    yield Case("checkpoint", "zip bomb", lambda box: export(box, bomb()))
    yield Case("checkpoint", "link out of a folder", linked_folder)


@functools.cache
def bomb() -> bytes:
    """8 GB of zeros."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        packed.writestr("archive/data.pkl", pickle.dumps({}, 2))
        with packed.open("archive/data/0", "w", force_zip64=True) as file:
            for _ in range(80):
                file.write(bytes(10**7))
    data = buffer.getvalue()
    return data.replace(struct.pack("<Q", 8 * 10**8), struct.pack("<Q", 8 * 10**9))


def damaged(index: int) -> bytes:
    """A file of torch's or safetensors' with bytes flipped, cut or repeated."""
    dice = rng("checkpoint", index)
    sound = {"a.weight": torch.arange(64.0).reshape(8, 8), "a.bias": torch.zeros(8)}
    data = bytearray(save(sound) if index % 2 else torch_bytes(sound))
    if index % 3 == 0:
        return bytes(data[: dice.randrange(1, len(data))])
    for _ in range(5):
        data[dice.randrange(len(data))] = dice.randrange(256)
    return bytes(data)


def linked_folder(sandbox: Sandbox) -> Arguments:
    folder = sandbox.files / "folder"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to("/dev/zero")
    return ("--to", "onnx", "--variant", "xxs", "--weights", folder, "--out", sandbox.out)


# Settings beside the weights

VALUES: dict[str, Any] = {
    "null": None, "text": "\x1b[2J\n::error::x", "a list": [[1], "x"], "an object": {"a": {"b": 1}}, "negative": -1,
    "huge": 10**30, "NaN": float("nan"), "true": True, "zero": 0, "infinite": float("inf"), "unhashable": [[]], "empty": "",
}  # fmt: skip
HF = (
    "model_type", "num_channels", "hidden_sizes", "neck_hidden_sizes", "expand_ratio", "num_attention_heads", "mlp_ratio",
    "hidden_act", "conv_kernel_size", "patch_size", "layer_norm_eps", "qkv_bias", "output_stride", "id2label",
)  # fmt: skip
PROCESSOR = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std", "do_flip_channel_order", "image_processor_type", "unknown", "\x1b[2J\n::error::x",
)  # fmt: skip
TIMM = ("architecture", "num_classes", "global_pool", "model_args", "pretrained_cfg")
TIMM_CFG = ("input_size", "crop_pct", "interpolation", "mean", "std", "crop_mode")


@functools.cache
def sound(family: str) -> bytes:
    """MobileViT's own tensors in another library's names, five classes."""
    from mvit_export.families.mobilevit.names import expected_tensors
    from mvit_export.families.mobilevit.network import create_mobilevit

    config = create_mobilevit("xxs", num_classes=5).config
    return save(
        {key: torch.zeros(want.shape, dtype=want.dtype) for key, want in expected_tensors(family, config).items()}
    )


def folder_of(sandbox: Sandbox, family: str, file: str, content: bytes) -> Arguments:
    folder = sandbox.files / "folder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(sound(family))
    (folder / file).write_bytes(content)
    return ("--to", "onnx", "--weights", folder, "--labels", sandbox.files / "absent", "--out", sandbox.out)


def settings() -> Iterator[Case]:
    fields = [("hf", "config.json", name) for name in HF]
    fields += [("hf", "preprocessor_config.json", name) for name in PROCESSOR]
    fields += [("timm", "config.json", name) for name in TIMM]
    fields += [("timm", "config.json", f"pretrained_cfg.{name}") for name in TIMM_CFG]
    for family, file, name in fields:
        for value in rng("settings", family, name).sample(list(VALUES), 1):
            yield Case(
                "settings of weights",
                f"{family} {file} {name!a} is {value}",
                lambda box, a=family, f=file, n=name, v=value: folder_of(box, a, f, with_field(n, VALUES[v])),
            )
    for file in ("config.json", "preprocessor_config.json"):
        for name, content in {
            "deep": b"[" * 10**6,
            "a list": b"[1]",
            "empty": b"",
            "not UTF-8": b"\xff",
            "digits": b'{"output_stride": ' + b"1" * 10**5 + b"}",
        }.items():
            yield Case(
                "settings of weights", f"{file} is {name}", lambda box, f=file, c=content: folder_of(box, "hf", f, c)
            )


def with_field(name: str, value: Any) -> bytes:
    outer, _, inner = name.partition(".")
    return json.dumps({outer: {inner: value} if inner else value}).encode()


def cases() -> Iterator[Case]:
    yield from checkpoints()
    yield from settings()
