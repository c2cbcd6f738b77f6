"""Any pretrained Vision Transformer, at any patch size."""

from __future__ import annotations

from anypatch.errors import AnypatchError, CheckpointError, GeometryError, UnsupportedModelError

__version__ = "0.1.0"
__all__ = ["AnypatchError", "CheckpointError", "GeometryError", "UnsupportedModelError", "__version__"]
