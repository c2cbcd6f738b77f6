"""What may stand in a directory of timm's format."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from anypatch.errors import CheckpointError
from anypatch.files.configs import PLACE, entries, read_config, require_allowed, require_name
from anypatch.hosts.timm.private import construction

# What timm's factory takes besides the constructor's own arguments, and records. Not among them: checkpoint_path and
# cache_dir, which open files, pretrained and whatever begins so.
FACTORY = frozenset((
    "scriptable", "exportable", "no_jit", "features_only", "out_indices", "output_stride", "feature_cls", "out_map",
    "num_classes", "in_chans", "global_pool", "img_size", "use_naflex", "dynamic_img_size", "strict_img_size",
))  # fmt: skip
LOCAL = "local-dir:"
NEVER = frozenset(("checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args"))


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
