"""The safetensors format: the header is verified whole before a tensor is looked at; tensors are mapped, not read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from anypatch.errors import CheckpointError
from anypatch.files.opening import Identity, first_line, identity, open_regular, require_unchanged

MAX_HEADER = 100 << 20  # bytes of a safetensors header; the format's own limit
MAX_DIMENSIONS = 64  # torch's own limit
MAX_NAME = 1000  # characters of a tensor's name; a real one has some hundred

# Bits per element of every type that safetensors names, and torch's type where torch has one.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16", "U32": "uint32", "I32": "int32",
    "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, ours) for name, ours in _TORCH_NAMES.items() if hasattr(torch, ours)
}
TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: where its bytes are, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The verified header of a safetensors file; ``entries`` are in the order of their bytes."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int
    file_size: int
    identity: Identity


def read_header(path: Path) -> Header:
    """Read and verify the header of a safetensors file.

    Every tensor's bytes must be as many as its shape and type say, lie inside the file, and follow one another
    without a gap or an overlap.

    Raises:
        CheckpointError: anything else, naming the tensor.
    """
    try:
        with open_regular(path) as file:
            which = identity(file)
            size = which[2]
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path} is cut off: {size} bytes hold no header")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER or length > size - 8:
                raise CheckpointError(f"{path} claims a header of {length} bytes in a file of {size}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} has a damaged header: it is no table of tensors")
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path} has a damaged header: __metadata__ must map names to text")
    entries = {name: _entry(path, name, value) for name, value in content.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    _require_seamless(path, ordered, size - 8 - length)
    return Header(path, ordered, metadata, 8 + length, size, which)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def require_names(path: Path, names: Iterable[str]) -> None:
    """Names stand in messages and on terminals, and a file may hold any.

    Raises:
        CheckpointError: one is longer than a name of a tensor is, or is no text.
    """
    for name in names:
        if len(name) > MAX_NAME:
            raise CheckpointError(f"{path}: the name {name[:100]!r}… of a tensor has {len(name)} characters")
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # halves of a letter, which no terminal takes
            raise CheckpointError(f"{path}: the name {name[:100]!a} of a tensor is no text")


def _entry(path: Path, name: str, value: Any) -> Entry:
    def bad(why: str) -> NoReturn:
        raise CheckpointError(f"{path}: tensor {name[:200]!r} {why}")

    require_names(path, (name,))
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        bad("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        bad(f"has an unknown type {str(dtype)[:50]!r}")
    if not isinstance(shape, list) or not all(type(s) is int and 0 <= s < 1 << 48 for s in shape):
        bad(f"has an impossible shape {str(shape)[:100]}")
    if len(shape) > MAX_DIMENSIONS:
        bad(f"has {len(shape)} dimensions")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int and o >= 0 for o in offsets):
        bad("has impossible offsets")
    start, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or end - start != bits // 8:
        bad(f"has {end - start} bytes, but {dtype} of shape {tuple(shape)} takes {bits / 8:g}")
    return Entry(dtype, tuple(shape), start, end)


def _require_seamless(path: Path, entries: Mapping[str, Entry], available: int) -> None:
    position = 0
    for name, entry in entries.items():
        if entry.end > available:
            raise CheckpointError(f"{path} is cut off: tensor {name[:200]!r} ends at byte {entry.end} of {available}")
        if entry.start != position:
            what = "overlaps the one before it" if entry.start < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {name[:200]!r} {what}")
        position = entry.end
    if position != available:
        raise CheckpointError(f"{path} has {available - position} bytes that belong to no tensor")


def map_tensors(header: Header, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory: bytes are read when they are first used.

    Writing to a tensor never changes the file.

    Args:
        header: of the file.
        names: those wanted; all without it.

    Raises:
        CheckpointError: the file is another than when its header was read, or a type is one torch does not have.
    """
    wanted = header.entries if names is None else {name: header.entries[name] for name in names}
    empty = header.file_size == header.data_start
    whole = torch.UntypedStorage(0) if empty else map_file(header.path, header.identity)
    return {name: _view(header.path, name, entry, whole, header.data_start) for name, entry in wanted.items()}


def map_file(path: Path, which: Identity) -> torch.UntypedStorage:
    """A whole file as a private mapping.

    Raises:
        CheckpointError: it is no longer the file that ``which`` identifies.
    """
    with open_regular(path) as file:
        require_unchanged(path, which, file)
        whole: Any = torch.UntypedStorage.from_file(str(path), False, which[2])
    with open_regular(path) as file:  # it was mapped by its name
        require_unchanged(path, which, file)
    return whole


def _view(path: Path, name: str, entry: Entry, whole: torch.UntypedStorage, base: int) -> Tensor:
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name!r} is of type {entry.dtype}, which this torch does not have")
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    flat = flat_view(whole, base + entry.start, base + entry.end, dtype)
    return flat.as_strided(entry.shape, _strides(entry.shape))


def flat_view(whole: torch.UntypedStorage, start: int, end: int, dtype: torch.dtype) -> Tensor:
    """The values between two bytes of a mapping, copied only where they lie crooked; a storage of its own."""
    part = whole[start:end]
    if start % dtype.itemsize:
        part = part.clone()
    count = (end - start) // dtype.itemsize
    return torch.empty(0, dtype=dtype, device="cpu").set_(part, 0, (count,), (1,))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for side in reversed(shape):
        strides.append(step)
        step *= max(side, 1)
    return tuple(reversed(strides))
