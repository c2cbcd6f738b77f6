"""Google's layout of a Vision Transformer (``.npz``), by timm's own reader."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.empty import empty
from anypatch.errors import CheckpointError, listed
from anypatch.files import layouts
from anypatch.files.reading import Checkpoint
from anypatch.hosts.timm.classifier import head_names, reset


def load_npz(
    model: Any, checkpoint: Checkpoint, arch: str, native: layouts.Native, host_kwargs: Mapping[str, Any]
) -> nn.Module:
    """Google's layout, by timm's own reader, which copies into the model; what it left unset is missing."""
    if not hasattr(model, "load_pretrained"):
        raise CheckpointError(f"{checkpoint.path} is in Google's layout, which timm cannot read into {arch}")
    prefix = str(native.kernel).removesuffix("embedding/kernel")
    stored = {n[len(prefix) :]: t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}
    classes = stored["head/bias"].shape[0] if "head/bias" in stored else 0
    if classes != getattr(model, "num_classes", classes) and "num_classes" not in host_kwargs:
        what = f"a head of {classes} classes" if classes else "no classification head"
        checkpoint.notes.append(f"{checkpoint.path.name} has {what}, so the model has too ({arch})")
        empty(lambda: reset(model, classes))
    _require_fits(model, stored, checkpoint, arch)
    marks = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                filled = torch.full(parameter.shape, torch.nan, dtype=torch.float32)
                module._parameters[name] = nn.Parameter(filled, parameter.requires_grad)
    for name, parameter in model.named_parameters():
        marks[name] = parameter
    try:
        with torch.no_grad():
            model.load_pretrained(str(checkpoint.path))
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint.path} does not fit {arch}: timm's reader failed ({type(error).__name__}: {error})"
        ) from error
    heads = tuple(head + "." for head in head_names(model))
    unset = [name for name, p in marks.items() if p.numel() and bool(torch.isnan(p.detach()).all())]
    fresh = [name for name in unset if name.startswith(heads)] if heads else []
    missing = [name for name in unset if name not in fresh]
    if missing:
        raise CheckpointError(f"{checkpoint.path} does not fit {arch}: it lacks {listed(missing)}")
    if fresh:
        checkpoint.notes.append(f"{checkpoint.path.name}: the head is new and untrained ({listed(fresh)})")
        with torch.no_grad():
            for name in fresh:
                value = marks[name].zero_()
                if value.ndim > 1:
                    nn.init.trunc_normal_(value, std=0.02)
    return model


def _require_fits(model: Any, stored: Mapping[str, Tensor], checkpoint: Checkpoint, arch: str) -> None:
    """timm's reader takes what it looks for and leaves the rest: see that there is no rest."""
    blocks = {n.split("/")[1] for n in stored if n.startswith("Transformer/encoderblock_")}
    have = len(blocks)
    if "Transformer/encoderblock/LayerNorm_0/scale" in stored:
        have = stored["Transformer/encoderblock/LayerNorm_0/scale"].shape[0]
    if have != len(model.blocks):
        raise CheckpointError(f"{checkpoint.path} does not fit {arch}: it has {have} blocks, not {len(model.blocks)}")
    for key, present in {
        "MAPHead_0/": getattr(model, "attn_pool", None) is not None,
        "cls": getattr(model, "cls_token", None) is not None,
    }.items():
        found = [n for n in stored if n.startswith(key)]
        if found and not present:
            raise CheckpointError(f"{checkpoint.path} does not fit {arch}: {arch} has no {listed(found)}")
    width = stored["embedding/kernel"].shape[-1]
    if width != model.embed_dim:
        raise CheckpointError(f"{checkpoint.path} does not fit {arch}: it is {width} wide, not {model.embed_dim}")


def fits_npz(model: Any, checkpoint: Checkpoint, native: layouts.Native) -> bool:
    """Whether a model has the heads, widths and tables that a file in Google's layout is for."""
    prefix = str(native.kernel).removesuffix("embedding/kernel")
    stored = {n[len(prefix) :]: t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}
    query = next((t for n, t in stored.items() if re.match(r"Transformer/enc\w+/MultiHead\w+/query/kernel", n)), None)
    table = next((t for n, t in stored.items() if n.endswith("pos_embedding")), None)
    if query is None or table is None or getattr(model, "pos_embed", None) is None:
        return False
    block = model.blocks[0]
    hidden = next((t for n, t in stored.items() if re.match(r"Transformer/enc\w+/MlpBlock\w+/Dense_0/kernel", n)), None)
    expected = {n for n, _ in model.named_parameters() if n.endswith(("norm_pre.weight", "reg_token", "ls1.gamma"))}
    return (
        not expected
        and query.shape[-2] == block.attn.num_heads
        and hidden is not None
        and hidden.shape[-1] == block.mlp.fc1.out_features
        and block.attn.qkv.bias is not None
        and table.numel() == model.pos_embed.numel()
        and ("cls" in stored) == (getattr(model, "cls_token", None) is not None)
        and any(n.startswith("MAPHead_0") for n in stored) == (getattr(model, "attn_pool", None) is not None)
    )
