"""transformers: every model of a class that derives from ``PreTrainedModel``, its vision tower in place."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.geometry import Geometry, Size, show
from anypatch.core.limits import LimitError
from anypatch.core.roles import Facts
from anypatch.core.tables import Sampling
from anypatch.core.twins import Subject
from anypatch.errors import UnsupportedModelError
from anypatch.hosts.base import class_tokens
from anypatch.hosts.flattening import pixel_heads
from anypatch.hosts.timm import model as trunks
from anypatch.hosts.timm.stems import NAME as TIMM
from anypatch.hosts.transformers.config import (
    STRIDE,
    Part,
    channels,
    configs,
    has_patch,
    not_vision,
    shorten,
    size_of,
    sizes,
    write,
)
from anypatch.hosts.transformers.facts import row

NAME = "transformers"

# Parts that follow the patch of an image encoder but see no image, by the name of their field.
PROMPTS = re.compile(r"prompt")
# Parts that an image encoder's configuration is usually called.
ENCODERS = re.compile(r"vision|visual|image|backbone|sam|vit")


@dataclass(frozen=True)
class Vision:
    """What of a model sees images: found once, and handed on to whatever is asked of the model after that.

    Attributes:
        model: the live model.
        parts: its vision configurations that have a patch size, the one of the pixel stem first.
    """

    model: nn.Module
    parts: tuple[Part, ...]

    @property
    def config(self) -> Any:
        """The whole model's configuration."""
        return self.model.config

    @property
    def first(self) -> Any:
        """The configuration of the part that has the pixel stem."""
        return self.parts[0].config

    @property
    def kinds(self) -> tuple[str, ...]:
        """Model types of the whole and of the part with the pixel stem."""
        return tuple(dict.fromkeys((str(self.config.model_type), str(self.first.model_type))))

    def towers(self, model: nn.Module) -> list[nn.Module]:
        """The towers that timm made, where it made the one that is adapted, in the model or in a twin of it."""
        return [model.get_submodule(path) for path in self.parts[0].towers]


def recognises(model: nn.Module) -> bool:
    """Any class that derives from transformers' ``PreTrainedModel``, remote code included."""
    return getattr(model, "config", None) is not None and any(
        c.__name__ == "PreTrainedModel" and c.__module__.split(".")[0] == "transformers" for c in type(model).__mro__
    )


def subject(model: nn.Module) -> Subject:
    inner = _of_a_class_with_arguments(model)
    if inner is not None:
        path, found = inner
        return replace(found, model=model, path=f"{path}.{found.path}".rstrip("."))
    vision = describe(model)
    geometry = _geometry(vision)
    return Subject(
        model,
        geometry,
        build=lambda g: build_twin(vision, g, geometry),
        facts=_facts(vision),
        finish=lambda g: [change for tower in vision.towers(model) for change in _finish(tower, g)],
        about=vision,
    )


def describe(model: nn.Module) -> Vision:
    """What of a model sees images.

    Raises:
        UnsupportedModelError: nothing does in patches; the message says why.
    """
    config: Any = model.config
    refused = row(config).refused
    if refused:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be adapted: {refused}")
    towers = _timm_paths(model)
    found = [
        Part(path, c, tuple(towers.get(c.model_type, ())))
        for path, c in configs(config)
        if (has_patch(c) or c.model_type in towers) and not not_vision(path, c)
    ]
    if all(p.path and PROMPTS.search(p.path[-1]) for p in found):
        raise UnsupportedModelError(_why_none(model))
    inner = [p for p in found if not any(q.path[: len(p.path)] == p.path and q is not p for q in found)]
    preferred = [p for p in inner if p.path and ENCODERS.search(p.path[-1])]
    first = (preferred or inner)[0]
    return Vision(model, (first, *[p for p in found if p is not first]))


