"""Tokens between blocks, read alike from every host's models."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from anypatch.adaptation import describe, host
from anypatch.errors import UnsupportedModelError
from anypatch.hosts.blocks import as_tokens, block_list, reading, spread
from builders import transformers_model


def said(model: nn.Module, pixels: Tensor) -> list[Any]:
    subject = describe(model.eval())
    with torch.no_grad(), reading(spread(block_list(subject), (1 / 4, 1 / 2, 3 / 4))) as seen:
        host(model).features(subject, pixels)
    return [as_tokens(subject, output, pixels) for output in seen]


def test_tokens_are_those_of_the_host_s_own_hidden_states() -> None:
    model = transformers_model("Dinov2", num_hidden_layers=4, image_size=24)
    pixels = torch.rand(2, 3, 24, 24)
    states = model(pixel_values=pixels, output_hidden_states=True).hidden_states  # embeddings first
    found = said(model, pixels)
    assert len(found) == 3
    for place, tokens in enumerate(found, start=1):
        assert torch.equal(tokens.prefix, states[place][:, :1])
        assert torch.equal(tokens.patches.flatten(1, 2), states[place][:, 1:])


def test_tokens_are_those_that_timm_reads() -> None:
    model: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=8, embed_dim=24).eval()
    pixels = torch.rand(2, 3, 32, 32)
    theirs = model.forward_intermediates(pixels, indices=[1, 3, 5], intermediates_only=True)
    for tokens, map_ in zip(said(model, pixels), theirs, strict=True):
        assert torch.equal(tokens.patches.permute(0, 3, 1, 2), map_)


def test_stages_of_a_hierarchy_are_read_on_their_own_grids() -> None:
    small = {"img_size": 64, "window_size": 2, "embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 1, 1)}
    model = timm.create_model("swin_tiny_patch4_window7_224", **small)
    grids = [tuple(t.patches.shape[1:]) for t in said(model, torch.rand(1, 3, 64, 64))]
    assert grids == [(16, 16, 8), (8, 8, 16), (4, 4, 32)]


def test_sequences_that_come_first_are_turned() -> None:
    import open_clip

    visual = open_clip.CLIPVisionCfg(layers=4, width=64, head_width=32, patch_size=8, image_size=32)
    model = open_clip.model.CLIP(16, visual, open_clip.CLIPTextCfg(context_length=8, vocab_size=16, width=16, heads=1))
    found = said(model, torch.rand(3, 3, 32, 32))
    assert [(tuple(t.prefix.shape), tuple(t.patches.shape)) for t in found] == [((3, 1, 64), (3, 4, 4, 64))] * 3
    subject = describe(model)
    sequence = torch.cat([found[0].prefix, found[0].patches.flatten(1, 2)], 1).transpose(0, 1)
    turned = as_tokens(subject, sequence, torch.rand(3, 3, 32, 32))
    assert torch.equal(turned.patches, found[0].patches)


@pytest.mark.parametrize("output", [None, torch.zeros(2, 5), torch.zeros(7, 3, 16), torch.zeros(2, 17, 16).long()])
def test_what_is_not_tokens_is_refused(output: Any) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24)
    with pytest.raises(UnsupportedModelError, match="VisionTransformer"):
        as_tokens(describe(model), output, torch.rand(2, 3, 32, 32))
