"""Plain values of people's own modules at another geometry, in whatever they are kept: made anew, never changed."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import types
from typing import Any

import torch
from torch import Tensor

from anypatch.core.geometry import Geometry
from anypatch.errors import UnsupportedModelError
from anypatch.hosts.structural.following import TELLING, carries, is_record
from anypatch.hosts.structural.holdings import DEPTH, MANY, MAPPINGS, is_array, parts
from anypatch.hosts.structural.neighbours import means_another_thing

# A pair that is the present grid or image is one whatever it is called, unless it is called one of these.
OTHER = re.compile(
    r"depth|head|dim(s|ensions?)?$|channel|kernel|strid|dilat|pad|window|layer|ratio|rates?$|ind(ex|ices)|idx|block|"
    r"level|step|beta|group|rank|epoch|batch|worker|seed|class|scales?$|mean|std|weight|loss|^lr|quer(y|ies)|stages?$|"
    r"interval|milestone|thresh|bins?$|anchor|repeat|hidden|width",
    re.I,
)

AXIS = re.compile(r"(^|_)(x|y|h|w|xs|ys|rows?|cols?|columns?|coords?|grid|axis|pos(itions?)?)(_|$)", re.I)
ORDER = re.compile(r"order|perm|tok|patch|ids?$|idx|ind(ex|ices)|keep|pos", re.I)
LEVELS = 8  # of a pyramid whose strides are listed, at most
LISTED = 16  # sizes that one tensor may list: levels of a pyramid, at most


class Values:
    """The rule for plain values at one change of geometry."""

    def __init__(self, old: Geometry, new: Geometry) -> None:
        self.old, self.new = old, new
        self.pairs = [
            (a[-2:], b[-2:])
            for a, b in ((old.image_size, new.image_size), (old.grid, new.grid))
            if a is not None and b is not None and a[-2:] != b[-2:] and min(a[-2:]) >= TELLING
        ]

    def followed(self, name: str, value: Any, full: str, beside: Any, depth: int = 0) -> Any:
        """The value at the new geometry, or ``None`` where it stays.

        Args:
            name: what it is called, or what holds it where it has no name of its own.
            value: the value.
            full: where it is, for messages.
            beside: what holds it, whose other names may tell that it means another thing.

        Raises:
            UnsupportedModelError: it is held by something that cannot be made anew.
            GeometryError: it would have to be two numbers and is one.
        """
        if value is None or depth > DEPTH or means_another_thing(name, beside):
            return None
        after = self.number(name, value, full)
        if after is not None:
            return after
        if isinstance(value, (str, bytes, Tensor, type)) or is_array(value) or _are_numbers(value):
            return None
        held = list(parts(value))
        inside = {key: item for _, key, item in held if key}
        changed = {}
        for step, key, item in held:
            new = self.followed(key or name, item, f"{full}{step}", inside if key else {}, depth + 1)
            if new is not None and not _equal(new, item):
                changed[step] = (key, item, new)
        return self._remade(value, changed, full) if changed else None

    def number(self, name: str, value: Any, full: str) -> Any:
        """A number or a size, also as torch and numpy keep them."""
        plain = _as_plain(value)
        if plain is None:
            return None
        after = carries(name, plain, self.old, self.new, full)
        if after is None and not OTHER.search(name):
            after = self._pair(plain)
        return None if after is None or after == plain else _like(after, value)

    def _pair(self, value: Any) -> Any:
        """A pair that is the grid or the image, also among channels and the like: ``(3, 224, 224)``, ``(h, w, c)``."""
        if not isinstance(value, (tuple, list)) or not 2 <= len(value) <= 4 or any(type(v) is not int for v in value):
            return None
        found = set()
        for old, new in self.pairs:
            places = [i for i in range(len(value) - 1) if tuple(value[i : i + 2]) == old]
            if len(places) == 1:
                found.add((*value[: places[0]], *new, *value[places[0] + 2 :]))
        return type(value)(found.pop()) if len(found) == 1 else None

    def holds_size(self, tensor: Tensor) -> bool:
        """Whether a small tensor of whole numbers lists sizes, and the grid or the image is one of them."""
        if tensor.is_meta or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            return False
        if tensor.ndim < 2 or tensor.shape[-1] != 2 or tensor.numel() > 2 * LISTED:
            return False
        rows = tensor.reshape(-1, 2).tolist()
        return any(tuple(row) == old for row in rows for old, _ in self.pairs)

    def is_axis(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor has evenly spaced places of the grid's rows or columns."""
        if tensor.is_meta or tensor.ndim != 1 or tensor.dtype == torch.bool or not AXIS.search(name):
            return False
        grid, new = self.old.grid, self.new.grid
        if grid is None or new is None or not any(len(tensor) == a != b for a, b in zip(grid, new, strict=True)):
            return False
        steps = tensor.detach().double().diff()
        return len(steps) > 1 and bool(torch.allclose(steps, steps[:1], rtol=1e-3) and steps[0] != 0)

    def _remade(self, value: Any, changed: dict[str, Any], full: str) -> Any:
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)) or callable(value):
            key, item, _ = next(iter(changed.values()))
            raise UnsupportedModelError(
                f"{full} is a function that closes over {key or 'a value'} = {_shown(item)}, which anypatch cannot "
                f"change: take it off before adapting, and put one with the new value there afterwards"
            )
        if isinstance(value, (*MAPPINGS, list, tuple, set, frozenset)):
            return _container(value, changed)
        if not (is_record(value) or dataclasses.is_dataclass(value)):
            key, item, _ = next(iter(changed.values()))
            raise UnsupportedModelError(
                f"{full}, a {type(value).__name__}, holds {key} = {_shown(item)}, and others may hold it, too: take it "
                f"off before adapting, and put one with the new value there afterwards"
            )
        result = copy.copy(value)
        for key, _, new in changed.values():
            object.__setattr__(result, key, new)
        return result


