"""The names of MobileViT's variants, without torch."""

VARIANT_NAMES = ("xxs", "xs", "s")
CUSTOM = "custom"  # the variant of a checkpoint of ours whose sizes match none of the three
