"""What a format is made of. A row holds data and small functions on it; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mvit_export.formats.recipes import Recipe

PLAIN = "plain"  # the form of the network as it was written


@dataclass(frozen=True)
class Tolerance:
    """Bounds on `Metrics`: psnr_db and cosine from below, the others from above. `reason` says why these.

    mean_kl and delta_p catch a collapse of confidence that the argmax hides. max_of_spread: an error of a tenth of what
    the input changes at all is not rounding, however small next to an offset that every output shares.
    """

    psnr_db: float
    max_rel: float
    cosine: float
    kl: float
    reason: str
    max_of_spread: float = 0.1
    mean_kl: float | None = None
    delta_p: float | None = None


# Apple's guidance for Core ML conversions asks for more than 70 dB in fp32 and 50 dB in fp16.
SAME_ARITHMETIC = Tolerance(100, 1e-5, 1 - 1e-8, 1e-8, "same arithmetic; only the order of sums differs")


def half_precision(reason: str) -> Tolerance:
    """The bounds of fp16, which are the same in every format."""
    return Tolerance(50, 2e-2, 1 - 1e-4, 1e-3, reason)


@dataclass(frozen=True)
class Precision:
    """One precision of one format."""

    name: str
    bits: int  # of a weight, where it has the fewest bits
    tolerance: Tolerance
    calibrated: bool = False  # static: the ranges of activations come from calibration
    with_recipe: bool = False  # a recipe chooses its parts
    least: Any = None  # the first value of the format's version option (opset, deployment target) that has it

    @property
    def full(self) -> bool:
        """Whether it keeps all that parity requires. The others lose bits, and may be checked on calibration data."""
        return self.bits >= 16


Choose = Callable[[Any, Precision, str | None], Any]


@dataclass(frozen=True)
class Option:
    """An export option that only some formats have, a field of Target.

    `choose` receives what was asked for (None or False if nothing), the precision and the requested form; it returns
    the value, or raises UsageError. The rest is what a file with this option is called and needs.
    """

    choose: Choose
    tag: str = ""  # at the end of the artifact's name
    suffix: str | None = None  # of the file, in place of the format's
    packages: Mapping[str, str] = field(default_factory=dict)


def as_asked(asked: Any, _precision: Precision, _form: str | None) -> Any:
    """The `choose` of an option that fits every precision and form."""
    return asked


@dataclass(frozen=True, eq=False)
class Format:
    """One row of `FORMATS`: all that the program knows about a format besides its converter and its reader.

    The first precision, form and runtime are the defaults. `converter` and `reader` name the modules, imported when
    they are used.
    """

    name: str  # as users write it; also the name of the extra that installs its packages
    title: str
    suffix: str
    packages: Mapping[str, str]  # distribution: module, of what writing needs
    converter: str  # `convert(conversion, path)`
    reader: str  # see readers/inspect.py, checks/layers.py and benchmarks/harness/roofline.py for its functions
    precisions: Mapping[str, Precision]
    recipes: Mapping[str, Recipe]
    runtimes: tuple[str, ...]  # by the runner's names
    colours: tuple[str, str]  # in a report, on light and on dark background
    marker: str  # in a drawing, by matplotlib's name, so that colour is not the only cue
    shape: str  # the same as a character
    options: Mapping[str, Option] = field(default_factory=dict)
    forms: tuple[str, ...] = (PLAIN,)  # what a MobileViT's blocks can be written as
    layouts: Mapping[str, str] = field(default_factory=dict)  # form: layout of the blocks, if the names differ
    few_bits_form: str = PLAIN  # recipes refer to the plain network's layers
    max_sizes: int = 1  # image sizes that one file can declare
    one_image: bool = False  # an image input holds one image, not a batch
    distinct_labels: bool = False  # the file tells classes apart by their labels
    classifier_outputs: tuple[str, ...] = ()  # names of outputs that a file with labels adds
    needs_macos: bool = False  # its own runtime exists only on macOS, so it can be timed nowhere else
    work: int = 1  # how long converting takes relative to other formats; the longest starts first

    def layout(self, form: str) -> str:
        """Which layout of MobileViT's blocks a form's name refers to."""
        return self.layouts.get(form, form)


def by_name(*precisions: Precision) -> dict[str, Precision]:
    return {precision.name: precision for precision in precisions}


def recipes_by_name(*recipes: Recipe) -> dict[str, Recipe]:
    return {recipe.name: recipe for recipe in recipes}
