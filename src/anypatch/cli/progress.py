"""What is said while a command works: a bar on a terminal, a line every ten seconds in a log, nothing when quiet."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from anypatch.errors import AnypatchWarning

EVERY = 10.0  # seconds between two lines of a log: often enough to see that it lives, a hundred lines in a long run

Report = Callable[[str, int, int], None]  # (what, done, total)


def leads() -> bool:
    """Whether this process speaks, of those that share the work."""
    return int(os.environ.get("RANK", "0")) == 0


class Log:
    """Progress where nobody watches: one line every ten seconds, the first after ten."""

    def __init__(self, text: str, every: float = EVERY) -> None:
        self._state, self._every, self._start = text, every, time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def report(self, what: str, done: int, total: int) -> None:
        self._state = f"{what}: {done} of {total}"

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            print(f"{self._state} ({time.monotonic() - self._start:.0f} s)", file=sys.stderr, flush=True)

    def __enter__(self) -> Log:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()


@contextlib.contextmanager
def working(text: str, quiet: bool = False) -> Iterator[Report]:
    """Say that something is going on; the value takes ``(what, done, total)`` where more is known."""
    if quiet or not leads():
        yield lambda what, done, total: None
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(escape(text), total=None)
            yield lambda what, done, total: bar.update(task, description=escape(what), completed=done, total=total)
    else:
        with Log(text) as log:
            yield log.report


@contextlib.contextmanager
def notes(quiet: bool = False, debug: bool = False) -> Iterator[None]:
    """anypatch's own warnings as notes of one line; other packages' only for ``--debug``.

    Which are ours is told by their class: a path tells nothing, as an environment may be called anypatch, too.
    """

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        if issubclass(category, AnypatchWarning):
            if leads() and not quiet:
                text = " ".join(str(message).split())
                Console(stderr=True).print(f"[yellow]note:[/yellow] {escape(text)}", soft_wrap=True, highlight=False)
        elif debug:
            sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))

    with warnings.catch_warnings():
        warnings.simplefilter("always", AnypatchWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield
