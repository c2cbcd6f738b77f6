"""Everything that a forward pass depends on, in one hash: models that could answer differently never share one.

Two models with equal weights can compute different things: other heads, another activation, pooling or epsilon, a
method or a hook of the user's. So the whole object is read, not a list of what is known to matter: every module's
class, the code of its methods (as it is now, patched or not), its plain attributes, hooks, parameters and buffers. What
cannot be read makes the hash unlike any other, so that features are computed again rather than taken from elsewhere.

Installed packages have versions, which the cache's key holds beside this. So their functions are read as they are, with
the functions they name, one step far (a patched one shows); the user's own code, which has no version, to the end.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib.metadata
import sys
import sysconfig
import types
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

# Do not change what a forward pass in evaluation mode computes, and change between runs.
IGNORED = frozenset(
    (
        "training",
        "_is_full_backward_hook",
        "_version",
        "__weakref__",
        "__dict__",
        "__doc__",
        "__annotations__",
        "__module__",
    )
)
# Hooks of backward passes and of state dicts are never run when features are read.
UNUSED_HOOKS = frozenset(
    (
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
        "_non_persistent_buffers_set",
    )
)
GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_forward_hooks_always_called",
    "_global_forward_hooks_with_kwargs",
)
PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), PurePath)
OPAQUE_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.MethodWrapperType)
INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def fingerprint(model: object) -> str:
    """Changes with anything that changes what a model computes: weights, buffers, plain values, code, hooks.

    The device is left out, and so is whether gradients are wanted. Two models that are built alike and hold equal
    weights have one fingerprint, in any process. Other objects that are part of the work (a kernel, a preprocessing of
    the user's) are read likewise.

    Examples:
        >>> import torch
        >>> relu, gelu = (torch.nn.Sequential(torch.nn.Flatten(), f) for f in (torch.nn.ReLU(), torch.nn.GELU()))
        >>> fingerprint(relu) == fingerprint(gelu)
        False
    """
    reader = _Reader()
    reader.value(model)
    for name in GLOBAL_HOOKS:
        reader.value(getattr(torch_modules, name, None))
    return reader.digest.hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of packages; empty for those that are not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return found


def surroundings(device: torch.device) -> dict[str, Any]:
    """What outside a model changes the numbers of its forward pass: kinds of device, precision and kernels."""
    kind = device.type
    cuda = torch.backends.cuda
    return {
        "device": kind,
        "name": torch.cuda.get_device_name(device) if kind == "cuda" else "",
        "precision": torch.get_float32_matmul_precision(),
        "tf32": (cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) if kind == "cuda" else None,
        "attention": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        "autocast": str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None,
        "default_dtype": str(torch.get_default_dtype()),
    }


class _Reader:
    """Feeds a value, and all that it holds, to a hash."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._seen: dict[tuple[int, bool], int] = {}
        self._shallow = False  # inside a function that an installed function names
        self._alive: list[Any] = []  # so that no number of an object that was read is given to another

    def text(self, *parts: object) -> None:
        for part in parts:
            data = str(part).encode("utf-8", "surrogatepass")
            self.digest.update(f"{len(data)}:".encode() + data)

    def value(self, value: Any) -> None:
        """A value of any kind."""
        if isinstance(value, (*PLAIN, *OPAQUE_TORCH)) and not isinstance(value, enum.Enum):
            self.text(_name(type(value)), repr(value))
            return
        key = (id(value), self._shallow)
        if key in self._seen:  # shared or circular: which one it was
            self.text("again", self._seen[key])
            return
        self._seen[key] = len(self._seen)
        self._alive.append(value)
        self._read(value)(value)

    def _read(self, value: Any) -> Callable[[Any], None]:
        """How a value of this kind is read."""
        kinds: tuple[tuple[Any, Callable[[Any], None]], ...] = (
            (Tensor, self.tensor),
            (np.ndarray, self._array),
            (nn.Module, self._module),
            (enum.Enum, lambda v: self.text(_name(type(v)), v.name)),
            (Mapping, self._mapping),
            ((list, tuple), lambda v: self._items(v, v)),
            ((set, frozenset), lambda v: self._items(v, sorted(v, key=repr))),
            (type, self._class),
            (functools.partial, lambda v: self._items(v, (v.func, v.args, v.keywords))),
            (types.MethodType, lambda v: self._items(v, (v.__self__, v.__func__))),
            (types.FunctionType, self._function),
            (types.CodeType, self._code),
            (types.GeneratorType, lambda v: self._code(v.gi_code)),
            (types.ModuleType, lambda v: self.text("module", v.__name__)),
            (FUNCTIONS, lambda v: self.text("builtin", _name(v))),
            ((property, staticmethod, classmethod), self._descriptor),
        )
        return next((read for kind, read in kinds if isinstance(value, kind)), self._object)

    def tensor(self, tensor: Tensor) -> None:
        self.text(_name(type(tensor)), tensor.dtype, tuple(tensor.shape))
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            self._unlike_any()
            return
        if tensor.numel():
            # Parts of a few megabytes: a copy of the whole would double the memory of the largest tensor.
            flat = tensor.detach().reshape(-1)
            for part in flat.split(1 << 22):
                self.digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)

    def _array(self, array: np.ndarray) -> None:
        self.text("array", array.dtype, array.shape)
        if array.dtype.hasobject:
            self._items(array, array.tolist())
        else:
            self.digest.update(np.ascontiguousarray(array).tobytes())

    def _module(self, module: nn.Module) -> None:
        self.value(type(module))
        for name, value in sorted(vars(module).items(), key=lambda item: item[0]):
            if name in IGNORED or name in UNUSED_HOOKS:
                continue
            self.text(name)
            if name.startswith("_forward") and isinstance(value, dict):  # keys count hooks of the whole process
                self._items(value, list(value.values()))
            else:
                self.value(value)

    def _mapping(self, mapping: Mapping[Any, Any]) -> None:
        self.text(_name(type(mapping)), len(mapping))
        for key, value in mapping.items():
            self.value(key)
            self.value(value)

    def _items(self, owner: Any, items: Iterable[Any]) -> None:
        found = list(items)
        self.text(_name(type(owner)), len(found))
        for item in found:
            self.value(item)
        if type(owner).__module__ != "builtins" and getattr(owner, "__dict__", None):
            self.value(vars(owner))

    def _class(self, cls: type) -> None:
        """A class's name, and the code and values of layers' classes and of the user's own."""
        self.text(_name(cls))
        if not issubclass(cls, (nn.Module, torch.autograd.Function)) and _is_installed(cls):
            return
        for base in cls.__mro__:
            self.text(_name(base))
            if base is nn.Module or (not issubclass(base, nn.Module) and _is_installed(base)):
                continue
            for name, value in sorted(vars(base).items()):
                if name not in IGNORED and not name.startswith("_abc_"):
                    self.text(name)
                    self._global(value, base)

    def _function(self, function: types.FunctionType) -> None:
        """A function's code, and what it reads: defaults, closure, and the globals that it names."""
        self.text("function", _name(function))
        self._code(function.__code__)
        self.value(function.__defaults__)
        self.value(function.__kwdefaults__)
        for cell in function.__closure__ or ():
            try:
                self.value(cell.cell_contents)
            except ValueError:  # not filled yet
                self.text("empty cell")
        if hasattr(function, "__wrapped__"):
            self.value(function.__wrapped__)
        installed = _is_installed(function)
        if installed and self._shallow:
            return
        before, self._shallow = self._shallow, installed
        self._globals(function)
        self._shallow = before

    def _globals(self, function: types.FunctionType) -> None:
        """What a function's names stand for now, in its own module and in the modules that it names."""
        names = sorted(_names(function.__code__))
        for name in names:
            value = function.__globals__.get(name, self)
            if isinstance(value, types.ModuleType):
                self.text(value.__name__)
                for inner in names:
                    if isinstance(vars(value).get(inner), FUNCTIONS):
                        self.text(inner)
                        self._global(vars(value)[inner], function)
            elif value is not self:
                self.text(name)
                self._global(value, function)

    def _global(self, value: Any, owner: Any) -> None:
        """A value of a module or a class: code and plain values are read, the user's also where they hold others.

        Loggers, registries and the like change without any change of what is computed: by their kind.
        """
        read: tuple[Any, ...] = (*FUNCTIONS, property, staticmethod, classmethod, *PLAIN, *OPAQUE_TORCH)
        if isinstance(value, type):
            self.text(_name(value))
            read = () if _is_installed(value) else (type,)
        elif not _is_installed(owner):
            read = (
                *read,
                tuple,
                list,
                dict,
                set,
                Tensor,
                np.ndarray,
                nn.Module,
                functools.partial,
                types.SimpleNamespace,
            )
        if isinstance(value, read) or (not isinstance(value, type) and not _is_installed(type(value))):
            self.value(value)
        else:
            self.text(_name(type(value)))

    def _code(self, code: types.CodeType) -> None:
        self.digest.update(code.co_code)
        self.text(code.co_names, code.co_varnames, code.co_freevars)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant)
            else:
                self.text(repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant))

    def _descriptor(self, value: Any) -> None:
        parts = (value.fget, value.fset) if isinstance(value, property) else (value.__func__,)
        self._items(value, parts)

    def _object(self, value: Any) -> None:
        """An object of a class of its own: its class, and what it holds."""
        self.text(_name(type(value)))
        self.value(type(value))
        held = _held(value)
        if held is None:
            self._unlike_any()
        else:
            self.value(held)

    def _unlike_any(self) -> None:
        self.text(uuid.uuid4())


