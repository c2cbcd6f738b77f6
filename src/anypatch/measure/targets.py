"""Which geometries a sweep measures: those asked for, and the one that fidelity is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from anypatch.adaptation import make_plan
from anypatch.core.geometry import (
    NEAREST,
    Geometry,
    ImageSizeLike,
    Keep,
    SizeLike,
    as_size,
    nearest_image,
    show,
    target_geometry,
)
from anypatch.core.tables import PositionsLike
from anypatch.core.twins import Subject
from anypatch.errors import AnypatchError, GeometryError, UnsupportedModelError
from anypatch.measure.features import asked_sizes

Reference = Literal["asked", "native"]


@dataclass(frozen=True)
class Asked:
    """How models are brought to the patch sizes of a sweep; arguments as in :func:`anypatch.adapt`."""

    patch_sizes: int | Sequence[SizeLike]
    image_size: ImageSizeLike | None = None
    keep: Keep = "image"
    kernel: Any = "wiener"
    positions: PositionsLike = "antialias"
    reference: Reference = "asked"


@dataclass(frozen=True)
class Targets:
    """Geometries to measure.

    Attributes:
        native: the model as it is.
        reference: what fidelity is measured against.
        targets: as asked for.
        note: why the reference is not quite what was asked for; empty if it is.
    """

    native: Geometry
    reference: Geometry
    targets: list[Geometry]
    note: str = ""

    def describe(self) -> str:
        """The reference in words."""
        own = "the model as it is: patch" if self.reference == self.native else "the native patch"
        image = show_side(self.reference.image_size or ())
        return f"{own} {show_side(self.reference.patch_size)} at image {image}"


def is_native(current: Geometry, target: Geometry) -> bool:
    """Whether a model need not change for a geometry."""
    return target.patch_size == current.patch_size and current.image_size in (None, target.image_size)


def targets_of(subject: Subject, asked: Asked) -> Targets:
    """The geometries of a sweep, each of which the model can be brought to.

    Raises:
        GeometryError: sizes that do not fit, all of them in one message.
        UnsupportedModelError: the model cannot be adapted, or takes video.
    """
    current = subject.geometry
    _require(current, subject, asked)
    targets = _targets(current, asked)
    for target in targets:
        _require_plan(subject, target, asked)
    if current.image_size is None:  # any size is its own
        reference, note = _at_asked_size(subject, asked)
        return Targets(reference, reference, targets, note)
    if asked.reference == "native" or asked.image_size in (None, NEAREST):
        return Targets(current, current, targets)
    try:
        reference, note = _at_asked_size(subject, asked)
    except GeometryError as error:
        note = f"fidelity is measured against the model as it is: its own patch cannot have that image size ({error})"
        return Targets(current, current, targets, note)
    return Targets(current, reference, targets, note)


def _require(current: Geometry, subject: Subject, asked: Asked) -> None:
    if len(current.patch_size) != 2:
        raise UnsupportedModelError(f"a sweep is for images; {type(subject.model).__name__} takes video")
    if asked.reference not in ("asked", "native"):
        raise AnypatchError(f"reference must be 'asked' or 'native', got {asked.reference!r}")
    if asked.keep not in ("image", "grid"):
        raise GeometryError(f'keep must be "image" or "grid", got {asked.keep!r}')
    if current.image_size is None and asked.image_size in (None, NEAREST):
        raise GeometryError(f"{type(subject.model).__name__} takes any image size: say which with image_size")


def _targets(current: Geometry, asked: Asked) -> list[Geometry]:
    sizes: list[Any] = [asked.patch_sizes] if hasattr(asked.patch_sizes, "__index__") else list(asked.patch_sizes)
    if not sizes:
        raise GeometryError("no patch sizes were given")
    targets: list[Geometry] = []
    wrong = []
    for size in sizes:
        try:
            target = target_geometry(current, size, asked.image_size, asked.keep)
        except GeometryError as error:
            wrong.append(str(error))
            continue
        if target in targets:
            wrong.append(f"patch_size {show_side(target.patch_size)} is given twice")
        targets.append(target)
    if wrong:
        raise GeometryError("; ".join(dict.fromkeys(wrong)))
    return targets


def _require_plan(subject: Subject, target: Geometry, asked: Asked) -> None:
    patch, image = asked_sizes(subject.geometry, target)
    make_plan(subject.model, patch, image, kernel=asked.kernel, positions=asked.positions)


def _at_asked_size(subject: Subject, asked: Asked) -> tuple[Geometry, str]:
    """The native patch at the asked image size, or at the size nearest to it that it fits, and a note if so."""
    current = subject.geometry
    assert asked.image_size is not None
    assert not isinstance(asked.image_size, str)
    image = as_size(asked.image_size, len(current.patch_size), "image_size", current.image_size)
    note = ""
    if not current.overlapping and any(i % p for i, p in zip(image, current.patch_size, strict=True)):
        unfit = replace(current, image_size=image, patch_size=(1, 1), kernel_size=None)  # any size fits it
        fitting = nearest_image(unfit, current.patch_size)
        note = (
            f"fidelity is measured against the native patch {show_side(current.patch_size)} at image size "
            f"{show_side(fitting)}, the nearest to {show_side(image)} that it divides"
        )
        image = fitting
    reference = target_geometry(current, None, image)
    _require_plan(subject, reference, asked)
    return reference, note


def show_side(size: Sequence[int]) -> str:
    """``16`` for a square, else ``16x32``."""
    return str(size[0]) if len(set(size)) == 1 else show(tuple(size))
