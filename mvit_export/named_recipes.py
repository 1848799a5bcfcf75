"""The recipes that int8 comes with, for each format: what measured best, and where it was measured."""

from __future__ import annotations

from mvit_export.recipes import Recipe, Rule

# Latency of xxs / xs / s: ratio to the plain fp32 file, 256x256, one thread, ONNX Runtime 1.31, AMD EPYC with
# AVX512-VNNI. Part of it is the form of the graph that goes with few bits (forms/flat.py), alone 0.85 / 0.91 / 0.92.
# Digits: the 454 held-out ones at 64x64, of which fp32 has 99.78 % right.
ONNX_ACCURATE = "latency 0.75 / 0.77 / 0.74; digits 99.78 %, mean KL 9.0e-05"
ONNX_FAST = (
    "latency 0.66 [0.655, 0.660] / 0.72 [0.711, 0.725] / 0.62 [0.615, 0.632]; digits 99.78 %, mean KL 1.0e-04; "
    "also static, each slower: 1x1 and depthwise convolutions, SiLU, and linear layers in place of dynamic"
)
ONNX_SMALL = "latency 0.87 / 0.91 / 0.92; digits 99.78 %, mean KL 9.1e-05"
# The same in LiteRT 2.3 (XNNPACK), the graph being that of the fp32 file. Beside busy neighbours 0.63 / 0.50 / 0.44.
TFLITE_ACCURATE = "latency 0.67 / 0.61 / 0.52; digits 99.78 %, mean KL 2.7e-04"
TFLITE_FAST = (
    "latency 0.60 [0.596, 0.601] / 0.51 [0.504, 0.510] / 0.45 [0.450, 0.453]; digits 99.78 %, mean KL 2.8e-04; of what "
    "is left on xxs, the float products of attention take 30 % and softmax 11 %: in int8 XNNPACK has neither, and "
    "static everything takes 2 to 3 times as long as fp32"
)
TFLITE_SMALL = "latency 0.90 / 0.70 / 0.57; digits 99.78 %, mean KL 9.0e-05; needs no ranges"

RECIPES: dict[tuple[str, str], Recipe] = {
    ("onnx", "accurate"): Recipe("accurate", (Rule("dynamic", ("linear",)), Rule("weight")), ONNX_ACCURATE),
    ("onnx", "fast"): Recipe(
        "fast",
        (
            Rule("dynamic", ("linear",)),
            Rule("weight", ("conv",), r"stem\..*"),  # 3 channels: quantizing the picture takes longer than it saves
            Rule("static", ("conv",)),
            Rule("weight"),
        ),
        ONNX_FAST,
    ),
    ("onnx", "small"): Recipe("small", (Rule("weight"),), ONNX_SMALL),
    ("tflite", "accurate"): Recipe(
        "accurate", (Rule("static", ("linear", "conv", "conv1x1")), Rule("weight")), TFLITE_ACCURATE
    ),
    ("tflite", "fast"): Recipe(
        "fast",
        (Rule("static", ("linear", "conv", "conv1x1", "depthwise", "activation", "elementwise")),),
        TFLITE_FAST,
    ),
    ("tflite", "small"): Recipe(
        "small", (Rule("dynamic", ("linear", "conv", "conv1x1")), Rule("weight")), TFLITE_SMALL
    ),
    ("coreml", "accurate"): Recipe("accurate", (Rule("static", ("linear", "conv", "conv1x1")), Rule("weight"))),
    ("coreml", "fast"): Recipe(
        "fast",
        (Rule("static", ("linear", "conv", "conv1x1", "depthwise", "attention")), Rule("weight")),
        "every product in int8; its speed takes a device to measure",
    ),
    ("coreml", "small"): Recipe("small", (Rule("weight"),)),
}
