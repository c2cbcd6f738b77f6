"""open_clip's configuration, read off a live model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anypatch.core.empty import empty
from anypatch.errors import UnsupportedModelError
from anypatch.files.tensors import difference, shapes_of
from anypatch.hosts.base import pair, plain
from anypatch.hosts.open_clip.model import absolute_pool, image_tower, is_a, ratio
from anypatch.hosts.timm import model as trunks
from anypatch.hosts.timm.private import record, write_config

LOCAL, TOWER = "local-dir:", "tower"
REMEMBERED = "_open_clip_model_cfg"  # what a model that `load` made was built from


def model_config(model: nn.Module, directory: Path, name: str | None = None) -> dict[str, Any]:
    """open_clip's configuration of a live model.

    Raises:
        UnsupportedModelError: something that the configuration cannot say; the message names it.
    """
    import open_clip

    cfg = vars(model).get(REMEMBERED) if name is None else open_clip.get_model_config(name)
    if name is not None and cfg is None:
        raise UnsupportedModelError(f"open_clip knows no model {name!r}")
    cfg = copy.deepcopy(cfg) or {}
    _, tower = image_tower(model)
    live: Any = model
    activations: list[nn.Module] = []
    if is_a(tower, "VisionTransformer"):
        vision = _vision_config(tower, activations)
    elif is_a(tower, "TimmModel"):
        vision = {"timm_drop": 0.0, **{k: v for k, v in cfg.get("vision_cfg", {}).items() if k.startswith("timm_")}}
        vision |= _timm_config(tower)
    else:
        raise UnsupportedModelError(f"{type(tower).__name__} is no image tower that anypatch can save")
    text = dict(cfg.get("text_cfg", {}))
    own = model if is_a(model, "CLIP") else live.text
    if own is model or is_a(own, "TextTransformer"):
        text |= _text_config(own, activations)
    elif not text:
        raise UnsupportedModelError(
            f"the text tower is a {type(own).__name__}: pass name=, the open_clip model it belongs to, to save()"
        )
    projection = live.text_projection if own is model else getattr(own, "text_projection", None)
    width = projection.shape[-1] if isinstance(projection, torch.Tensor) else getattr(projection, "out_features", None)
    result: dict[str, Any] = {
        "embed_dim": cfg.get("embed_dim") or getattr(tower, "output_dim", None) or width or _width(tower),
        "vision_cfg": vision,
        "text_cfg": text,
    }
    if own is not model:
        result["custom_text"] = True
    if is_a(model, "CoCa"):
        result["multimodal_cfg"] = {**cfg.get("multimodal_cfg", {}), **_decoder_config(live.text_decoder, activations)}
    if live.logit_bias is not None:
        result["init_logit_bias"] = float(live.logit_bias.detach().flatten()[0])
    if live.logit_scale.ndim:
        result["nonscalar_logit_scale"] = True
    if _quick(activations):
        result["quick_gelu"] = True
    if is_a(tower, "TimmModel"):
        _name_timm_tower(model, result, directory)
    return result


def _quick(activations: list[nn.Module]) -> bool:
    """Whether the towers' activation is QuickGELU.

    Raises:
        UnsupportedModelError: of one tower it is, and of another not.
    """
    quick = {type(a).__name__ == "QuickGELU" for a in activations}
    if len(quick) > 1:
        raise UnsupportedModelError(
            "one tower uses QuickGELU and another does not: open_clip's configuration has one flag"
        )
    return quick == {True}


def _width(tower: nn.Module) -> int:
    head = [m for m in tower.modules() if isinstance(m, nn.Linear)][-1]
    return head.out_features


def _vision_config(tower: nn.Module, activations: list[nn.Module]) -> dict[str, Any]:
    t: Any = tower
    cfg = {
        "image_size": plain(tuple(t.image_size)),
        "patch_size": plain(tuple(t.patch_size)),
        "width": t.class_embedding.shape[-1],
        "layers": len(t.transformer.resblocks),
        "no_ln_pre": isinstance(t.ln_pre, nn.Identity),
        "final_ln_after_pool": bool(t.final_ln_after_pool),
        "pool_type": t.pool_type,
        "output_tokens": bool(t.output_tokens),
        "patch_dropout": float(getattr(t.patch_dropout, "prob", 0.0)),
        **_norm(t.ln_post),
        **_blocks(t.transformer, activations),
    }
    cfg["head_width"] = cfg["width"] // cfg.pop("heads")
    if t.attn_pool is not None:
        cfg["attentional_pool"] = getattr(t, "attn_pool_type", "") or True
        cfg["attn_pooler_queries"] = t.attn_pool.query.shape[0]
        cfg["attn_pooler_heads"] = t.attn_pool.attn.num_heads
        if cfg["attentional_pool"] is not True:
            del cfg["pool_type"]
    return {k: list(v) if isinstance(v, tuple) else v for k, v in cfg.items()}


def _norm(norm: nn.Module) -> dict[str, Any]:
    eps = getattr(norm, "eps", 1e-5)
    return {} if eps == 1e-5 else {"norm_kwargs": {"eps": eps}}


def _blocks(transformer: nn.Module, activations: list[nn.Module]) -> dict[str, Any]:
    """What a stack of attention blocks was built from, in the configuration's words."""
    stack: Any = transformer
    block = stack.resblocks[0]
    activation = block.mlp.gelu
    cfg: dict[str, Any] = {
        "heads": block.attn.num_heads,
        "mlp_ratio": ratio(block.mlp.c_fc.out_features, stack.width),
    }
    if not isinstance(block.ls_1, nn.Identity):
        cfg["ls_init_value"] = float(block.ls_1.gamma.detach().flatten()[0])
    if type(activation).__name__ not in ("GELU", "QuickGELU"):
        raise UnsupportedModelError(f"open_clip's configuration knows no activation {type(activation).__name__}")
    activations.append(activation)
    if getattr(activation, "approximate", "none") != "none":
        cfg["act_kwargs"] = {"approximate": activation.approximate}
    if is_a(block, "CustomResidualAttentionBlock"):
        attention = block.attn
        cfg["block_type"] = "custom"
        cfg["qk_norm"] = not isinstance(attention.ln_q, nn.Identity)
        cfg["scaled_cosine_attn"] = bool(attention.scaled_cosine)
        cfg["scale_heads"] = bool(attention.scale_heads)
        cfg["scale_attn_inner"] = not isinstance(attention.ln_inner, nn.Identity)
        cfg["scale_attn"] = not isinstance(block.ln_attn, nn.Identity)
        cfg["scale_fc"] = not isinstance(block.mlp.ln, nn.Identity)
    return cfg


