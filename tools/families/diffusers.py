"""Tiny models of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from families import Family


def families() -> Iterator[Family]:
    yield Family("diffusers", "hunyuan_video_15 (HunyuanVideo-1.5)", _hunyuan, "convolution over latents", "rotary")
    yield Family("diffusers", "flux", _flux, "packed latents", "rotary", refused=True)


def _hunyuan() -> Any:
    import diffusers

    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=16,
        text_embed_2_dim=12,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
    )


def _flux() -> Any:
    import diffusers

    return diffusers.FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
