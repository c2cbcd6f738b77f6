"""Where a configuration keeps the geometry: reading it, and writing another into a copy."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from anypatch.core.geometry import Geometry, Size, show
from anypatch.errors import UnsupportedModelError
from anypatch.hosts.timm import model as trunks
from anypatch.hosts.timm.stems import NAME as TIMM
from anypatch.hosts.transformers.facts import row

TIME = ("tubelet_size", "temporal_patch_size", "patch_temporal")
IMAGE = ("image_size", "img_size", "crop_size", "input_size")
FRAMES = ("num_frames", "frames_per_clip")
TABLE = ("pretrain_image_size", "max_image_size", "max_img_size")
SHUFFLE = "encoder_stride"  # pixels per side that a decoder draws of each of its tokens
FLAT = "patch_embed_hidden_size"  # values of a flattened square patch, of models that name no patch size
STRIDE = "frequency_stride"  # only spectrograms' configurations have it

# Parts of a configuration in which a patch is not made of pixels, by the name of their field.
NOT_VISION = re.compile(r"text|audio(?!_video)|speech|language|llm|talker|code2wav|token2wav|decoder|qformer|vq")


@dataclass(frozen=True)
class Part:
    """A configuration, or one inside it, that has a patch size.

    Attributes:
        path: where in the model's configuration it is.
        config: the configuration.
        towers: paths of the towers that timm makes from it, whose geometry is timm's to tell.
    """

    path: tuple[str, ...]
    config: Any
    towers: tuple[str, ...] = ()


def is_config(value: Any) -> bool:
    """Whether a value is a configuration of transformers."""
    return hasattr(value, "to_dict") and hasattr(value, "model_type") and hasattr(value, "__dict__")


def configs(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A configuration and all those inside it, outermost first."""
    yield path, config
    for name, value in vars(config).items():
        if is_config(value):
            yield from configs(value, (*path, name))


def not_vision(path: tuple[str, ...], config: Any) -> bool:
    """Whether a patch of this configuration is not made of pixels."""
    return any(NOT_VISION.search(name) for name in path) or row(config).not_pixels


def has_patch(config: Any) -> bool:
    """Whether a configuration tells the size of a patch."""
    value = getattr(config, "patch_size", None)
    return isinstance(value, (int, list, tuple, dict)) or tubelet(config) is not None or flat(config) is not None


def tubelet(config: Any) -> Size | None:
    """A (time, height, width) patch kept in one field."""
    value = getattr(config, "tubelet_size", None)
    return tuple(value) if isinstance(value, (list, tuple)) and len(value) == 3 else None


