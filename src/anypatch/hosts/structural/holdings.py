"""What people's own modules hold besides layers and tensors: plain values, wherever they are kept."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from anypatch.core.recordings import written_by

DEPTH = 4  # of containers within containers
# Other mappings may load what they hold when they are asked (accelerate's weights on the disk).
MAPPINGS = (dict, types.MappingProxyType)
MANY = 4096  # values in one container that are looked at
WORD = re.compile(r"\w+")


def holdings(name: str, value: Any, full: str = "", depth: int = 0) -> Iterator[tuple[str, str, Any]]:
    """(where, the last name on the way, value) of a value, and of all that it holds.

    Looks into mappings, sequences, arrays and records; into what functions close over, the arguments of partials, the
    object of a bound method; and into objects that hold nothing but plain values. An object that leads to further
    objects (a trainer, a data module) is none of the model's settings.
    """
    full = full or name
    yield full, name, value
    if depth >= DEPTH or isinstance(value, (str, bytes, Tensor, nn.Module, type, types.ModuleType)):
        return
    for step, key, item in parts(value):
        yield from holdings(key or name, item, f"{full}{step}", depth + 1)


def tensors_of(hook: Any) -> Iterator[tuple[str, str, Tensor]]:
    """The tensors that a hook computes with, as ``holdings`` has them: what it records is another the next time."""
    written = written_by(hook)
    for where, leaf, item in holdings("", hook):
        first = WORD.search(where)
        if isinstance(item, Tensor) and (first is None or first[0] not in written):
            yield where, leaf, item


def parts(value: Any) -> Iterator[tuple[str, str, Any]]:
    """(how it is reached, its name if it has one, value) of what a value holds itself."""
    if isinstance(value, MAPPINGS):
        yield from ((f"[{key!r}]", key if isinstance(key, str) else "", item) for key, item in _first(value.items()))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from ((f".{key}", key, getattr(value, key)) for key in value._fields)
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{i}]", "", item) for i, item in _first(enumerate(value)))
    elif isinstance(value, functools.partial):
        yield from (("", "", item) for item in value.args)
        yield from ((f".{key}", key, item) for key, item in value.keywords.items())
        yield "", "", value.func
    elif isinstance(value, types.FunctionType):
        yield from ((f".{key}", key, item) for key, item in closed_over(value))
    elif isinstance(value, types.MethodType):
        if not isinstance(value.__self__, nn.Module):
            yield "", "", value.__self__
    else:
        yield from ((f".{key}", key, item) for key, item in fields_of(value).items())


def closed_over(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Names and values that a function brings along: closure and defaults."""
    code = function.__code__
    arguments = code.co_varnames[: code.co_argcount]
    defaults = function.__defaults__ or ()
    yield from zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True)
    yield from (function.__kwdefaults__ or {}).items()
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not filled yet
            continue


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of an object that holds nothing but plain values and tensors; nothing of any other."""
    if isinstance(value, (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, nn.Module, Tensor)):
        return {}
    found = dict(getattr(value, "__dict__", None) or {})
    for kind in type(value).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            if hasattr(value, name) and not name.startswith("__"):
                found[name] = getattr(value, name)
    return found if all(_is_plain(item) for item in found.values()) else {}


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (int, float, complex, str, bytes, type(None), Tensor, type)) or is_array(value):
        return True
    if depth > DEPTH:
        return False
    if isinstance(value, MAPPINGS):
        return all(_is_plain(item, depth + 1) for item in value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_plain(item, depth + 1) for item in value)
    return bool(fields_of(value))


def is_array(value: Any) -> bool:
    """Whether a value is an array or a number of numpy's."""
    return type(value).__module__ == "numpy"


def _first(items: Any) -> Iterator[Any]:
    for count, item in enumerate(items):
        if count >= MANY:
            return
        yield item
