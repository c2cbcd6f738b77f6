"""Errors that say what is wrong and what would do, and things that were refused for a wrong reason."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.feature_extraction import create_feature_extractor
from transformers import (
    ASTConfig,
    ASTModel,
    AutoModel,
    BeitConfig,
    BeitModel,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    ViTPreTrainedModel,
)

import anypatch
from anypatch import GeometryError, UnsupportedModelError
from anypatch.core.flattened import require_places
from anypatch.core.geometry import Geometry
from anypatch.core.twins import Twins
from anypatch.hosts.transformers.facts import ROWS, Row
from builders import SMALL


def vit() -> VisionTransformer:
    return VisionTransformer(64, 16, 1, 2, 32, 64).eval()


# -- strides of overlapping patches ------------------------------------------------------------------------------


def spectrogram(kernel: int, stride: int) -> ASTModel:
    sizes = {"patch_size": kernel, "frequency_stride": stride, "time_stride": stride, "num_mel_bins": 64}
    return ASTModel(ASTConfig(max_length=96, **sizes, **SMALL))


@pytest.mark.parametrize(
    ("kernel", "stride", "asked", "said", "would"),
    [(16, 10, 16, "15x15 (kernel 24x24) or 20x20 (kernel 32x32)", 15),
     (16, 12, 14, "12x12 (kernel 16x16) or 15x15", 15), (8, 6, 4, "3x3 (kernel 4x4) or 6x6 (kernel 8x8)", 3)],
)  # fmt: skip
def test_which_strides_would_do(kernel: int, stride: int, asked: int, said: str, would: int) -> None:
    model = spectrogram(kernel, stride)
    with pytest.raises(GeometryError, match="stride") as caught:
        anypatch.adapt(model, asked)
    assert said in str(caught.value)
    assert anypatch.geometry(anypatch.adapt(model, would)).kernel_size == (kernel * would // stride,) * 2


# -- programs ----------------------------------------------------------------------------------------------------


def scripted() -> Any:
    return torch.jit.trace(vit(), torch.zeros(1, 3, 64, 64), check_trace=False)


@pytest.mark.parametrize(
    "made",
    [
        scripted,
        lambda: nn.Sequential(scripted(), nn.Identity()),
        lambda: create_feature_extractor(vit(), ["encoder.ln"]),
        lambda: torch.export.export(vit(), (torch.zeros(1, 3, 64, 64),)),
        lambda: torch.export.export(vit(), (torch.zeros(1, 3, 64, 64),)).module(),
    ],
)
def test_recorded_programs(made: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"adapt the model before (tracing|it is exported)"):
        anypatch.adapt(made(), 32)


def test_a_recorded_part_beside_the_model_is_no_obstacle() -> None:
    scale = torch.jit.trace(nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 64, 64))
    model = nn.Sequential(scale, timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64))
    assert anypatch.geometry(anypatch.adapt(model, 32)).patch_size == (32, 32)


# -- configurations that their own library does not take ---------------------------------------------------------


@pytest.mark.parametrize("cls", [Dinov2Config, Dinov2WithRegistersConfig])
def test_a_model_cut_through_its_configuration(cls: Any) -> None:
    config = cls(image_size=28, patch_size=14, hidden_size=32, num_attention_heads=2)
    config.num_hidden_layers = 2
    model = AutoModel.from_config(config)
    assert anypatch.check(model, 28).passed
    anypatch.adapt(model, 28, keep="grid")
    assert (model.config.patch_size, model.config.image_size) == (28, 56)


class Mine(ViTPreTrainedModel):
    """A class of the user's that takes more than a configuration."""

    def __init__(self, config: Any, outputs: int) -> None:
        super().__init__(config)
        self.vit = ViTModel(config)
        self.head = nn.Linear(config.hidden_size, outputs)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.vit(pixel_values).last_hidden_state[:, 0])


class Nested(Mine):
    """The same, with the model further in."""

    def __init__(self, config: Any, outputs: int) -> None:
        super().__init__(config, outputs)
        self.body = nn.ModuleDict({"vit": self.vit})
        del self.vit

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.body["vit"](pixel_values).last_hidden_state[:, 0])


@pytest.mark.parametrize("cls", [Mine, Nested])
def test_a_class_that_takes_arguments_is_adapted_by_what_it_holds(cls: Any) -> None:
    model = cls(ViTConfig(image_size=64, patch_size=16, **SMALL), 4).eval()
    assert anypatch.check(model, 32).passed
    pixels = torch.randn(1, 3, 64, 64)
    wanted = model(pixels)
    anypatch.adapt(model, 32, keep="grid", kernel=anypatch.Pi("nearest"))
    assert (model.config.patch_size, model.config.image_size) == (32, 128)
    torch.testing.assert_close(model(pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)), wanted)


