"""The command line: ``anypatch inspect | check | adapt | convert | sweep | view | tune | demo``.

Exit statuses: 0 for success, 1 for a check that fails, 2 for an error, 130 for Ctrl-C, 141 for a pipe whose reader
left (typer's own 1 for --help). Results go to standard output; progress, notes and errors to standard error, an error
on one line. What ends a process (SIGTERM, as batch systems and containers send it, or a terminal that is closed) ends
it as Ctrl-C does, with 128 and the signal's number: nothing half-written stays, and no worker.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from anypatch import __version__
from anypatch.cli import comparing, models, output, tuning, writing
from anypatch.cli.helping import Command, Group
from anypatch.cli.stderr import notes, without_bars
from anypatch.cli.words import as_typed
from anypatch.errors import AnypatchError

FAILED, INTERRUPTED, PIPE_CLOSED = 2, 130, 141

app = typer.Typer(
    name="anypatch",
    cls=Group,
    help="Any pretrained Vision Transformer, at any patch size.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # in a pipe, boxes would be cut and folded, and click cuts sentences at the width
    rich_markup_mode="rich" if output.terminal() else None,
    context_settings={} if output.terminal() else {"terminal_width": 200},
)
models.register(app)
writing.register(app)
comparing.register(app)
tuning.register(app)
app.command(cls=Command)(comparing.demo)


def _say_version(wanted: bool) -> None:
    if wanted:
        output.line(f"anypatch {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and other packages' warnings.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Any pretrained Vision Transformer, at any patch size."""


def main() -> None:
    """Entry point: errors are one line and exit status 2, unless ``--debug``, anywhere, asks for the traceback."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    quiet = "--quiet" in arguments or "-q" in arguments
    if not debug:
        logging.disable(logging.ERROR)  # other packages'; what they mean is in the error that follows
    without_bars()
    try:
        with _ending_as_interrupted(), notes(quiet, debug):
            status = run(arguments or ["--help"], debug)
        sys.stdout.flush()
    except BrokenPipeError:
        output.let_go()
        status = PIPE_CLOSED
    sys.exit(status)


@contextlib.contextmanager
def _ending_as_interrupted() -> Iterator[None]:
    """Within the block a signal that would end the process at once unwinds it first.

    Of several processes that share the work each may wait for another in torch's own code, where nobody unwinds:
    whoever started them ends them.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 and threading.current_thread() is threading.main_thread()
    names = ("SIGTERM", "SIGHUP") if alone else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    changed = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, _ended)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def _ended(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def run(arguments: list[str], debug: bool = False) -> int:
    """One command line, and its exit status."""
    try:
        status = app(arguments, prog_name="anypatch", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            raise
        return _failed(_words(error, arguments))
    if status == INTERRUPTED:  # newer typer makes this of Ctrl-C
        return _interrupted()
    return status if isinstance(status, int) else 0


def _words(error: Exception, arguments: list[str]) -> str:
    if isinstance(error, AnypatchError):
        return as_typed(str(error))
    if hasattr(error, "format_message"):  # typer's own, about the command line
        command = next((a for a in arguments if a in {c.callback.__name__ for c in app.registered_commands}), "")  # type: ignore[union-attr]
        said = _plainly(error.format_message(), error, arguments)
        return f"{said} (see {' '.join(filter(None, ('anypatch', command, '--help')))})"
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {error} (--debug shows where)"


def _plainly(said: str, error: Exception, arguments: list[str]) -> str:
    """typer's message without the words of its parser, and with what was typed where those leave it out."""
    said = said.replace(": Value error, ", ": ")
    cut = re.sub(r"Input should be a valid (\w+).*", r"must be an \1", said).replace("an float", "a number")
    options = set(getattr(getattr(error, "param", None), "opts", None) or ())
    typed = [b for a, b in itertools.pairwise(arguments) if a in options]
    typed += [a.partition("=")[2] for a in arguments if a.partition("=")[0] in options and "=" in a]
    return f"{cut}, got {typed[-1]!r}" if cut != said and typed else said


def _failed(message: str) -> int:
    text = "error: " + escape(" ".join(message.split()))
    Console(stderr=True).print(text, style="red", soft_wrap=True, highlight=False)
    return FAILED


def _interrupted() -> int:
    Console(stderr=True).print("interrupted")
    return INTERRUPTED
