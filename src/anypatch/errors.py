"""The errors anypatch raises on purpose. Each message names what was given and what would work."""

from __future__ import annotations


class AnypatchWarning(UserWarning):
    """What the user should know and nothing is refused for: skipped images, a head that is new, a guess."""


class AnypatchError(Exception):
    """Base of every error that anypatch raises on purpose."""


class GeometryError(AnypatchError, ValueError):
    """Sizes that are malformed, do not fit each other, or do not fit the model."""


class UnsupportedModelError(AnypatchError, TypeError):
    """A model whose stem or positions cannot be adapted; the message says which layer and why."""


class CheckpointError(AnypatchError):
    """A checkpoint that is missing, damaged, unsafe, or does not fit the model it is meant for."""


class DataError(AnypatchError, ValueError):
    """Images, labels or class names that are missing, unreadable, or do not fit each other."""
