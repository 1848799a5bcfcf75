"""TFLite: what it can hold, how close its files are to PyTorch, and what measured best."""

from __future__ import annotations

from mvit_export.formats.base import (
    SAME_ARITHMETIC,
    Format,
    Precision,
    Tolerance,
    by_name,
    half_precision,
    recipes_by_name,
)
from mvit_export.formats.recipes import Recipe, Rule

# Measured as in formats/onnx.py.
# fmt: off
WEIGHTS_8 = Tolerance(
    24, 0.15, 0.99, 0.05, "weights have 8 bits: 27.6 dB on a white picture, unlike all training data", 0.3, 0.02, 0.1
)
DYNAMIC_8 = Tolerance(
    24, 0.15, 0.99, 0.05, "weights and inputs of products have 8 bits: 27.8 dB", 0.3, 0.02, 0.1
)
STATIC_8 = Tolerance(
    20, 0.25, 0.99, 0.1, "weights and activations have 8 bits: 23.8 dB, 0.54 of what the input changes, on the tiny "
    "network; on held-out digits the top class's probability changes by up to 0.11", 0.8, 0.02, 0.2
)
STATIC_16 = Tolerance(
    30, 0.1, 0.995, 0.05, "weights have 8 bits, activations 16: 39.5 dB on calibration's own pictures", 0.3, 0.02, 0.1
)
WEIGHTS_4 = Tolerance(
    18, 0.35, 0.96, 0.1, "weights of linear layers have 16 values, the others 8 bits: 21.3 dB", 0.8, 0.05, 0.15
)
# fmt: on

# Measured as in formats/onnx.py, in LiteRT 2.3 (XNNPACK), with the graph of the fp32 file. On a machine with busy
# neighbours 0.63 / 0.50 / 0.44.
ACCURATE = Recipe(
    "accurate",
    (Rule("static", ("linear", "conv", "conv1x1")), Rule("weight")),
    "latency 0.67 / 0.61 / 0.52; digits 99.78 %, mean KL 2.7e-04",
)
FAST = Recipe(
    "fast",
    (Rule("static", ("linear", "conv", "conv1x1", "depthwise", "activation", "elementwise")),),
    "latency 0.60 [0.596, 0.601] / 0.51 [0.504, 0.510] / 0.45 [0.450, 0.453]; digits 99.78 %, mean KL 2.8e-04; of what "
    "is left on xxs, the float products of attention take 30 % and softmax 11 %: in int8 XNNPACK has neither, and "
    "static everything takes 2 to 3 times as long as fp32",
)
SMALL = Recipe(
    "small",
    (Rule("dynamic", ("linear", "conv", "conv1x1")), Rule("weight")),
    "latency 0.90 / 0.70 / 0.57; digits 99.78 %, mean KL 9.0e-05; needs no ranges",
)

TFLITE = Format(
    name="tflite",
    title="TFLite",
    suffix=".tflite",
    packages={
        "torch": "torch",
        "litert-torch": "litert_torch",
        "ai-edge-litert": "ai_edge_litert",
        "litert-quantizer": "litert_quantizer",
    },
    converter="mvit_export.converters.tflite.convert",
    reader="mvit_export.readers.tflite",
    precisions=by_name(
        Precision("fp32", 32, SAME_ARITHMETIC),
        Precision("fp16", 16, half_precision("weights have 11 significant bits, sums stay fp32")),
        Precision("int8-weight", 8, WEIGHTS_8),
        Precision("int8-dynamic", 8, DYNAMIC_8),
        Precision("int8", 8, STATIC_8, calibrated=True, with_recipe=True),
        Precision("int16", 8, STATIC_16, calibrated=True),
        Precision("int4-weight", 4, WEIGHTS_4),
    ),
    recipes=recipes_by_name(ACCURATE, FAST, SMALL),
    runtimes=("litert",),
    colours=("#c04a00", "#ff9a57"),
    marker="s",
    shape="■",
    forms=("patches", "winograd", "channels", "plain"),
    layouts={"channels": "channels-last"},
    work=3,
)
