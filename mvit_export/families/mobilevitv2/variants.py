"""The names of MobileViTv2's variants, without torch: the width multiplier behind "v2-"."""

VARIANT_NAMES = ("v2-0.5", "v2-0.75", "v2-1.0", "v2-1.25", "v2-1.5", "v2-1.75", "v2-2.0")
CUSTOM = "v2-custom"  # the variant of a checkpoint of ours whose sizes match none of them


def file_name(variant: str) -> str:
    """How files and folders are called: "v2-0.5" -> "mobilevitv2_050", as timm counts the width in hundredths."""
    width = variant.removeprefix("v2-")
    return f"mobilevitv2_{width if variant == CUSTOM else f'{round(100 * float(width)):03d}'}"
