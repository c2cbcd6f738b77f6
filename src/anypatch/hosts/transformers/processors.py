"""transformers' image, video and feature processors: their sizes follow the model's.

One rule, whoever applies it (``save`` beside a model, ``save`` with a processor, ``convert``): what a processor says
now decides. Where it already makes images of the model's size, it is left alone. Where it does not, all its sizes in
pixels scale by one factor, so that what is cropped or padded to becomes the model's image size and the share that is
cropped away stays; where the image size did not change, they stay.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from anypatch.core.geometry import Geometry, Size
from anypatch.errors import CheckpointError
from anypatch.files.configs import read_json

# Sizes in pixels. Those in FRAMES say, the first that is there, how large the images are that the model gets.
FRAMES = ("crop_size", "max_image_size", "size", "pad_size", "image_size")
PIXELS = (*FRAMES, "min_image_size", "tile_size", "image_grid_pinpoints")
MASKS = ("mask_size", "mask_pad_size")  # of SAM's masks, which have a fixed number of entries per token
BUDGETS = ("min_pixels", "max_pixels")
MULTIPLES = ("ensure_multiple_of", "size_divisor", "size_divisibility", "pad_size_divisor")
COUNTS = ("image_seq_length", "image_seq_len", "num_image_tokens", "max_num_patches")
FIELDS = ("patch_size", *COUNTS)  # that processors which hold others keep for themselves
PARTS = ("image_processor", "video_processor", "feature_extractor")
FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def texts(source: Path, old: Geometry | None, new: Geometry) -> dict[str, str]:
    """The configurations of the processors in a directory that change, by file name.

    Args:
        source: the directory.
        old: the geometry of the model that it holds, where that is known.
        new: the geometry to follow.

    Raises:
        CheckpointError: one is damaged, or says sizes that are none.
    """
    result = {}
    for name in FILES:
        if (source / name).is_file():
            fields = read_json(source / name)
            try:
                found = resized(fields, old, new)
            except Exception as error:
                raise CheckpointError(
                    f"{source / name} says sizes that no image has: {type(error).__name__}: {error}"
                ) from error
            if found != fields:
                result[name] = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    return result


def follow(processor: Any, old: Geometry | None, new: Geometry) -> Any:
    """A copy of a processor for the new geometry; ``old`` is the model's before, where that is known."""
    parts = [name for name in PARTS if hasattr(getattr(processor, name, None), "to_dict")]
    if not parts:
        return type(processor).from_dict(resized(processor.to_dict(), old, new))
    result = copy.copy(processor)
    fields: dict[str, Any] = {name: getattr(processor, name).to_dict() for name in parts}
    fields |= {n: getattr(processor, n) for n in FIELDS if getattr(processor, n, None) is not None}
    for name, value in resized(fields, old, new).items():
        setattr(result, name, type(getattr(processor, name)).from_dict(value) if name in parts else value)
    return result


def resized(fields: dict[str, Any], old: Geometry | None, new: Geometry) -> dict[str, Any]:
    """A processor's configuration for the new sizes.

    Sizes in pixels scale with the image, budgets of pixels with the area of a patch, counts of tokens with the grid.

    Args:
        fields: as in ``preprocessor_config.json`` or ``processor_config.json``.
        old: the geometry of the model before, where it is known; for what ``fields`` does not tell.
        new: the geometry to follow.
    """
    return _resized(fields, _said(fields, old, new), new, old)


def _resized(fields: dict[str, Any], said: Geometry, new: Geometry, old: Geometry | None) -> dict[str, Any]:
    result = copy.deepcopy(fields)
    before, after = said.image_size, new.image_size
    patches = (said.patch_size[-2:], new.patch_size[-2:])
    crops = fields.get("crop_size") is not None and fields.get("do_center_crop") is not False
    for name, value in fields.items():
        if name in PARTS and isinstance(value, dict):
            inner = _said(value, old, new, said)
            result[name] = _resized(value, inner, new, old)
        elif value is None or isinstance(value, bool):
            continue
        elif name == "patch_size":
            result[name] = _scaled(value, *patches)
        elif name == "temporal_patch_size" and len(new.patch_size) == 3:
            result[name] = new.patch_size[0]
        elif name in MULTIPLES and isinstance(value, int):
            result[name] = _multiple(value, *patches)
        elif name in BUDGETS or (name == "size" and after is None and "patch_size" in fields):
            result[name] = _budget(value, *patches)
        elif name in PIXELS and before is not None and after is not None:
            result[name] = _scaled(value, before[-2:], after[-2:], covers=crops, frame=name == "crop_size")
        elif name in MASKS and said.grid is not None and new.grid is not None:
            result[name] = _scaled(value, said.grid[-2:], new.grid[-2:])
        elif name in COUNTS and isinstance(value, int) and said.grid is not None and new.grid is not None:
            result[name] = _count(value, math.prod(said.grid), math.prod(new.grid))
        elif name in ("num_frames", "frames_per_clip") and after is not None and before != after and len(after) == 3:
            result[name] = after[0]
    if (
        {"num_mel_bins", "max_length"} <= result.keys()
        and after is not None
        and (old is None or old.image_size != after)
    ):
        result["num_mel_bins"], result["max_length"] = after
    return result


