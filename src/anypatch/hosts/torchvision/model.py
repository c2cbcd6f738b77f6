"""torchvision: ``VisionTransformer`` and ``SwinTransformer`` (both versions), by name or built by class.

torchvision's models keep no record of their arguments, so they are read off the live modules.

``save`` writes ``model.safetensors`` and ``torchvision.json``; without anypatch it loads as::

    config = json.load(open(f"{directory}/torchvision.json"))
    module = importlib.import_module(config["module"])
    classes = {k: getattr(module, v) for k, v in config["classes"].items()}
    model = getattr(module, config["class"])(**config["arguments"], **classes)
    model.load_state_dict(safetensors.torch.load_file(f"{directory}/model.safetensors"))
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from anypatch.core.geometry import Geometry, Size, show
from anypatch.core.roles import Facts
from anypatch.core.tables import Sampling
from anypatch.core.twins import Subject
from anypatch.errors import CheckpointError, GeometryError, UnsupportedModelError
from anypatch.files.configs import read_config, require_allowed
from anypatch.files.header import read_header
from anypatch.hosts.base import Example, unknown
from anypatch.hosts.rebuilding import contiguous, require_rebuilds

NAME = "torchvision"
VIT = "torchvision.models.vision_transformer"
SWIN = "torchvision.models.swin_transformer"
NORM_EPS = {VIT: 1e-6, SWIN: 1e-5}  # what the constructors use when they are given no norm_layer
PICTURE = 224  # the side of an example image for models that take any size

# What a torchvision.json may say of a model, and which of torchvision's classes it may name.
ARGUMENTS = frozenset((
    "image_size", "patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim", "dropout", "attention_dropout",
    "num_classes", "representation_size", "embed_dim", "depths", "window_size", "mlp_ratio", "stochastic_depth_prob",
))  # fmt: skip
CLASSES = {
    "block": ("SwinTransformerBlock", "SwinTransformerBlockV2"),
    "downsample_layer": ("PatchMerging", "PatchMergingV2"),
}


def recognises(model: nn.Module) -> bool:
    return _family(model) is not None or type(model).__module__.split(".")[:2] == ["torchvision", "models"]


def _family(model: nn.Module) -> str | None:
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
    family = _family(model)
    if family is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} of torchvision has no patch embedding: of its models, VisionTransformer and "
            f"SwinTransformer have one"
        )
    projection = _projection(model)
    patch = tuple(projection.stride)
    if family == VIT:
        image = int(model.image_size)  # type: ignore[arg-type]
        return Geometry(patch, (image, image), 1, NAME)
    return Geometry(patch, None, 0, NAME)


def _projection(model: nn.Module) -> nn.Conv2d:
    path = "conv_proj" if _family(model) == VIT else "features.0.0"
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
    family = _family(model)
    assert family is not None
    arguments, classes = _arguments(model)
    if family == VIT:
        for name, size in (("patch_size", geometry.patch_size), ("image_size", geometry.image_size)):
            arguments[name] = _square(size, name)
    else:
        arguments["patch_size"] = list(geometry.patch_size)
    return _construct(family, arguments, classes)


def _square(size: Size | None, name: str) -> int:
    assert size is not None
    if len(set(size)) != 1:
        raise GeometryError(
            f"torchvision's VisionTransformer takes square patches and images only: {name} {show(size)} does not fit it"
        )
    return size[0]


def _construct(family: str, arguments: dict[str, Any], classes: dict[str, str]) -> nn.Module:
    module = importlib.import_module(family)
    cls = module.VisionTransformer if family == VIT else module.SwinTransformer
    return cls(**arguments, **{name: getattr(module, value) for name, value in classes.items()})


def _arguments(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """Constructor arguments of a live model: plain values, and classes by name."""
    m: Any = model
    if _family(model) == VIT:
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
        "patch_size": list(_projection(model).stride),
        "embed_dim": _projection(model).out_channels,
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


def example(subject: Subject) -> Example:
    model, geometry = subject.model, subject.geometry
    size = geometry.image_size
    if size is None:  # any size: two windows and a bit, so that shifting and padding happen
        m: Any = model
        size = tuple(
            (2 * window + 2) * patch
            for window, patch in zip(m.features[1][0].attn.window_size, geometry.patch_size, strict=True)
        )
    return Example((2, _projection(model).in_channels, *size), lambda m, pixels: m(pixels))


def load(name: str, **host_kwargs: Any) -> nn.Module:
    """``NAME``, ``NAME/WEIGHTS`` (an entry of the model's weights enum), or a directory that ``save`` wrote."""
    if host_kwargs.get("pretrained") is True:
        del host_kwargs["pretrained"]
    if Path(name).is_dir():
        return _load_directory(Path(name), **host_kwargs)
    from torchvision.models import get_model

    name, _, weights = name.partition("/")
    _require_known(name)
    host_kwargs.setdefault("weights", weights or "DEFAULT")
    try:
        return get_model(name, **host_kwargs)
    except KeyError as error:  # not in the weights enum
        raise CheckpointError(f"torchvision has no weights {weights!r} for {name}") from error


def build(name: str, **host_kwargs: Any) -> nn.Module:
    if Path(name).is_dir():
        return _build_directory(Path(name), **host_kwargs)
    from torchvision.models import get_model

    name = name.partition("/")[0]
    _require_known(name)
    return get_model(name, **{"weights": None, **host_kwargs})


def names() -> list[str]:
    from torchvision.models import list_models

    return list_models()


def _require_known(name: str) -> None:
    if name.lower() not in names():
        raise unknown(NAME, name, names())


def _load_directory(directory: Path, **host_kwargs: Any) -> nn.Module:
    from safetensors.torch import load_file

    model = _build_directory(directory, **host_kwargs)
    try:
        read_header(directory / "model.safetensors")
        model.load_state_dict(load_file(str(directory / "model.safetensors")))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"the weights in {directory} do not fit its torchvision.json: {error}") from error
    return model


