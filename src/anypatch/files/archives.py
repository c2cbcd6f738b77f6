"""The zip archives of ``torch.save`` and ``torch.jit.save``: their records are mapped, not read."""

from __future__ import annotations

import pickle
import struct
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from anypatch.errors import CheckpointError
from anypatch.files.header import flat_view, map_file
from anypatch.files.opening import identity, open_regular
from anypatch.files.pickles import unpickled

MAX_PICKLE = 1 << 30  # bytes of the description of a model's tensors; those of the largest models take a few megabytes


def read_archive(path: Path, lenient: bool = False) -> Any:
    """What is in a zip archive of ``torch.save`` or ``torch.jit.save``: tensors mapped, all else inert.

    Args:
        path: the file.
        lenient: as for :func:`~anypatch.files.pickles.unpickled`.

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

        return unpickled(path, BytesIO(data), record, lenient)


def _typed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """One record may be named as of several types."""
    return values if values.dtype == dtype else values.view(dtype)


def _swapped(values: Tensor) -> Tensor:
    """Values written on a machine of the other byte order."""
    width = values.dtype.itemsize // (2 if values.is_complex() else 1)
    return values.view(torch.uint8).reshape(-1, width).flip(1).reshape(-1).view(values.dtype)


def require_stored(path: Path, archive: zipfile.ZipFile, size: int) -> None:
    """torch stores its records as they are, one after another; a compressed one, or the same bytes under a thousand
    names, would be a way to fill the memory.

    A script's code may be compressed, and is not read.

    Raises:
        CheckpointError: one is compressed, or they are larger than the file.
    """
    total = 0
    for info in archive.infolist():
        if "/code/" in info.filename:
            continue
        total += info.file_size
        if total > size:
            raise CheckpointError(f"{path}: its records would take {total} bytes or more, and the file has {size}")
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
