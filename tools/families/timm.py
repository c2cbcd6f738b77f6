"""Tiny models of every timm module that has a patch embedding, and of the kinds of stem that are refused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from families import Family

VIT: dict[str, Any] = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 64}
VIT14 = {**VIT, "img_size": 56}
SWIN: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 2, 2)}
RECTANGLE = (32, 48)

# family, model, arguments that shrink it, kind of embedding, kind of positions, patch size to prove
PROVED: tuple[tuple[str, str, dict[str, Any], str, str, Any], ...] = (
    ("vision_transformer", "vit_tiny_patch16_224", VIT, "conv", "absolute, class token", RECTANGLE),
    ("vision_transformer, DINOv2", "vit_small_patch14_reg4_dinov2", VIT14, "conv", "absolute, no prefix", (21, 28)),
    ("vision_transformer, CLIP", "vit_base_patch32_clip_224", VIT, "conv", "absolute, class token", (48, 64)),
    ("vision_transformer, SigLIP", "vit_base_patch16_siglip_224", VIT, "conv", "absolute", RECTANGLE),
    ("vision_transformer, FlexiViT", "flexivit_small", VIT, "conv", "absolute, no prefix", RECTANGLE),
    ("deit", "deit_tiny_distilled_patch16_224", VIT, "conv", "absolute, two prefix tokens", RECTANGLE),
    ("deit, DeiT-3", "deit3_small_patch16_224", VIT, "conv", "absolute, no prefix", RECTANGLE),
    ("beit", "beit_base_patch16_224", VIT, "conv", "relative tables with class token", RECTANGLE),
    ("eva, EVA-02", "eva02_tiny_patch14_224", VIT14, "conv", "absolute and rotary", (21, 28)),
    ("eva, DINOv3", "vit_small_patch16_dinov3", VIT, "conv", "rotary", RECTANGLE),
    ("eva, Perception Encoder", "vit_pe_core_tiny_patch16_384", VIT, "conv", "absolute and rotary", RECTANGLE),
    ("cait", "cait_xxs24_224", VIT, "conv", "absolute", RECTANGLE),
    ("convit", "convit_tiny", {**VIT, "local_up_to_layer": 1}, "conv", "absolute and gated", RECTANGLE),
    ("convmixer", "convmixer_1024_20_ks9_p14", {}, "conv", "none", (14, 28)),
    ("crossvit", "crossvit_tiny_240", {}, "two convs", "absolute per branch", None),
    ("deepseek_vit", "deepseek_vit_412m", VIT14, "conv", "rotary", (21, 28)),
    ("fasternet", "fasternet_t0", {}, "conv", "none", (8, 12)),
    ("gemma4_vit", "gemma4_vit_167m", {**VIT, "position_embedding_size": 64}, "linear, c h w", "table per axis, rotary",
     RECTANGLE),
    ("mlp_mixer", "mixer_s32_224", {"img_size": 96}, "conv", "token mixing", (48, 64)),
    ("mlp_mixer, gMLP", "gmlp_s16_224", {"img_size": 64}, "conv", "token mixing", RECTANGLE),
    ("mlp_mixer, ResMLP", "resmlp_12_224", {"img_size": 64}, "conv", "token mixing", RECTANGLE),
    ("naflexvit", "naflexvit_base_patch16_gap", {"depth": 2, "embed_dim": 64, "num_heads": 2}, "linear, h w c",
     "absolute map", RECTANGLE),
    ("naflexvit, in place of vision_transformer", "vit_base_patch16_224", {**VIT, "use_naflex": True}, "linear, h w c",
     "absolute map", RECTANGLE),
    ("nest", "nest_tiny", {}, "conv", "absolute per block", None),
    ("pit", "pit_ti_224", {"depth": (1, 1, 1)}, "conv, kernel twice the stride", "absolute map", None),
    ("qwen3_vit", "qwen3_vit_88m", VIT, "conv", "absolute and rotary", RECTANGLE),
    ("rdnet", "rdnet_tiny", {}, "conv", "none", (8, 12)),
    ("sequencer", "sequencer2d_s", {"img_size": 56}, "conv", "recurrent", None),
    ("swin_transformer", "swin_tiny_patch4_window7_224", SWIN, "conv", "relative tables", (8, 12)),
    ("swin_transformer_v2", "swinv2_tiny_window8_256", SWIN, "conv", "relative, computed", (8, 12)),
    ("swin_transformer_v2_cr", "swinv2_cr_tiny_224", SWIN, "conv", "relative, computed", (8, 12)),
    ("tnt", "tnt_s_patch16_224", {"depth": 1, "img_size": 64}, "padded conv inside patches", "absolute, per pixel",
     RECTANGLE),
    ("tnt, legacy", "tnt_s_legacy_patch16_224", {"depth": 1, "img_size": 64}, "padded conv over the image",
     "absolute, per pixel", RECTANGLE),
    ("twins", "twins_svt_small", {"depths": (1, 1, 1, 1)}, "conv", "convolutional", None),
    ("vision_transformer_hybrid", "vit_tiny_r_s16_p8_224", {"depth": 1, "embed_dim": 64, "num_heads": 2},
     "conv after a backbone", "absolute, class token", (32, 48)),
    ("vision_transformer_relpos", "vit_relpos_small_patch16_rpn_224", VIT, "conv", "relative MLP", RECTANGLE),
    ("vision_transformer_relpos, tables", "vit_srelpos_small_patch16_224", VIT, "conv", "relative, shared", RECTANGLE),
    ("vision_transformer_sam", "samvit_base_patch16",
     {**VIT, "img_size": 128, "window_size": 3, "global_attn_indexes": (1,)}, "conv",
     "absolute map, relative per axis", RECTANGLE),
    ("volo", "volo_d1_224", {"img_size": 64}, "conv after convolutions", "absolute map", None),
)  # fmt: skip

# family, model, kind of stem: refused with a reason
REFUSED = (
    ("coat", "coat_lite_tiny", "conv, fixed later stages"),
    ("convnext", "convnext_atto", "conv, fixed total stride"),
    ("crossvit, dagger", "crossvit_9_dagger_240", "several convs per branch"),
    ("csatv2", "csatv2", "discrete cosine transform"),
    ("davit", "davit_tiny", "padded conv"),
    ("edgenext", "edgenext_xx_small", "conv, fixed"),
    ("efficientformer", "efficientformer_l1", "several convs"),
    ("efficientformer_v2", "efficientformerv2_s0", "several convs"),
    ("efficientvim", "efficientvim_m1", "several convs"),
    ("efficientvit_mit", "efficientvit_b0", "several convs"),
    ("efficientvit_msra", "efficientvit_m0", "several convs"),
    ("fastvit", "fastvit_t8", "several convs"),
    ("focalnet", "focalnet_tiny_srf", "conv, fixed"),
    ("gcvit", "gcvit_xxtiny", "several convs"),
    ("hiera", "hiera_tiny_224", "padded conv"),
    ("hieradet_sam2", "hieradet_small", "padded conv"),
    ("inception_next", "inception_next_atto", "conv, fixed"),
    ("levit", "levit_128s", "several convs"),
    ("maxxvit", "coatnet_nano_cc_224", "several convs"),
    ("metaformer", "caformer_s18", "padded conv"),
    ("mobilevit", "mobilevit_xxs", "several convs"),
    ("mvitv2", "mvitv2_tiny", "padded conv"),
    ("nextvit", "nextvit_small", "several convs"),
    ("pvt_v2", "pvt_v2_b0", "padded conv"),
    ("repvit", "repvit_m0_9", "several convs"),
    ("resnet", "resnet18", "convolutional network"),
    ("shvit", "shvit_s1", "several convs"),
    ("swiftformer", "swiftformer_xs", "several convs"),
    ("tiny_vit", "tiny_vit_5m_224", "several convs"),
    ("visformer", "visformer_tiny", "padded conv"),
    ("vitamin", "vitamin_small_224", "backbone without projection"),
    ("xcit", "xcit_nano_12_p8_224", "several convs"),
)


def families() -> Iterator[Family]:
    """One entry per family of timm."""
    for name, model, arguments, embedding, positions, patch_size in PROVED:
        yield Family("timm", name, partial(_create, model, arguments), embedding, positions, patch_size)
    for name, model, embedding in REFUSED:
        yield Family("timm", name, partial(_create, model, {}), embedding, "", refused=True)


def _create(model: str, arguments: dict[str, Any]) -> nn.Module:
    import timm

    created: nn.Module = timm.create_model(model, **arguments)
    return created
