"""torchvision's weights by name, and directories that ``save`` wrote.

``save`` writes ``model.safetensors`` and ``torchvision.json``; without anypatch it loads as::

    config = json.load(open(f"{directory}/torchvision.json"))
    module = importlib.import_module(config["module"])
    classes = {k: getattr(module, v) for k, v in config["classes"].items()}
    model = getattr(module, config["class"])(**config["arguments"], **classes)
    model.load_state_dict(safetensors.torch.load_file(f"{directory}/model.safetensors"))
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from anypatch.core.empty import empty
from anypatch.errors import AnypatchError, CheckpointError, UnsupportedModelError
from anypatch.files import layouts
from anypatch.files.configs import read_config, require_allowed
from anypatch.files.header import read_header
from anypatch.files.reading import Checkpoint
from anypatch.files.tensors import assign, compared, rooted_for, shapes
from anypatch.hosts.base import unknown
from anypatch.hosts.folders import is_format
from anypatch.hosts.rebuilding import contiguous, require_rebuilds
from anypatch.hosts.torchvision.facts import ROWS, Row
from anypatch.hosts.torchvision.model import NAME, arguments_of, construct, known

# What a torchvision.json may say of a model, and which of torchvision's classes it may name.
ARGUMENTS = frozenset((
    "image_size", "patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim", "dropout", "attention_dropout",
    "num_classes", "representation_size", "embed_dim", "depths", "window_size", "mlp_ratio", "stochastic_depth_prob",
))  # fmt: skip
CLASSES = {
    "block": ("SwinTransformerBlock", "SwinTransformerBlockV2"),
    "downsample_layer": ("PatchMerging", "PatchMergingV2"),
}


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
    if not isinstance(family, str) or family not in ROWS:
        raise CheckpointError(f"{path} names {str(family)[:100]!r}, which is no torchvision model anypatch saves")
    require_allowed(arguments, ARGUMENTS, f"{path}: arguments")
    for name, value in require_allowed(classes, CLASSES, f"{path}: classes").items():
        if value not in CLASSES[name]:
            raise CheckpointError(f"{path}: {name} is {str(value)[:100]!r}, not one of {', '.join(CLASSES[name])}")
    return construct(ROWS[family], {**arguments, **host_kwargs}, classes)


def save(model: nn.Module, directory: Path, final: Path, **extras: Any) -> None:
    """Write the state dict and the arguments that rebuild the model (see this module's docstring)."""
    from safetensors.torch import save_file

    family = known(model)
    arguments, classes = arguments_of(model)
    _require_default_norm(model, family)
    title = f"torchvision's {type(model).__name__}"
    save_file(contiguous(model, title), directory / "model.safetensors")
    config = {
        "module": family.module,
        "class": family.name,
        "arguments": arguments,
        "classes": classes,
        **extras,
    }
    (directory / "torchvision.json").write_text(json.dumps(config, indent=2) + "\n")
    require_rebuilds(directory, model, lambda: construct(family, arguments, classes), title)


def _require_default_norm(model: nn.Module, family: Row) -> None:
    norm = model.get_submodule(family.norm)
    if type(norm) is not nn.LayerNorm or norm.eps != family.norm_eps:
        raise UnsupportedModelError(
            f"the model was built with its own norm_layer ({norm}), which cannot be saved as an argument"
        )


# -- raw checkpoints -----------------------------------------------------------------------------------------


def fit(name: str, checkpoint: Checkpoint, **host_kwargs: Any) -> nn.Module:
    """A torchvision model with a file's weights.

    Raises:
        CheckpointError: the file does not fit ``name``.
        UnsupportedModelError: torchvision knows no such model.
    """
    checkpoint.require_one()
    if Path(name).is_dir():
        return assign(
            empty(lambda: build(name, **host_kwargs)), dict(checkpoint.tensors), checkpoint, f"torchvision:{name}"
        )
    name = name.split("/")[0]
    checkpoint = rooted_for(build_for(name, {}, host_kwargs), checkpoint)
    model = build_for(name, checkpoint.tensors, host_kwargs)
    return assign(model, dict(checkpoint.tensors), checkpoint, f"torchvision:{name}")


def build_for(name: str, tensors: Mapping[str, Any], host_kwargs: Mapping[str, Any]) -> nn.Module:
    """An empty torchvision model for a file's tensors.

    Raises:
        UnsupportedModelError: torchvision knows no such model.
    """
    from torchvision.models import get_model

    _require_known(name)
    native = layouts.native(tensors)
    arguments: dict[str, Any] = {}
    if native.image is not None:
        arguments["image_size"] = native.image[0]
    head = tensors.get("heads.head.weight", tensors.get("head.weight"))
    if head is not None:
        arguments["num_classes"] = head.shape[0]
    try:
        return empty(lambda: get_model(name, weights=None, **{**arguments, **host_kwargs}))
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UnsupportedModelError(f"torchvision cannot build {name} for this file: {error}") from error


def candidates(checkpoint: Checkpoint) -> Iterator[str]:
    """torchvision's models that hold exactly the file's tensors."""
    for name in names():
        if not name.startswith(("vit_", "swin_")):
            continue
        try:
            model = build_for(name, checkpoint.tensors, {})
        except AnypatchError:
            continue
        if compared(shapes(checkpoint.tensors), shapes(model.state_dict())).agree:
            yield name


def names_folder(path: Path) -> str | None:
    """A directory that ``save`` wrote."""
    return str(path) if is_format(path, "torchvision") else None