# -- what is said first ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "coat_tiny", "xcit_nano_12_p8_224"])
def test_an_unsupported_stem_comes_before_sizes_that_would_fit(name: str) -> None:
    model = timm.create_model(name)
    with pytest.raises(UnsupportedModelError, match="only its image_size can change"):
        anypatch.adapt(model, 10)  # which does not divide 224 either


# -- relative tables as the library resamples them ---------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["beit_base_patch16_224", "beitv2_base_patch16_224"])
def test_relative_tables_of_timm(name: str) -> None:
    model: Any = timm.create_model(name, depth=1, embed_dim=32, num_heads=2, img_size=64)
    table = nn.init.normal_(model.blocks[0].attn.relative_position_bias_table).clone()
    wanted = resize_rel_pos_bias_table(table, (6, 6), (11 * 11 + 3, 2))
    anypatch.adapt(model, image_size=96, positions="host")
    torch.testing.assert_close(model.blocks[0].attn.relative_position_bias_table.detach(), wanted)


@torch.no_grad()
def test_relative_tables_of_transformers() -> None:
    model: Any = BeitModel(BeitConfig(image_size=64, patch_size=16, use_relative_position_bias=True, **SMALL))
    bias = next(m for m in model.modules() if hasattr(m, "relative_position_bias_table"))
    table = nn.init.normal_(bias.relative_position_bias_table).clone()
    grid = F.interpolate(table[:49].view(1, 7, 7, 2).permute(0, 3, 1, 2), size=(11, 11), mode="bilinear")
    wanted = torch.cat([grid.permute(0, 2, 3, 1).reshape(-1, 2), table[49:]])
    anypatch.adapt(model, image_size=96, positions="host")
    torch.testing.assert_close(bias.relative_position_bias_table.detach(), wanted)


def test_relative_tables_that_the_library_does_not_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROWS, "beit", Row())
    model: Any = BeitModel(BeitConfig(image_size=64, patch_size=16, use_relative_position_bias=True, **SMALL))
    with pytest.raises(UnsupportedModelError, match="covers absolute tables only"):
        anypatch.adapt(model, image_size=96, positions="host")
    anypatch.adapt(model, image_size=96)


# -- tables over numbered tokens ---------------------------------------------------------------------------------


def video(cls: Any = VideoMAEModel, **over: Any) -> Any:
    decoder = {f"decoder_{name}": value for name, value in SMALL.items()}
    return cls(VideoMAEConfig(**{"image_size": 64, "num_frames": 4, **SMALL, **decoder, **over}))


@pytest.mark.parametrize("cls", [VideoMAEModel, VideoMAEForPreTraining])
@pytest.mark.parametrize("size", [128, (64, 128), (32, 128)])  # the last with as many tokens
def test_a_sinusoid_over_the_flattened_grid_is_no_table_of_places(cls: Any, size: Any) -> None:
    model = video(cls)
    before = model.state_dict()
    with pytest.raises(GeometryError, match="position_embeddings numbers the tokens one after another"):
        anypatch.adapt(model, image_size=size)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_where_tokens_keep_their_numbers_the_table_grows() -> None:
    model = video()
    table = model.embeddings.position_embeddings.clone()
    anypatch.adapt(model, image_size=(8, 64, 64))
    torch.testing.assert_close(model.embeddings.position_embeddings[:, :32], table)
    anypatch.adapt(video(), 32, keep="grid")


def test_a_table_of_places_is_none_of_numbers() -> None:
    anypatch.adapt(ViTMAEModel(ViTMAEConfig(image_size=64, patch_size=16, **SMALL)), image_size=128)


class Numbered(nn.Module):
    """A buffer with a class token before a sinusoid over the flattened grid."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        angles = torch.arange(tokens + 1)[:, None] / 10 ** torch.arange(4)
        self.register_buffer("places", torch.cat([angles.sin(), angles.cos()], 1))


def test_a_hand_made_sinusoid_with_a_class_token() -> None:
    before, after = Geometry((4, 4), (16, 16)), Geometry((4, 4), (16, 32))
    with pytest.raises(GeometryError, match="places numbers the tokens"):
        require_places(Twins(Numbered(16), Numbered(32), before, after))
    require_places(Twins(Numbered(16), Numbered(32), before, Geometry((4, 4), (32, 16))))  # rows as long as before
