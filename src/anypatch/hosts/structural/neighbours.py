"""What explains a number in a module of the user's otherwise than by the geometry: another layer's width, heads."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

ATTENTION = re.compile(
    r"att(entio)?n|(^|_)(num|n)_?heads?$|^heads$|head_?dim|dim_head|qkv|^(to_|w_?)?[qkv](_proj|_lin)?$|^d_k$", re.I
)
TEXT = re.compile(r"text|caption|token(iz|_emb)|vocab|word|lang(uage)?(_|$)|prompt|context|llm", re.I)
# Names that mean another thing in attention or beside text: heads, the scale of dot products, lengths of sentences.
OF_ATTENTION = re.compile(r"^(h|scale)$", re.I)
OF_TEXT = re.compile(r"len(gth)?$|^(n|l)$|(^|_)(tok(en)?s?|pos(itions?)?|seq(uence)?)(_|$)", re.I)
OF_IMAGES = re.compile(r"image|img|vis|vit|patch|pixel", re.I)


def widths_of(module: nn.Module) -> set[int]:
    """Widths of what a layer returns; a later layer that reads as many values reads these."""
    if isinstance(module, nn.Linear):
        return {module.out_features}
    if isinstance(module, _ConvNd):
        return {module.out_channels}
    if isinstance(module, nn.Embedding):
        return {module.embedding_dim}
    if isinstance(module, nn.MultiheadAttention):
        return {module.embed_dim}
    if isinstance(module, nn.RNNBase):
        return {module.hidden_size, module.hidden_size * (2 if module.bidirectional else 1)}
    return set()


def reads_text(module: nn.Module) -> bool:
    """Whether a module has something of a text encoder's beside its tables: positions are those of words."""
    return any(TEXT.search(name) for name in (*vars(module), *module._parameters.keys(), *module._modules.keys()))


def means_another_thing(name: str, holder: nn.Module | dict[str, Any]) -> bool:
    """Whether a plain value of that name is a width or counts heads or words, as the names beside it tell."""
    if isinstance(holder, nn.Module):
        names = {type(holder).__name__, *vars(holder), *holder._parameters}
        names |= {child for child in holder._modules if child != "heads"}
    else:
        names = set(map(str, holder))
    if name == "width":
        return "height" not in names
    for ambiguous, others in ((OF_ATTENTION, ATTENTION), (OF_TEXT, TEXT)):
        if ambiguous.search(name) and not OF_IMAGES.search(name):
            return any(others.search(other) for other in (name, *(names - {name})))
    return False
