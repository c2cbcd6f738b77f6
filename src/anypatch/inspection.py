"""What a live model is made of, and what an adaptation would change: the facts behind ``anypatch inspect``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from anypatch.adaptation import describe, make_plan
from anypatch.core.geometry import Geometry, ImageSizeLike, Keep, SizeLike
from anypatch.core.plan import Change
from anypatch.core.views import standing
from anypatch.errors import AnypatchError


@dataclass(frozen=True)
class Inspection:
    """A model's library, class, geometry, kind of patch embedding and kind of positions."""

    class_name: str
    geometry: Geometry
    embedding: str
    positions: str


def inspect(model: nn.Module) -> Inspection:
    """Read a live model without changing it.

    The kinds are read off two plans that are never applied: one that doubles the patch, one that doubles the image.

    Raises:
        UnsupportedModelError: no patch embedding was found.
    """
    model = standing(model)
    subject = describe(model)
    current = subject.geometry
    doubled_patch = tuple(2 * side for side in current.patch_size)
    embedding = _roles(model, doubled_patch, None, "grid", r"patch projection.*")
    doubled_image = None if current.image_size is None else tuple(2 * side for side in current.image_size)
    positions = (
        _roles(model, None, doubled_image, "image", r"(?:absolute|relative) positions[^(]*") if doubled_image else ""
    )
    rotary = any(re.search(r"rot|rope", f"{n} {type(m).__name__}".lower()) for n, m in subject.part.named_modules())
    kinds = [kind for kind in (positions, "rotary" if rotary else "") if kind]
    return Inspection(type(subject.model).__name__, current, embedding or "not adaptable", " + ".join(kinds) or "none")


def _roles(model: nn.Module, patch: SizeLike | None, image: SizeLike | None, keep: Keep, pattern: str) -> str:
    try:
        changes = changes_for(model, patch, image, keep=keep)
    except AnypatchError:
        return ""
    found = [m.group().strip() for c in changes if (m := re.match(pattern, c.role))]
    return " + ".join(dict.fromkeys(found))


def changes_for(
    model: nn.Module, patch_size: SizeLike | None, image_size: ImageSizeLike | None, *, keep: Keep = "image"
) -> list[Change]:
    """Every tensor, buffer and attribute that ``adapt`` would change. Errors are those of ``adapt``."""
    plan = make_plan(model, patch_size, image_size, keep=keep)
    return [] if plan is None else plan.changes
