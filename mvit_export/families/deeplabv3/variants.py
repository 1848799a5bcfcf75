"""The names of DeepLabV3's variants, outputs and classes, and how a checkpoint is known, without torch."""

from collections.abc import Iterable

from mvit_export.families.mobilevit.variants import VARIANT_NAMES as BACKBONES

PREFIX = "deeplabv3-"
VARIANT_NAMES = tuple(f"{PREFIX}{backbone}" for backbone in BACKBONES)

# What a network returns: scores of every class (B, K, H, W) at the picture's size; the same at the size of the map
# that they are computed on, (B, K, h, w), 16 times smaller; or the best class of every pixel, (B, H, W) int32.
SCORES, COARSE, LABELS = OUTPUTS = ("scores", "coarse", "labels")

# PASCAL VOC 2012's segmentation classes, in the order of their indices.
VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

MARKS = ("seg_head", "segmentation_head")  # modules that a segmenter's checkpoint has


def claims(names: Iterable[str]) -> bool:
    """Whether a checkpoint with these names of weights is a segmenter's, behind any prefix."""
    return any(part in MARKS for name in names for part in name.split("."))
