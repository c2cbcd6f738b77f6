"""What reaches into timm's private parts, in one place."""

from __future__ import annotations

from typing import Any


def core_of(model: Any) -> Any:
    """The model inside a feature extractor, where it is kept whole."""
    if not type(model).__module__.startswith("timm.models._features"):
        return model
    return next((model._modules[name] for name in ("model", "body") if name in model._modules), model)


def recorded(model: Any) -> bool:
    """Whether timm kept what the model was made with: ``create_model`` of timm 1.0.31 and later does."""
    return "_model_args" in vars(model)
