"""What ``tune`` is asked for, checked before anything is read or changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anypatch.adaptation import make_plan
from anypatch.core.geometry import Geometry, ImageSizeLike, Keep, Size, SizeLike, as_size, show, target_geometry
from anypatch.core.tables import PositionsLike
from anypatch.core.twins import Subject
from anypatch.errors import AnypatchError, DataError, GeometryError

LEAST_TOKENS = 4  # fewer patches than 2x2 leave no map to compare
MINUTES = 10.0  # enough to win half of it back for a small model on two cores in bfloat16, and short enough to try
PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class Asked:
    """The arguments of ``tune``, as they are given."""

    patch_size: SizeLike | Sequence[SizeLike]
    image_size: ImageSizeLike | None
    keep: Keep
    kernel: Any
    positions: PositionsLike
    minutes: float | None
    steps: int | None
    learning_rate: float | str
    lora: int | None
    batch_size: int
    seed: int
    precision: str | None
    output: Path | None
    resume: bool

    def require(self) -> None:
        """Raises AnypatchError: an argument that cannot be meant."""
        for name, least in (("batch_size", 1), ("steps", 1), ("lora", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise AnypatchError(f"{name} must be an int of at least {least}, got {value!r}")
        if self.minutes is not None and not (_number(self.minutes) and 0 < self.minutes < math.inf):
            raise AnypatchError(f"minutes must be above 0, got {self.minutes!r}")
        if self.minutes is not None and self.steps is not None:
            raise AnypatchError("give minutes or steps, not both")
        rate = self.learning_rate
        if rate != "auto" and not (_number(rate) and 0 < float(rate) < 1):
            raise AnypatchError(f'learning_rate must be "auto" or between 0 and 1, got {rate!r}')
        if self.precision not in (None, *PRECISIONS):
            raise AnypatchError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.resume and self.output is None:
            raise AnypatchError("resume needs output, the folder of the run to go on with")

    @property
    def several(self) -> bool:
        """Whether one set of weights is tuned for several patch sizes; a rectangle is a pair within: ``[(16, 32)]``."""
        return isinstance(self.patch_size, (list, tuple)) and len(self.patch_size) > 1

    def sizes(self, current: Geometry) -> tuple[Size, ...]:
        """The patch sizes, each once, in the order given."""
        given: Any = self.patch_size if isinstance(self.patch_size, (list, tuple)) else (self.patch_size,)
        axes = len(current.patch_size)
        found = tuple(dict.fromkeys(as_size(size, axes, "patch_size", current.patch_size) for size in given))
        if not found:
            raise GeometryError("patch_size names no size")
        return found

    def targets(self, subject: Subject) -> dict[Size, Geometry]:
        """The geometry at each patch size, all found possible.

        Raises:
            GeometryError, UnsupportedModelError: as for ``adapt``, or fewer than four tokens would be left.
        """
        found = {}
        for size in self.sizes(subject.geometry):
            make_plan(
                subject.model, size, self.image_size, keep=self.keep, kernel=self.kernel, positions=self.positions
            )
            target = target_geometry(subject.geometry, size, self.image_size, self.keep)
            if target.image_size is None or target.grid is None:
                raise GeometryError("this model takes any image size: say which to tune at, image_size=")
            count = math.prod(target.grid)
            if count < LEAST_TOKENS:
                raise GeometryError(
                    f"patch_size {show(size)} leaves {count} token{'s' * (count > 1)} of "
                    f"{show(target.image_size)} pixels, too few to compare: four are the least"
                )
            found[size] = target
        return found

    def pointless(self, native: Geometry) -> list[str]:
        """A note where there is nothing to win back, as the model's own patch size is the only one."""
        if self.sizes(native) != (native.patch_size,):
            return []
        return [
            f"patch size {show(native.patch_size)} is the model's own: nothing is lost there that could be won back; "
            f"name another, or several"
        ]

    def key(self) -> dict[str, Any]:
        """What a resumed run has to agree on."""
        names = ("patch_size", "image_size", "keep", "kernel", "positions", "steps", "minutes", "learning_rate", "lora",
                 "batch_size", "seed", "precision")  # fmt: skip
        return {name: repr(getattr(self, name)) for name in names}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def require_images(count: int, least: int, name: str) -> None:
    """Raises DataError: fewer images than can be learned from and tested on."""
    if count < least:
        raise DataError(f"{name}: {count} images that can be read, and {least} are the least to learn from and test on")
