"""transformers: every model of a class that derives from ``PreTrainedModel``, its vision tower in place."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import json
import math
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.geometry import Geometry, Size, show
from anypatch.core.roles import Facts
from anypatch.core.tables import Sampling
from anypatch.core.twins import Subject
from anypatch.errors import GeometryError, UnsupportedModelError
from anypatch.hosts.base import Example, class_tokens
from anypatch.hosts.rebuilding import require_rebuilds
from anypatch.hosts.timm import model as trunks
from anypatch.hosts.transformers.processors import follow, resized

NAME = "transformers"

# -- where a configuration keeps the geometry --------------------------------------------------------------

TIME = ("tubelet_size", "temporal_patch_size", "patch_temporal")
IMAGE = ("image_size", "img_size", "crop_size", "input_size")
FRAMES = ("num_frames", "frames_per_clip")
TABLE = ("pretrain_image_size", "max_image_size", "max_img_size")
FLAT = "patch_embed_hidden_size"  # values of a flattened square patch, of models that name no patch size
WINDOW_IN_PIXELS = r"qwen2_5_(vl|omni)|exaone4_5"

# Parts of a configuration in which a patch is not made of pixels.
NOT_VISION = re.compile(r"text|audio(?!_video)|speech|language|llm|talker|code2wav|token2wav|decoder|qformer|vq")

# Parts that follow the patch of an image encoder but see no image.
PROMPTS = re.compile(r"prompt")

# Configurations whose time field is not an axis of the stem's patch.
PER_FRAME = r"hunyuan_vl|ernie4_5_vl"


# Models that have patches, but not one linear map per patch, whatever the sizes: (model type, reason).
NEVER = (
    (r"convnext", "its stages mix patches by convolutions (dwconv, 7x7), so it is a convolutional network and no "
                  "Vision Transformer"),
    (r"levit", "its stem (patch_embeddings) is four convolutions of stride 2 with nonlinearities between them"),
    (r"pvt$", "the position tables of its later stages are built for a first patch of 4"),
    (r"clap", "it folds a spectrogram into a square and normalises each mel band (batch_norm) before it cuts patches"),
    (r"inkling(_mm_model|$)", "its vision tower is a tree of layers over the prime factors of the patch size, with "
                              "nonlinearities between them"),
    (r"neomme", "its stem (up_proj, down_proj) normalises the pixels of a patch and has a nonlinearity inside"),
    (r"gemma4_unified", "its stem (patch_ln1) normalises the pixels of a patch before they are projected"),
)  # fmt: skip
# Models whose layers assume a patch size that no configuration field names: (model type, reason).
FIXED = (
    (r"vitmatte", "its decoder joins the tokens to convolutions over the image at 1/2 to 1/16 of its size, which fixes "
                  "the patch at 16"),
    (r"swin2sr", "it puts tokens back at the pixels' positions, which fixes the patch at 1"),
)  # fmt: skip


# Models whose forward pass, unlike their constructor, needs the patch size to be one number.
SQUARE = re.compile(
    r"data2vec|dpt|timesformer|tipsv2|depth_anything|prompt_depth_anything|sam3|rf_detr|pixio|pixtral|udop|vilt|"
    r"video_llama_3|pix2struct|kosmos.2.5"
)


# Models whose forward pass takes the table of positions, or the sequence of tokens, for a square.
SQUARE_GRID = re.compile(
    r"beit|data2vec|dinov2|dpt|tipsv2|depth_anything|prompt_depth_anything|rf_detr|pixio|internvl|qianfan|timesformer|udop|"
    r"vilt"
)


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
        finish=lambda g: [change for tower in _timm_models(model) for change in _finish(tower, g)],
    )


def _finish(tower: nn.Module, geometry: Geometry) -> list[tuple[nn.Module, str, Any]]:
    finish = trunks.subject(tower).finish
    return [] if finish is None else finish(replace(geometry, library=trunks.NAME))


def _config(model: nn.Module) -> Any:
    return model.config


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
    config = _config(model)
    for pattern, reason in NEVER:
        if re.match(pattern, str(config.model_type)):
            raise UnsupportedModelError(f"{type(model).__name__} cannot be adapted: {reason}")
    towers = _timm_paths(model)
    found = [
        Part(path, c, tuple(towers.get(c.model_type, ())))
        for path, c in _configs(config)
        if (_patch_of(c) or c.model_type in towers) and not _not_vision(path, c)
    ]
    if all(p.path and PROMPTS.search(p.path[-1]) for p in found):
        raise UnsupportedModelError(_why_none(model))
    inner = [p for p in found if not any(q.path[: len(p.path)] == p.path and q is not p for q in found)]
    preferred = [p for p in inner if p.path and re.search(r"vision|visual|image|backbone|sam|vit", p.path[-1])]
    first = (preferred or inner)[0]
    return [first, *[p for p in found if p is not first]]


def _timm_paths(model: nn.Module) -> dict[str, list[str]]:
    """Paths of the towers that timm made, by the model type of the configuration that tells how."""
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if "timm_model" in module._modules and recognises(module):
            found.setdefault(_config(module).model_type, []).append(f"{path}.timm_model".lstrip("."))
    return found


def _timm_models(model: nn.Module) -> list[nn.Module]:
    """The towers that timm made, where it made the one that is adapted."""
    return [model.get_submodule(path) for path in _parts(model)[0].towers]


def _not_vision(path: tuple[str, ...], config: Any) -> bool:
    return any(NOT_VISION.search(name) for name in path) or str(config.model_type).startswith("blt")


def _patch_of(config: Any) -> bool:
    value = getattr(config, "patch_size", None)
    return isinstance(value, (int, list, tuple, dict)) or _tubelet(config) is not None or _flat(config) is not None


def _tubelet(config: Any) -> Size | None:
    """A (time, height, width) patch kept in one field."""
    value = getattr(config, "tubelet_size", None)
    return tuple(value) if isinstance(value, (list, tuple)) and len(value) == 3 else None


def _flat(config: Any) -> Size | None:
    """The patch of a configuration that tells only how many values a flattened one has."""
    value = getattr(config, FLAT, None)
    if not isinstance(value, int):
        return None
    side = math.isqrt(value // _channels(config))
    return (side, side) if _channels(config) * side**2 == value else None


def _why_none(model: nn.Module) -> str:
    name = type(model).__name__
    kind = getattr(_config(model), "model_type", "") or name
    first = _first_convolution(model)
    if first is None:
        return f"{name} ({kind}) is text only: it has no vision tower, so there are no patches to adapt"
    path, convolution = first
    why = "so its stem is not one linear map per patch"
    if convolution.kernel_size == convolution.stride and set(convolution.padding) == {0}:  # TimmBackbone's
        why = "but no field of its configuration tells the size, so at another it could not be loaded again"
    return f"{name} ({kind}) has no patch size: its first layer {_what(path, convolution)}, {why}"


def _first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d | nn.Conv3d] | None:
    """The first convolution over an image's channels, and where it is."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.in_channels <= 4:
            return path, module
    return None


