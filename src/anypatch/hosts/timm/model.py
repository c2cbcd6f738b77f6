"""timm: models made by ``timm.create_model``, feature extractors included."""

from __future__ import annotations

import copy
import inspect
import math
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from anypatch.core.empty import empty
from anypatch.core.geometry import Geometry, Size, show
from anypatch.core.limits import LimitError
from anypatch.core.roles import Facts
from anypatch.core.twins import Subject
from anypatch.errors import GeometryError, UnsupportedModelError
from anypatch.hosts.base import comes_from, pair, plain
from anypatch.hosts.timm.facts import ORDERS, merged_tokens, row
from anypatch.hosts.timm.private import core_of, create, is_extractor, note_image_size, recorded
from anypatch.hosts.timm.stems import Stem, arguments_of, branches, stem_of, title_of, unwrapped


def recognises(model: nn.Module) -> bool:
    return comes_from(model, "timm") and bool((getattr(model, "pretrained_cfg", None) or {}).get("architecture"))


def subject(model: Any) -> Subject:
    stem = stem_of(model)
    core = core_of(model)
    prefix = next((f"{name}." for name, child in model._modules.items() if child is core), "")
    projections = tuple(prefix + path for path in stem.paths)

    def build(geometry: Geometry) -> nn.Module:
        if stem.refusal is not None and geometry.patch_size != stem.geometry.patch_size:
            raise UnsupportedModelError(stem.refusal)
        twin = _build(model, geometry, stem)
        _require_merged(twin, geometry)
        if not recorded(model) and geometry == stem.geometry:
            _require_same_layout(model, twin)
        return twin

    return Subject(
        model,
        stem.geometry,
        build=build,
        facts=Facts(
            orders=ORDERS,
            projections=projections,
            grids=stem.grids,
            whole_multiples=stem.whole,
            relative=_resized_relative,
        ),
        finish=lambda geometry: _bookkeeping(model, geometry),
    )


def _resized_relative(table: Tensor, old: Size, new: Size) -> Tensor:
    """A relative table (entries, heads) for another window, as timm resizes it on loading."""
    from timm.layers import resize_rel_pos_bias_table

    offsets = [math.prod(2 * s - 1 for s in window) for window in (old, new)]
    shape = (len(table) - offsets[0] + offsets[1], *table.shape[1:])
    resize: Any = resize_rel_pos_bias_table
    known = "old_window_size" in inspect.signature(resize).parameters
    return resize(table, new, shape, **({"old_window_size": old} if known else {}))


def sizes(model: Any, geometry: Geometry) -> dict[str, Any]:
    """The arguments with which ``timm.create_model`` makes a model of this geometry.

    Raises:
        UnsupportedModelError: there are none.
    """
    stem = stem_of(model)
    if row(core_of(model)).pixel_kernel:
        raise UnsupportedModelError(
            f"no arguments of timm's {title_of(model)} scale its pixel embedding with the patch"
        )
    if stem.refusal is not None and geometry.patch_size != stem.geometry.patch_size:
        raise UnsupportedModelError(stem.refusal)
    return sizes_of(model, geometry, stem)


# -- building twins --------------------------------------------------------------------------------------------


