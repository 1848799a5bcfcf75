"""What config.json must say in the folders of a MobileViT, Hugging Face's and timm's."""

from __future__ import annotations

from typing import Any

from mvit_export.families.mobilevit.network import EPS, HEADS, MobileViTConfig
from mvit_export.models.settings import Json, check_fields, check_one_of_n, section


def check_hf_config(values: Json, config: MobileViTConfig) -> None:
    """config.json of transformers: every field that changes the network must match ours."""
    channels = [config.stem, *config.stages, config.head]
    accepted: dict[str, tuple[Any, ...]] = {
        "model_type": ("mobilevit",),
        "num_channels": (3,),
        "hidden_sizes": (list(config.widths),),
        "neck_hidden_sizes": (channels,),
        "expand_ratio": (config.expansion,),
        "num_attention_heads": (HEADS,),
        "mlp_ratio": (2,),
        "hidden_act": ("silu", "swish"),
        "conv_kernel_size": (3,),
        "patch_size": (2, [2, 2]),
        "layer_norm_eps": (EPS,),
        "qkv_bias": (True,),
        "output_stride": (32, 16, 8),
    }
    check_fields("config.json", values, accepted)
    check_one_of_n(values)


def check_timm_config(values: Json, config: MobileViTConfig, variant: str) -> None:
    """config.json of timm: the architecture must be ours, with nothing else changed by arguments."""
    accepted: dict[str, tuple[Any, ...]] = {
        "architecture": (f"mobilevit_{variant}",),
        "num_classes": (config.num_classes,),
        "global_pool": ("avg",),
    }
    check_fields("config.json", values, accepted)
    arguments = section(values, "model_args")
    check_fields("config.json", arguments, {key: accepted.get(key, ()) for key in arguments}, within="model_args.")
