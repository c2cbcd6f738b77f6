"""A model ready to be measured: described once, in evaluation mode, its features at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anypatch.adaptation import at, describe, host
from anypatch.core.geometry import Geometry
from anypatch.core.tables import PositionsLike
from anypatch.core.twins import Subject
from anypatch.core.views import standing
from anypatch.hosts.images import Features, normal_grid


class Reader:
    """A model in evaluation mode, ready to read features from.

    Args:
        model: a model of a host library that knows images, or one with ``forward_features``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.subject = describe(model)
        self.model = self.subject.model.eval()
        self.geometry = self.subject.geometry
        self.host = host(model)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        """Features of normalised pixels (n, channels, h, w)."""
        return self.host.features(self.subject, pixels)

    def normal_grid(self, pixels: Tensor) -> tuple[int, int]:
        """The grid that these pixels are cut into."""
        return normal_grid(self.geometry, pixels)


def described(model: nn.Module | Subject) -> Subject:
    """A model's description, made now unless it is one already."""
    return model if isinstance(model, Subject) else describe(model)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first floating-point parameter, in which it is fed."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def at_geometry(subject: Subject, target: Geometry, kernel: Any, positions: PositionsLike) -> nn.Module:
    """A second model at another geometry, which shares every parameter that does not follow it.

    So several patch sizes stand side by side in the memory of one model and the tensors that differ: a view, in which
    those are computed once, as nobody trains here. Shared parameters are only read: who changes the first model's
    changes this one's.
    """
    patch, image = asked_sizes(subject.geometry, target)
    return standing(at(subject.model, patch, image, kernel=kernel, positions=positions))


def asked_sizes(current: Geometry, target: Geometry) -> tuple[Any, Any]:
    """What ``adapt`` is asked for to bring a model to ``target``; one without an image size is asked for none."""
    return target.patch_size, None if current.image_size is None else target.image_size
