"""A configuration held against the weights that it comes with, while a host library builds a model on its word."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anypatch.core.limits import LimitError, Loading
from anypatch.errors import CheckpointError
from anypatch.files.configs import read_json
from anypatch.hosts.base import Host
from anypatch.hosts.vetting import folder_of

ADAPTER = "adapter_config.json"
PATIENCE = 10  # seconds for the hub to say how large a repository is, before its files are asked for anyway
# A snapshot in the cache that is smaller holds the configuration and waits for its weights.
ALONE = 1 << 20


@contextlib.contextmanager
def held_against(size: int | None, what: str) -> Iterator[None]:
    """Within the block, no model is built in memory that is far larger than its weights.

    Args:
        size: bytes of the weights; ``None`` where nobody can say, and nothing is held.
        what: the configuration, for the error.

    Raises:
        CheckpointError: it would; the message says both sizes.
    """
    if size is None:
        yield
        return
    try:
        with Loading(size):
            yield
    except LimitError as error:
        raise CheckpointError(f"{what}: {error}") from error


def weights_size(host: Host, name: str, options: Mapping[str, Any]) -> int | None:
    """Bytes of the weights that a configuration comes with; ``None`` for a name that the library itself describes.

    Args:
        host: the library.
        name: as its loader takes it.
        options: of the loader.
    """
    folder = folder_of(name, options)
    if folder is None:
        found = host.repository(name)
        return None if found is None else _repository_size(*found, options)
    size, adapter = _folder_size(folder), folder / ADAPTER
    if not adapter.is_file() or (folder / "config.json").is_file():
        return size
    base = read_json(adapter).get("base_model_name_or_path")  # the model that the adapter is for
    more = weights_size(host, base, {}) if isinstance(base, str) and folder_of(base, {}) != folder else None
    return None if more is None else size + more


def _folder_size(folder: Path) -> int:
    """Weights come in many formats, so all files count."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _repository_size(name: str, config: str, options: Mapping[str, Any]) -> int | None:
    """As the files lie in the cache, else as the hub says."""
    try:
        from huggingface_hub import HfApi, try_to_load_from_cache
    except ImportError:
        return None
    revision, place = options.get("revision"), options.get("subfolder") or ""
    with contextlib.suppress(Exception):  # no such repository or no network: the library says so when it asks itself
        cached = try_to_load_from_cache(
            name, f"{place}/{config}".lstrip("/"), cache_dir=options.get("cache_dir"), revision=revision
        )
        if isinstance(cached, str) and _folder_size(Path(cached).parent) > ALONE:
            return _folder_size(Path(cached).parent)
        info = HfApi(token=options.get("token")).model_info(
            name, revision=revision, files_metadata=True, timeout=PATIENCE
        )
        return sum(file.size or 0 for file in info.siblings or ())
    return None
