"""Empty models: parameters without memory, buffers with their real values.

A constructor runs under two modes of torch, which belong to the calling thread alone. Tensors that only fill memory
(``torch.empty``, ``zeros``, ``randn`` ...) and what is computed from them lie on the meta device, and how they came
about is kept beside them (as torchdistx and FakeTensor do). What is a buffer in the end is then computed; what is a
parameter never is. No function is replaced for the process and no global generator is drawn from: what other threads
build, load or draw meanwhile is what it would be alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.ambient import undisturbed
from anypatch.core.limits import Bounded, claim
from anypatch.core.modes import Draw, Explicit, Plain, about, computed, mapped, on_its_own, tensors_in

CPU, META = torch.device("cpu"), torch.device("meta")
# Factories whose values nobody needs unless the tensor turns out to be a buffer.
FILLED = frozenset(("empty", "empty_strided", "zeros", "ones", "full", "rand", "randn"))
RESHAPED = frozenset(("set_", "resize_"))  # in place, but on the tensor's own description
# Entries up to which a tensor is made at once: constructors fill small tables entry by entry, and a model's biases and
# norms are nothing beside its weights.
SMALL = 2**14
BOOKKEEPING = frozenset(vars(nn.Module()))
PLAIN = frozenset((bool, int, float, str, bytes, type(None), torch.device, torch.dtype, torch.Size))
MAX_DEPTH = 4  # of containers in an attribute that may hold tensors, as deep as host libraries nest them


def empty(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model with parameters on the meta device and real buffers.

    Nothing around the call matters or is changed: neither default dtype and device, autocast and inference mode, nor
    any random state. Random buffers are drawn from generators of their own, the same in every call.

    Raises:
        GeometryError: buffers would take more than :func:`anypatch.memory_limit` allows.
        Exception: whatever ``build`` raises.
    """
    with undisturbed(), torch.no_grad(), Bounded():
        try:
            with _Deferred() as deferred, _Pretence(deferred):
                model = build()
            deferred.settle(model)
            return model
        except (NotImplementedError, RuntimeError):  # reads its parameters in a way that has to have memory
            with on_its_own():
                return build()


@dataclass
class _View:
    """A tensor over a deferred memory, at one point of its history."""

    memory: _Memory
    version: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass
class _Memory:
    """How the values in a piece of memory come about: an operation's output, then operations in place.

    Attributes:
        owner: a meta tensor that keeps the identity of the memory in use.
        source: the operation, its arguments, and which of its tensors this is.
        steps: what was done in place since.
    """

    owner: Tensor
    source: tuple[Any, Any, Any, int]
    steps: list[tuple[Any, Any, Any]] = field(default_factory=list)
    known: tuple[int, Tensor] | None = None

    def value(self, version: int) -> Tensor:
        """A real tensor whose memory is this one after ``version`` steps."""
        if self.known is not None and self.known[0] == version:
            return self.known[1]
        func, args, kwargs, index = self.source
        claim(self.owner)
        outputs = computed(func, _real(args), _real(kwargs))
        found = list(tensors_in(outputs))[index]
        base = torch.empty_strided(self.owner.shape, self.owner.stride(), dtype=self.owner.dtype, device=CPU)
        if about(func).name.startswith("empty"):
            base.zero_()  # a constructor that reads it reads the same every time
        else:
            base.copy_(found)
        self.known = (0, base)
        for number, (func, args, kwargs) in enumerate(self.steps[:version], 1):
            computed(func, _real(args), _real(kwargs))
            self.known = (number, base)
        return base


