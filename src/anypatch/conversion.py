"""Raw checkpoint files: into a model at the geometry they were trained at, or file to file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from anypatch.core.geometry import ImageSizeLike, Keep, SizeLike
from anypatch.core.limits import LimitError
from anypatch.core.tables import PositionsLike
from anypatch.errors import CheckpointError, UnsupportedModelError
from anypatch.files import layouts
from anypatch.files.configs import read_config
from anypatch.files.reading import Checkpoint, read
from anypatch.files.tensors import require_finite
from anypatch.hosts.architectures import choose
from anypatch.hosts.fitting import LOADERS
from anypatch.hosts.timm.files import described


def load_file(path: str | Path, arch: str | None = None, *, prefix: str | None = None, **host_kwargs: Any) -> nn.Module:
    """Load a checkpoint file into the host library's own model, at the geometry the file was trained at.

    The library's own converter is used at that geometry, so that nothing is resampled on the way.

    Args:
        path: a file of safetensors, ``torch.save``, ``torch.jit.save`` or NumPy, whatever its name.
        arch: ``"timm:NAME"``, ``"open_clip:NAME"``, ``"torchvision:NAME"`` or ``"transformers:DIRECTORY"``; found
            from the tensors where they tell.
        prefix: which of several models in the file, by what stands before the name of its patch projection
            (``"module.base_encoder"``); found where there is one.
        **host_kwargs: passed on to the host library's constructor.

    Returns:
        The model; its parameters are the file's tensors, in the file's dtype.

    Raises:
        CheckpointError: the file is damaged or unsafe, or does not fit ``arch``; or ``arch`` is needed.
        UnsupportedModelError: no such architecture.
    """
    checkpoint = read(path, prefix)
    if arch is None and (beside := _beside(checkpoint.path)) is not None:
        arch, given = beside
        host_kwargs = {**given, **host_kwargs}
    if arch is None:
        checkpoint.require_one()
        arch = choose(checkpoint)
    library, name = split(arch)
    _require_finite(checkpoint)
    try:
        return LOADERS[library](name, checkpoint, dict(host_kwargs))
    except LimitError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except ImportError as error:
        raise UnsupportedModelError(f"loading into {library} needs it installed ({error})") from error


def _require_finite(checkpoint: Checkpoint) -> None:
    """Refuse NaN and infinite values in what a change of geometry resamples."""
    for name, tensor in checkpoint.tensors.items():
        if layouts.follows_geometry(name):
            require_finite(checkpoint.path, name, tensor)


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


def _beside(file: Path) -> tuple[str, dict[str, Any]] | None:
    """What a configuration next to a file says: its architecture and arguments."""
    path = file.parent / "config.json"
    if file.stem not in ("model", "pytorch_model") or not path.is_file():
        return None
    config = read_config(path)
    if isinstance(config.get("architecture"), str) and "model_type" not in config:
        name, arguments = described(config, path)
        return f"timm:{name}", arguments
    if "model_type" in config:
        return f"transformers:{file.parent}", {}
    return None


def convert(
    source: str | Path,
    target: str | Path,
    patch_size: SizeLike | None = None,
    image_size: ImageSizeLike | None = None,
    *,
    keep: Keep = "image",
    kernel: Any = "wiener",
    positions: PositionsLike = "antialias",
    arch: str | None = None,
    prefix: str | None = None,
    link: bool = False,
) -> None:
    """Convert a checkpoint file or directory to another geometry without loading the model.

    Only the tensors that follow the geometry are computed; all other bytes are copied by the operating system. The
    result is what loading, adapting and saving would give. The target appears when it is complete: whatever happens
    before leaves what was there.

    Args:
        source: a checkpoint file, or a directory in the format of transformers, timm or open_clip.
        target: the ``.safetensors`` file or the directory to write; may be ``source``.
        patch_size, image_size, keep, kernel, positions: as in :func:`anypatch.adapt`.
        arch: for a file whose tensors do not tell, as in :func:`load_file`.
        prefix: for a file that holds several models: what stands before the name of the patch projection.
        link: give files that do not change a second name instead of copying them (same file system only).

    Raises:
        CheckpointError: the source is damaged or incomplete, or the target cannot be written.
        GeometryError: sizes that do not fit.
        UnsupportedModelError: the model cannot be adapted.
    """
    from anypatch.converting import convert_directory, convert_file

    source, target = Path(source), Path(target)
    if not source.exists():
        raise CheckpointError(f"{source} does not exist")
    ask = {
        "patch_size": patch_size,
        "image_size": image_size,
        "keep": keep,
        "kernel": kernel,
        "positions": positions,
    }
    if source.is_dir():
        if arch is not None or prefix is not None:
            raise CheckpointError(f"{source} says itself what it is: leave out arch and prefix")
        convert_directory(source, target, ask, link)
    else:
        described = _beside(source) if arch is None else (":".join(split(arch)), {})
        convert_file(source, target, described, ask, prefix)
