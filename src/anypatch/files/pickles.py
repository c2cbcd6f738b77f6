"""An unpickler that knows tensors and containers only, for what ``torch.save`` and ``torch.jit.save`` write.

torch's own reader is not used: its list of allowed classes is a global that threads would change under one another,
and it allocates storages on the file's word. Here every size is held against the bytes there are, and what a pickle
asks for again and again is counted.
"""

from __future__ import annotations

import math
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from anypatch.errors import CheckpointError
from anypatch.files.header import MAX_DIMENSIONS

# An expanded tensor repeats the same bytes. More than this many times the file is a request for memory, not a model.
MAX_EXPANSION = 64
SMALL = 16 << 20  # bytes that may be taken whatever the file's size: a scalar is expanded to a table now and then
MAX_LINE = 64_000  # bytes of one line of a pickle of the first protocol
# A pickle names once what it uses a thousand times, so what it asks for has to be counted, not measured.
MAX_CALLS = 1_000_000  # tensors, and pairs of ordered tables; the largest mixtures of experts have some 100,000 tensors
MAX_KEY = 1000  # parts of what a table is looked up by, those within it counted each time they are named

STORAGES = {
    "HalfStorage": torch.float16, "FloatStorage": torch.float32, "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip

# Packages whose objects training scripts keep beside the weights: settings, paths, numbers, times. They are replaced
# by stand-ins that run nothing, as any other could be; the list only decides which files are said to hold nothing else.
HARMLESS = (
    "argparse", "pathlib", "numpy", "datetime", "collections", "typing", "omegaconf", "yacs", "easydict", "addict",
    "ml_collections", "mmengine", "mmcv", "pytorch_lightning", "lightning", "lightning_fabric", "torch.torch_version",
    "_codecs",
)  # fmt: skip
# The last three by the names that pickles of the second protocol, torch's own, give to Python 3's.
PLAIN_BUILTINS = frozenset(("set", "frozenset", "complex", "bytearray", "slice", "range", "dict", "list", "tuple",
                            "int", "float", "str", "bytes", "bool", "object",
                            "xrange", "long", "unicode"))  # fmt: skip


class GreedyError(pickle.UnpicklingError):
    """A few bytes that ask for memory or time without end."""


class Inert(dict[Any, Any]):
    """Stands for any other object: keeps its attributes and items, runs nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.__dict__.update({k: v for k, v in state.items() if isinstance(k, str)})

    def append(self, value: Any) -> None:
        """A list's item, not kept."""

    def extend(self, values: Any) -> None:
        """A list's items, not kept."""

    def add(self, value: Any) -> None:
        """A set's item, not kept."""

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


class Odd(Inert):
    """Stands for a tensor that is not a plain one in memory: sparse, quantized, nested, on no device."""


class _Storage:
    """A named type of storage; only its element type matters."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


Record = Callable[[str, torch.dtype, int], Tensor]  # key, type and claimed count to the values


def rebuild(record: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    """A tensor over a record, with every bound verified; ``rest`` is what torch keeps for autograd.

    Raises:
        UnpicklingError: it would reach beyond its record, or take far more memory than the record.
    """
    if not isinstance(record, Tensor):
        raise pickle.UnpicklingError("a tensor without storage")
    if not all(isinstance(sides, (tuple, list)) and len(sides) <= MAX_DIMENSIONS for sides in (size, stride)):
        raise GreedyError("a tensor whose shape is no short list of numbers")
    numbers = (offset, *size, *stride)
    if not all(type(n) is int and n >= 0 for n in numbers) or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor of impossible shape")
    if len(rest) > 2 and rest[2]:
        return Odd()  # values that are still to be conjugated or negated
    count = math.prod(size)
    last = offset + sum((s - 1) * step for s, step in zip(size, stride, strict=True))
    if count and last >= record.numel():
        raise pickle.UnpicklingError("a tensor that reaches beyond its storage")
    if count * record.itemsize > MAX_EXPANSION * record.numel() * record.itemsize + SMALL:
        raise pickle.UnpicklingError(
            f"a tensor of shape {tuple(size)} would take {count * record.itemsize} bytes from "
            f"{record.numel() * record.itemsize}"
        )
    return record.as_strided(size, stride, offset) if count else record.new_empty(size)


def _rebuild_typed(
    record: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    """As torch rebuilds types that have no named storage: float8 and the like."""
    if not isinstance(record, Tensor) or not isinstance(dtype, torch.dtype) or record.numel() % dtype.itemsize:
        raise pickle.UnpicklingError("a tensor of impossible type")
    return rebuild(record.view(dtype), offset, size, stride, grad, hooks, *rest)


def _first(value: Any, *_: Any) -> Any:
    return value


def _from_type(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """A tensor with attributes of its own, which are left; a subclass is no plain tensor."""
    plain = kind in (_parameter, _tensor) and function in ALLOWED.values() and isinstance(arguments, tuple)
    return function(*arguments) if plain else Odd()


def _parameter(value: Any, *_: Any) -> Any:
    """``torch.nn.Parameter``, as the tensor that it is."""
    return value


def _tensor(*_: Any) -> Any:
    """``torch.Tensor`` as a class, of which nothing is made."""
    return Odd()


def _size(values: Any = ()) -> tuple[Any, ...]:
    """``torch.Size``, of numbers that are written out."""
    if not isinstance(values, (tuple, list)) or len(values) > MAX_DIMENSIONS:
        raise GreedyError("a shape that is no short list of numbers")
    return tuple(values)


def _ordered(pairs: Any = ()) -> OrderedDict[Any, Any]:
    """``OrderedDict``, empty as Python 3 writes it, or of pairs as Python 2 did."""
    if not isinstance(pairs, (tuple, list)) or not all(isinstance(p, (tuple, list)) and len(p) == 2 for p in pairs):
        raise GreedyError("an ordered table of what are no pairs")
    return OrderedDict((_key(key), value) for key, value in pairs)


def _key(key: Any) -> Any:
    """What a table is looked up by: text, or a number of an optimizer's. What else it may be nobody asks for, and a
    hundred bytes can make a tuple of tuples whose hash takes years: a stand-in is as good.

    Raises:
        GreedyError: it is such a tuple.
    """
    if type(key) is str or (type(key) is int and abs(key) < sys.maxsize):
        return key
    inside, parts = [key], 0
    while inside:
        part = inside.pop()
        parts += 1
        if isinstance(part, tuple):
            if parts + len(inside) + len(part) > MAX_KEY:
                raise GreedyError(f"a key of more than {MAX_KEY} parts")
            inside += part
    return Inert()


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered,
    ("torch", "Size"): _size,
    ("torch", "Tensor"): _tensor,
    ("torch.nn.parameter", "Parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor"): rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch.jit._pickle", "build_intlist"): _first,
    ("torch.jit._pickle", "build_doublelist"): _first,
    ("torch.jit._pickle", "build_boollist"): _first,
    ("torch.jit._pickle", "build_tensorlist"): _first,
    ("torch.jit._pickle", "restore_type_tag"): _first,
}


class Unpickler(pickle._Unpickler):
    """Unpickles tensors, containers and inert stand-ins, nothing else.

    Args:
        data: the pickle, in memory or bounded by the file it is in.
        record: gives a storage's values.
        refused: where the names of what is not allowed are added; the first of them stops reading. Without it, all
            else is a stand-in.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]  # these four are pickle's own, which its type stubs leave out
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def __init__(self, data: Any, record: Record, refused: list[str] | None) -> None:
        super().__init__(data, encoding="utf-8")
        self._record, self._refused, self._calls = record, refused, 0

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module.startswith("__torch__"):
            return Inert
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _Storage(STORAGES[name])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == "torch._utils" and name.startswith("_rebuild"):
            return Odd
        top = module.split(".")[0]
        if top in HARMLESS or module in HARMLESS or (module, name) in {("torch", "device"), ("torch", "Generator")}:
            return Inert
        if module == "torch.serialization" and name == "_get_layout":
            return Inert
        if module in ("builtins", "__builtin__") and name in PLAIN_BUILTINS:
            return Inert
        if self._refused is None:
            return Inert
        self._refused.append(f"{module}.{name}"[:200])
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 3 or pid[0] != "storage" or not isinstance(pid[1], _Storage):
            raise pickle.UnpicklingError("an unknown reference")
        if not isinstance(pid[2], (str, int)):  # text of what is nested would have no end
            raise GreedyError("a storage without a name")
        count = pid[4] if len(pid) > 4 else 0
        if type(count) is not int or not 0 <= count < 1 << 48:
            raise pickle.UnpicklingError("a storage of impossible size")
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("a view of a storage, as torch wrote before 0.4")
        return self._record(str(pid[2]), pid[1].dtype, count)

    def load_build(self) -> None:
        """Attributes are kept for stand-ins and left for containers; nothing else takes any."""
        state = self.stack.pop()
        instance = self.stack[-1]
        if isinstance(instance, Inert):
            instance.__setstate__(state)
        elif not isinstance(instance, (OrderedDict, Tensor)):
            raise pickle.UnpicklingError(f"a state for a {type(instance).__name__}")

    def _call(self, function: Any, arguments: Any) -> Any:
        """As a pickle calls what it has named: with a tuple that is written out, and not without end."""
        if not isinstance(arguments, tuple):
            raise GreedyError("a call whose arguments are no tuple")
        if isinstance(function, type):  # a stand-in, which takes no more than the call does: a number of a history
            return function(*arguments)
        pairs = arguments[0] if function is _ordered and arguments else ()
        self._calls += 1 + (len(pairs) if isinstance(pairs, (tuple, list)) else 0)
        if self._calls > MAX_CALLS:
            raise GreedyError(f"more than {MAX_CALLS} tensors")
        return function(*arguments)

    def _instantiate(self, kind: Any, arguments: list[Any]) -> None:
        self.append(self._call(kind, tuple(arguments)))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        self.append(self._call(kind, arguments))

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # arguments by name: none of what is called takes any
        self.load_newobj()

    def _put(self, items: list[Any]) -> None:
        table = self.stack[-1]
        if not isinstance(table, dict):
            raise pickle.UnpicklingError(f"items for a {type(table).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            table[_key(key)] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key, value])

    def load_setitems(self) -> None:
        self._put(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._put(items)

    def load_additems(self) -> None:
        """Sets are not kept."""
        for item in self.pop_mark():
            _key(item)

    def load_frozenset(self) -> None:
        self.load_additems()
        self.append(Inert())

    def load_bytearray8(self) -> None:
        """Python's own allocates as many bytes as the file says before it looks whether they are there."""
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(min(size, sys.maxsize))))

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def unpickled(path: Path, data: Any, record: Record, lenient: bool = False) -> Any:
    """What a pickle holds.

    Args:
        path: of the file, for messages.
        data: the pickle.
        record: gives a storage's values.
        lenient: whether a stand-in will do for objects of any class.

    Raises:
        CheckpointError: other objects than tensors are in it.
        UnpicklingError: it is damaged.
    """
    refused: list[str] = []
    try:
        return Unpickler(data, record, None if lenient else refused).load()
    except pickle.UnpicklingError as error:
        if not refused:
            raise
        raise CheckpointError(
            f"{path} holds Python objects besides tensors ({', '.join(refused)}); loading them could run code, "
            f"so it is refused: save the model's state_dict alone, best as .safetensors"
        ) from error
