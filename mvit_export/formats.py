"""The formats that can be asked for, in one table: what each is called, may hold, and takes by way of options."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mvit_export.errors import MissingDependencyError, UsageError


@dataclass(frozen=True)
class Format:
    """One row of `FORMATS`; the first precision is the default."""

    name: str
    title: str
    suffix: str
    precisions: tuple[str, ...]
    packages: Mapping[str, str] = field(hash=False)  # distribution: module; what writing takes, the extra's contents
    options: tuple[str, ...] = ()  # export options that only some formats take
    max_sizes: int = 1  # image sizes that one file can declare
    forms: tuple[str, ...] = ("plain",)  # what a MobileViT's blocks can be written as; the first is the default


# fmt: off
FORMATS = {
    "coreml": Format(
        "coreml", "Core ML", ".mlpackage",
        ("fp16", "fp32", "int8-weight", "int8", "int4-weight", "palette8", "palette6", "palette4"),
        {"torch": "torch", "coremltools": "coremltools"}, ("deployment_target",),
        max_sizes=128,  # Apple's guide on flexible inputs
        forms=("plain", "channels"),
    ),
    "onnx": Format(
        "onnx", "ONNX", ".onnx", ("fp32", "fp16", "int8-weight", "int8-dynamic", "int8", "int4-weight"),
        {"torch": "torch", "onnx": "onnx", "onnxscript": "onnxscript"}, ("opset", "dynamic_batch", "ort"),
        forms=("flat", "plain"),
    ),
    "tflite": Format(
        "tflite", "TFLite", ".tflite",
        ("fp32", "fp16", "int8-weight", "int8-dynamic", "int8", "int16", "int4-weight"),
        {"torch": "torch", "litert-torch": "litert_torch", "ai-edge-litert": "ai_edge_litert",
         "ai-edge-quantizer": "ai_edge_quantizer"},
        forms=("patches", "winograd", "channels", "plain"),
    ),
}
# fmt: on
CALIBRATED = ("int8", "int16")  # static: the ranges of activations come from calibration
FULL = ("fp32", "fp16")  # the others lose bits, and may be checked on calibration pictures
WITH_RECIPE = ("int8",)  # whose parts a recipe chooses
OPSETS = (18, 19, 20, 21, 22, 23)
OPSET_LEAST = {"int4-weight": 21}  # which brought 4-bit tensors
DEPLOYMENT_TARGETS = ("iOS15", "iOS16", "iOS17", "iOS18", "iOS26")
# coremltools: linear constants came with iOS16, int8 activations with 17, blocks of 4 bits and scaled palettes with 18.
DEPLOYMENT_LEAST = {
    "int8-weight": "iOS16", "palette8": "iOS18", "palette6": "iOS18", "palette4": "iOS18", "int8": "iOS17",
    "int4-weight": "iOS18",
}  # fmt: skip
FORM_DEPLOYMENT_LEAST = {"channels": "iOS16"}  # pixel_unshuffle
DEFAULT_RECIPE = "accurate"
PLAIN = "plain"  # the form of the network as it was written
FEW_BIT_FORMS = {"onnx": "flat"}  # recipes speak of the plain network's layers elsewhere
INPUT_KINDS = ("tensor", "image")
ORT_SUFFIX = ".ort"  # ONNX Runtime's own files, which it writes after optimizing a graph


@dataclass(frozen=True)
class Target:
    """One file to make: a format in a precision, with the options of that format."""

    format: str
    precision: str
    input: str = "tensor"
    opset: int | None = None  # ONNX only
    dynamic_batch: bool = False  # ONNX only
    ort: bool = False  # ONNX only: as ONNX Runtime's own file
    deployment_target: str | None = None  # Core ML only
    recipe: str | None = None  # its name, where the precision takes one
    form: str | None = None  # the one that was asked for, if any; the manifest says which it became

    @property
    def name(self) -> str:
        """The artifact's directory name, e.g. `coreml-fp16`, `tflite-int8-fast`, `onnx-fp32-plain-ort`."""
        recipe = f"-{self.recipe}" if self.recipe not in (None, DEFAULT_RECIPE) else ""
        form = f"-{self.form}" if self.form not in (None, self.default_form) else ""
        return f"{self.format}-{self.precision}{recipe}{form}{'-ort' if self.ort else ''}"

    @property
    def suffix(self) -> str:
        """Of the model's file name."""
        return ORT_SUFFIX if self.ort else FORMATS[self.format].suffix

    @property
    def packages(self) -> Mapping[str, str]:
        """distribution: module of what writing takes."""
        return {**FORMATS[self.format].packages, **({"onnxruntime": "onnxruntime"} if self.ort else {})}

    @property
    def default_form(self) -> str:
        """What a MobileViT is written as where nothing was asked for."""
        if self.precision in FULL:
            return FORMATS[self.format].forms[0]
        return FEW_BIT_FORMS.get(self.format, PLAIN)


