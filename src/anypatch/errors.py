"""The errors anypatch raises on purpose. Each message names what was given and what would work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class AnypatchWarning(UserWarning):
    """What the user should know and nothing is refused for: skipped images, a head that is new, a guess."""


class AnypatchError(Exception):
    """Base of every error that anypatch raises on purpose.

    >>> import anypatch
    >>> try:
    ...     anypatch.load("tim:vit_base_patch16_224")
    ... except anypatch.AnypatchError as error:
    ...     print(type(error).__name__)
    UnsupportedModelError
    """


class GeometryError(AnypatchError, ValueError):
    """Sizes that are malformed, do not fit each other, or do not fit the model.

    >>> import anypatch, timm
    >>> anypatch.adapt(timm.create_model("test_vit"), patch_size=15)
    Traceback (most recent call last):
    ...
    anypatch.errors.GeometryError: patch_size 15x15 does not divide image_size 160x160: use image_size 150x150 or
    165x165, or patch_size 10x10 or 16x16; or image_size="nearest", ...
    """


class UnsupportedModelError(AnypatchError, TypeError):
    """A model whose stem or positions cannot be adapted; the message says which layer and why.

    >>> import anypatch, torchvision
    >>> anypatch.adapt(torchvision.models.resnet18(), patch_size=8)
    Traceback (most recent call last):
    ...
    anypatch.errors.UnsupportedModelError: ResNet of torchvision has no patch embedding: of its models,
    VisionTransformer and SwinTransformer have one
    """


class CheckpointError(AnypatchError):
    """A checkpoint that is missing, damaged, unsafe, or does not fit the model it is meant for.

    >>> import anypatch
    >>> anypatch.load("./missing.safetensors")
    Traceback (most recent call last):
    ...
    anypatch.errors.CheckpointError: missing.safetensors does not exist
    """


class DataError(AnypatchError, ValueError):
    """Images, labels or class names that are missing, unreadable, or do not fit each other.

    >>> import anypatch
    >>> anypatch.sweep("timm:test_vit", data="./missing", patch_sizes=[8, 16], pretrained=False)
    Traceback (most recent call last):
    ...
    anypatch.errors.DataError: ./missing: no such folder
    """


def listed(names: Sequence[Any], limit: int = 8) -> str:
    """The first names of many, for a message; one that would move a terminal's cursor, or be seen by nobody, is quoted.

    >>> listed(["cls", "pos\\n", "head"], 2)
    "cls, 'pos\\\\n' and 1 more"
    """
    said = [str(name) for name in names[:limit]]
    shown = ", ".join(name if name and name.isprintable() else repr(name) for name in said)
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
