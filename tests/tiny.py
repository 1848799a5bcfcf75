"""A MobileViT, small for many quick tests; a user's own model file (`--model tests/tiny.py:tiny`)."""

from helpers import randomize  # a neighbour: the folder of a model file is on the path

from mvit_export.data.preprocessing import Preprocessing
from mvit_export.families.mobilevit.network import MobileViT, MobileViTConfig

CONFIG = MobileViTConfig(
    stem=8, stages=(8, 8, 16, 16, 16), widths=(16, 16, 16), head=32, expansion=2, dropout=0.0, num_classes=10
)
DEPTHS = (1, 2, 1)  # encoders of the three blocks
SEED = 2


def tiny() -> MobileViT:
    """10 classes; a BGR checkpoint with mean and std, at 64x64. Conversions take time by the layer, so it has few."""
    model = MobileViT(CONFIG)
    for stage, depth in zip(model.stages[2:], DEPTHS, strict=True):
        stage[1].encoders = stage[1].encoders[:depth]
    randomize(model, seed=SEED)
    model.preprocessing = Preprocessing(
        "BGR", crop=(64, 64), mean=(0.4, 0.45, 0.5), std=(0.2, 0.25, 0.3), source="tests"
    )
    return model


def returns_nothing() -> None:
    """A factory with a mistake."""


def raises() -> MobileViT:
    raise RuntimeError("no such backbone\nsecond line")
