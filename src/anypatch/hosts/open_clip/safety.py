"""What may stand in a directory of open_clip's format."""

from __future__ import annotations

import contextlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from anypatch.errors import CheckpointError
from anypatch.files.configs import PLACE, entries, read_config, require_name
from anypatch.hosts.open_clip.config import TOWER
from anypatch.hosts.timm.safety import checked_folder

CONFIG, HUB = "open_clip_config.json", "hf-hub:"
WEIGHTS = ("*.safetensors", "*.bin", "*.pth")
# Texts that are names on a hub, which have one slash; everything else in a configuration has none.
TEXT_TOWER = "hf_model_name"
HUB_NAMES = frozenset((TEXT_TOWER, "hf_tokenizer_name"))


def require_safe(directory: Path) -> dict[str, Any]:
    """The configuration of a directory, after all that open_clip would open on its word was looked at.

    Raises:
        CheckpointError: it is damaged, or names a place: another directory, a file, an address.
    """
    return require_safe_config(directory / CONFIG, directory / TOWER)


def require_safe_config(path: Path, tower: Path | None = None) -> dict[str, Any]:
    """The same of a configuration alone, and the directory beside it in which a timm tower may be described."""
    cfg = read_config(path).get("model_cfg")
    vision = cfg.get("vision_cfg") if isinstance(cfg, dict) else None
    if not isinstance(cfg, dict) or not isinstance(vision, dict) or not isinstance(cfg.get("text_cfg"), dict):
        raise CheckpointError(f"{path} has no model_cfg with a vision_cfg and a text_cfg")
    inside = tower is not None and (tower / "config.json").is_file()
    if tower is not None and inside:
        checked_folder(tower)  # it is read instead of the place that the configuration says
    for keys, value in entries(cfg, path):
        key = str(keys[-1])
        if not isinstance(value, str) or (inside and keys == ("vision_cfg", "timm_model_name")):
            continue
        if key in HUB_NAMES:
            _require_hub_name(value, f"{path}: {key}")
            if key == TEXT_TOWER and tower is not None:
                _require_here(value, f"{path}: {key}")
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


def _require_here(name: str, where: str) -> None:
    """The text tower that a directory names is one that open_clip's own models have, or is in the hub's cache.

    Raises:
        CheckpointError: open_clip would fetch it on the word of the directory alone.
    """
    if name in _own_text_towers():
        return
    with contextlib.suppress(ImportError, ValueError):  # ValueError: a name that no repository can have
        from huggingface_hub import try_to_load_from_cache

        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
    raise CheckpointError(
        f"{where} is {name[:100]!r}, a text tower that none of open_clip's own models has, and nothing is fetched from "
        f"a hub because a directory says so: fetch it first, with hf download {name[:100]} config.json"
    )


@lru_cache(maxsize=1)
def _own_text_towers() -> frozenset[str]:
    import open_clip

    configs = (open_clip.get_model_config(name) for name in open_clip.list_models())
    return frozenset(c["text_cfg"][TEXT_TOWER] for c in configs if TEXT_TOWER in (c.get("text_cfg") or {}))


def require_no_code(name: str) -> None:
    """The configuration of a text tower on a hub asks to run no code; otherwise transformers asks on standard input.

    Raises:
        CheckpointError: it does.
    """
    try:
        import transformers

        transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ImportError):
        pass  # it cannot be had, which open_clip says when it asks for it
    except ValueError as error:
        raise CheckpointError(f"the text tower {name!r} cannot be had without running its own code: {error}") from error


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
