"""How much memory may be allocated on the word of sizes and configurations, before anything is allocated."""

from __future__ import annotations

import contextlib
import contextvars
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from anypatch.errors import GeometryError

# Bytes of the buffers of one model. BEiT-large at 1024 pixels, the most that any known model takes at a size that
# people use, has 3 GB of indices of relative positions; four times its area takes 16 times as much.
DEFAULT = 4 << 30
STEP = 64 << 20  # bytes between two looks at a sum that grows by small parts: one in 64 of the bound
COUNTED = 1 << 20  # bytes of a tensor that is counted by itself: 4,096 of them stay below the bound
# Tensors of one model. The largest mixtures of experts have 70,000, one for each matrix of each expert; every one of
# them costs memory and time even where it is empty.
MAX_TENSORS = 500_000
VARIABLE = "ANYPATCH_MEMORY_LIMIT"  # bytes, for the command line
# Calls that make a tensor of nothing but sizes, and those that make a large one of a small one.
FACTORIES = frozenset(("empty", "zeros", "ones", "full", "arange", "linspace", "rand", "randn", "eye", "tril_indices",
                       "triu_indices", "empty_strided", "logspace", "randint", "randperm"))  # fmt: skip
# Made without memory as long as nobody needs their values, as those of parameters: counted where they get some.
DEFERRED = frozenset(("empty", "zeros", "ones", "full", "rand", "randn"))
GROWING = frozenset(("repeat", "tile", "repeat_interleave", "contiguous", "clone", "one_hot", "outer", "kron", "stack",
                     "cat", "meshgrid", "new_zeros", "new_ones", "new_empty", "new_full", "reshape"))  # fmt: skip

# Attributes of tensors, which are views; the other operations without a result of their own end with an underscore.
IN_PLACE = frozenset(("__get__", "__set__"))

