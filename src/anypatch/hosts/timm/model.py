"""timm: models made by ``timm.create_model``, feature extractors included."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from anypatch.core.adapters import innermost
from anypatch.core.empty import empty
from anypatch.core.geometry import Geometry, Size, show
from anypatch.core.limits import LimitError
from anypatch.core.roles import Facts
from anypatch.core.twins import Subject
from anypatch.errors import GeometryError, UnsupportedModelError
from anypatch.hosts.base import Example, class_tokens, comes_from, pair, plain
from anypatch.hosts.timm.private import core_of, recorded

NAME = "timm"

# Flattening order of a patch for linear patch embeddings: NaFlexViT's puts channels last, Gemma 4's first.
ORDERS = {r"embeds\.proj\.": "h w c", r"patch_embed\.input_proj\.": "c h w"}

# Stems of several convolutions whose image size can change all the same: their positions are ordinary tables,
# or none.
FIXED_PATCH = ("Xcit",)

_building = threading.Lock()


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
    if type(core_of(model)).__name__ == "TNT":
        raise UnsupportedModelError(
            f"no arguments of timm's {title_of(model)} scale its pixel embedding with the patch"
        )
    if stem.refusal is not None and geometry.patch_size != stem.geometry.patch_size:
        raise UnsupportedModelError(stem.refusal)
    return sizes_of(model, geometry, stem)


# -- what the stem is ------------------------------------------------------------------------------------------


def stem_of(model: Any) -> Stem:
    core = core_of(model)
    kind = type(core).__name__
    path = _first_layer(model)
    embed: Any = getattr(core, "patch_embed", None)
    if _backbone(core) is not None:
        return _behind_backbone(model, core, embed)
    if kind in FIXED_PATCH:
        convolutions = [m for m in embed.modules() if isinstance(m, _ConvNd)]
        patch = tuple(math.prod(c.stride[axis] for c in convolutions) for axis in (0, 1))
        reason = (
            f"patch_embed of {kind} is {len(convolutions)} convolutions with activations between them, not one linear "
            f"map per patch: only its image_size can change"
        )
        return Stem(_geometry(model, patch, patch, path), refusal=reason)
    projection = None if path is None else _layer(model, path)
    if path is None or not isinstance(projection, (_ConvNd, nn.Linear)):
        first = next((f": {name} is {layer}" for name, layer in core.named_modules() if isinstance(layer, _ConvNd)), "")
        raise UnsupportedModelError(
            f"{title_of(model)} has no patch embedding that anypatch can find: timm names no convolution or linear "
            f"layer as the first that sees pixels{first}"
        )
    if isinstance(projection, nn.Linear):
        size = getattr(_parent(model, path), "patch_size", None)
        if size is None:
            raise UnsupportedModelError(f"{path} of {title_of(model)} is a linear layer whose patch size is not known")
        patch = pair(size)
        return Stem(_geometry(model, patch, patch, path), (path,))
    stride, kernel = tuple(projection.stride), tuple(projection.kernel_size)
    if kind == "TNT":
        patch = pair(core.pixel_embed.patch_size)
        return Stem(_geometry(model, patch, patch, path), (path,), whole=True)
    if kind == "PoolingVisionTransformer":
        geometry = _geometry(model, stride, kernel, path)
        return Stem(replace(geometry, explicit_grid=tuple(core.patch_embed.grid_size)), (path,))
    if isinstance(projection.padding, str) or any(projection.padding) or kernel != stride:
        others = sum(isinstance(m, _ConvNd) for m in core.modules()) - 1
        more = f", and {others} more convolutions follow it" if others > 1 else ""
        raise UnsupportedModelError(
            f"{path} of {title_of(model)} is an overlapping convolution (kernel {show(kernel)}, stride {show(stride)}, "
            f"padding {projection.padding}){more}: its stem is not one linear map per patch"
        )
    geometry = _geometry(model, stride, kernel, path)
    if kind == "CrossVit":
        paths = tuple(f"patch_embed.{i}.proj" for i in range(core.num_branches))
        geometry = replace(geometry, prefix_tokens=1)
        return Stem(geometry, paths, grids=lambda g: [grid for _, grid in _branches(core, g)[1:]], whole=True)
    refusal = None
    if kind == "CoaT":
        refusal = (
            f"{title_of(model)} builds patch_embed2 for a quarter of the image whatever the patch is: "
            f"only its image_size can change"
        )
    return Stem(geometry, (path,), refusal)


def _behind_backbone(model: Any, core: Any, embed: Any) -> Stem:
    """A convolutional backbone, then a projection of its feature map: only the projection is linear."""
    if type(core).__name__ == "VOLO":
        unit = tuple(embed.conv[0].stride)
        entries = tuple(embed.proj.stride)
    else:
        unit, entries = pair(embed.feature_ratio), pair(embed.patch_size)
    patch = tuple(u * p for u, p in zip(unit, entries, strict=True))
    geometry = _geometry(model, patch, patch, "patch_embed.proj")
    if isinstance(embed.proj, nn.Identity):
        return Stem(
            geometry,
            refusal=f"{title_of(model)} has no projection after patch_embed.backbone ({type(embed.backbone).__name__}"
            f"), which is not one linear map per patch: only its image_size can change",
        )
    return Stem(geometry, ("patch_embed.proj",), unit=unit)


def _backbone(core: Any) -> str | None:
    """Name of the convolutions inside the patch embedding that come before its projection: hybrids', VOLO's."""
    embed: Any = getattr(core, "patch_embed", None)
    if hasattr(embed, "backbone"):
        return "backbone"
    return "conv" if type(core).__name__ == "VOLO" else None


def _geometry(model: Any, patch: Size, kernel: Size, path: str | None) -> Geometry:
    core = core_of(model)
    prefix = getattr(core, "num_prefix_tokens", None)
    if prefix is None:
        prefix = class_tokens(core)
    return Geometry(patch, _image_size(model, path), prefix, NAME, kernel_size=kernel)


def title_of(model: Any) -> str:
    return f"{type(core_of(model)).__name__} ({model.pretrained_cfg['architecture']})"


def _first_layer(model: Any) -> str | None:
    """Path of the layer that timm itself names as the first that sees pixels, in the model without wrappers."""
    name = getattr(model, "_traits", {}).get("first_conv") or model.pretrained_cfg.get("first_conv")
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
        if candidate == name or isinstance(_unwrapped(layer), (_ConvNd, nn.Linear)):
            return candidate
    return None


def _unwrapped(layer: nn.Module) -> nn.Module:
    """The layer inside an adapter, or inside a module of the user's."""
    return layer if comes_from(layer, NAME) else innermost(layer)