def choose(value: str, choices: Iterable[str], *, what: str) -> str:
    """`value` if it is one of `choices`, ignoring case; else an error with the list and the nearest match."""
    names = list(choices)
    by_fold = {name.casefold(): name for name in names}
    if value.casefold() in by_fold:
        return by_fold[value.casefold()]
    near = difflib.get_close_matches(value.casefold(), by_fold, n=1)
    hint = f"; did you mean {by_fold[near[0]]}?" if near else ""
    raise UsageError(f"{what} {value!r} is not known, expected one of {', '.join(names)}{hint}")


def split_list(values: str | Sequence[str]) -> tuple[str, ...]:
    """`"a,b"` or `["a", "b,c"]` -> names in order, without repeats."""
    parts = [values] if isinstance(values, str) else values
    return tuple(dict.fromkeys(name.strip() for part in parts for name in part.split(",") if name.strip()))


def plan_targets(
    to: str | Sequence[str],
    *,
    precision: str | Sequence[str] | None = None,
    input: str = "tensor",
    opset: int | None = None,
    dynamic_batch: bool = False,
    ort: bool = False,
    deployment_target: str | None = None,
    recipe: str | None = None,
    form: str | None = None,
) -> tuple[Target, ...]:
    """Turn what a user asked for into targets, refusing every impossible combination before any work.

    `precision` None means each format's default. Options of one format are refused when it is not among the targets.
    """
    names = split_list(to)
    if "all" in names:
        names = tuple(FORMATS)
    formats = [FORMATS[choose(name, [*FORMATS, "all"], what="format")] for name in names]
    if not formats:
        raise UsageError(f"--to names no format, expected one or more of {', '.join(FORMATS)}, or all")
    given = {"opset": opset, "dynamic_batch": dynamic_batch, "ort": ort, "deployment_target": deployment_target}
    check_format_options(formats, given)
    if opset is not None and opset not in OPSETS:
        raise UsageError(f"--opset is {opset}, expected {OPSETS[0]} to {OPSETS[-1]}")
    if deployment_target is not None:
        deployment_target = choose(deployment_target, DEPLOYMENT_TARGETS, what="deployment target")
    input = choose(input, INPUT_KINDS, what="input kind")
    if recipe is not None and not set(split_list(precision or ())) & set(WITH_RECIPE):
        raise UsageError(f"--recipe is for --precision {', '.join(WITH_RECIPE)}; the others have one way each")
    targets = []
    for fmt in formats:
        wanted = split_list(precision) if precision else fmt.precisions[:1]
        for p in [choose(name, fmt.precisions, what=f"{fmt.title} precision") for name in wanted]:
            chosen = None if form is None else choose_form(form, fmt, p)
            targets.append(
                Target(
                    fmt.name,
                    p,
                    input,
                    opset=choose_opset(opset, p) if fmt.name == "onnx" else None,
                    dynamic_batch=dynamic_batch and fmt.name == "onnx",
                    ort=fmt.name == "onnx" and choose_ort(ort, p),
                    deployment_target=choose_deployment(deployment_target, p, chosen) if fmt.name == "coreml" else None,
                    recipe=(recipe or DEFAULT_RECIPE) if p in WITH_RECIPE else None,
                    form=chosen,
                )
            )
    return tuple(targets)


