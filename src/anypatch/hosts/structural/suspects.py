"""Numbers of the present geometry in people's own modules, wherever they are kept: in attributes, code and hooks."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.geometry import Geometry, show
from anypatch.core.plan import Plan
from anypatch.core.recorded import programs, told
from anypatch.core.recordings import called_by, is_pure
from anypatch.core.rehearsal import RUN
from anypatch.core.steps import SetAttribute
from anypatch.errors import UnsupportedModelError
from anypatch.hosts.structural.following import TELLING, counts, kinds
from anypatch.hosts.structural.holdings import MANY, holdings, is_array
from anypatch.hosts.structural.written import KNOWN

NEAR = 1e-3  # pixels by which a place may be off, as a half is in bfloat16


def owned(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in root.named_modules():
        if type(module).__module__.split(".")[0] not in KNOWN:
            yield path, module


def suspects(plan: Plan) -> Iterator[tuple[str, str]]:
    """Numbers of the present geometry that people's own modules hold and that would stay, and recorded programs; the
    attribute's name with each, where it is one."""
    for path, module in programs(plan.subject.model):
        yield f"{path}, {told(module)}", ""
    numbers = _numbers(plan.subject.geometry, plan.target)
    for path, module in plan.subject.model.named_modules():
        for hook in (hook for name in RUN for hook in getattr(module, name).values() if is_pure(hook)):
            for number in (number for code in called_by(hook) for number in _constants(code, numbers)):
                yield f"the number {number} in a hook of {path or type(module).__name__}", ""
    changed = {(id(step.module), step.name) for step in plan.steps if isinstance(step, SetAttribute)}
    classes: set[type] = set()
    for path, module in owned(plan.subject.model):
        if type(module).__module__.startswith("einops."):  # made once of its pattern and sizes, which it shows
            yield f"{path} = {module}", ""
            continue
        for name, value in vars(module).items():
            if (id(module), name) in changed or name in vars(nn.Module()):
                continue
            for full, _, leaf in holdings(name, value):
                found = _number(leaf, numbers)
                if found is not None and not _means_what_stays(name, leaf, plan):
                    leaf_name = "" if isinstance(leaf, types.FunctionType) else full
                    yield f"{path}.{full} = {found}" if path else f"{full} = {found}", leaf_name
        if type(module) not in classes:
            classes.add(type(module))
            yield from ((text, "") for text in _in_code(type(module), numbers))


def require_no_pixel_places(plan: Plan) -> None:
    """Where patches lie in the image, listed in pixels (centres, corners, boxes), has the same shape at another patch
    size, so that no run would show it.

    Raises:
        UnsupportedModelError: a module of the user's holds that; the message names it.
    """
    old, new = plan.subject.geometry, plan.target
    sides = [
        (patch, side)
        for patch, after, side in zip(old.patch_size[-2:], new.patch_size[-2:], (old.grid or ())[-2:], strict=False)
        if patch != after and patch > TELLING and side > TELLING
    ]
    for path, module in owned(plan.subject.model) if sides else ():
        held = {**vars(module), **dict(module._buffers.items())}
        for name, value in held.items():
            if name in vars(nn.Module()):
                continue
            for full, _, leaf in holdings(name, value):
                if any(_are_places(leaf, patch, side) for patch, side in sides):
                    raise UnsupportedModelError(
                        f"{f'{path}.' if path else ''}{full} lists where the patches lie, {show(old.patch_size[-2:])} "
                        f"pixels apart, which nothing says how to follow. Adapt the model inside on its own, and set "
                        f"this by hand"
                    )


def _are_places(leaf: Any, patch: int, side: int) -> bool:
    """Whether values are those of a row of patches, from its beginning or from the middle of the first."""
    if not isinstance(leaf, (Tensor, list, tuple)) and not (is_array(leaf) and leaf.ndim):
        return False
    if isinstance(leaf, Tensor) and (leaf.is_meta or leaf.dtype == torch.bool or leaf.is_complex() or leaf.ndim == 0):
        return False
    if isinstance(leaf, (list, tuple)) and not all(isinstance(item, (int, float)) for item in leaf):
        return False
    if not side <= (leaf.numel() if isinstance(leaf, Tensor) else len(leaf)) <= MANY or isinstance(leaf, nn.Parameter):
        return False
    found = torch.as_tensor(leaf).detach().double().unique()
    steps = found.diff()
    first = (0, (patch - 1) / 2, patch / 2)
    near = len(found) in (side, side + 1) and any(abs(float(found[0]) - at) < NEAR for at in first)
    return near and bool((steps - patch).abs().max() < NEAR)


def _means_what_stays(name: str, value: Any, plan: Plan) -> bool:
    """Whether an attribute has the name and the value of a size that is the same afterwards, as the patch often is."""
    return any(
        name in names and any(value == a == b for a, b in zip(present, following, strict=True))
        for names, present, following in kinds(plan.subject.geometry, plan.target)
        if isinstance(value, (int, tuple))
    )


def _numbers(old: Geometry, new: Geometry) -> set[int]:
    """Sides and counts of the present geometry that the new one does not have in their place."""
    pairs = list(zip(old.patch_size, new.patch_size, strict=True))
    pairs.append((math.prod(old.patch_size[-2:]), math.prod(new.patch_size[-2:])))
    if old.image_size is not None and new.image_size is not None:
        pairs += zip(old.image_size, new.image_size, strict=True)
    if old.grid is not None and new.grid is not None:
        pairs += zip(old.grid, new.grid, strict=True)
        pairs += zip(counts(old), counts(new), strict=True)
    return {a for a, b in pairs if a != b and a > TELLING}


def _number(leaf: Any, numbers: set[int]) -> Any:
    if is_array(leaf) and leaf.ndim == 0:
        leaf = leaf.item()
    if type(leaf) is int:
        return leaf if leaf in numbers else None
    if isinstance(leaf, Tensor) or is_array(leaf):
        shape = tuple(leaf.shape)
        return f"of shape {shape}" if numbers & set(shape) else None
    if isinstance(leaf, types.FunctionType):
        return next(_constants(leaf.__code__, numbers), None)
    if isinstance(leaf, (list, tuple)) and len(leaf) > TELLING and len(leaf) in numbers:
        return f"{len(leaf)} values"
    return None


def _in_code(kind: type, numbers: set[int]) -> Iterator[str]:
    for base in kind.__mro__:
        if base.__module__.split(".")[0] in {*KNOWN, "builtins", "typing"}:
            continue
        for name, function in vars(base).items():
            if isinstance(function, types.FunctionType) and name != "__init__":
                for number in _constants(function.__code__, numbers):
                    yield f"the number {number} in {base.__name__}.{name}"


def _constants(code: types.CodeType, numbers: set[int]) -> Iterator[int]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _constants(constant, numbers)
        for item in constant if isinstance(constant, tuple) else (constant,):
            if type(item) in (int, float) and item in numbers:
                yield int(item)
