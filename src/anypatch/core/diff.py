"""The difference between a model's twins: everything in it that depends on the geometry. Touches no live model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from anypatch.core.attributes import MISSING, same, same_tensor
from anypatch.core.geometry import show
from anypatch.core.roles import Case, changed_axes
from anypatch.core.tables import ANTIALIASED, Sampling
from anypatch.core.twins import Twins
from anypatch.errors import UnsupportedModelError

# nn.Module's own bookkeeping; parameters, buffers and children are diffed on their own.
BOOKKEEPING = frozenset(vars(nn.Module())) | {
    "_compiled_call_impl",
    "_is_hf_initialized",
}

Owners = tuple[tuple[nn.Module, nn.Module], ...]


@dataclass(frozen=True)
class Edit:
    """Something that differs between the twins, at a module's path in them; ``twin`` is the old twin's module."""

    path: str
    name: str
    twin: nn.Module | None

    @property
    def full(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


@dataclass(frozen=True)
class ParameterEdit(Edit):
    """A parameter whose shape follows the geometry."""

    case: Case


@dataclass(frozen=True)
class BufferEdit(Edit):
    """A buffer whose value or shape follows the geometry; ``case`` is for a live one that was trained or loaded."""

    before: Tensor | None
    after: Tensor | None
    persistent: bool
    case: Case | None


@dataclass(frozen=True)
class AttributeEdit(Edit):
    """A plain value that follows the geometry."""

    before: Any
    after: Any


@dataclass(frozen=True)
class CacheEdit(Edit):
    """A plain value that is empty in both twins: what a live model has put there was computed at its geometry."""

    initial: Any


@dataclass(frozen=True)
class ModuleEdit(Edit):
    """A module without parameters that appears, disappears or changes its type; ``path`` is its parent's."""

    after: nn.Module | None


def diff(twins: Twins, method: Any = None, sampling: Sampling = ANTIALIASED) -> list[Edit]:
    """Everything that differs between the old and the new twin, in the order of their modules.

    Args:
        twins: the two (or three) twins, their geometries and the facts about their family.
        method: how patch kernels are resized; goes into the cases.
        sampling: how absolute position tables are resampled, likewise.

    Raises:
        UnsupportedModelError: a layer or an axis appears or disappears.

    Examples:
        >>> from anypatch.core.geometry import Geometry
        >>> small, large = Geometry((4, 4), (8, 8)), Geometry((8, 8), (16, 16))
        >>> twins = Twins(nn.Conv2d(3, 5, 4, 4), nn.Conv2d(3, 5, 8, 8), small, large)
        >>> [(type(edit).__name__, edit.full) for edit in diff(twins)]
        [('ParameterEdit', 'weight'), ('AttributeEdit', 'kernel_size'), ('AttributeEdit', 'stride')]
    """
    old, new = dict(twins.old.named_modules()), dict(twins.new.named_modules())
    edits: list[Edit] = []
    replaced: list[str] = []
    for path in {**old, **new}:
        if any(path == r or path.startswith(r + ".") for r in replaced):
            continue
        a, b = old.get(path), new.get(path)
        traced = isinstance(a, torch.fx.GraphModule) and isinstance(b, torch.fx.GraphModule)  # each of its own class
        if a is None or b is None or (type(a) is not type(b) and not traced):
            edits.append(_module(path, a, b))
            replaced.append(path)
            continue
        if isinstance(a, torch.jit.ScriptModule):
            continue  # copied as they are: nothing in them can be changed
        owners = _owners(path, old, new)
        edits += _parameters(twins, path, owners, method, sampling)
        edits += _buffers(twins, path, owners, method, sampling)
        edits += [] if traced else _attributes(path, a, b)
    return edits


def require_projection(twins: Twins) -> None:
    """The patch may only change if a projection's weight changes with it.

    Raises:
        UnsupportedModelError: none does, or a convolution further in would.
    """
    old, new = dict(twins.old.named_modules()), dict(twins.new.named_modules())
    projections = twins.facts.projections
    for path, module in old.items():
        if projections and path not in projections and isinstance(module, _ConvNd):
            _require_same_convolution(path, module, new.get(path))
    if twins.before.patch_size == twins.after.patch_size:
        return
    for path, module in old.items():
        twin = new.get(path)
        if twin is None or not isinstance(module, (_ConvNd, nn.Linear)) or type(twin) is not type(module):
            continue
        if module.weight.shape != twin.weight.shape:
            return
        if isinstance(module, nn.Linear) and twins.probe is not None:
            return
    raise UnsupportedModelError(
        f"{type(twins.old).__name__} accepts patch_size {show(twins.after.patch_size)}, but no convolution or linear "
        f"layer changes with it: its stem is not one linear map per patch"
    )


