"""Empty twins of a model: as it is, as it shall be, and a third where those two cannot tell an axis that changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from anypatch.core.empty import empty
from anypatch.core.geometry import Geometry, show
from anypatch.core.limits import require_room
from anypatch.core.roles import Facts


@dataclass(frozen=True)
class Subject:
    """A live model as its host library's file describes it.

    Attributes:
        model: the model the user holds, wrappers (PEFT, ``torch.compile``) taken off.
        geometry: its present geometry.
        build: builds a fresh model of the same configuration at a geometry.
        facts: what shapes cannot tell.
        path: where in ``model`` the part that ``build`` rebuilds is; empty for the whole.
        finish: after the diff, returns what else in the host library's bookkeeping follows the geometry, as
            (module, attribute, value).
        wrapper: the object the user holds, if it is not ``model``.
        speaks: the path below which the twins know every name, one model; of the rest they only say what they change.
            ``None`` where it cannot be told what is one model.
        bound: what to say where another patch size at the same image size asks for a grid that nothing tells; "" where
            something does.
        about: what the library's folder found and keeps for its other verbs; nobody else reads it.
    """

    model: nn.Module
    geometry: Geometry
    build: Callable[[Geometry], nn.Module]
    facts: Facts = field(default_factory=Facts)
    path: str = ""
    finish: Callable[[Geometry], list[tuple[nn.Module, str, Any]]] | None = None
    wrapper: nn.Module | None = None
    speaks: str | None = ""
    bound: str = ""
    about: Any = None

    @property
    def part(self) -> nn.Module:
        return self.model.get_submodule(self.path)


@dataclass(frozen=True)
class Twins:
    """Models of one configuration at the geometries ``before`` and ``after``, parameters on the meta device.

    ``probe`` is a third, where the token or pixel count is the same at both although the grid or the patch is not.
    """

    old: nn.Module
    new: nn.Module
    before: Geometry
    after: Geometry
    facts: Facts = field(default_factory=Facts)
    probe: nn.Module | None = None


def build_twins(subject: Subject, target: Geometry) -> Twins:
    """The empty twins of ``subject`` for a change to ``target``.

    Raises:
        LimitError: its parameters would take more memory than is allowed.
    """
    old = empty(lambda: subject.build(subject.geometry))
    new = empty(lambda: subject.build(target))
    require_room(_bytes(new) - _bytes(old), f"the weights at patch {show(target.patch_size)}")
    geometry = _probe_geometry(subject.geometry, target)
    probe = None if geometry is None else empty(lambda: subject.build(geometry))
    return Twins(old, new, subject.geometry, target, subject.facts, probe)


def _bytes(twin: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in twin.parameters())


def _probe_geometry(a: Geometry, b: Geometry) -> Geometry | None:
    same_tokens = a.grid != b.grid and a.grid and b.grid and math.prod(a.grid) == math.prod(b.grid)
    same_pixels = a.patch_size != b.patch_size and math.prod(a.patch_size) == math.prod(b.patch_size)
    if not (same_tokens or same_pixels):
        return None
    patch, kernel, image = a.patch_size, a.kernel_size, a.image_size
    if same_pixels:
        patch = (*patch[:-1], 2 * patch[-1])
        kernel = None if kernel is None else (*kernel[:-1], 2 * kernel[-1])
    if image is not None:
        image = tuple(2 * side for side in image)
    return replace(a, patch_size=patch, image_size=image, kernel_size=kernel, explicit_grid=None)
