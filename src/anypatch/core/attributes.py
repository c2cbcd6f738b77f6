"""Plain attribute values that depend on geometry: compared between twins, merged into the live model's."""

from __future__ import annotations

import copy
import functools
import types
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ATOMS = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.Size, range, slice)
OPAQUE = (nn.Module, types.ModuleType, types.FunctionType, types.MethodType, type, torch.Generator)
MAX_DEPTH = (
    12  # of values within values; the deepest configuration of a library nests 6, so what is deeper is no setting
)


class Missing:
    """Stands for an attribute or key that one twin does not have."""

    def __repr__(self) -> str:
        return "missing"


MISSING = Missing()


def same(a: Any, b: Any, depth: int = 0, seen: set[tuple[int, int]] | None = None) -> bool:
    """Whether two values are equal as far as geometry is concerned (functions and modules always are)."""
    if a is b:
        return True
    if depth > MAX_DEPTH:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return same_tensor(a, b)
    if isinstance(a, ATOMS) or isinstance(b, ATOMS):
        return type(a) is type(b) and (a == b or (a != a and b != b))
    if isinstance(a, OPAQUE) or isinstance(b, OPAQUE):
        return True
    if type(a) is not type(b):
        return False
    seen = set() if seen is None else seen
    if (id(a), id(b)) in seen:
        return True
    seen.add((id(a), id(b)))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], depth + 1, seen) for k in a)
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(same(x, y, depth + 1, seen) for x, y in zip(a, b, strict=True))
    if isinstance(a, (set, frozenset)):
        return a == b
    if isinstance(a, functools.partial):
        return same(_partial_parts(a), _partial_parts(b), depth + 1, seen)
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    if hasattr(a, "__dict__") or _slots(a):
        return same(_fields(a), _fields(b), depth + 1, seen)
    return True


def _slots(value: Any) -> list[str]:
    names = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    return [n for group in names for n in ((group,) if isinstance(group, str) else group) if hasattr(value, n)]


def _fields(value: Any) -> dict[str, Any]:
    return {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in _slots(value)}}


def same_tensor(a: Any, b: Any) -> bool:
    """Equality of two real tensors by value, of two meta tensors by shape."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or b.is_meta:
        return a.is_meta == b.is_meta
    return torch.equal(a, b) or bool(torch.all((a == b) | ((a != a) & (b != b))))


def _partial_parts(p: functools.partial[Any]) -> tuple[Any, ...]:
    return (p.func, p.args, p.keywords)


class Merger:
    """Builds the live model's new attribute values; never changes a live object.

    Shared objects stay shared: every live object that needs a change is copied once, and the copy is used
    wherever the object was (``replacements`` maps ``id`` of the old object to the new one).
    """

    def __init__(self) -> None:
        self.replacements: dict[int, Any] = {}
        self._keep: list[Any] = []  # ids stay valid while the objects live

    def merge(self, live: Any, old: Any, new: Any, depth: int = 0) -> Any:
        """``live`` with every leaf that differs between ``old`` and ``new`` set to ``new``'s."""
        if id(live) in self.replacements and not isinstance(live, ATOMS):
            return self.replacements[id(live)]
        if same(old, new):
            return live
        if new is MISSING:
            return MISSING
        if isinstance(new, Tensor):
            return new.clone() if not isinstance(live, Tensor) else like(new, live)
        if depth > MAX_DEPTH or type(live) is not type(new) or type(old) is not type(new):
            return copy.deepcopy(new)
        if isinstance(new, ATOMS):
            return new
        result: Any
        if isinstance(new, dict):
            keys = [k for k in {**old, **new} if not same(old.get(k, MISSING), new.get(k, MISSING))]
            items = dict(live)
            for k in keys:
                value = self.merge(live.get(k, MISSING), old.get(k, MISSING), new.get(k, MISSING), depth + 1)
                if value is MISSING:
                    items.pop(k, None)
                else:
                    items[k] = value
            result = _like_mapping(live, items)
        elif isinstance(new, (list, deque)) and len(live) == len(old) == len(new):
            parts = [self.merge(a, b, c, depth + 1) for a, b, c in zip(live, old, new, strict=True)]
            result = copy.copy(live)
            for i, part in enumerate(parts):
                result[i] = part
        elif type(new) is tuple and len(live) == len(old) == len(new):
            result = tuple(self.merge(a, b, c, depth + 1) for a, b, c in zip(live, old, new, strict=True))
        elif isinstance(new, functools.partial):
            args = self.merge(live.args, old.args, new.args, depth + 1)
            keywords = self.merge(live.keywords, old.keywords, new.keywords, depth + 1)
            result = functools.partial(live.func, *args, **keywords)
        elif hasattr(new, "__dict__") and not isinstance(new, (tuple, list)):
            result = copy.copy(live)
            self._remember(live, result)
            merged = self.merge(dict(vars(live)), vars(old), vars(new), depth + 1)
            result.__dict__.clear()
            result.__dict__.update(merged)
        else:
            result = copy.deepcopy(new)
        self._remember(live, result)
        return result

    def _remember(self, live: Any, result: Any) -> None:
        if isinstance(live, tuple):  # two attributes with equal sizes may hold one tuple by chance
            return
        self._keep.append(live)
        self.replacements[id(live)] = result

    def substitute(self, value: Any, depth: int = 0) -> Any:
        """``value`` with every reference to a replaced object redirected to its replacement."""
        if id(value) in self.replacements:
            return self.replacements[id(value)]
        if depth > 4 or isinstance(value, (*ATOMS, *OPAQUE, Tensor)):
            return value
        if isinstance(value, dict):
            items = {k: self.substitute(v, depth + 1) for k, v in value.items()}
            if all(items[k] is value[k] for k in value):
                return value
            result = copy.copy(value)
            result.update(items)
            self._remember(value, result)
            return result
        if type(value) in (list, tuple):
            parts = [self.substitute(v, depth + 1) for v in value]
            if all(a is b for a, b in zip(parts, value, strict=True)):
                return value
            return type(value)(parts)
        if hasattr(value, "__dict__"):
            fields = {k: self.substitute(v, depth + 1) for k, v in vars(value).items()}
            if all(fields[k] is v for k, v in vars(value).items()):
                return value
            result = copy.copy(value)
            result.__dict__.update(fields)
            self._remember(value, result)
            return result
        return value


def _like_mapping(live: Any, items: dict[Any, Any]) -> Any:
    """``items`` as a mapping of ``live``'s own kind; one that mirrors its items as attributes is made anew."""
    if type(live) is dict:
        return items
    if getattr(live, "__dict__", None):
        return type(live)(items)
    result = copy.copy(live)
    for key in [k for k in result if k not in items]:
        del result[key]
    result.update(items)
    return result


def like(new: Tensor, live: Tensor) -> Tensor:
    """A copy of ``new`` on ``live``'s device and, if both are floating point, in its dtype."""
    dtype = live.dtype if live.is_floating_point() and new.is_floating_point() else new.dtype
    return new.detach().clone().to(device=live.device, dtype=dtype)