def _what(path: str, module: nn.Conv2d | nn.Conv3d) -> str:
    return (
        f"{path} is a convolution of kernel {show(tuple(module.kernel_size))} with stride "
        f"{show(tuple(module.stride))} and padding {module.padding}"
    )


def _require_stem(model: nn.Module, config: Any, patch: Size) -> None:
    """A layer must read one patch at a time.

    Raises:
        UnsupportedModelError: none does; the message names the first convolution.
    """
    channels = _channels(config)
    values = {channels * math.prod(patch), channels * math.prod(patch[-2:])}
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            if tuple(module.kernel_size[-2:]) == patch[-2:] and tuple(module.stride[-2:]) == patch[-2:]:
                return
        elif isinstance(module, nn.Linear) and module.in_features in values:
            return
    name = type(model).__name__
    first = _first_convolution(model)
    raise UnsupportedModelError(
        f"{name} has patch_size {show(patch)}, but no layer that reads one such patch"
        + (f": its first layer {_what(*first)}" if first else "")
        + ", so its stem is not one linear map per patch"
    )


# -- reading the geometry ----------------------------------------------------------------------------------


def _geometry(model: nn.Module) -> Geometry:
    part = _parts(model)[0]
    config = part.config
    if part.towers:
        return replace(trunks.subject(_timm_models(model)[0]).geometry, library=NAME)
    prefix = next((n for n in map(class_tokens, model.modules()) if n), 0)
    if hasattr(config, "frequency_stride"):
        return _spectrogram(config, prefix)
    patch, image = _sizes(config)
    _require_stem(model, config, patch)
    return Geometry(patch, image, prefix, NAME, kernel_size=None)


def _sizes(config: Any) -> tuple[Size, Size | None]:
    """(patch, image) of one configuration."""
    name = _first(config, IMAGE)
    image = None if name is None else _pair(getattr(config, name))
    patch, time = _tubelet(config), _first(config, TIME)
    if patch is None:
        patch = _flat(config) or _pair(config.patch_size)
        if time is None or re.match(PER_FRAME, config.model_type):
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


