"""A library of one model, whose patches are flattened rows of pixels that a linear layer reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.geometry import Geometry
from anypatch.core.roles import Facts
from anypatch.core.twins import Subject
from anypatch.hosts.base import Example

NAME = "dummy"


class Tiny(nn.Module):
    """Embeds ``h w c`` patches by a linear layer, adds positions, mixes tokens."""

    def __init__(self, patch: int = 4, image: int = 16) -> None:
        super().__init__()
        self.side, self.image = patch, image
        self.embed = nn.Linear(3 * patch * patch, 8)
        self.where = nn.Parameter(torch.zeros(1, (image // patch) ** 2, 8))
        self.mix = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)

    def forward(self, pixels: Tensor) -> Tensor:
        rows = pixels.unfold(2, self.side, self.side).unfold(3, self.side, self.side)
        flat = rows.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        return self.mix(self.embed(flat) + self.where)


def recognises(model: nn.Module) -> bool:
    return isinstance(model, Tiny)


def subject(model: Any) -> Subject:
    geometry = Geometry((model.side,) * 2, (model.image,) * 2, library=NAME)
    facts = Facts(orders={r"embed\.": "h w c"})
    return Subject(model, geometry, lambda g: Tiny(g.patch_size[0], (g.image_size or (0,))[0]), facts)


def example(subject: Subject) -> Example:
    return Example((2, 3, *(subject.geometry.image_size or ())), lambda model, pixels: model(pixels))
