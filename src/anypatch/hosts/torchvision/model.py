"""torchvision: ``VisionTransformer`` and ``SwinTransformer`` (both versions), by name or built by class.

torchvision's models keep no record of their arguments, so they are read off the live modules.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from anypatch.core.geometry import Geometry, Size, show
from anypatch.core.roles import Facts
from anypatch.core.tables import Sampling
from anypatch.core.twins import Subject
from anypatch.errors import GeometryError, UnsupportedModelError

NAME = "torchvision"
VIT = "torchvision.models.vision_transformer"
SWIN = "torchvision.models.swin_transformer"
NORM_EPS = {VIT: 1e-6, SWIN: 1e-5}  # what the constructors use when they are given no norm_layer


def recognises(model: nn.Module) -> bool:
    return family_of(model) is not None or type(model).__module__.split(".")[:2] == ["torchvision", "models"]


def family_of(model: nn.Module) -> str | None:
    """The torchvision module whose class the model is, or derives from."""
    for cls in type(model).__mro__:
        for module, name in ((VIT, "VisionTransformer"), (SWIN, "SwinTransformer")):
            if (cls.__module__, cls.__name__) == (module, name):
                return module
    return None


def subject(model: nn.Module) -> Subject:
    geometry = _geometry(model)
    own = Sampling(antialias=False, align_corners=True)  # torchvision's interpolate_embeddings
    return Subject(model, geometry, build=lambda g: _build(model, g), facts=Facts(sampling=own))


def _geometry(model: nn.Module) -> Geometry:
    family = family_of(model)
    if family is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} of torchvision has no patch embedding: of its models, VisionTransformer and "
            f"SwinTransformer have one"
        )
    projection = projection_of(model)
    patch = tuple(projection.stride)
    if family == VIT:
        image = int(model.image_size)  # type: ignore[arg-type]
        return Geometry(patch, (image, image), 1, NAME)
    return Geometry(patch, None, 0, NAME)


def projection_of(model: nn.Module) -> nn.Conv2d:
    path = "conv_proj" if family_of(model) == VIT else "features.0.0"
    layer = model.get_submodule(path)
    while not isinstance(layer, nn.Conv2d) and isinstance(layer._modules.get("base_layer"), nn.Module):
        layer = layer._modules["base_layer"]  # type: ignore[assignment]
    if not isinstance(layer, nn.Conv2d):
        raise UnsupportedModelError(
            f"{path} of {type(model).__name__} is a {type(layer).__name__}: the stem is not one linear map per patch"
        )
    if layer.kernel_size != layer.stride:
        raise UnsupportedModelError(
            f"{path} of {type(model).__name__} has kernel {show(layer.kernel_size)} and stride {show(layer.stride)}: "
            f"torchvision's constructors know no overlapping patches"
        )
    return layer


def _build(model: nn.Module, geometry: Geometry) -> nn.Module:
    family = family_of(model)
    assert family is not None
    arguments, classes = arguments_of(model)
    if family == VIT:
        for name, size in (("patch_size", geometry.patch_size), ("image_size", geometry.image_size)):
            arguments[name] = _square(size, name)
    else:
        arguments["patch_size"] = list(geometry.patch_size)
    return construct(family, arguments, classes)


def _square(size: Size | None, name: str) -> int:
    assert size is not None
    if len(set(size)) != 1:
        raise GeometryError(
            f"torchvision's VisionTransformer takes square patches and images only: {name} {show(size)} does not fit it"
        )
    return size[0]


def construct(family: str, arguments: dict[str, Any], classes: dict[str, str]) -> nn.Module:
    module = importlib.import_module(family)
    cls = module.VisionTransformer if family == VIT else module.SwinTransformer
    return cls(**arguments, **{name: getattr(module, value) for name, value in classes.items()})


def arguments_of(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """Constructor arguments of a live model: plain values, and classes by name."""
    m: Any = model
    if family_of(model) == VIT:
        block = m.encoder.layers[0]
        heads = dict(m.heads.named_children()) if isinstance(m.heads, nn.Module) else {}
        hidden = heads.get("pre_logits")
        return {
            "image_size": int(m.image_size),
            "patch_size": int(m.patch_size) if isinstance(m.patch_size, int) else m.patch_size[0],
            "num_layers": len(m.encoder.layers),
            "num_heads": int(block.num_heads),
            "hidden_dim": int(m.hidden_dim),
            "mlp_dim": int(m.mlp_dim),
            "dropout": float(m.dropout),
            "attention_dropout": float(m.attention_dropout),
            "num_classes": getattr(heads.get("head"), "out_features", m.num_classes),
            "representation_size": getattr(hidden, "out_features", None),
        }, {}
    stages = list(m.features)[1::2]
    first, last = stages[0][0], stages[-1][-1]
    arguments = {
        "patch_size": list(projection_of(model).stride),
        "embed_dim": projection_of(model).out_channels,
        "depths": [len(stage) for stage in stages],
        "num_heads": [int(stage[0].attn.num_heads) for stage in stages],
        "window_size": [int(side) for side in first.attn.window_size],
        "mlp_ratio": first.mlp[0].out_features / first.mlp[0].in_features,
        "dropout": float(first.attn.dropout),
        "attention_dropout": float(first.attn.attention_dropout),
        "stochastic_depth_prob": float(last.stochastic_depth.p),
        "num_classes": getattr(m.head, "out_features", m.num_classes),
    }
    classes = {"block": type(first).__name__}
    if len(m.features) > 2:
        classes["downsample_layer"] = type(m.features[2]).__name__
    return arguments, classes
