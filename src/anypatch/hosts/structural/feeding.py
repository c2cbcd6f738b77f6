"""What to feed hand-made models for the proof."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.geometry import Size
from anypatch.core.twins import Subject
from anypatch.errors import UnsupportedModelError
from anypatch.hosts.base import Example
from anypatch.hosts.structural.layout import Layout, layout_of
from anypatch.hosts.structural.model import held_in


def example(subject: Subject) -> Example:
    model, geometry = subject.model, subject.geometry
    held = held_in(model)
    if held is not None:
        host, inner = held.about
        return Example(host.example(inner).shape, _call, pixels_alone=True)
    layout = layout_of(model)
    size = geometry.image_size
    if size is None:
        size = tuple(8 * p for p in geometry.patch_size)
    heads = list(layout.heads)
    masked = hasattr(model, "forward_encoder") and hasattr(model, "forward_decoder") and heads
    call = _masked(heads[0]) if masked else _call
    return Example((2, _channels(model, layout, call, size), *size), call, pixels_alone=call is _call)


def _channels(model: nn.Module, layout: Layout, call: Callable[[nn.Module, Tensor], Any], size: Size) -> int:
    """Channels of the image: the stem's, or those of all stems that read it side by side."""
    stems: list[Any] = [model.get_submodule(path) for path in layout.stems]
    first: Any = model.get_submodule(layout.stem)
    if len(stems) < 2:
        return int(first.in_channels)
    device = first.weight.device
    try:
        with torch.no_grad():
            call(model, torch.zeros((1, first.in_channels, *size), device=device))
    except Exception:
        return sum(stem.in_channels for stem in stems)
    return int(first.in_channels)


def _call(model: nn.Module, pixels: Tensor) -> Any:
    try:
        inspect.signature(model.forward).bind(pixels)
    except TypeError as error:
        raise UnsupportedModelError(
            f"the forward of {type(model).__name__} takes other inputs than pixels, which check does not feed yet: "
            f"{error}"
        ) from error
    return model(pixels)


def _masked(head: str) -> Callable[[nn.Module, Tensor], Any]:
    """A masked autoencoder: what its encoder returns, and what its pixel head sees."""

    def call(model: Any, pixels: Tensor) -> Any:
        seen: list[Tensor] = []
        hook = model.get_submodule(head).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            latent, mask, order = model.forward_encoder(pixels, 0.75)
            model.forward_decoder(latent, order)
        finally:
            hook.remove()
        return latent, mask, seen

    return call
