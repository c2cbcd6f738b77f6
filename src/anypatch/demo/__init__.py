"""`anypatch demo`: a small ViT that the package carries, at many patch sizes, measured on this machine."""

from anypatch.demo.data import ASSET, GRID, IMAGE_SIZE, PATCH_SIZE, demo_data, demo_metadata, demo_model, digits
from anypatch.demo.rows import DemoResult, Row, View
from anypatch.demo.running import PATCH_SIZES, run_demo
from anypatch.demo.terminal import table
from anypatch.demo.webpage import page

__all__ = [
    "ASSET",
    "GRID",
    "IMAGE_SIZE",
    "PATCH_SIZE",
    "PATCH_SIZES",
    "DemoResult",
    "Row",
    "View",
    "demo_data",
    "demo_metadata",
    "demo_model",
    "digits",
    "page",
    "run_demo",
    "table",
]
