"""What a view computes is handed out guarded: a write into it, which nothing would keep, is an error by name."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import prune

import anypatch
from anypatch import UnsupportedModelError
from builders import random_vit as vit

WRITES: dict[str, Callable[[Any], Any]] = {
    "data": lambda view: view.pos_embed.data.mul_(2),
    "initialiser": lambda view: nn.init.xavier_uniform_(view.patch_embed.proj.weight),
    "initialiser that dispatches": lambda view: nn.init.normal_(view.patch_embed.proj.weight),
    "copy": lambda view: view.pos_embed.copy_(torch.zeros(())),
    "augmented": lambda view: _augmented(view.pos_embed),
    "place": lambda view: view.patch_embed.proj.weight.__setitem__((slice(None), 0), 0),
    "part": lambda view: view.pos_embed.detach()[:, 1:].flatten(1).unbind(0)[0].zero_(),
    "other data": lambda view: setattr(view.pos_embed, "data", torch.zeros_like(view.pos_embed)),
    "several": lambda view: torch._foreach_mul_([view.pos_embed.data], 2.0),
    "out": lambda view: torch.add(view.pos_embed.data, 1, out=view.pos_embed.data),
    "inplace": lambda view: nn.functional.relu(view.pos_embed.data, inplace=True),
    "set": lambda view: view.pos_embed.data.set_(torch.zeros_like(view.pos_embed)),
    "swapping": lambda view: torch.utils.swap_tensors(view.pos_embed, torch.zeros(view.pos_embed.shape)),
    "freezing": lambda view: view.pos_embed.requires_grad_(False),
    "pruning": lambda view: prune.l1_unstructured(view.patch_embed.proj, "weight", 0.5),
    "hook": lambda view: view.pos_embed.register_hook(lambda grad: 2 * grad),
}


def _augmented(table: Tensor) -> None:
    table += 1


@pytest.mark.siblings(fast=8)
@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_write_into_what_is_computed_is_refused(kind: str, gradients: bool) -> None:
    model = vit()
    view = anypatch.at(model, 16)
    before = view.state_dict()
    with (
        torch.set_grad_enabled(gradients),
        pytest.raises(UnsupportedModelError, match=r"(pos_embed|weight|weight_orig) of a view"),
    ):
        WRITES[kind](view)
    assert all(torch.equal(tensor, before[name]) for name, tensor in view.state_dict().items())


def test_what_is_computed_is_read_like_any_tensor() -> None:
    model = vit()
    view = anypatch.at(model, 16)
    expected = anypatch.adapt(copy.deepcopy(model), 16).pos_embed.detach()
    table = view.pos_embed
    total = torch.zeros_like(expected)
    total += table
    total.add_(table.data).mul_(0.5)
    torch.testing.assert_close(total.detach(), expected, rtol=0, atol=0)
    assert type(total) is type(table.clone()) is type(2 * table) is Tensor
    table.clone().mul_(2)
    table.sum().backward()
    assert model.pos_embed.grad is not None
    stored = io.BytesIO()
    torch.save({"read": table.detach(), "dict": view.state_dict(), "copied": copy.deepcopy(table.detach())}, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=True)
    for found in (loaded["read"], loaded["dict"]["pos_embed"], loaded["copied"]):
        assert type(found) is Tensor
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("given", [lambda t: t, lambda t: t.data, lambda t: t.detach().clone()])
def test_a_parameter_of_ones_own_is_made_of_what_is_computed(given: Callable[[Tensor], Tensor]) -> None:
    view = anypatch.at(vit(), 16)
    own = nn.Module()
    own.table = nn.Parameter(given(view.pos_embed))
    before = own.table.detach().clone()
    optimizer = torch.optim.AdamW(own.parameters(), lr=0.1)
    own.table.sum().backward()
    optimizer.step()
    assert isinstance(own.table, nn.Parameter)
    assert not torch.equal(own.table, before)
    assert type(copy.deepcopy(own).table) is nn.Parameter
    own.load_state_dict({"table": torch.zeros_like(before)})
    assert not own.table.any()
    torch.testing.assert_close(view.pos_embed.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("average", [ModelEmaV2, pytest.param(ModelEmaV3, marks=pytest.mark.slow)])
def test_averaging_the_state_dict_of_a_view_says_what_it_loses(average: Callable[..., Any]) -> None:
    view = anypatch.at(vit(), 16).eval()
    averaged = average(view, decay=0.5)
    averaged.update(view)
    with pytest.raises(UnsupportedModelError, match=r"pos_embed in a view's state dict .* average the model|weight in"):
        averaged.module(torch.zeros(1, 3, 32, 32))


def test_a_state_dict_that_is_only_read_changes_nothing() -> None:
    model = vit()
    view = anypatch.at(model, 16)
    expected = view(torch.ones(1, 3, 32, 32))
    other = anypatch.adapt(copy.deepcopy(model), 16)
    other.load_state_dict(view.state_dict(), assign=True)
    with torch.no_grad():
        other.pos_embed.mul_(2)
    {name: tensor.half().mul_(2) for name, tensor in view.state_dict().items()}
    torch.testing.assert_close(view(torch.ones(1, 3, 32, 32)), expected, rtol=0, atol=0)
