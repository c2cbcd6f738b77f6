"""transformers: every model of a class that derives from ``PreTrainedModel``, its vision tower in place."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.errors import UnsupportedModelError
from anypatch.geometry import Geometry, Size, show
from anypatch.libraries.base import Example, class_tokens
from anypatch.roles import Facts
from anypatch.twins import Subject

NAME = "transformers"

# -- where a configuration keeps the geometry --------------------------------------------------------------

TIME = ("tubelet_size", "temporal_patch_size", "patch_temporal")
IMAGE = ("image_size", "img_size", "crop_size", "input_size")
FRAMES = ("num_frames", "frames_per_clip")

# Parts of a configuration in which a patch is not made of pixels.
NOT_VISION = re.compile(r"text|audio|speech|language|llm|talker|code2wav|token2wav|decoder|qformer|vq")

# Configurations whose time field is not an axis of the stem's patch.
PER_FRAME: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Part:
    """A configuration, or one inside it, that has a patch size."""

    path: tuple[str, ...]
    config: Any

    def has(self, name: str | None) -> bool:
        return name is not None and getattr(self.config, name, None) is not None


def recognises(model: nn.Module) -> bool:
    """Any class that derives from transformers' ``PreTrainedModel``, remote code included."""
    return getattr(model, "config", None) is not None and any(
        c.__name__ == "PreTrainedModel" and c.__module__.split(".")[0] == "transformers" for c in type(model).__mro__
    )


def subject(model: nn.Module) -> Subject:
    geometry = _geometry(model)
    return Subject(
        model,
        geometry,
        build=lambda g: _build(model, g, geometry),
        facts=_facts(model),
    )


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type") and hasattr(value, "__dict__")


