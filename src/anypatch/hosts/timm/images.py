"""timm's preprocessing, features and class names."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anypatch.core.twins import Subject
from anypatch.hosts.images import Classes, Features, Preprocess, interpolation, on_grid


def preprocess(subject: Subject, source: str | None = None) -> Preprocess:
    """As ``timm.data.create_transform`` makes it from the model's configuration."""
    from timm.data import resolve_model_data_config

    cfg = resolve_model_data_config(subject.model)
    mode = {"center": "center", "squash": "squash", "border": "pad"}[cfg.get("crop_mode") or "center"]
    mean = tuple(cfg["mean"])
    return Preprocess(
        mean,
        tuple(cfg["std"]),
        interpolation(cfg["interpolation"]),
        float(cfg["crop_pct"]),
        mode,
        tuple(round(255 * v) for v in mean),
    )


def features(subject: Subject, pixels: Tensor) -> Features:
    """``forward_features`` and both answers of ``forward_head``."""
    model: Any = subject.model
    tokens = model.forward_features(pixels)
    pooled = model.forward_head(tokens, pre_logits=True)
    logits = model.forward_head(tokens) if getattr(model, "num_classes", 0) else None
    return Features(pooled.flatten(1), on_grid(subject, tokens, pixels), logits)


def classes(subject: Subject) -> Classes:
    """Named by the model's configuration, or by the subset of ImageNet that timm infers."""
    model: Any = subject.model
    outputs = int(getattr(model, "num_classes", 0) or 0)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if cfg.get("label_names"):
        return Classes(outputs, (tuple(cfg["label_names"]),))
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    if not subset:
        return Classes(outputs)
    info = ImageNetInfo(subset)
    return Classes(outputs, (tuple(info.label_names()), tuple(info.label_descriptions())))