def choose_form(asked: str, fmt: Format, precision: str) -> str:
    """The form that was asked for. Refuses one that the format has not, or that fewer bits were not tried in."""
    form = choose(asked, fmt.forms, what=f"{fmt.title} form")
    if precision not in FULL:
        raise UsageError(f"--form is for {' and '.join(FULL)}, not for {precision}, whose form is fixed; leave it out")
    return form


def choose_ort(asked: bool, precision: str) -> bool:
    """Refuses what an optimized file would not hold: fewer bits are computed back to floats, fp16 on x86 to fp32."""
    if asked and precision != "fp32":
        raise UsageError(f"--ort is for fp32, optimizing takes {precision} back to fp32; use --precision fp32")
    return asked


def choose_opset(asked: int | None, precision: str) -> int:
    """The opset that was asked for, else the oldest that has the precision's tensors. Refuses an older one."""
    least = OPSET_LEAST.get(precision, OPSETS[0])
    if asked is not None and asked < least:
        raise UsageError(f"--opset {asked} has no {precision}, expected {least} or later")
    return asked or least


def choose_deployment(asked: str | None, precision: str, form: str | None = None) -> str:
    """The target that was asked for, else the oldest usual one. Refuses one that lacks the operators of either."""
    needs = {precision: DEPLOYMENT_LEAST.get(precision), f"form {form}": FORM_DEPLOYMENT_LEAST.get(form or "")}
    for what, least in needs.items():
        if asked is not None and least is not None and before(asked, least):
            raise UsageError(f"--deployment-target {asked} has no {what}, expected {least} or later")
    return asked or max("iOS16", needs[precision] or "iOS16", key=DEPLOYMENT_TARGETS.index)


def before(target: str, other: str) -> bool:
    return DEPLOYMENT_TARGETS.index(target) < DEPLOYMENT_TARGETS.index(other)


def check_installed(targets: Iterable[Target]) -> None:
    """Refuse targets whose packages are absent, naming the command that brings them. Imports nothing."""
    for target in targets:
        for distribution, module in target.packages.items():
            if importlib.util.find_spec(module) is None:
                raise MissingDependencyError(
                    f"{distribution} is not installed, needed to write {FORMATS[target.format].title} files: "
                    f"pip install 'mvit-export[{target.format}]'"
                )


def check_format_options(formats: Sequence[Format], given: Mapping[str, object]) -> None:
    """Refuse an option that none of the chosen formats takes, naming the formats that do."""
    for option, value in given.items():
        takers = [f.name for f in FORMATS.values() if option in f.options]
        if value not in (None, False) and not any(option in f.options for f in formats):
            flag = "--" + option.replace("_", "-")
            chosen = ", ".join(f.name for f in formats)
            raise UsageError(f"{flag} does not apply to {chosen}; only {', '.join(takers)} takes it")


def check_size_count(targets: Iterable[Target], count: int) -> None:
    """Refuse more image sizes than one of the formats can hold in a file, naming the formats that can."""
    for fmt in dict.fromkeys(FORMATS[target.format] for target in targets):
        if count > fmt.max_sizes:
            most = "one --image-size" if fmt.max_sizes == 1 else f"at most {fmt.max_sizes} image sizes"
            takers = [f.name for f in FORMATS.values() if f.max_sizes >= count]
            hint = f"; {', '.join(takers)} takes several" if takers else ""
            raise UsageError(f"{fmt.title} takes {most}, {count} given{hint}")


def parse_size(text: str) -> tuple[int, int]:
    """`"256"` or `"240x272"` (height x width) -> (height, width) in pixels."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--image-size is {text!r}, expected N or HxW in pixels, such as 256 or 240x320")
    return int(parts[0]), int(parts[-1])


def parse_shape(text: str) -> tuple[int, ...]:
    """`"1,3,224,224"` -> (1, 3, 224, 224)."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--input-shape is {text!r}, expected positive numbers with commas, such as 1,3,224,224")
    return tuple(int(part) for part in parts)
