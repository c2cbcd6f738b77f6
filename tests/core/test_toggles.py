"""Adapters by hand that merge themselves into weights: whether they have is one state, of a model and its views."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anypatch
from anypatch import UnsupportedModelError
from builders import random_vit as vit


class _Adapted(nn.Linear):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.weight, self.bias = layer.weight, layer.bias
        self.down = nn.Parameter(torch.randn(2, layer.in_features))
        self.up = nn.Parameter(torch.randn(layer.out_features, 2))
        self.merged = False
        self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        result = F.linear(x, self.weight, self.bias)
        return result if self.merged else result + self.scale * x @ self.down.T @ self.up.T

    def added(self) -> Tensor:
        return self.scale * self.up @ self.down


class InTrain(_Adapted):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode and self.merged:
            self.weight.data -= self.added()
        elif not mode and not self.merged:
            self.weight.data += self.added()
        self.merged = not mode
        return self


class InMethods(_Adapted):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        return self.unmerge() if mode else self.merge()

    @torch.no_grad()
    def merge(self) -> Any:
        if not self.merged:
            self.weight.add_(self.added())
            self.merged = True
        return self

    @torch.no_grad()
    def unmerge(self) -> Any:
        if self.merged:
            self.weight.sub_(self.added())
            self.merged = False
        return self


class Anew(_Adapted):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode == self.merged:
            self.weight.data = self.weight.data + (-1 if mode else 1) * self.added()
            self.merged = not mode
        return self


KINDS = [InTrain, InMethods, Anew]


def build(kind: type[_Adapted]) -> tuple[Any, Tensor, Tensor]:
    """A model with adapters; what a model without them says whose weights hold them, at patch 8 and adapted to 16."""
    torch.manual_seed(0)
    model, plain = vit(), vit()
    for block, other in zip(model.blocks, plain.blocks, strict=True):
        block.attn.qkv = kind(block.attn.qkv)
        other.attn.qkv.weight.data += block.attn.qkv.added().detach()
    pixels = images()
    return model, plain(pixels).detach(), anypatch.adapt(plain, 16)(pixels).detach()


def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def require(model: Callable[[Tensor], Tensor], expected: Tensor) -> None:
    torch.testing.assert_close(model(images()).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_follows_the_merging_of_its_model(kind: type[_Adapted]) -> None:
    model, own, other = build(kind)
    view = anypatch.at(model, 16)
    for mode in (False, True, False, False, True, True):
        model.train(mode)
        require(view, other)
        view.train(mode)
        require(model, own)
        require(view, other)
        assert view.training is model.training is view.blocks[0].attn.qkv.training is mode


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [True, False])
def test_a_view_does_not_merge_into_the_weights_of_its_model(kind: type[_Adapted], mode: bool) -> None:
    model, own, other = build(kind)
    model.train(mode)
    view = anypatch.at(model, 16)
    with pytest.raises(UnsupportedModelError, match="set the mode of the model first"):
        view.train(not mode)
    assert {module.training for module in (*view.modules(), *model.modules())} == {mode}
    require(model, own)
    require(view, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flexible_model_merges_once(kind: type[_Adapted]) -> None:
    model, own, other = build(kind)
    flexible = anypatch.flexible(model, (8, 16))
    for mode in (True, False, True):
        flexible.train(mode)
        require(flexible, own)
        require(lambda pixels: flexible(pixels, patch_size=16), other)


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))])
@pytest.mark.parametrize("mode", [True, False])
def test_a_copy_of_a_view_has_a_state_of_its_own(copying: Callable[[Any], Any], mode: bool) -> None:
    model, own, other = build(InTrain)
    model.train(mode)
    copied = copying(anypatch.at(model, 16))
    for each in (True, False, True):
        copied.train(each)
        assert copied.blocks[0].attn.qkv.merged is not each
        require(copied, other)
    assert model.blocks[0].attn.qkv.merged is not mode
    require(model, own)


def test_other_attributes_stay_a_views_own() -> None:
    model, own, _ = build(InTrain)
    view = anypatch.at(model)
    view.blocks[0].attn.qkv.scale = 0.0
    require(model, own)
    assert not torch.allclose(view(images()), own)


def test_a_view_that_outlives_its_model_has_its_state() -> None:
    model, _, other = build(InTrain)
    view = anypatch.at(model, 16)
    model.eval()
    del model
    gc.collect()
    for mode in (False, True, False):
        view.train(mode)
        require(view, other)
