"""The recipes that int8 comes with, for each format: what measured best, and where it was measured."""

from __future__ import annotations

from mvit_export.recipes import Recipe, Rule

RECIPES: dict[tuple[str, str], Recipe] = {
    ("onnx", "accurate"): Recipe("accurate", (Rule("dynamic", ("linear",)), Rule("weight"))),
    ("onnx", "fast"): Recipe(
        "fast",
        (
            Rule("dynamic", ("linear",)),
            Rule("weight", ("conv",), r"stem\..*"),
            Rule("static", ("conv",)),
            Rule("weight"),
        ),
    ),
    ("onnx", "small"): Recipe("small", (Rule("weight"),)),
    ("tflite", "accurate"): Recipe("accurate", (Rule("static", ("linear", "conv", "conv1x1")), Rule("weight"))),
    ("tflite", "fast"): Recipe(
        "fast", (Rule("static", ("linear", "conv", "conv1x1", "depthwise", "activation", "elementwise")),)
    ),
    ("tflite", "small"): Recipe("small", (Rule("dynamic", ("linear", "conv", "conv1x1")), Rule("weight"))),
    ("coreml", "accurate"): Recipe("accurate", (Rule("static", ("linear", "conv", "conv1x1")), Rule("weight"))),
    ("coreml", "fast"): Recipe(
        "fast",
        (Rule("static", ("linear", "conv", "conv1x1", "depthwise", "attention")), Rule("weight")),
        "every product in int8; its speed takes a device to measure",
    ),
    ("coreml", "small"): Recipe("small", (Rule("weight"),)),
}
