"""Hand-made models: every stem that reads patches, what goes with them, and what only running the class tells."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anypatch
from anypatch import GeometryError, UnsupportedModelError
from builders import vit


class Groups(nn.Module):
    """One patch embedding per group of bands, tokens side by side."""

    def __init__(self, bands: tuple[int, ...] = (4, 4, 2), patch: int = 8) -> None:
        super().__init__()
        self.bands = bands
        self.patch_embed = nn.ModuleList([nn.Conv2d(c, 32, patch, patch) for c in bands])
        self.pos_embed = nn.Parameter(torch.randn(1, 36, 32))
        self.attn = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = zip(self.patch_embed, x.split(self.bands, 1), strict=True)
        return self.attn(torch.cat([e(b).flatten(2).mT + self.pos_embed for e, b in parts], 1))


@pytest.mark.parametrize("bands", [(4, 4, 2), (3, 1), (6, 6), (12, 2)])
def test_all_parallel_stems_follow(bands: tuple[int, ...]) -> None:
    model = Groups(bands).eval()
    assert anypatch.check(model, 16).passed
    anypatch.adapt(model, 16, keep="grid")
    assert all(conv.kernel_size == conv.stride == (16, 16) for conv in model.patch_embed)
    model(torch.randn(1, sum(bands), 96, 96))


def test_stems_one_after_another_are_refused() -> None:
    model = Groups()
    model.patch_embed = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.Conv2d(32, 32, 4, 4))
    with pytest.raises(UnsupportedModelError, match="not one linear map per patch"):
        anypatch.adapt(model, 16, keep="grid")


class Pad(nn.Module):
    def __init__(self, patch: int, names: tuple[str, str] = ("kernel_size", "stride")) -> None:
        super().__init__()
        self.names = names
        for name in names:
            setattr(self, name, (patch, patch))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = getattr(self, self.names[1])
        return F.pad(x, [0, -x.shape[-1] % size[1], 0, -x.shape[-2] % size[0]])


class Bands(nn.Module):
    """A stem of many channels, a padding before it, and a decoder whose last convolution reads few channels."""

    def __init__(self, patch: int = 16, image: int = 64, channels: int = 12, last: nn.Module | None = None) -> None:
        super().__init__()
        self.img_size, self.patch_size = (image, image), patch
        self.pad = Pad(patch)
        self.projection = nn.Conv2d(channels, 32, patch, patch)
        self.pos_embed = nn.Parameter(torch.randn(1, (image // patch) ** 2, 32))
        self.attn = nn.MultiheadAttention(32, 2, batch_first=True)
        self.last = last or nn.Sequential(nn.Conv2d(32, 3, 1), nn.Conv2d(3, 3, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = self.projection(self.pad(x))
        side = self.img_size[0] // self.patch_size
        pos = F.interpolate(self.pos_embed.mT.reshape(1, 32, side, side), size=t.shape[-2:], mode="bicubic")
        tokens = (t + pos).flatten(2).mT
        return self.last((tokens + self.attn(tokens, tokens, tokens)[0]).mT.unflatten(2, t.shape[-2:]))


@pytest.mark.parametrize("channels", [3, 5, 12])
def test_a_padding_follows_with_the_projection(channels: int) -> None:
    model = anypatch.adapt(Bands(channels=channels).eval(), 8, image_size=120)
    fresh = Bands(8, 120, channels).eval()
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(1, channels, 118, 120)
    torch.testing.assert_close(model(x), fresh(x))


@pytest.mark.parametrize("channels", [5, 12])
def test_a_stem_of_many_channels_is_found_by_what_it_reads(channels: int) -> None:
    assert anypatch.geometry(Bands(channels=channels)).patch_size == (16, 16)
    assert anypatch.check(Bands(channels=channels).eval(), 32).passed


@pytest.mark.parametrize(
    "last", [lambda: nn.Upsample(scale_factor=16), lambda: nn.ConvTranspose2d(32, 2, 16, 16), lambda: nn.Upsample(64)]
)
def test_layers_that_bring_tokens_back_to_pixels_follow(last: Callable[[], nn.Module]) -> None:
    model = anypatch.adapt(Bands(last=last()).eval(), 32, keep="grid")
    assert model(torch.randn(1, 12, 128, 128)).shape[-2:] == (128, 128)


def test_upsampling_in_several_steps_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="last upsamples tokens to pixels in 2 layers"):
        anypatch.adapt(Bands(last=nn.Sequential(nn.Upsample(scale_factor=4), nn.Upsample(scale_factor=4))), 32)


def root(self: Any, table: torch.Tensor, h: int, w: int) -> torch.Tensor:
    side = math.isqrt(table.shape[1])
    return F.interpolate(table.mT.reshape(1, 32, side, side), size=(h, w), mode="bicubic").flatten(2).mT


def power(self: Any, table: torch.Tensor, h: int, w: int) -> torch.Tensor:
    side = int(table.shape[1] ** 0.5)
    return table.reshape(1, side, side, 32).flatten(1, 2)


def free(self: Any, table: torch.Tensor, h: int, w: int) -> torch.Tensor:
    return table


class Rooted(nn.Module):
    def __init__(self, resize: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.img_size, self.resize = (64, 64), resize
        self.patch_embed = nn.Conv2d(3, 32, 16, 16)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = self.patch_embed(x)
        return t.flatten(2).mT + self.resize(self, self.pos_embed, *t.shape[-2:])


@pytest.mark.parametrize("resize", [root, power])
@pytest.mark.parametrize("image", [(64, 96), (64, 256)])  # 24 tokens; 64 tokens, which is a square number
def test_a_class_that_takes_its_table_for_a_square_is_refused_a_rectangle(
    resize: Callable[..., torch.Tensor], image: tuple[int, int]
) -> None:
    with pytest.raises(GeometryError, match="takes its position table for a square grid"):
        anypatch.adapt(Rooted(resize), image_size=image)
    anypatch.adapt(Rooted(resize), image_size=96)


def test_a_class_that_does_not_gets_its_rectangle() -> None:
    model = Rooted(free)
    anypatch.adapt(model, image_size=(64, 96))
    model(torch.randn(1, 3, 64, 96))


class Generating(nn.Module):
    """As DOFA's patch embedding: a network makes the kernel from the wavelengths of the bands."""

    def __init__(self, patch: int | tuple[int, int], name: str) -> None:
        super().__init__()
        setattr(self, name, patch)
        self.weight_generator = nn.Linear(24, 32 * 16 * 16)


