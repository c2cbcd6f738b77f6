"""What is linear between pixels and tokens in a model of timm, and the geometry that it gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from anypatch.core.adapters import beneath, innermost
from anypatch.core.geometry import Geometry, Size, show
from anypatch.core.pixelwise import is_pixelwise, moves_pixels
from anypatch.errors import GeometryError, UnsupportedModelError
from anypatch.hosts.base import class_tokens, comes_from, pair
from anypatch.hosts.timm.facts import row
from anypatch.hosts.timm.private import core_of, record, recorded, traits

NAME = "timm"


@dataclass(frozen=True)
class Stem:
    """What is linear between pixels and tokens.

    Attributes:
        geometry: the model's geometry.
        paths: the projections, as module paths in the model that timm builds.
        refusal: why the patch cannot change, where it cannot.
        unit: pixels per entry of the map that the projection sees; more than one behind a backbone.
        grids: grids of further branches, at a geometry.
        whole: whether exactness needs whole multiples of the patch (padding, cropping).
    """

    geometry: Geometry
    paths: tuple[str, ...] = ()
    refusal: str | None = None
    unit: Size = (1, 1)
    grids: Callable[[Geometry], list[Size]] = field(default=lambda geometry: [])
    whole: bool = False


def stem_of(model: Any) -> Stem:
    """What is linear between a model's pixels and its tokens.

    Raises:
        UnsupportedModelError: nothing is; the message names the first layer.
    """
    core = core_of(model)
    known, path = row(core), first_layer(model)
    if backbone_of(core) is not None:
        return _behind_backbone(model, core.patch_embed)
    if known.convolutions:
        return _of_convolutions(model, core.patch_embed, path)
    projection = None if path is None else layer_at(model, path)
    if path is None or not isinstance(projection, (_ConvNd, nn.Linear)):
        first = next((f": {name} is {layer}" for name, layer in core.named_modules() if isinstance(layer, _ConvNd)), "")
        raise UnsupportedModelError(
            f"{title_of(model)} has no patch embedding that anypatch can find: timm names no convolution or linear "
            f"layer as the first that sees pixels{first}"
        )
    if isinstance(projection, nn.Linear) or known.pixels:
        size = getattr(getattr(core, known.pixels) if known.pixels else _parent(model, path), "patch_size", None)
        if size is None:
            raise UnsupportedModelError(f"{path} of {title_of(model)} is a linear layer whose patch size is not known")
        return Stem(_geometry(model, pair(size), pair(size), path), (path,), whole=known.whole)
    outer = core.get_submodule(path)
    if not comes_from(outer, NAME) and not is_pixelwise(beneath(outer), projection):
        raise UnsupportedModelError(moves_pixels(path, outer))
    geometry = _geometry(model, tuple(projection.stride), tuple(projection.kernel_size), path)
    if known.overlapping:
        return Stem(replace(geometry, explicit_grid=tuple(core.patch_embed.grid_size)), (path,))
    _require_apart(model, path, projection)
    if known.branches:
        paths = tuple(f"patch_embed.{i}.proj" for i in range(core.num_branches))
        grids = partial(_other_grids, core)
        return Stem(replace(geometry, prefix_tokens=1), paths, grids=grids, whole=known.whole)
    fixed = f"{title_of(model)} {known.fixed_patch}: only its image_size can change" if known.fixed_patch else None
    return Stem(geometry, (path,), fixed)


def _of_convolutions(model: Any, embed: nn.Module, path: str | None) -> Stem:
    """Several convolutions, whose strides together are the patch."""
    convolutions = [m for m in embed.modules() if isinstance(m, _ConvNd)]
    patch = tuple(math.prod(c.stride[axis] for c in convolutions) for axis in (0, 1))
    reason = (
        f"patch_embed of {type(core_of(model)).__name__} is {len(convolutions)} convolutions with activations between "
        f"them, not one linear map per patch: only its image_size can change"
    )
    return Stem(_geometry(model, patch, patch, path), refusal=reason)


def _require_apart(model: Any, path: str, projection: _ConvNd) -> None:
    """Patches may neither overlap nor reach over the border.

    Raises:
        UnsupportedModelError: they do; the message says how.
    """
    stride, kernel = tuple(projection.stride), tuple(projection.kernel_size)
    if not isinstance(projection.padding, str) and not any(projection.padding) and kernel == stride:
        return
    others = sum(isinstance(m, _ConvNd) for m in core_of(model).modules()) - 1
    more = f", and {others} more convolutions follow it" if others > 1 else ""
    raise UnsupportedModelError(
        f"{path} of {title_of(model)} is an overlapping convolution (kernel {show(kernel)}, stride {show(stride)}, "
        f"padding {projection.padding}){more}: its stem is not one linear map per patch"
    )


def _behind_backbone(model: Any, embed: Any) -> Stem:
    """A convolutional backbone, then a projection of its feature map: only the projection is linear."""
    if hasattr(embed, "feature_ratio"):
        unit, entries = pair(embed.feature_ratio), pair(embed.patch_size)
    else:
        unit, entries = tuple(embed.conv[0].stride), tuple(embed.proj.stride)
    patch = tuple(u * p for u, p in zip(unit, entries, strict=True))
    geometry = _geometry(model, patch, patch, "patch_embed.proj")
    if isinstance(embed.proj, nn.Identity):
        return Stem(
            geometry,
            refusal=f"{title_of(model)} has no projection after patch_embed.backbone ({type(embed.backbone).__name__}"
            f"), which is not one linear map per patch: only its image_size can change",
        )
    return Stem(geometry, ("patch_embed.proj",), unit=unit)


def backbone_of(core: Any) -> str | None:
    """Name of the convolutions inside the patch embedding that come before its projection: hybrids', VOLO's."""
    name = row(core).before
    return name if hasattr(getattr(core, "patch_embed", None), name) else None


def _geometry(model: Any, patch: Size, kernel: Size, path: str | None) -> Geometry:
    core = core_of(model)
    prefix = getattr(core, "num_prefix_tokens", None)
    if prefix is None:
        prefix = class_tokens(core)
    return Geometry(patch, _image_size(model, path), prefix, NAME, kernel_size=kernel)


def title_of(model: Any) -> str:
    return f"{type(core_of(model)).__name__} ({model.pretrained_cfg['architecture']})"


def first_layer(model: Any) -> str | None:
    """Path of the layer that timm itself names as the first that sees pixels, in the model without wrappers."""
    name = traits(model).get("first_conv") or model.pretrained_cfg.get("first_conv")
    if isinstance(name, (tuple, list)):
        name = name[0] if name else None
    core = core_of(model)
    names = [name] if isinstance(name, str) else []
    # encoders that timm lists without naming a first layer; feature extractors that flatten the stem
    names += ["patch_embed.proj", "patch_embed.input_proj"]
    names += [n.replace(".", "_") for n in names]
    for candidate in names:
        try:
            layer = core.get_submodule(candidate)
        except AttributeError:
            continue
        if candidate == name or isinstance(unwrapped(layer), (_ConvNd, nn.Linear)):
            return candidate
    return None


def unwrapped(layer: nn.Module) -> nn.Module:
    """The layer inside an adapter, or inside a module of the user's."""
    return layer if comes_from(layer, NAME) else innermost(layer)


