"""Any pretrained Vision Transformer, at any patch size."""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from anypatch.errors import AnypatchError, CheckpointError, DataError, GeometryError, UnsupportedModelError

if TYPE_CHECKING:
    from anypatch.adapt import adapt, geometry
    from anypatch.check import Check, check
    from anypatch.checkpoint import convert
    from anypatch.geometry import Geometry
    from anypatch.resize import Interpolate, Pi, Wiener, resize_kernel
    from anypatch.sources import load, save
    from anypatch.statistics import PixelStatistics
    from anypatch.sweep import SweepResult, sweep

__version__ = "0.1.0"

# Loaded on first use, so that `import anypatch` costs nothing.
_LAZY = {
    "adapt": "anypatch.adapt",
    "geometry": "anypatch.adapt",
    "check": "anypatch.check",
    "Check": "anypatch.check",
    "Geometry": "anypatch.geometry",
    "resize_kernel": "anypatch.resize",
    "Pi": "anypatch.resize",
    "Wiener": "anypatch.resize",
    "Interpolate": "anypatch.resize",
    "load": "anypatch.sources",
    "save": "anypatch.sources",
    "convert": "anypatch.checkpoint",
    "PixelStatistics": "anypatch.statistics",
    "sweep": "anypatch.sweep",
    "SweepResult": "anypatch.sweep",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it, once."""
    if name not in _LAZY:
        raise AttributeError(f"module 'anypatch' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(types.ModuleType):
    """Keeps ``anypatch.geometry`` and its like the functions, not the submodules of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _LAZY and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


__all__ = [
    "AnypatchError",
    "Check",
    "CheckpointError",
    "DataError",
    "Geometry",
    "GeometryError",
    "Interpolate",
    "Pi",
    "PixelStatistics",
    "SweepResult",
    "UnsupportedModelError",
    "Wiener",
    "__version__",
    "adapt",
    "check",
    "convert",
    "geometry",
    "load",
    "resize_kernel",
    "save",
    "sweep",
]
