"""What reaches into timm's private parts, all of it here.

Tried on timm 1.0.31, the lowest. What is read: the records that ``create_model`` keeps (``_model_args``
and ``_traits``), the variables of ``build_model_with_cfg`` at work, the class of its feature extractors, and
``models._hub``. Nothing of timm is exchanged to see or change what it does: other threads build their models meanwhile.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from torch import nn

from anypatch.hosts.base import pair

BUILDER, NONE_SUCH = "build_model_with_cfg", "anypatch_looks_only"
FACTORY = ("variant", "pretrained_cfg", "model_cfg", "feature_cfg", "pretrained_strict", "pretrained_filter_fn",
           "kwargs_filter")  # fmt: skip


def is_extractor(model: nn.Module) -> bool:
    """Whether a model is one of timm's feature extractors around another."""
    return type(model).__module__.startswith("timm.models._features")


def core_of(model: Any) -> Any:
    """The model inside a feature extractor, where it is kept whole."""
    if not is_extractor(model):
        return model
    return next((model._modules[name] for name in ("model", "body") if name in model._modules), model)


def recorded(model: Any) -> bool:
    """Whether timm kept what the model was made with: ``create_model`` of timm 1.0.31 and later does."""
    return "_model_args" in vars(model)


def traits(model: Any) -> dict[str, Any]:
    """What timm notes of the input that a model takes (timm 1.0.31 and later)."""
    return getattr(model, "_traits", {})


def note_image_size(model: Any, size: Any) -> None:
    """Say in timm's notes which image size a model takes."""
    if hasattr(model, "_traits"):
        model._traits = {**model._traits, "img_size": pair(size)}


def record(model: Any) -> dict[str, Any]:
    """What ``timm.create_model`` was called with."""
    arguments = dict(getattr(model, "_model_args", {}))
    arguments.pop("pretrained_model_args", None)
    return arguments


def with_classes(model: Any, classes: int) -> Any:
    """A second name for the same modules, whose notes say another number of classes."""
    described = copy.copy(model)
    described.num_classes = classes
    for name in ("_traits", "_model_args"):
        if "num_classes" in (vars(model).get(name) or {}):
            setattr(described, name, {**vars(model)[name], "num_classes": classes})
    return described


def with_depth(model: Any, depth: int) -> Any:
    """A second name for the same modules, whose notes say that it was made with another number of blocks."""
    described = copy.copy(model)
    described._model_args = {**record(model), "depth": depth}
    return described


def depth_of(model: Any) -> int | None:
    """The number of blocks that timm would construct; ``None`` where that is no one number."""
    made = construction(model.pretrained_cfg["architecture"].partition(".")[0])
    if made is None:
        return None
    parameter = inspect.signature(made.kind).parameters.get("depth")
    said = {**made.arguments, **record(model)}.get("depth", None if parameter is None else parameter.default)
    return said if parameter is not None and type(said) is int else None


def write_config(model: nn.Module, path: Path, **extras: Any) -> None:
    """Write the ``config.json`` that timm puts beside weights on a hub."""
    from timm.models._hub import save_config_for_hf

    save_config_for_hf(model, str(path), **extras)


class _ReachedError(Exception):
    """timm was about to construct a model."""

    def __init__(self, variables: dict[str, Any]) -> None:
        self.variables = variables


class _Probe(dict[str, Any]):
    """An empty table of options that stops timm where it first looks whether there are any, before it builds a model.

    Nothing of timm is exchanged to see what it would do, so that other threads build their models meanwhile.
    """

    def __bool__(self) -> bool:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_name == BUILDER:
                raise _ReachedError(dict(frame.f_locals))
            frame = frame.f_back
        return False


@dataclass(frozen=True)
class Construction:
    """What timm would construct, and how it would read a checkpoint for it."""

    kind: Any
    arguments: dict[str, Any]
    converter: Callable[..., Any] | None


def construction(name: str, **arguments: Any) -> Construction | None:
    """What timm would do for an architecture, without doing it; ``None`` where it cannot be seen.

    Args:
        name: of the architecture, without a tag.
        **arguments: as of ``timm.create_model``.
    """
    seen = _reached(name, arguments)
    if seen is None:
        return None
    found = {key: value for key, value in seen["kwargs"].items() if key != NONE_SUCH}
    return Construction(seen["model_cls"], found, seen["pretrained_filter_fn"])


def _reached(name: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The variables of timm's builder where it is about to construct an architecture."""
    import timm

    try:
        # the second option is one that no constructor has: what asks for the first too early to stop ends there
        asked = {**arguments, "pretrained_cfg_overlay": _Probe(), NONE_SUCH: True}
        timm.models.model_entrypoint(name)(pretrained=False, **asked)
    except _ReachedError as reached:
        return reached.variables
    except Exception as error:
        return _variables(error.__traceback__) or None
    return None


def _variables(trace: TracebackType | None) -> dict[str, Any]:
    """Those of the function that builds, if an error came through it."""
    while trace is not None:
        if trace.tb_frame.f_code.co_name == BUILDER:
            return dict(trace.tb_frame.f_locals)
        trace = trace.tb_next
    return {}


def create(model: Any, arguments: dict[str, Any], sizes: dict[str, Any]) -> Any:
    """A fresh model of a live one's architecture.

    Args:
        model: the live model.
        arguments: as of ``timm.create_model``.
        sizes: further ones, which an entry point may fix itself: then they are handed to the constructor instead.
    """
    import timm

    name = model.pretrained_cfg["architecture"]
    try:
        return timm.create_model(name, **{**arguments, **sizes})
    except (TypeError, KeyError) as error:
        # Python 3.11 says the same by a KeyError where another error is being handled.
        twice = isinstance(error, KeyError) and error.args[:1] and error.args[0] in sizes
        if not twice and "multiple values for keyword argument" not in str(error):
            raise
        seen = _reached(name, {k: v for k, v in arguments.items() if k not in sizes and v is not None})
        if seen is None:
            raise
    given = {key: value for key, value in seen["kwargs"].items() if key != NONE_SUCH}
    if seen.get("pruned"):
        given["pruned"] = True
    build: Any = timm.models.build_model_with_cfg
    options = {key: seen[key] for key in FACTORY if key in seen}
    twin: Any = build(seen["model_cls"], pretrained=False, **options, **{**given, **sizes})
    if recorded(model):
        twin._model_args = {**arguments, **sizes}
    if "img_size" in sizes:
        note_image_size(twin, sizes["img_size"])
    return twin