def layer_at(model: Any, path: str) -> nn.Module:
    return unwrapped(core_of(model).get_submodule(path))


def _parent(model: Any, path: str) -> nn.Module:
    return core_of(model).get_submodule(path.rpartition(".")[0])


def _image_size(model: Any, path: str | None) -> Size:
    core = core_of(model)
    parent = None if path is None else _parent(model, path)
    for size in (
        getattr(parent, "img_size", None),
        getattr(getattr(core, "patch_embed", None), "img_size", None),
        traits(model).get("img_size"),
        getattr(core, "img_size", None),
    ):
        if isinstance(size, int):
            return (size, size)
        if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(s, int) for s in size):
            return tuple(size)
    return tuple(model.pretrained_cfg.get("input_size", (3, 224, 224))[-2:])


def branches(core: Any, geometry: Geometry) -> list[tuple[int, Size]]:
    """CrossViT's branches at a geometry, as (patch, grid).

    ``patch_size`` and ``image_size`` are those of the first branch; the others scale in proportion.
    """
    assert geometry.image_size is not None
    first = geometry.patch_size[0]
    if geometry.patch_size != (first, first):
        raise UnsupportedModelError(f"CrossVit takes square patches only, got {show(geometry.patch_size)}")
    base = core.patch_embed[0].patch_size[0]
    found = []
    for i, embed in enumerate(core.patch_embed):
        patch = Fraction(embed.patch_size[0] * first, base)
        if patch.denominator != 1:
            raise GeometryError(
                f"patch_size {first} would give branch {i} patches of {float(patch):.4g} pixels (they scale in "
                f"proportion, {base} to {embed.patch_size[0]}): use a multiple of "
                f"{base // math.gcd(base, embed.patch_size[0])}"
            )
        sides = [
            Fraction(scaled, own) * side
            for scaled, own, side in zip(core.img_size_scaled[i], core.img_size, geometry.image_size, strict=True)
        ]
        if any(side % patch for side in sides):
            raise GeometryError(
                f"image_size {show(geometry.image_size)} gives branch {i} an image of "
                f"{show(tuple(int(s) for s in sides))}, which its patch_size {patch} does not divide"
            )
        found.append((int(patch), tuple(int(side / patch) for side in sides)))
    return found


def channels_of(model: Any) -> int:
    """Channels of the input."""
    path = first_layer(model)
    layer = None if path is None else layer_at(model, path)
    channels = getattr(core_of(model), "in_chans", None) or getattr(layer, "in_channels", None)
    return int(channels or model.pretrained_cfg["input_size"][0])


def _other_grids(core: Any, geometry: Geometry) -> list[Size]:
    """Grids of the branches after the first."""
    return [grid for _, grid in branches(core, geometry)[1:]]


def arguments_of(model: Any) -> dict[str, Any]:
    """What ``timm.create_model`` was called with, brought up to date."""
    arguments = record(model)
    for name in ("num_classes", "in_chans"):
        if isinstance(getattr(model, name, None), int) and not arguments.get("features_only"):
            arguments[name] = getattr(model, name)
    if not recorded(model):
        arguments.setdefault("in_chans", channels_of(model))
    return arguments
