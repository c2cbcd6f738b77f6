"""Models that no other file knows: hand-made ViTs, torch.hub repositories, and models that hold a known one.

There is no constructor to ask for twins here, so a twin is a copy of the live model, parameters on the meta device,
in which a structural rule has set what follows the geometry:

- the projection: the first convolution that sees pixels, whose kernel is its stride;
- position tables: parameters, buffers, embeddings or plain tensors named like one, over prefix tokens and the grid;
- attributes named like a patch size, an image size, a grid or a count, whose value is the present one;
- pixel heads (MAE's ``decoder_pred``), if the model's own ``unpatchify`` or ``patchify`` tells their order.

Whatever else has the size of the grid cannot be explained, and is an error that names it. Where a model holds one
model of a host library (``self.backbone = timm.create_model(...)``), that library's file describes it.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.account import Context, Extra
from anypatch.core.diff import AttributeEdit, ParameterEdit
from anypatch.core.geometry import Geometry, Size, show
from anypatch.core.roles import Facts
from anypatch.core.tables import ANTIALIASED, Sampling
from anypatch.core.twins import Subject, Twins
from anypatch.errors import GeometryError, UnsupportedModelError
from anypatch.hosts.base import Host, class_tokens
from anypatch.hosts.structural.following import FRAME_NAMES, IMAGE_NAMES, PATCH_NAMES, entries, follow, ints, kinds
from anypatch.hosts.structural.heads import pixel_heads
from anypatch.hosts.structural.probing import require_rectangular
from anypatch.hosts.structural.surroundings import Surroundings
from anypatch.hosts.structural.tables import (
    CONVOLUTIONS,
    TIME,
    Table,
    all_tensors,
    ancestors,
    enumerates,
    find_tables,
    is_relative,
    position_tensors,
    resampled,
    table_shape,
)

NAME = "generic"
PIXEL_CHANNELS = 4  # what an image has at most; a stem that reads more is known by cutting patches before anything else

EMBEDDING = re.compile(r"patch|stem|tokeni[sz]", re.I)
ATTENTION = re.compile(r"attention|attn", re.I)


@dataclass(frozen=True)
class Layout:
    """What the structural rule found in a live model."""

    geometry: Geometry
    stem: str
    part: str
    tables: tuple[Table, ...]
    heads: dict[str, tuple[int, str]]  # pixel heads: path -> (channels, flattening order, "" where unknown)
    stems: tuple[str, ...]  # the stem and whatever else cuts the same patches out of pixels


def recognises(model: nn.Module) -> bool:
    return any(isinstance(m, (*CONVOLUTIONS, nn.Linear)) for m in model.modules())


def subject(model: nn.Module) -> Subject:
    held = held_in(model)
    if held is not None:
        return held
    layout = layout_of(model)
    orders = {rf"^{re.escape(path)}\.(weight|bias)$": order for path, (_, order) in layout.heads.items() if order}
    facts = Facts(orders=orders, sampling=Sampling(antialias=False))  # as DINO, DINOv2 and MAE
    return Subject(model, layout.geometry, build=lambda g: _build(model, layout, g), facts=facts)


# -- a model that holds a host library's model -----------------------------------------------------------------


def held_in(model: nn.Module) -> Subject | None:
    """The one host library's model inside ``model``, described by that library's file."""
    from anypatch.hosts import HOSTS

    hosts = [host for host in HOSTS if host.name != NAME]
    found: list[tuple[str, Host, Subject]] = []
    for path, module in model.named_modules():
        if not path or any(path.startswith(f"{p}.") for p, *_ in found):
            continue
        for host in hosts:
            if host.recognises(module):
                try:
                    found.append((path, host, host.subject(module)))
                except UnsupportedModelError:
                    continue
                break
    if not found:
        return None
    if len(found) > 1:
        paths = ", ".join(path for path, *_ in found)
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {len(found)} models with a patch embedding ({paths}): adapt each on its own"
        )
    ((path, host, inner),) = found
    whole = f"{path}.{inner.path}" if inner.path else path
    return replace(inner, model=model, path=whole, about=(host, inner))


# -- the structural rule ---------------------------------------------------------------------------------------


def layout_of(model: nn.Module) -> Layout:
    stem = _stem(model)
    conv = model.get_submodule(stem)
    assert isinstance(conv, CONVOLUTIONS)
    patch = tuple(conv.stride)
    image = _image_size(model, stem, conv)
    if image is None:
        image = _image_from_table(model, stem, patch)
    geometry = Geometry(patch, image, 0, NAME)
    part, tables = find_tables(model, stem, geometry)
    prefix = next((t.prefix for t in tables if len(t.axes) == 1 and t.prefix >= 0), None)
    if prefix is None:
        prefix = class_tokens(model.get_submodule(part))
    _require_vit(model, stem, tables)
    heads = pixel_heads(model, conv)
    return Layout(replace(geometry, prefix_tokens=prefix), stem, part, tables, heads, _stems(model, stem))


def _stem(model: nn.Module) -> str:
    """The path of the first convolution that sees pixels.

    Raises:
        UnsupportedModelError: there is none, or the stem is not one linear map per patch.
    """
    spatial = {
        path: m
        for path, m in model.named_modules()
        if isinstance(m, CONVOLUTIONS) and max(m.kernel_size) > 1 and "lora_" not in path
    }
    if not spatial:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no patch embedding that anypatch can find: no convolution with a kernel "
            f"(of linear layers over flattened patches the flattening order is not known)"
        )
    path = _first(spatial)
    conv = spatial[path]
    padding = conv.padding if isinstance(conv.padding, str) else any(conv.padding)
    if conv.kernel_size != conv.stride or padding not in (False, "valid"):
        raise UnsupportedModelError(
            f"{path}, the first convolution, has kernel {show(conv.kernel_size)}, stride {show(conv.stride)} and "
            f"padding {conv.padding}: the stem is not one linear map per patch"
        )
    if set(conv.dilation) != {1} or conv.groups != 1:
        raise UnsupportedModelError(f"{path} is dilated or grouped: the stem is not one linear map per patch")
    for ancestor in ancestors(path)[:-1]:
        module = model.get_submodule(ancestor)
        named = EMBEDDING.search(ancestor.rpartition(".")[2]) or EMBEDDING.search(type(module).__name__)
        inside = [p for p in spatial if p.startswith(f"{ancestor}.")]
        if named and len(inside) > 1 and _is_embedding(module) and not _parallel([spatial[p] for p in inside]):
            raise UnsupportedModelError(
                f"{ancestor} ({type(module).__name__}) is {len(inside)} convolutions ({', '.join(inside[:3])}): the "
                f"stem is not one linear map per patch"
            )
    return path


def _first(spatial: dict[str, Any]) -> str:
    """The convolution that sees pixels: one that reads few channels, or one that cuts patches before any such."""
    for path, conv in spatial.items():
        if conv.in_channels <= PIXEL_CHANNELS or _cuts_patches(conv):
            return path
    return next(iter(spatial))


def _cuts_patches(conv: Any) -> bool:
    padding = conv.padding != "valid" if isinstance(conv.padding, str) else any(conv.padding)
    return conv.kernel_size == conv.stride and not padding


def _parallel(convs: list[Any]) -> bool:
    """Whether convolutions cut the same patches side by side (one per group of bands), none after another."""
    first = convs[0]
    return all(
        _cuts_patches(c)
        and (c.stride, c.out_channels) == (first.stride, first.out_channels)
        and c.in_channels != first.out_channels
        for c in convs
    )


def _stems(model: nn.Module, stem: str) -> tuple[str, ...]:
    """All convolutions that cut the stem's patches out of pixels: a second modality's, one per group of bands."""
    first: Any = model.get_submodule(stem)
    parent = stem.rpartition(".")[0]
    found = []
    for path, conv in model.named_modules():
        if not isinstance(conv, CONVOLUTIONS) or not _cuts_patches(conv) or conv.stride != first.stride:
            continue
        pixels = conv.in_channels <= PIXEL_CHANNELS or conv.in_channels == first.in_channels
        beside = path.rpartition(".")[0] == parent and conv.in_channels != first.out_channels
        if (pixels or beside) and conv.groups == 1 and "lora_" not in path:
            found.append(path)
    return tuple(found)


def _is_embedding(module: nn.Module) -> bool:
    """Whether a module embeds patches, rather than being a whole model with "patch" in its name."""
    return not any(isinstance(m, nn.MultiheadAttention) or ATTENTION.search(type(m).__name__) for m in module.modules())


def _require_vit(model: nn.Module, stem: str, tables: tuple[Table, ...]) -> None:
    if tables or EMBEDDING.search(stem):
        return
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) or ATTENTION.search(f"{path} {type(module).__name__}"):
            return
        if EMBEDDING.search(type(module).__name__) or "patch_size" in vars(module):
            return
    raise UnsupportedModelError(
        f"{type(model).__name__} has no patch embedding that anypatch can find: {stem} cuts the image into patches, "
        f"but neither positions nor attention follow"
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


# -- twins -----------------------------------------------------------------------------------------------------


def _build(model: nn.Module, layout: Layout, geometry: Geometry) -> nn.Module:
    old = layout.geometry
    _require_explained(model, layout, geometry)
    twin = _twin(model, layout, geometry)
    stem: Any = model.get_submodule(layout.stem)
    require_rectangular(lambda g: _twin(model, layout, g), stem.in_channels, old, geometry, type(model).__name__)
    return twin


def _twin(model: nn.Module, layout: Layout, geometry: Geometry) -> nn.Module:
    old = layout.geometry
    twin = _copy(model)
    if (geometry.patch_size, geometry.image_size) == (old.patch_size, old.image_size):
        return twin
    for path in layout.stems:
        _set_projection(twin, path, geometry)
    if geometry.grid is not None and geometry.grid != old.grid:
        for table in layout.tables:
            _set_table(twin, model, table, old, geometry)
    if geometry.patch_size != old.patch_size:
        _require_named(model, layout)
        for path, (channels, order) in layout.heads.items():
            _set_head(twin.get_submodule(path), path, channels, order, geometry)
    for path, module in twin.named_modules():
        _set_attributes(module, path, layout, geometry)
    _set_layers(twin, model, layout, geometry)
    return twin


def _set_layers(twin: nn.Module, model: nn.Module, layout: Layout, geometry: Geometry) -> None:
    """Layers that bring tokens back to pixels, pool by the patch or spread over the grid, as around other models."""
    widths = {m.normalized_shape[-1] for m in model.modules() if isinstance(m, nn.LayerNorm)}
    context = Context(Twins(model, twin, layout.geometry, geometry), frozenset(widths), None, ANTIALIASED)
    rule = Surroundings(context)
    spoken = {*layout.stems, *layout.heads}
    extras = [
        Extra(path, module, frozenset(), True)
        for path, module in model.named_modules()
        if path not in spoken and "lora_" not in path and not (layout.heads and isinstance(module, nn.PixelShuffle))
    ]
    for extra in extras:
        for edit in rule.layer(extra, extras):
            owner = twin.get_submodule(edit.path)
            if isinstance(edit, ParameterEdit):
                weight = owner._parameters[edit.name]
                assert weight is not None
                owner._parameters[edit.name] = _parameter(weight, tuple(edit.case.new_shape))
            elif isinstance(edit, AttributeEdit):
                vars(owner)[edit.name] = edit.after
    rule.require_no_cascade(extras)


def _copy(model: nn.Module) -> nn.Module:
    """A copy without hooks, its parameters on the meta device."""
    memo: dict[int, Any] = {}
    fresh = nn.Module()
    keep: list[Any] = []
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and (value.requires_grad or value.grad_fn is not None):
                memo[id(value)] = torch.empty_like(value, device="meta").detach()
            elif isinstance(value, dict) and name in vars(fresh) and name.endswith(("_hooks", "_kwargs", "_called")):
                memo[id(value)] = type(value)()
                keep.append(value)
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be copied: {error}") from error


def _parameter(old: Tensor, shape: Size) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=old.dtype, device="meta"), requires_grad=old.requires_grad)


def _set_projection(twin: nn.Module, path: str, geometry: Geometry) -> None:
    stem = twin.get_submodule(path)
    assert isinstance(stem, CONVOLUTIONS)
    old = (tuple(stem.kernel_size), stem.in_channels)
    wrapper = path.rpartition(".")[0] if path.endswith("base_layer") else path
    for module in twin.get_submodule(wrapper).modules():  # adapters over the projection read the same pixels
        if isinstance(module, CONVOLUTIONS) and (tuple(module.kernel_size), module.in_channels) == old:
            shape = (*module.weight.shape[:2], *geometry.patch_size)
            module._parameters["weight"] = _parameter(module.weight, shape)
            vars(module)["kernel_size"] = vars(module)["stride"] = geometry.patch_size


def _set_table(twin: nn.Module, model: nn.Module, table: Table, old: Geometry, new: Geometry) -> None:
    owner, live = twin.get_submodule(table.path), model.get_submodule(table.path)
    if table.name in owner._parameters:
        parameter = owner._parameters[table.name]
        assert parameter is not None
        owner._parameters[table.name] = _parameter(parameter, table_shape(table, tuple(parameter.shape), new))
        return
    tensor = live._buffers.get(table.name, vars(live).get(table.name))
    assert isinstance(tensor, Tensor)
    value = resampled(table, tensor.detach(), old, new)
    if table.name in owner._buffers:
        owner._buffers[table.name] = value
    else:
        vars(owner)[table.name] = value


def _set_head(head: nn.Module, path: str, channels: int, order: str, geometry: Geometry) -> None:
    if not order:
        raise UnsupportedModelError(
            f"{path} predicts the pixels of a patch, and neither unpatchify nor patchify of the model tells their order"
        )
    rows = channels * math.prod(geometry.patch_size)
    weight, bias = head._parameters["weight"], head._parameters.get("bias")
    assert weight is not None
    head._parameters["weight"] = _parameter(weight, (rows, *weight.shape[1:]))
    if bias is not None:
        head._parameters["bias"] = _parameter(bias, (rows,))
    vars(head)["out_features" if isinstance(head, nn.Linear) else "out_channels"] = rows


# -- attributes ------------------------------------------------------------------------------------------------


def _set_attributes(module: nn.Module, path: str, layout: Layout, new: Geometry) -> None:
    old = layout.geometry
    for mapping, name, value in entries(module):
        for names, present, following in kinds(old, new):
            if name == "reduction" and mapping is not vars(module) and value == max(old.patch_size[-2:]):
                mapping[name] = max(new.patch_size[-2:])  # as timm's feature_info has it
                continue
            if name in names and value is not None:
                changed = follow(value, present, following, f"{path}.{name}" if path else name)
                if changed is not None:
                    mapping[name] = changed
                    break
    if not type(module).__module__.startswith("torch."):  # a padding, say, that goes with the projection
        for name in ("kernel_size", "stride"):
            changed = follow(vars(module).get(name), *_sizes_of_patch(old, new), f"{path}.{name}")
            if changed is not None:
                vars(module)[name] = changed
    if isinstance(module, nn.PixelShuffle) and module.upscale_factor == old.patch_size[-1]:
        module.upscale_factor = new.patch_size[-1]
    if isinstance(module, nn.Embedding):
        module.num_embeddings = module.weight.shape[0]
    for name, buffer in module._buffers.items():
        length = enumerates(buffer, old)
        if buffer is not None and length is not None and new.grid is not None:
            length += math.prod(new.grid) - math.prod(old.grid or ())
            shape = (*buffer.shape[:-1], length)
            module._buffers[name] = torch.arange(length, dtype=buffer.dtype, device=buffer.device).expand(shape)


def _sizes_of_patch(old: Geometry, new: Geometry) -> tuple[list[Any], list[Any]]:
    return next((present, following) for names, present, following in kinds(old, new) if names is PATCH_NAMES)


# -- what the rule does not explain ----------------------------------------------------------------------------


def _require_named(model: nn.Module, layout: Layout) -> None:
    """What the patch itself decides must have been found by its name.

    Raises:
        UnsupportedModelError: patches are put together into pixels, or cut by another size; the message says where.
    """
    patch = layout.geometry.patch_size
    for path, module in model.named_modules():
        puts = callable(getattr(module, "unpatchify", None)) or isinstance(module, nn.Fold)
        puts = puts or (isinstance(module, nn.PixelShuffle) and module.upscale_factor == patch[-1])
        if puts and not layout.heads:
            raise UnsupportedModelError(
                f"{path or type(model).__name__} puts patches back together into pixels, and no layer that predicts "
                f"them is named like one"
            )
    for ancestor in ancestors(layout.stem):
        value = vars(model.get_submodule(ancestor)).get("patch_size")
        size = (value, value) if type(value) is int else ints(value)
        if size is not None and patch[-len(size) :] != size and size != patch:
            raise UnsupportedModelError(
                f"{ancestor + '.' if ancestor else ''}patch_size is {value}, but {layout.stem} cuts patches of "
                f"{show(patch)}: which of them follows cannot be told"
            )


def _require_explained(model: nn.Module, layout: Layout, new: Geometry) -> None:
    """Nothing else in the part that the stem belongs to may depend on the grid.

    Raises:
        UnsupportedModelError, GeometryError: something does; the message names it.
    """
    old = layout.geometry
    if old.grid is None or new.grid is None or old.grid == new.grid:
        return
    part = model.get_submodule(layout.part)
    tokens = math.prod(old.grid)
    counts = {tokens, tokens + old.prefix_tokens}
    known = {(t.path, t.name) for t in layout.tables}
    widths = {m.normalized_shape[-1] for m in part.modules() if isinstance(m, nn.LayerNorm)}
    stem = model.get_submodule(layout.stem)
    widths.add(stem.out_channels)  # type: ignore[arg-type]
    hint = 'use keep="grid", or sizes that keep the grid'
    if len(set(old.grid[-2:])) == 1 != len(set(new.grid[-2:])) and any(
        hasattr(m, "interpolate_pos_encoding") for m in part.modules()
    ):
        raise GeometryError(
            f"{type(part).__name__}.interpolate_pos_encoding takes its position table for a square grid, and "
            f"{show(new.image_size)} at patch {show(new.patch_size)} is a {show(new.grid)} one: adapt to a square "
            f"image, and the model itself interpolates for others"
        )
    for path, name, tensor in all_tensors(model, layout.part):
        full = f"{path}.{name}" if path else name
        if (path, name) in known or enumerates(tensor, old) is not None or _of_window(model, path, name, tensor, old):
            continue
        owner = model.get_submodule(path)
        if isinstance(owner, nn.Linear):
            if name == "weight" and owner.in_features in counts - widths:
                raise GeometryError(f"{full} mixes a fixed number of tokens ({owner.in_features}): {hint}")
        elif isinstance(owner, CONVOLUTIONS):
            if name == "weight" and tensor.shape[1] in counts - widths and set(owner.kernel_size) == {1}:
                raise GeometryError(f"{full} mixes a fixed number of tokens ({tensor.shape[1]}): {hint}")
        elif (
            is_relative(name)
            or _follows_time(name, tensor, old, new)
            or _may_span(owner, name, tensor) & (counts - widths)
        ):
            raise UnsupportedModelError(
                f"{full}, of shape {tuple(tensor.shape)}, may depend on the grid in a way that anypatch cannot tell "
                f"for a hand-made model: {hint}"
            )
        elif (path, name) in {(p, n) for p, n, _ in position_tensors(model, layout.part)} and tensor.ndim > 1:
            raise UnsupportedModelError(
                f"{full}, of shape {tuple(tensor.shape)}, is named like a position table, but is none over a "
                f"{show(old.grid)} grid: {hint}"
            )
    for path, module in part.named_modules():
        size = ints(vars(module).get("input_resolution"))
        if size is not None and size not in (old.image_size, old.grid):
            raise UnsupportedModelError(
                f"{path}.input_resolution ({show(size)}) is of a coarser grid, which anypatch cannot follow in a "
                f"hand-made model: {hint}"
            )


def _of_window(model: nn.Module, path: str, name: str, tensor: Tensor, old: Geometry) -> bool:
    """Whether a relative table or index is over a window that is smaller than the grid."""
    if not is_relative(name) or tensor.ndim == 0:
        return False
    assert old.grid is not None
    for ancestor in [path, *ancestors(path)] if path else [path]:
        value = vars(model.get_submodule(ancestor)).get("window_size")
        window = (value, value) if type(value) is int else ints(value)
        if (
            window is not None
            and len(window) == 2
            and all(0 < w < g for w, g in zip(window, old.grid[-2:], strict=True))
        ):
            offsets = math.prod(2 * w - 1 for w in window)
            return tensor.shape[0] in {*(2 * w - 1 for w in window), offsets, offsets + 3, math.prod(window)}
    return False


def _follows_time(name: str, tensor: Tensor, old: Geometry, new: Geometry) -> bool:
    """Whether a tensor is named like a table over a video's time axis, which changes."""
    assert old.grid is not None
    assert new.grid is not None
    return len(old.grid) == 3 and old.grid[0] != new.grid[0] and bool(TIME.search(name)) and old.grid[0] in tensor.shape


def _may_span(owner: nn.Module, name: str, tensor: Tensor) -> set[int]:
    """Lengths of the axes of an unexplained tensor that may run over tokens."""
    if isinstance(owner, (nn.LayerNorm, nn.modules.batchnorm._NormBase)) and tensor.ndim < 2:
        return set()
    if re.search(r"proj|weight", name) and tensor.ndim == 2:  # a matrix; its result may have any width
        return set(tensor.shape[:1])
    if isinstance(tensor, nn.Parameter) and tensor.ndim < 2:
        return set()
    return set(tensor.shape)
