"""Which geometries a model's forward pass takes: a plain run of an empty twin, which needs no memory.

A configuration accepts sizes that ``forward`` then takes for a square, by ``int(tokens**0.5)``, by one number for both
sides, or by a reshape; or that windows and merged neighbours do not divide, or that have fewer tokens than queries are
taken from. Run at a grid whose number of tokens is no square number, at a patch with two different sides, or at one
patch more on each side, such a class cannot but fail. The coverage run does this with the tiny models of all its
families and writes ``measured.json``; of types that it has not seen, or that differ among themselves, a twin on the
meta device is run.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.ambient import undisturbed
from anypatch.core.empty import empty
from anypatch.core.geometry import Geometry, Size, show, with_grid
from anypatch.core.kernels import as_method
from anypatch.core.plan import make as make_plan
from anypatch.core.rehearsal import Unmasked, shapes
from anypatch.core.twins import Subject
from anypatch.errors import AnypatchError, GeometryError, UnsupportedModelError
from anypatch.hosts.base import Example
from anypatch.hosts.transformers.config import require_one_stride
from anypatch.hosts.transformers.facts import row, takes_some_only
from anypatch.hosts.transformers.feeding import example, packed
from anypatch.hosts.transformers.model import Vision, build_unchecked, stem_padding, subject

FACTS = ("square_patch", "square_grid", "bound_grid")
FEW = 4  # patches on a side, of which merged neighbours and pooling may leave none: those measured had more
NEAR = 8  # patches more or fewer on each side, to find a size that fits


def require_patch(vision: Vision, geometry: Geometry, current: Geometry) -> None:
    """Raises UnsupportedModelError, GeometryError: the forward pass does not take the patch."""
    name = type(vision.model).__name__
    fixed = row(vision.config).fixed_patch
    if fixed:
        raise UnsupportedModelError(f"{name} cannot change its patch size: {fixed}")
    padding = stem_padding(vision)
    if padding and min(geometry.patch_size[-2:]) <= 2 * padding:
        raise GeometryError(
            f"{name} pads images by {padding} pixels on every side, which makes another patch of "
            f"patch_size {show(geometry.patch_size)}: take more than {2 * padding}"
        )
    if len(set(geometry.patch_size[-2:])) > 1 and _only_squares(vision, "square_patch", geometry, current):
        raise UnsupportedModelError(f"{name} accepts only square patches, not {show(geometry.patch_size)}")
    require_one_stride(vision.config, vision.model, geometry.patch_size[-2:], current.patch_size[-2:])


def require_grid(vision: Vision, geometry: Geometry, current: Geometry) -> None:
    """Raises GeometryError: the forward pass does not take the grid; the message names sizes that fit."""
    grid = geometry.grid
    if grid is None or grid == current.grid:
        return
    asked = f"image_size {show(geometry.image_size)} with patch_size {show(geometry.patch_size)}, a {show(grid)} grid,"
    if grid[-2] != grid[-1] and _only_squares(vision, "square_grid", geometry, current):
        raise GeometryError(
            f"{type(vision.model).__name__} takes its positions for a square grid, so {asked} does not fit it; "
            f"give both sides the same number of patches"
        )
    # What binds the grid of a whole does not bind the towers in it: the type of the whole alone says it.
    measured = takes_some_only("bound_grid", vision.kinds[:1]) == "never"
    few = min(grid[-2:]) < FEW and min(grid[-2:]) < min((current.grid or grid)[-2:])
    if (measured and not few) or not _is_bound(vision):
        return
    failure = _lost(vision, geometry, current)
    if failure is None or isinstance(failure, AnypatchError):  # the constructor has its own say
        return
    fits = " or ".join(show(size) for size in _near(vision, geometry, current))
    raise GeometryError(
        f"the forward pass of {type(vision.model).__name__} does not take {asked} ({' '.join(str(failure).split())}): "
        + (f"use image_size {fits}" if fits else f"use an image_size with {show(current.grid)} patches, as now")
        + (', or keep="grid"' if geometry.patch_size != current.patch_size else "")
    )


def _only_squares(vision: Vision, fact: str, geometry: Geometry, current: Geometry) -> bool:
    """Whether a model takes square patches or grids only: as measured, or else by a plain run of a twin."""
    known = takes_some_only(fact, vision.kinds)
    if known in ("always", "never"):
        return known == "always"
    return refuses(vision, fact, geometry, current)


def _near(vision: Vision, geometry: Geometry, current: Geometry) -> Iterator[Size]:
    """The next smaller and the next larger image that a model takes at a patch size, where they are near."""
    for step in (-1, 1):
        for n in range(1, NEAR + 1):
            other = _further(geometry, step * n)
            if other is None:
                break
            if _lost(vision, other, current) is None:
                assert other.image_size is not None
                yield other.image_size
                break


def _further(geometry: Geometry, patches: int) -> Geometry | None:
    """The geometry with so many patches more on each side of the image; ``None`` where one would have none."""
    assert geometry.grid is not None
    grid = (*geometry.grid[:-2], *(side + patches for side in geometry.grid[-2:]))
    return with_grid(geometry, grid) if min(grid) > 0 else None


def telling(fact: str, current: Geometry) -> Geometry | None:
    """A geometry that only models without the fact can run; ``None`` where there is none to take.

    Of grids, 2 : 3 times a square one has six times a square number of tokens, which is no square; and what divides a
    side does not divide the next number.
    """
    if fact == "square_patch":
        patch = (*current.patch_size[:-2], 2 * current.patch_size[-2], 3 * current.patch_size[-1])
        image = current.image_size
        if image is not None:
            image = (*image[:-2], 2 * image[-2], 3 * image[-1])
        return replace(current, patch_size=patch, image_size=image, kernel_size=None, explicit_grid=None)
    if current.image_size is None or current.grid is None or current.overlapping:
        return None
    if fact == "bound_grid":
        return _further(current, 1)
    side = min(current.grid[-2:])
    sides = tuple(n * side * p for n, p in zip((2, 3), current.patch_size[-2:], strict=True))
    return replace(current, image_size=(*current.image_size[:-2], *sides), explicit_grid=None)


def refuses(vision: Vision, fact: str, geometry: Geometry, current: Geometry) -> bool:
    """Whether the forward pass of a model fails at rectangles, as far as an empty twin can tell.

    Args:
        vision: the model.
        fact: ``"square_patch"`` or ``"square_grid"``.
        geometry: what is asked for.
        current: the model's present geometry, at which a twin has to get further for its failure to mean anything.
    """
    target = geometry if fact == "square_patch" else telling(fact, current)
    if target is None:
        return False
    failure = _lost(vision, target, current)
    return failure is not None and not isinstance(failure, AnypatchError)


def _lost(vision: Vision, geometry: Geometry, current: Geometry) -> Exception | None:
    """Why an empty twin does not get as far as at the present geometry, ``None`` where it does.

    That may not be to its end: some models ask for values, which an empty one does not have.
    """
    failure = _failure(vision, geometry, current)
    if failure is None or isinstance(failure, AnypatchError):
        return failure
    present = _failure(vision, current, current)
    same = present is not None and (isinstance(present, AnypatchError) or _place(present) == _place(failure))
    return None if same else failure


def _place(error: Exception) -> tuple[str, int] | None:
    """File and line that raised an error, those of torch and anypatch left out."""
    own = (os.path.dirname(torch.__file__) + os.sep, str(Path(__file__).parents[2]) + os.sep)
    frames = traceback.extract_tb(error.__traceback__)
    places = [(frame.filename, frame.lineno or 0) for frame in frames if not frame.filename.startswith(own)]
    return places[-1] if places else None


def _is_bound(vision: Vision) -> bool:
    """Whether images have the size of the model: a timm tower has its own say, and where patches are packed, the
    configuration's size is that of a table, and what is fed has its own."""
    return not vision.parts[0].towers and not packed(vision, vision.model)


