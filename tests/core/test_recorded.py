"""Parts of a model that were traced, scripted or exported: they stay and compute the same, or are refused by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import anypatch
from anypatch import UnsupportedModelError

TOKENS = torch.zeros(2, 17, 48)


def vit(name: str = "vit_tiny_patch16_224") -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    return timm.create_model(name, **sizes).eval()


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 17, 48))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.table


class Wrapper(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = vit(), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone.forward_features(x))


def recorded(path: str, record: Callable[[Any], Any], name: str = "vit_tiny_patch16_224") -> Any:
    model = vit(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and people have it
        model.set_submodule(path, record(model.get_submodule(path)))
    return model


def traced(module: nn.Module) -> Any:
    return torch.jit.trace(module, TOKENS)


def exported(module: nn.Module) -> Any:
    return torch.export.export(module, (TOKENS,)).module()


def of_no_library(path: str, record: Callable[[Any], Any]) -> Any:
    model = recorded(path, record)
    model.pretrained_cfg = {}
    return model


STAYS: dict[str, Callable[[], Any]] = {
    "traced block": lambda: recorded("blocks.0", traced),
    "scripted block's part": lambda: recorded("blocks.0.mlp", torch.jit.script),
    "scripted norm": lambda: recorded("norm", torch.jit.script),
    "traced classifier": lambda: recorded("head", lambda head: torch.jit.trace(head, torch.zeros(2, 48))),
    "block's part through fx": lambda: recorded("blocks.0.mlp", torch.fx.symbolic_trace),
    "scripted part of a hand-made model": lambda: of_no_library("blocks.0.mlp", torch.jit.script),
    "traced block of a hand-made model": lambda: of_no_library("blocks.0", traced),
    "scripted head around": lambda: Wrapper(torch.jit.script(nn.Linear(48, 2))).eval(),
}


@pytest.mark.siblings(fast=3)
@pytest.mark.parametrize("kind", STAYS)
def test_parts_that_know_no_size_stay(kind: str) -> None:
    model = STAYS[kind]()
    plain = Wrapper(nn.Linear(48, 2)).eval() if "around" in kind else vit()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 96, 96)
    for live in (model, plain):
        anypatch.adapt(live, 24, image_size=96, kernel="pi")
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
        view, reference = anypatch.at(model, 12), anypatch.at(plain, 12)
        torch.testing.assert_close(view(x), reference(x))
    assert anypatch.check(plain, 32).passed
    assert anypatch.check(model, 32).passed


KNOWS: dict[str, tuple[Callable[[], Any], str]] = {
    "projection": (lambda: recorded("patch_embed.proj", torch.jit.script), "patch_embed.proj is a program recorded by"),
    "stem through fx": (lambda: recorded("patch_embed", torch.fx.symbolic_trace), "patch_embed, a program recorded by"),
    "exported block": (lambda: recorded("blocks.0", exported), "would not .*blocks.0, a program recorded by torch.fx"),
    "block with a table": (
        lambda: recorded("blocks.0", traced, "beit_base_patch16_224"),
        "relative_position_bias_table has to change, and what holds it is a program recorded by TorchScript",
    ),
    "head with a table": (lambda: Wrapper(torch.jit.script(Head())), "head.table has the number of tokens"),
}


@pytest.mark.parametrize("kind", KNOWS)
def test_parts_that_know_a_size_are_refused_by_name(kind: str) -> None:
    build, match = KNOWS[kind]
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=match):
        anypatch.adapt(model, image_size=96)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def _traced(layer: nn.Module, example: torch.Tensor, how: str) -> nn.Module:
    if how == "fx":
        return torch.fx.symbolic_trace(layer)
    return torch.export.export(layer, (example,)).module()


@pytest.mark.siblings(fast=1)
@pytest.mark.parametrize(
    ("how", "place", "sizes"),
    [
        ("fx", "head", {"patch_size": 8}),
        ("fx", "blocks.0", {"patch_size": 8}),
        ("fx", "blocks.0", {"patch_size": 32, "keep": "grid"}),
        ("export", "head", {"patch_size": 8}),
        ("export", "blocks.0", {"patch_size": 32, "keep": "grid"}),
    ],
)
def test_a_traced_layer_that_runs_at_both_geometries_stays(how: str, place: str, sizes: dict[str, Any]) -> None:
    """Every program is of a class of its own, which was taken for a layer that changes."""
    sizes_of_model = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}
    plain = timm.models.VisionTransformer(**sizes_of_model).eval()
    model = copy.deepcopy(plain)
    example = torch.rand(2, 24) if place == "head" else torch.rand(2, 17, 24)
    model.set_submodule(place, _traced(model.get_submodule(place), example, how))
    anypatch.adapt(plain, **sizes)
    anypatch.adapt(model, **sizes)
    pixels = torch.rand(2, 3, *anypatch.geometry(plain).image_size)
    torch.testing.assert_close(model(pixels), plain(pixels))


@pytest.mark.slow
def test_a_traced_layer_with_the_number_of_tokens_in_it_is_named() -> None:
    model = timm.models.VisionTransformer(img_size=64, embed_dim=24, depth=1, num_heads=2).eval()
    model.blocks[0] = _traced(model.blocks[0], torch.rand(2, 17, 24), "export")
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0, a program recorded by torch\.fx or torch\.export"):
        anypatch.adapt(model, 8)
