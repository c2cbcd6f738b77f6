"""open_clip's own formats: models by name, directories, and what may stand in one.

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

import inspect
import json
from pathlib import Path
from typing import Any

from torch import nn

from anypatch.errors import CheckpointError, UnsupportedModelError
from anypatch.files.configs import PLACE, entries, read_config, require_name
from anypatch.hosts.base import unknown
from anypatch.hosts.open_clip.config import LOCAL, REMEMBERED, TOWER, construct, model_config
from anypatch.hosts.open_clip.model import NAME, image_tower
from anypatch.hosts.rebuilding import contiguous, require_rebuilds
from anypatch.hosts.timm.files import checked_folder

CONFIG, HUB = "open_clip_config.json", "hf-hub:"
WRITTEN = "open_clip_model.safetensors"
WEIGHTS = ("*.safetensors", "*.bin", "*.pth")
# Texts that are names on a hub, which have one slash; everything else in a configuration has none.
HUB_NAMES = frozenset(("hf_model_name", "hf_tokenizer_name"))


def require_safe(directory: Path) -> dict[str, Any]:
    """The configuration of a directory, after all that open_clip would open on its word was looked at.

    Raises:
        CheckpointError: it is damaged, or names a place: another directory, a file, an address.
    """
    path = directory / CONFIG
    cfg = read_config(path).get("model_cfg")
    vision = cfg.get("vision_cfg") if isinstance(cfg, dict) else None
    if not isinstance(cfg, dict) or not isinstance(vision, dict) or not isinstance(cfg.get("text_cfg"), dict):
        raise CheckpointError(f"{path} has no model_cfg with a vision_cfg and a text_cfg")
    tower = directory / TOWER
    inside = (tower / "config.json").is_file()
    if inside:
        checked_folder(tower)  # it is read instead of the place that the configuration says
    for keys, value in entries(cfg, path):
        key = str(keys[-1])
        if not isinstance(value, str) or (inside and keys == ("vision_cfg", "timm_model_name")):
            continue
        if key in HUB_NAMES:
            _require_hub_name(value, f"{path}: {key}")
        elif key == "timm_model_name":
            require_name(value, f"{path}: {key}")
        elif PLACE.search(value):
            raise CheckpointError(
                f"{path}: {'.'.join(map(str, keys))} is {value[:100]!r}, which is no name but a place"
            )
    return cfg


def _require_hub_name(value: str, where: str) -> None:
    """A name on a hub, whose configuration does not ask to run code of its own.

    Raises:
        CheckpointError: a directory, or a configuration that needs code.
    """
    if (
        value.count("/") > 1
        or value.startswith((".", "~", "/"))
        or Path(value).exists()
        or PLACE.search(value.replace("/", ""))
    ):
        raise CheckpointError(f"{where} is {value[:100]!r}, which is no name on a hub but a place")


def require_weights(directory: Path) -> None:
    """open_clip makes a random model of a directory without weights, and says so in a log at most.

    Raises:
        CheckpointError: there are none.
    """
    if not any(path.is_file() for pattern in WEIGHTS for path in directory.glob(pattern)):
        raise CheckpointError(
            f"{directory} has a configuration and no weights (open_clip_model.safetensors or another of "
            f"{', '.join(WEIGHTS)}); pretrained=False makes a random model"
        )


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
    try:
        model = open_clip.create_model(identifier, pretrained, **{"require_pretrained": True, **host_kwargs})
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"open_clip cannot load {name}: {error}") from error
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
    if name.startswith(LOCAL):
        require_safe(Path(name[len(LOCAL) :]))
    identifier, pretrained = name, None
    if not name.startswith((LOCAL, HUB)):
        identifier, _, tag = name.partition("/")
        pretrained = tag or None
    try:
        cfg = open_clip.get_model_config(identifier)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{identifier} holds no open_clip configuration: {error}") from error
    if cfg is None:
        raise unknown(NAME, identifier, open_clip.list_models())
    if name.startswith(LOCAL):
        tower = Path(name[len(LOCAL) :], TOWER)
        if (tower / "config.json").is_file():  # where the directory is now
            cfg["vision_cfg"]["timm_model_name"] = f"{LOCAL}{tower.resolve()}"
            host_kwargs.setdefault("vision_cfg", cfg["vision_cfg"])
    return identifier, pretrained, cfg


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
    save_file(contiguous(model, "open_clip's model"), directory / WRITTEN)
    require_rebuilds(directory, model, lambda: construct(model, cfg), "open_clip's model")
    staged, named = f"{LOCAL}{directory / TOWER}", cfg["vision_cfg"]
    if named.get("timm_model_name") == staged:
        cfg["vision_cfg"] = {**named, "timm_model_name": f"{LOCAL}{final.resolve() / TOWER}"}
    preprocessing = {k: v for k, v in getattr(tower, "preprocess_cfg", {}).items() if v is not None}
    text = json.dumps({"model_cfg": cfg, "preprocess_cfg": preprocessing, **extras}, indent=2)
    (directory / CONFIG).write_text(text + "\n")
