"""Position tables that no name tells, found by running the model on tensors that have shapes alone.

A table binds the image: with it the model runs at one size, fails at twice that size, and runs there again once the
table is as long as the tokens are then. Tables over a grid that cannot be told (no square, or a video's) bind as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anypatch.core.geometry import Size
from anypatch.core.rehearsal import META, shapes, staged
from anypatch.hosts.base import class_tokens
from anypatch.hosts.structural.tables import CONVOLUTIONS, all_tensors, is_relative, position_tensors

LEAVES = (nn.Linear, nn.LayerNorm, nn.modules.batchnorm._NormBase, nn.MultiheadAttention, nn.Embedding, *CONVOLUTIONS)
FEWEST = 4  # tokens of a table: of fewer, every small tensor is one
Place = tuple[str, str]


@dataclass(frozen=True)
class Bound:
    """What binds a model to one number of tokens.

    Attributes:
        places: module and name of the tables.
        shape: of the first.
        grid: that they are over; ``None`` where more than one is possible.
    """

    places: tuple[Place, ...]
    shape: Size
    grid: Size | None

    @property
    def full(self) -> str:
        return ".".join(part for part in self.places[0] if part)


def bound_by(model: nn.Module, stem: str, grid: Size | None) -> Bound | None:
    """The tables that bind a model; ``None`` where none does, or where the model takes more than pixels.

    Args:
        model: the live model, which stays as it is.
        stem: the path of what cuts the patches.
        grid: that of the model, where it is known.
    """
    layer = model.get_submodule(stem)
    assert isinstance(layer, CONVOLUTIONS)
    tensors = list(_candidates(model))
    known = class_tokens(model)
    lengths = dict.fromkeys(n for *_, t in tensors if layer.out_channels in t.shape for n in t.shape[-3:])
    for length, prefix in itertools.product(lengths, dict.fromkeys((known, 0, 1, 2))):
        tokens = length - prefix
        if tokens < FEWEST:
            continue
        for sides in [grid] if grid is not None else _grids(tokens, len(layer.stride)):
            if math.prod(sides) != tokens:
                continue
            found = [(p, n, t) for p, n, t in tensors if {length, tokens} & set(t.shape)]
            if _binds(model, layer, found, sides, prefix):
                certain = grid is not None or (len(sides) == 2 and sides[0] == sides[1])
                places = tuple((path, name) for path, name, _ in found)
                return Bound(places, tuple(found[0][2].shape), sides if certain else None)
    return None


def _candidates(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    named = {(path, name) for path, name, _ in position_tensors(model)}
    for path, name, tensor in all_tensors(model):
        leaf = isinstance(model.get_submodule(path), LEAVES) and (path, name) not in named
        if tensor.ndim > 1 and tensor.is_floating_point() and not leaf and not is_relative(name):
            yield path, name, tensor


def _grids(tokens: int, axes: int) -> Iterator[Size]:
    """A square if there is one, else the first grid of as many tokens; of a video, each with square frames."""
    if axes == 2:
        divisors = [n for n in range(math.isqrt(tokens), 1, -1) if tokens % n == 0]
        yield from ((n, tokens // n) for n in divisors[:1])
        return
    sides = [n for n in range(math.isqrt(tokens), 1, -1) if tokens % n**2 == 0]
    yield from ((tokens // n**2, n, n) for n in sides[:1])


def _binds(model: nn.Module, stem: nn.Module, found: list[tuple[str, str, Tensor]], grid: Size, prefix: int) -> bool:
    twice = (*grid[:-2], *(2 * side for side in grid[-2:]))
    tokens, more = math.prod(grid), math.prod(twice)
    longer = {tokens: more, tokens + prefix: more + prefix}

    def grown(shape: Size) -> Size:
        order = (len(shape) - 2, *range(len(shape)))  # as many values as tokens: the axis before the last is theirs
        axis = next(axis for axis in order if shape[axis] in longer)
        return (*shape[:axis], longer[shape[axis]], *shape[axis + 1 :])

    return (
        _runs(model, stem, grid)
        and not _runs(model, stem, twice)
        and _runs(model, stem, twice, [(path, name, grown(tuple(tensor.shape))) for path, name, tensor in found])
    )


def _runs(model: nn.Module, stem: nn.Module, grid: Size, tables: list[tuple[str, str, Size]] | None = None) -> bool:
    assert isinstance(stem, CONVOLUTIONS)
    image = (side * patch for side, patch in zip(grid, stem.stride, strict=True))
    try:
        stage = staged(model)
        for path, name, shape in tables or []:
            owner = stage.get_submodule(path)
            tensor = torch.empty(shape, dtype=stem.weight.dtype, device=META)
            if name in owner._parameters:
                owner._parameters[name] = nn.Parameter(tensor)
            elif name in owner._buffers:
                owner._buffers[name] = tensor
            else:
                vars(owner)[name] = tensor
        shapes(stage, lambda module, pixels: module(pixels), (1, stem.in_channels, *image), stem.weight.dtype)
    except Exception:
        return False
    return True
