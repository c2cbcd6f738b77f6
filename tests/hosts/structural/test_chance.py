"""Widths, heads and classes that have the grid's numbers by chance: 64 channels over 64 tokens are no table."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import anypatch
from anypatch import AnypatchError

Read = Callable[[Any, Tensor, Tensor], Any]


def _side(tokens: Tensor) -> int:
    return round(tokens.shape[1] ** 0.5)


def _map(model: Any, tokens: Tensor) -> Tensor:
    side = _side(tokens)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


class Vit(nn.Module):
    """A ViT by hand: ``width`` channels, layers of ``hidden``, no class token."""

    def __init__(self, image: int, patch: int, width: int, hidden: int, heads: int, read: Any) -> None:
        super().__init__()
        self.patch_size, self.embed_dim, self.num_heads = patch, width, heads
        self.proj = nn.Conv2d(3, width, patch, patch)
        self.pos_embed = nn.Parameter(torch.randn(1, (image // patch) ** 2, width))
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.read = read

    def tokens(self, pixels: Tensor) -> Tensor:
        tokens = self.proj(pixels).flatten(2).transpose(1, 2) + self.pos_embed
        return tokens + self.fc2(self.fc1(self.norm(tokens)).relu())

    def forward(self, pixels: Tensor) -> Any:
        return self.read(self, self.tokens(pixels))


def _plain(model: Any, tokens: Tensor) -> Tensor:
    return tokens


def _pooled(model: Any, tokens: Tensor) -> Tensor:
    return tokens.mean(1)


# image, patch, width, hidden, heads
CHANCES = {
    "as many channels as tokens": (64, 8, 64, 256, 4),
    "a hidden layer as wide as there are tokens": (64, 8, 16, 64, 4),
    "channels and tokens as an image": (32, 4, 64, 32, 8),
    "tokens and channels as many as pixels in a row": (64, 8, 64, 64, 8),
    "as many heads as a row has tokens": (64, 8, 48, 192, 8),
    "as many channels as a patch has rows": (64, 16, 16, 64, 4),
}
SIZES: list[dict[str, Any]] = [{"patch_size": 16}, {"patch_size": 4}, {"image_size": 128}]


@pytest.mark.siblings(fast=7)
@pytest.mark.parametrize("read", [_plain, _map, _pooled])
@pytest.mark.parametrize("chance", CHANCES)
def test_it_is_adapted(chance: str, read: Any) -> None:
    model = Vit(*CHANCES[chance], read).eval()
    image, patch, width, *_ = CHANCES[chance]
    assert anypatch.check(model, patch_size=2 * patch).passed  # the grid kept
    for sizes in SIZES:
        adapted = anypatch.adapt(copy.deepcopy(model), **sizes)
        sides = anypatch.geometry(adapted)
        pixels = torch.randn(2, 3, *(sides.image_size or ()))
        side = (sizes.get("image_size") or image) // (sizes.get("patch_size") or patch)
        direct = Vit(side * sides.patch_size[0], sides.patch_size[0], *CHANCES[chance][2:], read).eval()
        direct.load_state_dict(adapted.state_dict())  # a model built at that geometry
        torch.testing.assert_close(adapted(pixels), direct(pixels), rtol=0, atol=0)
        kernel = anypatch.resize_kernel(model.proj.weight, sides.patch_size)
        torch.testing.assert_close(adapted.proj.weight, kernel, rtol=1e-5, atol=1e-6)
        assert adapted.fc2.weight is not None
        assert adapted.pos_embed.shape == (1, side**2, width)


class Attentive(Vit):
    """With torch's attention, whose three projections are one matrix: 3 x 12 channels, 6 x 6 tokens."""

    def __init__(self, image: int, patch: int, width: int, hidden: int, heads: int, read: Any) -> None:
        super().__init__(image, patch, width, hidden, heads, read)
        self.layer = nn.TransformerEncoderLayer(width, heads, hidden, batch_first=True)

    def tokens(self, pixels: Tensor) -> Tensor:
        return self.layer(super().tokens(pixels))


