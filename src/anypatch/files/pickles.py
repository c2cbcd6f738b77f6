"""What ``torch.save`` and ``torch.jit.save`` write, read with an unpickler that knows tensors and containers only.

torch's own reader is not used: its list of allowed classes is a global that threads would change under one another, and
it allocates storages on the file's word. Here every size is held against the bytes there are, and the records of an
archive are mapped, not read.
"""

from __future__ import annotations

import math
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from anypatch.errors import CheckpointError
from anypatch.files.header import flat_view, map_file
from anypatch.files.opening import identity, open_regular

MAX_PICKLE = 1 << 30  # bytes of the description of a model's tensors; those of the largest models take a few megabytes
# An expanded tensor repeats the same bytes. More than this many times the file is a request for memory, not a model.
MAX_EXPANSION = 64
SMALL = 16 << 20  # bytes that may be taken whatever the file's size: a scalar is expanded to a table now and then
MAX_LINE = 64_000  # bytes of one line of a pickle of the first protocol

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
PLAIN_BUILTINS = frozenset(("set", "frozenset", "complex", "bytearray", "slice", "range", "dict", "list", "tuple",
                            "int", "float", "str", "bytes", "bool", "object"))  # fmt: skip


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


def _tuple(*values: Any) -> tuple[Any, ...]:
    return tuple(*values)


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): _tuple,
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
        refused: where the names of what is not allowed are added; the first of them stops reading.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, data: Any, record: Record, refused: list[str]) -> None:
        super().__init__(data, encoding="utf-8")
        self._record, self._refused = record, refused

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
        self._refused.append(f"{module}.{name}"[:200])
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 3 or pid[0] != "storage" or not isinstance(pid[1], _Storage):
            raise pickle.UnpicklingError("an unknown reference")
        count = pid[4] if len(pid) > 4 else 0
        if type(count) is not int or not 0 <= count < 1 << 48:
            raise pickle.UnpicklingError("a storage of impossible size")
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("a view of a storage, as torch wrote before 0.4")
        return self._record(str(pid[2]), pid[1].dtype, count)

    def load_build(self) -> None:
        """Attributes are kept for stand-ins and left for containers; nothing else takes any."""
        state = self.stack.pop()  # type: ignore[attr-defined]
        instance = self.stack[-1]  # type: ignore[attr-defined]
        if isinstance(instance, Inert):
            instance.__setstate__(state)
        elif not isinstance(instance, (OrderedDict, Tensor)):
            raise pickle.UnpicklingError(f"a state for a {type(instance).__name__}")

    def load_bytearray8(self) -> None:
        """Python's own allocates as many bytes as the file says before it looks whether they are there."""
        (size,) = struct.unpack("<Q", self.read(8))  # type: ignore[attr-defined]
        self.append(bytearray(self.read(min(size, sys.maxsize))))  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def read_archive(path: Path) -> Any:
    """What is in a zip archive of ``torch.save`` or ``torch.jit.save``: tensors mapped, all else inert.

    Raises:
        CheckpointError: a record is not stored as torch stores it, or other objects than tensors are in it.
        UnpicklingError: it is damaged.
    """
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        which = identity(file)
        require_stored(path, archive, which[2])
        name = next(n for n in archive.namelist() if n == "data.pkl" or n.endswith("/data.pkl"))
        root = name[: -len("data.pkl")]
        data = archive.read(name)
        order = archive.read(root + "byteorder") if root + "byteorder" in archive.namelist() else b"little"
        records: dict[str, Tensor] = {}
        whole = map_file(path, which)

        def record(key: str, dtype: torch.dtype, count: int) -> Tensor:
            if key not in records:
                info = archive.getinfo(f"{root}data/{key}")
                start = _start(path, file, info)
                if info.file_size % dtype.itemsize:
                    raise pickle.UnpicklingError(f"record {key[:50]} is cut off")
                if info.file_size:
                    values = flat_view(whole, start, start + info.file_size, dtype)
                else:
                    values = torch.empty(0, dtype=dtype, device="cpu")
                records[key] = _swapped(values) if order.decode("ascii", "replace") != sys.byteorder else values
            return _typed(records[key], dtype)

        return unpickled(path, BytesIO(data), record)


def unpickled(path: Path, data: Any, record: Record) -> Any:
    refused: list[str] = []
    try:
        return Unpickler(data, record, refused).load()
    except pickle.UnpicklingError as error:
        if not refused:
            raise
        raise CheckpointError(
            f"{path} holds Python objects besides tensors ({', '.join(refused)}); loading them could run code, "
            f"so it is refused: save the model's state_dict alone, best as .safetensors"
        ) from error


def _typed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """One record may be named as of several types."""
    return values if values.dtype == dtype else values.view(dtype)


def _swapped(values: Tensor) -> Tensor:
    """Values written on a machine of the other byte order."""
    width = values.dtype.itemsize // (2 if values.is_complex() else 1)
    return values.view(torch.uint8).reshape(-1, width).flip(1).reshape(-1).view(values.dtype)


def require_stored(path: Path, archive: zipfile.ZipFile, size: int) -> None:
    """torch stores its records as they are; a compressed one would be a way to fill the memory.

    A script's code may be compressed, and is not read.

    Raises:
        CheckpointError: one is compressed, or larger than the file.
    """
    for info in archive.infolist():
        if "/code/" in info.filename:
            continue
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > size or info.header_offset > size:
            raise CheckpointError(f"{path}: record {info.filename[:200]!r} is not stored as torch stores records")
        if info.filename.endswith(".pkl") and info.file_size > MAX_PICKLE:
            raise CheckpointError(f"{path}: {info.filename[:200]!r} has {info.file_size} bytes, which no model takes")


def _start(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where a stored record's bytes begin, by its own header."""
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise pickle.UnpicklingError(f"record {info.filename[:200]!r} has no header")
    name, extra = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name + extra
    file.seek(0, 2)
    if start + info.file_size > file.tell():
        raise pickle.UnpicklingError(f"record {info.filename[:200]!r} is cut off")
    return int(start)
