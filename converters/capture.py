"""What every converter is given: one module with a named input, named outputs and, if asked, baked preprocessing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from mvit_export.data.calibration import Calibration
from mvit_export.data.preprocessing import Preprocessing
from mvit_export.formats.base import PLAIN
from mvit_export.formats.recipes import Recipe
from mvit_export.formats.targets import Target
from mvit_export.models.loaded import LoadedModel
from mvit_export.models.outputs import name_outputs
from mvit_export.tasks.classification import CLASSIFICATION
from mvit_export.tasks.segmentation import SEGMENTATION

INPUT_NAME = "image"
TORCH_EXPORT, JIT_TRACE = "torch.export", "torch.jit.trace"  # how a graph was captured


@dataclass(frozen=True)
class Conversion:
    """One call of a converter. `metadata` goes into the file's own metadata fields."""

    model: LoadedModel
    module: nn.Module  # the model's, with BatchNorm folded, in the form below
    target: Target
    form: str = PLAIN
    metadata: Mapping[str, str] = field(default_factory=dict)
    recipe: Recipe | None = None  # which parts lose bits, if the precision takes one
    calibration: Calibration | None = None  # if the precision is static

    def calibration_inputs(self) -> Iterator[np.ndarray]:
        """The inputs that the file is calibrated on, each of batch 1. Every call streams them again."""
        assert self.calibration is not None
        return self.calibration.pictures() if self.target.input == "image" else self.calibration.tensors()

    @property
    def labels(self) -> tuple[str, ...] | None:
        return self.model.info.labels

    @property
    def classifier(self) -> bool:
        """Whether the labels are those of one answer for the whole picture."""
        return self.labels is not None and self.model.info.task == CLASSIFICATION.name

    @property
    def segmenter(self) -> bool:
        return self.model.info.task == SEGMENTATION.name


class Exportable(nn.Module):
    """A model as it is written to a file: `image` in, a dict of named outputs out.

    With `preprocessing`, `image` is uint8 RGB (B, H, W, 3) and channel order, scale, mean and std are part of the
    graph. Outputs are float32, labels int32. With `half`, weights and arithmetic are fp16 while inputs and outputs stay
    as they are.
    """

    def __init__(
        self, conversion: Conversion, *, preprocessing: Preprocessing | None = None, half: bool = False
    ) -> None:
        super().__init__()
        model, self.names = conversion.module, conversion.model.output_names
        self.half_precision = half
        self.model = copy.deepcopy(model).half() if half else model
        self.normalise = Normalise(preprocessing) if preprocessing else nn.Identity()
        self.eval()

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.normalise(image)
        outputs = name_outputs(self.model(x.half() if self.half_precision else x), self.names)
        kept = (torch.float32, torch.int32)
        return {name: value if value.dtype in kept else value.float() for name, value in outputs.items()}


class Normalise(nn.Module):
    """`preprocessing.to_tensor` as a graph: uint8 RGB (B, H, W, 3) -> float32 (B, 3, H, W)."""

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.flip = preprocessing.channel_order == "BGR"
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        # (x / 255 - mean) / std as one multiply and add; folded in float64 so that only one rounding is left.
        self.register_buffer("scale", (1 / (255 * std.double())).float().view(1, 3, 1, 1))
        self.register_buffer("shift", (-mean.double() / std.double()).float().view(1, 3, 1, 1))
        self.shifted = any(preprocessing.mean)

    def forward(self, image: Tensor) -> Tensor:
        x = image.permute(0, 3, 1, 2).float()  # (B, 3, H, W)
        if self.flip:
            x = torch.cat((x[:, 2:3], x[:, 1:2], x[:, 0:1]), dim=1)  # slices, because not every format has `flip`
        x = x * self.scale
        return x + self.shift if self.shifted else x


def example_input(conversion: Conversion, *, batch: int | None = None) -> Tensor:
    """A random input of the first declared shape, uint8 (B, H, W, 3) where preprocessing is baked in."""
    shape = conversion.model.input_shapes[0]
    shape = (batch or shape[0], *shape[1:])
    generator = torch.Generator().manual_seed(0)
    if conversion.target.input == "image":
        b, c, h, w = shape
        return torch.randint(0, 256, (b, h, w, c), generator=generator, dtype=torch.uint8)
    return torch.rand(shape, generator=generator)


def baked_preprocessing(conversion: Conversion) -> Preprocessing | None:
    """The preprocessing that goes into the graph, or None for `--input tensor`."""
    return conversion.model.preprocessing if conversion.target.input == "image" else None
