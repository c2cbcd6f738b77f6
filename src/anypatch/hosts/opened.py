"""A directory in a host library's format, opened to be converted: its model, its tensors and texts at a plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.plan import Plan
from anypatch.errors import CheckpointError
from anypatch.files.header import Header
from anypatch.files.reading import Checkpoint
from anypatch.files.tensors import put_back, require_finite


@dataclass(frozen=True)
class Opened:
    """What ``open_folder`` of a host gives.

    Attributes:
        model: of the configuration, empty or over the files' own memory.
        headers: of the files of weights, by name.
        values: the files' tensors that a plan for ``model`` changes, by their names there.
        texts: the files of text at a plan and with these values, by name; applies the plan to ``model``.
        index: the text of the index of shards, if there is one, with these values.
    """

    model: nn.Module
    headers: dict[str, Header]
    values: Callable[[Plan], dict[str, Tensor]]
    texts: Callable[[Plan], dict[str, str]]
    index: Callable[[Mapping[str, Tensor]], dict[str, str]] = lambda values: {}


def changed_tensors(checkpoint: Checkpoint, model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The file's tensors that change, by their names in the file.

    The model's parameters lie in the file's own memory, which tells which tensor of the file each came from, whatever
    the host library's converter called it.

    Raises:
        CheckpointError: a tensor that changes was computed from several of the file's, or is not finite.
    """
    sources = {t.untyped_storage().data_ptr(): n for n, t in checkpoint.tensors.items() if t.numel()}
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    changed: dict[str, Tensor] = {}
    for name, change in plan.state_changes().items():
        live = own[name]
        stored = sources.get(live.untyped_storage().data_ptr())
        if stored is None:
            if not isinstance(live, nn.Parameter):
                continue  # computed by the constructor, not stored
            raise CheckpointError(
                f"{checkpoint.path}: {name} is made of several tensors of the file, so the file cannot be converted in "
                f"its own layout: use anypatch.load and anypatch.save"
            )
        tensor = checkpoint.tensors[stored]
        require_finite(checkpoint.path, stored, tensor)
        with torch.no_grad():
            changed[stored] = put_back(checkpoint.path, stored, tensor, live.detach(), change(live.detach()))
    return changed


def merged(raw: Any, before: Any, after: Any) -> Any:
    """``raw`` with what differs between ``before`` and ``after`` set to ``after``'s; all else as it was written."""
    if isinstance(after, dict) and isinstance(before, dict):
        result = dict(raw) if isinstance(raw, dict) else {}
        for key, value in after.items():
            if key not in before or as_json(before[key]) != as_json(value):
                result[key] = merged(result.get(key), before.get(key), value)
        return result
    return as_json(after)


def as_json(value: Any) -> Any:
    """As JSON would give it back."""
    return json.loads(json.dumps(value, default=str))


def dump(value: Any) -> str:
    """The text of a configuration."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
