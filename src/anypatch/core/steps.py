"""Single changes of a live model, each of which knows its way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.attributes import MISSING
from anypatch.core.roles import Role

Undo = Callable[[], None]


@dataclass
class SetModule:
    parent: nn.Module
    name: str
    child: nn.Module | None

    def apply(self) -> Undo:
        undo = _restore(self.parent._modules, self.name)
        if self.child is None:
            del self.parent._modules[self.name]
        else:
            self.parent._modules[self.name] = self.child
        return undo


@dataclass
class SetParameter:
    """New data for a parameter, which stays the same object."""

    parameter: nn.Parameter
    data: Tensor
    role: Role

    def apply(self) -> Undo:
        parameter, data, grad = self.parameter, self.parameter.data, self.parameter.grad

        def undo() -> None:
            parameter.grad = None
            if parameter.dtype == data.dtype and parameter.shape != data.shape and not data.is_meta:
                other = torch.float16 if data.dtype != torch.float16 else torch.float32
                parameter.data = torch.empty(0, dtype=other, device=data.device)
            parameter.data = data
            parameter.grad = grad

        parameter.grad = None
        try:
            if parameter.shape != self.data.shape and not parameter.is_meta:
                # A graph that is still alive holds the node that accumulates this parameter's gradient, with the old
                # shape; torch makes a new one where the dtype changes.
                other = torch.float16 if parameter.dtype != torch.float16 else torch.float32
                parameter.data = torch.empty(0, dtype=other, device=parameter.device)
            parameter.data = self.data
        except BaseException:
            undo()
            raise
        return undo


@dataclass
class SetBuffer:
    module: nn.Module
    name: str
    value: Tensor | None
    persistent: bool
    role: Role | None = None  # how a trained value was resampled; None for one that the library computes

    def apply(self) -> Undo:
        buffers, hidden = self.module._buffers, self.module._non_persistent_buffers_set
        restore, added = _restore(buffers, self.name), not self.persistent and self.name not in hidden

        def undo() -> None:
            restore()
            if added:
                hidden.discard(self.name)

        buffers[self.name] = self.value
        if added:
            hidden.add(self.name)
        return undo


@dataclass
class SetAttribute:
    module: nn.Module
    name: str
    value: Any

    def apply(self) -> Undo:
        undo = _restore(vars(self.module), self.name)
        if self.value is MISSING:
            vars(self.module).pop(self.name, None)
        else:
            vars(self.module)[self.name] = self.value
        return undo


Step = SetModule | SetParameter | SetBuffer | SetAttribute


def _restore(mapping: dict[str, Any], name: str) -> Undo:
    if name not in mapping:
        return lambda: mapping.pop(name, None)
    value = mapping[name]
    return lambda: mapping.__setitem__(name, value)