def _channels(config: Any) -> int:
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    return channels[0] if isinstance(channels, (list, tuple)) else channels


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
    if geometry.patch_size != current.patch_size:
        for kind, reason in FIXED:
            if re.match(kind, _config(model).model_type):
                raise UnsupportedModelError(f"{type(model).__name__} cannot change its patch size: {reason}")
        kinds = (str(_config(model).model_type), str(_parts(model)[0].config.model_type))
        if len(set(geometry.patch_size[-2:])) > 1 and any(SQUARE.match(kind) for kind in kinds):
            raise UnsupportedModelError(
                f"{type(model).__name__} accepts only square patches, not {show(geometry.patch_size)}"
            )
    padding = _stem_padding(model)
    if padding and min(geometry.patch_size[-2:]) <= 2 * padding:
        raise GeometryError(
            f"{type(model).__name__} pads images by {padding} pixels on every side, which makes another patch of "
            f"patch_size {show(geometry.patch_size)}: take more than {2 * padding}"
        )
    grid = geometry.grid
    if grid is not None and grid[-2] != grid[-1] and grid != current.grid and _needs_square_grid(model):
        raise GeometryError(
            f"{type(model).__name__} takes its positions for a square grid, so image_size "
            f"{show(geometry.image_size)} with patch_size {show(geometry.patch_size)}, a {show(grid)} grid, does not "
            f"fit it; give both sides the same number of patches"
        )
    config = copy.deepcopy(_config(model))
    _write(config, _parts(model), geometry, current, model)
    if geometry != current:
        try:
            type(config).from_dict(config.to_dict())  # it has to load again
        except Exception as error:
            raise _cannot_build(model, geometry, error) from error
    short = copy.deepcopy(config)
    if _shorten(short):
        try:
            return _make(type(model), short)
        except Exception:  # the language part cannot be cut like this: build the whole, empty
            pass
    try:
        return _make(type(model), config)
    except RuntimeError:  # a constructor that reads its parameters: built for real by the caller
        raise
    except Exception as error:
        raise _cannot_build(model, geometry, error) from error


def _needs_square_grid(model: nn.Module) -> bool:
    config = _parts(model)[0].config
    if getattr(config, "use_absolute_position_embeddings", None) is False:
        return False
    kinds = (str(_config(model).model_type), str(config.model_type))
    heads = re.search(r"ForMaskedImageModeling|ViTMAEForPreTraining", type(model).__name__)
    return heads is not None or any(SQUARE_GRID.match(kind) for kind in kinds)


def _make(cls: type[nn.Module], config: Any) -> nn.Module:
    with ExitStack() as stack:
        try:
            initialization = importlib.import_module("transformers.initialization")
        except ImportError:  # transformers 4
            initialization = importlib.import_module("transformers.modeling_utils")
        stack.enter_context(initialization.no_init_weights())
        return cls(config)


def _cannot_build(model: nn.Module, geometry: Geometry, error: Exception) -> Exception:
    sizes = f"patch_size {show(geometry.patch_size)} and image_size {show(geometry.image_size)}"
    name = type(model).__name__
    if len(set(geometry.patch_size[-2:])) > 1:
        return UnsupportedModelError(f"{name} accepts only square patches, so not {sizes}")
    if geometry.image_size is not None and len(set(geometry.image_size[-2:])) > 1:
        return UnsupportedModelError(f"{name} accepts only square images, so not {sizes}")
    return UnsupportedModelError(f"transformers cannot build {name} with {sizes}: {error}")


def _write(config: Any, parts: list[Part], geometry: Geometry, current: Geometry, model: nn.Module) -> None:
    """Set the geometry in a copy of the model's configuration, in every part that shares the present one."""
    first = parts[0]
    main = _at(config, first.path)
    old_patch, old_image = current.patch_size, current.image_size
    if hasattr(main, "frequency_stride"):
        old_patch, old_image = (), None
    others = _sized_alike(config, parts, old_image)  # before anything is written: some only point to a part's size
    for part in parts:
        target = _at(config, part.path)
        if part.towers:
            if geometry != current:
                _write_timm(target, model.get_submodule(part.towers[0]), geometry)
        elif hasattr(target, "frequency_stride"):
            _write_spectrogram(target, geometry)
        elif part is first or _sizes(target)[0][-2:] == old_patch[-2:]:
            _write_sizes(target, geometry, current)
        elif old_image is not None and _sizes(target)[0] == old_image and geometry.image_size is not None:
            _put(target, "patch_size", geometry.image_size)  # tiles of a larger image, as large as the tower's input
    for other, name in others:
        _put(other, name, geometry.image_size[-2:] if geometry.image_size else None)
    for _, other in _configs(config):
        _write_counts(other, geometry, current)


