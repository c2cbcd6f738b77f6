"""What a host library would open on the word of a directory or a repository, looked at before it does.

A library's own loader joins the names that an index says to the directory, unpacks what is packed, waits for a pipe.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anypatch.errors import CheckpointError
from anypatch.files.configs import read_json, require_file_name
from anypatch.files.opening import open_regular
from anypatch.files.reading import require_modest
from anypatch.hosts.folders import TABLES

INDEXES = ("*.safetensors.index.json", "*.bin.index.json")
# Weights as some library looks for them; what else a training run leaves beside them (its optimizer, its arguments) no
# library opens.
PICKLED = ("*model*.bin", "*model*.pth", "*model*.pt", *TABLES)
# timm and open_clip take any other where none of these is there.
PREFERRED = ("model.safetensors", "pytorch_model.*", "model.pth", "open_clip_model.*", "open_clip_pytorch_model.*")
ANY = ("*.bin", "*.pth", "*.pth.tar", "*.pt")
# Arguments of a loader that say where a repository is, as huggingface_hub takes them.
WHERE = ("revision", "cache_dir", "token", "local_files_only")


def folder_of(name: str, options: Mapping[str, Any]) -> Path | None:
    """The directory that a loader would read; ``None`` where a name is no directory's."""
    folder = Path(name.removeprefix("local-dir:"), options.get("subfolder") or "")
    return folder if folder.is_dir() else None


def require_readable(folder: Path) -> None:
    """A directory's configurations and weights are plain files, in it, and not packed.

    Raises:
        CheckpointError: one is not; the message names it.
    """
    for path in _matching(folder, "*.json", "*.safetensors", *PICKLED):
        open_regular(path).close()
    for path in _matching(folder, *INDEXES):
        table = None
        with contextlib.suppress(CheckpointError):  # damaged: the library says so, if it needs it at all
            table = read_json(path).get("weight_map")
        for name in table.values() if isinstance(table, dict) else ():
            require_file_name(name, str(path))
    for path in _matching(folder, *(PICKLED if _matching(folder, *PREFERRED) else ANY)):
        require_modest(path)


def _matching(folder: Path, *patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern)) if not path.is_dir()]


def repository_file(name: str, file: str, options: Mapping[str, Any]) -> Path | None:
    """A file of a repository on the hub, fetched if it is not in the cache; ``None`` where it cannot be had.

    Args:
        name: of the repository.
        file: its name there.
        options: of the loader, which say which revision and where the cache is.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        return None
    about = {key: options[key] for key in WHERE if options.get(key) is not None}
    with contextlib.suppress(Exception):  # no such file, or no network: the library says so when it asks itself
        return Path(hf_hub_download(name, file, subfolder=options.get("subfolder") or None, **about))
    return None
