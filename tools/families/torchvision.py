"""Tiny models of torchvision's classes with a patch embedding, and of stems that are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from families import Family


def families() -> Iterator[Family]:
    table = "absolute, class token"
    for name, patch in (("vit_b_16", 16), ("vit_b_32", 32), ("vit_h_14", 14)):
        yield Family("torchvision", f"VisionTransformer ({name})", lambda p=patch: _vit(p), "conv", table)  # type: ignore[misc]
    yield Family("torchvision", "VisionTransformer, representation layer",
                 lambda: _vit(8, representation_size=24), "conv", table, 12)  # fmt: skip
    yield Family("torchvision", "SwinTransformer (swin_t)", lambda: _swin(1), "conv", "relative tables", (6, 8))
    yield Family("torchvision", "SwinTransformer, version 2 (swin_v2_t)", lambda: _swin(2), "conv",
                 "relative, computed", (6, 8))  # fmt: skip
    yield Family("torchvision", "VisionTransformer, convolutional stem", _stem, "several convs", table, refused=True)
    yield Family("torchvision", "MaxVit (maxvit_t)", _maxvit, "padded convs", "relative tables", refused=True)


def _vit(patch: int, **kwargs: Any) -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(4 * patch, patch, 2, 2, 32, 48, num_classes=5, **kwargs)
    return model.eval()


def _swin(version: int) -> nn.Module:
    from torchvision.models import swin_transformer as module

    block = module.SwinTransformerBlock if version == 1 else module.SwinTransformerBlockV2
    merging = module.PatchMerging if version == 1 else module.PatchMergingV2
    model = module.SwinTransformer(
        [4, 4], 16, [2, 1], [2, 4], [3, 4], 2.0, num_classes=5, block=block, downsample_layer=merging
    )
    return model.eval()


def _stem() -> nn.Module:
    from torchvision.models.vision_transformer import ConvStemConfig

    return _vit(4, conv_stem_configs=[ConvStemConfig(8, 3, 2), ConvStemConfig(8, 3, 2)])


def _maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit((64, 64), 8, 2, [8, 16], [1, 1], 8, 0.0)
