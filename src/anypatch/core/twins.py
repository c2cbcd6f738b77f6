"""Two empty twins of a model, diffed, and the diff applied to the live model. Knows no library by name."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from anypatch.core.attributes import MISSING, Merger, like, same, same_tensor
from anypatch.core.empty import empty
from anypatch.core.geometry import Geometry, show
from anypatch.core.roles import Case, Facts, Role, changed_axes, role_of
from anypatch.core.tables import ANTIALIASED, Sampling
from anypatch.errors import UnsupportedModelError

# nn.Module's own bookkeeping; parameters, buffers and children are diffed on their own.
BOOKKEEPING = frozenset(vars(nn.Module())) | {
    "_compiled_call_impl",
    "_is_hf_initialized",
}


@dataclass(frozen=True)
class Subject:
    """A live model as its host library's file describes it.

    Attributes:
        model: the model the user holds, wrappers (PEFT, ``torch.compile``) taken off.
        geometry: its present geometry.
        build: builds a fresh model of the same configuration at a geometry.
        facts: what shapes cannot tell.
        path: where in ``model`` the part that ``build`` rebuilds is; empty for the whole.
        finish: after the diff, returns what else in the host library's bookkeeping follows the geometry, as
            (module, attribute, value).
        wrapper: the object the user holds, if it is not ``model``.
        about: what the library's folder found and keeps for its other verbs; nobody else reads it.
    """

    model: nn.Module
    geometry: Geometry
    build: Callable[[Geometry], nn.Module]
    facts: Facts = field(default_factory=Facts)
    path: str = ""
    finish: Callable[[Geometry], list[tuple[nn.Module, str, Any]]] | None = None
    wrapper: nn.Module | None = None
    about: Any = None

    @property
    def part(self) -> nn.Module:
        return self.model.get_submodule(self.path)


@dataclass(frozen=True)
class Change:
    """One line of a plan, for people: what changes, from what to what, and in which role."""

    name: str
    role: str
    old: Any
    new: Any


class Plan:
    """Everything that has to change in a live model, computed before anything is changed."""

    def __init__(self, subject: Subject, target: Geometry, method: Any, sampling: Sampling = ANTIALIASED) -> None:
        self.subject = subject
        self.target = target
        self.method, self.sampling = method, sampling
        self.changes: list[Change] = []
        self._data: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self._roles: dict[int, Role] = {}
        self._buffer_roles: dict[tuple[int, str], Role] = {}
        self._buffers: list[tuple[nn.Module, str, Tensor | None, bool]] = []
        self._attributes: list[tuple[nn.Module, str, Any]] = []
        self._modules: list[tuple[nn.Module, str, nn.Module | None]] = []
        self._merger = Merger()
        old, new = self._twins()
        self._probe = self._probe_twin()
        self._diff(old, new)
        self._follow_references()
        if subject.finish is not None:
            self._attributes += subject.finish(target)

    # -- building ------------------------------------------------------------------------------------------

    def _twins(self) -> tuple[nn.Module, nn.Module]:
        subject = self.subject
        old = empty(lambda: subject.build(subject.geometry))
        new = empty(lambda: subject.build(self.target))
        return old, new

    def _probe_twin(self) -> nn.Module | None:
        """A third twin, where the token or pixel count stays the same although the grid or patch does not."""
        a, b = self.subject.geometry, self.target
        same_tokens = a.grid != b.grid and a.grid and b.grid and math.prod(a.grid) == math.prod(b.grid)
        same_pixels = a.patch_size != b.patch_size and math.prod(a.patch_size) == math.prod(b.patch_size)
        if not (same_tokens or same_pixels):
            return None
        patch = (*a.patch_size[:-1], 2 * a.patch_size[-1]) if same_pixels else a.patch_size
        kernel = None if a.kernel_size is None else (*a.kernel_size[:-1], 2 * a.kernel_size[-1])
        image = a.image_size
        if image is not None:
            image = tuple(2 * side for side in image)
        probe = replace(a, patch_size=patch, image_size=image, kernel_size=kernel if same_pixels else a.kernel_size,
                        explicit_grid=None)  # fmt: skip
        return empty(lambda: self.subject.build(probe))

    # -- diffing -------------------------------------------------------------------------------------------

    def _diff(self, old: nn.Module, new: nn.Module) -> None:
        old_modules, new_modules = dict(old.named_modules()), dict(new.named_modules())
        self._require_projection_follows(old_modules, new_modules)
        replaced: list[str] = []
        for path in {**old_modules, **new_modules}:
            if any(path == r or path.startswith(r + ".") for r in replaced):
                continue
            a, b = old_modules.get(path), new_modules.get(path)
            if a is None or b is None or type(a) is not type(b):
                self._replace_module(path, a, b)
                replaced.append(path)
                continue
            lives = self._resolve(path, a)
            owners = _owners(path, old_modules, new_modules)
            self._diff_parameters(path, owners, lives)
            self._diff_buffers(path, owners, lives)
            self._diff_attributes(path, a, b, lives)
        self._require_projection_found()

    def _require_projection_found(self) -> None:
        """The layer that the patch changes in the twins has to be there in the live model."""
        a, b = self.subject.geometry, self.target
        if a.patch_size == b.patch_size or any(c.role.startswith("patch projection") for c in self.changes):
            return
        raise UnsupportedModelError(
            f"{type(self.subject.part).__name__} is not laid out as {a.library} builds it from its configuration: "
            f"it has no layer in the place of the patch projection"
        )

    def _require_projection_follows(self, old: dict[str, nn.Module], new: dict[str, nn.Module]) -> None:
        """The patch may only change if a projection's weight changes with it."""
        a, b = self.subject.geometry, self.target
        projections = self.subject.facts.projections
        for path, module in old.items():
            if projections and path not in projections and isinstance(module, _ConvNd):
                _require_same_convolution(path, module, new.get(path))
        if a.patch_size == b.patch_size:
            return
        for path, module in old.items():
            twin = new.get(path)
            if twin is None or not isinstance(module, (_ConvNd, nn.Linear)) or type(twin) is not type(module):
                continue
            if module.weight.shape != twin.weight.shape:
                return
            if isinstance(module, nn.Linear) and self._probe is not None:
                return
        raise UnsupportedModelError(
            f"{type(self.subject.part).__name__} accepts patch_size {show(b.patch_size)}, but no convolution or linear "
            f"layer changes with it: its stem is not one linear map per patch"
        )

    def _replace_module(self, path: str, old: nn.Module | None, new: nn.Module | None) -> None:
        if any(m is not None and any(True for _ in m.parameters()) for m in (old, new)):
            what = "appears" if old is None else "disappears" if new is None else "changes its type"
            shown = type(new if old is None else old).__name__
            raise UnsupportedModelError(
                f"layer {path} ({shown}) {what} at the new geometry: the stem is not one linear map per patch"
            )
        parent_path, _, name = path.rpartition(".")
        for parent in self._resolve(parent_path, None):
            child = None if new is None else copy.deepcopy(new).train(parent.training)
            self._modules.append((parent, name, child))
            self.changes.append(Change(path, "module", type(old).__name__, type(new).__name__))

    def _resolve(self, path: str, twin: nn.Module | None) -> list[nn.Module]:
        """The live modules that stand where ``path`` is in the twins.

        One, unless an adapter wraps it: then the wrapped layer, and the adapter's own layers that read the same
        input (LoRA's first factor over a patch projection is itself a patch projection).
        """
        modules: list[nn.Module] = [self.subject.part]
        for name in path.split(".") if path else []:
            modules = [child for m in modules for child in _children(m, name)]
        if not modules:
            return []
        if twin is None:
            return modules
        found: list[nn.Module] = []
        for module in modules:
            found += _unwrap(module, twin, path)
        return found

    def _diff_parameters(
        self, path: str, owners: tuple[tuple[nn.Module, nn.Module], ...], lives: list[nn.Module]
    ) -> None:
        old, new = owners[0]
        names = {**old._parameters, **new._parameters}
        for name in names:
            a, b = old._parameters.get(name), new._parameters.get(name)
            full = f"{path}.{name}" if path else name
            if (a is None) != (b is None):
                raise UnsupportedModelError(f"{full} exists at only one of the two geometries")
            if a is None or b is None:
                continue
            axes = self._dependent_axes(path, name, a, b, full)
            if not axes:
                continue
            case = self._case(full, a, b, axes, owners)
            for live in lives:
                parameter = live._parameters.get(name)
                if parameter is not None:
                    self._resample(case, parameter)
                    continue
                parametrizations = live._modules.get("parametrizations")
                if parametrizations is not None and name in parametrizations._modules:
                    raise UnsupportedModelError(f"{full} is parametrized; remove the parametrization before adapting")

    def _dependent_axes(self, path: str, name: str, a: Tensor, b: Tensor, full: str) -> tuple[int, ...]:
        shapes = [a.shape, b.shape]
        if self._probe is not None:
            try:
                probe = self._probe.get_submodule(path)
            except AttributeError:
                probe = None
            tensor = None if probe is None else getattr(probe, name, None)
            if isinstance(tensor, Tensor):
                shapes.append(tensor.shape)
        if len({len(s) for s in shapes}) > 1:
            raise UnsupportedModelError(f"{full} changes its number of axes: {tuple(a.shape)} -> {tuple(b.shape)}")
        return changed_axes(*shapes)

    def _case(
        self,
        full: str,
        a: Tensor,
        b: Tensor,
        axes: tuple[int, ...],
        owners: tuple[tuple[nn.Module, nn.Module], ...],
    ) -> Case:
        subject = self.subject
        return Case(
            full,
            a.shape,
            b.shape,
            axes,
            owners,
            subject.geometry,
            self.target,
            subject.facts,
            self.method,
            self.sampling,
        )

    def _resample(self, case: Case, parameter: nn.Parameter) -> None:
        if id(parameter) in self._data:
            return  # tied
        expected = tuple(parameter.shape[a] for a in case.axes) if parameter.ndim == len(case.old_shape) else None
        if expected != tuple(case.old_shape[a] for a in case.axes):
            case = self._live_case(case, parameter)
        if not parameter.is_floating_point():
            raise UnsupportedModelError(
                f"{case.name} is stored as {parameter.dtype}: adapt the model before quantizing it"
            )
        role = role_of(case)
        with torch.no_grad():
            new = role.apply(parameter.detach())
        self._data[id(parameter)] = (parameter, new)
        self._roles[id(parameter)] = role
        self.changes.append(Change(case.name, role.text, tuple(parameter.shape), tuple(new.shape)))

    def _live_case(self, case: Case, parameter: Tensor) -> Case:
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

    def _diff_buffers(self, path: str, owners: tuple[tuple[nn.Module, nn.Module], ...], lives: list[nn.Module]) -> None:
        old, new = owners[0]
        for name in {**old._buffers, **new._buffers}:
            a, b = old._buffers.get(name), new._buffers.get(name)
            full = f"{path}.{name}" if path else name
            if (a is None and b is None) or (a is not None and b is not None and same_tensor(a, b)):
                continue
            persistent = name not in new._non_persistent_buffers_set
            for live in lives:
                current = live._buffers.get(name)
                if b is None:
                    value = None
                elif a is None or current is None:
                    value = like(b, _reference(live, self.subject.model, b))
                elif _follows(current, a):
                    value = like(b, current)
                elif a.shape != b.shape:
                    # a table that was trained or loaded, kept in a buffer
                    axes = changed_axes(a.shape, b.shape)
                    role = role_of(self._case(full, a, b, axes, owners))
                    self._buffers.append((live, name, role.apply(current), persistent))
                    self._buffer_roles[id(live), name] = role
                    self.changes.append(Change(full, role.text, tuple(a.shape), tuple(b.shape)))
                    continue
                else:
                    continue  # its value does not come from the geometry (drawn at random, or loaded)
                self._buffers.append((live, name, value, persistent))
                self.changes.append(Change(full, "buffer", _brief(a), _brief(b)))

    def _diff_attributes(self, path: str, old: nn.Module, new: nn.Module, lives: list[nn.Module]) -> None:
        a, b = vars(old), vars(new)
        for name in {**a, **b}:
            if name in BOOKKEEPING:
                continue
            before, after = a.get(name, MISSING), b.get(name, MISSING)
            full = f"{path}.{name}" if path else name
            if same(before, after):
                for live in lives:
                    if _is_cache(vars(live).get(name), after):
                        self._attributes.append((live, name, copy.copy(after)))
                continue
            for live in lives:
                value = self._merger.merge(vars(live).get(name, MISSING), before, after)
                self._attributes.append((live, name, value))
            self.changes.append(Change(full, "attribute", _brief(before), _brief(after)))

    def _follow_references(self) -> None:
        """Point everything in the user's model at the new copies of shared objects, such as configs."""
        if not self._merger.replacements:
            return
        done = {(id(m), name) for m, name, _ in self._attributes}
        root = self.subject.wrapper if self.subject.wrapper is not None else self.subject.model
        for module in root.modules():
            for name, value in list(vars(module).items()):
                if name in BOOKKEEPING or (id(module), name) in done:
                    continue
                new = self._merger.substitute(value)
                if new is not value:
                    self._attributes.append((module, name, new))

    # -- for tensors that lie elsewhere ----------------------------------------------------------------------

    def state_changes(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """For each tensor of the model's state dict that changes: a function from its present value to the new.

        With these a file can be converted that holds the state of ``subject.model``, itself empty.
        """
        model = self.subject.model
        found: dict[str, Callable[[Tensor], Tensor]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in self._roles:
                found[name] = self._roles[id(parameter)].apply
        paths = {id(module): path for path, module in model.named_modules()}
        for module, name, value, persistent in self._buffers:
            if not persistent or value is None or id(module) not in paths:
                continue
            path = paths[id(module)]
            role = self._buffer_roles.get((id(module), name))
            apply = role.apply if role is not None else functools.partial(like, value)
            found[f"{path}.{name}" if path else name] = apply
        return found

    # -- applying ------------------------------------------------------------------------------------------

    def apply(self) -> None:
        """Change the live model; on any error, put everything back and raise."""
        undo: list[Callable[[], None]] = []
        try:
            for parent, name, child in self._modules:
                undo.append(_restore(parent._modules, name))
                if child is None:
                    del parent._modules[name]
                else:
                    parent._modules[name] = child
            for parameter, data in self._data.values():
                undo.append(_restore_parameter(parameter))
                parameter.grad = None
                parameter.data = data
            for module, name, value, persistent in self._buffers:
                undo.append(_restore(module._buffers, name))
                module._buffers[name] = value
                if not persistent and name not in module._non_persistent_buffers_set:
                    undo.append(lambda m=module, n=name: m._non_persistent_buffers_set.discard(n))  # type: ignore[misc]
                    module._non_persistent_buffers_set.add(name)
            for module, name, value in self._attributes:
                undo.append(_restore(vars(module), name))
                if value is MISSING:
                    vars(module).pop(name, None)
                else:
                    vars(module)[name] = value
        except BaseException:
            for step in reversed(undo):
                step()
            raise


def _require_same_convolution(path: str, old: _ConvNd, new: nn.Module | None) -> None:
    for name in ("kernel_size", "stride", "padding", "dilation"):
        before, after = getattr(old, name), getattr(new, name, None)
        if type(old) is type(new) and before != after:
            raise UnsupportedModelError(
                f"{path} is a convolution after the patch embedding, and its {name} would change from {before} to "
                f"{after}: the model does not keep its grid, so the patch cannot change"
            )


def _owners(path: str, old: dict[str, nn.Module], new: dict[str, nn.Module]) -> tuple[tuple[nn.Module, nn.Module], ...]:
    pairs = []
    while True:
        if path in new:
            pairs.append((old[path], new[path]))
        if not path:
            return tuple(pairs)
        path = path.rpartition(".")[0]


def _children(module: nn.Module, name: str) -> Iterator[nn.Module]:
    """Children called ``name``, looking through adapters' wrappers."""
    child = module._modules.get(name)
    if child is not None:
        yield child
        return
    for wrapped in _wrapped(module):
        yield from _children(wrapped, name)


def _wrapped(module: nn.Module) -> list[nn.Module]:
    """What a wrapper wraps: PEFT's ``base_layer``, and ``original_module`` with its trained copies."""
    found = [module._modules[n] for n in ("base_layer", "original_module") if module._modules.get(n) is not None]
    copies = module._modules.get("modules_to_save")
    if copies is not None and found:
        found += list(copies.children())
    return [m for m in found if m is not None]


def _unwrap(module: nn.Module, twin: nn.Module, path: str) -> list[nn.Module]:
    inner = _wrapped(module)
    if not inner or type(module) is type(twin):
        return [module]
    found = [layer for m in inner for layer in _unwrap(m, twin, path)]
    for name, child in module._modules.items():
        if child is None or child in inner or name == "modules_to_save":
            continue
        for layer in child.modules():
            if _reads_same_input(layer, twin):
                found.append(layer)
    return found


def _reads_same_input(layer: nn.Module, twin: nn.Module) -> bool:
    if isinstance(twin, _ConvNd) and isinstance(layer, _ConvNd):
        return set(twin.kernel_size) != {1} and (layer.kernel_size, layer.stride) == (
            twin.kernel_size,
            twin.stride,
        )
    if isinstance(twin, nn.Linear) and isinstance(layer, nn.Linear):
        return layer.in_features == twin.in_features
    return False


def _follows(live: Tensor, old: Tensor) -> bool:
    """Whether a live buffer is what the library computes for the present geometry."""
    if live.shape != old.shape:
        return False
    if live.is_meta:
        return True
    reference = like(old, live)
    if not live.is_floating_point():
        return torch.equal(live, reference)
    tolerance = 1e-6 if live.dtype in (torch.float32, torch.float64) else 2e-2
    return torch.allclose(live.double(), reference.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


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
    if initial in ({}, []) and type(live) is type(initial):
        values = live.values() if isinstance(live, dict) else live
        return any(isinstance(v, Tensor) for v in values)
    return False


def _brief(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (int, float, str, tuple, list, type(None))) and len(repr(value)) < 80:
        return value
    return type(value).__name__


def _restore(mapping: dict[str, Any], name: str) -> Callable[[], None]:
    if name not in mapping:
        return lambda: mapping.pop(name, None)
    value = mapping[name]
    return lambda: mapping.__setitem__(name, value)


def _restore_parameter(parameter: nn.Parameter) -> Callable[[], None]:
    data, grad = parameter.data, parameter.grad

    def restore() -> None:
        parameter.grad = None
        parameter.data = data
        parameter.grad = grad

    return restore
