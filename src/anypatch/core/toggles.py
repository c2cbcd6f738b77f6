"""Layers that write into their weights when their mode is set: adapters by hand that merge themselves in ``eval()``.

What the weights contain is a state of the weights, not of a face: an attribute in which such a layer keeps it
(``merged``) is shared as the weights are, and only the model's own ``train()`` and ``eval()`` may write.
"""

from __future__ import annotations

import contextlib
import dis
import re
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from anypatch.core.attributes import ATOMS
from anypatch.core.computed import writes
from anypatch.core.modes import about, tensors_in
from anypatch.core.recordings import codes_from
from anypatch.errors import UnsupportedModelError

TOGGLES = "_anypatch_toggles"  # in a shell's attributes: what says what the weights contain, by name
SETTING = re.compile(r"^(train|eval)$|merge|fuse|fold")
_KNOWN: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


class Toggle:
    """An attribute of a shell that is its module's; of a copy, which has weights of its own, its own."""

    def __init__(self, name: str, own: Any = None) -> None:
        self.name = name
        self._own = own

    @property
    def value(self) -> Any:
        source = _SOURCES.get(self)
        return self._own if source is None else source[1][self.name]

    @value.setter
    def value(self, value: Any) -> None:
        source = _SOURCES.get(self)
        if source is None:
            self._own = value
        else:
            source[1][self.name] = value

    @property
    def shared(self) -> bool:
        """Whether there is a module that has it, and the weights, as well."""
        source = _SOURCES.get(self)
        return source is not None and source[0]() is not None

    def __reduce__(self) -> tuple[Any, ...]:
        return Toggle, (self.name, self.value)


# A toggle's module and its attributes, which a view may outlive; beside the toggle, as what lies in a view is copied,
# pickled and looked through for modules.
_SOURCES: weakref.WeakKeyDictionary[Toggle, tuple[weakref.ReferenceType[nn.Module], dict[str, Any]]] = (
    weakref.WeakKeyDictionary()
)


def toggles(module: nn.Module) -> dict[str, Toggle]:
    """What a shell of a module shares with it beside tensors."""
    found = {name: Toggle(name) for name in toggled(module)}
    for toggle in found.values():
        _SOURCES[toggle] = weakref.ref(module), vars(module)
    return found


def toggles_in(view: nn.Module) -> Iterator[Toggle]:
    """All of a view."""
    for module in view.modules():
        yield from vars(module).get(TOGGLES, {}).values()


def toggled(module: nn.Module) -> list[str]:
    """Attributes that say what a layer's weights contain, as far as its class's code tells.

    Examples:
        >>> class Lora(nn.Linear):
        ...     merged = False
        ...     def train(self, mode=True):
        ...         super().train(mode)
        ...         if self.merged == mode:
        ...             self.weight.data += (-1 if mode else 1) * self.B @ self.A
        ...             self.merged = not mode
        >>> layer = Lora(2, 2)
        >>> layer.merged = False
        >>> toggled(layer)
        ['merged']
    """
    kind = type(module)
    if kind not in _KNOWN:
        _KNOWN[kind] = frozenset(_stored(kind))
    fields = vars(module)
    return sorted(name for name in _KNOWN[kind] if isinstance(fields.get(name, ...), ATOMS))


def _stored(kind: type) -> Iterator[str]:
    own = {name for base in kind.__mro__ if not base.__module__.startswith("torch.") for name in vars(base)}
    for entry in filter(SETTING.search, own - vars(object).keys()):
        steps = [step for code in codes_from(kind, entry) for step in dis.get_instructions(code)]
        if any(_writes(step) for step in steps):
            yield from (step.argval for step in steps if step.opname == "STORE_ATTR" and step.argval != "training")


def _writes(step: dis.Instruction) -> bool:
    """Whether an instruction puts values into a tensor."""
    name = step.argval
    if step.opname == "STORE_ATTR":
        return name == "data"
    called = step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(name, str)
    return called and writes(name) and hasattr(Tensor, name)


@contextlib.contextmanager
def weights_kept(shell: nn.Module) -> Iterator[None]:
    """Set modes of a view in a block, which writes into no weight.

    Raises:
        UnsupportedModelError: it would; everything is as it was.
    """
    modes = [(module, module.training) for module in shell.modules()]
    held = [(parameter, parameter.data) for parameter in shell.parameters()]
    states = [(toggle, toggle.value) for toggle in toggles_in(shell)]
    try:
        with _Unwritten([data for _, data in held]):
            yield
        if any(parameter.data_ptr() != data.data_ptr() for parameter, data in held):
            raise _refusal()
    except BaseException:
        for parameter, data in held:
            parameter.data = data
        for module, mode in modes:
            module.training = mode
        for toggle, value in states:
            toggle.value = value
        raise


class _Unwritten(TorchDispatchMode):
    """No operation writes into these tensors."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._storages = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        written = [args[place] if place < len(args) else kwargs.get(name) for place, name in about(func).written]
        if any(tensor.untyped_storage()._cdata in self._storages for tensor in tensors_in(written)):
            raise _refusal()
        return func(*args, **kwargs)


def _refusal() -> UnsupportedModelError:
    return UnsupportedModelError(
        "setting this view's mode would write into weights that it shares with its model, as a layer of it merges its "
        "adapter: set the mode of the model first, then the view's"
    )
