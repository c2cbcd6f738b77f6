"""Raw checkpoint files: which architecture their tensors are of, and into the host library's own model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from anypatch import hosts
from anypatch.core.ambient import undisturbed
from anypatch.core.limits import LimitError
from anypatch.errors import AnypatchWarning, CheckpointError, UnsupportedModelError, listed
from anypatch.files import layouts
from anypatch.files.paths import at_home
from anypatch.files.reading import Checkpoint, read
from anypatch.files.tensors import require_finite
from anypatch.hosts.base import Host

# What libraries call the file of weights beside a configuration; a file of another name may be of another model.
BESIDE = ("model", "pytorch_model")


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
    with undisturbed():
        checkpoint = read(path, prefix)
        library, name = architecture(checkpoint, arch)
        for stored, tensor in checkpoint.tensors.items():
            if layouts.follows_geometry(stored):  # what a change of geometry resamples
                require_finite(checkpoint.path, stored, tensor)
        model = fit(library, name, checkpoint, **host_kwargs)
    for note in checkpoint.notes:
        warnings.warn(note, AnypatchWarning, stacklevel=4)  # where anypatch.load was called
    return model


def fit(library: Host, name: str, checkpoint: Checkpoint, **host_kwargs: Any) -> nn.Module:
    """The architecture ``name`` of a library with a file's tensors.

    Raises:
        CheckpointError: it does not fit, or asks for more memory than is allowed.
        UnsupportedModelError: no such architecture, or the library is not installed.
    """
    try:
        return library.fit(name, checkpoint, **host_kwargs)
    except LimitError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    except ImportError as error:
        raise UnsupportedModelError(f"loading into {library.name} needs it installed ({error})") from error


def architecture(checkpoint: Checkpoint, arch: str | None, several: bool = False) -> tuple[Host, str]:
    """The library and its name for what a file holds: as told, as the configuration beside it says, as tensors tell.

    Args:
        checkpoint: the file.
        arch: ``LIBRARY:NAME``, where it was said.
        several: whether any of several that fit will do.

    Raises:
        CheckpointError: nothing tells, or several fit; the message lists them.
    """
    if arch is not None:
        return split(arch)
    found = _beside(checkpoint.path)
    if found is not None:
        return found
    checkpoint.require_one()
    return split(infer(checkpoint)[0] if several else choose(checkpoint))


def split(arch: str) -> tuple[Host, str]:
    """``library:name`` in two; a bare name is timm's.

    Raises:
        CheckpointError: no such library.
    """
    if not isinstance(arch, str) or not arch:
        raise CheckpointError(f"arch must be like timm:vit_base_patch16_224, got {arch!r}")
    prefix, colon, name = at_home(arch).partition(":")
    if not colon:
        return hosts.library("timm"), arch
    library = hosts.by_prefix(prefix)
    if library is None or not name or not library.has("fit"):
        forms = ", ".join(f"{host.name}:NAME" for host in hosts.HOSTS if host.has("fit"))
        raise CheckpointError(f"unknown arch {arch!r}: use {forms}")
    return library, name


def _beside(file: Path) -> tuple[Host, str] | None:
    """What the configuration next to a file says."""
    found = hosts.by_folder(file.parent) if file.stem in BESIDE else None
    return found if found is not None and found[0].has("fit") else None


def infer(checkpoint: Checkpoint) -> list[str]:
    """Architectures, as ``library:name``, that hold exactly the file's tensors; the likeliest first.

    Those that compute the same function are one, under the name whose own geometry is nearest. More than one means
    that tensors do not tell (the number of heads, the activation, the width of a norm's epsilon).

    Raises:
        CheckpointError: none was found.
    """
    origin = layouts.origin(checkpoint.tensors)
    library = hosts.library("timm" if origin == "npz" else origin)
    found = [f"{library.name}:{name}" for name in library.candidates(checkpoint)]
    if not found:
        native = layouts.native(checkpoint.tensors)
        raise CheckpointError(
            f"cannot tell the architecture of {checkpoint.path}: no model of {library.name} has exactly its "
            f"{len(checkpoint.tensors)} tensors (patch projection {native.kernel}{layouts.doubt(checkpoint.tensors)}); "
            f'say which with arch="{library.name}:NAME"'
        )
    return found


def choose(checkpoint: Checkpoint) -> str:
    """The one architecture of a file.

    Raises:
        CheckpointError: none fits, or several, which the message lists.
    """
    found = infer(checkpoint)
    if len(found) > 1:
        raise CheckpointError(
            f"the tensors of {checkpoint.path} fit several architectures that compute different things: "
            f'{listed(found)}; say which with arch="{found[0]}"'
        )
    return found[0]
