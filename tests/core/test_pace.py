"""A flexible model is one model: what is set on its modules holds at every patch size."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anypatch
from builders import random_vit as vit

PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def at(model: Any, patch: int) -> Tensor:
    return model(PIXELS, patch_size=patch).detach()


def require_equal(model: Any, expected: nn.Module) -> None:
    for patch in (8, 16):
        own = anypatch.adapt(copy.deepcopy(expected), patch) if patch != 8 else expected
        torch.testing.assert_close(at(model, patch), own(PIXELS).detach(), rtol=0, atol=0)


def test_hooks_run_at_every_patch_size() -> None:
    model = vit()
    flexible = anypatch.flexible(model, (8, 16))
    seen: list[Any] = []
    handles = [
        flexible.blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output.shape[1])),
        model.blocks[-1].register_forward_hook(lambda *given: seen.append("first"), prepend=True),
        model.head.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True),
    ]
    for patch, tokens in ((8, 17), (16, 5), (8, 17), (16, 5)):
        at(flexible, patch)
        assert seen == ["first", tokens, {}]
        seen.clear()
    for handle in handles:
        handle.remove()
    for patch in (8, 16):
        at(flexible, patch)
    assert not seen


def test_a_hook_that_knows_the_model_reads_the_face_that_runs() -> None:
    model = vit()
    flexible = anypatch.flexible(model, (8, 16))
    seen: list[int] = []
    model.blocks[0].register_forward_hook(lambda *given: seen.append(model.patch_embed.num_patches))
    for patch in (8, 16, 8):
        at(flexible, patch)
    assert seen == [16, 4, 16]


def test_modes_of_modules_are_those_of_every_patch_size() -> None:
    model = vit(proj_drop_rate=0.5)
    flexible = anypatch.flexible(model, (8, 16))
    for mode in (True, False):
        for module in flexible.modules():
            if isinstance(module, nn.Dropout):
                module.train(mode)
        for patch in (8, 16):
            assert torch.equal(at(flexible, patch), at(flexible, patch)) is not mode
    model.train()
    assert not torch.equal(at(flexible, 16), at(flexible, 16))
    flexible.eval()
    require_equal(flexible, model)


SETTINGS: dict[str, Callable[[Any], Any]] = {
    "number": lambda model: vars(model.blocks[0].attn).update(scale=9.0, fused_attn=False),
    "switch": lambda model: setattr(model.blocks[0].attn, "fused_attn", not model.blocks[0].attn.fused_attn),
    "pooling": lambda model: setattr(model, "global_pool", "avg"),
    "in a container": lambda model: model.blocks[0].gates.update(mlp=0.0),
}


class Gated(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.attn, self.block, self.gates = block.attn, block, {"mlp": 1.0}
        self.calls, self.seen = 0, (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.seen = tuple(x.shape[:2])
        return x + self.gates["mlp"] * (self.block(x) - x)


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_are_those_of_every_patch_size(setting: str) -> None:
    model = vit()
    model.blocks[0] = Gated(model.blocks[0])
    flexible = anypatch.flexible(model, (8, 16))
    before = [at(flexible, patch) for patch in (8, 16)]
    SETTINGS[setting](model)
    require_equal(flexible, model)
    if setting != "switch":
        assert not any(torch.equal(at(flexible, patch), old) for patch, old in zip((8, 16), before, strict=True))


def test_what_a_forward_pass_leaves_behind_is_each_faces_own() -> None:
    model = vit()
    model.blocks[0] = Gated(model.blocks[0])
    flexible = anypatch.flexible(model, (8, 16))
    view: Any = flexible.at(16)
    at(flexible, 16)
    at(flexible, 8)
    model.blocks[0].gates["mlp"] = 0.5
    flexible.at(16)
    assert (view.blocks[0].seen, view.blocks[0].gates["mlp"]) == ((2, 5), 0.5)
    assert model.blocks[0].seen == (2, 17)


def test_adapters_are_switched_at_every_patch_size() -> None:
    peft = pytest.importorskip("peft")
    plain = vit()
    model = peft.get_peft_model(
        copy.deepcopy(plain), peft.LoraConfig(target_modules=["qkv"], r=2, init_lora_weights=False)
    ).eval()
    flexible = anypatch.flexible(model, (8, 16))
    for _ in range(2):
        require_equal(flexible, model)
        with model.disable_adapter():
            require_equal(flexible, plain)


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_keeps_pace_with_its_own_model(copying: Callable[[Any], Any]) -> None:
    model = vit()
    first = anypatch.flexible(model, (8, 16))
    other = copying(first)
    SETTINGS["number"](other.model)
    require_equal(other, other.model)
    require_equal(first, model)
    assert not torch.equal(at(first, 16), at(other, 16))
    other.model.reset_classifier(3)
    require_equal(other, other.model)
