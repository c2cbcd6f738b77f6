"""The difference between twins, on bare pairs of modules: no host library, no live model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anypatch import UnsupportedModelError
from anypatch.core.diff import AttributeEdit, BufferEdit, CacheEdit, ModuleEdit, ParameterEdit, diff, require_projection
from anypatch.core.geometry import Geometry
from anypatch.core.roles import role_of
from anypatch.core.twins import Twins


class Stem(nn.Module):
    def __init__(self, patch: int, image: int) -> None:
        super().__init__()
        side = image // patch
        self.patch_size, self.cached = patch, None
        self.proj = nn.Conv2d(3, 4, patch, patch, device="meta")
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + side**2, 4, device="meta"))
        self.register_buffer("index", torch.arange(side**2), persistent=False)
        self.pool = nn.Identity() if side > 2 else nn.Dropout(0.5)
        self.norm = nn.LayerNorm(4, device="meta")


def twins(old: tuple[int, int], new: tuple[int, int], cls: type[nn.Module] = Stem) -> Twins:
    before, after = (Geometry((patch, patch), (image, image)) for patch, image in (old, new))
    return Twins(cls(*old), cls(*new), before, after)


def test_every_kind_of_difference_is_one_typed_edit() -> None:
    edits = {(type(edit), edit.full) for edit in diff(twins((16, 64), (32, 64)))}
    assert edits == {
        (ParameterEdit, "proj.weight"),
        (AttributeEdit, "proj.kernel_size"),
        (AttributeEdit, "proj.stride"),
        (AttributeEdit, "patch_size"),
        (CacheEdit, "cached"),
        (ParameterEdit, "pos_embed"),
        (BufferEdit, "index"),
        (ModuleEdit, "pool"),
    }


def test_roles_and_values_are_read_off_the_edits() -> None:
    edits = {edit.full: edit for edit in diff(twins((16, 64), (32, 64)), "bicubic")}
    table, index, size = edits["pos_embed"], edits["index"], edits["patch_size"]
    assert isinstance(table, ParameterEdit)
    assert role_of(table.case).text == "absolute positions (1 + 4x4 tokens)"
    assert isinstance(index, BufferEdit)
    assert index.after is not None
    assert (index.after.tolist(), index.persistent) == ([0, 1, 2, 3], False)
    assert isinstance(size, AttributeEdit)
    assert (size.before, size.after) == (16, 32)


def test_twins_that_are_alike_differ_in_nothing_but_what_may_be_cached() -> None:
    assert [type(edit) for edit in diff(twins((16, 64), (16, 64)))] == [CacheEdit]


def test_neither_twin_is_touched() -> None:
    pair = twins((16, 64), (32, 64))
    before = [(n, tuple(t.shape)) for m in (pair.old, pair.new) for n, t in m.state_dict().items()]
    diff(pair)
    assert before == [(n, tuple(t.shape)) for m in (pair.old, pair.new) for n, t in m.state_dict().items()]


def test_a_layer_with_weights_that_disappears_is_refused_by_name() -> None:
    class Deep(Stem):
        def __init__(self, patch: int, image: int) -> None:
            super().__init__(patch, image)
            if patch == 16:
                self.later = nn.Linear(4, 4, device="meta")

    with pytest.raises(UnsupportedModelError, match=r"later \(Linear\) disappears"):
        diff(twins((16, 64), (32, 64), Deep))


def test_a_patch_that_no_layer_follows_is_refused() -> None:
    class Blind(nn.Module):
        def __init__(self, patch: int, image: int) -> None:
            super().__init__()
            self.patch_size, self.proj = patch, nn.Conv2d(3, 4, 7, 4, device="meta")

    with pytest.raises(UnsupportedModelError, match="no convolution or linear layer changes with it"):
        require_projection(twins((16, 64), (32, 64), Blind))