@pytest.mark.parametrize("sizes", [{"patch_size": 16}, {"patch_size": 4}, {"image_size": 96}])
def test_attention_over_as_many_values_as_tokens_is_adapted(sizes: dict[str, Any]) -> None:
    model = Attentive(48, 8, 12, 36, 3, _plain).eval()
    weight = model.layer.self_attn.in_proj_weight
    assert weight.shape[0] == model.pos_embed.shape[1]
    before = weight.clone()
    assert anypatch.check(model, patch_size=16).passed
    anypatch.adapt(model, **sizes)
    assert torch.equal(weight, before)
    assert model(torch.randn(1, 3, *(anypatch.geometry(model).image_size or ()))).isfinite().all()


class Mixer(Vit):
    """Its layers go over tokens, of which there are as many as channels in a hidden layer."""

    def __init__(self, image: int, patch: int, width: int, hidden: int, heads: int, read: Any) -> None:
        super().__init__(image, patch, width, hidden, heads, read)
        count = (image // patch) ** 2
        self.mix = nn.Linear(count, count)

    def tokens(self, pixels: Tensor) -> Tensor:
        return self.mix(super().tokens(pixels).transpose(1, 2)).transpose(1, 2)


class Spare(Vit):
    """A layer as wide as there are tokens that takes no part: what it is for cannot be told."""

    def __init__(self, image: int, patch: int, width: int, hidden: int, heads: int, read: Any) -> None:
        super().__init__(image, patch, width, hidden, heads, read)
        self.spare = nn.Linear((image // patch) ** 2, 8)


def _hard_places(model: Any, tokens: Tensor) -> Tensor:
    return tokens.reshape(len(tokens), 64, -1)


def _hard_map(model: Any, tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), -1, 8, 8)


@pytest.mark.parametrize("kind", [Mixer, Spare])
@pytest.mark.parametrize("sizes", [*SIZES, {"image_size": (32, 128)}])  # the last has as many tokens, in other places
def test_layers_over_tokens_stay_refused(kind: type[Vit], sizes: dict[str, Any]) -> None:
    model = kind(64, 8, 16, 64, 4, _pooled).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AnypatchError, match="mixes a fixed number of tokens"):
        anypatch.adapt(model, **sizes)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert anypatch.check(kind(64, 8, 16, 64, 4, _pooled).eval(), patch_size=16).passed  # the grid kept


@pytest.mark.parametrize("read", [_hard_places, _hard_map])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("width", [48, 64])  # with 64 channels, shapes alone look as if all were well
def test_tokens_put_into_a_fixed_number_of_places_stay_refused(read: Any, sizes: dict[str, Any], width: int) -> None:
    with pytest.raises(AnypatchError, match=r"keeps the (number of tokens|grid)"):
        anypatch.adapt(Vit(64, 8, width, 96, 4, read).eval(), **sizes)


class Decoder(nn.Module):
    """A segmentation head around timm's ViT; its 64 tokens are as many as the image has rows."""

    def __init__(self, image: tuple[int, int] = (64, 64)) -> None:
        super().__init__()
        self.vit = timm.create_model("vit_tiny_patch16_224", img_size=image, patch_size=8, depth=1, num_classes=0)
        self.head = nn.Conv2d(192, 16, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.vit.forward_features(pixels)[:, 1:]
        found = self.head(tokens.mT.unflatten(-1, self.vit.patch_embed.grid_size))
        return nn.functional.interpolate(found, size=pixels.shape[-2:])


@pytest.mark.parametrize("image", [(32, 128), (64, 128), (32, 64)])
def test_a_side_of_the_image_that_is_as_long_as_there_are_tokens_is_no_obstacle(image: tuple[int, int]) -> None:
    model = anypatch.adapt(Decoder().eval(), image_size=image)
    built = Decoder(image).eval()
    built.load_state_dict(model.state_dict())
    pixels = torch.randn(1, 3, *image, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(pixels), built(pixels))
