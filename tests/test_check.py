"""The proof itself: it passes for correct adaptations and fails for every kind of mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

import anypatch
from anypatch import GeometryError
from anypatch.core import kernels as resize
from anypatch.core import tables as positions
from anypatch.core.kernels import Pi
from anypatch.core.plan import Plan
from anypatch.proof import enlarge, randomise


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=3, num_classes=5)


@pytest.mark.parametrize("patch", [16, 17, 24, 32, (16, 40), (48, 20)])
def test_passes_for_any_larger_patch(patch: Any) -> None:
    result = anypatch.check(vit(), patch)
    assert result.passed
    assert result.error < 1e-5
    assert result.compared == 1


def test_leaves_the_model_alone() -> None:
    model = vit().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    anypatch.check(model, 32)
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_seed_decides() -> None:
    assert anypatch.check(vit(), 32, seed=1).error == anypatch.check(vit(), 32, seed=1).error


@pytest.mark.parametrize("patch", [8, (32, 8)])
def test_shrinking_is_refused_with_the_reason(patch: Any) -> None:
    with pytest.raises(GeometryError, match="smaller"):
        anypatch.check(vit(), patch)


def half(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: function(*args, **kwargs) * 0.5


def test_fails_when_the_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize.KernelResize, "__call__", half(resize.KernelResize.__call__))
    assert not anypatch.check(vit(), 32).passed


def test_fails_when_a_buffer_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=1, num_classes=0)
    assert anypatch.check(model, 28).passed
    original = Plan.apply

    def forgetful(plan: Plan) -> None:
        original(plan)
        for module in plan.subject.part.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = buffer * 1.01

    monkeypatch.setattr(Plan, "apply", forgetful)
    assert not anypatch.check(model, 28).passed


def test_every_parameter_matters_to_the_proof() -> None:
    """No zero-initialised or tiny parameter (layer scale) may hide a part of the model from the comparison."""
    model = timm.create_model("vit_small_patch14_dinov2", img_size=56, depth=1, num_classes=3).eval()
    with torch.no_grad():
        randomise(model, torch.Generator().manual_seed(0))
    model(torch.randn(1, 3, 56, 56)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-7, name


def test_the_table_is_not_touched_while_the_grid_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "resample_tokens", half(positions.resample_tokens))
    assert anypatch.check(vit(), 32).passed


def test_enlargement_is_patch_by_patch() -> None:
    pixels = torch.randn(1, 3, 8, 12)
    ours = enlarge(pixels, (4, 4), (8, 6), Pi("bicubic"))
    assert ours.shape == (1, 3, 16, 18)
    for row in range(2):
        for column in range(3):
            patch = pixels[..., row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
            expected = torch.nn.functional.interpolate(patch, (8, 6), mode="bicubic", antialias=True)
            got = ours[..., row * 8 : row * 8 + 8, column * 6 : column * 6 + 6]
            torch.testing.assert_close(got, expected)


def test_full_width_and_depth_with_torchs_own_attention() -> None:
    models = pytest.importorskip("torchvision.models")
    assert anypatch.check(models.vit_b_32(), 40).passed


@torch.no_grad()
def test_random_weights_keep_activations_of_order_one() -> None:
    attention = nn.MultiheadAttention(768, 12)
    randomise(attention, torch.Generator().manual_seed(0))
    assert attention.in_proj_weight is not None
    assert attention.in_proj_weight.std().item() == pytest.approx(768**-0.5, rel=0.05)
