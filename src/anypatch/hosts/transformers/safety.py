"""What may stand in a directory or a repository of transformers' format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anypatch.errors import CheckpointError
from anypatch.files.configs import MAX_LABELS, PLACE, entries, read_config, require_file_name
from anypatch.files.reading import require_modest
from anypatch.hosts.timm.safety import require_nested
from anypatch.hosts.vetting import repository_file, require_readable

CONFIG, ADAPTER = "config.json", "adapter_config.json"
# Texts of an adapter's configuration that are patterns of names, in which a dot or a backslash is no place.
PATTERNS = frozenset(
    ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "target_parameters", "rank_pattern")
)
BASE = "base_model_name_or_path"


def require_safe_source(name: str, options: Mapping[str, Any], before: tuple[Path, ...] = ()) -> None:
    """Look at all that transformers would fetch, open or run on the word of a directory or a repository.

    Args:
        name: as its loader takes it.
        options: of the loader, which say which revision and where.
        before: directories of adapters that led here.

    Raises:
        CheckpointError: something in it says more than what model it holds.
    """
    folder = Path(name, options.get("subfolder") or "")
    local = folder.is_dir()
    if local:
        if folder.resolve() in before:
            raise CheckpointError(f"{folder / ADAPTER} names itself as the model that it is for")
        if before:
            require_readable(folder)
    config = folder / CONFIG if local else repository_file(name, CONFIG, options)
    if config is not None and config.is_file():
        require_safe(read_config(config), config)
    path = folder / ADAPTER if local else repository_file(name, ADAPTER, options)
    if path is None or not path.is_file():
        return
    base = require_safe_adapter(read_config(path), path)
    if base is not None and not (local and config is not None and config.is_file()):
        # a model of its own, which is read for it
        require_safe_source(base, {"cache_dir": options.get("cache_dir")}, (*before, folder.resolve()))


def require_safe(config: dict[str, Any], path: Path) -> None:
    """Look at what transformers would fetch, open or run on the word of a configuration, at any depth.

    Raises:
        CheckpointError: a backbone that is somewhere else, a kernel from a hub, a file outside, or an argument of
            timm's that opens one.
    """
    require_nested(config, path)
    for key, kinds in (("model_type", (str,)), ("architectures", (list, str)), ("quantization_config", (dict,))):
        if config.get(key) is not None and not isinstance(config[key], kinds):
            raise CheckpointError(f"{path}: {key} is {str(config[key])[:100]!r}, which names nothing")
    if not all(isinstance(name, str) for name in config.get("architectures") or ()):
        raise CheckpointError(f"{path}: architectures is {str(config['architectures'])[:100]}, which names no class")
    if config.get("transformers_weights") is not None:  # which of the files beside it has the weights
        weights = path.parent / require_file_name(config["transformers_weights"], f"{path}: transformers_weights")
        if weights.exists():
            require_modest(weights)
    for keys, value in entries(config, path):
        key = str(keys[-1])
        if key == "num_classes" and type(value) is int and value > MAX_LABELS:  # of its wrapper of timm, as num_labels
            raise CheckpointError(f"{path}: {key} is {value}, and no model has more than {MAX_LABELS}")
        if not isinstance(value, str):
            continue
        # "repository/kernel" there is compiled code that transformers fetches and runs
        if key.endswith(("attn_implementation", "experts_implementation")) and PLACE.search(value):
            raise CheckpointError(f"{path}: {key} is {value[:100]!r}, which is code from elsewhere")
        # of timm a name has no slash; one on a hub has, and its configuration would be fetched
        if key in ("backbone", "architecture") and (value[:1] == "/" or PLACE.search(value.replace("/", "", 1))):
            raise CheckpointError(f"{path}: {key} is {value[:100]!r}, which is no name but a place")
        if key == "backbone" and "/" in value and not _has_backbone(config, keys):
            raise CheckpointError(
                f"{path}: backbone is {value[:100]!r}, whose configuration is elsewhere: write it into {path.name} as "
                f"backbone_config"
            )


def _has_backbone(config: Any, keys: tuple[Any, ...]) -> bool:
    """Whether the table that names a backbone describes it, too."""
    for key in keys[:-1]:
        config = config[key]
    return isinstance(config.get("backbone_config"), dict)


def require_safe_adapter(config: dict[str, Any], path: Path) -> str | None:
    """Look at what PEFT would open or import on the word of an adapter's configuration.

    Returns:
        the model that it is for, where it says.

    Raises:
        CheckpointError: it names a file, or a module to import.
    """
    for keys, value in entries(config, path):
        if not isinstance(value, str) or set(map(str, keys)) & PATTERNS or keys == (BASE,):
            continue
        if PLACE.search(value):
            raise CheckpointError(
                f"{path}: {'.'.join(map(str, keys))} is {value[:100]!r}, which is no name but a place"
            )
    if config.get("megatron_config") is not None:  # then PEFT imports what megatron_core names
        raise CheckpointError(f"{path}: megatron_config asks to import {str(config.get('megatron_core'))[:100]!r}")
    base = config.get(BASE)
    if base is not None and (not isinstance(base, str) or "\0" in base):
        raise CheckpointError(
            f"{path}: {BASE} is {str(base)[:100]!r}, which is neither a directory nor a name on a hub"
        )
    return base or None


def is_adapter(folder: Path) -> bool:
    """Whether a directory holds an adapter of PEFT and no model."""
    return (folder / ADAPTER).is_file() and not (folder / CONFIG).exists()


def require_no_adapter(folder: Path, what: str) -> None:
    """A directory for a whole model holds no adapter, which transformers would put on that model as it loads it.

    Args:
        folder: the directory.
        what: what to do instead.

    Raises:
        CheckpointError: it does.
    """
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder} holds an adapter of PEFT ({ADAPTER}), which transformers puts on the model beside it: {what}"
        )


def require_model(name: str, options: Mapping[str, Any]) -> None:
    """A directory holds more than an adapter.

    Raises:
        CheckpointError: it does not; the message says what to load.
    """
    folder = Path(name, options.get("subfolder") or "")
    if is_adapter(folder):
        base = read_config(folder / ADAPTER).get(BASE)
        raise CheckpointError(
            f"{folder} holds an adapter for {str(base)[:200]} and no model: load that, and put the adapter on it with "
            f"peft.PeftModel.from_pretrained(model, {str(folder)!r})"
        )
