"""How results are printed: for people on a terminal, as lines for programs in a pipe, as JSON on request."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anypatch.core.geometry import Geometry

Rows = Sequence[Sequence[str]]
Side = Literal["left", "right"]
LEFT: Side = "left"
RIGHT: Side = "right"
GAP = 2  # columns between two of a table


def terminal() -> bool:
    """Whether a person reads standard output."""
    return sys.stdout.isatty()


def line(text: str) -> None:
    """One line, never folded: terminals wrap it, pipes get it whole."""
    print(text)


def values(pairs: Sequence[tuple[str, str]]) -> None:
    """Names and values: aligned on a terminal, tab-separated elsewhere."""
    if not terminal():
        for name, value in pairs:
            line(f"{name}\t{_flat(value)}")
        return
    width = max(len(name) for name, _ in pairs) + GAP
    console = Console()
    for name, value in pairs:
        console.print(f"[bold]{escape(name):{width}}[/bold]{escape(value)}", highlight=False, soft_wrap=True)


def table(columns: Sequence[str], rows: Rows, title: str = "", right: bool = False) -> None:
    """A table: tab-separated lines in a pipe. On a terminal that is too narrow for it numbers are turned, a row each
    where there was a column, so that they stand side by side; else there is one paragraph a row.

    Nothing is cut and no word is folded, whatever the width.

    Args:
        columns: heads.
        rows: cells.
        title: above it.
        right: whether cells are numbers, aligned on the right.
    """
    if not terminal():
        _lines(columns, rows, title)
        return
    console = Console()
    if title:
        console.print(f"\n[bold]{escape(title)}[/bold]", highlight=False)
    if _width(columns, rows) <= console.width:
        _grid(console, columns, rows, [RIGHT if right else LEFT] * len(columns))
        return
    head, *body = zip(columns, *rows, strict=True)
    if right and _width(head, body) <= console.width:
        _grid(console, head, body, [LEFT, *[RIGHT] * len(rows)])
        return
    _paragraphs(console, columns, rows)


def _lines(columns: Sequence[str], rows: Rows, title: str) -> None:
    """For programs; an empty line parts it from what was printed before."""
    if title:
        line("")
    for cells in (columns, *rows):
        line("\t".join(_flat(cell) for cell in cells))


def _grid(console: Console, heads: Sequence[str], body: Rows, sides: Sequence[Side]) -> None:
    """Columns side by side, each cell at one ``side`` of its column."""
    shown = Table(box=None, header_style="bold", padding=(0, GAP, 0, 0))
    for head, side in zip(heads, sides, strict=True):
        shown.add_column(escape(head), justify=side, no_wrap=True)
    for cells in body:
        shown.add_row(*map(escape, cells))
    console.print(shown)


def _paragraphs(console: Console, columns: Sequence[str], rows: Rows) -> None:
    """A paragraph a row, a line a cell."""
    width = max(len(name) for name in columns[1:]) + GAP
    for head, *cells in rows:
        console.print(f"[bold]{escape(columns[0])} {escape(head)}[/bold]", highlight=False, soft_wrap=True)
        for name, cell in zip(columns[1:], cells, strict=True):
            console.print(f"  {escape(name):{width}}{escape(cell)}", highlight=False, soft_wrap=True)


def _width(columns: Sequence[str], rows: Rows) -> int:
    return sum(max(map(len, column)) + GAP for column in zip(columns, *rows, strict=True))


def as_json(value: Any) -> None:
    """A result as JSON that every reader takes: numbers that JSON does not have are null."""
    line(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def geometry_json(geometry: Geometry) -> dict[str, Any]:
    """A geometry as JSON holds it."""
    return {
        "patch_size": geometry.patch_size,
        "image_size": geometry.image_size,
        "grid": geometry.grid,
        "prefix_tokens": geometry.prefix_tokens,
        "library": geometry.library,
    }


def let_go() -> None:
    """After the reader of a pipe has left: nothing more is written, not even by the interpreter's last flush."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flat(text: str) -> str:
    """A cell that stays one cell of one line."""
    return " ".join(text.split()) if any(c in text for c in "\t\n\r") else text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return str(value) if isinstance(value, Path) or not hasattr(value, "item") else _finite(value.item())
