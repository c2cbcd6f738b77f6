"""What a model says of images, in a form that can be kept: features, and the tokens between some of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anypatch.hosts.blocks import Tokens
from anypatch.hosts.images import Features
from anypatch.measure.accuracy import pool_to

KEPT = torch.bfloat16  # of what a teacher said: its rounding moves a cosine by 1e-5, and no token is too large for it


@dataclass(frozen=True)
class Said:
    """Features of images (n), and their tokens after each block that is compared."""

    features: Features
    inside: list[Tokens] = field(default_factory=list)

    def patchwise(self, change: Callable[[Tensor], Tensor], every: Callable[[Tensor], Tensor]) -> Said:
        """The same with ``change`` made of each map of patches (n, h, w, c) and ``every`` of all tensors after it."""
        found = self.features
        logits = None if found.logits is None else every(found.logits)
        return Said(
            Features(every(found.pooled), every(change(found.patches)), logits),
            [Tokens(every(tokens.prefix), every(change(tokens.patches))) for tokens in self.inside],
        )

    def tensors(self) -> list[Tensor]:
        """All of it."""
        found = [self.features.pooled, self.features.patches, self.features.logits]
        inside = [tensor for tokens in self.inside for tensor in (tokens.prefix, tokens.patches)]
        return [tensor for tensor in (*found, *inside) if tensor is not None]

    def to_keep(self, grid: Sequence[int] | None) -> Said:
        """On the CPU in few bytes, patches averaged onto a coarser grid if one is given."""

        def coarser(patches: Tensor) -> Tensor:
            sides = [min(a, b) for a, b in zip(patches.shape[1:3], grid or patches.shape[1:3], strict=True)]
            return pool_to(patches.float(), sides)

        return self.patchwise(coarser, lambda tensor: tensor.to("cpu", KEPT, copy=True))

    def of(self, place: int) -> Said:
        """Of one image, as a batch of one with its own memory."""
        return self.patchwise(lambda patches: patches, lambda tensor: tensor[place : place + 1].clone())

    def moved(self, device: torch.device) -> Said:
        """To compute with."""
        return self.patchwise(lambda patches: patches, lambda tensor: tensor.to(device).float())

    def mirrored(self, which: Tensor) -> Said:
        """With left and right exchanged in the images that ``which`` (n,) names."""
        return self.patchwise(lambda patches: mirrored(patches, which, 2), lambda tensor: tensor)


def together(said: Sequence[Said]) -> Said:
    """Of all the images, as one batch."""
    every = [each.features for each in said]
    logits = [features.logits for features in every if features.logits is not None]
    features = Features(
        torch.cat([f.pooled for f in every]),
        torch.cat([f.patches for f in every]),
        torch.cat(logits) if logits else None,
    )
    inside = [
        Tokens(torch.cat([t.prefix for t in tokens]), torch.cat([t.patches for t in tokens]))
        for tokens in zip(*(s.inside for s in said), strict=True)
    ]
    return Said(features, inside)


def mirrored(images: Tensor, which: Tensor, axis: int) -> Tensor:
    """The images that ``which`` (n,) names, with one axis turned round."""
    chosen = which.to(images.device).view(-1, *[1] * (images.dim() - 1))
    return torch.where(chosen, images.flip(axis), images)
