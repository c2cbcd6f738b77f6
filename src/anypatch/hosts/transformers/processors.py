"""transformers' image, video and feature processors: their sizes follow the model's."""

from __future__ import annotations

import copy
import math
from typing import Any

from anypatch.core.geometry import Geometry, Size

PIXELS = (
    "size",
    "crop_size",
    "pad_size",
    "image_size",
    "max_image_size",
    "min_image_size",
    "tile_size",
    "image_grid_pinpoints",
)
BUDGETS = ("min_pixels", "max_pixels")
MULTIPLES = ("ensure_multiple_of", "size_divisor", "size_divisibility", "pad_size_divisor")
COUNTS = ("image_seq_length", "image_seq_len", "num_image_tokens")
PARTS = ("image_processor", "video_processor", "feature_extractor")


def follow(processor: Any, old: Geometry | None, new: Geometry) -> Any:
    """A copy of a processor for the new geometry; ``old`` is read off the processor if it is not known."""
    result = copy.copy(processor)
    parts = [name for name in PARTS if hasattr(getattr(processor, name, None), "to_dict")]
    if not parts:
        return type(processor).from_dict(resized(processor.to_dict(), old, new))
    fields = {n: getattr(processor, n) for n in ("patch_size", *COUNTS) if getattr(processor, n, None) is not None}
    if old is None:
        old = _read(getattr(processor, parts[0]).to_dict(), new)
    for name in parts:
        part = getattr(processor, name)
        setattr(result, name, type(part).from_dict(resized(part.to_dict(), old, new)))
    for name, value in resized(fields, old, new).items():
        setattr(result, name, value)
    return result


def resized(fields: dict[str, Any], old: Geometry | None, new: Geometry) -> dict[str, Any]:
    """A processor's configuration for the new sizes.

    Sizes in pixels scale with the image, budgets of pixels with the area of a patch, counts of tokens with the grid.

    Args:
        fields: as in ``preprocessor_config.json`` or ``processor_config.json``.
        old: the geometry that the configuration is for; read off ``fields`` if it is not known.
        new: the geometry that it shall be for.
    """
    if old is None:
        old = _read(fields, new)
    result = copy.deepcopy(fields)
    patches = (old.patch_size[-2:], new.patch_size[-2:])
    free = new.image_size is None
    for name, value in result.items():
        if name in PARTS and isinstance(value, dict):
            result[name] = resized(value, old, new)
        elif value is None or isinstance(value, bool):
            continue
        elif name == "patch_size":
            result[name] = _scaled(value, *patches)
        elif name == "temporal_patch_size" and len(new.patch_size) == 3:
            result[name] = new.patch_size[0]
        elif name in MULTIPLES and isinstance(value, int) and value > 1 and value % patches[0][0] == 0:
            result[name] = value // patches[0][0] * patches[1][0]
        elif name in BUDGETS or (name == "size" and free and "patch_size" in fields):
            result[name] = _budget(value, *patches)
        elif name in PIXELS and old.image_size is not None and new.image_size is not None:
            result[name] = _scaled(value, old.image_size[-2:], new.image_size[-2:])
        elif name in ("num_frames", "frames_per_clip") and len(new.patch_size) == 3 and new.image_size is not None:
            result[name] = new.image_size[0]
        elif name in COUNTS and isinstance(value, int) and old.grid is not None and new.grid is not None:
            result[name] = value * math.prod(new.grid) // math.prod(old.grid)
    if {"num_mel_bins", "max_length"} <= result.keys() and new.image_size is not None:
        result["num_mel_bins"], result["max_length"] = new.image_size
    return result


def _read(fields: dict[str, Any], new: Geometry) -> Geometry:
    """The geometry that a processor's configuration is for, as far as it tells."""
    patch = new.patch_size
    if fields.get("patch_size") is not None:
        patch = (*patch[:-2], *_sides(fields["patch_size"], patch[-2:]))
    image = new.image_size
    for name in ("crop_size", "size"):
        if image is not None and fields.get(name) is not None:
            image = (*image[:-2], *_sides(fields[name], image[-2:]))
            break
    return Geometry(patch, image)


def _sides(value: Any, fallback: Size) -> Size:
    if isinstance(value, int):
        return (value, value)
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return tuple(value)
    if isinstance(value, dict):
        if value.get("height") and value.get("width"):
            return (value["height"], value["width"])
        edge = value.get("longest_edge") or value.get("shortest_edge")
        if edge and not (value.get("longest_edge") and value.get("shortest_edge")):
            return (edge, edge)
    return fallback


def _scaled(value: Any, old: Size, new: Size) -> Any:
    """A size in any of the forms that processors keep it in, scaled."""
    height, width = (n / o for n, o in zip(new, old, strict=True))
    if isinstance(value, int):
        return round(value * min(height, width)) if height == width or value != old[0] else min(new)
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], (list, tuple)):
            return type(value)(_scaled(pair, old, new) for pair in value)
        return type(value)(round(side * scale) for side, scale in zip(value, (height, width), strict=True))
    if isinstance(value, dict):
        scales = {"height": height, "width": width, "max_height": height, "max_width": width}
        return {
            k: v
            if v is None
            else round(v * scales.get(k, max(height, width) if "longest" in k else min(height, width)))
            for k, v in value.items()
        }
    return value


def _budget(value: Any, old: Size, new: Size) -> Any:
    """A number of pixels, or bounds on it, for the same number of patches."""
    if isinstance(value, dict):
        return {k: None if v is None else _budget(v, old, new) for k, v in value.items()}
    return value * math.prod(new) // math.prod(old)
