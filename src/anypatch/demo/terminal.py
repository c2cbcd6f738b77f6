"""The demo's measurements for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anypatch.demo.data import PATCH_SIZE
from anypatch.demo.rows import DemoResult, cells, groups

if TYPE_CHECKING:
    from rich.table import Table


def table(result: DemoResult) -> Table:
    """The measurements, for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"A ViT trained at patch {PATCH_SIZE}, on {result.images} handwritten digits it has not seen"
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    shown.add_column("", no_wrap=True)
    for heading in ("patch", "image", "patches", "accuracy", "same\nanswers", "cosine", "images/s"):
        shown.add_column(heading, justify="right")
    for name, rows in groups(result):
        shown.add_section()
        for i, row in enumerate(rows):
            shown.add_row("" if i else name, *cells(row), style="bold" if row is result.original else None)
    return shown
