"""What the structural rule finds in a live model: its geometry, tables and pixel heads."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from anypatch.core import history
from anypatch.core.geometry import Geometry, Size
from anypatch.hosts.base import ancestors, class_tokens
from anypatch.hosts.flattening import pixel_heads
from anypatch.hosts.structural.following import FRAME_NAMES, IMAGE_NAMES, entries, ints
from anypatch.hosts.structural.stems import require_vit, stem_of, stems_of
from anypatch.hosts.structural.tables import (
    CONVOLUTIONS,
    Table,
    find_tables,
    is_relative,
    position_tensors,
)
from anypatch.hosts.structural.unnamed import Bound, bound_by

NAME = "generic"
NOTE = "_anypatch_image"  # on the stem of a model that was brought to a rectangle: its image size, its prefix tokens


@dataclass(frozen=True)
class Layout:
    """What the structural rule found in a live model."""

    geometry: Geometry
    stem: str
    part: str
    tables: tuple[Table, ...]
    heads: dict[str, tuple[int, str]]  # pixel heads: path -> (channels, flattening order, "" where unknown)
    stems: tuple[str, ...]  # the stem and whatever else cuts the same patches out of pixels
    width: int  # values of a token
    bound: Bound | None = None  # the model runs at one number of tokens alone, and no name tells why or on what grid


def layout_of(model: nn.Module) -> Layout:
    stem = stem_of(model)
    conv = model.get_submodule(stem)
    assert isinstance(conv, CONVOLUTIONS)
    patch = tuple(conv.stride)
    image = _image_size(model, stem, conv)
    if image is None:
        image = _image_noted(model, stem, patch) or _image_from_table(model, stem, patch)
    geometry = Geometry(patch, image, 0, NAME)
    part, tables = find_tables(model, stem, geometry)
    bound = None if tables else bound_by(model, stem, geometry.grid)
    if bound is not None and bound.grid is not None:
        image = tuple(side * p for side, p in zip(bound.grid, patch, strict=True))
        geometry = Geometry(patch, image, 0, NAME)
        part, tables = find_tables(model, stem, geometry, bound.places)
    prefix = next((t.prefix for t in tables if len(t.axes) == 1 and t.prefix >= 0), None)
    if prefix is None:
        prefix = class_tokens(model.get_submodule(part))
    require_vit(model, stem, tables)
    heads = pixel_heads(model, conv)
    return Layout(
        replace(geometry, prefix_tokens=prefix),
        stem,
        part,
        tables,
        heads,
        stems_of(model, stem),
        conv.out_channels,
        bound,
    )


def _image_size(model: nn.Module, stem: str, conv: nn.Module) -> Size | None:
    """The image size that the modules around the stem record."""
    axes = len(conv.stride)  # type: ignore[arg-type]
    side = None
    frames = None
    for ancestor in ancestors(stem):
        for _, name, value in entries(model.get_submodule(ancestor)):
            if name in FRAME_NAMES and type(value) is int:
                frames = frames or value
            if name not in IMAGE_NAMES:
                continue
            size = (value, value) if type(value) is int else ints(value)
            if size is None:
                continue
            if len(size) == 3 and axes == 2 and size[0] == conv.in_channels:
                size = size[1:]
            if len(size) in (2, axes) and all(s >= p for s, p in zip(size[::-1], conv.stride[::-1], strict=False)):  # type: ignore[index]
                side = side or size
    if side is None or len(side) == axes:
        return side
    return None if frames is None else (frames, *side)


def note(model: nn.Module, layout: Layout, geometry: Geometry) -> list[tuple[nn.Module, str, Any]]:
    """What copies and pickles of a model have to bring along to know a rectangle, whose table looks like a square's.

    Returns:
        (module, attribute, value): of the stem, which any part that can be adapted has; nothing where the model says
        its image size itself.
    """
    conv = model.get_submodule(layout.stem)
    image = geometry.image_size
    if image is None or _image_size(model, layout.stem, conv) is not None:
        return []
    if len(set(geometry.grid or ())) < 2 and NOTE not in vars(conv):
        return []
    return [(conv, NOTE, (image, geometry.prefix_tokens))]


def _image_noted(model: nn.Module, stem: str, patch: Size) -> Size | None:
    """The image size that the model was adapted to, if its tables are still over that grid."""
    written = vars(model.get_submodule(stem)).get(NOTE)
    known = [] if written is None else [Geometry(patch, written[0], written[1], NAME)]
    for noted in (*known, *(history.geometry(model.get_submodule(ancestor)) for ancestor in ancestors(stem))):
        if noted is None or noted.patch_size != patch or noted.image_size is None:
            continue
        part, tables = find_tables(model, stem, noted)
        over_tokens = [table for table in tables if len(table.axes) == 1 and table.prefix >= 0]
        if all(table.prefix == noted.prefix_tokens for table in over_tokens) and (
            tables or not any(t.ndim > 1 for *_, t in position_tensors(model, part))
        ):
            return noted.image_size
    return None


def _image_from_table(model: nn.Module, stem: str, patch: Size) -> Size | None:
    """A square image, from the length of the table nearest to the stem."""
    for ancestor in ancestors(stem):
        for path, name, tensor in position_tensors(model, ancestor):
            if len(patch) != 2 or tensor.ndim < 2 or is_relative(name):
                continue
            if tensor.ndim == 4:
                sides = tensor.shape[1:3] if tensor.shape[1] == tensor.shape[2] else tensor.shape[2:4]
                if sides[0] == sides[1]:
                    return tuple(s * p for s, p in zip(sides, patch, strict=True))
                continue
            known = class_tokens(model.get_submodule(path.rpartition(".")[0] if name == "weight" else path))
            for prefix in dict.fromkeys((known, 0, 1, 2)):
                side = math.isqrt(max(tensor.shape[-2] - prefix, 0))
                if side > 1 and side * side == tensor.shape[-2] - prefix:
                    return tuple(side * p for p in patch)
    return None
