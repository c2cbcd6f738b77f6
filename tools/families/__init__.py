"""Tiny models of every family that anypatch knows: what the coverage table proves, one row each."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from anypatch.core.geometry import SizeLike


@dataclass(frozen=True)
class Family:
    """One row of the coverage table.

    Attributes:
        library: the host library's name.
        name: the family, as the host library calls it.
        build: makes a tiny model with random weights.
        embedding: kind of patch embedding, for people.
        positions: kind of positions, for people.
        patch_size: the size to prove; twice the model's own where it is ``None``.
        refused: whether ``adapt`` is expected to refuse the model, with a reason.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    embedding: str
    positions: str
    patch_size: SizeLike | None = None
    refused: bool = False


LIBRARIES = ("timm", "transformers", "diffusers", "open_clip", "torchvision", "generic")


def families(*names: str) -> Iterator[Family]:
    """All families of the named host libraries, or of all of them."""
    for name in names or LIBRARIES:
        try:
            module = importlib.import_module(f"families.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"families.{name}":
                raise
            continue
        yield from module.families()
