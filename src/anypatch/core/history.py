"""What was done to a live model: kept outside the model, which stays what it is.

For the card beside what is saved, and for what a hand-made model does not say itself: a table of 25 entries is over 5x5
patches, or over 4x6 and a class token.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from anypatch.core.geometry import Geometry


@dataclass(frozen=True)
class Step:
    """One adaptation.

    Attributes:
        old, new: the geometry before and after.
        kernel: how the patch kernel was resized.
        positions: how position tables were resampled.
    """

    old: Geometry
    new: Geometry
    kernel: str
    positions: str


_STEPS: weakref.WeakKeyDictionary[nn.Module, tuple[Step, ...]] = weakref.WeakKeyDictionary()
_GEOMETRIES: weakref.WeakKeyDictionary[nn.Module, Geometry] = weakref.WeakKeyDictionary()
_ORIGINS: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def step(old: Geometry, new: Geometry, kernel: Any, positions: str) -> Step:
    """One adaptation, by the arguments of ``adapt``."""
    return Step(old, new, kernel if isinstance(kernel, str) else repr(kernel), positions)


def note(model: nn.Module, done: Step) -> None:
    """Remember an adaptation of a live model, and the geometry of all that holds its patch embedding."""
    _STEPS[model] = (*_STEPS.get(model, ()), done)
    for path, module in model.named_modules():
        if isinstance(module, _ConvNd) and tuple(module.stride) == done.new.patch_size:
            parts = path.split(".")
            for count in range(len(parts)):
                _GEOMETRIES[model.get_submodule(".".join(parts[:count]))] = done.new


def geometry(module: nn.Module) -> Geometry | None:
    """The geometry that a module was brought to last, if it was; tensors may have been changed since."""
    return _GEOMETRIES.get(module)


def note_copy(model: nn.Module, copied: nn.Module) -> None:
    """Remember of a copy what is known of its model."""
    for module, other in zip(model.modules(), copied.modules(), strict=False):
        if module in _GEOMETRIES and type(module) is type(other):
            _GEOMETRIES[other] = _GEOMETRIES[module]


def steps(model: nn.Module) -> tuple[Step, ...]:
    """The adaptations of a live model since it was made, as far as they are known."""
    return _STEPS.get(model, ())


def note_origin(model: nn.Module, source: str) -> None:
    """Remember where a model was loaded from."""
    _ORIGINS[model] = source


def origin(model: nn.Module) -> str | None:
    """Where a model was loaded from, if ``load`` loaded it."""
    return _ORIGINS.get(model)
