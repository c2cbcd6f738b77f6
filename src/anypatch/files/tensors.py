"""Comparing tensors by name and shape: what a directory holds, and what a model would take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from anypatch.errors import CheckpointError
from anypatch.files.header import read_header

Shapes = Mapping[str, tuple[int, ...]]


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in a directory's ``.safetensors`` files, from their headers alone.

    Raises:
        CheckpointError: a file is damaged.
    """
    headers = [read_header(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: entry.shape for header in headers for name, entry in header.entries.items()}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a model's state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def difference(stored: Shapes, taken: Shapes, optional: Callable[[str], bool] = lambda name: False) -> str | None:
    """The first tensor in which what is stored and what is taken differ, in words; ``None`` where they agree.

    Args:
        stored: what was written.
        taken: what a model made to read it holds.
        optional: of a name that is taken and not stored, whether the model can do without.
    """
    for name, shape in stored.items():
        if name not in taken:
            return f"{name}, which it would not have"
        if taken[name] != shape:
            return f"{name} of shape {tuple(taken[name])}, where the model has {tuple(shape)}"
    missing = next((name for name in taken if name not in stored and not optional(name)), None)
    return None if missing is None else f"{missing}, which the model does not have"


def require_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse to resample NaN and infinite values, which would spread."""
    values = tensor.detach()
    if values.is_floating_point() and values.dtype.itemsize == 1:
        values = values.float()
    if values.is_floating_point() and not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise CheckpointError(f"{path}: tensor {name!r} has {bad} NaN or infinite values and has to be resampled")


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's values in memory order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
