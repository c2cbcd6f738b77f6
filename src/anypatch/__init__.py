"""Any pretrained Vision Transformer, at any patch size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anypatch.errors import AnypatchError, CheckpointError, GeometryError, UnsupportedModelError

if TYPE_CHECKING:
    from anypatch.adapt import adapt, geometry
    from anypatch.check import Check, check
    from anypatch.geometry import Geometry
    from anypatch.resize import resize_kernel

__version__ = "0.1.0"

# Loaded on first use, so that `import anypatch` costs nothing.
_LAZY = {
    "adapt": "anypatch.adapt",
    "geometry": "anypatch.adapt",
    "check": "anypatch.check",
    "Check": "anypatch.check",
    "Geometry": "anypatch.geometry",
    "resize_kernel": "anypatch.resize",
}

__all__ = [
    "AnypatchError",
    "Check",
    "CheckpointError",
    "Geometry",
    "GeometryError",
    "UnsupportedModelError",
    "__version__",
    "adapt",
    "check",
    "geometry",
    "resize_kernel",
]
