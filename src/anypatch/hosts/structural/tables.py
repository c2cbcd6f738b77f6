"""Position tables of hand-made modules: which tensors they are, and their sizes at another geometry."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anypatch.core.geometry import Geometry, Size
from anypatch.core.recordings import left_behind
from anypatch.core.roles import MAX_EXTRA
from anypatch.core.tables import resample_grid, resample_tokens
from anypatch.hosts.base import ancestors

POSITION = re.compile(r"pos(ition)?(al)?s?_?(embed|emb|enc|table)|^pos$|^position(s|al)?$", re.I)
ROTARY = re.compile(r"rope|rotary|freq", re.I)
TIME = re.compile(r"tempor|time|frame", re.I)
RELATIVE = re.compile(r"rel_pos|relative|attn_mask", re.I)
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Table:
    """A position table.

    Attributes:
        path, name: of its module, and in it.
        axes: those of the grid, or the one of the tokens.
        prefix: entries before those of the grid; -1 where they are of relative positions.
        spatial: whether it is over the height and width of a video's grid alone.
    """

    path: str
    name: str
    axes: Size
    prefix: int = 0
    spatial: bool = False

    @property
    def full(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


def is_relative(name: str) -> bool:
    return RELATIVE.search(name) is not None


def all_tensors(model: nn.Module, below: str = "") -> Iterator[tuple[str, str, Tensor]]:
    """Parameters, buffers and plain tensor attributes, as (module path, name, tensor); no results of the last pass."""
    for path, module in model.get_submodule(below).named_modules():
        full = f"{below}.{path}" if below and path else below or path
        left = left_behind(module)
        for name, tensor in [*module._parameters.items(), *module._buffers.items(), *vars(module).items()]:
            if isinstance(tensor, Tensor) and name not in left:
                yield full, name, tensor


def position_tensors(model: nn.Module, below: str = "") -> Iterator[tuple[str, str, Tensor]]:
    """Those of :func:`all_tensors` that are named like a table of positions, rotary ones left out."""
    for path, name, tensor in all_tensors(model, below):
        owner = model.get_submodule(path)
        if isinstance(owner, nn.Embedding):
            named = POSITION.search(path.rpartition(".")[2])
        else:
            leaf = isinstance(owner, (nn.Linear, nn.LayerNorm, *CONVOLUTIONS))
            named = None if leaf else POSITION.search(name) or re.search(r"rel_pos_[hw]$", name)
        if named and not ROTARY.search(f"{path}.{name}") and tensor.is_floating_point():
            yield path, name, tensor


def find_tables(
    model: nn.Module, stem: str, geometry: Geometry, places: Iterable[tuple[str, str]] = ()
) -> tuple[str, tuple[Table, ...]]:
    """The part of the model that the stem belongs to, and the tables that the grid explains; ``places`` are tables by
    other names."""
    if geometry.grid is None:
        return "", ()
    more = set(places)
    tensors = [*position_tensors(model), *((p, n, t) for p, n, t in all_tensors(model) if (p, n) in more)]
    found = [table for path, name, t in tensors if (table := explain(path, name, t, geometry))]
    part = next(
        (a for a in ancestors(stem) if any(t.path == a or t.path.startswith(f"{a}.") or not a for t in found)), ""
    )
    inside = [t for t in found if within(t.path, part)]
    prefix = next((t.prefix for t in inside if t.prefix >= 0), 0)
    outside = [t for t in found if t not in inside and len(t.axes) == 1 and t.prefix in (0, prefix)]
    return part, (*inside, *outside)


def within(path: str, part: str) -> bool:
    """Whether a module is in a part of the model; "" is the whole."""
    return not part or path == part or path.startswith(f"{part}.")


def explain(path: str, name: str, tensor: Tensor, geometry: Geometry) -> Table | None:
    """The table that a tensor is by its shape, if the grid explains one."""
    grid = geometry.grid
    assert grid is not None
    shape = tuple(tensor.shape)
    if is_relative(name):
        side = grid[-2] if name.endswith("_h") else grid[-1]
        return Table(path, name, (0,), -1) if len(shape) == 2 and shape[0] == 2 * side - 1 else None
    rank = len(grid)
    if len(shape) > rank:
        for start in range(len(shape) - rank + 1):
            if shape[start : start + rank] == grid:
                return Table(path, name, tuple(range(start, start + rank)))
    order = [a for a in (len(shape) - 2, 0, 1, len(shape) - 1) if 0 <= a < len(shape)]
    for spatial in (False, True) if rank == 3 else (False,):
        tokens = math.prod(grid[1:] if spatial else grid)
        for axis in dict.fromkeys(order):
            if len(shape) > 1 and 0 <= shape[axis] - tokens <= MAX_EXTRA:
                return Table(path, name, (axis,), shape[axis] - tokens, spatial)
    return None


def table_shape(table: Table, shape: Size, geometry: Geometry) -> Size:
    """The shape of a table at another geometry."""
    assert geometry.grid is not None
    new = list(shape)
    if table.prefix < 0:  # relative, one axis
        new[0] = 2 * (geometry.grid[-2] if table.name.endswith("_h") else geometry.grid[-1]) - 1
    elif len(table.axes) > 1:
        for axis, side in zip(table.axes, geometry.grid, strict=True):
            new[axis] = side
    else:
        new[table.axes[0]] = table.prefix + math.prod(geometry.grid[1:] if table.spatial else geometry.grid)
    return tuple(new)


def resampled(table: Table, tensor: Tensor, old: Geometry, new: Geometry) -> Tensor:
    """A table that is no parameter, at another grid."""
    assert old.grid is not None
    assert new.grid is not None
    if table.prefix < 0:
        return resample_grid(tensor, (0,), table_shape(table, tuple(tensor.shape), new)[:1])
    if len(table.axes) > 1:
        return resample_grid(tensor, table.axes, new.grid)
    grids = (old.grid[1:], new.grid[1:]) if table.spatial else (old.grid, new.grid)
    return resample_tokens(tensor, table.axes[0], *grids, table.prefix)


def enumerates(tensor: Tensor | None, geometry: Geometry) -> int | None:
    """The length of a buffer that numbers the tokens 0, 1, … (``position_ids``); ``None`` if it does not."""
    if tensor is None or tensor.is_floating_point() or tensor.ndim == 0 or geometry.grid is None:
        return None
    length = tensor.shape[-1]
    if tensor.numel() != length or not 0 <= length - math.prod(geometry.grid) <= geometry.prefix_tokens:
        return None
    return length if torch.equal(tensor.flatten().cpu().long(), torch.arange(length)) else None
