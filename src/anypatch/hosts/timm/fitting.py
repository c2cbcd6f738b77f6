"""A timm model with the tensors of a file, at the geometry that they were trained at."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.empty import empty
from anypatch.core.geometry import show
from anypatch.errors import CheckpointError, UnsupportedModelError
from anypatch.files import layouts
from anypatch.files.configs import require_name
from anypatch.files.reading import Checkpoint
from anypatch.files.tensors import assign, rooted_for
from anypatch.hosts.base import plain, unknown
from anypatch.hosts.timm.classifier import head_names, reset
from anypatch.hosts.timm.npz import load_npz
from anypatch.hosts.timm.private import construction
from anypatch.hosts.timm.safety import LOCAL, checked_folder


def fit(name: str, checkpoint: Checkpoint, **host_kwargs: Any) -> nn.Module:
    """A timm model with a file's weights, at the geometry they were trained at.

    Raises:
        CheckpointError: the file does not fit ``name``.
        UnsupportedModelError: timm knows no such model.
    """
    checkpoint.require_one()
    if name.startswith(LOCAL):
        name, described = checked_folder(Path(name[len(LOCAL) :]))
        host_kwargs = {**described, **host_kwargs}
    native = layouts.native(checkpoint.tensors)
    arch = f"timm:{name}"
    if layouts.origin(checkpoint.tensors) == "npz":
        model, _ = build_for(name, native, host_kwargs)
        return load_npz(model, checkpoint, arch, native, host_kwargs)
    model, convert = build_for(name, native, host_kwargs)
    checkpoint = rooted_for(model, checkpoint)
    tensors = converted(model, convert, checkpoint, arch)
    _adapt_channels(model, tensors, host_kwargs)
    _fit_head(model, tensors, checkpoint, arch, host_kwargs)
    return assign(model, tensors, checkpoint, arch)


def build_for(
    name: str, native: layouts.Native, host_kwargs: Mapping[str, Any]
) -> tuple[nn.Module, Callable[..., Any] | None]:
    """An empty timm model at a file's native geometry, and timm's converter of checkpoints for it.

    Raises:
        UnsupportedModelError: timm has no such model.
    """
    import timm

    require_name(name, "arch")
    sizes: dict[str, Any] = {}
    if native.patch is not None:
        sizes["patch_size"] = plain(native.patch)
    if native.image is not None:
        sizes["img_size"] = plain(native.image)
    if native.channels is not None:
        sizes["in_chans"] = native.channels
    sizes |= host_kwargs
    attempts = [sizes, {k: v for k, v in sizes.items() if k != "patch_size"}, dict(host_kwargs)]
    error: Exception | None = None
    for arguments in attempts:
        try:
            model = empty(functools.partial(timm.create_model, name, **arguments))
        except RuntimeError as caught:
            if "Unknown model" in str(caught) or "Invalid pretrained tag" in str(caught):
                raise unknown("timm", name, timm.list_models()) from None
            error = error or caught
        except (TypeError, AssertionError, ValueError) as caught:
            error = error or caught
        else:
            made = construction(name.partition(".")[0], **arguments)
            return model, made.converter if made else None
    raise UnsupportedModelError(
        f"timm cannot build {name} with patch_size {show(native.patch)} and image_size {show(native.image)}, "
        f"the sizes of the file: {error}"
    ) from error


def converted(
    model: nn.Module, convert: Callable[..., Any] | None, checkpoint: Checkpoint, arch: str
) -> dict[str, Tensor]:
    """The file's tensors under timm's names, by timm's own converter.

    Raises:
        CheckpointError: the converter does not understand the file, or would have resampled a tensor.
    """
    tensors = dict(checkpoint.tensors)
    if "patch_embed.proj.weight" in tensors and any(".mlp.lin1." in name for name in tensors):
        # Segment Anything's encoder on its own; timm's converter knows it by the name it has in the whole model
        tensors = {f"image_encoder.{name}": tensor for name, tensor in tensors.items()}
    if "decoder_pos_embed" in tensors and "mask_token" in tensors:  # MAE before fine-tuning
        tensors = {n: t for n, t in tensors.items() if not n.startswith(("decoder_", "mask_token"))}
    if convert is None:
        return tensors
    _require_no_growth(model, checkpoint, arch)
    try:
        with torch.no_grad():
            try:
                result = convert(tensors, model)
            except TypeError:
                result = convert(dict(checkpoint.tensors))
    except Exception as error:
        own = model.state_dict()
        for name, stored in checkpoint.tensors.items():  # most often it resampled what is no square
            if layouts.POSITIONS.search(name) and name in own and own[name].shape != stored.shape:
                raise CheckpointError(_misread(checkpoint, arch, name, stored, own[name])) from error
        raise CheckpointError(
            f"{checkpoint.path} does not fit {arch}: timm's converter failed ({type(error).__name__}: {error})"
        ) from error
    for name, tensor in result.items():
        before = checkpoint.tensors.get(name)
        if before is None or not isinstance(tensor, Tensor) or before.numel() == tensor.numel():
            continue
        if tensor.untyped_storage().data_ptr() != before.untyped_storage().data_ptr():  # no slice of it: resampled
            raise CheckpointError(_misread(checkpoint, arch, name, before, tensor))
    return {name: tensor.detach() for name, tensor in result.items() if isinstance(tensor, Tensor)}


def _require_no_growth(model: nn.Module, checkpoint: Checkpoint, arch: str) -> None:
    """timm's converters resample to whatever a configuration says, which may be any amount of memory.

    Raises:
        CheckpointError: a tensor that they could make so has more values than the whole file.
    """
    held = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    for name, tensor in model.state_dict().items():
        if layouts.follows_geometry(name) and tensor.numel() > held:
            raise CheckpointError(
                f"{checkpoint.path} does not fit {arch}: {name} has shape {tuple(tensor.shape)} in the model, which is "
                f"more than all {held} values of the file"
            )


def _misread(checkpoint: Checkpoint, arch: str, name: str, stored: Tensor, taken: Tensor) -> str:
    have, want = tuple(stored.shape), tuple(taken.shape)
    advice = layouts.advice(checkpoint.tensors, name, have, want)
    return f"{checkpoint.path} does not fit {arch}: {name} has shape {have} in the file and {want} in the model{advice}"


def _adapt_channels(model: nn.Module, tensors: dict[str, Tensor], host_kwargs: Mapping[str, Any]) -> None:
    """Another number of image channels, asked for with ``in_chans``: timm's own summing or repeating."""
    if "in_chans" not in host_kwargs:
        return
    from timm.models import adapt_input_conv

    own = model.state_dict()
    for name, tensor in tensors.items():
        target = own.get(name)
        if target is None or tensor.ndim != 4 or target.ndim != 4 or tensor.shape == target.shape:
            continue
        if (tensor.shape[0], *tensor.shape[2:]) == (target.shape[0], *target.shape[2:]) and tensor.shape[1] == 3:
            tensors[name] = adapt_input_conv(host_kwargs["in_chans"], tensor)