@pytest.mark.parametrize(("patch", "name"), [(16, "kernel_size"), ((16, 8), "patch_size")])
@pytest.mark.parametrize("sizes", [{"image_size": 96}, {"patch_size": 32}])
def test_a_kernel_that_is_computed_while_the_model_runs_is_said(patch: Any, name: str, sizes: dict[str, Any]) -> None:
    model = nn.Module()
    model.patch_embed = Generating(patch, name)
    model.pos_embed = nn.Parameter(torch.randn(1, 17, 32))
    message = "patch_embed .Generating.*computes its kernel while it runs.*image size alone.*need pos_embed resampled"
    with pytest.raises(UnsupportedModelError, match=message):
        anypatch.adapt(model, **sizes)


def test_a_linear_layer_over_flattened_patches_is_no_such_embedding() -> None:
    model = nn.Module()
    model.patch_embed = Generating(16, "patch_size")
    model.patch_embed.proj = nn.Linear(3 * 16 * 16, 32)
    with pytest.raises(UnsupportedModelError, match="of linear layers over flattened patches the flattening order"):
        anypatch.adapt(model, 32)


class Detector(nn.Module):
    """Gives its boxes in pixels: by the strides of its maps, which show in no shape."""

    def __init__(self, held: bool, name: str, value: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone: nn.Module = vit(embed_dim=24) if held else nn.Conv2d(3, 24, 8, 8)
        self.held, self.name = held, name
        self.pos_embed = nn.Parameter(torch.randn(1, 1 if held else 16, 24))
        self.boxes = nn.Linear(24, 4)
        setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.backbone.forward_features(x)[:, 1:] if self.held else self.backbone(x).flatten(2).mT
        strides = getattr(self, self.name)
        strides = list(strides.values()) if isinstance(strides, dict) else strides
        stride = strides if isinstance(strides, int) else strides[1]
        return self.boxes(tokens + self.pos_embed) * (stride if isinstance(stride, int) else stride[0])


STRIDES: dict[str, Any] = {
    "feat_stride": 8,
    "fpn_strides": (4, 8, 16),
    "strides": [4, 8, 16, 32, 64],
    "anchor_strides": [(4, 4), (8, 8), (16, 16)],
    "_out_feature_strides": {"p2": 4, "p3": 8, "p4": 16},
}


@pytest.mark.siblings(fast=2)
@pytest.mark.parametrize(("name", "held"), [(name, held) for name in STRIDES for held in (False, True)])
def test_strides_of_maps_follow_the_patch(name: str, held: bool) -> None:
    model = Detector(held, name, STRIDES[name]).eval()
    x = torch.rand(2, 3, 32, 32)
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).reshape(-1, 1, 8, 8)
    larger = F.interpolate(patches, (16, 16), mode="bicubic", antialias=True).reshape(2, 3, 4, 4, 16, 16)
    before = model(x)
    anypatch.adapt(model, 16, keep="grid", kernel="pi")
    torch.testing.assert_close(model(larger.transpose(3, 4).reshape(2, 3, 64, 64)), 2 * before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("held", [False, True])
def test_strides_of_a_pyramid_that_would_be_no_whole_numbers_are_refused(held: bool) -> None:
    with pytest.raises(
        GeometryError, match=r"fpn_strides are the strides of a pyramid over patches of 8 .*\(1, 8, 16\)"
    ):
        anypatch.adapt(Detector(held, "fpn_strides", (1, 8, 16)), 12, keep="grid")


@pytest.mark.parametrize("value", [(8, 2, 2, 2), (1, 2, 8, 8), (3, 8, 16)])
def test_strides_that_follow_one_another_stay(value: tuple[int, ...]) -> None:
    model = anypatch.adapt(Detector(True, "strides", value).eval(), 16, keep="grid")
    assert model.strides == value
