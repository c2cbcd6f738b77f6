"""diffusers: HunyuanVideo 1.5's transformer, its patches of latents and the head that paints them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import anypatch
from anypatch import UnsupportedModelError
from anypatch.adaptation import describe, host
from anypatch.core.kernels import Pi
from anypatch.proof import check, enlarge, randomise
from families.diffusers import families

pytest.importorskip("diffusers")
FAMILIES = {family.name.split()[0]: family for family in families()}


def made() -> Any:
    model = FAMILIES["hunyuan_video_15"].build().eval()
    with torch.no_grad():
        randomise(model, torch.Generator().manual_seed(1))
    return model


def run(model: Any, latents: torch.Tensor) -> list[Any]:
    subject = describe(model)
    with torch.no_grad():
        return host(model).example(subject).call(model, latents)


@pytest.mark.parametrize("patch", [(1, 4, 4), (2, 2, 2), (2, 6, 6)])
def test_growing_the_patch_is_exact(patch: tuple[int, ...]) -> None:
    found = check(made(), patch)
    assert found.compared == 1
    assert found.passed


def test_the_head_paints_the_enlarged_latents() -> None:
    model = made()
    latents = torch.randn(1, 9, 2, 8, 8)
    tokens, painted = run(model, latents)
    (before,) = painted
    anypatch.adapt(model, 4, kernel="pi")
    after_tokens, painted = run(model, enlarge(latents, (1, 2, 2), (1, 4, 4), Pi()))
    (after,) = painted
    assert torch.allclose(tokens, after_tokens, atol=1e-4)
    assert after.shape == (1, 4, 2, 16, 16)
    assert torch.allclose(after, enlarge(before, (1, 2, 2), (1, 4, 4), Pi()), atol=1e-4)


def test_the_configuration_follows_and_reloads(tmp_path: Path) -> None:
    import diffusers

    model = made()
    anypatch.adapt(model, 4)
    assert model.config.patch_size == model.config["patch_size"] == model.rope.patch_size == 4
    anypatch.save(model, tmp_path)
    again = diffusers.HunyuanVideo15Transformer3DModel.from_pretrained(tmp_path).eval()
    latents = torch.randn(1, 9, 1, 8, 8)
    assert torch.equal(run(model, latents)[0], run(again, latents)[0])
    assert anypatch.geometry(anypatch.load(f"diffusers:{tmp_path}")).patch_size == (1, 4, 4)


def test_refusals() -> None:
    with pytest.raises(UnsupportedModelError, match="packed before it reaches"):
        anypatch.adapt(FAMILIES["flux"].build(), 2)
    with pytest.raises(UnsupportedModelError, match="only square"):
        anypatch.adapt(made(), (2, 4))
