"""What to feed open_clip's image towers for the proof."""

from __future__ import annotations

from typing import Any

from torch import nn

from anypatch.core.adapters import beneath
from anypatch.core.twins import Subject
from anypatch.hosts.base import Example
from anypatch.hosts.open_clip.model import image_tower, is_a
from anypatch.hosts.timm.feeding import example_at


def example(subject: Subject) -> Example:
    model, geometry = subject.model, subject.geometry
    _, tower = image_tower(model)
    if is_a(tower, "TimmModel"):
        inner = example_at(tower.get_submodule("trunk"), geometry)
        if any(unit > 1 for unit in inner.unit):  # behind a backbone
            return Example(
                inner.shape, lambda m, x: inner.call(image_tower(m)[1].get_submodule("trunk"), x), inner.unit
            )
        return Example(inner.shape, _encode)
    channels: Any = beneath(tower.get_submodule("conv1")).in_channels
    assert geometry.image_size is not None
    return Example((2, channels, *geometry.image_size), _encode)


def _encode(model: nn.Module, pixels: Any) -> Any:
    encode: Any = getattr(model, "encode_image", model)
    return encode(pixels)
