"""A directory in transformers' format, opened to be converted."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.empty import empty
from anypatch.core.plan import Plan
from anypatch.errors import CheckpointError, UnsupportedModelError, listed
from anypatch.files.configs import read_config
from anypatch.files.header import Entry
from anypatch.files.shards import Shards, read_shards
from anypatch.hosts.loading import said
from anypatch.hosts.opened import Opened, dump, merged
from anypatch.hosts.transformers import processors
from anypatch.hosts.transformers.fitting import class_of
from anypatch.hosts.transformers.names import other_shape, own_name, placed, require_shapes, tell, unmatched
from anypatch.hosts.transformers.safety import require_model, require_no_adapter


def open_folder(source: Path) -> Opened:
    """The model without memory, tensors by the names that its version of the library gave them.

    Raises:
        CheckpointError: the directory is damaged or incomplete, or its configuration gives no model.
        UnsupportedModelError: transformers is not installed.
    """
    require_model(str(source), {})
    require_no_adapter(source, "load it with anypatch.load and save it with anypatch.save, which merges them")
    raw = read_config(source / "config.json")
    shards = read_shards(source, raw.get("transformers_weights"))
    try:
        kind, config = class_of(str(source))
        model: Any = empty(lambda: kind(config))
    except ImportError as error:
        raise UnsupportedModelError(f"converting {source} needs transformers installed ({error})") from error
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{source / 'config.json'}: transformers cannot build the model ({type(error).__name__}: {said(error)})"
        ) from error
    if raw.get("quantization_config") is None:  # else packed
        places = placed(model, shards.entries)
        require_shapes(source, places, shards.entries)
        tell(str(source), kind.__name__, *unmatched(model, places, shards.entries))
    before = copy.deepcopy(model.config.to_dict())

    def texts(plan: Plan) -> dict[str, str]:
        plan.apply()
        config = {"config.json": dump(merged(raw, before, model.config.to_dict()))}
        return config | processors.texts(source, plan.subject.geometry, plan.target)

    def index(values: Mapping[str, Tensor]) -> dict[str, str]:
        again = shards.reindexed(values)
        return {} if again is None else {shards.index_name: dump(again)}

    return Opened(model, shards.headers, lambda plan: _values(model, shards, plan, source), texts, index)


def _values(model: nn.Module, shards: Shards, plan: Plan, source: Path) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    entries = shards.entries
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, change in plan.state_changes().items():
        stored = _name_in_file(name, own[name], entries, source, model)
        if stored is None or stored in values:
            continue
        packed = next((n for n in entries if n.startswith((f"{stored}_", f"{stored}."))), None)
        if packed is not None:
            raise CheckpointError(
                f"{source}: {stored} is quantised ({packed} lies beside it) and has to be resampled: convert the "
                f"directory before it is quantised"
            )
        tensor = shards.read(stored)
        with torch.no_grad():
            values[stored] = change(tensor).to(tensor.dtype)
    return values


def _name_in_file(name: str, live: Tensor, entries: Mapping[str, Entry], source: Path, model: nn.Module) -> str | None:
    """What a model's tensor is called in its file: libraries rename and move modules between versions.

    Raises:
        CheckpointError: the file has no such tensor, or one of another shape.
    """
    shape = tuple(live.shape)
    candidate = own_name(name, entries, model)
    if candidate is not None:
        if entries[candidate].shape != shape:
            raise other_shape(source, candidate, entries, shape)
        return candidate
    parts = name.split(".")
    for length in range(len(parts) - 1, 1, -1):
        suffix = "." + ".".join(parts[-length:])
        found = [n for n in entries if ("." + n).endswith(suffix)]
        fitting = [n for n in found if entries[n].shape == shape]
        if len(fitting) == 1:
            return fitting[0]
        if found:
            raise CheckpointError(f"{source}: cannot tell which of {listed(found)} is the model's {name}")
    if not isinstance(live, nn.Parameter):
        return None  # a buffer that this file does not store
    raise CheckpointError(f"{source} lacks {name}, which the model of its config.json has")
