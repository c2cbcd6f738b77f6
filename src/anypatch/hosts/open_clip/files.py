"""open_clip's own formats: models by name, directories and raw checkpoints.

``save`` writes ``open_clip_config.json`` and ``open_clip_model.safetensors``, for
``open_clip.create_model("local-dir:DIRECTORY")``. The configuration is read off the live model; what no module
tells (the tokenizer) comes from the configuration that ``load`` remembers, or from ``save(..., name="ViT-B-32")``.

Limits of ``save`` for timm towers: open_clip passes neither a patch size nor an image size on to timm. So where the
geometry is not the one that the timm name stands for, the tower's configuration is written next to the weights, as
``DIRECTORY/tower/config.json``, and open_clip's configuration names it by its absolute path
(``"timm_model_name": "local-dir:DIRECTORY/tower"``). After moving the directory, load it with ``anypatch.load``, edit
that line, or pass the place on: ``cfg = open_clip.get_model_config("local-dir:NEW")``, then
``cfg["vision_cfg"]["timm_model_name"] = "local-dir:NEW/tower"`` and
``open_clip.create_model("local-dir:NEW", vision_cfg=cfg["vision_cfg"])``.
"""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

from torch import nn

from anypatch.core.plan import Plan
from anypatch.errors import CheckpointError, UnsupportedModelError
from anypatch.files.configs import read_json
from anypatch.files.header import read_header
from anypatch.files.reading import read
from anypatch.hosts.base import plain, unknown
from anypatch.hosts.folders import is_format
from anypatch.hosts.open_clip.config import LOCAL, REMEMBERED, TOWER, construct, model_config
from anypatch.hosts.open_clip.fitting import candidates, fit, from_config
from anypatch.hosts.open_clip.model import NAME, image_tower
from anypatch.hosts.open_clip.safety import (
    CONFIG,
    HUB,
    require_no_code,
    require_safe,
    require_safe_config,
    require_weights,
)
from anypatch.hosts.opened import Opened, changed_tensors, dump
from anypatch.hosts.rebuilding import contiguous, require_rebuilds
from anypatch.hosts.vetting import repository_file

__all__ = ["build", "candidates", "fit", "load", "names", "names_folder", "open_folder", "repository", "save"]

WEIGHTS = "open_clip_model.safetensors"


def names_folder(path: Path) -> str | None:
    """A directory in open_clip's format, as ``open_clip.create_model`` takes it."""
    return f"{LOCAL}{path}" if is_format(path, "open_clip") else None


def open_folder(source: Path) -> Opened:
    """The model over the file's own memory.

    Raises:
        CheckpointError: the directory is damaged, or its weights do not fit its configuration.
        UnsupportedModelError: the image tower is timm's.
    """
    cfg = require_safe(source)
    if "timm_model_name" in cfg["vision_cfg"]:
        raise UnsupportedModelError(f"{source} has a timm tower: use anypatch.load and anypatch.save")
    if not (source / WEIGHTS).is_file():
        raise CheckpointError(
            f"{source} holds no {WEIGHTS}: weights in another file are read by anypatch.load, and written by "
            f"anypatch.save"
        )
    raw, checkpoint = read_json(source / CONFIG), read(source / WEIGHTS)
    model = from_config(cfg, checkpoint)

    def texts(plan: Plan) -> dict[str, str]:
        text = copy.deepcopy(raw)
        assert plan.target.image_size is not None
        text["model_cfg"]["vision_cfg"]["patch_size"] = plain(plan.target.patch_size)
        text["model_cfg"]["vision_cfg"]["image_size"] = plain(plan.target.image_size)
        if isinstance(text.get("preprocess_cfg"), dict) and "size" in text["preprocess_cfg"]:
            text["preprocess_cfg"]["size"] = plain(plan.target.image_size)
        return {CONFIG: dump(text)}

    def values(plan: Plan) -> Any:
        return {checkpoint.names[n]: t for n, t in changed_tensors(checkpoint, model, plan).items()}

    return Opened(model, {WEIGHTS: read_header(source / WEIGHTS)}, values, texts)


