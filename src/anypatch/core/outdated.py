"""Views whose model was changed since: they share its tensors, so they have to hear of it.

A tensor that a view resamples is looked at whenever it is read. All others are the model's own, and a view at the
model's own geometry has no others: it would run a stem of the new size with the old stride. Modules that were put in
the place of others (a new head, an adapter's layers) are no tensors: a view would go on with those that were there.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from anypatch.core.adapters import MARK
from anypatch.core.plan import Plan
from anypatch.core.steps import SetBuffer, SetParameter
from anypatch.errors import GeometryError, UnsupportedModelError

# The shells of a module, for as long as both are there.
_SHELLS: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()
# What each of them looks at already: what was there at the first adaptation counts.
_LOOKING: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
# A module of the model behind a face, its children, the names of its parameters.
Owner = tuple[Any, list[tuple[str, Any]], set[str]]
# Beside the face, not in it: what lies in a module is copied, pickled and hashed.
_OWNERS: weakref.WeakKeyDictionary[nn.Module, list[Owner]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def note(pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Remember the shells of modules."""
    with _LOCK:
        for module, shell in pairs:
            _SHELLS.setdefault(module, weakref.WeakSet()).add(shell)


def tell(plan: Plan) -> None:
    """Before a plan is applied: from now on, shells that share what it exchanges look whether it is what it was."""
    exchanged = {id(step.parameter) for step in plan.steps if isinstance(step, SetParameter)}
    buffers = {(id(step.module), step.name) for step in plan.steps if isinstance(step, SetBuffer)}
    root = plan.subject.wrapper if plan.subject.wrapper is not None else plan.subject.model
    for module in root.modules():
        names = [name for name, parameter in module._parameters.items() if id(parameter) in exchanged]
        # items, as a recorded program's buffers are no dict and cannot be walked by themselves
        names += [name for name, _ in module._buffers.items() if (id(module), name) in buffers]
        with _LOCK:
            shells = list(_SHELLS.get(module, ())) if names else []
        for shell in shells:
            with _LOCK:
                looking = _LOOKING.setdefault(shell, set())
                new = set(names) - vars(shell)[MARK].keys() - looking
                looking |= new
            for name in new:
                shell.register_forward_pre_hook(functools.partial(_require_present, name, _present(shell, name)))


def _present(shell: nn.Module, name: str) -> Any:
    """A parameter's shape (its values may be trained); a buffer itself."""
    parameter = shell._parameters.get(name)
    return shell._buffers.get(name) if parameter is None else tuple(parameter.shape)


def _require_present(name: str, before: Any, shell: nn.Module, inputs: Any) -> None:
    now = _present(shell, name)
    if now is not before and not (isinstance(now, tuple) and now == before):
        raise GeometryError(f"{name} has changed: the model was adapted since this view was taken, take another of it")


def watch(face: nn.Module, model: nn.Module) -> None:
    """Remember of which modules and parameters a model consists; for the face alone, as no model stands behind a copy
    of it."""
    owners = [
        (
            weakref.ref(owner),
            [(name, _reference(child)) for name, child in owner._modules.items()],
            set(owner._parameters.keys()),
        )
        for owner in model.modules()
    ]
    with _LOCK:
        _OWNERS[face] = owners


def require_same(face: nn.Module, *_: Any) -> None:
    """Raises UnsupportedModelError: a module was replaced, added or taken away since, or a parameter was taken away
    (pruning and norms put others in its place); the message names it."""
    exchanged = changed(face)
    if exchanged:
        raise UnsupportedModelError(
            f"{exchanged} was replaced, added or taken away since this view was taken: take another of the model"
        )


def changed(face: nn.Module) -> str:
    """What is another module now; "" if nothing is. Some microseconds for every ten modules.

    Not looked at in a compiled program, which would be guarded by each of them.
    """
    if torch.compiler.is_compiling():
        return ""
    for reference, children, parameters in _OWNERS.get(face, ()):
        owner = reference()
        if owner is None:
            continue
        now = owner._modules if type(owner._modules) is dict else dict(owner._modules.items())  # TorchScript's
        if len(now) != len(children) or any(now.get(name) is not child() for name, child in children):
            before = {name: child() for name, child in children}
            names = [n for n in {**before, **dict(now.items())} if n not in now or now[n] is not before.get(n)]
            return f"{', '.join(names)} in the {type(owner).__name__}"
        gone = parameters.difference(owner._parameters.keys())  # what is added the view reads as well
        if gone:
            return f"{', '.join(sorted(gone))} in the {type(owner).__name__}"
    return ""


def _reference(child: nn.Module | None) -> Callable[[], nn.Module | None]:
    return weakref.ref(child) if child is not None else _nothing


def _nothing() -> None:
    """Of a place that is registered and empty."""
