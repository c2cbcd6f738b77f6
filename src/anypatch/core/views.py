"""A view: a second face of a model, at another geometry, that shares its weights.

A view is a tree of shells: for each module of the model one object with attributes, hooks, mode and children of its
own, and with the *same* dictionaries of parameters and buffers. So whatever happens to the weights (an optimizer's
step, ``load_state_dict``, ``.to``, ``functional_call``, a shard put in a parameter's place) has happened to the view as
well. Where a module holds tensors that follow the geometry, its shell's class is a subclass of the same name in which
each of them is a property: the resampling that :func:`anypatch.adapt` would apply once is applied to the present tensor
whenever it is read, as `torch.nn.utils.parametrize` does. Nothing is kept between two readings: a tensor's version
does not tell of changes made through ``.data``, so a kept value could be stale.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from anypatch.core import outdated, restructuring
from anypatch.core.adapters import HELD, MARK
from anypatch.core.attributes import like
from anypatch.core.computed import Computed, guarded, note_given, require_unwritten
from anypatch.core.plan import Plan
from anypatch.core.shells import SHARED, Shells
from anypatch.core.steps import SetAttribute, SetBuffer, SetModule, SetParameter, Step
from anypatch.core.toggles import TOGGLES, toggles, toggles_in, weights_kept
from anypatch.core.twins import Subject
from anypatch.errors import GeometryError, UnsupportedModelError

MERGED = "merged_adapters"  # of PEFT's layers, and what writes it together with their weights
MERGING = ("merge", "unmerge")


@dataclass(frozen=True)
class Follows:
    """A parameter or a learned buffer: a linear function of the model's own, which has ``shape``."""

    apply: Callable[[Tensor], Tensor]
    shape: torch.Size
    persistent: bool = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Follows:
        return self

    def value(self, module: nn.Module, name: str) -> Tensor | None:
        store = module._parameters if name in module._parameters else module._buffers
        source = store[name]
        if source is None:
            return None
        if source.shape != self.shape:
            raise GeometryError(
                f"{name} was {tuple(self.shape)} when this view was taken and is {tuple(source.shape)} now: the model "
                f"was adapted since, take another view of it"
            )
        kind = source.device.type
        if not torch.amp.is_autocast_available(kind):  # the meta device
            return self.apply(source)
        with torch.autocast(kind, enabled=False):
            return self.apply(source)


class Constant:
    """A buffer that the host library computes from the geometry, kept where the model's own tensors are.

    ``reference`` is the dictionary and the name of a tensor whose device and dtype it takes where the model has no
    such buffer.
    """

    def __init__(
        self, value: Tensor | None, persistent: bool, reference: tuple[dict[str, Any], str] | None = None
    ) -> None:
        self.exact = self.present = value
        self.persistent = persistent
        self.reference = reference

    def value(self, module: nn.Module, name: str) -> Tensor | None:
        exact, present, beside = self.exact, self.present, module._buffers.get(name)
        if beside is None and self.reference is not None:
            beside = self.reference[0].get(self.reference[1])
        if exact is None or present is None or beside is None:
            return present
        dtype = beside.dtype if beside.is_floating_point() and exact.is_floating_point() else exact.dtype
        if present.device != beside.device or present.dtype != dtype:
            with torch.inference_mode(False):
                present = self.present = like(exact, beside)
        return present


Bound = Follows | Constant
M = TypeVar("M", bound=nn.Module)
if TYPE_CHECKING:  # mixed into a host's class, which has these methods
    _Base = nn.Module
else:
    _Base = object


class _Bound(_Base):
    """What shells whose tensors follow the geometry are besides their host's class."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Who makes another layer of a shell's class (PEFT its adapters) means the host's."""
        return cls.__mro__[cls.__mro__.index(_Bound) + 1](*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        bound = vars(self)[MARK].get(name)
        if name in (toggling := vars(self).get(TOGGLES, {})):
            toggling[name].value = value
        elif isinstance(bound, Constant) and (value is None or isinstance(value, Tensor)):
            bound.exact = bound.present = value
        elif bound is not None:
            raise UnsupportedModelError(f"{name} of a view is computed from its model's: set it there")
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in vars(self)[MARK]:
            raise UnsupportedModelError(f"{name} of a view is computed from its model's, and cannot be deleted")
        restructuring.require_not_computed(self, name)
        super().__delattr__(name)

    def train(self, mode: bool = True) -> Any:
        if not any(toggle.shared for toggle in toggles_in(self)):
            return super().train(mode)
        with weights_kept(self):
            return super().train(mode)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        restructuring.require_kept(self)
        if isinstance(param, Computed) and not isinstance(param, nn.Parameter):  # pruning, which moves what it masks
            raise UnsupportedModelError(f"{name} of a view cannot hold what is computed from its model's: prune that")
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if isinstance(vars(self)[MARK].get(name), Constant):
            setattr(self, name, tensor)
        else:
            super().register_buffer(name, tensor, persistent)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and pickled by the host's class, as pickle finds no class that was made on the way."""
        return _empty, (type(self).__mro__[2], *_names(self)), vars(self)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, bound in vars(self)[MARK].items():
            value = _read(self, name)
            if value is None or not bound.persistent:
                destination.pop(prefix + name, None)
                continue
            destination[prefix + name] = value if keep_vars else value.detach()
            if isinstance(bound, Follows):
                note_given(self, name, destination[prefix + name])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        names = [prefix + name for name in vars(self)[MARK]]
        given = [name for name in names if name in state_dict]
        held = {key: value for key, value in state_dict.items() if key not in given}
        super()._load_from_state_dict(held, prefix, *rest)
        _, _, missing, _, errors = rest
        missing[:] = [name for name in missing if name not in names]
        if given:
            errors.append(f"a view computes {', '.join(given)} from its model's: load into the model")


_CLASSES: weakref.WeakValueDictionary[tuple[Any, ...], type] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


def _subclass(base: type, names: tuple[str, ...], toggling: tuple[str, ...] = ()) -> type:
    """The class of shells of ``base`` in which ``names`` are computed and ``toggling`` shared; called like ``base`` and
    one for all of them."""
    with _LOCK:
        found = _CLASSES.get((base, names, toggling))
        if found is None:
            namespace: dict[str, Any] = {name: _property(name) for name in names}
            namespace |= {name: _shared(name) for name in toggling}
            namespace |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
            found = _CLASSES[base, names, toggling] = types.new_class(
                base.__name__, (_Bound, base), exec_body=lambda body: body.update(namespace)
            )
        return found


def _names(shell: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of what a shell's class has properties."""
    return tuple(sorted(vars(shell)[MARK])), tuple(sorted(vars(shell).get(TOGGLES, ())))


def _empty(base: type[nn.Module], names: tuple[str, ...], toggling: tuple[str, ...] = ()) -> nn.Module:
    """A shell without anything, to which pickle gives its attributes."""
    return object.__new__(_subclass(base, names, toggling))


def _shared(name: str) -> property:
    def read(self: nn.Module) -> Any:
        return self.__dict__[TOGGLES][name].value

    return property(read)


def _property(name: str) -> property:
    def read(self: nn.Module) -> Tensor | None:
        value = _read(self, name)
        return (
            guarded(value, f"{type(self).__name__}.{name}") if isinstance(self.__dict__[MARK][name], Follows) else value
        )

    return property(read)


def _read(module: nn.Module, name: str) -> Tensor | None:
    """The present value of a tensor that follows the geometry."""
    try:
        outdated.require_same(module)
        require_unwritten(module, name)
        return module.__dict__[MARK][name].value(module, name)
    except AttributeError as error:  # else nn.Module.__getattr__ would be asked, and give the model's own tensor
        raise RuntimeError(f"{name} cannot be computed: {error}") from error


def view(model: M, plan: Plan | None, shells: Shells) -> M:
    """The view of ``model`` at ``plan``'s target, or at its own geometry, made of ``shells``; the model stays as it
    is."""
    root = cast(M, shells.shell(model))
    made = {id(module): shells.shell(module) for module in model.modules()}
    for shell in made.values():
        vars(shell)[MARK] = {}
    _share_merged((module, made[id(module)]) for module in model.modules())
    if plan is not None:
        for step in plan.steps:
            _bind(step, model, made, shells)
    for module in model.modules():
        found = toggles(module)
        if found:
            vars(made[id(module)])[TOGGLES] = found
            vars(root).setdefault(TOGGLES, {})
    for shell in made.values():
        if vars(shell)[MARK] or TOGGLES in vars(shell):
            shell.__class__ = _subclass(type(shell), *_names(shell))
        else:
            restructuring.keep_over(shell)
    for module in model.modules():
        restructuring.watch(made[id(module)], module, vars(made[id(module)])[MARK])
    outdated.note((module, made[id(module)]) for module in model.modules())
    computing = next((shell for shell in root.modules() if vars(shell)[MARK]), None)
    outdated.watch(root if computing is None else computing, model)
    if computing is None:  # else its tensors are read once in a run, however the view is called
        root.register_forward_pre_hook(outdated.require_same)
    return root


def _share_merged(pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Which of PEFT's adapters the weights contain is a state of the weights, which the view shares."""
    for module, shell in pairs:
        if MERGED in vars(module):
            vars(shell)[MERGED] = vars(module)[MERGED]
            vars(shell).update(dict.fromkeys(MERGING, _refuse_merging))


def _refuse_merging(*args: Any, **kwargs: Any) -> None:
    """In the place of what would write into weights that are computed."""
    raise UnsupportedModelError("a view computes its weights from its model's: merge and unmerge adapters there")


def _bind(step: Step, model: nn.Module, made: dict[int, nn.Module], shells: Shells) -> None:
    """What a plan's step does to the model once, done to the shells for good."""
    if isinstance(step, SetParameter):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is step.parameter:
                    vars(made[id(module)])[MARK][name] = Follows(step.role.apply, parameter.shape)
    elif isinstance(step, SetBuffer):
        if step.role is None:
            bound: Bound = Constant(step.value, step.persistent, _reference(step.module, model))
        else:
            source = step.module._buffers[step.name]
            assert source is not None  # a role resamples what is there
            bound = Follows(step.role.apply, source.shape, step.persistent)
        vars(made[id(step.module)])[MARK][step.name] = bound
    elif isinstance(step, SetModule):
        replace(step, parent=made[id(step.parent)]).apply()
    elif isinstance(step, SetAttribute):
        replace(step, module=made[id(step.module)], value=shells.rebound(step.value)).apply()
    else:
        raise UnsupportedModelError(f"a view cannot take the step {type(step).__name__}: adapt a copy of the model")


def _reference(module: nn.Module, model: nn.Module) -> tuple[dict[str, Any], str] | None:
    """A floating parameter of the module, or of the model."""
    for root in (module, model):
        for owner in root.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None and parameter.is_floating_point():
                    return owner._parameters, name
    return None


def is_view(module: Any) -> bool:
    """Whether a module is a view, or holds one."""
    return isinstance(module, nn.Module) and any(MARK in vars(m) for m in module.modules())


def require_no_view(module: Any) -> None:
    """Refuse a view where a model of its own is needed.

    Raises:
        UnsupportedModelError: the module is a view, or holds one, or is a flexible model, which has views.
    """
    if is_view(module):
        raise UnsupportedModelError(
            f"this {type(module).__name__} is a view of another model, whose weights it shares: adapt that model, or "
            f"take another view of it"
        )
    if isinstance(module, nn.Module) and any(HELD in vars(m) for m in module.modules()):
        raise UnsupportedModelError("a flexible model has views: make another of its .model, adapted before")


def standing(module: nn.Module) -> nn.Module:
    """A view as an ordinary model at its geometry, with parameters in the place of what was computed.

    All others are still shared. A module that is no view is returned as it is.
    """
    return _stand(module, Shells()) if is_view(module) else module


def described(module: nn.Module, describe: Callable[[nn.Module], Subject]) -> Subject:
    """What ``describe`` says of a view, which only knows ordinary models."""
    shells, back = Shells(), Shells()
    subject = describe(_stand(module, shells))
    for source in module.modules():
        back.made[id(shells.shell(source))] = source
    return replace(subject, model=back.rebound(subject.model), about=back.rebound(subject.about))


def _stand(module: nn.Module, shells: Shells) -> nn.Module:
    root = shells.shell(module)
    tied: dict[int, nn.Parameter] = {}  # what the view's modules share, its standing model's do
    for source in module.modules():
        shell = shells.shell(source)
        bound: dict[str, Bound] = vars(shell).pop(MARK, {})
        vars(shell).update({name: toggle.value for name, toggle in vars(shell).pop(TOGGLES, {}).items()})
        for name in MERGING:
            if vars(shell).get(name) is _refuse_merging:
                del vars(shell)[name]
        restructuring.bared(shell)
        if not isinstance(source, _Bound):
            continue
        object.__setattr__(shell, "__class__", type(source).__mro__[2])  # after the subclass and _Bound
        for store in SHARED:
            vars(shell)[store] = dict(vars(source)[store])
        for name in bound:
            value = _read(source, name)
            own = shell._parameters.get(name)
            if own is not None and value is not None:
                if id(own) not in tied:
                    tied[id(own)] = nn.Parameter(value.detach(), requires_grad=own.requires_grad)
                shell._parameters[name] = tied[id(own)]
                continue
            shell._buffers[name] = value if value is None else value.detach()
            hidden = shell._non_persistent_buffers_set
            (hidden.discard if bound[name].persistent else hidden.add)(name)
    return root
