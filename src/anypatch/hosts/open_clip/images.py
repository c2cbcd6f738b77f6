"""open_clip's preprocessing, features and tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from anypatch.core.twins import Subject
from anypatch.errors import DataError
from anypatch.hosts.images import CLIP, Encode, Features, Preprocess, captured, interpolation, on_grid

VOCABULARY = 49408  # of CLIP's own byte-pair encoding, which ``SimpleTokenizer`` is


def preprocess(subject: Subject, source: str | None = None) -> Preprocess:
    """As ``open_clip.image_transform`` makes it from ``visual.preprocess_cfg``."""
    visual: Any = getattr(subject.model, "visual", subject.model)
    cfg = dict(getattr(visual, "preprocess_cfg", None) or {})
    mean = cfg.get("mean") or getattr(visual, "image_mean", None) or CLIP[0]
    std = cfg.get("std") or getattr(visual, "image_std", None) or CLIP[1]
    mode = {"squash": "squash", "longest": "pad"}.get(cfg.get("resize_mode") or "shortest", "center")
    fill = cfg.get("fill_color", 0)
    colour = tuple(fill) if isinstance(fill, (tuple, list)) else (fill,) * 3
    return Preprocess(tuple(mean), tuple(std), interpolation(cfg.get("interpolation", "bicubic")), 1.0, mode, colour)


def features(subject: Subject, pixels: Tensor) -> Features:
    """The image tower's embedding, and its tokens before pooling."""
    visual: Any = getattr(subject.model, "visual", subject.model)
    if hasattr(visual, "trunk"):
        with captured(visual.trunk, "forward_features") as seen:
            pooled = visual(pixels)
        return Features(pooled, on_grid(subject, seen[-1], pixels))
    before = visual.output_tokens
    visual.output_tokens = True
    try:
        pooled, tokens = visual(pixels)
    finally:
        visual.output_tokens = before
    return Features(pooled, on_grid(subject, tokens, pixels))


def tokenize(subject: Subject, texts: Sequence[str], source: str | None = None) -> Encode:
    """By the tokenizer that the source's configuration names, or CLIP's own.

    Raises:
        DataError: the model has another vocabulary, and no source says which.
    """
    import open_clip

    model: Any = subject.model
    name = (source or "").removeprefix("open_clip:").partition("/")[0]
    if source and source.startswith("open_clip:") and name in open_clip.list_models():
        tokens = open_clip.get_tokenizer(name)(list(texts))
    else:
        vocabulary = getattr(model, "vocab_size", None)
        if vocabulary not in (None, VOCABULARY):
            raise DataError(f"the tokenizer for a vocabulary of {vocabulary} is not known: give the source by name")
        length = int(getattr(model, "context_length", 77))
        tokens = open_clip.tokenizer.SimpleTokenizer(context_length=length)(list(texts))

    def encode(towers: Any) -> Tensor:
        return towers.encode_text(tokens)

    return encode