def _said(fields: dict[str, Any], old: Geometry | None, new: Geometry, outer: Geometry | None = None) -> Geometry:
    """The geometry that a processor's configuration is for: what it says itself, else the processor that holds it,
    else the model as it was."""
    known = outer or old or new
    patch, image = known.patch_size, (old or new).image_size
    own = fields.get("patch_size")
    if own is not None:
        patch = (*patch[:-2], *_sides(own, patch[-2:]))
    if new.image_size is None or (old is not None and old.image_size == new.image_size):
        return replace(new, patch_size=patch)  # the image did not change, and neither do sizes in pixels
    frame = image
    for name in FRAMES:
        if fields.get(name) is None or (name == "crop_size" and fields.get("do_center_crop") is False):
            continue
        if image is not None:
            frame = (*image[:-2], *_sides(fields[name], image[-2:]))
        break
    else:
        part = next((fields[n] for n in PARTS if isinstance(fields.get(n), dict)), None)
        if part is not None:
            frame = _said(part, old, new, known).image_size
    if frame == new.image_size and own is None and outer is None and "image_processor" not in fields:
        patch = new.patch_size  # it has followed already
    return replace(new, patch_size=patch, image_size=frame)


def _multiple(value: int, old: Size, new: Size) -> int:
    """What image sides are made multiples of: of the patch, where they were."""
    if value <= 1 or value % math.lcm(*new) == 0:
        return value
    if value % old[0] == 0:
        return value // old[0] * math.lcm(*new)
    return math.lcm(value, *new) if value < new[0] else math.lcm(*new) * max(1, round(value / math.lcm(*new)))


def _count(value: int, old: int, new: int) -> int:
    return value * new // old if value * new % old == 0 else value


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


def _scaled(value: Any, old: Size, new: Size, covers: bool = False, frame: bool = False) -> Any:
    """A size in any of the forms that processors keep it in, scaled.

    Args:
        value: the size.
        old, new: a size (height, width) before and after.
        covers: whether a crop of the new size is taken of it: then its shortest edge has to reach the longer side.
        frame: whether an int stands for height and width, which may differ afterwards.
    """
    if tuple(old) == tuple(new):
        return value
    height, width = (n / o for n, o in zip(new, old, strict=True))
    if isinstance(value, int):
        if height == width and new[0] == new[1]:
            return round(value * height)
        if frame:
            return {"height": round(value * height), "width": round(value * width)}
        if value == old[0] == old[1] and not covers:
            return min(new)
        return round(value * (max if covers else min)(height, width))
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], (list, tuple)):
            return type(value)(_scaled(pair, old, new) for pair in value)
        return type(value)(round(side * scale) for side, scale in zip(value, (height, width), strict=True))
    if isinstance(value, dict):
        scales = {"height": height, "width": width, "max_height": height, "max_width": width}
        short, long = min(height, width), max(height, width)
        if covers:
            short = max(side * scale for side, scale in zip(old, (height, width), strict=True)) / min(old)
        edges = {"shortest_edge": short, "longest_edge": long}
        return {k: v if v is None else round(v * scales.get(k, edges.get(k, short))) for k, v in value.items()}
    return value


def _budget(value: Any, old: Size, new: Size) -> Any:
    """A number of pixels, or bounds on it, for the same number of patches."""
    if isinstance(value, dict):
        return {k: None if v is None else _budget(v, old, new) for k, v in value.items()}
    return value * math.prod(new) // math.prod(old)
