"""The account of a live model: the difference between it and its old twin, the mirror of the twins' own difference.

Whatever the live model has and the twin does not, or has otherwise, is followed, shown to be independent of the
geometry, or refused by name before anything is changed. The twins' edits speak for everything that stands where the
library puts it; this module says where a tensor that should change really is, and lists what the twins do not speak
for, so that the rule for hand-made models (:class:`Rule`) can follow it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from anypatch.core.adapters import Place, match, reads_same_input, wrapped
from anypatch.core.diff import BOOKKEEPING, AttributeEdit, CacheEdit, Edit, ParameterEdit
from anypatch.core.recorded import require_open
from anypatch.core.recordings import left_behind, sized
from anypatch.core.tables import Sampling
from anypatch.core.twins import Subject, Twins
from anypatch.errors import AnypatchError, UnsupportedModelError

# What stands beside a weight that is computed anew at every forward pass, and what undoes it.
DERIVED = {
    "_mask": ("pruned", "torch.nn.utils.prune.remove"),
    "_u": ("spectrally normed", "torch.nn.utils.remove_spectral_norm"),
    "_g": ("weight-normed", "torch.nn.utils.remove_weight_norm"),
    "_v": ("weight-normed", "torch.nn.utils.remove_weight_norm"),
    "_orig": ("computed from another tensor", "the function that restores it"),
}


class NotFiniteError(UnsupportedModelError):
    """A tensor that has to be resampled has NaN or infinite values, which would spread."""

    def __init__(self, message: str, tensor: Tensor) -> None:
        super().__init__(message)
        self.tensor = tensor


@dataclass(frozen=True)
class Extra:
    """A live module, and the names in it that the twins do not speak for: attributes, parameters, buffers.

    ``whole`` where the twins do not know the module at all.
    """

    path: str
    module: nn.Module
    names: frozenset[str]
    whole: bool


@dataclass(frozen=True)
class Doubt:
    """A tensor that has the number of tokens: by chance, if the model runs with another number of them.

    Attributes:
        module, name: where it is.
        size: the number.
        error: what is to be raised if it cannot be told.
    """

    module: nn.Module
    name: str
    size: int
    error: AnypatchError


@dataclass(frozen=True)
class Context:
    """What a rule has to know: the twins, sizes of tensors that are the same at every geometry, how to resample.

    ``doubts`` is filled with what its shapes alone do not tell.
    """

    twins: Twins
    widths: frozenset[int]
    method: Any
    sampling: Sampling
    doubts: list[Doubt] = field(default_factory=list)


class Rule(Protocol):
    """How what the twins do not speak for follows a geometry: the structural rule of hand-made models."""

    def __call__(self, root: nn.Module, extras: list[Extra], context: Context) -> list[Edit]:
        """Edits by module path in ``root``.

        Raises:
            UnsupportedModelError, GeometryError: something depends on the geometry and cannot follow.
        """


class Account:
    """Where the twin's modules are in the live model, and what of the live model is left over."""

    def __init__(self, subject: Subject, old: nn.Module, edits: Sequence[Edit]) -> None:
        self.subject = subject
        self.root = subject.wrapper if subject.wrapper is not None else subject.model
        self.places = match(subject.part, old)
        self._old = old
        self._edited = {(e.path, e.name) for e in edits if not isinstance(e, CacheEdit)}
        for edit in edits:
            if not isinstance(edit, CacheEdit):
                require_open(edit.full, self.places[edit.path].layers)
        self._changing = {(e.path, e.name): e for e in edits if isinstance(e, ParameterEdit)}
        standing = {id(layer) for place in self.places.values() for layer in place.layers}
        for edit in self._changing.values():
            for live in self.places[edit.path].layers:
                tensor_of(live, edit.name, edit.full)
            _require_exact_adapters(edit, self.places[edit.path], standing)

    def widths(self) -> frozenset[int]:
        """Sizes of tensors that are the same at every geometry: no count of tokens or pixels, if they coincide."""
        found = set()
        for path, module in self._old.named_modules():
            for name, tensor in module._parameters.items():
                if tensor is not None and (path, name) not in self._changing:
                    found |= set(tensor.shape[:2] if isinstance(module, _ConvNd) else tensor.shape)
        for module in self.root.modules():
            if isinstance(module, nn.LayerNorm):
                found.add(module.normalized_shape[-1])
        return frozenset(found)

    def extras(self) -> list[Extra]:
        """Everything in the object that the user holds that the twins do not speak for."""
        known: dict[int, set[str]] = {}
        for path, twin in self._old.named_modules():
            for live in self.places[path].layers:
                known.setdefault(id(live), set()).update(self._spoken_for(path, twin, live))
        found = []
        for module in self._over_what_stays():
            names = {*vars(module), *module._parameters.keys(), *module._buffers.keys()}
            known.setdefault(id(module), set()).update(names)
        inside = {id(m) for m in self.subject.part.modules()}
        for path, module in _territory(self.root, self.subject.geometry.library, inside):
            names = {*_plain(module), *module._parameters.keys(), *module._buffers.keys()} - known.get(
                id(module), set()
            )
            if names or id(module) not in known:
                found.append(Extra(path, module, frozenset(names), id(module) not in known))
        return found

    def stale(self) -> list[Edit]:
        """Numbers that a forward pass of the library's put in the place of those that it builds with, by its sizes.

        The next pass does so again where it has to: of a window as large as the map, which is not shifted.
        """
        paths = {id(module): path for path, module in self.root.named_modules()}
        found: list[Edit] = []
        for path, twin in self._old.named_modules():
            for live in self.places[path].layers:
                for name in sized(type(live)) if type(live) is type(twin) else ():
                    now, built = vars(live).get(name), vars(twin).get(name)
                    numbers = type(built) is int and type(now) is int
                    if numbers and now != built and (path, name) not in self._edited:
                        found.append(AttributeEdit(paths[id(live)], name, None, now, built))
        return found

    def _over_what_stays(self) -> Iterator[nn.Module]:
        """Adapters and parametrizations over layers of which nothing changes: they compute with what stays."""
        changing = {path for path, _ in self._changing}
        for path, place in self.places.items():
            if path in changing:
                continue
            for outer in place.outer:
                inside = {id(m) for layer in wrapped(outer) for m in layer.modules()}
                if inside:
                    yield from (m for m in outer.modules() if id(m) not in inside)
            for layer in place.layers:
                if "parametrizations" in layer._modules:
                    yield from layer.get_submodule("parametrizations").modules()

    def _spoken_for(self, path: str, twin: nn.Module, live: nn.Module) -> set[str]:
        if isinstance(live, torch.jit.ScriptModule):
            return set()
        above = self.subject.speaks
        if above and path != above and not path.startswith(f"{above}."):
            return {name for where, name in self._edited if where == path}
        names = set(vars(twin)) | set(twin._buffers)
        for name, tensor in twin._parameters.items():
            own = live._parameters.get(name)
            # a library's own class knows its tensors whatever their widths; torch's may stand anywhere
            of_library = type(live) is type(twin) and not type(live).__module__.startswith("torch.")
            same = of_library or own is None or tensor is None or own.shape == tensor.shape
            if same or (path, name) in self._changing:
                names.add(name)
        return names


