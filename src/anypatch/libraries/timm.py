"""timm: models made by ``timm.create_model``, feature extractors included."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from anypatch.errors import UnsupportedModelError
from anypatch.geometry import Geometry, Size, show
from anypatch.libraries.base import Example, class_tokens, comes_from, plain
from anypatch.roles import Facts
from anypatch.twins import Subject

NAME = "timm"

# Flattening order of a patch for linear patch embeddings: timm's `Patchify` layers put channels last.
FACTS = Facts(orders={r"embeds\.proj\.": "h w c"})


def recognises(model: nn.Module) -> bool:
    return comes_from(model, "timm") and bool(
        (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    )


def subject(model: nn.Module) -> Subject:
    geometry = _geometry(model)
    return Subject(
        model,
        geometry,
        build=lambda g: _build(model, g, geometry),
        facts=FACTS,
        finish=lambda g: _bookkeeping(model, g),
    )


def _geometry(model: nn.Module) -> Geometry:
    projection = _projection(model)
    image = _image_size(model)
    if isinstance(projection, _ConvNd):
        patch, kernel = tuple(projection.stride), tuple(projection.kernel_size)
    else:
        size = getattr(getattr(model, "embeds", None), "patch_size", None)
        size = size or getattr(getattr(model, "patch_embed", None), "patch_size", None)
        if size is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no patch embedding that anypatch can find"
            )
        patch = kernel = (size, size) if isinstance(size, int) else tuple(size)
    prefix = getattr(model, "num_prefix_tokens", None)
    if prefix is None:
        prefix = class_tokens(model)
    return Geometry(patch, image, prefix, NAME, kernel_size=kernel)


def _projection(model: nn.Module) -> nn.Module | None:
    """The layer timm itself names as the first that sees pixels."""
    name = getattr(model, "_traits", {}).get("first_conv") or model.pretrained_cfg.get("first_conv")
    if isinstance(name, (tuple, list)):
        name = name[0]
    if not isinstance(name, str):
        return None
    for path in (name, "model." + name):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    return None


def _image_size(model: nn.Module) -> Size:
    for size in (
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        getattr(model, "_traits", {}).get("img_size"),
        getattr(model, "img_size", None),
    ):
        if isinstance(size, int):
            return (size, size)
        if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(s, int) for s in size):
            return tuple(size)
    return tuple(model.pretrained_cfg.get("input_size", (3, 224, 224))[-2:])


def _build(model: nn.Module, geometry: Geometry, current: Geometry) -> nn.Module:
    import timm

    cfg = model.pretrained_cfg
    arguments = dict(getattr(model, "_model_args", {}))
    arguments.pop("pretrained_model_args", None)
    for name in ("num_classes", "in_chans"):
        if isinstance(getattr(model, name, None), int) and "features_only" not in arguments:
            arguments.setdefault(name, getattr(model, name))
    assert geometry.image_size is not None
    sizes: dict[str, Any] = {"img_size": plain(geometry.image_size), "patch_size": plain(geometry.patch_size)}
    accepted = inspect.signature(type(model).__init__).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values()) or "cfg" in accepted
    if "img_size" not in accepted and not open_ended and "img_size" not in arguments:
        del sizes["img_size"]
    if geometry.patch_size == current.patch_size and "patch_size" not in arguments:
        del sizes["patch_size"]
    try:
        return timm.create_model(cfg["architecture"], **{**arguments, **sizes})
    except (TypeError, AssertionError, ValueError) as error:
        raise UnsupportedModelError(
            f"timm cannot build {cfg['architecture']} with patch_size {show(geometry.patch_size)} and image_size "
            f"{show(geometry.image_size)}: {error}"
        ) from error


def _bookkeeping(model: nn.Module, geometry: Geometry) -> list[tuple[nn.Module, str, Any]]:
    """The size that ``timm.data.resolve_model_data_config`` reads."""
    assert geometry.image_size is not None
    cfg = copy.deepcopy(model.pretrained_cfg)
    cfg["input_size"] = (cfg.get("input_size", (3,))[0], *geometry.image_size)
    if cfg.get("test_input_size"):
        cfg["test_input_size"] = (cfg["test_input_size"][0], *geometry.image_size)
    names = [n for n in ("pretrained_cfg", "default_cfg") if hasattr(model, n)]
    return [(model, name, cfg) for name in names]


def example(model: nn.Module, geometry: Geometry) -> Example:
    channels = getattr(model, "in_chans", None) or model.pretrained_cfg["input_size"][0]
    assert geometry.image_size is not None
    return Example((2, channels, *geometry.image_size), lambda m, pixels: m(pixels))


def load(name: str, **host_kwargs: Any) -> nn.Module:
    import timm

    host_kwargs.setdefault("pretrained", True)
    return timm.create_model(name, **host_kwargs)


def save(model: nn.Module, directory: Path, **extras: Any) -> None:
    from timm.models import save_for_hf

    save_for_hf(model, str(directory), safe_serialization=True, **extras)