def _configs(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A configuration and all those inside it, outermost first."""
    yield path, config
    for name, value in vars(config).items():
        if _is_config(value):
            yield from _configs(value, (*path, name))


def _parts(model: nn.Module) -> list[Part]:
    """The vision configurations that have a patch size, the one of the pixel stem first.

    Raises:
        UnsupportedModelError: there is none.
    """
    config = model.config
    found = [Part(path, c) for path, c in _configs(config) if _patch_of(c) and not _not_vision(path, c)]
    if not found:
        raise UnsupportedModelError(_why_none(model))
    inner = [p for p in found if not any(q.path[: len(p.path)] == p.path and q is not p for q in found)]
    preferred = [p for p in inner if p.path and re.search(r"vision|visual|image|backbone|sam|vit", p.path[-1])]
    first = (preferred or inner)[0]
    return [first, *[p for p in found if p is not first]]


def _not_vision(path: tuple[str, ...], config: Any) -> bool:
    return any(NOT_VISION.search(name) for name in path)


def _patch_of(config: Any) -> bool:
    value = getattr(config, "patch_size", None)
    return isinstance(value, (int, list, tuple, dict)) or _tubelet(config) is not None


def _tubelet(config: Any) -> Size | None:
    """A (time, height, width) patch kept in one field."""
    value = getattr(config, "tubelet_size", None)
    return tuple(value) if isinstance(value, (list, tuple)) and len(value) == 3 else None


def _why_none(model: nn.Module) -> str:
    name = type(model).__name__
    kind = getattr(model.config, "model_type", "") or name
    if getattr(model, "main_input_name", None) == "input_ids":
        return f"{name} ({kind}) is text only: it has no vision tower, so there are no patches to adapt"
    return f"{name} ({kind}) has no patch_size in its configuration: its stem is not one linear map per patch"


# -- reading the geometry ----------------------------------------------------------------------------------


def _geometry(model: nn.Module) -> Geometry:
    part = _parts(model)[0]
    config = part.config
    prefix = next((n for n in map(class_tokens, model.modules()) if n), 0)
    if hasattr(config, "frequency_stride"):
        return _spectrogram(config, prefix)
    patch, image = _sizes(config)
    return Geometry(patch, image, prefix, NAME, kernel_size=None)


def _sizes(config: Any) -> tuple[Size, Size | None]:
    """(patch, image) of one configuration."""
    name = _first(config, IMAGE)
    image = None if name is None else _pair(getattr(config, name))
    patch, time = _tubelet(config), _first(config, TIME)
    if patch is None:
        patch = _pair(config.patch_size)
        if time is None or config.model_type in PER_FRAME:
            return patch, image
        patch = (_pair(getattr(config, time))[0], *patch)
    if image is None:
        return patch, None
    frames = _first(config, FRAMES)
    return patch, (patch[0] if frames is None else getattr(config, frames), *image)


def _spectrogram(config: Any, prefix: int) -> Geometry:
    kernel = _pair(config.patch_size)
    stride = (config.frequency_stride, config.time_stride)
    image = (config.num_mel_bins, config.max_length)
    grid = tuple((i - k) // s + 1 for i, k, s in zip(image, kernel, stride, strict=True))
    return Geometry(stride, image, prefix, NAME, kernel_size=kernel, explicit_grid=grid)


def _first(config: Any, names: tuple[str, ...]) -> str | None:
    return next((n for n in names if getattr(config, n, None) is not None), None)


def _pair(value: Any) -> Size:
    if isinstance(value, dict):
        return (value["height"], value["width"])
    if isinstance(value, (list, tuple)):
        return tuple(value) if len(value) > 1 else (value[0], value[0])
    return (value, value)


# -- building twins ----------------------------------------------------------------------------------------


def _build(model: nn.Module, geometry: Geometry, current: Geometry) -> nn.Module:
    config = copy.deepcopy(model.config)
    _write(config, _parts(model), geometry, current)
    short = copy.deepcopy(config)
    if _shorten(short):
        try:
            return _make(type(model), short)
        except Exception:  # the language part cannot be cut like this: build the whole, empty
            pass
    try:
        return _make(type(model), config)
    except (TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise _cannot_build(model, geometry, error) from error


def _make(cls: type[nn.Module], config: Any) -> nn.Module:
    with ExitStack() as stack:
        try:
            from transformers.initialization import no_init_weights
        except ImportError:
            from transformers.modeling_utils import no_init_weights
        stack.enter_context(no_init_weights())
        return cls(config)


def _cannot_build(model: nn.Module, geometry: Geometry, error: Exception) -> Exception:
    sizes = f"patch_size {show(geometry.patch_size)} and image_size {show(geometry.image_size)}"
    name = type(model).__name__
    if len(set(geometry.patch_size[-2:])) > 1:
        return UnsupportedModelError(f"{name} accepts only square patches, so not {sizes}: {error}")
    if geometry.image_size is not None and len(set(geometry.image_size[-2:])) > 1:
        return UnsupportedModelError(f"{name} accepts only square images, so not {sizes}: {error}")
    return UnsupportedModelError(f"transformers cannot build {name} with {sizes}: {error}")


def _write(config: Any, parts: list[Part], geometry: Geometry, current: Geometry) -> None:
    """Set the geometry in a copy of the model's configuration, in every part that shares the present one."""
    first = parts[0]
    main = _at(config, first.path)
    old_patch, old_image = _sizes(main) if not hasattr(main, "frequency_stride") else ((), None)
    for part in parts:
        target = _at(config, part.path)
        if hasattr(target, "frequency_stride"):
            _write_spectrogram(target, geometry)
        elif part is first or _sizes(target)[0][-2:] == old_patch[-2:]:
            _write_sizes(target, geometry, current)
    for path, other in _configs(config):
        if any(path == p.path for p in parts) or old_image is None or _not_vision(path, other):
            continue
        name = _first(other, IMAGE)
        if name is not None and isinstance(getattr(other, name), (int, list, tuple)):
            if _pair(getattr(other, name)) == old_image[-2:]:
                _put(other, name, geometry.image_size[-2:] if geometry.image_size else None)
    for _, other in _configs(config):
        _write_counts(other, geometry, current)


def _at(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def _write_sizes(config: Any, geometry: Geometry, current: Geometry) -> None:
    old_patch, old_image = _sizes(config)
    patch, image = geometry.patch_size, geometry.image_size
    pretrained = getattr(config, "pretrain_image_size", None)
    if pretrained is not None:  # the size of the position table, which forward interpolates: keep its grid
        grid = [s // p for s, p in zip(_pair(pretrained), old_patch[-2:], strict=True)]
        _put(config, "pretrain_image_size", tuple(g * p for g, p in zip(grid, patch[-2:], strict=True)))
    time = _first(config, TIME)
    if _tubelet(config) is not None:
        _put(config, "tubelet_size", patch)
    elif time is not None and len(patch) == 3:
        _put(config, time, (patch[0], patch[0]))
    if getattr(config, "patch_size", None) is not None:
        _put(config, "patch_size", patch[-2:])
    stride = getattr(config, "encoder_stride", None)
    if isinstance(stride, int) and patch[-1] == patch[-2]:
        config.encoder_stride = stride * patch[-1] // old_patch[-1]
    name = _first(config, IMAGE)
    if name is not None and image is not None and old_image is not None and old_image == current.image_size:
        _put(config, name, image[-2:])
        frames = _first(config, FRAMES)
        if frames is not None and len(image) == 3:
            setattr(config, frames, image[0])


def _write_spectrogram(config: Any, geometry: Geometry) -> None:
    assert geometry.image_size is not None
    assert geometry.kernel_size is not None
    _put(config, "patch_size", geometry.kernel_size)
    config.frequency_stride, config.time_stride = geometry.patch_size
    config.num_mel_bins, config.max_length = geometry.image_size


def _write_counts(config: Any, geometry: Geometry, current: Geometry) -> None:
    """Counts of image tokens that processors read, where they follow the grid."""
    if current.grid is None or geometry.grid is None:
        return
    old, new = math.prod(current.grid), math.prod(geometry.grid)
    count = getattr(config, "image_seq_length", None)
    if isinstance(count, int) and count * new % old == 0:
        config.image_seq_length = count * new // old
    count = getattr(config, "max_position_embeddings", None)
    if isinstance(count, int) and _patch_of(config) and count == old:
        config.max_position_embeddings = new


def _put(config: Any, name: str, size: Any) -> None:
    """Write a size in the form the configuration has it in."""
    current = getattr(config, name)
    if size is None:
        return
    if isinstance(current, dict):
        value: Any = {**current, "height": size[0], "width": size[1]}
    elif isinstance(current, (list, tuple)):
        value = type(current)(size)
    else:
        value = size[0] if len(set(size)) == 1 else list(size)
    try:
        setattr(config, name, value)
    except Exception as error:  # a strictly typed configuration
        raise UnsupportedModelError(
            f"{type(config).__name__}.{name} accepts only square sizes, not {show(tuple(size))}"
        ) from error


def _shorten(config: Any) -> bool:
    """Cut the language parts of a configuration to one layer; geometry never reaches them."""
    done = False
    for path, part in _configs(config):
        if not path or not re.search(r"text|language|llm", path[-1]):
            continue
        layers = getattr(part, "num_hidden_layers", None)
        if not isinstance(layers, int) or layers < 2:
            continue
        part.num_hidden_layers = 1
        for name, value in vars(part).items():
            if isinstance(value, list) and len(value) == layers:
                setattr(part, name, value[:1])
        done = True
    return done


# -- what shapes cannot tell -------------------------------------------------------------------------------

ORDERS: dict[str, dict[str, str]] = {
    "vit_mae": {r"decoder_pred\.": "h w c"},
    "videomae": {r"decoder\.head\.": "t h w c"},
    "siglip2": {r"patch_embedding\.": "h w c"},
}


def _facts(model: nn.Module) -> Facts:
    orders: dict[str, str] = {}
    for _, config in _configs(model.config):
        for kind, known in ORDERS.items():
            if str(config.model_type).startswith(kind):
                orders.update(known)
    return Facts(orders=orders, suffix_tokens=getattr(model.config, "num_detection_tokens", None) or 0)


# -- the proof's inputs ------------------------------------------------------------------------------------


def example(model: nn.Module, geometry: Geometry) -> Example:
    part = _parts(model)[0]
    config = part.config
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    image = geometry.image_size or tuple(
        p if len(geometry.patch_size) == 3 and i == 0 else 4 * p for i, p in enumerate(geometry.patch_size)
    )
    if hasattr(config, "frequency_stride"):
        return Example((2, *image), lambda m, x: m(x.transpose(1, 2)))
    name = getattr(model, "main_input_name", "pixel_values")
    if len(image) == 3:
        return Example((1, channels, *image), lambda m, x: _video(m, x.transpose(1, 2)))
    frames = _first(config, FRAMES)
    if frames is not None:
        return Example((1, getattr(config, frames), channels, *image), _video)
    if hasattr(model, "get_image_features"):
        return Example((2, channels, *image), lambda m, x: m.get_image_features(pixel_values=x))
    return Example((2, channels, *image), lambda m, x: _without_loss(m(**{name: x}, **_hidden_states(m))))


def _video(model: nn.Module, pixels: Tensor) -> Any:
    """A clip of shape (batch, frames, channels, height, width)."""
    if type(model).__name__ != "VideoMAEForPreTraining":
        return model(pixels)
    _, image = _sizes(model.config)
    patch, _ = _sizes(model.config)
    assert image is not None
    tokens = math.prod(i // p for i, p in zip(image, patch, strict=True))
    masked = torch.arange(tokens, device=pixels.device) % 2 == 0
    return _without_loss(model(pixels, bool_masked_pos=masked[None], output_hidden_states=True))


def _hidden_states(model: nn.Module) -> dict[str, bool]:
    """For models that return pixels, whose number follows the patch: ask for the tokens too."""
    pixels = re.search(r"ForPreTraining|ForMaskedImageModeling", type(model).__name__)
    return {"output_hidden_states": True} if pixels else {}


def _without_loss(outputs: Any) -> Any:
    """A loss over pixels is no function of the tokens alone."""
    return {k: v for k, v in outputs.items() if k != "loss"} if isinstance(outputs, dict) else outputs


# -- loading and saving ------------------------------------------------------------------------------------


def load(name: str, **host_kwargs: Any) -> nn.Module:
    import transformers

    cls = host_kwargs.pop("model_class", None)
    if cls is None:
        cls = transformers.AutoModel
    return cls.from_pretrained(name, **host_kwargs)


def save(model: nn.Module, directory: Path, **extras: Any) -> None:
    model.save_pretrained(str(directory), **extras)
