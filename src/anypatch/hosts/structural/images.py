"""Preprocessing and features of models that no library made, or that hold a library's model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from anypatch.core.twins import Subject
from anypatch.errors import DataError, UnsupportedModelError
from anypatch.hosts.images import Encode, Features, Preprocess, on_grid, pooled_of


def preprocess(subject: Subject, source: str | None = None) -> Preprocess:
    """The held model's; ImageNet's, with a note, where there is none."""
    if subject.about is not None:
        host, inner = subject.about
        return host.preprocess(inner, source)
    return Preprocess(note=f"{type(subject.model).__name__} does not say its preprocessing: ImageNet's was used")


def features(subject: Subject, pixels: Tensor) -> Features:
    """By the model's own ``forward_features``, or else by the model that it holds.

    Raises:
        UnsupportedModelError: it has neither.
    """
    model: Any = subject.model
    if not hasattr(model, "forward_features"):
        if subject.about is not None:
            host, inner = subject.about
            return host.features(inner, pixels)
        raise UnsupportedModelError(
            f"{type(model).__name__} has no forward_features, so its patch features cannot be read"
        )
    tokens = model.forward_features(pixels)
    if isinstance(tokens, dict):  # DINOv2's own code
        patches = on_grid(subject, tokens["x_norm_patchtokens"], pixels)
        return Features(tokens["x_norm_clstoken"], patches)
    patches = on_grid(subject, tokens, pixels)
    return Features(pooled_of(subject, tokens, patches), patches)


def tokenize(subject: Subject, texts: Sequence[str], source: str | None = None) -> Encode:
    """For models with CLIP's ``encode_text``, by CLIP's own tokenizer (open_clip carries it).

    Raises:
        DataError: the model has no text tower, or open_clip is not installed.
    """
    model: Any = subject.model
    if not hasattr(model, "encode_text"):
        raise DataError(f"class names are for models with a text tower, such as CLIP; {type(model).__name__} has none")
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError as error:
        raise DataError(f"class names need CLIP's tokenizer: pip install 'anypatch[open-clip]' ({error})") from error
    tokens = SimpleTokenizer(context_length=int(getattr(model, "context_length", 77)))(list(texts))

    def encode(towers: Any) -> Tensor:
        return towers.encode_text(tokens)

    return encode
