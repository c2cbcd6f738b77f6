"""What ``torch.save`` wrote before its archives, read as :mod:`anypatch.files.pickles` reads those."""

from __future__ import annotations

import pickle
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from anypatch.files.opening import identity, open_regular
from anypatch.files.pickles import MAX_LINE, unpickled

LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


class _Bounded:
    """A file that is never asked for more bytes than it has left, whatever a pickle says."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def read(self, count: int = -1) -> bytes:
        left = self._size - self._file.tell()
        return self._file.read(left if count < 0 else min(count, left))

    def readline(self) -> bytes:
        return self._file.readline(MAX_LINE)


def read_legacy(path: Path, lenient: bool = False) -> Any:
    """What is in a file that ``torch.save`` wrote before its archives (or writes still when asked to).

    Three small pickles, the objects, the keys of their storages, then each storage: its length, and its values.

    Args:
        path: the file.
        lenient: as for :func:`~anypatch.files.pickles.unpickled`; the values are then not read.

    Raises:
        CheckpointError: other objects than tensors are in it.
        UnpicklingError: it is damaged.
    """
    with open_regular(path) as file:
        which = identity(file)
        bounded = _Bounded(file, which[2])
        storages: dict[str, torch.UntypedStorage] = {}
        types: dict[str, torch.dtype] = {}
        claimed = 0

        def record(key: str, dtype: torch.dtype, count: int) -> Tensor:
            nonlocal claimed
            if key not in storages:
                claimed += count * dtype.itemsize
                if claimed > which[2]:
                    raise pickle.UnpicklingError(
                        f"its storages would take {claimed} bytes, and the file has {which[2]}"
                    )
                storages[key], types[key] = torch.UntypedStorage(count * dtype.itemsize, device="cpu"), dtype
            storage = storages[key]
            number = len(storage) // dtype.itemsize
            return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, (number,), (1,))

        def no_record(*_: Any) -> Tensor:
            raise pickle.UnpicklingError("a storage before the objects")

        for _ in range(3):
            unpickled(path, bounded, no_record, lenient)
        value = unpickled(path, bounded, record, lenient)
        if lenient:
            return value
        keys = unpickled(path, bounded, no_record)
        if not isinstance(keys, list) or not all(isinstance(k, (str, int)) for k in keys):
            raise pickle.UnpicklingError("its list of storages is none of names")
        if {str(k) for k in keys} != storages.keys():
            raise pickle.UnpicklingError("its list of storages is not of those it uses")
        for key in map(str, keys):
            _fill(file, storages[key], types[key])
        return value


def _fill(file: BufferedReader, storage: torch.UntypedStorage, dtype: torch.dtype) -> None:
    head = file.read(8)
    if int.from_bytes(head, "little") * dtype.itemsize != len(storage):
        raise pickle.UnpicklingError("a storage of another length than was said")
    if not len(storage):
        return
    view = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage, 0, (len(storage),), (1,))
    buffer = memoryview(view.numpy().data).cast("B")
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise pickle.UnpicklingError("a storage that is cut off")
        done += count
