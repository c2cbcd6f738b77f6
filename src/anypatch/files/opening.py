"""Open files that somebody else made: regular ones only, and the same one for as long as it is read."""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from anypatch.errors import CheckpointError

# Device, inode, bytes, time of the last change: another file, or one that was written to, differs in one of them.
Identity = tuple[int, int, int, int]


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading; a device would not end, and a named pipe would wait for a writer.

    Raises:
        CheckpointError: it is no regular file, does not exist, or cannot be read.
    """
    try:
        # without O_NONBLOCK, opening a named pipe waits before it can be looked at
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = "a directory" if stat.S_ISDIR(mode) else "no regular file (a device, a pipe or a socket)"
        raise CheckpointError(f"{path} is {what}, not a checkpoint file")
    return os.fdopen(descriptor, "rb")


def identity(file: BinaryIO) -> Identity:
    """Which file is open, and which state of it."""
    about = os.fstat(file.fileno())
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def require_unchanged(path: Path, before: Identity, file: BinaryIO) -> None:
    """Refuse to go on reading a file that was replaced or written to since it was first looked at.

    Raises:
        CheckpointError: it is another file now, or another state of it.
    """
    if identity(file) != before:
        raise CheckpointError(f"{path} was changed while it was read: try again when nobody writes to it")


def first_line(error: BaseException) -> str:
    """An error in one line of bounded length, with its type."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
