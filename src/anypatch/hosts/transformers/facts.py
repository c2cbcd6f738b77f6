"""What departs from the default, one row per exact model type; everything else is read off the model.

A new type that begins like an old one has no row of its own until somebody has looked at it. What a plain run can tell
is not written here: ``measured.json`` is made by the coverage run (see :mod:`anypatch.hosts.transformers.probing`).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

Answer = Literal["always", "never", "sometimes"]


@dataclass(frozen=True)
class Row:
    """One model type.

    Attributes:
        refused: why models of this type cannot be adapted at all: they have patches, but not one linear map per patch.
        fixed_patch: why the patch cannot change: layers assume it, and no field of the configuration names it.
        orders: flattening order of a patch in stems and heads that are linear layers, as (tensor, order).
        relative: whether ``forward`` itself interpolates relative tables, bilinearly, for other grids.
        per_frame: whether the field that looks like a patch's time axis counts frames that are merged later.
        window_in_pixels: whether ``window_size`` is in pixels, so that it has to follow the patch.
        not_pixels: whether ``patch_size`` is about something else than pixels (bytes).
        row_major: whether patches come row by row although the model merges blocks of them.
        as_images: whether patches come as small images, not flat.
        bare: whether flattened patches come without a description of their grid.
        whole_blocks: whether what is fed is a whole merge block, channels last.
        tiles: whether the tiles of an image have an axis of their own.
        frames_as_batch: whether the frames of a clip come as images of a batch.
        needs_sizes: whether images come with their sizes although the signature does not insist on them.
        towers_alone: whether the whole rescales and cuts its input, so that only its towers can be proved.
        prompted: whether image and prompt share the height of what the model is built for.
    """

    refused: str = ""
    fixed_patch: str = ""
    orders: tuple[tuple[str, str], ...] = ()
    relative: bool = False
    per_frame: bool = False
    window_in_pixels: bool = False
    not_pixels: bool = False
    row_major: bool = False
    as_images: bool = False
    bare: bool = False
    whole_blocks: bool = False
    tiles: bool = False
    frames_as_batch: bool = False
    needs_sizes: bool = False
    towers_alone: bool = False
    prompted: bool = False


_CONVOLUTIONAL = (
    "its stages mix patches by convolutions (dwconv, 7x7), so it is a convolutional network and no Vision Transformer"
)
_GEMMA4 = Row(orders=((r"patch_embedder\.input_proj\.", "h w c"),))
_SIGLIP2 = Row(orders=((r"patch_embedding\.", "h w c"),))
_PIX2STRUCT = Row(orders=((r"patch_projection\.", "h w c"),))
_MUSE = Row(orders=((r"patch_embedd(er|ing)\.", "t c h w"),), row_major=True)
_BYTES = Row(not_pixels=True)

ROWS: dict[str, Row] = {
    # not one linear map per patch
    "convnext": Row(refused=_CONVOLUTIONAL),
    "convnextv2": Row(refused=_CONVOLUTIONAL),
    "levit": Row(
        refused="its stem (patch_embeddings) is four convolutions of stride 2 with nonlinearities between them"
    ),
    "pvt": Row(refused="the position tables of its later stages are built for a first patch of 4"),
    "clap": Row(
        refused="it folds a spectrogram into a square and normalises each mel band (batch_norm) before it cuts patches"
    ),
    "clap_audio_model": Row(
        refused="it folds a spectrogram into a square and normalises each mel band (batch_norm) before it cuts patches"
    ),
    "inkling_mm_model": Row(
        refused="its vision tower is a tree of layers over the prime factors of the patch size, with nonlinearities "
        "between them"
    ),
    "neomme": Row(
        refused="its stem (up_proj, down_proj) normalises the pixels of a patch and has a nonlinearity inside"
    ),
    "gemma4_unified": Row(refused="its stem (patch_ln1) normalises the pixels of a patch before they are projected"),
    "gemma4_unified_assistant": Row(
        refused="its stem (patch_ln1) normalises the pixels of a patch before they are projected"
    ),
    # the patch is fixed by layers that no field tells of
    "vitmatte": Row(
        fixed_patch="its decoder joins the tokens to convolutions over the image at 1/2 to 1/16 of its size, which "
        "fixes the patch at 16"
    ),
    "swin2sr": Row(fixed_patch="it puts tokens back at the pixels' positions, which fixes the patch at 1"),
    # patches of bytes
    "blt": _BYTES,
    "blt_global_transformer": _BYTES,
    "blt_local_decoder": _BYTES,
    "blt_local_encoder": _BYTES,
    "blt_patcher": _BYTES,
    # relative tables that forward interpolates
    "beit": Row(relative=True),
    "data2vec-vision": Row(relative=True),
    # flattened patches
    "videomae": Row(orders=((r"decoder\.head\.", "t h w c"),)),
    "siglip2": _SIGLIP2,
    "siglip2_vision_model": _SIGLIP2,
    "cosmos3_edge_vision": _SIGLIP2,
    "molmo2_vision": Row(orders=_SIGLIP2.orders, row_major=True, bare=True),
    "inkling2_vision": Row(orders=_SIGLIP2.orders, row_major=True, whole_blocks=True),
    "gemma4_vision": _GEMMA4,
    "seggpt": Row(orders=((r"decoder_embed\.", "h w c"),), prompted=True),
    "fuyu": Row(orders=((r"vision_embed_tokens\.", "h w c"),), bare=True),
    "kosmos_2_5_vision_model": _PIX2STRUCT,
    "pix2struct_vision_model": _PIX2STRUCT,
    "llama4_vision_model": Row(orders=((r"patch_embedding\.linear\.", "c h w"),)),
    "radio": Row(orders=((r"patch_projection\.", "c h w"),)),
    "ernie4_5_vl_moe_vision": Row(orders=((r"patch_embed\.proj\.", "c h w"),), per_frame=True),
    "lfm3_vl_vision": Row(orders=((r"patch_embed\.", "c t h w"),)),
    "muse_glimmer_vision": _MUSE,
    "muse_spark_vision": _MUSE,
    # packed patches
    "hunyuan_vl_vision": Row(per_frame=True, row_major=True),
    "hy_v4_vl_vision": Row(row_major=True),
    "kimi_k25_vision": Row(row_major=True, as_images=True),
    "paddleocr_vl_vision": Row(row_major=True, as_images=True),
    "qwen2_5_vl_vision": Row(window_in_pixels=True),
    "qwen2_5_omni_vision_encoder": Row(window_in_pixels=True),
    "exaone4_5_vision": Row(window_in_pixels=True),
    # images and clips
    "perception_lm": Row(tiles=True),
    "xclip_vision_model": Row(frames_as_batch=True),
    "pixtral": Row(needs_sizes=True),
    "depth_pro": Row(towers_alone=True),
}
_DEFAULT = Row()


def row(config: Any) -> Row:
    """What is known of a configuration's model type."""
    return ROWS.get(str(getattr(config, "model_type", "")), _DEFAULT)


@functools.lru_cache(maxsize=1)
def measured() -> dict[str, dict[str, list[str]]]:
    """What the coverage run measured: ``square_patch``, ``square_grid``, ``bound_grid``, as answer -> model types."""
    text = resources.files(__package__).joinpath("measured.json").read_text(encoding="utf-8")
    return json.loads(text)


def takes_some_only(fact: str, kinds: tuple[str, ...]) -> Answer | None:
    """What was measured of models whose configurations have these types; ``None`` where one is not known.

    Args:
        fact: ``"square_patch"``, ``"square_grid"`` or ``"bound_grid"``.
        kinds: model types, the outermost first.
    """
    answers = [next((a for a, types in measured()[fact].items() if kind in types), None) for kind in kinds]
    if "always" in answers:
        return "always"
    if None in answers or "sometimes" in answers:
        return "sometimes" if None not in answers else None
    return "never"
