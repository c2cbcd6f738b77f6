"""What to feed timm's models for the proof."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from anypatch.core.geometry import Geometry
from anypatch.core.twins import Subject
from anypatch.hosts.base import Example
from anypatch.hosts.timm.facts import row
from anypatch.hosts.timm.private import core_of
from anypatch.hosts.timm.stems import backbone_of, channels_of, stem_of


def example(subject: Subject) -> Example:
    return example_at(subject.model, subject.geometry)


def example_at(model: Any, geometry: Geometry) -> Example:
    """What to feed a model that stands alone or as the tower of another library's."""
    core = core_of(model)
    assert geometry.image_size is not None
    if backbone_of(core) is not None and not isinstance(core.patch_embed.proj, nn.Identity):
        unit = stem_of(model).unit
        fed = tuple(s // u for s, u in zip(geometry.image_size, unit, strict=True))
        return Example((2, core.patch_embed.proj.in_channels, *fed), _after_backbone, unit=unit)
    call = _cropping if row(core).branches else lambda m, pixels: m(pixels)
    return Example((2, channels_of(model), *geometry.image_size), call)


def _after_backbone(model: Any, features: Tensor) -> Any:
    """The model on a feature map of its backbone: what comes before the map is not linear and does not change."""
    embed, name = core_of(model).get_submodule("patch_embed"), str(backbone_of(core_of(model)))
    backbone = embed.get_submodule(name)
    embed._modules[name] = nn.Identity()
    try:
        return model(features)
    finally:
        embed._modules[name] = backbone


def _cropping(model: Any, pixels: Tensor) -> Any:
    """CrossViT, cropping where it would shrink the image for its second branch.

    A bicubic resize of the image does not commute with enlarging its patches, a crop does; every weight and position
    of both branches is proved all the same.
    """
    core = core_of(model)
    crop, core.crop_scale = core.crop_scale, True
    try:
        return model(pixels)
    finally:
        core.crop_scale = crop
