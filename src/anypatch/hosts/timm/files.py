"""What may stand in a directory of timm's format, and what timm does with a file's tensors."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from torch import nn

from anypatch.errors import CheckpointError
from anypatch.files.configs import PLACE, entries, read_config, require_allowed, require_name
from anypatch.hosts.base import unknown
from anypatch.hosts.rebuilding import contiguous, require_rebuilds
from anypatch.hosts.timm.model import NAME, sizes_of, stem_of, title_of
from anypatch.hosts.timm.private import core_of, recorded

# What timm's factory takes besides the constructor's own arguments, and records. Not among them: checkpoint_path and
# cache_dir, which open files, pretrained and whatever begins so.
FACTORY = frozenset((
    "scriptable", "exportable", "no_jit", "features_only", "out_indices", "output_stride", "feature_cls", "out_map",
    "num_classes", "in_chans", "global_pool", "img_size", "use_naflex", "dynamic_img_size", "strict_img_size",
))  # fmt: skip
NEVER = frozenset(("checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args"))

BUILDER, NONE_SUCH = "build_model_with_cfg", "anypatch_looks_only"


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
    import timm

    try:
        # the second option is one that no constructor has: what asks for the first too early to stop ends there
        asked = {**arguments, "pretrained_cfg_overlay": _Probe(), NONE_SUCH: True}
        timm.models.model_entrypoint(name)(pretrained=False, **asked)
    except _ReachedError as reached:
        seen = reached.variables
    except Exception as error:
        seen = _variables(error.__traceback__)
    else:
        return None
    if not seen:
        return None
    found = {key: value for key, value in seen["kwargs"].items() if key != NONE_SUCH}
    return Construction(seen["model_cls"], found, seen["pretrained_filter_fn"])


def _variables(trace: TracebackType | None) -> dict[str, Any]:
    """Those of the function that builds, if an error came through it."""
    while trace is not None:
        if trace.tb_frame.f_code.co_name == BUILDER:
            return dict(trace.tb_frame.f_locals)
        trace = trace.tb_next
    return {}


@lru_cache(maxsize=256)
def _allowed(name: str) -> frozenset[str]:
    made = construction(name)
    own: set[str] = set()
    if made is not None:
        own |= set(made.arguments)
        for kind in getattr(made.kind, "__mro__", ()):
            if "__init__" in vars(kind):
                own |= set(inspect.signature(kind.__init__).parameters)
        cfg = made.arguments.get("cfg")
        if is_dataclass(cfg):
            own |= {f.name for f in fields(cfg)}
    return frozenset(k for k in own | FACTORY if k not in NEVER and not k.startswith("pretrained"))


def described(config: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """The architecture and the constructor arguments that a ``config.json`` says, after each was looked at.

    Raises:
        CheckpointError: it names something besides an architecture of timm's own and what describes one.
    """
    import timm

    name = require_name(config.get("architecture"), str(path))
    if not timm.is_model(name.partition(".")[0]):
        raise CheckpointError(f"{path} names the architecture {name[:100]!r}, which this timm does not have")
    arguments = config.get("model_args") or {}
    require_allowed(arguments, _allowed(name.partition(".")[0]), f"{path}: model_args")
    keys = {k: config[k] for k in ("num_classes", "global_pool") if config.get(k) is not None}
    require_allowed(keys, keys, str(path))
    return name, {**keys, **arguments}


def checked_folder(path: Path) -> tuple[str, dict[str, Any]]:
    """A directory in timm's format: what it describes.

    Raises:
        CheckpointError: its ``config.json`` is damaged, or says what no description of a model says.
    """
    config = read_config(path / "config.json")
    return described(config, path / "config.json")


def require_nested(config: dict[str, Any], path: Path) -> None:
    """The same for timm's models inside another library's configuration, at any depth.

    Raises:
        CheckpointError: an argument that opens or fetches something.
    """
    for keys, value in entries(config, path):
        names = [str(key) for key in keys]
        inside = any(key in ("model_args", "backbone_kwargs", "timm_kwargs") for key in names[:-1])
        if inside and (names[-1] in NEVER or names[-1].startswith("pretrained") or _is_place(value)):
            raise CheckpointError(f"{path}: {'.'.join(names)} is nothing that describes a model: remove it")


def _is_place(value: Any) -> bool:
    return isinstance(value, str) and bool(PLACE.search(value))


def load(name: str, **host_kwargs: Any) -> nn.Module:
    import timm

    _require_known(name)
    host_kwargs.setdefault("pretrained", True)
    return timm.create_model(name, **host_kwargs)


def build(name: str, **host_kwargs: Any) -> nn.Module:
    import timm

    _require_known(name)
    return timm.create_model(name, pretrained=False, **host_kwargs)


def names() -> list[str]:
    import timm

    return timm.list_models()


def _require_known(name: str) -> None:
    import timm

    if name.startswith("local-dir:"):
        checked_folder(Path(name.partition(":")[2]))
    elif ":" not in name and not timm.is_model(name.partition(".")[0]):
        raise unknown(NAME, name, names())


def save(model: nn.Module, directory: Path, final: Path, **extras: Any) -> None:
    """Write a directory that ``timm.create_model("local-dir:...", pretrained=True)`` takes.

    A head that was replaced by a linear layer, or taken off, is written as the number of classes that makes it.

    Raises:
        UnsupportedModelError: timm could not rebuild this model at its present geometry.
    """
    import timm
    from safetensors.torch import save_file
    from timm.models._hub import save_config_for_hf

    stem = stem_of(model)
    if not recorded(model) and type(core_of(model)).__name__ != "TNT":
        extras["model_args"] = {**sizes_of(model, stem.geometry, stem), **extras.get("model_args", {})}
    title = f"timm's {title_of(model)}"
    save_file(contiguous(model, title), directory / "model.safetensors")
    save_config_for_hf(_with_classes(model), str(directory / "config.json"), **extras)
    require_rebuilds(directory, model, lambda: timm.create_model(f"local-dir:{directory}"), title)


def _with_classes(model: Any) -> Any:
    """The model as its configuration has to describe it: with the number of classes that its head has."""
    names = model.pretrained_cfg.get("classifier") or ()
    core = core_of(model)
    if core is not model or not isinstance(getattr(model, "num_classes", None), int):
        return model
    counts = set()
    for name in [names] if isinstance(names, str) else names:
        path = name
        while path and core.get_submodule(path.rpartition(".")[0])._modules.get(path.rpartition(".")[2]) is None:
            path = path.rpartition(".")[0]  # the head around the classifier was replaced
        head = core.get_submodule(path) if path else None
        counts.add(0 if isinstance(head, nn.Identity) else getattr(head, "out_features", model.num_classes))
    if len(counts) != 1 or counts == {model.num_classes}:
        return model
    described = copy.copy(model)  # a second name for the same modules
    described.num_classes = counts.pop()
    for record in ("_traits", "_model_args"):
        if "num_classes" in (vars(model).get(record) or {}):
            setattr(described, record, {**vars(model)[record], "num_classes": described.num_classes})
    return described
