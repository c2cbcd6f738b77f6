"""Onto the disk: what replaces something is flushed before it takes the place."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any


class Flusher:
    """Flushes files that are complete to the disk, in threads, while the next ones are written.

    The block ends when all are flushed. Where nothing is replaced there is nothing to lose, and files are left to the
    operating system's own time, as ``cp`` does.

    Args:
        replaced: what the files will replace.

    Raises:
        OSError: one could not be flushed, at the end of the block.
    """

    def __init__(self, replaced: Path) -> None:
        self._needed = replaced.exists()
        self._pool = ThreadPoolExecutor(2)
        self._running: list[Future[None]] = []

    def __enter__(self) -> Flusher:
        return self

    def add(self, file: IO[Any]) -> None:
        """Flush a file, which may be closed meanwhile."""
        file.flush()
        if self._needed:
            self._running.append(self._pool.submit(_flush, os.dup(file.fileno())))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        for flushed in self._running if kind is None else ():
            flushed.result()


def flush_tree(place: Path) -> None:
    """Flush every file under a directory, and the directories.

    Raises:
        OSError: one could not be flushed.
    """
    for root, _, names in os.walk(place):
        for name in names:
            if not os.path.islink(os.path.join(root, name)):
                flush_path(Path(root, name))
        flush_directory(Path(root))


def flush_path(path: Path) -> None:
    _flush(os.open(path, os.O_RDONLY))


def _flush(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot
        flush_path(path)
