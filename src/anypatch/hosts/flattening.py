"""Layers that write the pixels of a patch, and the order in which they do, asked of the model itself."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from anypatch.core.geometry import Size
from anypatch.hosts.base import ancestors

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
PIXELS = re.compile(r"(^|[._])pred$|pixel|recon|final_layer\.linear$|decoder\.head$", re.I)


def pixel_heads(model: nn.Module, conv: Any) -> dict[str, tuple[int, str]]:
    """The heads of a model whose patches ``conv`` cuts: path to (channels, flattening order, "" where unknown)."""
    pixels = math.prod(conv.stride)
    heads: dict[str, tuple[int, str]] = {}
    for path, module in model.named_modules():
        named = re.sub(r"\.(base_layer|lora_B\..*)$", "", path)  # adapters over the head write the same pixels
        if not PIXELS.search(named) or not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            continue
        if isinstance(module, CONVOLUTIONS) and set(module.kernel_size) != {1}:
            continue
        rows = module.weight.shape[0]
        if rows % pixels == 0 and rows // pixels in (conv.in_channels, 2 * conv.in_channels):
            channels = rows // pixels
            heads[path] = (channels, _probe_order(model, path, conv.stride, channels, conv.in_channels))
    return heads


def _probe_order(model: nn.Module, head: str, patch: Size, channels: int, in_channels: int) -> str:
    """The order in which the model's own ``unpatchify`` or ``patchify`` flattens a patch; empty if it does not tell."""
    if len(patch) != 2:
        return ""
    h, w = patch
    size = channels * h * w
    index = torch.arange(size, dtype=torch.float32)
    images = {"h w c": index.view(h, w, channels).permute(2, 0, 1), "c h w": index.view(channels, h, w)}
    for ancestor in ancestors(head):
        module = model.get_submodule(ancestor)
        unpatchify, patchify = getattr(module, "unpatchify", None), getattr(module, "patchify", None)
        for tokens in (4, _count(module)):
            if callable(unpatchify) and tokens:
                try:
                    image = unpatchify(index.expand(1, tokens, size).clone())[0]
                except Exception:
                    continue
                for order, expected in images.items():
                    if image.ndim == 3 and torch.equal(image[..., :h, :w], expected):
                        return order
        if callable(patchify) and channels == in_channels:
            side = max(h, w) * math.lcm(h, w) // math.gcd(h, w)
            for order, expected in images.items():
                try:
                    got = patchify(expected.repeat(1, side // h, side // w)[None])
                except Exception:
                    continue
                if torch.equal(got.reshape(-1, size)[0], index):
                    return order
    return ""


def _count(module: nn.Module) -> int:
    for child in module.modules():
        count = vars(child).get("num_patches")
        if type(count) is int:
            return count
    return 0
