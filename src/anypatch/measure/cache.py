"""Features on disk, so that a second run computes only what is new. Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.errors import AnypatchWarning


def default_folder() -> Path:
    """``$ANYPATCH_CACHE``, or ``anypatch`` in the user's cache folder."""
    chosen = os.environ.get("ANYPATCH_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "anypatch"


def weights_hash(model: nn.Module) -> str:
    """Changes with any weight, buffer, dtype or class of the model; not with its device."""
    digest = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__}".encode())
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(plain.numpy().data)
    return digest.hexdigest()


def key_of(parts: dict[str, Any]) -> str:
    """A folder name for what was computed."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Cache:
    """A folder of safetensors and JSON files. Nothing in it is ever executed.

    Args:
        folder: where; ``None`` for no cache.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def load(self, key: str, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Tensors and text stored under a name, or ``None``; damaged files count as absent."""
        path = self._path(key, f"{name}.safetensors")
        if path is None or not path.is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                return {n: file.get_tensor(n) for n in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            warnings.warn(f"damaged cache file {path.name} is computed again ({error})", AnypatchWarning, stacklevel=2)
            return None

    def store(self, key: str, name: str, tensors: dict[str, Tensor], text: dict[str, str]) -> None:
        """Store tensors and text under a name."""
        from safetensors.torch import save

        self._write(key, f"{name}.safetensors", lambda: save(tensors, metadata=text))

    def load_json(self, key: str, name: str) -> dict[str, Any] | None:
        """An object stored under a name, or ``None``."""
        path = self._path(key, f"{name}.json")
        if path is None or not path.is_file():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def store_json(self, key: str, name: str, value: dict[str, Any]) -> None:
        """Store an object under a name."""
        self._write(key, f"{name}.json", lambda: json.dumps(value).encode())

    def _path(self, key: str, name: str) -> Path | None:
        return None if self.folder is None else self.folder / key[:2] / key / name

    def _write(self, key: str, name: str, content: Callable[[], bytes]) -> None:
        path = self._path(key, name)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content())
        except OSError as error:
            warnings.warn(f"features are not cached: {error}", AnypatchWarning, stacklevel=2)
            self.folder = None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file at once or not at all."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
