"""torchvision: ``VisionTransformer`` and ``SwinTransformer`` (both versions), by name or built by class.

torchvision's models keep no record of their arguments, so they are read off the live modules.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from anypatch.core.adapters import beneath
from anypatch.core.geometry import Geometry, Size, show
from anypatch.core.roles import Facts
from anypatch.core.tables import Sampling
from anypatch.core.twins import Subject
from anypatch.errors import GeometryError, UnsupportedModelError
from anypatch.hosts.torchvision.facts import ROWS, Row, row

NAME = "torchvision"
PARTS = ("IntermediateLayerGetter",)  # layers of a model, of whatever library, one after the other


def recognises(model: nn.Module) -> bool:
    """Whether a model is torchvision's, and not a detector or segmenter of its around somebody's backbone."""
    if row(model) is not None:
        return True
    inside = [module for module in model.modules() if module is not model]
    around = any(row(m) is not None or type(m).__module__.split(".")[0] not in ("torch", NAME) for m in inside)
    whole = type(model).__module__.split(".")[:2] == [NAME, "models"] and type(model).__name__ not in PARTS
    return whole and not around


def known(model: nn.Module) -> Row:
    """The row of a model's class.

    Raises:
        UnsupportedModelError: torchvision's model of another kind.
    """
    found = row(model)
    if found is None:
        names = " and ".join(other.name for other in ROWS.values())
        raise UnsupportedModelError(
            f"{type(model).__name__} of torchvision has no patch embedding: of its models, {names} have one"
        )
    return found


def subject(model: nn.Module) -> Subject:
    geometry = _geometry(model)
    own = Sampling(antialias=False, align_corners=True)  # torchvision's interpolate_embeddings
    return Subject(model, geometry, build=lambda g: _build(model, g), facts=Facts(sampling=own))


def _geometry(model: Any) -> Geometry:
    windows, patch = known(model).windows, tuple(projection_of(model).stride)
    if windows:
        return Geometry(patch, None, 0, NAME)
    image = int(model.image_size)
    return Geometry(patch, (image, image), 1, NAME)


def projection_of(model: nn.Module) -> nn.Conv2d:
    path = known(model).projection
    layer = beneath(model.get_submodule(path))
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
    family = known(model)
    arguments, classes = arguments_of(model)
    if family.windows:
        arguments["patch_size"] = list(geometry.patch_size)
    else:
        for name, size in (("patch_size", geometry.patch_size), ("image_size", geometry.image_size)):
            arguments[name] = _square(size, name)
    return construct(family, arguments, classes)


def _square(size: Size | None, name: str) -> int:
    assert size is not None
    if len(set(size)) != 1:
        raise GeometryError(
            f"torchvision's VisionTransformer takes square patches and images only: {name} {show(size)} does not fit it"
        )
    return size[0]


def construct(family: Row, arguments: dict[str, Any], classes: dict[str, str]) -> nn.Module:
    module = importlib.import_module(family.module)
    return getattr(module, family.name)(
        **arguments, **{name: getattr(module, value) for name, value in classes.items()}
    )


def arguments_of(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """Constructor arguments of a live model: plain values, and classes by name."""
    m: Any = model
    if not known(model).windows:
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
