"""What was done to a live model, for the card beside what is saved: kept outside the model, which stays what it is."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import nn

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
_ORIGINS: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def step(old: Geometry, new: Geometry, kernel: Any, positions: str) -> Step:
    """One adaptation, by the arguments of ``adapt``."""
    return Step(old, new, kernel if isinstance(kernel, str) else repr(kernel), positions)


def note(model: nn.Module, done: Step) -> None:
    """Remember an adaptation of a live model."""
    _STEPS[model] = (*_STEPS.get(model, ()), done)


def steps(model: nn.Module) -> tuple[Step, ...]:
    """The adaptations of a live model since it was made, as far as they are known."""
    return _STEPS.get(model, ())


def note_origin(model: nn.Module, source: str) -> None:
    """Remember where a model was loaded from."""
    _ORIGINS[model] = source


def origin(model: nn.Module) -> str | None:
    """Where a model was loaded from, if ``load`` loaded it."""
    return _ORIGINS.get(model)
