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

    def to_keep(self, grid: Sequence[int] | None) -> Said:
        """On the CPU in few bytes, patches averaged onto a coarser grid if one is given."""

        def coarser(patches: Tensor) -> Tensor:
            sides = [min(a, b) for a, b in zip(patches.shape[1:3], grid or patches.shape[1:3], strict=True)]
            return pool_to(patches.float(), sides)

        return self._changed(lambda tensor: tensor.to("cpu", KEPT, copy=True), coarser)

    def of(self, images: Sequence[int]) -> Said:
        """Of some of the images, by their numbers."""
        return self._changed(lambda tensor: tensor[list(images)], lambda patches: patches)

    def moved(self, device: torch.device) -> Said:
        """To compute with."""
        return self._changed(lambda tensor: tensor.to(device).float(), lambda patches: patches)

    def _changed(self, every: Callable[[Tensor], Tensor], patches: Callable[[Tensor], Tensor]) -> Said:
        """The same with ``patches`` made of each map of patches (n, h, w, c), and then ``every`` of all tensors."""
        found = self.features
        logits = None if found.logits is None else every(found.logits)
        return Said(
            Features(every(found.pooled), every(patches(found.patches)), logits),
            [Tokens(every(tokens.prefix), every(patches(tokens.patches))) for tokens in self.inside],
        )
