"""Tests of the host libraries that have to fail on adapted models, with the reason: a size that the test writes out."""

from __future__ import annotations

import re

# (library, mode, pattern over the test's name, pattern over its last line, the reason); "" matches everything.
Row = tuple[str, str, str, str, str]
ROWS: tuple[Row, ...] = ()


def explanation(library: str, mode: str, test: str, message: str, rows: tuple[Row, ...] | None = None) -> str | None:
    """Why a test has to fail, or ``None`` where nothing explains it."""
    for host, way, name, line, reason in ROWS if rows is None else rows:
        if host == library and way in ("", mode) and re.search(name, test) and re.search(line, message):
            return reason
    return None
