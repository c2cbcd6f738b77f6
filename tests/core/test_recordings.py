"""What the last forward pass left in attributes and hooks is no table: it stays, and is no obstacle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import anypatch
from anypatch import UnsupportedModelError


def vit() -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = vit()
        self.maps: dict[str, Tensor] = {}
        self.last: Any = None

    def save_tokens(self, tokens: Tensor) -> None:
        self.kept = tokens

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.backbone.forward_features(x)
        self.maps["tokens"] = self.last.detach()
        self.save_tokens(self.last)
        return self.last.mean(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(48, 144)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        self.weights = (q @ k.mT).softmax(-1)
        return self.weights @ v


class HandMade(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 48, 16, 16)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, 48))
        self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(self.patch_embed(x).flatten(2).mT + self.pos_embed).mean(1)


class Recorder:
    def __init__(self) -> None:
        self.out: Any = None
        self.outs: list[Any] = []

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.out = output

    def keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.outs.append(output.detach())


def hooked(kind: str) -> Any:
    model, seen, last = vit(), {}, None

    def into(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[f"{name}.out"] = output

        return hook

    def outer(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal last
        last = output

    hooks = {"closure": into("block"), "outer": outer, "object": Recorder(), "method": Recorder().keep}
    model.blocks[0].register_forward_hook(hooks[kind])
    return model


MODELS: dict[str, Any] = {
    "attributes": Around,
    "attention of a hand-made model": HandMade,
    **{kind: lambda kind=kind: hooked(kind) for kind in ("closure", "outer", "object", "method")},
}


@pytest.mark.siblings(fast=6)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("grad", [True, False])
def test_what_the_last_pass_recorded_is_no_obstacle(kind: str, grad: bool) -> None:
    model, fresh = MODELS[kind]().eval(), MODELS[kind]().eval()
    fresh.load_state_dict(model.state_dict())
    with torch.set_grad_enabled(grad):
        model(torch.randn(2, 3, 64, 64))
    assert anypatch.check(model, 32).passed
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        for live in (model, fresh):
            anypatch.adapt(live, image_size=96)
        assert torch.equal(model(x), fresh(x))


class Table(Around):
    """Tables and caches, which are read."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.set_table()

    def set_table(self) -> None:
        self.table: Any = torch.ones(17, 1)
        self.cache: Any = None
        self.tables = {"mask": torch.ones(17, 1)}

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone.forward_features(x)
        if self.kind == "cache":
            if self.cache is None:
                self.cache = torch.ones(tokens.shape[1], 1)
            tokens = tokens * self.cache
        self.tables = {key: value * 1 for key, value in self.tables.items()} if self.kind == "tables" else {}
        return (tokens * self.table if self.kind == "table" else tokens).mean(1)


@pytest.mark.parametrize("kind", ["table", "cache", "tables"])
def test_what_is_read_is_still_refused(kind: str) -> None:
    model = Table(kind).eval()
    model(torch.randn(2, 3, 64, 64))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=f"{kind}.* has the number of tokens"):
        anypatch.adapt(model, image_size=96)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