def _failure(vision: Vision, geometry: Geometry, current: Geometry) -> Exception | None:
    """Why the forward pass of an empty twin fails, or its constructor; ``None`` where it runs."""
    try:
        with undisturbed():  # also by the modes of a twin that is being built
            twin = empty(lambda: build_unchecked(vision, geometry, current)).to("meta").eval()
            fed = example(subject(twin))
            shapes(twin, partial(_unmasked, fed), fed.shape, torch.float32)
    except Exception as error:
        return error
    return None


def _unmasked(fed: Example, model: nn.Module, pixels: Tensor) -> Any:
    with Unmasked():
        return fed.call(model, pixels)


def measure_one(model: nn.Module, fact: str) -> bool | None:
    """Whether a live tiny model fails by itself at what a fact is about; ``None`` where it cannot be asked.

    Args:
        model: a tiny model with random weights, which is changed.
        fact: one of ``FACTS``.
    """
    found = subject(model)
    vision: Vision = found.about
    target = telling(fact, found.geometry)
    if target is None or vision.parts[0].towers:  # a tower's constructor has its own say
        return None
    if fact == "bound_grid" and not _is_bound(vision):
        return None
    free = replace(found, build=lambda g: build_unchecked(vision, g, found.geometry))
    with torch.no_grad():
        _feed(found)
        try:
            make_plan(free, target, as_method("wiener")).apply()
        except AnypatchError:  # the configuration says so
            return None
        except Exception:  # the constructor fails at it
            return True
        try:
            _feed(subject(model))
        except Exception:
            return True
    return False


def _feed(found: Subject) -> None:
    fed = example(found)
    fed.call(found.model, torch.randn(fed.shape, generator=torch.Generator().manual_seed(0)))  # zeros may be padding
