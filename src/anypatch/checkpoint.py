"""Raw checkpoint files: into a model at the geometry they were trained at, or file to file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from anypatch.architectures import choose
from anypatch.errors import CheckpointError, UnsupportedModelError
from anypatch.fitting import LOADERS
from anypatch.readers import Checkpoint, read


def load_file(path: str | Path, arch: str | None = None, **host_kwargs: Any) -> nn.Module:
    """Load a checkpoint file into the host library's own model, at the geometry the file was trained at.

    The library's own converter is used at that geometry, so that nothing is resampled on the way.

    Args:
        path: a ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` or ``.npz`` file.
        arch: ``"timm:NAME"``, ``"open_clip:NAME"``, ``"torchvision:NAME"`` or ``"transformers:DIRECTORY"``; found
            from the tensors where they tell.
        **host_kwargs: passed on to the host library's constructor.

    Returns:
        The model; its parameters are the file's tensors, in the file's dtype.

    Raises:
        CheckpointError: the file is damaged or unsafe, or does not fit ``arch``; or ``arch`` is needed.
        UnsupportedModelError: no such architecture.
    """
    checkpoint = read(path)
    beside = None
    if arch is None:
        beside = _beside(checkpoint)
        if beside is not None:
            arch, given = beside
            host_kwargs = {**given, **host_kwargs}
    library, name = split(arch if arch is not None else choose(checkpoint))
    try:
        return LOADERS[library](name, checkpoint, dict(host_kwargs))
    except ImportError as error:
        raise UnsupportedModelError(f"loading into {library} needs it installed ({error})") from error


def split(arch: str) -> tuple[str, str]:
    """``library:name`` in two; a bare name is timm's.

    Raises:
        CheckpointError: no such library.
    """
    if not isinstance(arch, str) or not arch:
        raise CheckpointError(f"arch must be like timm:vit_base_patch16_224, got {arch!r}")
    library, colon, name = arch.partition(":")
    if not colon:
        return "timm", arch
    if library not in LOADERS or not name:
        raise CheckpointError(f"unknown arch {arch!r}: use {', '.join(f'{key}:NAME' for key in LOADERS)}")
    return library, name


def _beside(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]] | None:
    """What a configuration next to a file says: its architecture and arguments."""
    path = checkpoint.path.parent / "config.json"
    if checkpoint.path.stem not in ("model", "pytorch_model") or not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no configuration")
    if isinstance(config.get("architecture"), str):
        arguments = config.get("model_args") or {}
        keys = {k: config[k] for k in ("num_classes", "global_pool") if config.get(k) is not None}
        return f"timm:{config['architecture']}", {**keys, **arguments}
    if "model_type" in config:
        return f"transformers:{checkpoint.path.parent}", {}
    return None


def convert(
    source: str | Path,
    target: str | Path,
    patch_size: Any = None,
    image_size: Any = None,
    *,
    keep: Any = "image",
    kernel: Any = "wiener",
) -> None:
    """Placeholder until the streaming converter lands."""
    raise UnsupportedModelError("convert is not available yet")
