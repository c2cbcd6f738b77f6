"""Real DINOv2-small weights on real photographs: the features survive, in both libraries alike."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import anypatch
import dinov2

pytestmark = pytest.mark.slow

GRID = 16


@pytest.fixture(scope="module")
def photographs() -> list[dinov2.Image]:
    return dinov2.crops(dinov2.photographs(dinov2.TESTING), count=1, seed=3)


@pytest.fixture(scope="module", params=["timm", "transformers"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    if request.param == "timm":
        return dinov2.timm_model(img_size=GRID * 14)
    return anypatch.adapt(dinov2.transformers_model(), image_size=GRID * 14)


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a, b, dim=-1).mean().item()


@pytest.mark.parametrize("patch", [16, 28])
def test_features_survive_growing_the_patch(model: nn.Module, patch: int, photographs: list[dinov2.Image]) -> None:
    native = dinov2.features(model, dinov2.pixels(photographs, GRID * 14))
    adapted = anypatch.adapt(copy.deepcopy(model), patch, keep="grid")
    assert anypatch.geometry(adapted).grid == (GRID, GRID)
    features = dinov2.features(adapted, dinov2.pixels(photographs, GRID * patch))
    assert cosine(features[:, 1:], native[:, 1:]) > 0.998
    assert cosine(features[:, 0], native[:, 0]) > 0.998
    shuffled = native.roll(1, 0)
    assert cosine(features[:, 0], shuffled[:, 0]) < 0.9  # the figure means something: other photographs differ


@pytest.mark.parametrize("size", [{"patch_size": 16, "keep": "grid"}, {"patch_size": 28}, {"image_size": 280}])
def test_both_libraries_agree(size: dict[str, object], photographs: list[dinov2.Image]) -> None:
    ours = anypatch.adapt(dinov2.timm_model(img_size=GRID * 14), **size)  # type: ignore[arg-type]
    theirs = anypatch.adapt(dinov2.transformers_model(), image_size=GRID * 14)
    anypatch.adapt(theirs, **size)  # type: ignore[arg-type]
    image = anypatch.geometry(ours).image_size
    assert anypatch.geometry(theirs).image_size == image
    pixels = dinov2.pixels(photographs[:2], image)
    a, b = dinov2.features(ours, pixels), dinov2.features(theirs, pixels)
    assert cosine(a, b) > 0.9995
