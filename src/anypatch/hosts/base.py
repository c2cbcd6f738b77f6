"""The small protocol that one file per host library fulfils."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from anypatch.core.geometry import Geometry, Size
from anypatch.core.twins import Subject
from anypatch.errors import UnsupportedModelError


class HostLibrary(Protocol):
    """What ``anypatch.libraries.timm`` and its neighbours provide, as module-level functions."""

    NAME: str

    def recognises(self, model: nn.Module) -> bool:
        """Whether ``model`` is this library's, decided without importing the library."""

    def subject(self, model: nn.Module) -> Subject:
        """Describe a live model: its geometry and how to build an empty twin of it."""

    def example(self, model: nn.Module, geometry: Geometry) -> Example:
        """What to feed the model to prove an adaptation."""

    def load(self, name: str, **host_kwargs: Any) -> nn.Module:
        """Load a pretrained model by the library's own loader."""

    def save(self, model: nn.Module, directory: Path, **extras: Any) -> None:
        """Write the library's own format."""


class Example:
    """Inputs that can be enlarged patch by patch, and how to read the outputs.

    Args:
        shape: of the pixels, ``(batch, channels, [time,] height, width)``, for the model's present geometry.
        call: ``call(model, pixels) -> outputs`` (any nesting of tensors).
        unit: pixels per entry of what is fed, where that is a map further in (behind a backbone).
    """

    def __init__(
        self, shape: Sequence[int], call: Callable[[nn.Module, Any], Any], unit: Sequence[int] = (1, 1)
    ) -> None:
        self.shape = tuple(shape)
        self.call = call
        self.unit = tuple(unit)


def comes_from(model: nn.Module, package: str) -> bool:
    """Whether the model's class is defined in ``package``."""
    return type(model).__module__.split(".")[0] == package


def plain(size: Size) -> int | Size:
    """A size the way constructors like it: one int where it is square."""
    return size[0] if len(set(size)) == 1 else size


def pair(size: Any) -> Size:
    """A size as (height, width), from the one int or the sequence that a library keeps."""
    return (size, size) if isinstance(size, int) else tuple(int(side) for side in size)


def unknown(library: str, name: str, known: Sequence[str]) -> UnsupportedModelError:
    """The error for a name that a library does not have, with those that are like it."""
    near = difflib.get_close_matches(name, known, n=3)
    return UnsupportedModelError(
        f"{library} knows no model {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
    )


def class_tokens(module: nn.Module) -> int:
    """Tokens that the module's own parameters put before the grid (class, distillation, register tokens)."""
    count = 0
    for name in ("cls_token", "class_token", "dist_token", "distillation_token", "class_embedding"):
        parameter = module._parameters.get(name)
        if parameter is not None:
            count += parameter.shape[-2] if parameter.ndim > 1 else 1
    for name in ("reg_token", "register_tokens", "registers"):
        parameter = module._parameters.get(name)
        if parameter is not None and parameter.ndim > 1:
            count += parameter.shape[-2]
    return count
