"""Load by name with the host library's own loader, adapt, and save in the host library's own format."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from anypatch import hosts as libraries
from anypatch.adaptation import adapt, host
from anypatch.core.adapters import unwrap
from anypatch.core.geometry import Keep, SizeLike
from anypatch.core.tables import PositionsLike
from anypatch.errors import CheckpointError, UnsupportedModelError

CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz")
PREFIXES = {
    "timm": "timm",
    "transformers": "transformers",
    "open_clip": "open_clip",
    "torchvision": "torchvision",
    "hub": "generic",
    "diffusers": "diffusers",
}
FORMS = (
    "timm:NAME, transformers:NAME_OR_DIR, open_clip:NAME/PRETRAINED, torchvision:NAME/WEIGHTS, hub:REPO:NAME, "
    "a directory one of them saved, or a checkpoint file (" + ", ".join(CHECKPOINT_SUFFIXES) + ")"
)


def load(
    source: str | Path,
    patch_size: SizeLike | None = None,
    image_size: SizeLike | None = None,
    *,
    keep: Keep = "image",
    kernel: Any = "wiener",
    positions: PositionsLike = "antialias",
    **host_kwargs: Any,
) -> nn.Module:
    """Load a pretrained model with the library that made it, then adapt it.

    Args:
        source: ``timm:NAME``, ``transformers:NAME_OR_DIR``, ``open_clip:NAME/PRETRAINED``,
            ``torchvision:NAME/WEIGHTS``, ``hub:REPO:NAME``, a directory in a host library's format, or a
            checkpoint file, with ``arch="timm:NAME"`` where the file does not tell.
        patch_size, image_size, keep, kernel, positions: as in :func:`anypatch.adapt`.
        **host_kwargs: passed on to the host library's loader.

    Returns:
        The host library's own model.

    Raises:
        UnsupportedModelError: a source of no known form, or a model that cannot be adapted.
        CheckpointError: the source cannot be read or is damaged.
        GeometryError: sizes that do not fit.
    """
    model = _load(str(source), host_kwargs)
    if patch_size is not None or image_size is not None:
        adapt(model, patch_size, image_size, keep=keep, kernel=kernel, positions=positions)
    return model


def _load(source: str, host_kwargs: dict[str, Any]) -> nn.Module:
    prefix, _, name = source.partition(":")
    if prefix in PREFIXES and name:
        return _by_library(PREFIXES[prefix], name, host_kwargs)
    path = Path(source)
    if path.is_dir():
        library, name = recognise_directory(path)
        return _by_library(library, name, host_kwargs)
    if source.endswith(CHECKPOINT_SUFFIXES):
        from anypatch.conversion import load_file

        return load_file(path, **host_kwargs)
    raise UnsupportedModelError(f"cannot tell where {source!r} comes from: use {FORMS}")


def _by_library(library: str, name: str, host_kwargs: dict[str, Any]) -> nn.Module:
    if "arch" in host_kwargs:
        raise UnsupportedModelError(f"arch is for checkpoint files: {library}:{name} says itself what it is")
    try:
        return libraries.library(library).load(name, **host_kwargs)
    except ImportError as error:
        package = {"open_clip": "open-clip"}.get(library, library)
        raise UnsupportedModelError(
            f"loading from {library} needs it installed: pip install 'anypatch[{package}]' ({error})"
        ) from error


def recognise_directory(path: Path) -> tuple[str, str]:
    """The host library whose format a directory is in, and the name its loader takes.

    Raises:
        CheckpointError: no known format; the message lists what was looked for.
    """
    if (path / "open_clip_config.json").is_file():
        return "open_clip", f"local-dir:{path}"
    if (path / "torchvision.json").is_file():
        return "torchvision", str(path)
    config = _json(path / "config.json")
    if "architecture" in config:
        return "timm", f"local-dir:{path}"
    if "model_type" in config or "architectures" in config:
        return "transformers", str(path)
    if "_class_name" in config:
        return "diffusers", str(path)
    raise CheckpointError(
        f"{path} is in no host library's format: no open_clip_config.json, no torchvision.json, and no config.json "
        f"with model_type (transformers) or architecture (timm)"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return value if isinstance(value, dict) else {}


def save(model: nn.Module, directory: str | Path, **extras: Any) -> None:
    """Save a model in its host library's own format; it loads there without anypatch.

    Args:
        model: any model that :func:`anypatch.adapt` takes.
        directory: where to; made if it is not there.
        **extras: what the host library's format also holds, such as ``processor=`` for transformers.

    Raises:
        UnsupportedModelError: no host library knows the model.
        CheckpointError: the directory cannot be written.
    """
    path = Path(directory)
    library = host(model)
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        library.save(unwrap(model), path, **extras)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    finally:
        if made:
            with contextlib.suppress(OSError):  # not empty: something was written
                path.rmdir()
