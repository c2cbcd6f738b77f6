"""Running an empty twin of a hand-made model: what its code takes for granted that neither names nor shapes tell."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.geometry import Geometry, Size, show, with_grid
from anypatch.errors import AnypatchError, GeometryError
from anypatch.hosts.structural.explained import Doubt


def runs(
    twin: nn.Module, channels: int, geometry: Geometry, reached: Callable[[str], None] | None = None
) -> Exception | None:
    """Run a twin on the meta device, where nothing is computed but shapes; the error if it fails.

    ``reached`` hears the path of every module that takes part. The twin is used up: its buffers and plain tensors lose
    their values.
    """
    assert geometry.image_size is not None
    twin.eval()._apply(lambda t: t.to("meta"))
    for module in twin.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                vars(module)[name] = value.detach().to("meta")
    if reached is not None:
        for path, module in twin.named_modules():
            module.register_forward_pre_hook(functools.partial(_tell, reached, path))
    call: Any = twin
    try:
        with torch.no_grad(), torch.device("meta"):
            call(torch.zeros((1, channels, *geometry.image_size)))
    except Exception as error:
        return error
    return None


def _tell(reached: Callable[[str], None], path: str, *_: Any) -> None:
    reached(path)


def one_more(grid: Size) -> Size:
    """A token more on both axes of the image, so that there is another number of them."""
    return (*grid[:-2], *(side + 1 for side in grid[-2:]))


def rootless(grid: Size) -> Size:
    """About as large a grid of n by n + 1 tokens, never a square number: what takes a root of it fails on it."""
    side = max(grid[-2], 2)  # one row of two fails for other reasons, too: what pools or shifts needs neighbours
    return (*grid[:-2], side, side + 1)


def require_over_channels(
    build: Callable[[Geometry], nn.Module], channels: int, old: Geometry, new: Geometry, doubts: list[Doubt]
) -> None:
    """Layers that read as many values as there are tokens: over channels if the model runs with more or fewer tokens.

    Raises:
        GeometryError: it does not, or such a layer takes no part, so that nothing can be told.
    """
    if not doubts or old.grid is None or new.grid is None:
        return
    for probe in (new, with_grid(old, one_more(old.grid))):
        seen: set[str] = set()
        if probe.grid is None or math.prod(probe.grid) == math.prod(old.grid):
            continue
        with contextlib.suppress(AnypatchError):
            if runs(build(probe), channels, probe, seen.add) is None and seen >= {doubt.path for doubt in doubts}:
                return
    raise doubts[0].error


def require_rectangular(
    build: Callable[[Geometry], nn.Module], channels: int, old: Geometry, new: Geometry, name: str
) -> None:
    """Refuse a rectangular grid where the class takes its tables for square ones, by whatever method.

    Where the model does not run on the meta device as it is, nothing can be told.

    Raises:
        GeometryError: the present model runs, and one with such a grid does not.
    """
    if old.grid is None or new.grid is None or len(old.patch_size) != 2:
        return
    if len(set(old.grid)) > 1 or len(set(new.grid)) == 1:
        return
    probe = with_grid(old, rootless(old.grid))
    try:
        twins = build(old), build(probe)
    except AnypatchError:
        return
    if runs(twins[0], channels, old) is not None:
        return
    error = runs(twins[1], channels, probe)
    if error is not None:
        fits = math.prod(new.grid)
        raise GeometryError(
            f"{name} takes its position table for a square grid ({str(error).splitlines()[0]}), and "
            f"{show(new.image_size)} at patch {show(new.patch_size)} is a {show(new.grid)} one of {fits} tokens: adapt "
            f"to a square image"
        )
