"""Copy bytes within the operating system, write ``.safetensors`` files from others; models in several of them."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from anypatch.errors import CheckpointError
from anypatch.files.configs import read_json, require_file_name
from anypatch.files.flushing import Flusher
from anypatch.files.header import BITS, Entry, Header, map_tensors, read_header
from anypatch.files.opening import open_regular, require_unchanged
from anypatch.files.tensors import require_finite, tensor_bytes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHUNK = 8 << 20  # bytes read at once where the system cannot copy by itself: few calls, and little memory
STEP = 256 << 20  # bytes copied between two signs of progress
NO_RANGES = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.EIO}

Progress = Callable[[int], None]


def _silent(count: int) -> None:
    """No progress bar."""


# -- copying -----------------------------------------------------------------------------------------------


def copy_range(source: BinaryIO, start: int, target: BinaryIO, count: int, progress: Progress = _silent) -> None:
    """Append ``count`` bytes of ``source`` to ``target``, within the operating system where it can.

    Raises:
        CheckpointError: the source ended.
    """
    target.flush()
    position, end = start, start + count
    ranges = hasattr(os, "copy_file_range")
    while position < end:
        done = 0
        if ranges:
            try:
                done = os.copy_file_range(
                    source.fileno(), target.fileno(), min(end - position, STEP), offset_src=position
                )
            except OSError as error:
                if error.errno not in NO_RANGES:
                    raise
            if not done:
                ranges = False
                continue
        else:
            data = os.pread(source.fileno(), min(CHUNK, end - position), position)
            if not data:
                raise CheckpointError(f"{source.name} ends at byte {position}: it was cut off while being read")
            _write_all(target.fileno(), data)
            done = len(data)
        position += done
        progress(done)
    target.seek(0, os.SEEK_END)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def copy_file(source: Path, target: Path, flusher: Flusher, link: bool = False, progress: Progress = _silent) -> None:
    """Copy a whole file (or give it a second name).

    Raises:
        CheckpointError: it cannot be read.
    """
    size = source.stat().st_size
    if link:
        try:
            os.link(source.resolve(), target)
            progress(size)
            return
        except OSError:
            pass  # another file system, or one without links
    with source.open("rb") as reader, target.open("xb") as writer:
        copy_range(reader, 0, writer, size, progress)
        flusher.add(writer)
    target.chmod(stat.S_IMODE(source.stat().st_mode) | 0o600)


# -- safetensors -------------------------------------------------------------------------------------------


def write_safetensors(
    file: BinaryIO,
    header: Header,
    changed: Mapping[str, Tensor],
    progress: Progress = _silent,
) -> None:
    """Write ``header``'s file again with some tensors changed; the bytes of the others are copied as they are.

    Args:
        file: where to.
        header: of the file to copy from.
        changed: the tensors that change; the bytes of one at a time are taken.
        progress: told how many bytes were written.

    Raises:
        CheckpointError: the source ended.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in changed.items()}
    sizes = {
        name: entry.end - entry.start if name not in shapes else _size(entry.dtype, shapes[name])
        for name, entry in header.entries.items()
    }
    described = {
        name: (entry.dtype, shapes.get(name, entry.shape), sizes[name]) for name, entry in header.entries.items()
    }
    file.write(header_bytes(described, header.metadata))
    with open_regular(header.path) as source:
        require_unchanged(header.path, header.identity, source)
        run: tuple[int, int] | None = None
        for name, entry in header.entries.items():
            if name not in shapes:
                run = (entry.start if run is None else run[0], entry.end)
                continue
            _copy_run(source, header, run, file, progress)
            run = None
            data = tensor_bytes(changed[name])
            if len(data) != sizes[name]:
                raise CheckpointError(f"{header.path}: tensor {name!r} came out with {len(data)} bytes")
            file.write(data)
            progress(len(data))
        _copy_run(source, header, run, file, progress)
        require_unchanged(header.path, header.identity, source)
    file.flush()


def _copy_run(
    source: BinaryIO, header: Header, run: tuple[int, int] | None, file: BinaryIO, progress: Progress
) -> None:
    if run is not None:
        copy_range(source, header.data_start + run[0], file, run[1] - run[0], progress)


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * BITS[dtype] // 8


def header_bytes(described: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """The header of a file that holds tensors of (type, shape, bytes), in this order."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape, size) in described.items():
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write_text(path: Path, text: str, flusher: Flusher) -> None:
    """Write a small new file."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        flusher.add(file)


# -- models in parts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    """The ``.safetensors`` files that hold one model.

    Attributes:
        headers: of each, by file name.
        index: which file each tensor is in, as it was written, where there is more than one.
        index_name: the file that says it.
    """

    headers: dict[str, Header]
    index: dict[str, Any] | None = None
    index_name: str = INDEX

    @property
    def entries(self) -> dict[str, Entry]:
        """Every tensor's place."""
        return {name: entry for header in self.headers.values() for name, entry in header.entries.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file, after it was seen to be finite.

        Raises:
            CheckpointError: it has NaN or infinite values.
        """
        header = next(h for h in self.headers.values() if name in h.entries)
        tensor = map_tensors(header, [name])[name]
        require_finite(header.path, name, tensor)
        return tensor

    def reindexed(self, values: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The index once some tensors have other values."""
        result, entries = copy.deepcopy(self.index), self.entries
        metadata = None if result is None else result.get("metadata")
        if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), (int, float)):
            grown = sum(v.numel() * v.dtype.itemsize - (entries[n].end - entries[n].start) for n, v in values.items())
            metadata["total_size"] += grown
            if isinstance(metadata.get("total_parameters"), int):
                metadata["total_parameters"] += sum(v.numel() - math.prod(entries[n].shape) for n, v in values.items())
        return result


def read_index(path: Path) -> dict[str, Any]:
    """Which of the files beside it each tensor is in.

    Raises:
        CheckpointError: it is damaged, or names a file that is missing or somewhere else.
    """
    index = read_json(path)
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise CheckpointError(f"{path} is damaged: it has no weight_map")
    for shard in dict.fromkeys(table.values()):
        require_file_name(shard, str(path))
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"{path} names {shard[:200]}, which is missing")
    return index


def read_shards(source: Path, named: str | None = None) -> Shards:
    """What a directory's weights are, in one file or several; in one where both are there, as libraries take them.

    Args:
        source: the directory.
        named: the file of weights, or their index, that its configuration says.

    Raises:
        CheckpointError: a shard is missing or damaged, or the index does not say what the shards hold.
    """
    names = (SINGLE, INDEX) if named is None else (require_file_name(named, f"the configuration in {source}"),)
    found = next((n for n in names if (source / n).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{source} holds {f'no {named}' if named else f'neither {SINGLE} nor {INDEX}'}: weights in another format "
            f"are read by anypatch.load and written by anypatch.save, on the command line both by anypatch adapt"
        )
    if not found.endswith(".json"):
        return Shards({found: read_header(source / found)})
    index = read_index(source / found)
    table = index["weight_map"]
    headers = {shard: read_header(source / shard) for shard in dict.fromkeys(table.values())}
    for name, shard in table.items():
        if name not in headers[shard].entries:
            raise CheckpointError(f"{source / found} says that {name!r} is in {shard}, and it is not")
    for shard, header in headers.items():
        stray = [name for name in header.entries if table.get(name) != shard]
        if stray:
            raise CheckpointError(f"{source / found} does not say that {stray[0]!r} is in {shard}")
    return Shards(headers, index, found)
