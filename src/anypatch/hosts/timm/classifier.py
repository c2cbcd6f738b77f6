"""timm's classifier layers."""

from __future__ import annotations

from typing import Any

from torch import nn


def head_names(model: nn.Module) -> list[str]:
    """Classifier layers, as timm itself names them."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return [names] if isinstance(names, str) else list(names)


def reset(model: Any, classes: int) -> nn.Module:
    model.reset_classifier(classes)
    return model