def _build_directory(directory: Path, **host_kwargs: Any) -> nn.Module:
    path = directory / "torchvision.json"
    config = read_config(path)
    try:
        family, arguments, classes = config["module"], config["arguments"], config["classes"]
    except KeyError as error:
        raise CheckpointError(f"{directory} holds no torchvision model that anypatch saved: no {error}") from error
    if not isinstance(family, str) or family not in NORM_EPS:
        raise CheckpointError(f"{path} names {str(family)[:100]!r}, which is no torchvision model anypatch saves")
    require_allowed(arguments, ARGUMENTS, f"{path}: arguments")
    for name, value in require_allowed(classes, CLASSES, f"{path}: classes").items():
        if value not in CLASSES[name]:
            raise CheckpointError(f"{path}: {name} is {str(value)[:100]!r}, not one of {', '.join(CLASSES[name])}")
    return _construct(family, {**arguments, **host_kwargs}, classes)


def save(model: nn.Module, directory: Path, final: Path, **extras: Any) -> None:
    """Write the state dict and the arguments that rebuild the model (see this module's docstring)."""
    from safetensors.torch import save_file

    family = _family(model)
    if family is None:
        raise UnsupportedModelError(f"{type(model).__name__} of torchvision has no patch embedding")
    arguments, classes = _arguments(model)
    _require_default_norm(model, family)
    title = f"torchvision's {type(model).__name__}"
    save_file(contiguous(model, title), directory / "model.safetensors")
    config = {
        "module": family,
        "class": "VisionTransformer" if family == VIT else "SwinTransformer",
        "arguments": arguments,
        "classes": classes,
        **extras,
    }
    (directory / "torchvision.json").write_text(json.dumps(config, indent=2) + "\n")
    require_rebuilds(directory, model, lambda: _construct(family, arguments, classes), title)


def _require_default_norm(model: nn.Module, family: str) -> None:
    m: Any = model
    norm = m.encoder.ln if family == VIT else m.norm
    if type(norm) is not nn.LayerNorm or norm.eps != NORM_EPS[family]:
        raise UnsupportedModelError(
            f"the model was built with its own norm_layer ({norm}), which cannot be saved as an argument"
        )