def _finish(tower: nn.Module, geometry: Geometry) -> list[tuple[nn.Module, str, Any]]:
    finish = trunks.subject(tower).finish
    return [] if finish is None else finish(replace(geometry, library=TIMM))


def _timm_paths(model: nn.Module) -> dict[str, list[str]]:
    """Paths of the towers that timm made, by the model type of the configuration that tells how."""
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if "timm_model" in module._modules and recognises(module):
            config: Any = module.config
            found.setdefault(config.model_type, []).append(f"{path}.timm_model".lstrip("."))
    return found


def _of_a_class_with_arguments(model: nn.Module) -> tuple[str, Subject] | None:
    """The model inside one whose class takes more than a configuration, which nobody can build anew.

    ``class Mine(ViTPreTrainedModel): def __init__(self, config, outputs)``: its parts of transformers' own classes can.
    """
    if not _required_arguments(type(model)):
        return None
    for path, module in model.named_modules():
        if path and recognises(module) and not _required_arguments(type(module)):
            with contextlib.suppress(UnsupportedModelError):
                return path, subject(module)
    return None


def _required_arguments(cls: type[nn.Module]) -> list[str]:
    """What a class insists on besides a configuration."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[2:]  # without self and the configuration
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [p.name for p in named if p.default is p.empty]


# -- models without patches --------------------------------------------------------------------------------


def _why_none(model: nn.Module) -> str:
    name = type(model).__name__
    kind = getattr(model.config, "model_type", "") or name
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
    values = {channels(config) * math.prod(patch), channels(config) * math.prod(patch[-2:])}
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


def _geometry(vision: Vision) -> Geometry:
    model, config = vision.model, vision.first
    towers = vision.towers(model)
    if towers:
        return replace(trunks.subject(towers[0]).geometry, library=NAME)
    prefix = next((n for n in map(class_tokens, model.modules()) if n), 0)
    if hasattr(config, STRIDE):
        return _spectrogram(config, prefix)
    patch, image = sizes(config)
    _require_stem(model, config, patch)
    return Geometry(patch, image, prefix, NAME, kernel_size=None)


def _spectrogram(config: Any, prefix: int) -> Geometry:
    kernel = size_of(config.patch_size)
    stride = (config.frequency_stride, config.time_stride)
    image = (config.num_mel_bins, config.max_length)
    grid = tuple((i - k) // s + 1 for i, k, s in zip(image, kernel, stride, strict=True))
    return Geometry(stride, image, prefix, NAME, kernel_size=kernel, explicit_grid=grid)


# -- building twins ----------------------------------------------------------------------------------------


def build_twin(vision: Vision, geometry: Geometry, current: Geometry) -> nn.Module:
    """A fresh model of the configuration at ``geometry``.

    Raises:
        UnsupportedModelError, GeometryError: there is none, or its forward pass would not take it.
    """
    from anypatch.hosts.transformers.probing import require_grid, require_patch

    if geometry.patch_size != current.patch_size:
        require_patch(vision, geometry, current)
    require_grid(vision, geometry, current)
    return build_unchecked(vision, geometry, current)


def build_unchecked(vision: Vision, geometry: Geometry, current: Geometry) -> nn.Module:
    """A fresh model, whether or not its forward pass takes the geometry."""
    model = vision.model
    config = copy.deepcopy(vision.config)
    write(config, vision.parts, geometry, current, model)
    if geometry != current:
        try:
            type(config).from_dict(config.to_dict())  # it has to load again
        except Exception as error:
            if _loads_again(vision.config):  # one that does not at the present geometry either is the user's own
                raise _cannot_build(model, geometry, current, error) from error
    short = copy.deepcopy(config)
    if shorten(short):
        try:
            return make(type(model), short)
        except Exception:  # the language part cannot be cut like this: build the whole, empty
            pass
    try:
        return make(type(model), config)
    except (RuntimeError, LimitError):  # a constructor that reads its parameters: built for real by the caller
        raise
    except Exception as error:
        raise _cannot_build(model, geometry, current, error) from error


def _loads_again(config: Any) -> bool:
    """Whether the library takes its own record of a configuration (not after ``config.num_hidden_layers = 2``)."""
    try:
        type(config).from_dict(config.to_dict())
    except Exception:
        return False
    return True


def make(cls: type[nn.Module], config: Any) -> nn.Module:
    """A model of a configuration, without transformers' own initialisation."""
    with torch.device("meta"):  # says to transformers' constructors that there is nothing to initialise
        return cls(config)


