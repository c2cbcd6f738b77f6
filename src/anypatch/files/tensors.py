"""Tables of tensors: compared by name and shape, assigned to a model without a copy, put back where they lay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from anypatch.errors import CheckpointError, listed
from anypatch.files import layouts
from anypatch.files.header import read_header
from anypatch.files.reading import Checkpoint
from anypatch.files.wrappers import rooted

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
    return shapes(model.state_dict())


def shapes(tensors: Mapping[str, Tensor], floating: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes by name; of floating-point tensors alone where the others are counters and indices that a host adds."""
    return {n: tuple(t.shape) for n, t in tensors.items() if t.is_floating_point() or not floating}


@dataclass(frozen=True)
class Comparison:
    """Where two tables of tensors differ by name or shape.

    Attributes:
        missing: names that are taken and not stored.
        surplus: names that are stored and not taken.
        other: names that are both, with the stored shape and the one that is taken.
    """

    missing: list[str]
    surplus: list[str]
    other: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def agree(self) -> bool:
        """Whether nothing differs."""
        return not (self.missing or self.surplus or self.other)


def compared(stored: Shapes, taken: Shapes, optional: Callable[[str], bool] = lambda name: False) -> Comparison:
    """What is stored, held against what would be taken.

    >>> compared({"a": (2,), "b": (3,)}, {"a": (4,), "c": (1,)})
    Comparison(missing=['c'], surplus=['b'], other={'a': ((2,), (4,))})

    Args:
        stored: what a file holds.
        taken: what a model made to read it holds.
        optional: of a name that is taken and not stored, whether the model can do without.
    """
    return Comparison(
        [name for name in taken if name not in stored and not optional(name)],
        [name for name in stored if name not in taken],
        {n: (tuple(s), tuple(taken[n])) for n, s in stored.items() if n in taken and tuple(taken[n]) != tuple(s)},
    )


def difference(stored: Shapes, taken: Shapes, optional: Callable[[str], bool] = lambda name: False) -> str | None:
    """The first tensor in which what was stored and what would be taken differ, in words; ``None`` where they agree."""
    found = compared(stored, taken, optional)
    for name in stored:
        if name in found.surplus:
            return f"{name}, which it would not have"
        if name in found.other:
            return f"{name} of shape {found.other[name][1]}, where the model has {found.other[name][0]}"
    return f"{found.missing[0]}, which the model does not have" if found.missing else None


def assign(model: nn.Module, tensors: dict[str, Tensor], checkpoint: Checkpoint, arch: str) -> nn.Module:
    """Make the file's tensors the model's parameters, without copying them.

    Raises:
        CheckpointError: missing or surplus tensors, or other shapes; the message names them.
    """
    own = model.state_dict(keep_vars=True)
    needed = {n for n, v in own.items() if isinstance(v, nn.Parameter) or v.is_floating_point() or v.is_meta}
    found = compared(shapes(tensors), shapes(own), lambda name: name not in needed)
    if found.surplus or found.missing:
        parts = [f"it lacks {listed(found.missing)}"] if found.missing else []
        parts += [f"{arch} has no {listed(found.surplus)}"] if found.surplus else []
        raise CheckpointError(f"{checkpoint.path} does not fit {arch}: {'; '.join(parts)}")
    for name, (stored, taken) in found.other.items():
        raise CheckpointError(
            f"{checkpoint.path} does not fit {arch}: {name} has shape {stored}, not {taken}"
            f"{layouts.advice(checkpoint.tensors, name, stored, taken)}"
        )
    for name, tensor in tensors.items():
        if own[name].is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(
                f"{checkpoint.path}: {name} is stored as {tensor.dtype}, where {arch} has {own[name].dtype}: quantised "
                f"weights are not read, use those in floating point"
            )
    model.load_state_dict(_one_dtype(tensors, checkpoint), strict=False, assign=True)
    return model


def _one_dtype(tensors: dict[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Tensors that a converter made up take the type that most of the file's values have."""
    counts: dict[torch.dtype, int] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    if not counts:
        return tensors
    usual = max(counts, key=lambda dtype: counts[dtype])
    return {
        name: tensor.to(usual) if tensor.is_floating_point() and tensor.dtype not in counts else tensor
        for name, tensor in tensors.items()
    }


def rooted_for(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """The file without a prefix that training code put before all of the model's names."""
    tensors = rooted(checkpoint.tensors, (name for name, _ in model.named_parameters()), checkpoint.path)
    return checkpoint if tensors is checkpoint.tensors else replace(checkpoint, tensors=tensors)


def put_back(path: Path, name: str, stored: Tensor, view: Tensor, new: Tensor) -> Tensor:
    """The stored tensor with ``view``, which lies in it, replaced by ``new``.

    Raises:
        CheckpointError: the view is not the stored tensor with unit axes added or removed, or a slice of one axis.
    """
    new = new.to(stored.dtype)
    if stored.shape == view.shape and stored.stride() == view.stride():
        return new
    if view.is_contiguous() and stored.is_contiguous() and view.numel() == stored.numel():
        if stored.ndim == 2 and stored.shape[0] == view.shape[0]:
            return new.reshape(new.shape[0], -1)
        kept = [size for size in stored.shape if size != 1]
        if kept == [size for size in view.shape if size != 1]:
            sides = iter(new.shape[axis] for axis, size in enumerate(view.shape) if size != 1)
            return new.reshape([size if size == 1 else next(sides) for size in stored.shape])
    if stored.ndim == view.ndim:
        shorter = [axis for axis in range(stored.ndim) if stored.shape[axis] != view.shape[axis]]
        if len(shorter) == 1 and stored.stride() == view.stride():
            (axis,) = shorter
            offset = view.storage_offset() - stored.storage_offset()
            start = offset // stored.stride(axis)
            before = stored.narrow(axis, 0, start)
            rest = start + view.shape[axis]
            after = stored.narrow(axis, rest, stored.shape[axis] - rest)
            return torch.cat([before, new, after], dim=axis)
    raise CheckpointError(
        f"{path}: {name!r} is laid out in a way that cannot be converted file to file: "
        f"use anypatch.load and anypatch.save"
    )


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
