"""What to feed torchvision's models for the proof."""

from __future__ import annotations

from typing import Any

from anypatch.core.twins import Subject
from anypatch.hosts.base import Example
from anypatch.hosts.torchvision.model import projection_of


def example(subject: Subject) -> Example:
    model, geometry = subject.model, subject.geometry
    size = geometry.image_size
    if size is None:  # any size: two windows and a bit, so that shifting and padding happen
        m: Any = model
        size = tuple(
            (2 * window + 2) * patch
            for window, patch in zip(m.features[1][0].attn.window_size, geometry.patch_size, strict=True)
        )
    return Example((2, projection_of(model).in_channels, *size), lambda m, pixels: m(pixels))
