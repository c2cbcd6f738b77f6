"""Copies of a hand-made model in which whatever follows the geometry is set."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.account import Context, Doubt, Extra, tensor_of
from anypatch.core.diff import AttributeEdit, ParameterEdit
from anypatch.core.geometry import Geometry, Size
from anypatch.core.recordings import results
from anypatch.core.rehearsal import without_memory
from anypatch.core.tables import ANTIALIASED
from anypatch.core.twins import Twins
from anypatch.errors import UnsupportedModelError
from anypatch.hosts.structural.explained import require_explained, require_known_grid, require_named
from anypatch.hosts.structural.following import PATCH_NAMES, entries, follow, kinds
from anypatch.hosts.structural.layout import Layout
from anypatch.hosts.structural.neighbours import means_another_thing
from anypatch.hosts.structural.probing import require_rectangular, require_settled
from anypatch.hosts.structural.surroundings import Surroundings
from anypatch.hosts.structural.tables import (
    CONVOLUTIONS,
    Table,
    enumerates,
    resampled,
    table_shape,
)
from anypatch.hosts.structural.values import Values

# Attributes that torch keeps in a module that it shards or replicates: process groups, of which there are no copies.
SPREADING = ("__composable_api_state_key", "_fsdp_")


def build_twin(model: nn.Module, layout: Layout, geometry: Geometry) -> nn.Module:
    old, name = layout.geometry, type(model).__name__
    _require_kept(model, layout, geometry)
    require_known_grid(model, layout, geometry)
    doubts = require_explained(model, layout, geometry)
    build = functools.partial(_twin, model, layout)
    twin = _twin(model, layout, geometry, doubts)
    stem: Any = model.get_submodule(layout.stem)
    require_settled(model, build, stem.in_channels, old, geometry, doubts)
    require_rectangular(build, stem.in_channels, old, geometry, name)
    return twin


def _require_kept(model: nn.Module, layout: Layout, geometry: Geometry) -> None:
    """What has to change is kept as it is, and not computed from other tensors whenever the model runs.

    Raises:
        UnsupportedModelError: it is parametrized, pruned or normed; the message says what undoes it.
    """
    changing = [(path, "weight") for path in layout.stems] if geometry.patch_size != layout.geometry.patch_size else []
    if geometry.grid != layout.geometry.grid:
        changing += [(table.path, table.name.removesuffix("_orig")) for table in layout.tables]
    for path, name in changing:
        tensor_of(model.get_submodule(path), name, f"{path}.{name}" if path else name)


def _twin(model: nn.Module, layout: Layout, geometry: Geometry, doubts: list[Doubt] | None = None) -> nn.Module:
    old = layout.geometry
    twin = copy_of(model)
    if (geometry.patch_size, geometry.image_size) == (old.patch_size, old.image_size):
        return twin
    for path in layout.stems if geometry.patch_size != old.patch_size else ():
        _set_projection(twin, path, geometry)
    if geometry.grid is not None and geometry.grid != old.grid:
        for table in layout.tables:
            _set_table(twin, model, table, old, geometry)
    if geometry.patch_size != old.patch_size:
        require_named(model, layout)
        for path, (channels, order) in layout.heads.items():
            _set_head(twin.get_submodule(path), path, channels, order, geometry)
    for path, module in twin.named_modules():
        _set_attributes(module, path, layout, geometry)
    _set_layers(twin, model, layout, geometry, [] if doubts is None else doubts)
    return twin


def _set_layers(twin: nn.Module, model: nn.Module, layout: Layout, geometry: Geometry, doubts: list[Doubt]) -> None:
    """Layers that bring tokens back to pixels, pool by the patch or spread over the grid, as around other models."""
    widths = {m.normalized_shape[-1] for m in model.modules() if isinstance(m, nn.LayerNorm)}
    context = Context(Twins(model, twin, layout.geometry, geometry), frozenset(widths), None, ANTIALIASED, doubts)
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


def copy_of(model: nn.Module) -> nn.Module:
    """A copy without hooks, its parameters on the meta device."""
    memo: dict[int, Any] = {id(tensor): tensor.detach() for tensor in results(model)}
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
        hollow = without_memory(parameter)
        assert hollow is not None
        memo[id(parameter)] = hollow.requires_grad_(parameter.requires_grad)
    spread = [module for module in model.modules() if _own_class(module) is not type(module)]
    memo.update({id(module): object.__new__(_own_class(module)) for module in spread})
    try:
        for module in spread:
            own = {name: value for name, value in vars(module).items() if not name.startswith(SPREADING)}
            vars(memo[id(module)]).update(copy.deepcopy(own, memo))
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be copied: {error}") from error


def _own_class(module: nn.Module) -> type[nn.Module]:
    """A module's class before torch put another in its place, to shard or to replicate it, which refuses copies."""
    kinds: tuple[Any, ...] = type(module).__mro__
    put = kinds[0].__module__.startswith("torch.distributed.") and "__deepcopy__" in vars(kinds[0])
    return next(kind for kind in kinds if not (put and kind.__module__.startswith("torch.distributed.")))


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


def _set_attributes(module: nn.Module, path: str, layout: Layout, new: Geometry) -> None:
    old = layout.geometry
    of_torch = type(module).__module__.startswith("torch.")
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
    if not of_torch:
        _set_wider(module, path, old, new)
        # a padding, say, that goes with the projection
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


def _set_wider(module: nn.Module, path: str, old: Geometry, new: Geometry) -> None:
    """Numbers under further names that people give them, as around a library's model: the stride of a detector's map,
    by which it gives its boxes in pixels, shows in no shape."""
    values = Values(old, new)
    hidden = vars(nn.Module()).keys() | set().union(*(names for names, *_ in kinds(old, new)))
    for name, value in list(vars(module).items()):
        if name in hidden or isinstance(value, Tensor) or means_another_thing(name, module):
            continue
        after = values.number(name, value, f"{path}.{name}" if path else name)
        if after is not None:
            vars(module)[name] = after


def _sizes_of_patch(old: Geometry, new: Geometry) -> tuple[list[Any], list[Any]]:
    return next((present, following) for names, present, following in kinds(old, new) if names is PATCH_NAMES)
