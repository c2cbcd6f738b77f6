"""The proof itself: it passes for correct adaptations and fails for every kind of mistake."""

from __future__ import annotations

import dataclasses
import random
import types
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


def vit(**kwargs: Any) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=3, num_classes=5, **kwargs
    )


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


@pytest.mark.slow
def test_full_width_and_depth_with_torchs_own_attention() -> None:
    models = pytest.importorskip("torchvision.models")
    assert anypatch.check(models.vit_b_32(), 40).passed


@torch.no_grad()
def test_random_weights_keep_activations_of_order_one() -> None:
    attention = nn.MultiheadAttention(768, 12)
    randomise(attention, torch.Generator().manual_seed(0))
    assert attention.in_proj_weight is not None
    assert attention.in_proj_weight.std().item() == pytest.approx(768**-0.5, rel=0.05)


# -- what must not fool it ---------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Brings tokens back to pixels by a factor that stands in its code, where nobody sees it."""

    def __init__(self, factor: float = 16, channels_last: bool = False, logits: bool = False) -> None:
        super().__init__()
        self.backbone, self.head = vit(), nn.Conv2d(48, 2, 1)
        # hidden in a list, so that no name tells
        self.hidden, self.channels_last, self.logits = [factor], channels_last, logits

    def forward(self, x: torch.Tensor) -> Any:
        tokens = self.backbone.forward_features(x)
        grid = self.head(tokens[:, 1:].mT.reshape(len(x), 48, *self.backbone.patch_embed.grid_size))
        mask = torch.nn.functional.interpolate(grid, scale_factor=self.hidden[0])
        mask = mask.permute(0, 2, 3, 1) if self.channels_last else mask
        return {"mask": mask, "logits": tokens[:, 0]} if self.logits else mask


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("logits", [False, True])
def test_an_output_as_large_as_the_image_has_to_grow_with_it(channels_last: bool, logits: bool) -> None:
    result = anypatch.check(Decoder(16, channels_last, logits), 32)
    assert not result.passed
    assert "has the size of the image" in result.failures[0]
    assert "failures" in repr(result)


def test_outputs_smaller_than_the_image_may_stay() -> None:
    assert anypatch.check(Decoder(4), 32).passed


def test_outputs_that_grow_are_said_and_what_they_come_from_is_compared() -> None:
    class Follows(Decoder):
        def forward(self, x: torch.Tensor) -> Any:
            self.hidden = self.backbone.patch_embed.patch_size[:1]
            return super().forward(x)

    result = anypatch.check(Follows(logits=True), 32)
    assert result.passed
    assert (result.compared, result.uncompared) == (1, ("output.mask (2, 2, 64, 64) -> (2, 2, 128, 128)",))
    assert "uncompared" in repr(result)
    alone = anypatch.check(Follows(), 32)
    assert alone.passed
    assert alone.compared > 1


def test_a_forward_pass_that_fails_has_not_passed() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = vit()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (
                self.backbone(x).reshape(2, 5) + x[:, 0, :5, :64].reshape(2, 5, 64).sum(2)[:, : 64 * 5 // x.shape[-1]]
            )

    result = anypatch.check(Fixed(), 32)
    assert not result.passed
    assert "the adapted model fails" in result.failures[0]


class Ends(nn.Module):
    """What a user's model makes of the class token and of the image's own size in pixels."""

    def __init__(self, end: Any, **kwargs: Any) -> None:
        super().__init__()
        self.backbone, self.end = vit(**kwargs), end

    def forward(self, x: torch.Tensor) -> Any:
        return self.end(self.backbone.forward_features(x))


@dataclasses.dataclass
class Output:
    masks: Any


def as_pictures(tokens: torch.Tensor, k: int = 64) -> torch.Tensor:
    return torch.nn.functional.interpolate(tokens.mean(2)[:, None, None], size=(k, k))


@pytest.mark.parametrize("end", [
    lambda t: Output([as_pictures(t)]), lambda t: (t[:, 0], {"maps": [as_pictures(t, 32), as_pictures(t)]}),
    lambda t: types.SimpleNamespace(masks=as_pictures(t)),
])  # fmt: skip
def test_outputs_of_any_kind_are_looked_into(end: Any) -> None:
    result = anypatch.check(Ends(end), 32)
    assert not result.passed
    assert "has the size of the image" in result.failures[0]


def test_a_picture_whose_side_is_the_number_of_tokens_has_to_grow_too() -> None:
    sides = {"patch_size": 8}  # 64 pixels and 64 tokens
    assert not anypatch.check(Ends(as_pictures, **sides), 16).passed
    assert anypatch.check(Ends(lambda t: t[:, 1:] @ t[:, 1:].mT, **sides), 16).passed  # attention maps have them, too


def test_masked_out_values_are_compared_and_nan_proves_nothing() -> None:
    def masked(tokens: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(48) < 4, -torch.inf, tokens[:, 0])

    assert anypatch.check(Ends(masked), 32).passed
    result = anypatch.check(Ends(lambda t: t * torch.nan), 32)
    assert not result.passed
    assert "proves nothing" in result.failures[0]


def test_a_model_that_draws_other_numbers_than_torchs_cannot_be_compared() -> None:
    with pytest.raises(anypatch.UnsupportedModelError, match="another one each time"):
        anypatch.check(Ends(lambda t: t * random.random()), 32)


def test_a_model_that_fails_as_it_is_is_told_so() -> None:
    with pytest.raises(anypatch.UnsupportedModelError, match=r"ModuleList fails on pixels \(2, 3, 64, 64\) as it is"):
        anypatch.check(nn.ModuleList([vit()]), 32)


def test_a_model_without_values_is_told_so() -> None:
    with torch.device("meta"):
        model = vit()
    with pytest.raises(anypatch.UnsupportedModelError, match="is on the meta device"):
        anypatch.check(model, 32)


def test_a_model_that_cannot_be_copied_is_told_so() -> None:
    model = vit()
    model.lines = (line for line in ["a generator"])
    with pytest.raises(anypatch.UnsupportedModelError, match=r"cannot be copied to be checked: .*generator"):
        anypatch.check(model, 32)


def test_a_refusal_of_the_account_is_a_refusal() -> None:
    model = Decoder(4)
    model.mixer = nn.ConvTranspose2d(48, 3, 20, 16, padding=2)
    with pytest.raises(anypatch.UnsupportedModelError, match="mixer"):
        anypatch.check(model, 32)


def test_no_accelerators_generator_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    model = vit()
    before = torch.random.get_rng_state()
    anypatch.check(model, 32)
    assert not seeded
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_repr_of_a_plain_result_is_short() -> None:
    assert repr(anypatch.Check(0.0, True, 1, (32, 32))) == (
        "Check(error=0.0, passed=True, compared=1, patch_size=(32, 32))"
    )