def _layer(model: Any, path: str) -> nn.Module:
    return _unwrapped(core_of(model).get_submodule(path))


def _parent(model: Any, path: str) -> nn.Module:
    return core_of(model).get_submodule(path.rpartition(".")[0])


def _image_size(model: Any, path: str | None) -> Size:
    core = core_of(model)
    parent = None if path is None else _parent(model, path)
    for size in (
        getattr(parent, "img_size", None),
        getattr(getattr(core, "patch_embed", None), "img_size", None),
        getattr(model, "_traits", {}).get("img_size"),
        getattr(core, "img_size", None),
    ):
        if isinstance(size, int):
            return (size, size)
        if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(s, int) for s in size):
            return tuple(size)
    return tuple(model.pretrained_cfg.get("input_size", (3, 224, 224))[-2:])


def _branches(core: Any, geometry: Geometry) -> list[tuple[int, Size]]:
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


# -- building twins --------------------------------------------------------------------------------------------


def _build(model: Any, geometry: Geometry, stem: Stem) -> Any:
    core = core_of(model)
    if type(core).__name__ == "TNT":
        return _build_tnt(model, core, geometry)
    sizes = sizes_of(model, geometry, stem)
    try:
        return _create(model, _arguments(model), sizes)
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
        merge = vars(module).get("merge_size")
        if type(merge) is not int or grid is None or image is None or not any(side % merge for side in grid):
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
    core = core_of(model)
    kind, arguments = type(core).__name__, _arguments(model)
    assert geometry.image_size is not None
    patch = tuple(p // u for p, u in zip(geometry.patch_size, stem.unit, strict=True))
    if any(p * u != s for p, u, s in zip(patch, stem.unit, geometry.patch_size, strict=True)):
        raise GeometryError(
            f"patch_size {show(geometry.patch_size)} must be a multiple of the backbone's stride, {show(stem.unit)}"
        )
    if kind == "VOLO":  # whose argument is in pixels
        patch = geometry.patch_size
        if len(set(patch)) > 1 or patch[0] not in (4, 8, 16):
            raise GeometryError(f"timm's VOLO takes patch_size 4, 8 or 16, not {show(patch)}")
    sizes: dict[str, Any] = {"img_size": plain(geometry.image_size), "patch_size": plain(patch)}
    if kind == "PoolingVisionTransformer":
        assert geometry.kernel_size is not None
        if len(set(geometry.patch_size)) > 1:
            raise UnsupportedModelError(f"{title_of(model)} takes one stride for both axes")
        sizes |= {"patch_size": plain(geometry.kernel_size), "stride": geometry.patch_size[0]}
    elif kind == "ConVit" and len(set(geometry.grid or ())) > 1:
        raise GeometryError(
            f"{title_of(model)} computes its local attention for square grids only: image_size "
            f"{show(geometry.image_size)} and patch_size {show(geometry.patch_size)} give {show(geometry.grid)}"
        )
    elif kind == "CrossVit":
        sizes["patch_size"] = tuple(patch for patch, _ in _branches(core, geometry))
    elif kind == "Sequencer2d":
        if len(set(geometry.patch_size)) > 1:
            raise UnsupportedModelError(f"{title_of(model)} takes square patches only")
        later = [stage.downsample.down.stride[0] for stage in core.stages[1:]]
        sizes = {"img_size": sizes["img_size"], "patch_sizes": [geometry.patch_size[0], *later]}
    accepted = _accepted(model)
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


def _arguments(model: Any) -> dict[str, Any]:
    """What ``timm.create_model`` was called with, brought up to date."""
    arguments = dict(getattr(model, "_model_args", {}))
    arguments.pop("pretrained_model_args", None)
    for name in ("num_classes", "in_chans"):
        if isinstance(getattr(model, name, None), int) and not arguments.get("features_only"):
            arguments[name] = getattr(model, name)
    if not recorded(model):
        arguments.setdefault("in_chans", _channels(model))
    return arguments


def _channels(model: Any) -> int:
    """Channels of the input."""
    path = _first_layer(model)
    layer = None if path is None else _layer(model, path)
    channels = getattr(core_of(model), "in_chans", None) or getattr(layer, "in_channels", None)
    return int(channels or model.pretrained_cfg["input_size"][0])


def _class(model: Any) -> type[nn.Module]:
    """The class of the model itself, also where a feature extractor has taken it apart."""
    core = core_of(model)
    if not type(core).__module__.startswith("timm.models._features"):
        return type(core)
    import timm

    arguments = {k: v for k, v in _arguments(model).items() if k not in ("features_only", "out_indices", "feature_cls")}
    return type(empty(lambda: timm.create_model(model.pretrained_cfg["architecture"], **arguments)))


def _accepted(model: Any) -> set[str]:
    """Names of the constructor's parameters; ``**`` where it takes any."""
    parameters = inspect.signature(_class(model).__init__).parameters
    return {"**" if p.kind is p.VAR_KEYWORD else name for name, p in parameters.items()}


def _create(model: Any, arguments: dict[str, Any], sizes: dict[str, Any]) -> Any:
    import timm

    twin: Any
    name = model.pretrained_cfg["architecture"]
    try:
        return timm.create_model(name, **{**arguments, **sizes})
    except (TypeError, KeyError) as error:
        # Python 3.11 says the same by a KeyError where another error is being handled.
        twice = isinstance(error, KeyError) and error.args[:1] and error.args[0] in sizes
        if not twice and "multiple values for keyword argument" not in str(error):
            raise
    # this entry point fixes an argument of its own: hand the sizes to the constructor instead
    arguments = {k: v for k, v in arguments.items() if k not in sizes}
    with _constructing(_class(model), sizes):
        twin = timm.create_model(name, **arguments)
    if recorded(twin):
        twin._model_args = {**twin._model_args, **sizes}
    if "img_size" in sizes and hasattr(twin, "_traits"):
        twin._traits = {**twin._traits, "img_size": pair(sizes["img_size"])}
    return twin


@contextlib.contextmanager
def _constructing(kind: type[nn.Module], sizes: dict[str, Any]) -> Iterator[None]:
    """Let this thread construct ``kind`` with ``sizes``, whatever else is passed."""
    original, thread = kind.__init__, threading.get_ident()

    def construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if threading.get_ident() == thread:
            kwargs = {**kwargs, **sizes}
        original(self, *args, **kwargs)

    with _building:
        kind.__init__ = construct  # type: ignore[method-assign]
        try:
            yield
        finally:
            kind.__init__ = original  # type: ignore[method-assign]


def _build_tnt(model: Any, core: Any, geometry: Geometry) -> Any:
    """TNT at any whole multiple of its patch, with the inner grid of pixels it was trained with.

    timm's class fixes the kernel (7, padding 3) of the pixel embedding, so the twin is built at the native patch and
    kernel, stride and padding are scaled together.
    """
    live: Any = _unwrapped(core.pixel_embed.proj)
    native = tuple(p * 7 // k for p, k in zip(pair(core.pixel_embed.patch_size), live.kernel_size, strict=True))
    grid = geometry.grid
    assert grid is not None
    sizes = {
        "img_size": plain(tuple(g * n for g, n in zip(grid, native, strict=True))),
        "patch_size": plain(native),
    }
    twin = _create(model, _arguments(model), sizes)
    if geometry.patch_size == native:
        return twin
    inner = core_of(twin).pixel_embed
    ratio = [Fraction(new, old) for new, old in zip(geometry.patch_size, native, strict=True)]
    if any(r.denominator != 1 for r in ratio):
        raise GeometryError(
            f"{title_of(model)} embeds pixels by a padded 7x7 convolution, which scales by whole factors only: "
            f"patch_size must be a multiple of {show(native)}, got {show(geometry.patch_size)}"
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
    if hasattr(twin, "_traits"):
        twin._traits = {**twin._traits, "img_size": geometry.image_size}
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


# -- inputs for the proof --------------------------------------------------------------------------------------


def example(subject: Subject) -> Example:
    return example_at(subject.model, subject.geometry)


def example_at(model: Any, geometry: Geometry) -> Example:
    """What to feed a model that stands alone or as the tower of another library's."""
    core = core_of(model)
    assert geometry.image_size is not None
    if _backbone(core) is not None and not isinstance(core.patch_embed.proj, nn.Identity):
        unit = stem_of(model).unit
        fed = tuple(s // u for s, u in zip(geometry.image_size, unit, strict=True))
        return Example((2, core.patch_embed.proj.in_channels, *fed), _after_backbone, unit=unit)
    call = _cropping if type(core).__name__ == "CrossVit" else lambda m, pixels: m(pixels)
    return Example((2, _channels(model), *geometry.image_size), call)


def _after_backbone(model: Any, features: Tensor) -> Any:
    """The model on a feature map of its backbone: what comes before the map is not linear and does not change."""
    embed, name = core_of(model).get_submodule("patch_embed"), str(_backbone(core_of(model)))
    backbone = embed.get_submodule(name)
    embed._modules[name] = nn.Identity()
    try:
        return model(features)
    finally:
        embed._modules[name] = backbone


def _cropping(model: Any, pixels: Tensor) -> Any:
    """CrossViT, cropping where it would shrink the image for its second branch.

    A bicubic resize of the image does not commute with enlarging its patches, a crop does; every weight and position
    of both branches is proved all the same.
    """
    core = core_of(model)
    crop, core.crop_scale = core.crop_scale, True
    try:
        return model(pixels)
    finally:
        core.crop_scale = crop