def _cannot_build(model: nn.Module, geometry: Geometry, current: Geometry, error: Exception) -> Exception:
    if geometry == current:
        return UnsupportedModelError(
            f"transformers cannot build {type(model).__name__} from its configuration as it is, whatever the geometry: "
            f"{error}"
        )
    sizes = f"patch_size {show(geometry.patch_size)} and image_size {show(geometry.image_size)}"
    name = type(model).__name__
    if len(set(geometry.patch_size[-2:])) > 1:
        return UnsupportedModelError(f"{name} accepts only square patches, so not {sizes}")
    if geometry.image_size is not None and len(set(geometry.image_size[-2:])) > 1:
        return UnsupportedModelError(f"{name} accepts only square images, so not {sizes}")
    return UnsupportedModelError(f"transformers cannot build {name} with {sizes}: {error}")


# -- what shapes cannot tell -------------------------------------------------------------------------------


def _facts(vision: Vision) -> Facts:
    model = vision.model
    towers = vision.parts[0].towers
    if towers:
        facts = trunks.subject(model.get_submodule(towers[0])).facts
        return replace(facts, projections=tuple(f"{tower}.{path}" for tower in towers for path in facts.projections))
    everywhere = [config for _, config in configs(vision.config)]
    tiles = {}
    for config in everywhere:
        if getattr(config, "max_num_tiles", None):
            tiles[r"tile_embedding\.weight"] = (config.max_num_tiles, config.hidden_size)
    padding = stem_padding(vision)
    return Facts(
        folded=tiles,
        orders=_told_orders(vision) | {tensor: order for config in everywhere for tensor, order in row(config).orders},
        suffix_tokens=getattr(vision.config, "num_detection_tokens", None) or 0,
        whole_multiples=padding > 0,
        sampling=Sampling(antialias=False),
        padding=padding,
        relative=_bilinear if any(row(config).relative for config in everywhere) else None,
    )


def _told_orders(vision: Vision) -> dict[str, str]:
    """What the model's own ``unpatchify`` or ``patchify`` says of its pixel heads; asked before any table."""
    patch = size_of(getattr(vision.first, "patch_size", None))
    convolutions = (m for m in vision.model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
    stem = next((m for m in convolutions if m.stride[-2:] == patch), None)
    heads = {} if stem is None else pixel_heads(vision.model, stem)
    return {rf"^{re.escape(path)}\.": order for path, (_, order) in heads.items() if order}


def _bilinear(table: Tensor, old: Size, new: Size) -> Tensor:
    """A relative table (entries, heads) for another window, as BEiT's ``forward`` interpolates it."""
    sides, target = (tuple(2 * s - 1 for s in window) for window in (old, new))
    offsets = math.prod(sides)
    grid = table[:offsets].unflatten(0, sides).permute(2, 0, 1)[None]
    resized = nn.functional.interpolate(grid.float(), size=target, mode="bilinear")[0]
    return torch.cat([resized.permute(1, 2, 0).flatten(0, 1).to(table.dtype), table[offsets:]])


def stem_padding(vision: Vision) -> int:
    """Pixels that a patch projection without overlap adds around the image (ViTPose's)."""
    patch = size_of(getattr(vision.first, "patch_size", None))
    for module in vision.model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride == patch and module.in_channels <= 4:
            return 0 if isinstance(module.padding, str) else module.padding[0]
    return 0
