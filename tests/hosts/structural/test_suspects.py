"""What people's own modules hold of the geometry that no shape and no run shows, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import anypatch
from anypatch import UnsupportedModelError


class Located(nn.Module):
    """Something of each token, beside where it lies: ``held`` of a row of places."""

    def __init__(self, held: Callable[[Tensor], Any], places: Tensor, image: int = 64, patch: int = 16) -> None:
        super().__init__()
        sizes = {"img_size": image, "patch_size": patch, "depth": 1, "embed_dim": 48, "num_heads": 3}
        self.model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
        value = held(places)
        if isinstance(value, Tensor):
            self.register_buffer("places", value, persistent=False)
        else:
            self.places = value

    def forward(self, x: Tensor) -> Tensor:
        means = self.model.forward_features(x)[:, 1:].mean((1, 2))
        return means + torch.as_tensor(self.places).float().sum()


def _centres(row: Tensor) -> Tensor:
    return torch.stack(torch.meshgrid(row + 8, row + 8, indexing="xy"), -1).reshape(-1, 2)


def _boxes(row: Tensor) -> Tensor:
    corners = torch.cartesian_prod(row, row)
    return torch.cat([corners, corners + 16], 1)


HELD: dict[str, Callable[[Tensor], Any]] = {
    "centres": _centres,
    "centres of half precision": lambda row: _centres(row).bfloat16(),
    "boxes": _boxes,
    "a list": lambda row: row.tolist(),
    "an array": lambda row: row.numpy() + 7.5,
    "a row": lambda row: row.long(),
}
ROW = 16.0 * torch.arange(4)


@pytest.mark.siblings(fast=3)
@pytest.mark.parametrize("held", HELD)
def test_places_of_patches_in_pixels_are_refused_where_the_patch_changes(held: str) -> None:
    model = Located(HELD[held], ROW).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match="places lists where the patches lie, 16x16 pixels apart"):
        anypatch.adapt(model, 32, keep="grid")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    anypatch.adapt(model.model, 32, keep="grid")  # as it says, and what it holds by hand
    assert model(torch.rand(1, 3, 128, 128)).shape == (1,)


@pytest.mark.siblings(fast=2)
@pytest.mark.parametrize(
    "held",
    [lambda row: _centres(row) / 64, lambda row: [0, 16, 32], lambda row: np.arange(4.0), lambda row: [[3.0, 4.0]]],
    ids=["parts of the image", "fewer", "rows", "others"],
)
def test_other_numbers_stay(held: Callable[[Tensor], Any]) -> None:
    model = Located(held, ROW).eval()
    adapted = anypatch.adapt(model, 32, keep="grid")
    direct = Located(held, ROW, 128, 32).eval()
    direct.load_state_dict(adapted.state_dict())
    x = torch.rand(2, 3, 128, 128)
    torch.testing.assert_close(adapted(x), direct(x), rtol=0, atol=0)


class Rearrange(nn.Module):
    """As einops has it, which is no dependency: sizes that were made a recipe of."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self._recipe = f"{side} {side}"

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, [int(side) for side in self._recipe.split()])

    def extra_repr(self) -> str:
        return f"'b (h w) c -> b h w c', h={self._recipe.split()[0]}"


Rearrange.__module__ = "einops.layers.torch"


def test_a_layer_of_einops_is_called_by_its_pattern() -> None:
    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.lay = timm.create_model("test_vit"), Rearrange(10)

        def forward(self, x: Tensor) -> Tensor:
            return self.lay(self.model.forward_features(x)[:, 1:]).mean((1, 2))

    with pytest.raises(UnsupportedModelError, match=r"it holds lay = Rearrange\('b \(h w\) c -> b h w c', h=10\)"):
        anypatch.adapt(Segmenter().eval(), 8)