def _fit_head(
    model: nn.Module, tensors: dict[str, Tensor], checkpoint: Checkpoint, arch: str, host_kwargs: Mapping[str, Any]
) -> None:
    """Give the model as many classes as the file's head has, unless the user said how many."""
    heads = head_names(model)
    if not heads or not hasattr(model, "reset_classifier"):
        return
    stored = tensors.get(heads[0] + ".weight")
    classes = 0 if stored is None or stored.ndim != 2 else stored.shape[0]
    wanted = model.num_classes
    if classes == wanted:
        return
    if "num_classes" not in host_kwargs:
        what = f"a head of {classes} classes" if classes else "no classification head"
        checkpoint.notes.append(f"{checkpoint.path.name} has {what}, so the model has too ({arch}: {wanted})")
        empty(lambda: reset(model, int(classes)))
        return
    for head in heads:
        tensors.pop(head + ".weight", None)
        tensors.pop(head + ".bias", None)
    if wanted:
        checkpoint.notes.append(
            f"{checkpoint.path.name} has a head of {classes} classes, and {wanted} were asked for: the head is new and "
            f"untrained"
        )
        usual = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
        for head in heads:
            layer = model.get_submodule(head)
            for key, parameter in layer.named_parameters():
                value = torch.zeros(parameter.shape, dtype=usual)
                tensors[f"{head}.{key}"] = nn.init.trunc_normal_(value, std=0.02) if value.ndim > 1 else value