def flat(config: Any) -> Size | None:
    """The patch of a configuration that tells only how many values a flattened one has."""
    value = getattr(config, FLAT, None)
    if not isinstance(value, int):
        return None
    side = math.isqrt(value // channels(config))
    return (side, side) if channels(config) * side**2 == value else None


def sizes(config: Any) -> tuple[Size, Size | None]:
    """(patch, image) of one configuration."""
    name = first_of(config, IMAGE)
    image = None if name is None else size_of(getattr(config, name))
    patch, time = tubelet(config), first_of(config, TIME)
    if patch is None:
        patch = flat(config) or size_of(config.patch_size)
        if time is None or row(config).per_frame:
            return patch, image
        patch = (size_of(getattr(config, time))[0], *patch)
    if image is None:
        return patch, None
    frames = first_of(config, FRAMES)
    return patch, (patch[0] if frames is None else getattr(config, frames), *image)


def channels(config: Any) -> int:
    """Channels of the input, three where the configuration does not say."""
    count = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    return count[0] if isinstance(count, (list, tuple)) else count


def first_of(config: Any, names: tuple[str, ...]) -> str | None:
    """The first of these fields that the configuration has."""
    return next((n for n in names if getattr(config, n, None) is not None), None)


def size_of(value: Any) -> Size:
    """(height, width) from any of the forms that configurations keep it in."""
    if isinstance(value, dict):
        return (value["height"], value["width"])
    if isinstance(value, (list, tuple)):
        return tuple(value) if len(value) > 1 else (value[0], value[0])
    return (value, value)


# -- writing -----------------------------------------------------------------------------------------------


def write(config: Any, parts: Sequence[Part], geometry: Geometry, current: Geometry, model: nn.Module) -> None:
    """Set the geometry in a copy of the model's configuration, in every part that shares the present one."""
    first = parts[0]
    main = at_path(config, first.path)
    old_patch, old_image = current.patch_size, current.image_size
    if hasattr(main, STRIDE):
        old_patch, old_image = (), None
    others = _sized_alike(config, parts, old_image)  # before anything is written: some only point to a part's size
    for part in parts:
        target = at_path(config, part.path)
        if part.towers:
            if geometry != current:
                _write_timm(target, model.get_submodule(part.towers[0]), geometry)
        elif hasattr(target, STRIDE):
            _write_spectrogram(target, geometry)
        elif part is first or sizes(target)[0][-2:] == old_patch[-2:]:
            _write_sizes(target, geometry, current)
        elif old_image is not None and sizes(target)[0] == old_image and geometry.image_size is not None:
            put(target, "patch_size", geometry.image_size)  # tiles of a larger image, as large as the tower's input
    for other, name in others:
        put(other, name, geometry.image_size[-2:] if geometry.image_size else None)
    for _, other in configs(config):
        _write_counts(other, geometry, current)


def _sized_alike(config: Any, parts: Sequence[Part], image: Size | None) -> list[tuple[Any, str]]:
    """Configurations besides the parts that tell the same image size, and under which name."""
    found = []
    for path, other in configs(config):
        name = first_of(other, IMAGE)
        if image is None or name is None or any(path == p.path for p in parts) or not_vision(path, other):
            continue
        value = getattr(other, name)
        if isinstance(value, (int, list, tuple)) and size_of(value) == image[-2:]:
            found.append((other, name))
    return found


def at_path(config: Any, path: tuple[str, ...]) -> Any:
    """The configuration inside another."""
    for name in path:
        config = getattr(config, name)
    return config


def _write_sizes(config: Any, geometry: Geometry, current: Geometry) -> None:
    old_patch, old_image = sizes(config)
    patch, image = geometry.patch_size, geometry.image_size
    for name in TABLE:  # the size of the position table, which forward interpolates: keep its grid
        if getattr(config, name, None) is not None:
            grid = [s // p for s, p in zip(size_of(getattr(config, name)), old_patch[-2:], strict=True)]
            put(config, name, tuple(g * p for g, p in zip(grid, patch[-2:], strict=True)))
    if row(config).window_in_pixels:  # keep the window's patches
        put(
            config,
            "window_size",
            tuple(config.window_size // o * n for o, n in zip(old_patch[-2:], patch[-2:], strict=True)),
        )
    time = first_of(config, TIME)
    if tubelet(config) is not None:
        put(config, "tubelet_size", patch)
    elif time is not None and len(patch) == 3:
        put(config, time, (patch[0], patch[0]))
    if getattr(config, "patch_size", None) is not None:
        put(config, "patch_size", patch[-2:])
    for name in ("patch_dim", "video_patch_dim", FLAT):  # values of a flattened patch
        if isinstance(vars(config).get(name), int):
            setattr(config, name, getattr(config, name) // math.prod(old_patch) * math.prod(patch))
    stride = getattr(config, SHUFFLE, None)
    if isinstance(stride, int) and _of_one_shape(patch, old_patch):
        setattr(config, SHUFFLE, stride * patch[-1] // old_patch[-1])
    field = first_of(config, IMAGE)
    if field is not None and image is not None and old_image is not None and old_image == current.image_size:
        put(config, field, image[-2:])
        frames = first_of(config, FRAMES)
        if frames is not None and len(image) == 3:
            setattr(config, frames, image[0])


def _write_timm(config: Any, tower: nn.Module, geometry: Geometry) -> None:
    """What ``timm.create_model`` is given, and the input size that image processors read."""
    assert geometry.image_size is not None
    sizes = trunks.sizes(tower, replace(geometry, library=TIMM))
    config.model_args = {**(config.model_args or {}), **sizes}
    about = getattr(config, "pretrained_cfg", None)
    for name in ("input_size", "test_input_size"):
        if isinstance(about, dict) and about.get(name):
            about[name] = [about[name][0], *geometry.image_size]


def _write_spectrogram(config: Any, geometry: Geometry) -> None:
    assert geometry.image_size is not None
    assert geometry.kernel_size is not None
    put(config, "patch_size", geometry.kernel_size)
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
    for name in ("max_position_embeddings", "num_position_embeddings"):
        if has_patch(config) and getattr(config, name, None) == old:
            setattr(config, name, new)
    side = getattr(config, "image_embedding_size", None)  # the grid that SAM's prompts lie on
    if isinstance(side, int) and side == current.grid[-1] and current.grid[-1] == current.grid[-2]:
        config.image_embedding_size = geometry.grid[-1]
    queries = getattr(config, "projector_patch_to_query_dict", None)
    if queries:
        config.projector_patch_to_query_dict = {count * new // old: value for count, value in queries.items()}
    tiles = getattr(config, "image_grid_pinpoints", None)
    if tiles and current.image_size and geometry.image_size:
        sides = list(zip(current.image_size[-2:], geometry.image_size[-2:], strict=True))
        config.image_grid_pinpoints = [
            type(pair)(side * n // o for side, (o, n) in zip(pair, sides, strict=True)) for pair in tiles
        ]


def _of_one_shape(a: Size, b: Size) -> bool:
    """Whether one patch is the other enlarged alike along both axes."""
    return a[-2] * b[-1] == a[-1] * b[-2]


def require_one_stride(config: Any, model: nn.Module, patch: Size, old: Size) -> None:
    """A decoder that shuffles channels into pixels by one factor for both axes draws patches of one shape only.

    Raises:
        UnsupportedModelError: ``patch`` has another shape than ``old`` (masked image modelling).
    """
    stride = getattr(config, SHUFFLE, None)
    if stride is None or _of_one_shape(patch, old):
        return
    if stride in [m.upscale_factor for m in model.modules() if isinstance(m, nn.PixelShuffle)]:
        shape = "only square patches" if old[0] == old[1] else f"only multiples of {show(old)}"
        raise UnsupportedModelError(
            f"{type(model).__name__} draws every patch with one PixelShuffle({stride}), so it accepts {shape}, "
            f"not {show(patch)}"
        )


def put(config: Any, name: str, size: Any) -> None:
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


def shorten(config: Any) -> bool:
    """Cut the language parts of a configuration to one layer; geometry never reaches them."""
    done = False
    for path, part in configs(config):
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
