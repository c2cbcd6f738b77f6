"""Modes of torch, which belong to the calling thread alone: what the process would decide is decided here.

Under them, random operations draw from generators of their own, and what names no dtype is computed in
:data:`DTYPE`, whatever the process's random state and default dtype are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What torch computes in where nobody names a dtype; said here, as the process's own default may be another.
DTYPE = torch.float32
# Initialisers of ``torch.nn.init`` and methods of tensors that draw at random: most of a constructor's time, and what
# they give a parameter says nothing about the geometry.
RANDOM_FILLS = frozenset(
    (
        *("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_"),
        *("xavier_normal_", "orthogonal_", "sparse_", "erfinv_"),
    )
)
# What initialisers do to a random draw afterwards.
SHIFTS = frozenset(("mul_", "add_", "sub_", "div_", "clamp_"))


@contextlib.contextmanager
def on_its_own() -> Iterator[None]:
    """Run a block with random numbers and a default dtype of its own: the same numbers in every such block."""
    with Plain(), Explicit():
        yield


@contextlib.contextmanager
def with_own_dtype() -> Iterator[None]:
    """Run a block as if the process's default dtype were :data:`DTYPE`, for the calling thread alone.

    What is switched to another one within the block, as transformers does while it builds, holds.
    """
    ambient = torch.get_default_dtype()
    if ambient == DTYPE:
        yield
        return
    with Typed(ambient), TypedNumbers(ambient):
        yield


class Plain(TorchDispatchMode):
    """Every operation on real tensors, with a generator and a dtype of its own where torch would take the global."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, a second, to keep it away from this mode

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            return self.run(*self.prepared(func, args, dict(kwargs or {})))

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return computed(func, args, kwargs)

    def prepared(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        known = about(func)
        if known.random and kwargs.get("generator") is None:
            func = _with_generator(func)
            known = about(func)
            if "generator" in known.names:
                self.draws += 1
                kwargs["generator"] = Draw(self.draws)
        return func, args, self.typed(func, args, kwargs)

    def typed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """With the dtype that torch would take if :data:`DTYPE` were its default."""
        known = about(func)
        if "dtype" in known.names and kwargs.get("dtype") is None and next(tensors_in((args, kwargs)), None) is None:
            dtype = _factory_dtype(func, args, kwargs)
            if dtype is not None:
                kwargs["dtype"] = dtype
        return kwargs


class Typed(Plain):
    """As :class:`Plain`, with the process's own random numbers, and only while the default dtype is the ambient one."""

    def __init__(self, ambient: torch.dtype) -> None:
        super().__init__()
        self.ambient = ambient

    def prepared(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        return func, args, self.typed(func, args, kwargs) if torch.get_default_dtype() == self.ambient else kwargs

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().run(func, args, kwargs) if torch.get_default_dtype() == self.ambient else func(*args, **kwargs)


class TypedNumbers(TorchFunctionMode):
    """The same for ``torch.tensor`` of plain numbers, which reach no dispatch before they are a tensor."""

    def __init__(self, ambient: torch.dtype) -> None:
        super().__init__()
        self.ambient = ambient

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return _numbers(func, args, kwargs, func(*args, **kwargs), torch.get_default_dtype() == self.ambient)


class Explicit(TorchFunctionMode):
    """``torch.tensor`` of plain numbers in :data:`DTYPE`; random fills of parameters skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in RANDOM_FILLS or name in SHIFTS:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, nn.Parameter):
                if name in RANDOM_FILLS:
                    self.drawn.add(id(target))
                if id(target) in self.drawn:
                    return target
        return _numbers(func, args, kwargs, func(*args, **kwargs))


def _numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, active: bool = True) -> Any:
    """A result, made again in :data:`DTYPE` where it is of plain numbers and nobody named a dtype."""
    if not active or func is not torch.tensor or kwargs.get("dtype") is not None:
        return result
    return func(*args, **{**kwargs, "dtype": DTYPE}) if _is_foreign(result) and not _has_dtype(args) else result


@dataclass
class Draw:
    """Stands for a fresh generator with a seed, so that computing something twice gives the same."""

    seed: int

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation; where whole numbers become fractions, in :data:`DTYPE`, whatever the process's default is."""
    if isinstance(kwargs.get("generator"), Draw):
        kwargs = {**kwargs, "generator": kwargs["generator"].generator()}
    result = func(*args, **kwargs)
    if not isinstance(result, Tensor) or not _is_foreign(result) or kwargs.get("dtype") is not None:
        return result
    inputs = list(tensors_in((args, kwargs)))
    if not inputs or any(tensor.is_floating_point() or tensor.is_complex() for tensor in inputs):
        return result
    if about(func).name in ("lift_fresh", "view", "_to_copy"):
        return result
    try:
        args, kwargs = mapped(lambda v: v.to(DTYPE) if isinstance(v, Tensor) else v, (args, kwargs))
        return func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):  # such as a condition, which has to stay one
        return result.to(DTYPE)


def _is_foreign(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != DTYPE


def _has_dtype(args: Any) -> bool:
    """Whether numbers bring a dtype along."""
    return any(hasattr(item, "dtype") for item in _leaves(args))


@dataclass(frozen=True)
class Operation:
    """What the schema of an operation tells.

    Attributes:
        name: without the overload.
        names: of the arguments that it takes.
        random: whether it draws.
        view: whether its result lies in an argument's memory.
        written: places and names of the arguments that it writes to.
    """

    name: str
    names: frozenset[str]
    random: bool
    view: bool
    written: tuple[tuple[int, str], ...]


@functools.cache
def about(func: Any) -> Operation:
    schema = func._schema
    written = tuple(
        (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    return Operation(
        func._overloadpacket.__name__,
        frozenset(argument.name for argument in schema.arguments),
        torch.Tag.nondeterministic_seeded in func.tags,
        torch.Tag.inplace_view in func.tags or any(r.alias_info and not r.alias_info.is_write for r in schema.returns),
        written,
    )


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _factory_dtype(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """What torch would take if its default dtype were :data:`DTYPE`; None where no fraction is asked for."""
    name = about(func).name
    if name in ("empty", "empty_strided", "zeros", "ones", "rand", "randn", "linspace", "logspace", "eye"):
        return DTYPE
    if name in ("full", "scalar_tensor"):
        return DTYPE if isinstance((*args, *kwargs.values())[-1 if name == "scalar_tensor" else 1], float) else None
    if name == "arange":
        return DTYPE if any(isinstance(item, float) for item in args) else None
    return DTYPE if name.endswith("_window") else None


def _with_generator(func: Any) -> Any:
    """The overload of a random operation that takes a generator, if there is one."""
    if "generator" in about(func).names:
        return func
    name = "generator" if func._overloadname == "default" else f"generator_{func._overloadname}"
    return getattr(func._overloadpacket, name, func)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in an operation's arguments or results, which hold them directly or in lists."""
    if isinstance(values, Tensor):
        yield values
        return
    for item in values.values() if isinstance(values, dict) else values if isinstance(values, (list, tuple)) else ():
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple, dict)):
            yield from tensors_in(item)


def mapped(change: Callable[[Any], Any], values: Any) -> Any:
    """``change`` applied to every value in an operation's arguments."""
    if isinstance(values, (list, tuple)) and type(values) in (list, tuple):
        return type(values)(mapped(change, item) for item in values)
    if isinstance(values, dict):
        return {name: mapped(change, item) for name, item in values.items()}
    return change(values)