def _plain(module: nn.Module) -> Iterator[str]:
    if isinstance(module, torch.jit.ScriptModule):
        return iter(())
    left = left_behind(module)
    return (name for name in vars(module) if name not in BOOKKEEPING and name not in left)


def _territory(root: nn.Module, library: str, inside: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """The part that has twins, and outside it the modules of the user's own.

    What a library keeps beside the part (a text tower) is its file's to speak for, and torch's own layers belong to
    the module that holds them.
    """

    def walk(path: str, module: nn.Module, users: bool, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        package = type(module).__module__.split(".")[0]
        if package not in ("torch", "peft"):
            users = package != library
        if users or id(module) in inside:
            yield path, module
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(f"{path}.{name}" if path else name, child, users, seen)

    # what a Sequential of torch's puts around a model is the user's, too
    yield from walk("", root, type(root).__module__.split(".")[0] == "torch", set())


# -- tensors that should change ----------------------------------------------------------------------------------


def tensor_of(live: nn.Module, name: str, full: str) -> Tensor | None:
    """The live tensor in the place of a parameter of the twin: a parameter, or one that was frozen into a buffer.

    ``None`` where there is none: it was taken away.

    Raises:
        UnsupportedModelError: it is computed from others at every forward pass.
    """
    own = live._parameters.get(name)
    if own is not None:
        return own
    parametrizations = live._modules.get("parametrizations")
    if parametrizations is not None and name in parametrizations._modules:
        raise UnsupportedModelError(f"{full} is parametrized; remove the parametrization before adapting")
    held = {**vars(live), **live._parameters, **live._buffers}
    for suffix, (what, remedy) in DERIVED.items():
        if isinstance(held.get(name + suffix), Tensor):
            raise UnsupportedModelError(
                f"{full} is {what} ({name}{suffix} stands beside it): call {remedy} before adapting"
            )
    value = held.get(name)
    return value if isinstance(value, Tensor) else None


def require_finite(name: str, tensor: Tensor) -> None:
    """Refuse to resample NaN and infinite values, which would spread.

    Raises:
        NotFiniteError: there are some; the message names the tensor.
    """
    if tensor.is_meta or not tensor.is_floating_point():
        return
    values = tensor.detach()
    values = values.float() if values.dtype.itemsize == 1 else values
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise NotFiniteError(f"{name} has {bad} NaN or infinite values and has to be resampled", tensor)


# -- adapters over layers that change ----------------------------------------------------------------------------


def _require_exact_adapters(edit: ParameterEdit, place: Place, standing: set[int]) -> None:
    """An adapter's own weights over a layer that changes have to change with it, or not to see the geometry.

    ``standing``: the layers, by their ids, that stand where the twin has one, whose tensors have edits of their own.
    """
    for outer in place.outer:
        if any(layer is outer for layer in place.layers):
            continue
        beside = standing | {id(m) for layer in place.layers for m in layer.modules()}
        inner = wrapped(outer)
        if inner:
            beside |= {id(m) for module in inner for m in module.modules()}
        elif not isinstance(edit.twin, (_ConvNd, nn.Linear)):
            continue  # a module of the user's around a whole part: what it has of its own is listed as an extra
        for path, module in outer.named_modules():
            if id(module) in beside:
                continue
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                full = f"{path}.{name}" if path else name
                if tensor is not None and not (inner and _is_exact(full, module, tensor, edit.twin)):
                    raise UnsupportedModelError(
                        f"{edit.full} changes, and {type(outer).__name__} over it computes with {full}, of shape "
                        f"{tuple(tensor.shape)}, in a way that anypatch cannot follow: merge or remove it before "
                        f"adapting, and put it back afterwards"
                    )


def _is_exact(name: str, owner: nn.Module, tensor: Tensor, twin: nn.Module | None) -> bool:
    """Whether a tensor of PEFT's is exact as it is over a layer whose kernel is resized.

    LoRA's second factor reads the rank, whatever the input is; IA3's vector scales channels. Everything else (DoRA's
    magnitudes, which are norms of the whole weight; Hadamard and Kronecker products; rotations; shared projections) is
    computed from the kernel's own entries.
    """
    if name.startswith("lora_B.") and isinstance(owner, (_ConvNd, nn.Linear)):
        return twin is None or not reads_same_input(owner, twin)
    if name.startswith("ia3_l."):
        return isinstance(twin, _ConvNd) or (isinstance(twin, nn.Linear) and tensor.shape[-1] == 1)
    return False