def _build(model: Any, geometry: Geometry, stem: Stem) -> Any:
    if row(core_of(model)).pixel_kernel:
        return _build_of_pixels(model, geometry)
    sizes = sizes_of(model, geometry, stem)
    try:
        return create(model, arguments_of(model), sizes)
    except LimitError:
        raise
    except (TypeError, AssertionError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        if isinstance(error, (NotImplementedError, RuntimeError)) and "meta" in str(error):
            raise  # a constructor that reads its parameters' values is built for real
        raise UnsupportedModelError(
            f"timm cannot build {title_of(model)} with patch_size {show(geometry.patch_size)} and image_size "
            f"{show(geometry.image_size)}: {error or type(error).__name__}"
        ) from error


def _require_merged(twin: nn.Module, geometry: Geometry) -> None:
    """Layers that merge neighbouring tokens need a grid that they divide."""
    grid, image = geometry.grid, geometry.image_size
    for path, module in twin.named_modules():
        merge = merged_tokens(module)
        if merge is None or grid is None or image is None or not any(side % merge for side in grid):
            continue
        unit = tuple(patch * merge for patch in geometry.patch_size)
        below = tuple(max(side // u, 1) * u for side, u in zip(image, unit, strict=True))
        above = tuple(-(-side // u) * u for side, u in zip(image, unit, strict=True))
        raise GeometryError(
            f"{path} ({type(module).__name__}) merges {merge} x {merge} tokens, and image_size {show(image)} at "
            f"patch_size {show(geometry.patch_size)} has {show(grid)}: use a multiple of {show(unit)}, "
            f"such as {show(below)} or {show(above)}"
        )


def sizes_of(model: Any, geometry: Geometry, stem: Stem) -> dict[str, Any]:
    """The constructor's arguments that make a model of this geometry."""
    assert geometry.image_size is not None
    arguments, accepted = arguments_of(model), _accepted(model)
    sizes: dict[str, Any] = {"img_size": plain(geometry.image_size), **_patches(model, geometry, stem)}
    open_ended = "cfg" in accepted or "**" in accepted
    if "img_size" not in accepted and not open_ended and "img_size" not in arguments:
        del sizes["img_size"]
    same_patch = geometry.patch_size == stem.geometry.patch_size
    if same_patch and "patch_size" not in arguments and geometry.kernel_size == geometry.patch_size and recorded(model):
        sizes.pop("patch_size", None)
    elif not {"patch_size", "patch_sizes"} & accepted and not open_ended:
        raise UnsupportedModelError(
            f"timm's {title_of(model)} takes no patch_size, so no model of its own could hold another patch"
        )
    return sizes


def _patches(model: Any, geometry: Geometry, stem: Stem) -> dict[str, Any]:
    """Those of them that say the patch, by the class's own custom."""
    core = core_of(model)
    known, patch = row(core), _entries(model, geometry, stem)
    if known.one_side and len(set(geometry.patch_size)) > 1:
        raise UnsupportedModelError(f"{title_of(model)} takes {known.one_side}")
    if known.square_grid and len(set(geometry.grid or ())) > 1:
        raise GeometryError(
            f"{title_of(model)} computes its local attention for square grids only: image_size "
            f"{show(geometry.image_size)} and patch_size {show(geometry.patch_size)} give {show(geometry.grid)}"
        )
    if known.overlapping:
        assert geometry.kernel_size is not None
        return {"patch_size": plain(geometry.kernel_size), "stride": geometry.patch_size[0]}
    if known.branches:
        return {"patch_size": tuple(patch for patch, _ in branches(core, geometry))}
    if known.per_stage:
        later = [stage.downsample.down.stride[0] for stage in core.stages[1:]]
        return {"patch_sizes": [geometry.patch_size[0], *later]}
    return {"patch_size": plain(patch)}


def _entries(model: Any, geometry: Geometry, stem: Stem) -> Size:
    """The patch in entries of the map that the projection sees, or in pixels where the constructor wants those."""
    known, size = row(core_of(model)), geometry.patch_size
    patch = tuple(p // u for p, u in zip(size, stem.unit, strict=True))
    if any(p * u != s for p, u, s in zip(patch, stem.unit, size, strict=True)):
        raise GeometryError(f"patch_size {show(size)} must be a multiple of the backbone's stride, {show(stem.unit)}")
    if known.patches and (len(set(size)) > 1 or size[0] not in known.patches):
        *most, last = known.patches
        taken = f"{', '.join(map(str, most))} or {last}"
        raise GeometryError(f"timm's {type(core_of(model)).__name__} takes patch_size {taken}, not {show(size)}")
    return size if known.in_pixels else patch


def _require_same_layout(model: Any, twin: nn.Module) -> None:
    """A model whose constructor's arguments are not known has to be one that their defaults give."""

    def layout(module: nn.Module) -> dict[str, Any]:
        named = [*module.named_parameters(), *module.named_buffers()]
        return {name.replace("base_layer.", ""): tuple(t.shape) for name, t in named if "lora_" not in name}

    live, built = layout(model), layout(twin)
    for name in {**live, **built}:
        if live.get(name) != built.get(name):
            raise UnsupportedModelError(
                f"{title_of(model)} was made with arguments that timm did not record ({name} is {live.get(name)}, "
                f"by default {built.get(name)}): make it with timm.create_model of timm 1.0.31 or later"
            )


def _class(model: Any) -> type[nn.Module]:
    """The class of the model itself, also where a feature extractor has taken it apart."""
    core = core_of(model)
    if not is_extractor(core):
        return type(core)
    import timm

    extracting = ("features_only", "out_indices", "feature_cls")
    arguments = {k: v for k, v in arguments_of(model).items() if k not in extracting}
    return type(empty(lambda: timm.create_model(model.pretrained_cfg["architecture"], **arguments)))


def _accepted(model: Any) -> set[str]:
    """Names of the constructor's parameters; ``**`` where it takes any."""
    parameters = inspect.signature(_class(model).__init__).parameters
    return {"**" if p.kind is p.VAR_KEYWORD else name for name, p in parameters.items()}


def _build_of_pixels(model: Any, geometry: Geometry) -> Any:
    """TNT at any whole multiple of its patch, with the inner grid of pixels it was trained with.

    timm's class fixes the kernel (7, padding 3) of the pixel embedding, so the twin is built at the native patch and
    kernel, stride and padding are scaled together.
    """
    known, grid = row(core_of(model)), geometry.grid
    present: Any = getattr(core_of(model), known.pixels)
    kernel: Any = unwrapped(present.proj).kernel_size
    native = tuple(p * known.pixel_kernel // k for p, k in zip(pair(present.patch_size), kernel, strict=True))
    assert grid is not None
    sizes = {
        "img_size": plain(tuple(g * n for g, n in zip(grid, native, strict=True))),
        "patch_size": plain(native),
    }
    twin = create(model, arguments_of(model), sizes)
    if geometry.patch_size == native:
        return twin
    inner: Any = getattr(core_of(twin), known.pixels)
    ratio = [Fraction(new, old) for new, old in zip(geometry.patch_size, native, strict=True)]
    if any(r.denominator != 1 for r in ratio):
        side = known.pixel_kernel
        raise GeometryError(
            f"{title_of(model)} embeds pixels by a padded {side}x{side} convolution, which scales by whole factors "
            f"only: patch_size must be a multiple of {show(native)}, got {show(geometry.patch_size)}"
        )
    scaled: Any = [
        tuple(int(v * r) for v, r in zip(values, ratio, strict=True))
        for values in (inner.proj.kernel_size, inner.proj.stride, inner.proj.padding)
    ]
    inner.proj = nn.Conv2d(inner.proj.in_channels, inner.proj.out_channels, *scaled)
    inner.img_size, inner.patch_size = geometry.image_size, geometry.patch_size
    if not inner.legacy:
        inner.unfold = nn.Unfold(kernel_size=geometry.patch_size, stride=geometry.patch_size)
    for info in core_of(twin).feature_info:
        info["reduction"] = max(geometry.patch_size)
    note_image_size(twin, geometry.image_size)
    return twin


def _bookkeeping(model: Any, geometry: Geometry) -> list[tuple[nn.Module, str, Any]]:
    """The size that ``timm.data.resolve_model_data_config`` reads."""
    assert geometry.image_size is not None
    cfg = copy.deepcopy(model.pretrained_cfg)
    patch, grid = stem_of(model).geometry.patch_size, geometry.grid
    for pool, size in (("pool_size", "input_size"), ("test_pool_size", "test_input_size")):
        if cfg.get(pool) and cfg.get(size) and grid is not None:  # the last stage's map at that size: follows the grid
            sides = zip(pair(cfg[pool]), grid, patch, cfg[size][-2:], strict=True)
            cfg[pool] = tuple(max(1, round(pooled * new * p / side)) for pooled, new, p, side in sides)
    cfg["input_size"] = (cfg.get("input_size", (3,))[0], *geometry.image_size)
    if cfg.get("test_input_size"):
        cfg["test_input_size"] = (cfg["test_input_size"][0], *geometry.image_size)
    names = [n for n in ("pretrained_cfg", "default_cfg") if hasattr(model, n)]
    return [(model, name, cfg) for name in names]
