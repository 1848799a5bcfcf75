"""ONNX: what it can hold, how close its files are to PyTorch, and what measured best."""

from __future__ import annotations

from mvit_export.errors import UsageError
from mvit_export.formats.base import (
    SAME_ARITHMETIC,
    Format,
    Option,
    Precision,
    Tolerance,
    as_asked,
    by_name,
    half_precision,
    recipes_by_name,
)
from mvit_export.formats.recipes import Recipe, Rule

OPSETS = (18, 19, 20, 21, 22, 23)
ORT_SUFFIX = ".ort"  # ONNX Runtime's own files, which it writes after optimizing a graph


def choose_opset(asked: int | None, precision: Precision, _form: str | None) -> int:
    """The requested opset, else the oldest that has the precision's tensors. Refuses an older one."""
    if asked is not None and asked not in OPSETS:
        raise UsageError(f"--opset is {asked}, expected {OPSETS[0]} to {OPSETS[-1]}")
    least: int = precision.least or OPSETS[0]
    if asked is not None and asked < least:
        raise UsageError(f"--opset {asked} has no {precision.name}, expected {least} or later")
    return asked or least


def choose_ort(asked: bool, precision: Precision, _form: str | None) -> bool:
    """Refuses what an optimized file would not keep: fewer bits are turned back into floats, fp16 on x86 into fp32."""
    if asked and precision.name != "fp32":
        raise UsageError(f"--ort is for fp32, optimizing takes {precision.name} back to fp32; use --precision fp32")
    return asked


# Measured on MobileViT-XXS trained for digits, on one with random weights at 256x256, and on the tests' tiny network,
# which is the most sensitive. The worst is named; about twice its error is allowed.
# fmt: off
WEIGHTS_8 = Tolerance(
    24, 0.15, 0.99, 0.05, "weights have 8 bits: 27.7 dB on a picture unlike all training data", 0.3, 0.02, 0.1
)
DYNAMIC_8 = Tolerance(
    25, 0.15, 0.99, 0.05, "weights and inputs of linear layers have 8 bits: 27.7 dB", 0.3, 0.02, 0.1
)
STATIC_8 = Tolerance(
    27, 0.15, 0.99, 0.05, "weights and activations have 8 bits: 31.5 dB on digits calibrated by entropy, else 34 dB; "
    "0.53 of what the input changes where weights are random and pictures alike", 0.7, 0.02, 0.1
)
WEIGHTS_4 = Tolerance(
    10, 1.3, 0.65, 0.05, "weights of linear layers and dense convolutions have 16 values, the others 8 bits: 24 dB "
    "trained, 11.5 dB with random weights, whose scores lie close together; KL judges the trained", 1.0, 0.02, 0.15
)
# fmt: on

# Latency of xxs / xs / s: ratio to the plain fp32 file, 256x256, one thread, ONNX Runtime 1.31, AMD EPYC with
# AVX512-VNNI. Part of it comes from the form of the graph used with few bits (forms/flat.py), alone 0.85 / 0.91 / 0.92.
# Digits: the 454 held-out ones at 64x64, of which fp32 gets 99.78 % right.
ACCURATE = Recipe(
    "accurate",
    (Rule("dynamic", ("linear",)), Rule("weight")),
    "latency 0.75 / 0.77 / 0.74; digits 99.78 %, mean KL 9.0e-05",
)
FAST = Recipe(
    "fast",
    (
        Rule("dynamic", ("linear",)),
        Rule("weight", ("conv",), r"stem\..*"),  # 3 channels: quantizing the picture takes longer than it saves
        Rule("static", ("conv",)),
        Rule("weight"),
    ),
    "latency 0.66 [0.655, 0.660] / 0.72 [0.711, 0.725] / 0.62 [0.615, 0.632]; digits 99.78 %, mean KL 1.0e-04; "
    "also static, each slower: 1x1 and depthwise convolutions, SiLU, and linear layers in place of dynamic",
)
SMALL = Recipe("small", (Rule("weight"),), "latency 0.87 / 0.91 / 0.92; digits 99.78 %, mean KL 9.1e-05")

ONNX = Format(
    name="onnx",
    title="ONNX",
    suffix=".onnx",
    packages={"torch": "torch", "onnx": "onnx", "onnxscript": "onnxscript"},
    converter="mvit_export.converters.onnx.convert",
    reader="mvit_export.readers.onnx",
    precisions=by_name(
        Precision("fp32", 32, SAME_ARITHMETIC),
        Precision("fp16", 16, half_precision("every intermediate has 11 significant bits")),
        Precision("int8-weight", 8, WEIGHTS_8),
        Precision("int8-dynamic", 8, DYNAMIC_8),
        Precision("int8", 8, STATIC_8, calibrated=True, with_recipe=True),
        Precision("int4-weight", 4, WEIGHTS_4, least=21),  # the opset that brought 4-bit tensors
    ),
    recipes=recipes_by_name(ACCURATE, FAST, SMALL),
    runtimes=("onnxruntime",),
    colours=("#0066b3", "#62b3f5"),
    marker="o",
    shape="●",
    options={
        "opset": Option(choose_opset),
        "dynamic_batch": Option(as_asked),
        "ort": Option(choose_ort, tag="-ort", suffix=ORT_SUFFIX, packages={"onnxruntime": "onnxruntime"}),
    },
    forms=("flat", "plain"),
    few_bits_form="flat",
)