def _require_same_convolution(path: str, old: _ConvNd, new: nn.Module | None) -> None:
    for name in ("kernel_size", "stride", "padding", "dilation"):
        before, after = getattr(old, name), getattr(new, name, None)
        if type(old) is type(new) and before != after:
            raise UnsupportedModelError(
                f"{path} is a convolution after the patch embedding, and its {name} would change from {before} to "
                f"{after}: the model does not keep its grid, so the patch cannot change"
            )


def _module(path: str, old: nn.Module | None, new: nn.Module | None) -> ModuleEdit:
    if any(m is not None and any(True for _ in m.parameters()) for m in (old, new)):
        what = "appears" if old is None else "disappears" if new is None else "changes its type"
        shown = type(new if old is None else old).__name__
        raise UnsupportedModelError(
            f"layer {path} ({shown}) {what} at the new geometry: the stem is not one linear map per patch"
        )
    parent, _, name = path.rpartition(".")
    return ModuleEdit(parent, name, old, new)


def _owners(path: str, old: dict[str, nn.Module], new: dict[str, nn.Module]) -> Owners:
    pairs = []
    while True:
        if path in new:
            pairs.append((old[path], new[path]))
        if not path:
            return tuple(pairs)
        path = path.rpartition(".")[0]


def _parameters(twins: Twins, path: str, owners: Owners, method: Any, sampling: Sampling) -> Iterator[Edit]:
    old, new = owners[0]
    for name in {**old._parameters, **new._parameters}:
        a, b = old._parameters.get(name), new._parameters.get(name)
        full = f"{path}.{name}" if path else name
        if (a is None) != (b is None):
            raise UnsupportedModelError(f"{full} exists at only one of the two geometries")
        if a is None or b is None:
            continue
        axes = _dependent_axes(twins.probe, path, name, a, b)
        if axes:
            yield ParameterEdit(path, name, old, _case(twins, full, a, b, axes, owners, method, sampling))


def _dependent_axes(probe: nn.Module | None, path: str, name: str, a: Tensor, b: Tensor) -> tuple[int, ...]:
    shapes = [a.shape, b.shape]
    if probe is not None:
        try:
            tensor = getattr(probe.get_submodule(path), name, None)
        except AttributeError:
            tensor = None
        if isinstance(tensor, Tensor):
            shapes.append(tensor.shape)
    if len({len(s) for s in shapes}) > 1:
        full = f"{path}.{name}" if path else name
        raise UnsupportedModelError(f"{full} changes its number of axes: {tuple(a.shape)} -> {tuple(b.shape)}")
    return changed_axes(*shapes)


def _case(
    twins: Twins,
    full: str,
    a: Tensor,
    b: Tensor,
    axes: tuple[int, ...],
    owners: Owners,
    method: Any,
    sampling: Sampling,
) -> Case:
    return Case(full, a.shape, b.shape, axes, owners, twins.before, twins.after, twins.facts, method, sampling)


def _buffers(twins: Twins, path: str, owners: Owners, method: Any, sampling: Sampling) -> Iterator[Edit]:
    old, new = owners[0]
    for name in {**old._buffers, **new._buffers}:
        a, b = old._buffers.get(name), new._buffers.get(name)
        if (a is None and b is None) or (a is not None and b is not None and same_tensor(a, b)):
            continue
        case = None
        if a is not None and b is not None and a.ndim == b.ndim and a.shape != b.shape:
            full = f"{path}.{name}" if path else name
            case = _case(twins, full, a, b, changed_axes(a.shape, b.shape), owners, method, sampling)
        yield BufferEdit(path, name, old, a, b, name not in new._non_persistent_buffers_set, case)


def _attributes(path: str, old: nn.Module, new: nn.Module) -> Iterator[Edit]:
    a, b = vars(old), vars(new)
    for name in {**a, **b}:
        if name in BOOKKEEPING:
            continue
        before, after = a.get(name, MISSING), b.get(name, MISSING)
        if not same(before, after):
            yield AttributeEdit(path, name, old, before, after)
        elif after is None or (isinstance(after, (dict, list)) and not after):
            yield CacheEdit(path, name, old, after)
