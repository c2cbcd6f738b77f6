"""What the structural rule does not explain, refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from anypatch.core.account import Doubt
from anypatch.core.geometry import Geometry, show
from anypatch.errors import GeometryError, UnsupportedModelError
from anypatch.hosts.base import ancestors
from anypatch.hosts.structural.following import TELLING, counts, ints
from anypatch.hosts.structural.layout import Layout
from anypatch.hosts.structural.tables import (
    CONVOLUTIONS,
    TIME,
    all_tensors,
    enumerates,
    is_relative,
    position_tensors,
)
from anypatch.hosts.structural.unnamed import Bound

HINT = 'use keep="grid", or sizes that keep the grid'


def require_named(model: nn.Module, layout: Layout) -> None:
    """What the patch itself decides must have been found by its name.

    Raises:
        UnsupportedModelError: patches are put together into pixels, or cut by another size; the message says where.
    """
    patch = layout.geometry.patch_size
    for path, module in model.named_modules():
        puts = callable(getattr(module, "unpatchify", None)) or isinstance(module, nn.Fold)
        puts = puts or (isinstance(module, nn.PixelShuffle) and module.upscale_factor == patch[-1])
        if puts and not layout.heads:
            raise UnsupportedModelError(
                f"{path or type(model).__name__} puts patches back together into pixels, and no layer that predicts "
                f"them is named like one"
            )
    for ancestor in ancestors(layout.stem):
        value = vars(model.get_submodule(ancestor)).get("patch_size")
        size = (value, value) if type(value) is int else ints(value)
        if size is not None and patch[-len(size) :] != size and size != patch:
            raise UnsupportedModelError(
                f"{ancestor + '.' if ancestor else ''}patch_size is {value}, but {layout.stem} cuts patches of "
                f"{show(patch)}: which of them follows cannot be told"
            )


def require_known_grid(model: nn.Module, layout: Layout, new: Geometry) -> None:
    """A table cannot be brought to an image size from a grid that nothing tells.

    Raises:
        GeometryError: that is asked; the message says how to tell it.
    """
    if layout.geometry.image_size is not None or new.image_size is None:
        return
    bound = layout.bound
    if bound is not None:
        raise GeometryError(unknown_grid(bound))
    for path, name, tensor in position_tensors(model, layout.part) if len(new.patch_size) == 2 else ():
        if tensor.ndim > 1 and not is_relative(name):
            raise GeometryError(unknown_grid(Bound(((path, name),), tuple(tensor.shape), None)))


def unknown_grid(bound: Bound, more: str = "") -> str:
    """What is said of a table whose grid is told neither by its length nor by the model."""
    return (
        f"{bound.full}, of shape {bound.shape}, is over a grid that cannot be told, as it is no square and nothing in "
        f"the model says its image size: set model.img_size = (height, width) first{more}"
    )


def require_explained(model: nn.Module, layout: Layout, new: Geometry) -> list[Doubt]:
    """Nothing else in the part that the stem belongs to may depend on the grid.

    Returns:
        What its shape alone does not tell: a run at another grid does.

    Raises:
        UnsupportedModelError, GeometryError: something does; the message names it.
    """
    old = layout.geometry
    if old.grid is None or new.grid is None or old.grid == new.grid:
        return []
    part = model.get_submodule(layout.part)
    _require_square(part, old, new)
    known = {(t.path, t.name) for t in layout.tables}
    lengths = _lengths(model, layout)
    positions = {(path, name) for path, name, _ in position_tensors(model, layout.part)}
    doubts: list[Doubt] = []
    for path, name, tensor in all_tensors(model, layout.part):
        if (path, name) in known or enumerates(tensor, old) is not None or _of_window(model, path, name, tensor, old):
            continue
        owner, full = model.get_submodule(path), f"{path}.{name}" if path else name
        if isinstance(owner, (nn.Linear, *CONVOLUTIONS)):
            doubts += _doubts_of_layer(owner, name, full, layout, lengths)
            continue
        error = UnsupportedModelError(
            f"{full}, of shape {tuple(tensor.shape)}, may depend on the grid in a way that anypatch cannot tell for a "
            f"hand-made model: {HINT}"
        )
        spans, is_position = _may_span(owner, name, tensor) & lengths, (path, name) in positions
        if is_relative(name) or _follows_time(name, tensor, old, new) or (spans and is_position):
            raise error
        if is_position and tensor.ndim > 1:
            raise UnsupportedModelError(
                f"{full}, of shape {tuple(tensor.shape)}, is named like a position table, but is none over a "
                f"{show(old.grid)} grid: {HINT}"
            )
        doubts += [Doubt(owner, name, size, error) for size in spans]
    _require_one_grid(part, old)
    return doubts


def _doubts_of_layer(owner: Any, name: str, full: str, layout: Layout, lengths: set[int]) -> Iterator[Doubt]:
    """A layer that reads as many values as there are tokens, or as they have together."""
    if name != "weight":
        return
    size, width = _values_read(owner), layout.width
    if size in lengths:
        yield Doubt(owner, name, size, GeometryError(f"{full} mixes a fixed number of tokens ({size}): {HINT}"))
    elif size % width == 0 and size // width in counts(layout.geometry) and size // width > TELLING**2:
        why = f"reads all {size // width} tokens of {width} values at once"
        yield Doubt(owner, name, size, GeometryError(f"{full} {why}: {HINT}"))


def _lengths(model: nn.Module, layout: Layout) -> set[int]:
    """Numbers of tokens that no width of the model is."""
    part, stem = model.get_submodule(layout.part), model.get_submodule(layout.stem)
    widths = {m.normalized_shape[-1] for m in part.modules() if isinstance(m, nn.LayerNorm)}
    widths.add(stem.out_channels)  # type: ignore[arg-type]
    return set(counts(layout.geometry)) - widths


def _require_square(part: nn.Module, old: Geometry, new: Geometry) -> None:
    assert old.grid is not None
    assert new.grid is not None
    if len(set(old.grid[-2:])) == 1 != len(set(new.grid[-2:])) and any(
        hasattr(m, "interpolate_pos_encoding") for m in part.modules()
    ):
        raise GeometryError(
            f"{type(part).__name__}.interpolate_pos_encoding takes its position table for a square grid, and "
            f"{show(new.image_size)} at patch {show(new.patch_size)} is a {show(new.grid)} one: adapt to a square "
            f"image, and the model itself interpolates for others"
        )


def _values_read(layer: Any) -> int:
    """What a linear layer, or a convolution that is one, reads at each place; 0 of all others."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    return layer.weight.shape[1] if set(layer.kernel_size) == {1} else 0


