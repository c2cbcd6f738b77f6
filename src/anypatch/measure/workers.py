"""Processes that decode images: started and ended whole, whenever somebody interrupts."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch

# What batch systems and a closed terminal send to all; not every system has the second.
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def begun(loader: Any) -> Iterator[Any]:
    """``iter(loader)``, whose workers are all started before an interruption is heard.

    Python swallows what is raised in the callbacks of a fork, so that Ctrl-C at that moment was lost: of 22 sweeps one
    ran on, and one said that a worker of its had died. What is raised between two workers leaves a loader that
    cannot end those it has.
    """
    with _patient():
        return iter(loader)


def alone(_worker: int) -> None:
    """What a worker does first: it takes one thread, and leaves Ctrl-C, which a terminal sends to all, to its parent,
    who ends it. One that died with a lock of theirs would leave the other waiting for it.

    So it does with the first of each signal that batch systems and a closed terminal send to all: of a worker that died
    first torch would tell the parent with a traceback. The next ends it, as its loader and the end of Python send it
    to one that does not answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in ENDING:
        signal.signal(number, _next_time)
    torch.set_num_threads(1)


def _next_time(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    """Within the block signals wait that would raise an exception; they do so in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, Any]] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDING)}
    held = {number: handler for number, handler in before.items() if callable(handler)}
    for number in held:
        signal.signal(number, lambda *what: came.append(what))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
    if came:
        held[signal.Signals(came[0][0])](*came[0])
