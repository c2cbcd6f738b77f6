"""The model of a sweep: a live one, or the one that a source names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from anypatch.core.adapters import unwrap
from anypatch.errors import AnypatchError


def load_model(source: str | Path | nn.Module, arch: str | None, host_kwargs: dict[str, Any]) -> nn.Module:
    """A live model, or the one that a source names; wrappers taken off.

    Raises:
        AnypatchError: options of a loader for a live model.
    """
    if isinstance(source, nn.Module):
        if arch is not None or host_kwargs:
            raise AnypatchError("arch and loader options are for sources, not for a live model")
        return unwrap(source)
    from anypatch.sources import load

    if arch is not None:
        host_kwargs = {**host_kwargs, "arch": arch}
    return unwrap(load(source, **host_kwargs))


def randomness(host_kwargs: dict[str, Any]) -> str:
    """A note where the caller asked for a model without trained weights."""
    if any(name in host_kwargs and not host_kwargs[name] for name in ("pretrained", "weights")):
        return "the weights are random, as asked for: fidelity and accuracy say nothing about a trained model"
    return ""


def title(source: str | nn.Module) -> str:
    if isinstance(source, str):
        return source
    inner = unwrap(source)
    cfg = getattr(inner, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(inner).__name__)
