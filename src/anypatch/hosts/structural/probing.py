"""Running an empty twin of a hand-made model: what its code takes for granted that neither names nor shapes tell."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.account import Doubt
from anypatch.core.ambient import undisturbed
from anypatch.core.geometry import Geometry, Size, show, with_grid
from anypatch.core.rehearsal import Indices, Shapes
from anypatch.core.traces import Trace
from anypatch.errors import AnypatchError, GeometryError
from anypatch.hosts.structural.written import written_number

Place = tuple[str, str, int]  # of a tensor in doubt: its module's path, its name, the number that it has


def runs(twin: nn.Module, channels: int, geometry: Geometry, doubts: Sequence[Place] = ()) -> Trace | Exception:
    """Run a twin on the meta device, where nothing is computed but shapes.

    The twin is used up: its buffers and plain tensors lose their values.

    Returns:
        What the run shows, of the tensors at ``doubts`` too; the error if it fails.
    """
    with undisturbed():  # also by the modes of a twin that is being built
        return _run(twin, channels, geometry, doubts)


def _run(twin: nn.Module, channels: int, geometry: Geometry, doubts: Sequence[Place]) -> Trace | Exception:
    assert geometry.image_size is not None
    twin.eval()._apply(lambda t: t.to("meta"))
    for module in twin.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                vars(module)[name] = value.detach().to("meta")
    trace = Trace((held(twin.get_submodule(path), name), size) for path, name, size in doubts)
    call: Any = twin
    try:
        with Shapes(trace), Indices(trace), torch.no_grad(), torch.device("meta"):
            pixels = torch.zeros((1, channels, *geometry.image_size))
            trace.starts(pixels)
            call(pixels)
    except Exception as error:
        return error
    return trace


def held(module: nn.Module, name: str) -> Tensor | None:
    """A tensor of a module, whatever it is kept as."""
    value = {**vars(module), **module._buffers, **module._parameters}.get(name)
    return value if isinstance(value, Tensor) else None


def one_more(grid: Size) -> Size:
    """A token more on both axes of the image, so that there is another number of them."""
    return (*grid[:-2], *(side + 1 for side in grid[-2:]))


def rootless(grid: Size) -> Size:
    """About as large a grid of n by n + 1 tokens, never a square number: what takes a root of it fails on it."""
    side = max(grid[-2], 2)  # one row of two fails for other reasons, too: what pools or shifts needs neighbours
    return (*grid[:-2], side, side + 1)


def require_settled(
    model: nn.Module,
    build: Callable[[Geometry], nn.Module],
    channels: int,
    old: Geometry,
    new: Geometry,
    doubts: Sequence[Doubt],
) -> None:
    """What has the number of tokens has it by chance, if the model runs with more or fewer tokens, and with all of it.

    Raises:
        GeometryError, UnsupportedModelError: it does not, or such a tensor takes no part, so that nothing can be told.
    """
    if not doubts or old.grid is None or new.grid is None:
        return
    paths = {id(module): path for path, module in model.named_modules()}
    places = [(paths[id(doubt.module)], doubt.name, doubt.size) for doubt in doubts]
    before = runs(build(old), channels, old)
    for probe in (new, with_grid(old, one_more(old.grid))):
        if probe.grid is None or math.prod(probe.grid) == math.prod(old.grid):
            continue
        with contextlib.suppress(AnypatchError):
            after = runs(build(probe), channels, probe, places)
            if isinstance(before, Trace) and isinstance(after, Trace) and settled(before, after, old, probe, doubts):
                return
    raise doubts[0].error


def settled(before: Trace, after: Trace, old: Geometry, new: Geometry, doubts: Sequence[Doubt]) -> bool:
    """Whether a run with another number of tokens shows that it has nothing to do with those in doubt."""
    whole = written_number(before, after, old, new) is None
    return whole and after.used == set(range(len(doubts))) and not after.placed


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
    if isinstance(runs(twins[0], channels, old), Exception):
        return
    error = runs(twins[1], channels, probe)
    if isinstance(error, Exception):
        fits = math.prod(new.grid)
        raise GeometryError(
            f"{name} takes its position table for a square grid ({str(error).splitlines()[0]}), and "
            f"{show(new.image_size)} at patch {show(new.patch_size)} is a {show(new.grid)} one of {fits} tokens: adapt "
            f"to a square image"
        )
