"""What is said on standard error beside a result: that a command works, and the package's own warnings."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from anypatch.cli.words import as_typed
from anypatch.errors import AnypatchError, AnypatchWarning
from anypatch.report.progress import Progress, shown_progress


def leads() -> bool:
    """Whether this process speaks, of those that share the work."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """All processes raise the same error of ours; one says it."""
    try:
        yield
    except AnypatchError:
        if leads():
            raise
        raise typer.Exit(2) from None


def working(text: str, quiet: bool = False) -> AbstractContextManager[Progress]:
    """Say that something is going on; the value takes ``(what, done, total)`` where more is known."""
    return shown_progress(False if quiet or not leads() else None, text)


def without_bars() -> None:
    """No bars of the hub's client and of transformers, which does as it does, beside our own line of progress.

    Above a bar that is drawn anew ten times a second another one stands still at 0 %, and stays when all is done. The
    process is the command's own, and neither library is imported yet; ``HF_HUB_DISABLE_PROGRESS_BARS=0`` has them back.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextlib.contextmanager
def notes(quiet: bool = False, debug: bool = False) -> Iterator[None]:
    """anypatch's own warnings as notes of one line; other packages' only for ``--debug``.

    Which are ours is told by their class: a path tells nothing, as an environment may be called anypatch, too.
    """

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        if issubclass(category, AnypatchWarning):
            if leads() and not quiet:
                text = as_typed(" ".join(str(message).split()))
                Console(stderr=True).print(f"[yellow]note:[/yellow] {escape(text)}", soft_wrap=True, highlight=False)
        elif debug:
            sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))

    with warnings.catch_warnings():
        warnings.simplefilter("always", AnypatchWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield
