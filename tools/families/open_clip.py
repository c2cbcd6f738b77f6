"""Tiny models of every image tower in ``open_clip.list_models()``; configurations that differ in size share a row."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from families import Family

TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
SIZES = ("width", "layers", "head_width", "image_size", "patch_size", "mlp_ratio", "timm_model_pretrained")
SHRUNK = {"embed_dim": 64, "depth": 2, "num_heads": 2}

# timm architectures behind open_clip's towers: kind of embedding, kind of positions, whether the patch is fixed
TRUNKS = {
    r"^eva_": ("conv", "absolute, class token", False),
    r"^eva02_": ("conv", "absolute and rotary", False),
    r"^vit_pe_core": ("conv", "absolute and rotary", False),
    r"siglip": ("conv", "absolute", False),
    r"relpos": ("conv", "relative MLP", False),
    r"gap": ("conv", "absolute", False),
    r"clip": ("conv", "absolute, class token", False),
    r"^swin": ("conv", "relative tables", False),
    r"mci_224$": ("three convs", "absolute", True),
    r"^fastvit": ("overlapping convs", "convolutional", True),
    r"^vitamin": ("convolutional stages", "absolute", True),
    r"^convnext": ("conv, fixed total stride", "none", True),
}


def families() -> Iterator[Family]:
    for names in _groups():
        yield _family(names)


def kinds() -> Iterator[tuple[list[str], bool]]:
    """The models of every family, and whether it is refused."""
    for names in _groups():
        yield names, _family(names).refused


def _groups() -> list[list[str]]:
    import open_clip

    groups: dict[str, list[str]] = {}
    for name in open_clip.list_models():
        groups.setdefault(_kind(open_clip.get_model_config(name)), []).append(name)
    return list(groups.values())


def _kind(cfg: dict[str, Any]) -> str:
    """What a configuration is apart from its sizes, as a key."""
    vision = {k: v for k, v in cfg["vision_cfg"].items() if k not in SIZES}
    if "timm_model_name" in vision:
        vision["timm_model_name"] = _trunk(vision["timm_model_name"])[0]
        vision.pop("timm_drop", None)
        vision.pop("timm_drop_path", None)
    elif isinstance(cfg["vision_cfg"]["layers"], list):
        vision = {"layers": "several"}
    return json.dumps([vision, "multimodal_cfg" in cfg, bool(cfg.get("quick_gelu"))], sort_keys=True)


def _trunk(name: str) -> tuple[str, tuple[str, str, bool]]:
    return next(
        ((pattern, kind) for pattern, kind in TRUNKS.items() if re.search(pattern, name)), (name, ("?", "?", False))
    )


def _family(names: list[str]) -> Family:
    import open_clip

    cfg = open_clip.get_model_config(names[0])
    title = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    vision = cfg["vision_cfg"]
    if "timm_model_name" in vision:
        embedding, positions, refused = _trunk(vision["timm_model_name"])[1]
        title += f" (timm {vision['timm_model_name']})"
        return Family("open_clip", title, lambda: _timm_model(cfg), embedding, positions, refused=refused)
    if isinstance(vision["layers"], list):
        return Family("open_clip", title, lambda: _model(cfg), "three convs", "in the pooling", refused=True)
    patch = vision.get("patch_size", 16)
    size = (patch + patch // 2, 2 * patch)
    return Family("open_clip", title, lambda: _model(cfg), "conv", "absolute, class token", size)


def _model(cfg: dict[str, Any]) -> nn.Module:
    """A model of open_clip's own classes, shrunk."""
    from open_clip import CLIP, CoCa, CustomTextCLIP

    cfg = copy.deepcopy(cfg)
    vision = cfg["vision_cfg"]
    if isinstance(vision["layers"], list):
        vision |= {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}
    else:
        vision |= {"layers": 2, "width": 32, "head_width": 16, "image_size": 4 * vision.get("patch_size", 16)}
        vision |= {"attn_pooler_heads": 2, "attn_pooler_queries": 4} if vision.get("attentional_pool") else {}
    coca = "multimodal_cfg" in cfg
    text = {**TEXT, "embed_cls": coca, "output_tokens": coca}
    quick = bool(cfg.get("quick_gelu"))
    if coca:
        decoder = {"width": 32, "context_length": 8, "layers": 1, "heads": 2}
        return CoCa(16, decoder, text, vision, quick_gelu=quick).eval()
    custom = cfg.get("custom_text") or "hf_model_name" in cfg["text_cfg"]
    return (CustomTextCLIP if custom else CLIP)(16, vision, text, quick_gelu=quick).eval()


def _timm_model(cfg: dict[str, Any]) -> nn.Module:
    """A model whose tower is a timm model, shrunk after the fact: open_clip passes no sizes on to timm."""
    import timm
    from open_clip import CustomTextCLIP

    vision = {**cfg["vision_cfg"], "timm_model_pretrained": False}
    name = vision["timm_model_name"]
    if _trunk(name)[1][2]:
        small = {r"^fastvit": "fastvit_t8", r"^vitamin": "vitamin_small_224", r"^convnext": "convnext_atto"}
        depth: dict[str, Any] = {"depth": 1} if name.startswith("vit_") else {}
        model = CustomTextCLIP(64, {**vision, "timm_model_name": "test_vit", "timm_pool": "avg"}, TEXT)
        model.visual.trunk = timm.create_model(small.get(_trunk(name)[0], name), num_classes=64, **depth)
        return model.eval()
    model = CustomTextCLIP(64, {**vision, "timm_model_name": "test_vit", "timm_pool": "avg"}, TEXT)
    arguments: dict[str, Any] = {**SHRUNK, "global_pool": vision["timm_pool"] or None}
    if name.startswith("swin"):
        arguments = {"depths": (1, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 2), "img_size": 56}
    else:
        patch = 14 if "patch14" in name else 32 if "patch32" in name else 16
        arguments["img_size"] = 4 * patch
    projected = vision.get("timm_proj") in ("linear", "mlp", "none")
    model.visual.trunk = timm.create_model(name, num_classes=0 if projected else 64, **arguments)
    return model.eval()
