"""What a user puts around a patch projection: colours may change there, places may not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

import anypatch
from anypatch.errors import UnsupportedModelError
from builders import random_vit

SCALE = torch.tensor([0.2, 0.5, 1.5]).view(3, 1, 1)
ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda x: (x - 0.5) * SCALE,
    "BGR": lambda x: x.flip(1),
    "as it is": lambda x: x.contiguous(),
}
MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted": lambda x: functional.pad(x, (1, 0, 1, 0))[..., :-1, :-1],
    "padded": lambda x: functional.pad(x, (2, 2, 2, 2)),
    "pooled": lambda x: functional.avg_pool2d(x, 3, 1, 1),
    "mirrored": lambda x: x.flip(-1),
    "rolled": lambda x: x.roll(1, -1),
}


class Around(nn.Module):
    def __init__(self, before: Callable[[Tensor], Tensor], conv: nn.Module) -> None:
        super().__init__()
        self.before, self.conv, self.calls = before, conv, 0

    def forward(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(self.before(pixels))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_size, self.img_size = 4, 16
        self.proj = nn.Conv2d(3, 8, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.proj(pixels).flatten(2).transpose(1, 2)
        return self.norm(torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1) + self.pos_embed)


def wrapped(host: str, before: Callable[[Tensor], Tensor]) -> tuple[nn.Module, Around]:
    """A model whose projection stands in a module of the user's."""
    model = timm.create_model("test_vit") if host == "timm" else Own()
    holder = model.get_submodule("patch_embed") if host == "timm" else model
    holder.proj = Around(before, holder.proj)
    return model, holder.proj


def _must_not_run(*_: object) -> None:
    raise AssertionError("the live model runs")


@pytest.mark.parametrize("host", ["timm", "own"])
@pytest.mark.parametrize("what", ALONE)
def test_colours_may_change_around_a_projection(host: str, what: str) -> None:
    model, around = wrapped(host, ALONE[what])
    assert anypatch.check(model, 32 if host == "timm" else 8).passed
    around.conv.register_forward_pre_hook(_must_not_run)
    anypatch.adapt(model, 8)
    assert around.calls == 0


@pytest.mark.parametrize("host", ["timm", "own"])
@pytest.mark.parametrize("what", MOVED)
def test_places_may_not(host: str, what: str) -> None:
    """Adapted, each answers differently where the patch grows: `check` failed for all of them."""
    model, _ = wrapped(host, MOVED[what])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=r"proj \(Around\) pads, pools or moves pixels before"):
        anypatch.adapt(model, 8, keep="grid")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        mean, spread = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return functional.conv2d(x, (self.weight - mean) / spread, self.bias, self.stride)


class PerEntry(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight / weight[0].numel() ** 0.5, bias)


class Scaled(nn.Conv2d):
    """In proportion to its weight, by a number that was set when it was made."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = (self.in_channels * self.kernel_size[0] ** 2) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight * self.scale, self.bias, self.stride)


class Gained(Scaled):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight * self.gain, self.bias, self.stride)


class Embedded(nn.Module):
    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.patch_embed, self.pos_embed = projection, nn.Parameter(torch.randn(1, 16, 8))
        self.attn = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(self.patch_embed(x).flatten(2).mT + self.pos_embed)


@pytest.mark.parametrize("kind", [Standardized, PerEntry])
@pytest.mark.parametrize("patch", [2, 8])
def test_a_kernel_that_is_not_in_proportion_to_the_weight_is_refused(kind: type, patch: int) -> None:
    models = Embedded(kind(3, 8, 4, 4)), random_vit()
    models[1].patch_embed.proj = kind(3, 16, 8, 8)
    for model, factor in zip(models, (1, 2), strict=True):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(UnsupportedModelError, match=f"{kind.__name__} computes its kernel from its weight"):
            anypatch.adapt(model, factor * patch, keep="grid")
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", [Scaled, Gained])
def test_a_kernel_in_proportion_to_the_weight_follows(kind: type) -> None:
    calls: list[str] = []
    model = Embedded(kind(3, 8, 4, 4)).half()
    model.patch_embed.register_forward_hook(lambda *_: calls.append("called"))
    anypatch.adapt(model, 2, keep="grid")
    assert model.patch_embed.weight.dtype == torch.float16
    assert all(parameter.dtype == torch.float16 for parameter in model.parameters())
    assert not calls
    assert anypatch.check(model, 8).passed
