"""Norms, parametrizations and pruning that are laid over a layer of a view: they are for the model.

They take a parameter out of the layer and compute it from others from then on. A view's layer has the parameters of
its model's: taken out of the one they are gone from the other, which computes nothing in their place. What torch does
next is to register a child or a hook with the layer, in containers of the view's own: there it is noticed, the layer is
given back what it had, and whoever asked is told.

What was laid over a layer of the model before is not taken off through its view either: it would stay over the model's,
without the parameters that it computes with, or beside one that nothing reads any more. torch writes into the
parameters on the way, so it is told before it begins.
"""

from __future__ import annotations

import contextlib
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import remove_parametrizations
from torch.nn.utils.prune import BasePruningMethod

from anypatch.errors import UnsupportedModelError

HOLDING = ("original", "orig", "weight")  # names by which torch's functions call what they take out
NORMS = ("torch.nn.utils.weight", "torch.nn.utils.spectral")  # where the hooks of norms are defined


class Watch:
    """A layer of a view, the layer of the model that it stands for, and what that had when the view was taken."""

    def __init__(self, shell: nn.Module, module: nn.Module, computed: Iterable[str]) -> None:
        self.kind = type(shell)
        self._shell, self._module = weakref.ref(shell), weakref.ref(module)
        # no reference to a parameter, which torch.utils.swap_tensors would not take
        self._parameters = {name: _place(p) for name, p in module._parameters.items() if p is not None}
        # those that the view computes with torch's functions never see, and do not hold
        self._computed = {name: p for name in computed if (p := module._parameters.get(name)) is not None}
        self._names = {*module._parameters, *module._buffers.keys()}

    def require_kept(self, added: Any = None) -> None:
        """Raises UnsupportedModelError: a parameter was taken out of the layer through the view; it is back."""
        shell, module = self._shell(), self._module()
        if shell is None or module is None or shell._parameters is not module._parameters:
            return
        gone = [name for name in self._parameters if name not in module._parameters and not hasattr(module, name)]
        if not gone:
            return
        kept = [self._give_back(name, shell, added) for name in gone]
        shell.__class__ = self.kind
        names, kind = ", ".join(gone), self.kind.__name__
        values = "" if all(kept) else "; its values may be what the parametrization began to make of them: load them"
        raise UnsupportedModelError(
            f"{names} of this {kind} would be taken out of the model as well, with which its view shares it: "
            f"prune, norm and parametrize the layers of the model, then take a view of it{values}"
        )

    def _give_back(self, name: str, shell: nn.Module, added: Any) -> bool:
        """Whether it is back with the values that it had, as far as can be told."""
        vars(shell).pop(name, None)
        parameter = self._computed.get(name)
        if parameter is None:
            parameter = _held_by_torch(shell, name)
        undone = isinstance(added, BasePruningMethod)  # which takes back what it had registered itself
        for store in (shell._parameters, shell._buffers):
            for other in [n for n in store if n.startswith(f"{name}_") and n not in self._names]:
                if not (undone and other == f"{name}_orig"):
                    del store[other]
        if parameter is None:
            return False
        rest = dict(shell._parameters)
        order = [n for n in self._parameters if n == name or n in rest]
        shell._parameters.clear()  # in the order in which optimizers count them
        shell._parameters.update({n: parameter if n == name else rest.pop(n) for n in order} | rest)
        return _place(parameter) == self._parameters[name]


