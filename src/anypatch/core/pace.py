"""Views that keep pace with their model: hooks, modes and settings of its modules are those of their shells, too.

A view that somebody took is a face of its own. Those of a flexible model are not: it is one model, whose hooks run and
whose dropout is off at every patch size or at none. Only what has changed on the model since is carried over, as a
shell differs from its module on purpose where the geometry is.
"""

from __future__ import annotations

import copy
import dis
import weakref
from typing import Any

import torch
from torch import nn

from anypatch.core.attributes import ATOMS
from anypatch.core.recordings import RUNNING, codes_from
from anypatch.core.rehearsal import HOOKS
from anypatch.core.shells import FRESH, SHARED, Shells
from anypatch.core.toggles import TOGGLES

CONTAINERS = (list, dict, set, tuple)
KEPT = {*SHARED, *FRESH, *HOOKS, "_modules", "_non_persistent_buffers_set"}  # torch's own, which are no settings
_WRITTEN: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


class Pace:
    """What the modules of a model were like when a view was taken, or brought up to date.

    Args:
        shells: those that the view is made of.
    """

    def __init__(self, shells: Shells) -> None:
        self._shells = shells
        self._seen = [(module, shell, _State(module)) for module, shell in shells.pairs()]

    @torch.compiler.disable
    def keep(self) -> None:
        """Carry over what was set on the model since. Some microseconds for every ten modules where nothing was."""
        for place, (module, shell, state) in enumerate(self._seen):
            if state.is_still(module):
                continue
            for name, value in state.set_since(module):
                if name not in vars(shell).get(TOGGLES, ()):
                    vars(shell)[name] = copy.copy(value)
            for name, before in state.hooks.items():
                hooks, own = vars(module)[name], vars(shell)[name]
                for key in before - hooks.keys():
                    own.pop(key, None)
                own.update({key: self._shells.rebound(hooks[key]) for key in hooks.keys() - before})
                for key in [key for key in hooks if key in own]:  # in the order of the model's, after its own
                    own[key] = own.pop(key)
            self._seen[place] = module, shell, _State(module)


class _State:
    """What was set on a module."""

    def __init__(self, module: nn.Module) -> None:
        self.fields = dict(vars(module))
        self.plain = {name: value for name, value in self.fields.items() if _is_setting(module, name, value)}
        self.held = {n: type(v)(v) for n, v in self.plain.items() if type(v) in (list, dict, set)}
        self.hooks = {name: set(vars(module)[name]) for name in HOOKS}
        self._hooked = any(self.hooks.values())
        self._stores = [vars(module)[name] for name in HOOKS]

    def is_still(self, module: nn.Module) -> bool:
        fields = vars(module)
        try:
            if fields != self.fields:
                return False
        except Exception:  # values that cannot be compared are others
            return False
        if self.held and any(fields[name] != value for name, value in self.held.items()):
            return False
        if not self._hooked:
            return not any(self._stores)
        return all(fields[name].keys() == keys for name, keys in self.hooks.items())

    def set_since(self, module: nn.Module) -> list[tuple[str, Any]]:
        now = {name: value for name, value in vars(module).items() if _is_setting(module, name, value)}
        before = {**self.plain, **self.held}
        return [(name, value) for name, value in now.items() if name not in before or before[name] != value]


def _is_setting(module: nn.Module, name: str, value: Any) -> bool:
    """Whether an attribute is plain, and none that a forward pass leaves behind: each face has results of its own."""
    if name in KEPT or name in _written(type(module)):
        return False
    if type(value) in CONTAINERS:
        return all(isinstance(item, ATOMS) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, ATOMS)


def _written(kind: type) -> frozenset[str]:
    """Attributes that a class's forward pass sets."""
    if kind not in _WRITTEN:
        entries = {name for base in kind.__mro__ if base not in nn.Module.__mro__ for name in vars(base)}
        codes = [code for name in entries if RUNNING.search(name) for code in codes_from(kind, name)]
        found = {s.argval for code in codes for s in dis.get_instructions(code) if s.opname == "STORE_ATTR"}
        _WRITTEN[kind] = frozenset(found)
    return _WRITTEN[kind]