def _require_one_grid(part: nn.Module, old: Geometry) -> None:
    for path, module in part.named_modules():
        size = ints(vars(module).get("input_resolution"))
        if size is not None and size not in (old.image_size, old.grid):
            raise UnsupportedModelError(
                f"{path}.input_resolution ({show(size)}) is of a coarser grid, which anypatch cannot follow in a "
                f"hand-made model: {HINT}"
            )


def _of_window(model: nn.Module, path: str, name: str, tensor: Tensor, old: Geometry) -> bool:
    """Whether a relative table or index is over a window that is smaller than the grid."""
    if not is_relative(name) or tensor.ndim == 0:
        return False
    assert old.grid is not None
    for ancestor in [path, *ancestors(path)] if path else [path]:
        value = vars(model.get_submodule(ancestor)).get("window_size")
        window = (value, value) if type(value) is int else ints(value)
        if (
            window is not None
            and len(window) == 2
            and all(0 < w < g for w, g in zip(window, old.grid[-2:], strict=True))
        ):
            offsets = math.prod(2 * w - 1 for w in window)
            return tensor.shape[0] in {*(2 * w - 1 for w in window), offsets, offsets + 3, math.prod(window)}
    return False


def _follows_time(name: str, tensor: Tensor, old: Geometry, new: Geometry) -> bool:
    """Whether a tensor is named like a table over a video's time axis, which changes."""
    assert old.grid is not None
    assert new.grid is not None
    return len(old.grid) == 3 and old.grid[0] != new.grid[0] and bool(TIME.search(name)) and old.grid[0] in tensor.shape


def _may_span(owner: nn.Module, name: str, tensor: Tensor) -> set[int]:
    """Lengths of the axes of an unexplained tensor that may run over tokens."""
    if isinstance(owner, (nn.LayerNorm, nn.modules.batchnorm._NormBase)) and tensor.ndim < 2:
        return set()
    if isinstance(owner, nn.MultiheadAttention):  # three times 192 channels are 24x24 tokens
        return set()
    if re.search(r"proj|weight", name) and tensor.ndim == 2:  # a matrix; its result may have any width
        return set(tensor.shape[:1])
    if isinstance(tensor, nn.Parameter) and tensor.ndim < 2:
        return set()
    return set(tensor.shape)
