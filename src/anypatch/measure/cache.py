"""Features on disk, so that a second run computes only what is new. Files appear whole or not at all.

A cache is untrusted: an entry counts as absent unless it is a plain file no larger than it can be, holds exactly the
tensors that were asked for, and its checksum agrees. Nothing in it is executed, nor allocated on its word.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anypatch.errors import AnypatchWarning, CheckpointError
from anypatch.files.atomic import replacing_file
from anypatch.files.paths import place

# Bytes beside the tensors: the names and shapes of five of them, and a reason of at most this many bytes per image.
HEADER, REASON = 4096, 1024


@dataclass(frozen=True)
class Expected:
    """What an entry holds, if it is what was asked for.

    Attributes:
        tensors: for each name, the dtype and the largest shape; the first side may be shorter.
        images: how many images it speaks of at most.
    """

    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    images: int

    @property
    def largest(self) -> int:
        """Bytes that no entry exceeds."""
        room = HEADER + REASON * self.images
        return room + sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in self.tensors.values())

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these are such tensors."""
        for name, tensor in tensors.items():
            dtype, shape = self.tensors.get(name, (None, ()))
            if tensor.dtype != dtype or tensor.dim() != len(shape) or tensor.shape[1:] != shape[1:]:
                return False
            if len(tensor) > shape[0]:
                return False
        return True


def default_folder() -> Path:
    """``$ANYPATCH_CACHE``, or ``anypatch`` in the user's cache folder."""
    chosen = os.environ.get("ANYPATCH_CACHE")
    if chosen:
        return place(chosen)
    from platformdirs import user_cache_path

    return user_cache_path("anypatch", appauthor=False)


def key_of(parts: dict[str, Any]) -> str:
    """A folder name for what was computed."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Cache:
    """A folder of safetensors files.

    Args:
        folder: where; ``None`` for no cache.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def load(self, key: str, name: str, expected: Expected) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Tensors and text stored under a name, or ``None``; whatever is not as expected counts as absent."""
        path = self._path(key, name)
        if path is None or not os.path.lexists(path):
            return None
        try:
            return _decoded(_read(path, expected.largest), expected)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            warnings.warn(f"damaged cache file {path.name} is computed again ({why})", AnypatchWarning, stacklevel=2)
            return None

    def store(self, key: str, name: str, tensors: dict[str, Tensor], text: dict[str, str]) -> None:
        """Store tensors and text under a name."""
        from safetensors.torch import save

        path = self._path(key, name)
        if path is None:
            return
        content = save(tensors, metadata={**text, "checksum": _checksum(tensors, text)})
        try:
            write_whole(path, content)
        except CheckpointError as error:
            warnings.warn(f"features are not cached: {error}", AnypatchWarning, stacklevel=2)
            self.folder = None

    def _path(self, key: str, name: str) -> Path | None:
        return None if self.folder is None else self.folder / key[:2] / key / f"{name}.safetensors"


def _read(path: Path, largest: int) -> bytes:
    """The bytes of a plain file that is not larger than it can be; never waits for a pipe, never follows a link."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no plain file")
        if found.st_size > largest:
            raise ValueError(f"{found.st_size} bytes, where at most {largest} can be")
        return file.read(largest)


def _decoded(content: bytes, expected: Expected) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and text of an entry.

    Raises:
        ValueError: they are not what was expected, or not what was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    text = _metadata(content)
    said = text.pop("checksum", None)
    if said != _checksum(tensors, text):
        raise ValueError("its checksum does not agree")
    if not expected.fits(tensors):
        raise ValueError("it holds other tensors")
    return tensors, text


def _metadata(content: bytes) -> dict[str, str]:
    """The text in a file that safetensors has just read: its header is a JSON object after its length."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return dict(header.get("__metadata__") or {})


def _checksum(tensors: Mapping[str, Tensor], text: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(text.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file at once or not at all; the directories above it are made.

    Raises:
        CheckpointError: it cannot be written; what was there is what it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    with replacing_file(path) as file:
        file.write(content)