def _held(value: Any) -> Any:
    """What an object holds, from its attributes and slots, else from how it would be pickled; ``None`` if unknown."""
    slots: list[str] = []
    for cls in type(value).__mro__:
        named = vars(cls).get("__slots__", ())
        slots += [named] if isinstance(named, str) else named
    held = {name: getattr(value, name) for name in slots if name not in IGNORED and hasattr(value, name)}
    if hasattr(value, "__dict__"):
        held |= vars(value)
    if held or hasattr(value, "__dict__"):
        return dict(sorted((k, v) for k, v in held.items() if k not in IGNORED))
    try:
        reduced = value.__reduce_ex__(2)
    except Exception:  # not to be pickled: a lock, a stream, a file
        return None
    return (
        reduced
        if isinstance(reduced, str)
        else [list(part) if isinstance(part, Iterator) else part for part in reduced]
    )


def _is_installed(value: Any) -> bool:
    """Whether a function or class comes with Python or with an installed package, which has a version."""
    module = getattr(value, "__module__", None) or ""
    if module in sys.builtin_module_names:
        return True
    path = getattr(sys.modules.get(module), "__file__", None)
    return path is not None and path.startswith(INSTALLED)


def _names(code: types.CodeType) -> set[str]:
    """The names that a function and the functions in it use."""
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"
