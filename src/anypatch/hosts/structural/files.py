"""torch.hub, and directories of hand-made models.

``save`` writes ``model.safetensors`` and ``geometry.json`` (patch size, image size, class). Without anypatch: build the
class at that geometry, then ``model.load_state_dict(safetensors.torch.load_file(...))``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anypatch.errors import CheckpointError, UnsupportedModelError
from anypatch.hosts.rebuilding import contiguous
from anypatch.hosts.structural.model import subject


def load(name: str, **host_kwargs: Any) -> nn.Module:
    """``REPO:NAME`` by ``torch.hub.load``; REPO is a directory with a ``hubconf.py``, or ``owner/name[:branch]``."""
    repo, _, entry = name.rpartition(":")
    if not repo or not entry:
        raise UnsupportedModelError(f"hub:{name} must be hub:REPO:NAME, with a directory or owner/name as REPO")
    if not Path(repo).is_dir() and "/" not in repo and "source" not in host_kwargs:
        raise CheckpointError(f"hub:{name}: {repo} is no directory here, and a repository is named OWNER/NAME")
    host_kwargs.setdefault("source", "local" if Path(repo).is_dir() else "github")
    try:
        return torch.hub.load(repo, entry, **host_kwargs)
    except (OSError, RuntimeError, ValueError) as error:
        clone = "" if Path(repo).is_dir() else f"; without a network, name a clone of it: hub:DIRECTORY:{entry}"
        raise CheckpointError(f"torch.hub cannot load {entry} from {repo}: {error}{clone}") from error


def build(name: str, **host_kwargs: Any) -> nn.Module:
    """By the entry point's own ``pretrained=False``; one that takes no such argument has no weights to leave out."""
    try:
        return load(name, pretrained=False, **host_kwargs)
    except TypeError:
        return load(name, **host_kwargs)


def save(model: nn.Module, directory: Path, final: Path, **extras: Any) -> None:
    """Write the state dict and the geometry (see this module's docstring)."""
    from safetensors.torch import save_file

    geometry = subject(model).geometry
    save_file(contiguous(model, type(model).__name__), directory / "model.safetensors")
    record = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "patch_size": geometry.patch_size,
        "image_size": geometry.image_size,
        "grid": geometry.grid,
        "prefix_tokens": geometry.prefix_tokens,
        **extras,
    }
    (directory / "geometry.json").write_text(json.dumps(record, indent=2) + "\n")