class _Deferred(Plain):
    """Defers what only fills memory and what is computed from it; the rest is computed as always."""

    def __init__(self) -> None:
        super().__init__()
        self.memories: dict[int, _Memory] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("device") == META:
            kwargs["device"] = CPU  # of a parameter that has no memory here
        inputs = list(tensors_in((args, kwargs)))
        if not inputs:
            name = about(func).name
            if name not in FILLED or kwargs.get("device", CPU).type != "cpu":
                return computed(func, args, kwargs)
            if math.prod(args[0]) > SMALL:
                return self.record(func, args, kwargs)
            made = computed(func, args, kwargs)
            return made.zero_() if name.startswith("empty") else made
        if not any(self.holds(tensor) for tensor in inputs):
            return computed(func, args, kwargs)
        known = about(func)
        written = [args[place] if place < len(args) else kwargs.get(name) for place, name in known.written]
        if any(not self.holds(tensor) for tensor in tensors_in(written)):  # real memory is written to
            return computed(func, *self.real((args, kwargs)))
        if known.view or known.name in RESHAPED:
            return func(*args, **_on_meta(kwargs))
        if not written:
            return self.record(func, args, kwargs)
        step = (func, self.saved(args), self.saved(kwargs))
        for tensor in tensors_in(written):
            self.memories[_key(tensor)].steps.append(step)
        return next(tensors_in(written)) if len(func._schema.returns) == 1 else None

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The outputs' shapes on the meta device, and how to compute them; computed at once where shapes depend on
        values."""
        try:
            outputs = computed(func, mapped(_shape_of, args), _on_meta(mapped(_shape_of, kwargs)))
        except (NotImplementedError, RuntimeError):
            return computed(func, *self.real((args, kwargs)))
        tensors = list(tensors_in(outputs))
        if not tensors or any(not tensor.is_meta for tensor in tensors):
            return computed(func, *self.real((args, kwargs)))
        saved = self.saved(args), self.saved(kwargs)
        for index, tensor in enumerate(tensors):
            self.memories[_key(tensor)] = _Memory(tensor, (func, *saved, index))
        return outputs

    def holds(self, tensor: Tensor) -> bool:
        return tensor.is_meta and _key(tensor) in self.memories

    def saved(self, values: Any) -> Any:
        """Arguments as they are now: deferred tensors by their history, real ones copied."""

        def save(item: Any) -> Any:
            if not isinstance(item, Tensor):
                return item
            return self.view(item) if self.holds(item) else item.detach().clone()

        return mapped(save, values)

    def view(self, tensor: Tensor) -> _View:
        memory = self.memories[_key(tensor)]
        offset = int(tensor.storage_offset())
        return _View(memory, len(memory.steps), tensor.shape, tensor.stride(), offset, tensor.dtype)

    def real(self, values: Any) -> Any:
        """``values`` with deferred tensors computed."""
        return mapped(lambda v: _materialised(self.view(v)) if isinstance(v, Tensor) and self.holds(v) else v, values)

    def settle(self, model: nn.Module) -> None:
        """Compute the model's buffers and plain tensors, and take the memory of its parameters."""
        done: dict[Any, Any] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    module._parameters[name] = done.setdefault(id(parameter), _bare(parameter))
            for name, buffer in module._buffers.items():
                module._buffers[name] = self.settled(buffer, done)
            for name, value in list(vars(module).items()):
                if type(value) in PLAIN or name in BOOKKEEPING:
                    continue
                new = self.settled(value, done)
                if new is not value:
                    vars(module)[name] = new

    def settled(self, value: Any, done: dict[Any, Any], depth: int = 0) -> Any:
        if isinstance(value, Tensor):
            if isinstance(value, nn.Parameter):
                return done.get(id(value), value)
            if not value.is_meta:
                return value
            if id(value) not in done:
                done[id(value)] = _materialised(self.view(value)) if self.holds(value) else _nothing(value)
            return done[id(value)]
        if depth >= MAX_DEPTH:
            return value
        if isinstance(value, (dict, list)):
            for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
                new = self.settled(item, done, depth + 1)
                if new is not item:
                    value[key] = new
        elif type(value) is tuple:
            items = tuple(self.settled(item, done, depth + 1) for item in value)
            return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
        return value


class _Pretence(Explicit):
    """Deferred tensors say that they are on the CPU, and give their values to Python and numpy."""

    def __init__(self, deferred: _Deferred) -> None:
        super().__init__()
        self.deferred = deferred

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if args and isinstance(args[0], Tensor) and self.deferred.holds(args[0]):
            attribute = getattr(func, "__self__", None)
            if attribute is Tensor.device:
                return CPU
            if attribute is Tensor.is_meta:  # the truth for torch's own initialisers, which then have nothing to draw
                return sys._getframe(1).f_globals.get("__name__") == "torch.nn.init"
            if attribute is Tensor.data and func.__name__ == "__set__" and not self.deferred.holds(args[1]):
                args = (args[0], self.deferred.record(torch.ops.aten.clone.default, (args[1],), {}))
            if func in (Tensor.numpy, Tensor.tolist, Tensor.__array__):
                args = (self.deferred.real(args[0]), *args[1:])
        if kwargs and str(kwargs.get("device")) == "meta":
            asks = func is torch.tensor and isinstance(args[0], list) and not args[0]
            if not asks:  # torch.tensor([]): a library asks where it builds
                kwargs = {**kwargs, "device": CPU}
        return super().__torch_function__(func, types, args, kwargs)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _shape_of(value: Any) -> Any:
    if isinstance(value, Tensor) and not value.is_meta:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)
    return value


def _on_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for the meta device, which draws nothing."""
    kwargs = {k: None if isinstance(v, Draw) else v for k, v in kwargs.items()}
    return {**kwargs, "device": META} if "device" in kwargs else kwargs


def _real(values: Any) -> Any:
    """Saved arguments with every history computed; views of one memory stay views of it."""
    return mapped(lambda item: _materialised(item) if isinstance(item, _View) else item, values)


def _materialised(view: _View) -> Tensor:
    base = view.memory.value(view.version)
    storage = base.untyped_storage()
    return torch.empty(0, dtype=view.dtype, device=CPU).set_(storage, view.offset, view.size, view.stride)


def _nothing(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device=CPU) if not value.numel() else value


def _bare(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter that was computed, without its memory."""
    empty = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device=META)
    bare = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    vars(bare).update(vars(parameter))
    return bare
