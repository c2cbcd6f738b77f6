"""Hand-made models whose position table no name tells, or whose grid nothing tells."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anypatch
from anypatch import GeometryError

WIDTH = 24


class Encoder(nn.Module):
    """Patches, perhaps a class token, a table called ``name``, one block."""

    def __init__(self, grid: tuple[int, ...], patch: tuple[int, ...], name: str, cls: bool = False) -> None:
        super().__init__()
        self.name = name
        conv: Any = nn.Conv3d if len(patch) == 3 else nn.Conv2d
        self.proj = conv(3, WIDTH, patch, patch)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH)) if cls else None
        setattr(self, name, nn.Parameter(torch.randn(1, math.prod(grid) + cls, WIDTH)))
        block = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        if self.cls is not None:
            tokens = torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1)
        return self.encoder(tokens + getattr(self, self.name))


@pytest.mark.siblings(fast=1)
@pytest.mark.parametrize(
    ("name", "cls", "sizes", "grid", "patch"),
    [
        ("pe", True, {"patch_size": 4}, (8, 8), 4),
        ("pe", False, {"image_size": (32, 64)}, (4, 8), 8),
        ("table", False, {"patch_size": 16, "keep": "grid"}, (4, 4), 16),
        ("embeddings", True, {"image_size": 48}, (6, 6), 8),
    ],
)
def test_a_table_that_no_name_tells_is_found_by_running(
    name: str, cls: bool, sizes: dict[str, Any], grid: tuple[int, int], patch: int
) -> None:
    """It was left as it was, and the next forward pass failed."""
    model = Encoder((4, 4), (8, 8), name, cls).eval()
    before = getattr(model, name).detach().clone()
    assert anypatch.geometry(model).grid == (4, 4)
    anypatch.adapt(model, **sizes)
    other = Encoder(grid, (patch, patch), name, cls).eval()
    other.load_state_dict(model.state_dict())
    pixels = torch.rand(2, 3, *(patch * side for side in grid))
    torch.testing.assert_close(model(pixels), other(pixels), rtol=0, atol=0)
    square = before[:, int(cls) :].transpose(1, 2).reshape(1, WIDTH, 4, 4)
    expected = F.interpolate(square, grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(getattr(model, name)[:, int(cls) :], expected, atol=1e-5, rtol=1e-5)
    assert anypatch.geometry(copy.deepcopy(model)).grid == grid


@pytest.mark.siblings(fast=1)
@pytest.mark.parametrize("name", ["pe", "pos_embed"])
@pytest.mark.parametrize(("grid", "patch"), [((3, 5), (8, 8)), ((2, 4, 4), (2, 8, 8))], ids=["image", "clip"])
def test_a_table_over_a_grid_that_nothing_tells_binds_the_model(
    name: str, grid: tuple[int, ...], patch: tuple[int, ...]
) -> None:
    model = Encoder(grid, patch, name).eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    image = tuple(side * p for side, p in zip(grid, patch, strict=True))
    larger = (*image[:-2], 2 * image[-2], 2 * image[-1])
    with pytest.raises(GeometryError, match=r'set model.img_size = \(height, width\) first, or use keep="grid"'):
        anypatch.adapt(model, 4)
    with pytest.raises(GeometryError, match=rf"{name}, of shape .* set model.img_size"):
        anypatch.adapt(model, image_size=larger)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    same = anypatch.adapt(copy.deepcopy(model), (*patch[:-2], 16, 16), keep="grid")
    assert same(torch.rand(1, 3, *larger)).shape == (1, math.prod(grid), WIDTH)
    model.img_size = image
    anypatch.adapt(model, 4)
    twice = (*grid[:-2], 2 * grid[-2], 2 * grid[-1])
    other = Encoder(twice, (*patch[:-2], 4, 4), name).eval()
    other.load_state_dict(model.state_dict())
    pixels = torch.rand(1, 3, *image)
    torch.testing.assert_close(model(pixels), other(pixels), rtol=0, atol=0)


@pytest.mark.slow
def test_what_runs_at_every_size_is_bound_by_nothing() -> None:
    """Prompts may be as many as a square has tokens."""

    class Prompted(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(torch.cat([self.prompts, self.proj(x).flatten(2).transpose(1, 2)], 1))

    model = anypatch.adapt(Prompted((4, 4), (8, 8), "prompts"), 4)
    assert anypatch.geometry(model).image_size is None
    assert model.prompts.shape == (1, 16, WIDTH)
    assert model(torch.rand(1, 3, 16, 24)).shape == (1, 16 + 24, WIDTH)
