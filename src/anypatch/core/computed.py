"""Tensors that a view computes from its model's, as they are handed out: writing into them is an error.

What is written into such a tensor reaches neither the model, as resampling has no inverse, nor the view, which computes
it anew at the next reading.
"""

from __future__ import annotations

import re
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.errors import UnsupportedModelError

NAME = "_anypatch_name"  # in the attributes of a guarded tensor: what it is called in its module
READ = "_anypatch_read"  # of the tensor itself, not of a part of it
# What has another effect than on values, and would be lost as well: of the tensor itself.
LOST = ("requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "share_memory_")
# Names that end as those of operations that write do, and do not write.
HARMLESS = ("requires_grad_", "share_memory_", "is_shared_", "rename_")
UNWRITING = ("__init__", "__iter__", "__invert__", "__index__", "__int__")
SETTING = ("__set__", "__delete__", "__setitem__", "__delitem__")

# What the last state dict was given, by module and name.
_GIVEN: weakref.WeakKeyDictionary[nn.Module, dict[str, _Given]] = weakref.WeakKeyDictionary()


class Computed(Tensor):
    """A tensor that everything may be computed with, and that nothing may be written into; nor into parts of it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        for written in _written(func, args, kwargs):
            _require_users(written)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            source = next((item for item in (*args, *kwargs.values()) if isinstance(item, Computed)), None)
            return result if source is None else _parts_of(source, result)

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        """Torch gives no word of it to subclasses."""
        _require_users(self)
        return super().set_(*args, **kwargs)

    def _use_count(self) -> int:
        """Asked by ``torch.utils.swap_tensors`` alone, before it exchanges what two tensors are."""
        _require_users(self)
        return super()._use_count()  # type: ignore[misc]  # torch has it, its stubs do not

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled and copied as the tensor that it is, which is then nobody's but the copy's."""
        return plain(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return plain(self).__deepcopy__(memo)


def _refusing(name: str) -> Any:
    """``tensor += other``, of which torch would make ``tensor = tensor + other`` where it meets a TypeError."""
    inherited = getattr(Tensor, name)

    def write(self: Computed, other: Any) -> Any:
        _require_users(self)
        return inherited(self, other)

    return write


for _name in (name for name in dir(Tensor) if re.fullmatch(r"__i[a-z]+__", name) and name not in UNWRITING):
    setattr(Computed, _name, _refusing(_name))


def guarded(value: Tensor | None, name: str) -> Tensor | None:
    """A tensor as a view hands it out; as it is where torch traces, or another library's kind of tensor is at work."""
    if type(value) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return value
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return value
    result = value.as_subclass(Computed)
    vars(result).update({NAME: name, READ: True})
    return result


def plain(tensor: Tensor) -> Tensor:
    """The same tensor without the guard."""
    with torch._C.DisableTorchFunctionSubclass():
        if "_is_param" in vars(tensor):
            return nn.Parameter(tensor.detach().as_subclass(Tensor), tensor.requires_grad)
        return tensor.as_subclass(Tensor)


class _Given:
    """A tensor that a state dict was given, and whether it had been written into when it was let go.

    What somebody still holds, or has made a parameter of another model, is theirs.
    """

    def __init__(self, value: Tensor) -> None:
        self.lost = False
        with torch.no_grad():
            witness = value.detach()  # has the version of the tensor that it is of
            witness.data = torch.empty(0, dtype=value.dtype, device=value.device)
        version = witness._version

        def let_go(_: Any) -> None:
            self.lost = witness._version != version

        self._held = weakref.ref(value, let_go)


def note_given(module: nn.Module, name: str, value: Tensor) -> None:
    """Remember a tensor that a state dict was given, which has to be an ordinary one."""
    if type(value) is Tensor and not value.is_inference() and not torch.compiler.is_compiling():
        _GIVEN.setdefault(module, {})[name] = _Given(value)


def require_unwritten(module: nn.Module, name: str) -> None:
    """Raises UnsupportedModelError: what the last state dict was given was written into and let go; said once."""
    if torch.compiler.is_compiling() or module not in _GIVEN:
        return
    given = _GIVEN[module].get(name)
    if given is not None and given.lost:
        del _GIVEN[module][name]
        raise UnsupportedModelError(
            f"{type(module).__name__}.{name} in a view's state dict is computed from its model's, and what was written "
            f"into it is lost: write into the model's state dict (of averaged weights: average the model, and take a "
            f"view of the average)"
        )


def writes(name: str) -> bool:
    """Whether an operation's name is that of one which writes into its tensor.

    >>> writes("mul_"), writes("mul"), writes("__init__"), writes("requires_grad_")
    (True, False, False, False)
    """
    return name.endswith("_") and not name.endswith("__") and name not in HARMLESS


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """What an operation writes into."""
    name, given = getattr(func, "__name__", ""), [*args[:1], *kwargs.values()][:1]
    whole = bool(given) and READ in getattr(given[0], "__dict__", ())
    written = name in SETTING or kwargs.get("inplace") is True or (name in LOST and whole) or writes(name)
    found = [*(given if written else []), kwargs.get("out")]
    return [item for entry in found for item in (entry if isinstance(entry, (list, tuple)) else (entry,))]


def _require_users(tensor: Any) -> None:
    if isinstance(tensor, Computed) and not _belongs_to_user(tensor):
        raise UnsupportedModelError(
            f"{vars(tensor)[NAME]} of a view is computed from its model's, and what is written into it would be lost: "
            f"write into the model's"
        )


def _belongs_to_user(tensor: Tensor) -> bool:
    """Whether somebody made a leaf of their own of it: a parameter of another model, a start for an optimisation."""
    with torch._C.DisableTorchFunctionSubclass():
        return "_is_param" in vars(tensor) or (tensor.is_leaf and tensor.requires_grad and READ not in vars(tensor))


def _parts_of(source: Computed, result: Any) -> Any:
    """A result that lies in the tensor's memory, guarded as well."""
    if isinstance(result, (list, tuple)) and type(result) in (list, tuple):
        return type(result)(_parts_of(source, item) for item in result)
    if type(result) is not Tensor or result is source or result.layout is not torch.strided:
        return result
    if result.untyped_storage()._cdata != source.untyped_storage()._cdata:
        return result
    part = result.as_subclass(Computed)
    vars(part)[NAME] = vars(source)[NAME]
    return part