def _container(value: Any, changed: dict[str, Any]) -> Any:
    if isinstance(value, MAPPINGS):
        items: Any = copy.copy(value) if isinstance(value, dict) else dict(value)
        for key in value:
            step = f"[{key!r}]"
            if step in changed:
                items[key] = changed[step][2]
        return items
    if hasattr(value, "_fields"):
        return value._replace(**{key: new for key, _, new in changed.values()})
    parts = [changed[f"[{i}]"][2] if f"[{i}]" in changed else item for i, item in enumerate(value)]
    return type(value)(parts)


def numbers_tokens(name: str, value: Any, counts: set[int]) -> bool:
    """Whether a sequence or an array is an order of the tokens: every number below their count once.

    The numbers as they follow one another (a look-up table of 256 grey values) are one only by their name.
    """
    if is_array(value):
        value = value.tolist() if getattr(value, "ndim", 0) == 1 and len(value) <= MANY else None
    if not isinstance(value, (list, tuple)) or len(value) not in counts or any(type(v) is not int for v in value):
        return False
    in_order = list(range(len(value)))
    return sorted(value) == in_order and (list(value) != in_order or ORDER.search(name) is not None)


def _as_plain(value: Any) -> Any:
    """A number, or a tuple or list of numbers, of whatever kind it is kept in; ``None`` for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)) and type(value) in (int, float):
        return value
    if isinstance(value, Tensor):
        whole = not (value.is_meta or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        return tuple(value.tolist()) if whole and value.ndim == 1 and 2 <= len(value) <= 4 else None
    if is_array(value):
        kind, ndim = getattr(getattr(value, "dtype", None), "kind", ""), getattr(value, "ndim", None)
        if kind in "iu" and ndim == 0:
            return int(value)
        if kind == "f" and ndim == 0:
            return float(value)
        return tuple(value.tolist()) if kind in "iu" and ndim == 1 and 2 <= len(value) <= 4 else None
    if type(value) in (list, tuple, torch.Size) and len(value) <= LEVELS:
        return value if isinstance(value, list) else tuple(value)
    return value if type(value) is dict and len(value) <= LEVELS else None


def _like(after: Any, value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.tensor(after, dtype=value.dtype, device=value.device)
    if is_array(value):
        import numpy as np

        array = np.asarray(after, dtype=value.dtype)
        return array if isinstance(value, np.ndarray) else array[()]
    return torch.Size(after) if isinstance(value, torch.Size) else after


def _are_numbers(value: Any) -> bool:
    """Whether a sequence holds numbers alone: it is a size as a whole, or none."""
    return isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    same: Any = a == b
    return bool(same.all()) if is_array(same) else bool(same)


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]
