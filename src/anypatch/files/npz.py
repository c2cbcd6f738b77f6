"""NumPy's archives: every array's header is held against the bytes there are before it is read."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anypatch.errors import CheckpointError
from anypatch.files.opening import first_line, open_regular

MAX_INFLATION = 64  # a compressed archive may not unpack to more than this many times its size, and a little
# NumPy's own. Of others Python unpacks all that is there at once, whatever size the archive says it has.
PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
CHUNK = 1 << 20  # bytes: what is asked for without a number is unpacked to two gigabytes before its size is looked at
SMALL = 16 << 20  # bytes: so that an archive of zeros may be small


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an archive by name.

    Raises:
        CheckpointError: an array is damaged, holds Python objects, or would take more memory than the file can hold.
    """
    import numpy as np

    tensors = {}
    with open_regular(path) as opened, zipfile.ZipFile(opened) as archive:
        size = os.fstat(opened.fileno()).st_size
        total = sum(info.file_size for info in archive.infolist())
        if total > MAX_INFLATION * size + SMALL:
            raise CheckpointError(f"{path} would unpack to {total} bytes from {size}: it is damaged or malicious")
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if info.compress_type not in PACKED:
                raise CheckpointError(f"{path}: array {name[:200]!r} is not packed as NumPy packs arrays")
            with archive.open(info) as file:
                try:
                    array = _read_npy(file, info.file_size)
                except (ValueError, EOFError, zlib.error, zipfile.BadZipFile, KeyError, TypeError) as error:
                    raise CheckpointError(f"{path}: array {name[:200]!r} is damaged: {first_line(error)}") from error
            if array.dtype.kind == "V" and array.dtype.itemsize == 2:
                tensors[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            elif array.dtype.kind in "fiub":
                native = array.astype(array.dtype.newbyteorder("="), copy=False)
                tensors[name] = torch.from_numpy(native)
    return tensors


def _read_npy(file: Any, size: int) -> Any:
    """One array, after its header was held against the bytes there are."""
    import numpy as np

    formats = np.lib.format
    version = formats.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"unknown version {version}")
    reader = formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
    shape, fortran, dtype = reader(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, and loading them could run code")
    count = math.prod(shape)
    if not all(type(s) is int and s >= 0 for s in shape) or count * dtype.itemsize > size:
        raise ValueError(f"shape {shape} of {dtype} takes more than its {size} bytes")
    data = _bytes(file, count * dtype.itemsize + 1)
    if len(data) != count * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for shape {shape} of {dtype}")
    array = np.frombuffer(data, dtype=dtype)
    return array.reshape(shape[::-1]).transpose() if fortran else array.reshape(shape)


def _bytes(file: Any, most: int) -> bytearray:
    """What is left of a file in an archive, at most so much of it."""
    data = bytearray()
    while len(data) < most:
        more = file.read(min(CHUNK, most - len(data)))
        if not more:
            break
        data += more
    return data
