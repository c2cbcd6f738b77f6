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


class Laid(nn.Module):
    """As einops 0.8 has it: lengths of the axes as they were given, and as it computes with them."""

    def __init__(self, **lengths: int) -> None:
        super().__init__()
        self.pattern = "b (h w) c -> b h w c"
        self.axes_lengths, self._axes_lengths = lengths, tuple(lengths.items())

    def forward(self, x: Tensor) -> Tensor:
        lengths = dict(self._axes_lengths)
        return x.unflatten(1, (lengths["h"], lengths.get("w", -1)))


Laid.__module__ = "einops.layers.torch"


class Mapped(nn.Module):
    """A hand-made model, or one around a library's, that lays its tokens out by a layer."""

    def __init__(self, kind: str, h: int, w: int, patch: int) -> None:
        super().__init__()
        self.kind, self.lay, self.rows = kind, Laid(h=h, w=w), Laid(h=h)
        if kind == "timm":
            self.model = timm.create_model("test_vit", img_size=(h * patch, w * patch), patch_size=patch)
        else:
            self.proj = nn.Conv2d(3, 24, patch, patch)
            self.pos_embed = nn.Parameter(torch.randn(1, h * w, 24))
            self.block = nn.TransformerEncoderLayer(24, 2, 32, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "timm":
            tokens = self.model.forward_features(x)[:, 1:]
        else:
            tokens = self.block(self.proj(x).flatten(2).transpose(1, 2) + self.pos_embed)
        return self.lay(tokens), self.rows(tokens)


@pytest.mark.siblings(fast=1)
@pytest.mark.parametrize("kind", ["hand-made", "timm"])
@pytest.mark.parametrize(
    ("sizes", "grid", "patch"),
    [({"patch_size": 4}, (8, 8), 4), ({"image_size": (32, 64)}, (4, 8), 8), ({"patch_size": 16}, (2, 2), 16)],
)
def test_lengths_of_a_layer_of_einops_follow(
    kind: str, sizes: dict[str, Any], grid: tuple[int, int], patch: int
) -> None:
    """They were left, and the model was refused."""
    model = Mapped(kind, 4, 4, 8).eval()
    direct, pixels = Mapped(kind, *grid, patch).eval(), torch.rand(2, 3, *(patch * side for side in grid))
    viewed = anypatch.at(model, **sizes)(pixels)
    assert model.lay.axes_lengths == {"h": 4, "w": 4}
    anypatch.adapt(model, **sizes)
    direct.load_state_dict(model.state_dict())
    for found in (model(pixels), viewed):
        for a, b in zip(found, direct(pixels), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert model.lay.axes_lengths == dict(model.lay._axes_lengths) == {"h": grid[0], "w": grid[1]}
