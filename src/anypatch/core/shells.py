"""Shells: objects of the modules' own classes, with attributes and children of their own and the same tensors.

Views and rehearsals are trees of them. Whatever in a module leads back to the model leads to the shells in its shell:
bound methods, partials, and functions that close over the model, such as one that somebody put in the place of
``forward``.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from anypatch.core.attributes import ATOMS
from anypatch.core.restructuring import unwatched

SHARED = ("_parameters", "_buffers")
FRESH = ("_compiled_call_impl",)  # compiled for the model's own modules
CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
PLAIN = (Tensor, type, types.ModuleType, types.BuiltinFunctionType, torch.Generator)
OPAQUE = (*ATOMS, *PLAIN, torch._C.ScriptMethod, torch._C.ScriptFunction)
COMPILED = "_torchdynamo_orig_callable"  # of what torch.compile returns: the function that it was given
DEPTH = 4  # objects within objects in which modules are looked for; hosts keep them one or two deep


M = TypeVar("M", bound=nn.Module)


def copied(model: M, memo: dict[int, Any] | None = None) -> M:
    """A deep copy that runs itself: ``copy.deepcopy`` leaves functions alone, also those that close over the model.

    Examples:
        >>> layer = nn.Linear(2, 3)
        >>> forward = layer.forward
        >>> layer.forward = lambda x: 2 * forward(x)
        >>> other = copied(layer)
        >>> torch.nn.init.zeros_(other.weight), torch.nn.init.ones_(other.bias)
        (...)
        >>> other(torch.rand(1, 2))
        tensor([[2., 2., 2.]], grad_fn=<MulBackward0>)
    """
    result = copy.deepcopy(model, memo)
    shells = Shells()
    for module, other in zip(model.modules(), result.modules(), strict=True):
        shells.stand_for(module, other)
    for other in result.modules():
        stores: list[dict[Any, Any]] = [vars(other), other._forward_hooks, other._forward_pre_hooks]
        for held in stores:
            functions = [(key, value) for key, value in held.items() if isinstance(value, types.FunctionType)]
            held.update({key: shells.rebound(value) for key, value in functions})
    return result


class Shells:
    """Makes shells, each module's once, and rewrites references so that they stay inside the view."""

    def __init__(self) -> None:
        self.made: dict[int, Any] = {}
        self._keep: list[Any] = []  # ids stay valid while the objects live
        self._plain: set[int] = set()  # objects that refer to no module
        self._tree: set[int] = set()  # the modules of the model

    def shell(self, module: nn.Module) -> nn.Module:
        """The shell of a module and of all that it holds."""
        if id(module) in self.made:
            return self.made[id(module)]
        self._tree = self._tree or {id(part) for part in module.modules()}
        shell: nn.Module = object.__new__(type(module))
        self.remember(module, shell)
        fields = vars(shell)
        for name, value in list(vars(module).items()):
            if name in SHARED:
                fields[name] = value
            elif name not in FRESH:
                fields[name] = self.rebound(unwatched(value))
        return shell

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Modules and their shells."""
        return [
            (value, self.made[id(value)])
            for value in self._keep
            if isinstance(value, nn.Module) and id(value) in self.made
        ]

    def stand_for(self, module: nn.Module, other: nn.Module) -> None:
        """Have another module wherever one of the model's would be."""
        self._tree.add(id(module))
        self.remember(module, other)

    def rebound(self, value: Any, depth: int = 0) -> Any:
        """A value in which modules are replaced by their shells; containers are copied, other objects shared."""
        if isinstance(value, OPAQUE):
            return value
        if id(value) in self.made:
            return self.made[id(value)]
        if isinstance(value, nn.Module):
            return self.shell(value)
        if type(value) in CONTAINERS:
            return self._container(value, depth)
        if isinstance(value, tuple):
            parts = [self.rebound(item, depth) for item in value]
            if all(a is b for a, b in zip(parts, value, strict=True)):
                return value
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if not self._refers(value, depth):
            return value
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, types.MethodType):
            return types.MethodType(self.rebound(value.__func__, depth), self.rebound(value.__self__, depth))
        if isinstance(value, functools.partial):
            args, keywords = self.rebound(value.args, depth), self.rebound(value.keywords, depth)
            return functools.partial(self.rebound(value.func, depth), *args, **keywords)
        if isinstance(value, weakref.ReferenceType):
            return weakref.ref(self.rebound(value(), depth))
        result = copy.copy(value)
        self.remember(value, result)
        vars(result).update({name: self.rebound(field, depth + 1) for name, field in list(vars(value).items())})
        return result

    def _function(self, value: types.FunctionType, depth: int) -> Any:
        """A function that leads to the model, such as one that somebody put in the place of ``forward``."""
        if COMPILED in vars(value):
            return self.rebound(vars(value)[COMPILED], depth)
        names = {
            name: found
            for name in value.__code__.co_names
            if (found := value.__globals__.get(name)) is not None and self._leads_home(found, depth + 1)
        }
        cells = tuple(types.CellType() if self._leads_home(c, depth) else c for c in value.__closure__ or ())
        space = value.__globals__ if not names else {**value.__globals__}
        result = types.FunctionType(value.__code__, space, value.__name__, None, cells or None)
        self.remember(value, result)
        functools.update_wrapper(result, value, updated=())
        for old, new in zip(value.__closure__ or (), cells, strict=True):
            if new is not old:
                new.cell_contents = self.rebound(old.cell_contents, depth + 1)
        if names:
            space.update({name: self.rebound(found, depth + 1) for name, found in names.items()})
        result.__defaults__ = self.rebound(value.__defaults__, depth + 1)
        result.__kwdefaults__ = self.rebound(value.__kwdefaults__, depth + 1)
        vars(result).update({name: self.rebound(field, depth + 1) for name, field in vars(value).items()})
        return result

    def _leads_home(self, value: Any, depth: int) -> bool:
        """Whether a value leads to a module of the model itself, whatever else it leads to."""
        if isinstance(value, nn.Module):
            return id(value) in self._tree
        if isinstance(value, types.CellType):
            try:
                return self._leads_home(value.cell_contents, depth)
            except ValueError:  # not filled yet
                return False
        if isinstance(value, OPAQUE) or id(value) in self._plain or depth > DEPTH:
            return False
        self._plain.add(id(value))
        self._keep.append(value)
        found = any(self._leads_home(part, depth + 1) for part in _parts(value))
        if found:
            self._plain.discard(id(value))
        return found

    def _container(self, value: Any, depth: int) -> Any:
        result = copy.copy(value)
        self.remember(value, result)
        if isinstance(value, (set, frozenset)):
            result.clear()
            result.update(self.rebound(item, depth) for item in value)
            return result
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            result[key] = self.rebound(item, depth)
        return result

    def _refers(self, value: Any, depth: int) -> bool:
        """Whether an object leads to a module."""
        if isinstance(value, OPAQUE) or id(value) in self._plain or depth > DEPTH:
            return False
        if isinstance(value, nn.Module):
            return True
        if isinstance(value, types.FunctionType):
            return self._leads_home(value, depth)
        self._plain.add(id(value))  # for as long as its parts are looked at: it may lead to itself
        self._keep.append(value)
        found = any(self._refers(part, depth + 1) for part in _parts(value))
        if found:
            self._plain.discard(id(value))
        return found

    def remember(self, value: Any, result: Any) -> None:
        """Wherever ``value`` would be, ``result`` is."""
        self._keep.append(value)
        self.made[id(value)] = result


def _parts(value: Any) -> list[Any]:
    """What an object holds, as far as modules may be among it."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value)
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        known = [value.__globals__.get(name) for name in value.__code__.co_names]
        bound = [item for item in known if isinstance(item, (nn.Module, types.MethodType, types.FunctionType))]
        keywords = list((value.__kwdefaults__ or {}).values())
        return [*(value.__closure__ or ()), *(value.__defaults__ or ()), *keywords, *vars(value).values(), *bound]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, weakref.ReferenceType):
        return [value()]
    fields = getattr(value, "__dict__", None)
    return list(fields.values()) if isinstance(fields, dict) else []