def _sized_alike(config: Any, parts: list[Part], image: Size | None) -> list[tuple[Any, str]]:
    """Configurations besides the parts that tell the same image size, and under which name."""
    found = []
    for path, other in _configs(config):
        name = _first(other, IMAGE)
        if image is None or name is None or any(path == p.path for p in parts) or _not_vision(path, other):
            continue
        value = getattr(other, name)
        if isinstance(value, (int, list, tuple)) and _pair(value) == image[-2:]:
            found.append((other, name))
    return found


def _at(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def _write_sizes(config: Any, geometry: Geometry, current: Geometry) -> None:
    old_patch, old_image = _sizes(config)
    patch, image = geometry.patch_size, geometry.image_size
    for name in TABLE:  # the size of the position table, which forward interpolates: keep its grid
        if getattr(config, name, None) is not None:
            grid = [s // p for s, p in zip(_pair(getattr(config, name)), old_patch[-2:], strict=True)]
            _put(config, name, tuple(g * p for g, p in zip(grid, patch[-2:], strict=True)))
    if re.match(WINDOW_IN_PIXELS, config.model_type):  # keep the window's patches
        _put(
            config,
            "window_size",
            tuple(config.window_size // o * n for o, n in zip(old_patch[-2:], patch[-2:], strict=True)),
        )
    time = _first(config, TIME)
    if _tubelet(config) is not None:
        _put(config, "tubelet_size", patch)
    elif time is not None and len(patch) == 3:
        _put(config, time, (patch[0], patch[0]))
    if getattr(config, "patch_size", None) is not None:
        _put(config, "patch_size", patch[-2:])
    for name in ("patch_dim", "video_patch_dim", FLAT):  # values of a flattened patch
        if isinstance(vars(config).get(name), int):
            setattr(config, name, getattr(config, name) // math.prod(old_patch) * math.prod(patch))
    stride = getattr(config, "encoder_stride", None)
    if isinstance(stride, int) and patch[-1] == patch[-2]:
        config.encoder_stride = stride * patch[-1] // old_patch[-1]
    field = _first(config, IMAGE)
    if field is not None and image is not None and old_image is not None and old_image == current.image_size:
        _put(config, field, image[-2:])
        frames = _first(config, FRAMES)
        if frames is not None and len(image) == 3:
            setattr(config, frames, image[0])


def _write_timm(config: Any, tower: nn.Module, geometry: Geometry) -> None:
    """What ``timm.create_model`` is given, and the input size that image processors read."""
    assert geometry.image_size is not None
    sizes = trunks.sizes(tower, replace(geometry, library=trunks.NAME))
    config.model_args = {**(config.model_args or {}), **sizes}
    about = getattr(config, "pretrained_cfg", None)
    for name in ("input_size", "test_input_size"):
        if isinstance(about, dict) and about.get(name):
            about[name] = [about[name][0], *geometry.image_size]


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
    for name in ("max_position_embeddings", "num_position_embeddings"):
        if _patch_of(config) and getattr(config, name, None) == old:
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

# Flattening order of a patch, for stems and heads that are linear layers: (model type, tensor, order).
ORDERS = (
    (r"vit_mae", r"decoder_pred\.", "h w c"),
    (r"videomae", r"decoder\.head\.", "t h w c"),
    (r"siglip2|cosmos3_edge|molmo2|inkling2|lfm2_vl", r"patch_embedding\.", "h w c"),
    (r"gemma4|diffusion_gemma|embedding_gemma2", r"patch_embedder\.input_proj\.", "h w c"),
    (r"seggpt", r"decoder_embed\.", "h w c"),
    (r"fuyu", r"vision_embed_tokens\.", "h w c"),
    (r"kosmos_?2_?5|pix2struct", r"patch_projection\.", "h w c"),
    (r"llama4", r"patch_embedding\.linear\.", "c h w"),
    (r"radio|nemotron_h", r"patch_projection\.", "c h w"),
    (r"ernie4_5_vl", r"patch_embed\.proj\.", "c h w"),
    (r"lfm3_vl", r"patch_embed\.", "c t h w"),
    (r"muse_", r"patch_embedd(er|ing)\.", "t c h w"),
)


def _facts(model: nn.Module) -> Facts:
    paths = _parts(model)[0].towers
    if paths:
        facts = trunks.subject(model.get_submodule(paths[0])).facts
        return replace(facts, projections=tuple(f"{tower}.{path}" for tower in paths for path in facts.projections))
    orders: dict[str, str] = {}
    for _, config in _configs(_config(model)):
        orders.update({tensor: order for kind, tensor, order in ORDERS if re.match(kind, str(config.model_type))})
    tiles = {}
    for _, config in _configs(_config(model)):
        if getattr(config, "max_num_tiles", None):
            tiles[r"tile_embedding\.weight"] = (config.max_num_tiles, config.hidden_size)
    padding = _stem_padding(model)
    return Facts(
        folded=tiles,
        orders=orders,
        suffix_tokens=getattr(_config(model), "num_detection_tokens", None) or 0,
        whole_multiples=padding > 0,
        sampling=Sampling(antialias=False),
        padding=padding,
    )


def _stem_padding(model: nn.Module) -> int:
    """Pixels that a patch projection without overlap adds around the image (ViTPose's)."""
    patch = _pair(getattr(_parts(model)[0].config, "patch_size", None))
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride == patch and module.in_channels <= 4:
            return 0 if isinstance(module.padding, str) else module.padding[0]
    return 0


# -- the proof's inputs ------------------------------------------------------------------------------------


GRID = 4  # patches on a side, for models that take any size

# Processors that give patches row by row although their model merges blocks of them.
ROW_MAJOR = r"muse_|hunyuan_vl|hy_v4|kimi|paddleocr|molmo2"
# Processors that give patches as small images, not flat.
AS_IMAGES = r"kimi|paddleocr"
# Models that take flattened patches without a description of their grid.
BARE_PATCHES = r"molmo2|fuyu"
GRIDS = ("image_grid_thw", "grid_thw", "image_grid_hw", "spatial_shapes", "target_sizes", "image_position_ids",
         "pixel_position_ids")  # fmt: skip
INDEXED = "flattened_patches"  # patches behind their row and their column
# Models that take the tiles of each image on an axis of their own.
TILES = r"perception_lm"
MASKS = ("pixel_attention_mask", "pixel_mask", "aspect_ratio_ids", "aspect_ratio_mask")
WORDS = ("input_ids", "attention_mask", "decoder_input_ids", "bbox")
KNOWN = {"pixel_values", "pixel_values_videos", "pixel_values_images", "image_sizes", "image_merge_sizes",
         "merge_sizes", "hidden_states", "bool_masked_pos", INDEXED, *GRIDS, *MASKS, *WORDS}  # fmt: skip


def example(subject: Subject) -> Example:
    model, geometry = subject.model, subject.geometry
    config = _parts(model)[0].config
    kind = str(config.model_type)
    channels = _channels(config)
    video = len(geometry.patch_size) == 3
    image = geometry.image_size or tuple(p if video and i == 0 else GRID * p for i, p in enumerate(geometry.patch_size))
    towers = _timm_models(model)
    if towers:
        inner = trunks.example_at(towers[0], geometry)
        if not _parts(model)[0].path or any(unit > 1 for unit in inner.unit):  # the wrapper alone, or behind a backbone
            return Example(inner.shape, lambda m, x: inner.call(_timm_models(m)[0], x), inner.unit)
        channels = inner.shape[1]
    if hasattr(config, "frequency_stride"):
        return Example((2, *image), lambda m, x: m(x.transpose(1, 2)))
    names = set(_parameters(_entry(model)))
    if names & {INDEXED, *GRIDS} or re.match(BARE_PATCHES, kind):
        order = next((o for _, o in _facts(model).orders.items()), "c t h w" if video else "c h w")
        return Example((1, channels, *image), lambda m, x: _patches(m, x, geometry.patch_size, order))
    if video:
        return Example((1, channels, *image), lambda m, x: _video(m, x.transpose(1, 2)))
    frames = _first(config, FRAMES)
    if str(_config(model).model_type) == "depth_pro":  # its towers, on their own: it rescales and tiles its input
        return Example((1, channels, *image), _towers)
    if kind == "seggpt":  # image and prompt share the height
        return Example((1, channels, image[0] // 2, image[1]), _prompted)
    if "pixel_values_videos" in names and "pixel_values" not in names:
        return Example((1, 2, channels, *image), _video)
    if frames is not None and re.match("xclip", kind):
        return Example((getattr(config, frames), channels, *image), _images)
    if frames is not None:
        return Example((1, getattr(config, frames), channels, *image), _video)
    return Example((2, channels, *image), _images)


def _entry(model: nn.Module) -> Any:
    """What to call with pixels: the method for image features, the vision tower, or the whole model."""
    inner = [getattr(model, name, None) for name in ("model", "vlm", "thinker")]
    for owner in (*inner, model):  # the inner model's method has the full signature
        method = getattr(owner, "get_image_features", None)
        if method is not None and _feasible(method):
            return method
    if "input_ids" in _parameters(model.forward) or not _feasible(model.forward):
        config = _parts(model)[0].config
        for module in model.modules():
            if module is model or getattr(module, "config", None) is not config or not _feasible(module.forward):
                continue
            if any(n.startswith("pixel_values") for n in _parameters(module.forward)):
                return module.forward
    return model.forward


def _parameters(function: Any) -> dict[str, Any]:
    signature = inspect.signature(inspect.unwrap(function))
    return {n: p for n, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD and n != "self"}


def _feasible(function: Any) -> bool:
    """Whether every argument that the function insists on is one that can be made up."""
    parameters = _parameters(function)
    required = {n for n, p in parameters.items() if p.default is p.empty}
    return bool(parameters) and required <= KNOWN


def _images(model: nn.Module, pixels: Tensor) -> Any:
    """Images of shape (batch, channels, height, width)."""
    entry = _entry(model)
    names = _parameters(entry)
    kind = str(_parts(model)[0].config.model_type)
    count, sides = len(pixels), torch.tensor([pixels.shape[-2:]], device=pixels.device)
    name = next((n for n in names if n.startswith("pixel_values")), next(iter(names)))
    given: dict[str, Any] = {}
    if "bool_masked_pos" in names and names["bool_masked_pos"].default is inspect.Parameter.empty:
        tokens = math.prod(_geometry(model).grid or ())
        given["bool_masked_pos"] = (torch.arange(tokens) % 2 == 0)[None].expand(count, -1)
    if "image_sizes" in names:
        tiles = getattr(inspect.getmodule(inspect.unwrap(entry)), "image_size_to_num_patches", None)
        if names["image_sizes"].default is inspect.Parameter.empty or re.match("pixtral", kind):
            given["image_sizes"] = sides.expand(count, -1)
        if tiles is not None:  # one image cut into tiles, the whole before them
            number = tiles(sides[0].tolist(), _config(model).image_grid_pinpoints, pixels.shape[-1])
            pixels, given["image_sizes"] = pixels[:1].expand(number, -1, -1, -1)[None], sides
    if re.match(TILES, str(_config(model).model_type)):
        pixels = pixels[:, None]
    if "pixel_attention_mask" in names:
        pixels = pixels[:, None]  # images per sample
        mask = pixels.shape[:2] if "tile_fine_mask" in names else (*pixels.shape[:2], *pixels.shape[-2:])
        given["pixel_attention_mask"] = torch.ones(mask, dtype=torch.bool)
    if "aspect_ratio_ids" in names:  # one image of one tile per sample
        tiles = _parts(model)[0].config.max_num_tiles
        pixels = pixels[:, None, None].expand(-1, 1, tiles, -1, -1, -1)
        given["aspect_ratio_ids"] = torch.ones(count, 1, dtype=torch.long)
        given["aspect_ratio_mask"] = torch.ones(count, 1, tiles, dtype=torch.long)
    if "input_ids" in names:
        given["input_ids"] = torch.arange(2, 8).expand(count, -1)
        given["attention_mask"] = torch.ones(count, 6, dtype=torch.long)
        if "bbox" in names:
            given["bbox"] = torch.arange(4).expand(count, 6, 4)
    if "decoder_input_ids" in names:
        given["decoder_input_ids"] = torch.arange(2, 8).expand(count, -1)
    return _without_loss(entry(**{name: pixels}, **given, **_hidden_states(model)))


def _towers(model: nn.Module, pixels: Tensor) -> Any:
    configs = [part.config for part in _parts(model) if part.path]
    towers = [m for m in model.modules() if any(getattr(m, "config", None) is c for c in configs)]
    return [m(pixels) for m in towers if m is not model and "pixel_values" in _parameters(m.forward)]


def _prompted(model: nn.Module, pixels: Tensor) -> Any:
    outputs = model(pixels, prompt_pixel_values=pixels.roll(1, 1), prompt_masks=pixels / 2, output_hidden_states=True)
    return _without_loss(outputs)


def _patches(model: nn.Module, pixels: Tensor, patch: Size, order: str) -> Any:
    """Flattened patches, with a description of their grid, as the model's own processor makes them."""
    config = _parts(model)[0].config
    entry = _entry(model)
    names = list(_parameters(entry))
    kind = str(config.model_type)
    height, width = (side // p for side, p in zip(pixels.shape[-2:], patch[-2:], strict=True))
    merge = getattr(config, "spatial_merge_size", None) or 1
    if re.match("inkling2", kind):  # whole merge blocks, channels last
        patch, height, width = tuple(merge * p for p in patch), height // merge, width // merge
    flat = patchify(pixels[0], patch, order, 1 if re.match(ROW_MAJOR + "|inkling2", kind) else merge)
    grid = torch.tensor([[1, height, width]], device=pixels.device)
    at = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1)
    name = next((n for n in names if n.startswith("pixel_values")), names[0])
    if re.match("inkling2", kind):
        flat = flat.unflatten(1, (*patch, -1))
    elif INDEXED in names:
        flat = torch.cat([at.reshape(-1, 2).flip(1).to(flat) + 1, flat], 1)[None]
    elif "target_sizes" in names:  # patches side by side
        flat = flat.unflatten(1, (-1, *patch)).permute(1, 2, 0, 3).flatten(2)[None]
    elif re.match(AS_IMAGES, kind):
        flat = flat.unflatten(1, (-1, *patch[-2:]))
    elif set(names) & {"spatial_shapes", "image_position_ids", "pixel_position_ids"} or re.match(BARE_PATCHES, kind):
        flat = flat[None]
    values = {
        "image_grid_thw": grid,
        "grid_thw": grid,
        "image_grid_hw": grid[:, 1:],
        "spatial_shapes": grid[:, 1:],
        "target_sizes": grid[:, 1:],
        "image_merge_sizes": torch.tensor([merge]),
        "merge_sizes": torch.tensor([merge]),
        "pixel_attention_mask": torch.ones(1, height * width, dtype=torch.long),
        "attention_mask": torch.ones(1, height * width, dtype=torch.long),
        "decoder_input_ids": torch.arange(2, 8)[None],
        "image_position_ids": at.reshape(1, -1, 2),
        "pixel_position_ids": at.reshape(1, -1, 2),
    }
    return _without_loss(entry(**{name: flat}, **{n: values[n] for n in names if n in values}))


def patchify(image: Tensor, patch: Size, order: str, blocks: int = 1) -> Tensor:
    """Cut ``(channels, [time,] height, width)`` into flattened patches, ``(patches, values)``.

    Args:
        image: one image or clip.
        patch: its (time,) height and width.
        order: axes of a patch, slowest first.
        blocks: patches come grouped in squares of this side.
    """
    if len(patch) == 2:
        image, patch, order = image.unsqueeze(1), (1, *patch), "t " + order
    if image.ndim == 3:
        raise ValueError(f"an image of shape {tuple(image.shape)} has no time axis for patch {show(patch)}")
    channels = image.shape[0]
    t, h, w = (side // p for side, p in zip(image.shape[1:], patch, strict=True))
    cut = image.reshape(channels, t, patch[0], h // blocks, blocks, patch[1], w // blocks, blocks, patch[2])
    axes = {"c": 0, "t": 2, "h": 5, "w": 8}
    moved = cut.permute(1, 3, 6, 4, 7, *[axes[name] for name in order.split()])
    return moved.reshape(t * h * w, -1)


def _video(model: nn.Module, pixels: Tensor) -> Any:
    """A clip of shape (batch, frames, channels, height, width)."""
    entry = _entry(model)
    if "bool_masked_pos" not in _parameters(entry) or "ForPreTraining" not in type(model).__name__:
        name = next((n for n in _parameters(entry) if n.startswith("pixel_values")), "pixel_values")
        return entry(**{name: pixels})
    _, image = _sizes(_config(model))
    patch, _ = _sizes(_config(model))
    assert image is not None
    tokens = math.prod(i // p for i, p in zip(image, patch, strict=True))
    masked = torch.arange(tokens, device=pixels.device) % 2 == 0
    return _without_loss(model(pixels, bool_masked_pos=masked[None], output_hidden_states=True))


def _hidden_states(model: nn.Module) -> dict[str, bool]:
    """For models that return pixels, whose number follows the patch: ask for the tokens too."""
    pixels = re.search(
        r"ForPreTraining|ForMaskedImage|ForDepth|ForImageMatting|ForSeman|ForDense", type(model).__name__
    )
    return {"output_hidden_states": True} if pixels else {}


def _without_loss(outputs: Any) -> Any:
    """A loss over pixels is no function of the tokens alone."""
    return {k: v for k, v in outputs.items() if k != "loss"} if isinstance(outputs, dict) else outputs


# -- loading and saving ------------------------------------------------------------------------------------


# What `load` read, so that `save` can write the processors that lay beside it: source and geometry at that time.
_SOURCES: weakref.WeakKeyDictionary[nn.Module, tuple[str, Geometry]] = weakref.WeakKeyDictionary()
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def load(name: str, **host_kwargs: Any) -> nn.Module:
    """Load by transformers' own loader, as the class that the checkpoint was saved from.

    Args:
        name: an identifier on the hub, or a directory.
        **host_kwargs: ``model_class`` chooses another class; the rest is ``from_pretrained``'s.
    """
    import transformers

    if host_kwargs.get("pretrained") is True:
        del host_kwargs["pretrained"]
    kind = _given_class(host_kwargs)
    if kind is None:
        about = {k: v for k, v in host_kwargs.items() if k in HUB}
        kind = _saved_class(host_kwargs.get("config") or transformers.AutoConfig.from_pretrained(name, **about))
    model = (kind or transformers.AutoModel).from_pretrained(name, **host_kwargs)
    with contextlib.suppress(UnsupportedModelError, ReferenceError):
        _SOURCES[model] = (name, _geometry(model))
    return model


def build(name: str, **host_kwargs: Any) -> nn.Module:
    """By the configuration alone; further arguments are fields of it."""
    import transformers

    kind = _given_class(host_kwargs)
    making: dict[str, Any] = {
        k: host_kwargs.pop(k) for k in ("dtype", "torch_dtype", "attn_implementation") if k in host_kwargs
    }
    config = host_kwargs.pop("config", None)
    unknown: dict[str, Any] = {}
    if config is None:
        config, unknown = transformers.AutoConfig.from_pretrained(name, return_unused_kwargs=True, **host_kwargs)
    unknown = {k: v for k, v in unknown.items() if k not in HUB}
    if unknown:
        raise UnsupportedModelError(f"the configuration of {name} has no {', '.join(unknown)}")
    kind = kind or _saved_class(config)
    if kind is not None:
        return kind._from_config(config, **making).eval()
    if "trust_remote_code" in host_kwargs:
        making["trust_remote_code"] = host_kwargs["trust_remote_code"]
    return transformers.AutoModel.from_config(config, **making).eval()


def _given_class(host_kwargs: dict[str, Any]) -> Any:
    """The class that ``model_class=`` chooses, as a class or by its name."""
    import transformers

    kind = host_kwargs.pop("model_class", None)
    if not isinstance(kind, str):
        return kind
    found = getattr(transformers, kind, None)
    if found is None:
        raise UnsupportedModelError(f"transformers has no class {kind!r}")
    return found


def _saved_class(config: Any) -> Any:
    """The class that a checkpoint was saved from, where its configuration names one that is the library's own."""
    import transformers

    names = getattr(config, "architectures", None) or []
    return getattr(transformers, names[0], None) if names else None


HUB = ("revision", "cache_dir", "token", "local_files_only", "trust_remote_code", "subfolder", "force_download")


def save(model: nn.Module, directory: Path, final: Path, **extras: Any) -> None:
    """Write what ``from_pretrained`` reads.

    Args:
        model: the model.
        directory: where to.
        **extras: ``processor``, an image, video or feature processor, or one that holds some, which is saved beside
            the model with sizes that fit it; without it, the one in the directory that ``anypatch.load`` read. The
            rest is ``save_pretrained``'s.
    """
    processor = extras.pop("processor", None)
    model.save_pretrained(str(directory), **extras)  # type: ignore[operator]
    _require_loads(model, directory)
    name, old = _SOURCES.get(model, (str(getattr(_config(model), "_name_or_path", "") or ""), None))
    new = _geometry(model)
    if processor is None and name and Path(name).is_dir():
        for file in PROCESSOR_FILES:
            if (Path(name) / file).is_file():
                text = resized(json.loads((Path(name) / file).read_text()), old or _saved_geometry(name), new)
                (directory / file).write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")
    elif processor is not None:
        if old is None and name and Path(name).is_dir():
            old = _saved_geometry(name)
        follow(processor, old, new).save_pretrained(str(directory))


def _require_loads(model: Any, directory: Path) -> None:
    """What transformers builds from the written configuration has to take the written tensors."""
    if getattr(model, "hf_quantizer", None) is not None:
        return  # layers are replaced on loading, by a quantiser that may need its own hardware

    def build() -> nn.Module:
        return _make(type(model), type(model.config).from_pretrained(str(directory)))

    def names(built: Any) -> dict[str, tuple[int, ...]]:
        state = built.state_dict()
        with contextlib.suppress(ImportError):  # before version 5 files had the names of the model
            from transformers.core_model_loading import revert_weight_conversion

            built._weight_conversions = getattr(model, "_weight_conversions", None)
            state = revert_weight_conversion(built, state)
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

    require_rebuilds(directory, model, build, f"transformers' {type(model).__name__}", names, _optional)


def _optional(built: Any) -> Callable[[str], bool]:
    """Tensors that transformers does not write: those it ties to others, or computes."""
    tied: dict[int, list[str]] = {}
    for name, tensor in built.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(name)
    shared = {name for names in tied.values() if len(names) > 1 for name in names}
    ignored = [*(getattr(built, "_keys_to_ignore_on_save", None) or ())]
    ignored += getattr(built, "_keys_to_ignore_on_load_missing", None) or ()
    return lambda name: name in shared or any(name == key or re.search(key, name) for key in ignored)


def _saved_geometry(name: str) -> Geometry | None:
    """The geometry of the checkpoint in a directory, without its weights."""
    import transformers

    from anypatch.core.empty import empty

    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        return _geometry(empty(lambda: _make(kind, config)))
    except (OSError, ValueError, AttributeError, UnsupportedModelError):
        return None
