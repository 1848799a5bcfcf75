"""Core ML: what it can hold, how close its packages are to PyTorch, and its recipes."""

from __future__ import annotations

from mvit_export.errors import UsageError
from mvit_export.formats.base import (
    SAME_ARITHMETIC,
    Format,
    Option,
    Precision,
    Tolerance,
    by_name,
    half_precision,
    recipes_by_name,
)
from mvit_export.formats.choices import choose
from mvit_export.formats.recipes import Recipe, Rule

DEPLOYMENT_TARGETS = ("iOS15", "iOS16", "iOS17", "iOS18", "iOS26")
USUAL = "iOS16"
FORM_LEAST = {"channels": "iOS16"}  # pixel_unshuffle


def choose_deployment(asked: str | None, precision: Precision, form: str | None) -> str:
    """The requested target, else the oldest usual one. Refuses one that lacks operators of precision or form."""
    if asked is not None:
        asked = choose(asked, DEPLOYMENT_TARGETS, what="deployment target")
    needs = {precision.name: precision.least, f"form {form}": FORM_LEAST.get(form or "")}
    for what, least in needs.items():
        if asked is not None and least is not None and before(asked, least):
            raise UsageError(f"--deployment-target {asked} has no {what}, expected {least} or later")
    return asked or max(USUAL, precision.least or USUAL, key=DEPLOYMENT_TARGETS.index)


def before(target: str, other: str) -> bool:
    return DEPLOYMENT_TARGETS.index(target) < DEPLOYMENT_TARGETS.index(other)


# Measured as in formats/onnx.py.
# fmt: off
WEIGHTS_8 = Tolerance(
    28, 0.15, 0.99, 0.05, "weights have 8 bits, sums have 11: 29.8 dB on digits", 0.4, 0.02, 0.1
)
STATIC_8 = Tolerance(
    20, 0.3, 0.98, 0.1, "weights and activations have 8 bits, symmetric: 26.1 dB on digits; 22.0 dB, 0.65 of what the "
    "input changes, on the tiny network", 0.8, 0.02, 0.2
)
PALETTE_8 = Tolerance(
    28, 0.15, 0.99, 0.05, "weights have 256 values a tensor: 32.1 dB on digits", 0.3, 0.02, 0.1
)
PALETTE_6 = Tolerance(
    22, 0.2, 0.99, 0.05, "weights of linear layers and dense convolutions have 64 values, the others 256: 31.0 dB on "
    "digits, 26.7 dB on the tiny network", 0.5, 0.02, 0.1
)
PALETTE_4 = Tolerance(
    15, 0.35, 0.96, 0.1, "weights of linear layers and dense convolutions have 16 values, the others 256: 28.2 dB on "
    "digits; 19.9 dB, 0.79 of what the input changes, on the tiny network", 1.0, 0.03, 0.15
)
WEIGHTS_4 = Tolerance(
    15, 0.4, 0.95, 0.1, "weights of linear layers and dense convolutions have 16 values, the others 8 bits: 26.3 dB on "
    "digits; 19.4 dB, 0.91 of what the input changes, on the tiny network", 1.0, 0.03, 0.15
)
# fmt: on

ACCURATE = Recipe("accurate", (Rule("static", ("linear", "conv", "conv1x1")), Rule("weight")))
FAST = Recipe(
    "fast",
    (Rule("static", ("linear", "conv", "conv1x1", "depthwise", "attention")), Rule("weight")),
    "every product in int8; its speed can only be measured on a device",
)
SMALL = Recipe("small", (Rule("weight"),))

COREML = Format(
    name="coreml",
    title="Core ML",
    suffix=".mlpackage",
    packages={"torch": "torch", "coremltools": "coremltools"},
    converter="mvit_export.converters.coreml.convert",
    reader="mvit_export.readers.coreml",
    # coremltools: linear constants came with iOS16, int8 activations with 17, blocks of 4 bits and scaled palettes 18.
    precisions=by_name(
        Precision("fp16", 16, half_precision("every intermediate has 11 significant bits")),
        Precision("fp32", 32, SAME_ARITHMETIC),
        Precision("int8-weight", 8, WEIGHTS_8, least="iOS16"),
        Precision("int8", 8, STATIC_8, calibrated=True, with_recipe=True, least="iOS17"),
        Precision("int4-weight", 4, WEIGHTS_4, least="iOS18"),
        Precision("palette8", 8, PALETTE_8, least="iOS18"),
        Precision("palette6", 6, PALETTE_6, least="iOS18"),
        Precision("palette4", 4, PALETTE_4, least="iOS18"),
    ),
    recipes=recipes_by_name(ACCURATE, FAST, SMALL),
    runtimes=("coreml",),
    colours=("#007a55", "#45cf9b"),
    marker="^",
    shape="▲",
    options={"deployment_target": Option(choose_deployment)},
    forms=("plain", "channels"),
    max_sizes=128,  # Apple's guide on flexible inputs
    one_image=True,
    distinct_labels=True,
    classifier_outputs=("classLabel", "classLabel_probs", "probabilities"),
    needs_macos=True,
    work=2,
)