class Children(dict[str, Any]):
    """The children of a view's layer."""

    watch: Watch

    def __setitem__(self, name: str, child: Any) -> None:
        self.watch.require_kept()
        super().__setitem__(name, child)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as what torch has here: a copy shares nothing."""
        return dict, (), None, None, iter(self.items())


class Hooks(OrderedDict[int, Any]):
    """The hooks of a view's layer that run before its forward pass."""

    watch: Watch

    def __setitem__(self, key: int, hook: Any) -> None:
        if "watch" in vars(self):
            self.watch.require_kept(hook)
        super().__setitem__(key, hook)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As of children."""
        return OrderedDict, (), None, None, iter(self.items())


class Over(nn.ModuleDict):
    """The parametrizations of a view's layer."""

    def __contains__(self, name: str) -> bool:
        if sys._getframe(2).f_code is remove_parametrizations.__code__ and super().__contains__(name):
            raise _kept_over(name)
        return super().__contains__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As of children."""
        return _bare, (nn.ModuleDict,), vars(self)

    def _get_name(self) -> str:
        return nn.ModuleDict.__name__


class Computing(nn.Module):
    """Mixed into the class of a view's layer some parameters of which a hook computes."""

    def __delattr__(self, name: str) -> None:
        require_not_computed(self, name)
        super().__delattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As of children, by a class that pickle finds."""
        return _bare, (type(self).__mro__[2],), vars(self)


def _bare(kind: type[nn.Module]) -> nn.Module:
    return object.__new__(kind)


_CLASSES: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()


def keep_over(shell: nn.Module) -> None:
    """See to it that what lies over a layer of the model is not taken off through a view of it."""
    over = dict(shell._modules.items()).get("parametrizations")  # of a scripted layer they are no dictionary
    if type(over) is nn.ModuleDict:
        over.__class__ = Over
    kind = type(shell)
    if any(_computes(hook) for hook in shell._forward_pre_hooks.values()):
        found = _CLASSES.get(kind)
        if found is None:
            names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
            found = types.new_class(kind.__name__, (Computing, kind), exec_body=lambda body: body.update(names))
            found = _CLASSES.setdefault(kind, found)
        shell.__class__ = found


def bared(shell: nn.Module) -> None:
    """Undo :func:`keep_over`."""
    if isinstance(shell, Over):
        object.__setattr__(shell, "__class__", nn.ModuleDict)
    elif isinstance(shell, Computing):
        object.__setattr__(shell, "__class__", type(shell).__mro__[2])


def require_not_computed(shell: nn.Module, name: str) -> None:
    """Raises UnsupportedModelError: a tensor that a hook computes is deleted from a view's layer, as whoever takes the
    hook off does first."""
    if any(_computes(hook) == name for hook in shell._forward_pre_hooks.values()):
        raise _kept_over(name)


def _computes(hook: Any) -> str:
    """The name of the tensor that a hook of torch's computes (pruning, norms); "" of others."""
    if not isinstance(hook, BasePruningMethod) and type(hook).__module__.partition("_norm")[0] not in NORMS:
        return ""
    return str(getattr(hook, "_tensor_name", None) or getattr(hook, "name", ""))


def _kept_over(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} of a view is computed from parameters that it shares with its model, where it would be computed no "
        f"longer: take that off the layers of the model, then take a view of it"
    )


def watch(shell: nn.Module, module: nn.Module, computed: Iterable[str] = ()) -> None:
    """Notice from now on what is taken out of a layer of a view, which computes some by itself."""
    if type(module._parameters) is not dict or not module._parameters:
        return
    children, hooks = Children(shell._modules), Hooks(shell._forward_pre_hooks)
    children.watch = hooks.watch = Watch(shell, module, computed)
    vars(shell).update({"_modules": children, "_forward_pre_hooks": hooks})


def require_kept(shell: nn.Module) -> None:
    """Raises UnsupportedModelError: a parameter was taken out of a layer of a view; it is back."""
    if isinstance(shell._modules, Children):
        shell._modules.watch.require_kept()


def unwatched(value: Any) -> Any:
    """A layer's attribute as torch has it."""
    if isinstance(value, Children):
        return dict(value)
    return OrderedDict(value) if isinstance(value, Hooks) else value


def _held_by_torch(shell: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter that one of torch's functions has just taken out of a layer, which it still holds."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch.nn.utils."):
            held = [frame.f_locals.get(local) for local in HOLDING]
            found = next((value for value in held if isinstance(value, nn.Parameter)), None)
            if found is not None:
                return found
        frame = frame.f_back
    other = shell._parameters.get(f"{name}_orig")
    return other if isinstance(other, nn.Parameter) else None


def _place(tensor: Tensor) -> int:
    with contextlib.suppress(RuntimeError):  # tensors that have no memory of their own
        return tensor.data_ptr()
    return 0
