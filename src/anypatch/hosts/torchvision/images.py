"""torchvision's preprocessing, features and class names."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn

from anypatch.core.twins import Subject
from anypatch.hosts.images import Classes, Features, Preprocess, captured, on_grid


def preprocess(subject: Subject, source: str | None = None) -> Preprocess:
    """The transforms of the weights that the source names; a live model does not say."""
    name = (source or "").rpartition("/")[2]
    architecture = (source or "").partition(":")[2].partition("/")[0]
    with contextlib.suppress(Exception):
        from torchvision.models import get_model_weights

        weights = get_model_weights(architecture)
        chosen = weights["DEFAULT" if name in ("", "DEFAULT") else name]
        return _from_presets(chosen.transforms())
    note = "the torchvision model does not say its weights: ImageNet's usual preprocessing was used"
    return Preprocess(crop=224 / 256, interpolation="bilinear", note=note)


def _from_presets(presets: Any) -> Preprocess:
    crop = presets.crop_size[0] / presets.resize_size[0]
    return Preprocess(tuple(presets.mean), tuple(presets.std), presets.interpolation.value, crop)


def features(subject: Subject, pixels: Tensor) -> Features:
    """The encoder's tokens (VisionTransformer) or the last stage's map (SwinTransformer), and the head's answer."""
    model: Any = subject.model
    body = model.encoder if hasattr(model, "encoder") else model.features
    with captured(body) as seen:
        logits = model(pixels)
    tokens = seen[-1]
    if tokens.dim() == 3 and subject.geometry.prefix_tokens:
        return Features(tokens[:, 0], on_grid(subject, tokens, pixels), logits)
    patches = on_grid(subject, getattr(model, "norm", nn.Identity())(tokens), pixels)
    return Features(patches.mean((1, 2)), patches, logits)


def classes(subject: Subject) -> Classes:
    """ImageNet's, where there are a thousand."""
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    model: Any = subject.model
    head = getattr(model, "heads", None) or getattr(model, "head", None)
    layers = [m for m in head.modules() if isinstance(m, nn.Linear)] if isinstance(head, nn.Module) else []
    outputs = layers[-1].out_features if layers else 0
    return Classes(outputs, (tuple(_IMAGENET_CATEGORIES),) if outputs == len(_IMAGENET_CATEGORIES) else ())