_limit: contextvars.ContextVar[int | None] = contextvars.ContextVar("anypatch_memory_limit", default=None)


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Allow more (or less) memory for what depends on an image size or stands in a file, within the block.

    A model's buffers may grow with the fourth power of the image size: the indices of BEiT's relative positions at 2048
    pixels take 26 GB. Beyond 4 GB it is an error, before anything is allocated. The environment variable
    ``ANYPATCH_MEMORY_LIMIT`` says the same for a process.

    >>> with memory_limit(64 << 30):
    ...     pass  # anypatch.adapt(beit, image_size=2048)

    Args:
        size: bytes.
    """
    if type(size) is not int or size < 0:
        raise GeometryError(f"memory_limit takes a number of bytes, got {size!r}")
    token = _limit.set(size)
    try:
        yield
    finally:
        _limit.reset(token)


def limit() -> int:
    """The bound that holds here, in bytes.

    Raises:
        GeometryError: the environment variable says no number of bytes: a bound that is misspelt is none.
    """
    given = _limit.get()
    if given is not None:
        return given
    text = os.environ.get(VARIABLE, "").strip()
    if text and not text.isdecimal():
        raise GeometryError(f"{VARIABLE} takes a number of bytes, got {text[:100]!r}")
    return int(text) if text else DEFAULT


def gigabytes(size: int) -> str:
    """Bytes as people read them; never nothing where there is something.

    >>> gigabytes(4 << 30), gigabytes(1 << 20)
    ('4.3', '0.001')
    """
    return f"{size / 1e9:.1f}" if size >= 10**9 else f"{size / 1e9:.1g}"


class LimitError(GeometryError):
    """More memory than is allowed would be taken."""


def require_room(size: int, what: str) -> None:
    """Refuse what would take more than is allowed, before it is allocated.

    Args:
        size: bytes beyond what is there.
        what: what they are for.

    Raises:
        LimitError: they are too many.
    """
    if size >= limit():
        raise LimitError(
            f"{what} would take {gigabytes(size)} GB more, and {gigabytes(limit())} GB are allowed: choose a smaller "
            f"patch or image, or allow more with anypatch.memory_limit(BYTES) or {VARIABLE}"
        )


class Bounded(TorchFunctionMode):
    """Adds up what is allocated within the block, and stops before the bound is reached.

    What a call would make is found out on no device first, wherever its inputs are large enough, taken together, for
    the result to matter. Only tensors above a megabyte are counted, and only as long as they live.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bound, self.tensors = limit(), 0
        self._live: list[tuple[StorageWeakRef, int]] = []
        self._small = 0

    def __enter__(self) -> Any:
        self._token = _active.set(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _active.reset(self._token)
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in IN_PLACE or (name.endswith("_") and not name.endswith("__") and name != "resize_"):
            return func(*args, **kwargs)  # most calls of a constructor: they fill what is there
        made = name in FACTORIES
        if made:
            self.tensors += 1
            if self.tensors > MAX_TENSORS:
                raise LimitError(f"the model would have more than {MAX_TENSORS} tensors, which no model has")
        if self._matters(name, made, args, kwargs):
            self._require(_bytes(func, args, kwargs, made))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and not result.is_meta:
            if result.numel() * result.itemsize > COUNTED:
                self._live.append((StorageWeakRef(result.untyped_storage()), result.untyped_storage().nbytes()))
            elif made:
                self._add_small(result.numel() * result.itemsize)
        return result

    def _matters(self, name: str, made: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call could take memory that counts."""
        grows = (made and name not in DEFERRED) or name in GROWING or self._multiplies(args, kwargs)
        return grows and not _on_meta(args, kwargs)

    def _add_small(self, size: int) -> None:
        """Of a tensor too small to be looked at by itself."""

    def _multiplies(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether inputs could broadcast, or be copied, to what matters."""
        sizes = [value.numel() for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        # 16 bytes, of a complex number: the most that an element takes
        return 16 * math.prod(max(size, 1) for size in sizes) > min(self.bound, STEP)

    def _require(self, size: int) -> None:
        """That the bound is kept with ``size`` bytes more, if they are many enough to count."""
        if size > COUNTED:
            self._require_all(size)

    def _require_all(self, size: int) -> None:
        living: dict[int, int] = {}
        self._live = [(ref, count) for ref, count in self._live if not ref.expired()]
        for ref, count in self._live:
            living[ref.cdata] = count
        total = size + sum(living.values()) + self._small
        if total >= self.bound:
            raise LimitError(f"{self._says(total)}, or allow more with anypatch.memory_limit(BYTES) or {VARIABLE}")

    def _says(self, total: int) -> str:
        return (
            f"the model's buffers would take {gigabytes(total)} GB or more at this size, and "
            f"{gigabytes(self.bound)} GB are allowed: choose a smaller image or a larger patch"
        )


class Loading(Bounded):
    """As :class:`Bounded`, for a model that a library builds in memory on the word of a configuration.

    Parameters count here, too, and small tensors by their sum: a model may have very many.

    Args:
        held: bytes of the weights that the configuration comes with.
    """

    # Bytes in memory for one of a file: 32 bits for each of 4, which is how a quantised layer may be unpacked, twice
    # over, as while a library copies from one model to another.
    UNPACKED = 16

    def __init__(self, held: int) -> None:
        super().__init__()
        self.held = held
        self.bound += self.UNPACKED * held
        self._looked = 0

    def _matters(self, name: str, made: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if kwargs.get("device") is not None:  # also of what is like a tensor that has no memory
            return str(kwargs["device"]) != "meta"
        return made or super()._matters(name, made, args, kwargs)

    def _add_small(self, size: int) -> None:
        self._small += size
        if self._small > self._looked:
            self._looked = self._small + STEP
            self._require_all(0)

    def _says(self, total: int) -> str:
        return (
            f"its configuration describes a model that takes {gigabytes(total)} GB or more, and the files that it "
            f"comes with have {self.held} bytes: take the configuration that belongs to the weights"
        )


_active: contextvars.ContextVar[Bounded | None] = contextvars.ContextVar("anypatch_bounded", default=None)


def claim(tensor: Tensor) -> None:
    """Say that memory for a tensor, described on no device, is about to be taken.

    Raises:
        LimitError: it would pass the bound of the block that this is in.
    """
    bounded = _active.get()
    if bounded is not None:
        bounded._require(tensor.untyped_storage().nbytes())


def _on_meta(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(v, Tensor) and v.is_meta for v in (*args, *kwargs.values())) or (
        str(kwargs.get("device", "")) == "meta"
    )


def _bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: bool) -> int:
    """What a call would allocate; nothing where it gives a view, or cannot be asked."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        moved = {key: _as_meta(value) for key, value in kwargs.items()}
        if made or "device" in moved:
            moved["device"] = "meta"
        inputs = [_as_meta(value) for value in args]
        try:
            result = func(*inputs, **moved)
        except Exception:
            return 0  # the call itself will say what is wrong
    if not isinstance(result, Tensor):
        return 0
    if any(isinstance(v, Tensor) and v.untyped_storage()._cdata == result.untyped_storage()._cdata for v in inputs):
        return 0
    return result.untyped_storage().nbytes()


def _as_meta(value: Any) -> Any:
    """A tensor's shape and strides without its values; lists of tensors likewise."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        return [_as_meta(item) for item in value]
    return value