def _text_config(text: nn.Module, activations: list[nn.Module]) -> dict[str, Any]:
    """Of a ``TextTransformer``, or of a ``CLIP`` that holds the parts of one."""
    t: Any = text
    flat = is_a(text, "CLIP")
    projection = t.text_projection
    cfg: dict[str, Any] = {
        "context_length": t.context_length,
        "vocab_size": t.token_embedding.num_embeddings,
        "width": t.token_embedding.embedding_dim,
        "layers": len(t.transformer.resblocks),
        "no_causal_mask": t.attn_mask is None,
        "pool_type": t.text_pool_type if flat else t.pool_type,
        "eos_id": t.text_eos_id if flat else t.eos_id,
        **_norm(t.ln_final),
        **_blocks(t.transformer, activations),
    }
    if not flat:
        cfg |= {"pad_id": t.pad_id, "embed_cls": t.cls_emb is not None, "output_tokens": bool(t.output_tokens)}
    if projection is None:
        cfg["proj_type"] = "none"
    elif isinstance(projection, nn.Linear):
        cfg["proj_bias"] = True
    return cfg


def _decoder_config(decoder: nn.Module, activations: list[nn.Module]) -> dict[str, Any]:
    d: Any = decoder
    cfg = _blocks(d, activations)
    cfg |= {"context_length": d.context_length, "width": d.width, "layers": len(d.resblocks)}
    return {k: v for k, v in cfg.items() if k not in ("mlp_ratio", "act_kwargs")}


def _timm_config(tower: nn.Module) -> dict[str, Any]:
    t: Any = tower
    head = dict(t.head.named_children())
    pool = getattr(t.trunk, "global_pool", None)
    if "pool" in head:
        pool = "abs_attn" if absolute_pool(tower) is not None else "rot_attn"
    cfg: dict[str, Any] = {"image_size": plain(tuple(pair(t.image_size))), "timm_model_pretrained": False}
    if isinstance(cfg["image_size"], tuple):
        cfg["image_size"] = list(cfg["image_size"])
    if isinstance(pool, str):
        cfg["timm_pool"] = pool
    if "proj" in head:
        cfg |= {"timm_proj": "linear", "timm_proj_bias": head["proj"].bias is not None}
    elif "mlp" in head:
        cfg |= {"timm_proj": "mlp", "timm_proj_bias": head["mlp"].fc2.bias is not None}
    elif "pool" in head:
        cfg["timm_proj"] = None
    else:
        cfg["timm_proj"] = None if t.trunk.num_classes else "none"
    return cfg


def _name_timm_tower(model: nn.Module, cfg: dict[str, Any], directory: Path) -> None:
    """Name a timm model that has the tower's geometry: by its own name, or by a directory written for it."""
    trunk: Any = image_tower(model)[1].get_submodule("trunk")
    architecture = trunk.pretrained_cfg["architecture"]
    cfg["vision_cfg"]["timm_model_name"] = architecture
    try:
        twin = empty(lambda: construct(cfg))
        same = trunks.subject(twin.get_submodule("visual.trunk")).geometry == trunks.subject(trunk).geometry
    except Exception:
        same = False
    if same and difference(shapes_of(model), shapes_of(twin)) is None:
        return
    tower = directory / TOWER
    tower.mkdir()
    geometry = trunks.subject(trunk).geometry
    arguments = record(trunk)
    if not {"img_size", "patch_size"} & arguments.keys():  # a timm that keeps no record of its arguments
        arguments["patch_size"] = plain(geometry.patch_size)
        if geometry.image_size is not None:
            arguments["img_size"] = plain(geometry.image_size)
    write_config(trunk, tower / "config.json", model_args=arguments)
    cfg["vision_cfg"]["timm_model_name"] = f"{LOCAL}{tower}"


def construct(cfg: Mapping[str, Any], **overrides: Any) -> nn.Module:
    """A model of a configuration, as ``open_clip.create_model`` constructs it: without its log, or weights of towers.

    Args:
        cfg: the configuration.
        **overrides: what takes the place of its entries.
    """
    from open_clip import CLIP, CoCa, CustomTextCLIP

    cfg = {**copy.deepcopy(dict(cfg)), **overrides}
    text, vision = cfg.get("text_cfg"), cfg.get("vision_cfg")
    custom = cfg.pop("custom_text", False)
    if isinstance(text, dict) and "hf_model_name" in text:
        custom, text["hf_model_pretrained"] = True, False
    if isinstance(vision, dict) and "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    kind = CoCa if "multimodal_cfg" in cfg else CustomTextCLIP if custom else CLIP
    return kind(**cfg)
