"""Whether a model's forward pass takes a rectangle: a plain run of an empty twin, which needs no memory.

A configuration accepts sizes that ``forward`` then takes for a square, by ``int(tokens**0.5)``, by one number for both
sides, or by a reshape. Run at a grid whose number of tokens is no square number, or at a patch with two different
sides, such a class cannot but fail. The coverage run does this with the tiny models of all its families and writes
``measured.json``; of types that it has not seen, or that differ among themselves, a twin on the meta device is run.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from anypatch.core.ambient import undisturbed
from anypatch.core.empty import empty
from anypatch.core.geometry import Geometry
from anypatch.core.kernels import as_method
from anypatch.core.plan import make as make_plan
from anypatch.core.rehearsal import shapes
from anypatch.core.twins import Subject
from anypatch.errors import AnypatchError
from anypatch.hosts.transformers.feeding import example
from anypatch.hosts.transformers.model import Vision, build_unchecked, subject

FACTS = ("square_patch", "square_grid")


def rectangle(fact: str, current: Geometry) -> Geometry | None:
    """A geometry that only models without the fact can run; ``None`` where there is none to take.

    Of grids, 2 : 3 times a square one has six times a square number of tokens, which is no square.
    """
    if fact == "square_patch":
        patch = (*current.patch_size[:-2], 2 * current.patch_size[-2], 3 * current.patch_size[-1])
        image = current.image_size
        if image is not None:
            image = (*image[:-2], 2 * image[-2], 3 * image[-1])
        return replace(current, patch_size=patch, image_size=image, kernel_size=None, explicit_grid=None)
    if current.image_size is None or current.grid is None or current.overlapping:
        return None
    side = min(current.grid[-2:])
    sides = tuple(n * side * p for n, p in zip((2, 3), current.patch_size[-2:], strict=True))
    return replace(current, image_size=(*current.image_size[:-2], *sides), explicit_grid=None)


def refuses(vision: Vision, fact: str, geometry: Geometry, current: Geometry) -> bool:
    """Whether the forward pass of a model fails at rectangles, as far as an empty twin can tell.

    Args:
        vision: the model.
        fact: ``"square_patch"`` or ``"square_grid"``.
        geometry: what is asked for.
        current: the model's present geometry, at which a twin has to run for its failure to mean anything.
    """
    target = geometry if fact == "square_patch" else rectangle(fact, current)
    if target is None:
        return False
    return _runs(vision, current, current) and not _runs(vision, target, current)


def _runs(vision: Vision, geometry: Geometry, current: Geometry) -> bool:
    try:
        with undisturbed():  # also by the modes of a twin that is being built
            twin = empty(lambda: build_unchecked(vision, geometry, current)).to("meta").eval()
            fed = example(subject(twin))
            shapes(twin, fed.call, fed.shape, torch.float32)
    except AnypatchError:
        return True  # the constructor has its own say
    except Exception:
        return False
    return True


def measure_one(model: nn.Module, fact: str) -> bool | None:
    """Whether a live tiny model fails at a rectangle by itself; ``None`` where it cannot be asked.

    Args:
        model: a tiny model with random weights, which is changed.
        fact: ``"square_patch"`` or ``"square_grid"``.
    """
    found = subject(model)
    vision: Vision = found.about
    target = rectangle(fact, found.geometry)
    if target is None or vision.parts[0].towers:  # a tower's constructor has its own say
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
