"""Files of timm: a raw checkpoint's tensors, and directories in its format."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from anypatch.core.plan import Plan
from anypatch.errors import CheckpointError
from anypatch.files.configs import read_config
from anypatch.files.reading import read
from anypatch.files.shards import SINGLE, read_shards
from anypatch.hosts.base import plain, unknown
from anypatch.hosts.folders import is_format
from anypatch.hosts.opened import Opened, as_json, changed_tensors, dump, merged
from anypatch.hosts.rebuilding import contiguous, require_rebuilds
from anypatch.hosts.timm.classifier import head_names
from anypatch.hosts.timm.facts import row
from anypatch.hosts.timm.fitting import fit
from anypatch.hosts.timm.inference import candidates
from anypatch.hosts.timm.model import sizes_of
from anypatch.hosts.timm.private import core_of, depth_of, record, recorded, with_classes, with_depth, write_config
from anypatch.hosts.timm.safety import LOCAL, checked_folder, described
from anypatch.hosts.timm.stems import NAME, stem_of, title_of
from anypatch.hosts.vetting import repository_file

__all__ = ["build", "candidates", "fit", "load", "names", "names_folder", "open_folder", "repository", "save"]


def names_folder(path: Path) -> str | None:
    """A directory in timm's format, as ``timm.create_model`` takes it."""
    return f"{LOCAL}{path}" if is_format(path, "timm") else None


def open_folder(source: Path) -> Opened:
    """The model over the file's own memory.

    Raises:
        CheckpointError: the directory is damaged, its weights are in shards, or do not fit its configuration.
    """
    shards = read_shards(source)
    if list(shards.headers) != [SINGLE]:
        raise CheckpointError(f"{source}: timm reads {SINGLE} only, not shards")
    raw = read_config(source / "config.json")
    checkpoint = read(source / SINGLE)
    model = fit(f"{LOCAL}{source}", checkpoint)

    def texts(plan: Plan) -> dict[str, str]:
        before = _config(model)
        plan.apply()
        text = merged(raw, before, _config(model))
        text["model_args"] = as_json(_arguments(raw, plan))
        return {"config.json": dump(text)}

    def values(plan: Plan) -> Any:
        return {checkpoint.names[n]: t for n, t in changed_tensors(checkpoint, model, plan).items()}

    return Opened(model, shards.headers, values, texts)


def _arguments(raw: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """What timm's constructor has to be told, where the sizes are no longer the architecture's own."""
    old, new = plan.subject.geometry, plan.target
    arguments = dict(raw.get("model_args") or {})
    for key, before, size in (
        ("img_size", old.image_size, new.image_size),
        ("patch_size", old.patch_size, new.patch_size),
    ):
        if size is not None and (size != before or key in arguments):
            arguments[key] = plain(size)
    return arguments


def _config(model: nn.Module) -> dict[str, Any]:
    """What timm would write for a model."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "config.json"
        write_config(model, path)
        return read_config(path)


# -- by name, and to directories -----------------------------------------------------------------------------


def load(name: str, **host_kwargs: Any) -> nn.Module:
    import timm

    name = _known(name, host_kwargs)
    host_kwargs.setdefault("pretrained", True)
    return timm.create_model(name, **host_kwargs)


def build(name: str, **host_kwargs: Any) -> nn.Module:
    import timm

    name = _known(name, host_kwargs)
    return timm.create_model(name, pretrained=False, **host_kwargs)


def names() -> list[str]:
    import timm

    return timm.list_models()


def _known(name: str, options: Mapping[str, Any]) -> str:
    """The name as timm takes it, after what it stands for was looked at."""
    import timm

    if ":" not in name and not timm.is_model(name.partition(".")[0]) and Path(name).is_dir():
        name = names_folder(Path(name)) or name
    found = repository(name)
    if name.startswith(LOCAL):
        checked_folder(Path(name.partition(":")[2]))
    elif found is not None:
        path = repository_file(*found, {"revision": name.partition("@")[2] or None, **options})
        if path is not None:
            described(read_config(path), path)
    elif ":" not in name and not timm.is_model(name.partition(".")[0]):
        raise unknown(NAME, name, names())
    return name


def repository(name: str) -> tuple[str, str] | None:
    """Of ``hf-hub:``; what timm itself lists it describes itself."""
    prefix, colon, rest = name.partition(":")
    return (rest.partition("@")[0], "config.json") if colon and prefix in ("hf-hub", "hf_hub") else None


def save(model: nn.Module, directory: Path, final: Path, **extras: Any) -> None:
    """Write a directory that ``timm.create_model("local-dir:...", pretrained=True)`` takes.

    A head that was replaced by a linear layer, or taken off, is written as the number of classes that makes it, blocks
    that were taken off as the depth.

    Raises:
        UnsupportedModelError: timm could not rebuild this model at its present geometry.
    """
    import timm
    from safetensors.torch import save_file

    stem = stem_of(model)
    described = _with_depth(model)
    if not recorded(model) and not row(core_of(model)).pixel_kernel:
        sizes = {**record(described), **sizes_of(model, stem.geometry, stem)}
        extras["model_args"] = {**sizes, **extras.get("model_args", {})}
    title = f"timm's {title_of(model)}"
    save_file(contiguous(model, title), directory / "model.safetensors")
    write_config(_with_classes(described), directory / "config.json", **extras)
    require_rebuilds(directory, model, lambda: timm.create_model(f"local-dir:{directory}"), title)


def _with_depth(model: Any) -> Any:
    """The model as its configuration has to describe it: with the number of blocks that it has."""
    blocks = core_of(model)._modules.get("blocks")
    if core_of(model) is not model or not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
        return model
    return model if depth_of(model) in (None, len(blocks)) else with_depth(model, len(blocks))


def _with_classes(model: Any) -> Any:
    """The model as its configuration has to describe it: with the number of classes that its head has."""
    core = core_of(model)
    if core is not model or not isinstance(getattr(model, "num_classes", None), int):
        return model
    counts = set()
    for path in head_names(model):
        while path and core.get_submodule(path.rpartition(".")[0])._modules.get(path.rpartition(".")[2]) is None:
            path = path.rpartition(".")[0]  # the head around the classifier was replaced
        head = core.get_submodule(path) if path else None
        counts.add(0 if isinstance(head, nn.Identity) else getattr(head, "out_features", model.num_classes))
    if len(counts) != 1 or counts == {model.num_classes}:
        return model
    return with_classes(model, counts.pop())