def load(name: str, **host_kwargs: Any) -> nn.Module:
    """``NAME/PRETRAINED``, ``local-dir:PATH``, ``hf-hub:ORG/REPO``, or a directory.

    The tag may also be given as ``pretrained=``.

    Raises:
        UnsupportedModelError: open_clip has no such model.
        CheckpointError: no tag says which weights, or they cannot be had.
    """
    import open_clip

    given = host_kwargs.pop("pretrained", None)
    identifier, pretrained, cfg = _named(name, host_kwargs)
    if isinstance(given, str):
        pretrained = given
    if identifier.startswith(LOCAL):
        require_weights(Path(identifier[len(LOCAL) :]))
    elif pretrained is None and not identifier.startswith(HUB):
        tags = open_clip.list_pretrained_tags_by_model(identifier)
        which = f"say which with open_clip:{identifier}/TAG: {', '.join(tags)}" if tags else "it has none"
        raise CheckpointError(
            f"open_clip:{identifier} does not say which pretrained weights: {which}; pretrained=False makes random ones"
        )
    model = open_clip.create_model(identifier, pretrained, **{"require_pretrained": True, **host_kwargs})
    vars(model)[REMEMBERED] = cfg
    return model


def build(name: str, **host_kwargs: Any) -> nn.Module:
    import open_clip

    identifier, _, cfg = _named(name, host_kwargs)
    # the towers' own pretrained weights are weights, too; which of these names there are depends on the version
    parameters = inspect.signature(open_clip.create_model).parameters
    without = {k: False for k in ("load_weights", "pretrained_text", "pretrained_hf") if k in parameters}
    model = open_clip.create_model(identifier, None, **{**without, **host_kwargs})
    vars(model)[REMEMBERED] = cfg
    return model


def names() -> list[str]:
    import open_clip

    return open_clip.list_models()


def _named(name: str, host_kwargs: dict[str, Any]) -> tuple[str, str | None, dict[str, Any]]:
    """open_clip's own name for a model, its tag, and its configuration; a timm tower in a directory is found there."""
    import open_clip

    if Path(name, CONFIG).is_file():
        name = LOCAL + name
    found = repository(name)
    if name.startswith(LOCAL):
        require_safe(Path(name[len(LOCAL) :]))
    elif found is not None:
        path = repository_file(*found, {"revision": name.partition("@")[2] or None, **host_kwargs})
        if path is not None:
            require_safe_config(path)
    identifier, pretrained = name, None
    if not name.startswith((LOCAL, HUB)):
        identifier, _, tag = name.partition("/")
        pretrained = tag or None
    try:
        cfg = open_clip.get_model_config(identifier)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"open_clip finds no configuration of {identifier}: {error}") from error
    if cfg is None:
        raise unknown(NAME, identifier, open_clip.list_models())
    if isinstance(cfg.get("text_cfg"), dict) and "hf_model_name" in cfg["text_cfg"]:
        require_no_code(cfg["text_cfg"]["hf_model_name"])
    if name.startswith(LOCAL):
        tower = Path(name[len(LOCAL) :], TOWER)
        if (tower / "config.json").is_file():  # where the directory is now
            cfg["vision_cfg"]["timm_model_name"] = f"{LOCAL}{tower.resolve()}"
            host_kwargs.setdefault("vision_cfg", cfg["vision_cfg"])
    return identifier, pretrained, cfg


def repository(name: str) -> tuple[str, str] | None:
    """Of ``hf-hub:``; what open_clip itself lists it describes itself."""
    return (name[len(HUB) :].partition("@")[0], CONFIG) if name.startswith(HUB) else None


def save(model: nn.Module, directory: Path, final: Path, name: str | None = None, **extras: Any) -> None:
    """Write what ``open_clip.create_model("local-dir:DIRECTORY")`` loads (see this module's docstring).

    Args:
        model: a whole model.
        directory: where to.
        final: the place that the directory will have.
        name: the open_clip model whose tokenizer the configuration should name, if ``load`` did not make the model.
        **extras: further entries of the configuration file.
    """
    from safetensors.torch import save_file

    path, tower = image_tower(model)
    if not path:
        raise UnsupportedModelError("a bare image tower has no format in open_clip: save the whole model")
    cfg = model_config(model, directory, name)
    save_file(contiguous(model, "open_clip's model"), directory / WEIGHTS)
    require_rebuilds(directory, model, lambda: construct(cfg), "open_clip's model")
    staged, named = f"{LOCAL}{directory / TOWER}", cfg["vision_cfg"]
    if named.get("timm_model_name") == staged:
        cfg["vision_cfg"] = {**named, "timm_model_name": f"{LOCAL}{final.resolve() / TOWER}"}
    preprocessing = {k: v for k, v in getattr(tower, "preprocess_cfg", {}).items() if v is not None}
    text = json.dumps({"model_cfg": cfg, "preprocess_cfg": preprocessing, **extras}, indent=2)
    (directory / CONFIG).write_text(text + "\n")
