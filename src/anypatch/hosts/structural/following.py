"""Attributes of hand-made modules that follow a geometry: by their names, where they have the present value."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from anypatch.core.geometry import Geometry, Size, show
from anypatch.errors import GeometryError

PATCH_NAMES = {"patch_size", "patch_sizes", "patch_dim_size", "patch", "encoder_stride"}
TIME_NAMES = {"tubelet_size", "tubelet", "temporal_patch_size"}
IMAGE_NAMES = {"img_size", "image_size", "input_size", "input_resolution", "image_resolution", "resolution"}
FRAME_NAMES = {"num_frames", "frames", "all_frames", "n_frames"}
GRID_NAMES = {"grid_size", "grid", "patches_resolution", "patch_resolution", "grid_shape", "patch_grid", "feat_size"}
COUNT_NAMES = {
    "num_patches",
    "n_patches",
    "num_patch",
    "seq_len",
    "seq_length",
    "sequence_length",
    "num_tokens",
    "n_tokens",
    "num_positions",
    "n_positions",
    "num_pos",
}

# Further names that people give these values in modules around a model; they count only with the very value.
STRIDE = re.compile(
    r"(^|_)(patch(_?(size|h|w|height|width))?|psize|ps|(vit_|feat(ure)?_|output_|out_|total_|backbone_)?strides?"
    r"|(down|up)(sample|scale|sampling)?_?(ratio|factor|rate|scale)|pixels_per_(patch|token))$"
    r"|(^|_)(cell|tile)(_?(size|stride|h|w|height|width))?$|(^|_)token_?(size|stride)$"
    r"|^(upsample|downsample|upscale|downscale|upsampling|scale(_?factor)?|up|_?p)$",
    re.I,
)
SIDE = re.compile(
    r"(^|_)(grid|map|feat(ure)?s?|token|spatial|patch(es)?|img|image|im|input|output|out|crop|target)"
    r"_?(size|shape|side|h|w|hw|height|width|res(olution)?)$"
    r"|^(num_|n_)?(h|w|hw|hp|wp|height|width|rows|cols|columns|sides?)$|^(size|shape|sz|res(olution)?)$"
    r"|(^|_)(h|w|hp|wp|nh|nw|height|width|rows?|cols?)_?(tok(en)?s|patches|cells|grid|feats?|features?)$"
    r"|(tok(en)?s|patches|cells)_(h|w|height|width|rows|cols|(per|each)_(side|row|col|column|axis))$",
    re.I,
)
# A count of tokens has one of these words, and none that makes it another number.
COUNTED = re.compile(r"tok(en)?s?|patch(es)?|pos(itions?)?|seq(uence)?|cells|[nl]|len(gth)?")
NOT_COUNTED = re.compile(
    r"dims?|width|channels?|heads?|ids?|idx|ind(ex|ices)|vocab|class(es)?|size|side|h|w|height|width|rows?|cols?|columns|"
    r"text|txt|captions?|words?|context|prompts?|lang(uage)?|llm|sentences?|per|stride|batch|embed|mlp|depth|layers?|mask(ed|s)?|keep|drop|extra|prefix|cls|reg(isters?)?|quer(y|ies)"
)
PIXELS = re.compile(r"pix(els?)?|area|patch")
NOT_PIXELS = re.compile(r"win(dows?)?|blocks?|regions?|anchors?|box(es)?")  # the area of something else
# Which axis a side is of, by a word of its name: rows before columns, as sizes have them.
AXES = {"h": 0, "height": 0, "hp": 0, "nh": 0, "rows": 0, "row": 0} | dict.fromkeys(
    ("w", "width", "wp", "nw", "cols", "columns", "col"), 1
)
SCALE = re.compile(r"(^|_)spatial_scale$|^scale(_factor)?$", re.I)  # of image coordinates to the map: 1 / patch
# A patch of one or two pixels says nothing under such names: factors of that size are everywhere.
TELLING = 3


def entries(holder: Any, depth: int = 0) -> Iterator[tuple[Any, str, Any]]:
    """Plain values on a module, and in the dictionaries, lists and configuration objects it holds."""
    mapping = holder if isinstance(holder, dict) else vars(holder)
    hidden = vars(nn.Module()) if isinstance(holder, nn.Module) else {}
    for name, value in list(mapping.items()):
        if not isinstance(name, str) or name in hidden:
            continue
        yield mapping, name, value
        items = value if isinstance(value, list) else [value]
        for item in items:
            if depth < 2 and _holds_values(item):
                yield from entries(item, depth + 1)


def _holds_values(item: Any) -> bool:
    if isinstance(item, (nn.Module, Tensor, type)) or callable(item):
        return False
    return isinstance(item, dict) or hasattr(item, "__dict__")


def kinds(old: Geometry, new: Geometry) -> Iterator[tuple[set[str], list[Any], list[Any]]]:
    """Names, and the values that attributes of those names have at the two geometries, in corresponding order."""
    yield PATCH_NAMES, *_sizes(old.patch_size, new.patch_size)
    if len(old.patch_size) == 3:
        yield TIME_NAMES, [old.patch_size[0]], [new.patch_size[0]]
    if old.image_size is not None and new.image_size is not None:
        yield IMAGE_NAMES, *_sizes(old.image_size, new.image_size)
        if len(old.image_size) == 3:
            yield FRAME_NAMES, [old.image_size[0]], [new.image_size[0]]
    if old.grid is None or new.grid is None:
        return
    yield GRID_NAMES | IMAGE_NAMES, *_sizes(old.grid, new.grid)
    yield COUNT_NAMES, [*counts(old), *counts(old, 2)], [*counts(new), *counts(new, 2)]


def counts(geometry: Geometry, axes: int = 0) -> tuple[int, int]:
    """Numbers of tokens: of the grid alone, and with those before it; ``axes=2`` counts one frame of a clip."""
    tokens = math.prod((geometry.grid or ())[-axes:])
    return tokens, tokens + geometry.prefix_tokens


def _sizes(old: Size, new: Size) -> tuple[list[Any], list[Any]]:
    """A size in the forms that attributes have: all axes, two axes, and one int for both."""
    return [old, old[-2:], _one(old)], [new, new[-2:], _one(new)]


def _one(size: Size) -> Any:
    return size[-1] if size[-1] == size[-2] else None


def follow(value: Any, present: list[Any], following: list[Any], full: str) -> Any:
    """The value an attribute takes, or ``None`` where it does not follow the geometry."""
    if type(value) is int:
        for old, new in zip(present, following, strict=True):
            if value != old:
                continue
            if new is None:
                raise GeometryError(
                    f"{full} is one number for both axes ({value}): this model takes square sizes only, not "
                    f"{show(following[1])}"
                )
            return new
        return None
    size = ints(value)
    if size is None:
        return None
    if len(size) == 1:  # the shorter side, as torchvision's transforms keep it
        after = follow(size[0], present, following, full)
        return None if after is None else type(value)([after])
    for old, new in zip(present, following, strict=True):
        if isinstance(old, tuple) and size[-len(old) :] == old and len(size) <= len(old) + 1:
            return type(value)([*size[: -len(old)], *new])
    return None


def carries(name: str, value: Any, old: Geometry, new: Geometry, full: str) -> Any:
    """What becomes of a value with the name and size of a patch, an image, a grid or a count; ``None`` for others.

    The names are wider than those of :func:`kinds`: people's own, around a model.
    """
    for names, present, following in kinds(old, new):
        if name in names and value is not None:
            changed = follow(value, present, following, full)
            if changed is not None:
                return changed
    if isinstance(value, float):
        return _scale(name, value, old, new, full)
    levels = _pyramid(name, value, old, new, full)
    if levels is not None:
        return levels
    for pattern, a, b in _wider(old, new):
        if pattern.search(name) and min(a) >= TELLING:
            changed = _on_axis(name, value, a, b, full)
            if changed is not None:
                return changed
    return _counted(name, value, old, new) if type(value) is int else None


def _counted(name: str, value: int, old: Geometry, new: Geometry) -> int | None:
    """A count of tokens, or of the pixels of a patch or an image, by the words of its name."""
    words = [word for word in re.split(r"_+|(?<=[a-z])(?=[A-Z])", name) if word]
    words = [word.lower() for word in words]
    tokens = any(COUNTED.fullmatch(word) for word in words) and not any(NOT_COUNTED.fullmatch(word) for word in words)
    if tokens and old.grid is not None and new.grid is not None:
        for before, after in zip(counts(old), counts(new), strict=True):
            if value == before and value > TELLING**2:
                return after
    if not any(PIXELS.fullmatch(word) for word in words) or any(NOT_PIXELS.fullmatch(word) for word in words):
        return None
    area, image = math.prod(old.patch_size[-2:]), old.image_size
    if area > TELLING**2 and value == area:
        return math.prod(new.patch_size[-2:])
    if image is not None and new.image_size is not None and value == math.prod(image[-2:]):
        return math.prod(new.image_size[-2:])
    return None


def _wider(old: Geometry, new: Geometry) -> Iterator[tuple[re.Pattern[str], Size, Size]]:
    yield STRIDE, old.patch_size[-2:], new.patch_size[-2:]
    if old.image_size is not None and new.image_size is not None:
        yield SIDE, old.image_size[-2:], new.image_size[-2:]
    if old.grid is not None and new.grid is not None:
        yield SIDE, old.grid[-2:], new.grid[-2:]


def _on_axis(name: str, value: Any, old: Size, new: Size, full: str) -> Any:
    """A size of two axes, of one, or of one that the name tells."""
    words = name.lower().split("_")
    axis = AXES.get(
        words[-1], AXES.get(words[0] if len(words) > 1 else "", AXES.get(words[-2] if len(words) > 2 else ""))
    )
    if axis is not None and type(value) is int:
        return new[axis] if value == old[axis] else None
    return follow(value, [old, _one(old)], [new, _one(new)], full)


def _scale(name: str, value: float, old: Geometry, new: Geometry, full: str) -> float | None:
    """A factor between pixels and tokens, as ``Upsample`` or ``RoIAlign`` have it."""
    patch = old.patch_size[-1]
    if patch < TELLING or (not SCALE.search(name) and not STRIDE.search(name)):
        return None
    if value not in (float(patch), 1 / patch):
        return None
    after = follow(patch, [old.patch_size[-2:], patch], [new.patch_size[-2:], _one(new.patch_size)], full)
    return float(after) if value == patch else 1 / after


def _pyramid(name: str, value: Any, old: Geometry, new: Geometry, full: str) -> Any:
    """Strides of the levels of a pyramid made of the patches' map: each is as many patches as it was.

    ``(4, 8, 16)`` at patch 8, with pairs in place of numbers, or by the names of the levels. Strides that follow one
    another (``(4, 2, 2, 2)``) do not grow, and are none.
    """
    named = isinstance(value, dict)
    if not STRIDE.search(name) or not (named or isinstance(value, (list, tuple))):
        return None
    held = list(value.values()) if named else list(value)
    levels = ints([item[0] if _is_square(item) else item for item in held])
    patch, after = _one(old.patch_size), _one(new.patch_size)
    if levels is None or len(levels) < 2 or patch not in levels or patch < TELLING:
        return None
    if any(b <= a or b % a or (b // a) & (b // a - 1) for a, b in itertools.pairwise(levels)):
        return None
    if after is None or any(level * after % patch for level in levels):
        raise GeometryError(
            f"{full} are the strides of a pyramid over patches of {patch} ({levels}), which would be no whole numbers "
            f"at patch {show(new.patch_size)}: set them by hand, or adapt the model inside on its own"
        )
    sides = [level * after // patch for level in levels]
    made = [type(item)((side, side)) if _is_square(item) else side for item, side in zip(held, sides, strict=True)]
    return dict(zip(value, made, strict=True)) if named else type(value)(made)


def _is_square(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2 and item[0] == item[1]


def ints(value: Any) -> Size | None:
    if isinstance(value, (tuple, list)) and value and all(type(v) is int and v > 0 for v in value):
        return tuple(value)
    return None


def is_record(value: Any) -> bool:
    """Whether a value is a collection of settings (a dictionary, a namespace, a configuration), not a trainer."""
    if isinstance(value, (dict, list)):
        return True
    named = type(value).__name__.lower().endswith(("namespace", "config", "args", "params", "cfg", "settings"))
    return hasattr(value, "__dict__") and (named or hasattr(value, "__dataclass_fields__"))
