"""Any pretrained Vision Transformer, at any patch size."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from anypatch.errors import AnypatchError, CheckpointError, DataError, GeometryError, UnsupportedModelError
from anypatch.version import __version__

if TYPE_CHECKING:
    from anypatch.adaptation import adapt, at, geometry
    from anypatch.conversion import convert
    from anypatch.core.geometry import Geometry
    from anypatch.core.kernels import Interpolate, Pi, Wiener, resize_kernel
    from anypatch.core.limits import memory_limit
    from anypatch.flexibility import flexible
    from anypatch.measure.spectra import PixelStatistics
    from anypatch.measure.sweep import SweepResult, sweep
    from anypatch.proof import Check, check
    from anypatch.sources import load, push_to_hub, save
    from anypatch.tuning.result import TuneResult
    from anypatch.tuning.running import tune


# Loaded on first use, so that `import anypatch` costs nothing.
_LAZY = {
    "adapt": "anypatch.adaptation",
    "at": "anypatch.adaptation",
    "flexible": "anypatch.flexibility",
    "geometry": "anypatch.adaptation",
    "check": "anypatch.proof",
    "Check": "anypatch.proof",
    "Geometry": "anypatch.core.geometry",
    "resize_kernel": "anypatch.core.kernels",
    "Pi": "anypatch.core.kernels",
    "Wiener": "anypatch.core.kernels",
    "Interpolate": "anypatch.core.kernels",
    "load": "anypatch.sources",
    "save": "anypatch.sources",
    "push_to_hub": "anypatch.sources",
    "convert": "anypatch.conversion",
    "PixelStatistics": "anypatch.measure.spectra",
    "memory_limit": "anypatch.core.limits",
    "tune": "anypatch.tuning.running",
    "TuneResult": "anypatch.tuning.result",
    "sweep": "anypatch.measure.sweep",
    "SweepResult": "anypatch.measure.sweep",
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
    "TuneResult",
    "UnsupportedModelError",
    "Wiener",
    "__version__",
    "adapt",
    "at",
    "check",
    "convert",
    "flexible",
    "geometry",
    "load",
    "memory_limit",
    "push_to_hub",
    "resize_kernel",
    "save",
    "sweep",
    "tune",
]
