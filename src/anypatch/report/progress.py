"""Progress of long work: a bar in a terminal, lines in a log, an element in a notebook, or nothing."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from html import escape
from typing import Any

Progress = Callable[[str, int, int], None]  # (what, done, total)

EVERY = 10.0  # seconds between the lines of a log: seldom enough to read, often enough to see that it lives
SMOOTH = 0.1  # seconds between the updates of a notebook's element, which go through its browser
_OUTER: ContextVar[Progress | None] = ContextVar("anypatch_progress", default=None)


@contextlib.contextmanager
def shown_progress(asked: Progress | bool | None, first: str = "") -> Iterator[Progress]:
    """What to call with (what, done, total) while the block runs.

    Args:
        asked: a function of the caller's; ``False`` for none; ``None`` or ``True`` for what suits the place: an
            element in a notebook, a bar where standard error is a terminal, else a line every ten seconds. Inside of
            another such block, what that block shows.
        first: what is said before anything was called.

    Examples:
        >>> with shown_progress(False) as progress:
        ...     progress("reading", 1, 2)
    """
    outer = _OUTER.get()
    if not callable(asked) and asked is not False and outer is not None:
        yield outer
        return
    with _shown(asked, first) as progress:
        mark = _OUTER.set(progress)
        try:
            yield progress
        finally:
            _OUTER.reset(mark)


@contextlib.contextmanager
def _shown(asked: Progress | bool | None, first: str) -> Iterator[Progress]:
    if callable(asked):
        yield asked
    elif asked is False:
        yield lambda what, done, total: None
    elif _in_notebook():
        yield Notebook()
    elif sys.stderr.isatty():
        with _bar(first) as progress:
            yield progress
    else:
        with Lines(first=first) as progress:
            yield progress


@contextlib.contextmanager
def _bar(first: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.markup import escape as plain
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(plain(first), total=None)
        yield lambda what, done, total: bar.update(task, description=plain(what), completed=done, total=total)


class Lines:
    """A line every ten seconds or so, the first after as long: short work says nothing.

    Within ``with`` they come from a thread as well, so that a step that does not report is seen to live, too.

    Args:
        write: where lines go; standard error by default.
        clock: seconds.
        first: what is said before anything was reported.
    """

    def __init__(
        self,
        write: Callable[[str], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
        first: str = "",
    ) -> None:
        self._write = write or (lambda line: print(line, file=sys.stderr, flush=True))
        self._clock = clock
        self._began = self._said = clock()
        self._state = first
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        self._state = f"{what}: {done} of {total}"
        self._say()

    def _say(self) -> None:
        with self._lock:
            now = self._clock()
            if not self._state or now - self._said < EVERY:
                return
            self._said = now
            self._write(f"{self._state}, after {duration(now - self._began)}")

    def _run(self) -> None:
        while not self._stop.wait(max(self._said + EVERY - self._clock(), EVERY / 100, 0.01)):
            self._say()

    def __enter__(self) -> Lines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class Notebook:
    """An HTML progress element that is updated in place; by hand, as rich's needs ipywidgets."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._said = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._handle is not None and done < total and now - self._said < SMOOTH:
            return
        from IPython.display import HTML, display

        self._said = now
        shown = HTML(f'<progress value="{done}" max="{max(total, 1)}"></progress> {escape(what)}: {done} of {total}')
        if self._handle is None:
            self._handle = display(shown, display_id=True)
        else:
            self._handle.update(shown)


def duration(seconds: float) -> str:
    """``"8 s"``, ``"3 min 20 s"``, ``"2 h 5 min"``.

    Examples:
        >>> duration(200)
        '3 min 20 s'
    """
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _in_notebook() -> bool:
    """Whether an IPython kernel runs this, whose output is a notebook's."""
    shell = sys.modules.get("IPython")
    if shell is None:
        return False
    return type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"
