"""The edits that a new geometry needs, bound to a live model and applied as one transaction."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.account import Account, Context, Doubt, Rule, require_finite, tensor_of
from anypatch.core.attributes import MISSING, Merger, like
from anypatch.core.diff import (
    BOOKKEEPING,
    AttributeEdit,
    BufferEdit,
    CacheEdit,
    Edit,
    ModuleEdit,
    ParameterEdit,
    diff,
    require_projection,
)
from anypatch.core.flattened import require_places
from anypatch.core.geometry import Geometry
from anypatch.core.pixelwise import require_own_kernel
from anypatch.core.placement import Touched, kept, require_movable, require_values
from anypatch.core.recorded import require_open
from anypatch.core.roles import Case, Role, role_of
from anypatch.core.steps import SetAttribute, SetBuffer, SetModule, SetParameter, Step, Undo
from anypatch.core.tables import ANTIALIASED, Sampling
from anypatch.core.twins import Subject, build_twins
from anypatch.errors import UnsupportedModelError


@dataclass(frozen=True)
class Change:
    """One line of a plan, for people: what changes, from what to what, and in which role."""

    name: str
    role: str
    old: Any
    new: Any

    @property
    def kind(self) -> str:
        """``"tensor"`` for what is resampled by its role; else what is set to the new twin's, as its role says."""
        return self.role if self.role in ("buffer", "attribute", "module") else "tensor"


@dataclass
class Plan:
    """Everything that has to change in a live model, computed before anything is changed.

    Attributes:
        subject: the live model.
        target: the geometry it will have.
        changes: what changes, for people.
        steps: what changes, for the machine, in the order of application.
        doubts: what has the present number of tokens, perhaps by chance.
    """

    subject: Subject
    target: Geometry
    changes: list[Change] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)

    def apply(self) -> None:
        """Change the live model; on any error, put everything back and raise."""
        undo: list[Undo] = []
        try:
            for step in self.steps:
                undo.append(step.apply())
        except BaseException:
            for back in reversed(undo):
                back()
            raise

    def state_changes(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """For each tensor of the model's state dict that changes: a function from its present value to the new.

        With these a file can be converted that holds the state of ``subject.model``, itself empty.
        """
        model = self.subject.model
        roles = {id(s.parameter): s.role for s in self.steps if isinstance(s, SetParameter)}
        found: dict[str, Callable[[Tensor], Tensor]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in roles:
                found[name] = roles[id(parameter)].apply
        paths = {id(module): path for path, module in model.named_modules()}
        for step in self.steps:
            if not isinstance(step, SetBuffer) or not step.persistent or step.value is None:
                continue
            path = paths.get(id(step.module))
            if path is not None:
                apply = step.role.apply if step.role is not None else functools.partial(like, step.value)
                found[f"{path}.{step.name}" if path else step.name] = apply
        return found


def make(
    subject: Subject,
    target: Geometry,
    method: Any,
    sampling: Sampling = ANTIALIASED,
    rule: Rule | None = None,
    *,
    shared: bool = False,
) -> Plan:
    """The plan that brings ``subject`` to ``target``: its twins, their difference, bound to the live model.

    Args:
        subject: the live model.
        target: the geometry it shall have.
        method: how patch kernels are resized.
        sampling: how absolute position tables are resampled.
        rule: how what the twins do not speak for follows; without it that is left alone.
        shared: whether the plan is for a view, which reads the tensors and exchanges none.

    Raises:
        UnsupportedModelError: something in the model cannot follow; the message names it.
        GeometryError: these sizes do not work for it.
    """
    twins = build_twins(subject, target)
    require_projection(twins)
    require_places(twins)
    edits = diff(twins, method, sampling)
    account = Account(subject, twins.old, edits)
    context = Context(twins, account.widths(), method, sampling)
    extras = [] if rule is None else rule(account.root, account.extras(), context)
    plan = _Binder(subject, target, account, shared).bind(edits, [*account.stale(), *extras])
    return replace(plan, doubts=context.doubts)


class _Binder:
    """Turns edits of the twins into steps on the live model, computing every new value."""

    def __init__(self, subject: Subject, target: Geometry, account: Account, shared: bool) -> None:
        self.subject, self.target, self.account, self.shared = subject, target, account, shared
        self.changes: list[Change] = []
        self.modules: list[SetModule] = []
        self.parameters: dict[int, SetParameter] = {}
        self.tied: dict[Any, Tensor] = {}  # new values by the memory of the old: what lies in one place stays there
        self.buffers: list[SetBuffer] = []
        self.attributes: list[SetAttribute] = []
        self.merger = Merger()

    def bind(self, edits: list[Edit], extras: list[Edit]) -> Plan:
        binders: dict[type[Edit], Callable[[Any, list[nn.Module]], None]] = {
            ModuleEdit: self._module,
            ParameterEdit: self._parameter,
            BufferEdit: self._buffer,
            AttributeEdit: self._attribute,
            CacheEdit: self._cache,
        }
        for edit in edits:
            place = self.account.places[edit.path]
            binders[type(edit)](edit, list(place.outer if isinstance(edit, ModuleEdit) else place.layers))
        self._require_projection_found()
        for edit in extras:
            live = self.account.root.get_submodule(edit.path)
            require_open(edit.full, [live])
            binders[type(edit)](edit, [live])
        self._follow_references()
        if self.subject.finish is not None:
            self.attributes += [SetAttribute(*entry) for entry in self.subject.finish(self.target)]
        self._require_movable()
        steps: list[Step] = [*self.modules, *self.parameters.values(), *self.buffers, *self.attributes]
        return Plan(self.subject, self.target, self.changes, steps)

    def _require_movable(self) -> None:
        root = self.subject.wrapper if self.subject.wrapper is not None else self.subject.model
        touched = []
        for path, module in root.named_modules():
            places = [(n, p) for n, p in module._parameters.items() if p is not None and id(p) in self.parameters]
            changed = {step.name for step in self.buffers if step.module is module}
            places += [(n, b) for n, b in module._buffers.items() if b is not None and n in changed]
            touched += [Touched(f"{path}.{name}" if path else name, module, tensor) for name, tensor in places]
        speaks = self.subject.speaks
        part = None if speaks is None else self.subject.part.get_submodule(speaks)
        require_movable(root, touched, part, self.shared)

    def _require_projection_found(self) -> None:
        """The layer that the patch changes in the twins has to be there in the live model."""
        a, b = self.subject.geometry, self.target
        if a.patch_size == b.patch_size or any(c.role.startswith("patch projection") for c in self.changes):
            return
        raise UnsupportedModelError(
            f"{type(self.subject.part).__name__} is not laid out as {a.library} builds it from its configuration: "
            f"it has no layer in the place of the patch projection"
        )

    def _module(self, edit: ModuleEdit, parents: list[nn.Module]) -> None:
        for parent in parents:
            child = None if edit.after is None else copy.deepcopy(edit.after).train(parent.training)
            self.modules.append(SetModule(parent, edit.name, child))
            self.changes.append(Change(edit.full, "module", type(edit.twin).__name__, type(edit.after).__name__))

    def _parameter(self, edit: ParameterEdit, lives: list[nn.Module]) -> None:
        for live in lives:
            tensor = tensor_of(live, edit.name, edit.full)
            if tensor is None or id(tensor) in self.parameters:
                continue  # taken away, or tied
            role, new = _resampled(edit.case, tensor)
            if role.text.startswith("patch projection"):
                require_own_kernel(edit.full, live)
            new = self.tied.setdefault(_memory(tensor), new)
            if isinstance(tensor, nn.Parameter):
                self.parameters[id(tensor)] = SetParameter(tensor, new, role)
            elif edit.name in live._buffers:
                persistent = edit.name not in live._non_persistent_buffers_set
                self.buffers.append(SetBuffer(live, edit.name, new, persistent, role))
            else:
                self.attributes.append(SetAttribute(live, edit.name, new))
            self.changes.append(Change(edit.full, role.text, tuple(tensor.shape), tuple(new.shape)))

    def _buffer(self, edit: BufferEdit, lives: list[nn.Module]) -> None:
        a, b = edit.before, edit.after
        for live in lives:
            current = live._buffers.get(edit.name)
            own = live._parameters.get(edit.name)
            if own is not None:  # made trainable
                self._trainable(edit, own)
                continue
            if b is None:
                value = None
            elif a is None or current is None:
                value = like(b, _reference(live, self.subject.model, b))
            elif _follows(current, a):
                value = like(b, current)
            elif edit.case is not None:  # a table that was trained or loaded, kept in a buffer
                role, value = _resampled(edit.case, current)
                self.buffers.append(SetBuffer(live, edit.name, value, edit.persistent, role))
                self.changes.append(Change(edit.full, role.text, tuple(a.shape), tuple(b.shape)))
                continue
            elif a.shape != b.shape:
                raise UnsupportedModelError(
                    f"{edit.full} changes its number of axes: {tuple(a.shape)} -> {tuple(b.shape)}"
                )
            else:
                continue  # its value does not come from the geometry (drawn at random, or loaded)
            if value is not None and current is not None:
                value = kept(value, current)
            self.buffers.append(SetBuffer(live, edit.name, value, edit.persistent))
            self.changes.append(Change(edit.full, "buffer", _brief(a), _brief(b)))

    def _trainable(self, edit: BufferEdit, parameter: nn.Parameter) -> None:
        if edit.case is None:
            if edit.before is not None and edit.after is not None and edit.before.shape == edit.after.shape:
                return  # trained values of the same shape
            raise UnsupportedModelError(f"{edit.full} is computed from the geometry, but here it is a parameter")
        if id(parameter) not in self.parameters:
            role, new = _resampled(edit.case, parameter)
            self.parameters[id(parameter)] = SetParameter(parameter, new, role)
            self.changes.append(Change(edit.full, role.text, tuple(parameter.shape), tuple(new.shape)))

    def _attribute(self, edit: AttributeEdit, lives: list[nn.Module]) -> None:
        for live in lives:
            if type(live) is not type(edit.twin) and edit.twin is not None and edit.name not in vars(live):
                continue  # another module stands in its place
            value = self.merger.merge(vars(live).get(edit.name, MISSING), edit.before, edit.after)
            self.attributes.append(SetAttribute(live, edit.name, value))
        old, new = _apart(edit.before, edit.after)
        self.changes.append(Change(edit.full, "attribute", _brief(old), _brief(new)))

    def _cache(self, edit: CacheEdit, lives: list[nn.Module]) -> None:
        for live in lives:
            if _is_cache(vars(live).get(edit.name), edit.initial):
                self.attributes.append(SetAttribute(live, edit.name, copy.copy(edit.initial)))

    def _follow_references(self) -> None:
        """Point everything in the user's model at the new copies of shared objects, such as configs."""
        if not self.merger.replacements:
            return
        done = {(id(step.module), step.name) for step in self.attributes}
        root = self.subject.wrapper if self.subject.wrapper is not None else self.subject.model
        for module in root.modules():
            for name, value in list(vars(module).items()):
                if name in BOOKKEEPING or (id(module), name) in done:
                    continue
                new = self.merger.substitute(value)
                if new is not value:
                    self.attributes.append(SetAttribute(module, name, new))


def _memory(tensor: Tensor) -> Any:
    """Where a tensor's values lie, and how; itself where they lie nowhere."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _resampled(case: Case, tensor: Tensor) -> tuple[Role, Tensor]:
    """The role of a live tensor, and its value at the new geometry."""
    require_values(case.name, tensor)
    expected = tuple(tensor.shape[a] for a in case.axes) if tensor.ndim == len(case.old_shape) else None
    if expected != tuple(case.old_shape[a] for a in case.axes):
        case = _live_case(case, tensor)
    if not tensor.is_floating_point():
        raise UnsupportedModelError(f"{case.name} is stored as {tensor.dtype}: adapt the model before quantizing it")
    require_finite(case.name, tensor)
    role = role_of(case)
    with torch.no_grad():
        return role, kept(role.apply(tensor.detach()), tensor)


def _live_case(case: Case, parameter: Tensor) -> Case:
    """The case of a live tensor with another number of prefix tokens than the twin's."""
    if parameter.ndim == len(case.old_shape) and len(case.axes) == 1:
        (axis,) = case.axes
        shift = parameter.shape[axis] - case.old_shape[axis]
        new = list(case.new_shape)
        new[axis] += shift
        if -8 <= shift < 0 and new[axis] > 0:
            return replace(case, old_shape=parameter.shape, new_shape=torch.Size(new))
    raise UnsupportedModelError(
        f"{case.name} has shape {tuple(parameter.shape)}, but a model of this configuration has "
        f"{tuple(case.old_shape)}: the model was changed after it was built"
    )


def _follows(live: Tensor, old: Tensor) -> bool:
    """Whether a live buffer is what the library computes for the present geometry."""
    if live.shape != old.shape:
        return False
    if live.is_meta:
        return True
    reference = like(old, live)
    if not live.is_floating_point():
        return torch.equal(live, reference)
    # what a library computes twice, perhaps on another device, differs by its last bits; bfloat16 keeps 8
    tolerance = 1e-6 if live.dtype in (torch.float32, torch.float64) else 2e-2
    if torch.allclose(live.double(), reference.double(), rtol=tolerance, atol=tolerance, equal_nan=True):
        return True
    return any(_rounded(live, reference, dtype) for dtype in ROUNDINGS)


# What models are kept in for a while: half precision, bfloat16, and the float8 kinds that torch converts everywhere.
ROUNDINGS = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def _rounded(live: Tensor, table: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``live`` is ``table`` after it went through ``dtype``: made of numbers that ``dtype`` has, and no further
    from the table than one step of it, as the table may have been computed on another device."""
    if not torch.equal(torch.nan_to_num(live.to(dtype).to(live.dtype)), torch.nan_to_num(live)):
        return False
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps  # the step below the smallest normal number
    there, here = table.double().clamp(info.min, info.max), live.double().clamp(info.min, info.max)
    return torch.allclose(here, there, rtol=info.eps, atol=least, equal_nan=True)


def _reference(module: nn.Module, model: nn.Module, new: Tensor) -> Tensor:
    """A live tensor whose device and dtype a buffer that did not exist before takes."""
    for source in (module, model):
        for tensor in source.parameters():
            if tensor.is_floating_point() or not new.is_floating_point():
                return tensor
    return new


def _is_cache(live: Any, initial: Any) -> bool:
    """Whether a live attribute holds tensors computed on first use, which a new geometry makes stale."""
    if initial is None:
        return isinstance(live, Tensor) and not isinstance(live, nn.Parameter)
    if type(live) is type(initial):
        values = live.values() if isinstance(live, dict) else live
        return any(isinstance(v, Tensor) for v in values)
    return False


def _apart(old: Any, new: Any) -> tuple[Any, Any]:
    """Only what differs between two records or lists of records: a whole one is too long to be read."""
    if isinstance(old, dict) and isinstance(new, dict):
        same = {key for key in old.keys() & new.keys() if repr(old[key]) == repr(new[key])}
        pairs = {key: _apart(old[key], new[key]) for key in (old.keys() & new.keys()) - same}
        before = {key: pairs[key][0] if key in pairs else value for key, value in old.items() if key not in same}
        return before, {key: pairs[key][1] if key in pairs else v for key, v in new.items() if key not in same}
    if (
        isinstance(old, list)
        and isinstance(new, list)
        and len(old) == len(new)
        and any(isinstance(v, dict) for v in old)
    ):
        found = [_apart(a, b) for a, b in zip(old, new, strict=True) if repr(a) != repr(b)]
        once = {repr(pair): pair for pair in found}.values()  # of every block the same
        return [pair[0] for pair in once], [pair[1] for pair in once]
    return old, new


def _brief(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (int, float, str, tuple, list, dict, type(None))) and len(repr(value)) < 80:
        return value
    return type(value).__name__
