"""Position tables on a grid: absolute, per axis, relative. Pure functions of a tensor and two grids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from anypatch.core.geometry import Size

PositionsLike: TypeAlias = Literal["antialias", "host"]


@dataclass(frozen=True)
class Sampling:
    """How the two spatial axes of a table are interpolated, bicubically.

    The default is antialiased, as timm's ``resample_abs_pos_embed`` and open_clip's ``resize_pos_embed``.
    """

    antialias: bool = True
    align_corners: bool = False


ANTIALIASED = Sampling()


def resample_grid(table: Tensor, axes: Size, new_grid: Size, sampling: Sampling = ANTIALIASED) -> Tensor:
    """Resample the axes of ``table`` that span a grid to ``new_grid``.

    The two spatial axes are resampled bicubically; a leading time axis, where there is one, linearly.

    Args:
        table: any shape; ``axes`` are its grid axes, in order (height, width), (time, height, width) or one.
        axes: indices of the grid axes.
        new_grid: the new length of each.
        sampling: of the spatial axes.

    Returns:
        A tensor of the table's dtype with the grid axes resized.
    """
    old_grid = tuple(table.shape[a] for a in axes)
    if old_grid == tuple(new_grid):
        return table.clone()
    rest = [a for a in range(table.ndim) if a not in axes]
    order = [*rest, *axes]
    moved = table.permute(order)
    flat = moved.reshape(-1, *old_grid).to(torch.float64 if table.dtype == torch.float64 else torch.float32)
    if len(axes) == 1:
        flat = _linear(flat, new_grid[0])
    else:
        if len(axes) == 3 and old_grid[0] != new_grid[0]:
            n, t, h, w = flat.shape
            flat = _linear(flat.permute(0, 2, 3, 1).reshape(-1, t), new_grid[0])
            flat = flat.reshape(n, h, w, new_grid[0]).permute(0, 3, 1, 2)
        lead = flat.shape[:-2]
        if tuple(flat.shape[-2:]) != tuple(new_grid[-2:]):
            image = flat.reshape(-1, 1, *flat.shape[-2:])
            image = F.interpolate(
                image,
                size=tuple(new_grid[-2:]),
                mode="bicubic",
                antialias=sampling.antialias,
                align_corners=sampling.align_corners,
            )
            flat = image.reshape(*lead, *new_grid[-2:])
    moved = flat.reshape(*[table.shape[a] for a in rest], *new_grid)
    inverse = [order.index(a) for a in range(table.ndim)]
    return moved.permute(inverse).contiguous().to(table.dtype)


def _linear(rows: Tensor, length: int) -> Tensor:
    """``(n, old) -> (n, length)``, linear interpolation without aligned corners."""
    return F.interpolate(rows[:, None], size=length, mode="linear")[:, 0]


def resample_tokens(
    table: Tensor,
    axis: int,
    old_grid: Size,
    new_grid: Size,
    prefix: int = 0,
    suffix: int = 0,
    sampling: Sampling = ANTIALIASED,
) -> Tensor:
    """Resample an absolute position table whose ``axis`` runs over prefix tokens, the grid, suffix tokens.

    Args:
        table: e.g. ``(1, prefix + h * w + suffix, dim)``, or an embedding ``(tokens, dim)``.
        axis: the token axis.
        old_grid, new_grid: grids, row-major on the token axis.
        prefix, suffix: tokens that have no place on the grid; copied.
        sampling: of the grid.
    """
    tokens = table.shape[axis]
    before, grid, after = table.split([prefix, tokens - prefix - suffix, suffix], dim=axis)
    unfolded = grid.unflatten(axis, tuple(old_grid))
    start = axis % table.ndim
    axes = tuple(range(start, start + len(old_grid)))
    resized = resample_grid(unfolded, axes, new_grid, sampling).flatten(start, start + len(new_grid) - 1)
    return torch.cat([before, resized, after], dim=axis)


def resample_relative(table: Tensor, axis: int, old_window: Size, new_window: Size, extra: int = 0) -> Tensor:
    """Resample a relative-position table over offsets ``-(s - 1) … s - 1`` on each axis of the window.

    As in Swin and BEiT: ``axis`` has ``prod(2 s - 1)`` entries, row-major, followed by ``extra`` entries for
    class-token pairs, which are copied. Centres (offset zero) map to centres.
    """
    old = tuple(2 * s - 1 for s in old_window)
    new = tuple(2 * s - 1 for s in new_window)
    return resample_tokens(table, axis, old, new, suffix=extra)
