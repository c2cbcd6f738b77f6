"""Absolute positions resampled as each library does it itself, against that library's own function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import interpolate_embeddings
from transformers import ViTConfig, ViTModel

import anypatch
from anypatch.errors import GeometryError
from hub_models import DinoV2

OLD, NEW = 32, 48  # image sizes; patch 4, grids 8x8 and 12x12


def of_timm() -> tuple[Any, str, Tensor]:
    model = timm.create_model("vit_tiny_patch16_224", img_size=OLD, patch_size=4, embed_dim=12, depth=1, num_heads=2)
    nn.init.normal_(model.pos_embed)
    return model, "pos_embed", resample_abs_pos_embed(model.pos_embed, [12, 12], num_prefix_tokens=1)


def of_transformers() -> tuple[Any, str, Tensor]:
    config = ViTConfig(image_size=OLD, patch_size=4, hidden_size=12, num_hidden_layers=1, num_attention_heads=2)
    model = ViTModel(config)
    embeddings = model.embeddings
    nn.init.normal_(embeddings.position_embeddings)
    wanted = embeddings.interpolate_pos_encoding(torch.zeros(1, 145, 12), NEW, NEW)
    return model, "embeddings.position_embeddings", wanted


def of_torchvision() -> tuple[Any, str, Tensor]:
    model = VisionTransformer(OLD, 4, 1, 2, 12, 24)
    nn.init.normal_(model.encoder.pos_embedding)
    wanted = interpolate_embeddings(NEW, 4, model.state_dict())["encoder.pos_embedding"]
    return model, "encoder.pos_embedding", wanted


def of_open_clip() -> tuple[Any, str, Tensor]:
    from open_clip.model import CLIP, resize_pos_embed

    def build(size: int) -> CLIP:
        vision: Any = {"image_size": size, "patch_size": 4, "width": 12, "layers": 1, "head_width": 6}
        text: Any = {"context_length": 8, "vocab_size": 16, "width": 8, "heads": 1, "layers": 1}
        return CLIP(8, vision, text)

    model = build(OLD)
    nn.init.normal_(model.visual.positional_embedding)
    state = model.state_dict()
    resize_pos_embed(state, build(NEW))
    return model, "visual.positional_embedding", state["visual.positional_embedding"]


def of_a_hub() -> tuple[Any, str, Tensor]:
    model = DinoV2()
    nn.init.normal_(model.pos_embed)
    side = anypatch.geometry(model).grid
    assert side is not None
    grid = model.pos_embed[0, 1:].T.reshape(1, -1, *side)
    grown = nn.functional.interpolate(grid, (2 * side[0], 2 * side[1]), mode="bicubic")
    return model, "pos_embed", torch.cat([model.pos_embed[:, :1], grown.flatten(2).mT], dim=1)


@pytest.mark.parametrize("made", [of_timm, of_transformers, of_torchvision, of_open_clip, of_a_hub])
@torch.no_grad()
def test_positions_of_the_host(made: Any) -> None:
    model, name, wanted = made()
    size = anypatch.geometry(model).image_size
    assert size is not None
    anypatch.adapt(model, image_size=NEW if size == (OLD, OLD) else 2 * size[0], positions="host")
    torch.testing.assert_close(model.get_parameter(name), wanted)


@torch.no_grad()
def test_load_and_convert_take_it_too(tmp_path: Path) -> None:
    model, name, wanted = of_transformers()
    model.save_pretrained(tmp_path / "a")
    loaded: Any = anypatch.load(tmp_path / "a", image_size=NEW, positions="host")
    torch.testing.assert_close(loaded.get_parameter(name), wanted)
    anypatch.convert(tmp_path / "a", tmp_path / "b", image_size=NEW, positions="host")
    torch.testing.assert_close(load_file(tmp_path / "b" / "model.safetensors")[name], wanted)
    default = anypatch.adapt(model, image_size=NEW)
    assert not torch.allclose(default.get_parameter(name), wanted, atol=1e-3)


def test_other_names_are_refused() -> None:
    other: Any = "area"
    with pytest.raises(GeometryError, match="'antialias' or 'host'"):
        anypatch.adapt(of_timm()[0], image_size=NEW, positions=other)
