"""Places as callers write them."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from anypatch.errors import CheckpointError

# What stands for the home directory, alone or before a slash, after the prefixes of a source.
HOME = re.compile(r"^((?:[a-z_-]+:){0,2})~(?=/|$)")


def at_home(source: str) -> str:
    """A source in which ``~`` is the home directory.

    >>> at_home("timm:local-dir:~/vit").startswith("timm:local-dir:~")
    False
    """
    found = HOME.match(source)
    return source if found is None else found[1] + os.path.expanduser("~") + source[found.end() :]


def place(path: str | Path) -> Path:
    """A path in which ``~`` is the home directory."""
    return Path(at_home(os.fspath(path)))


def given(path: str | Path, what: str) -> Path:
    """A path that a caller gave, ``~`` being the home directory.

    Args:
        path: as it was given.
        what: it is for, in the error.

    Raises:
        CheckpointError: it is no path: nothing at all, of another type, with a null character, or too long.
    """
    text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
    if not text or "\0" in text:
        raise CheckpointError(f"the {what} must be a path, got {path!r}")
    found = place(text)
    try:
        found.lstat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise CheckpointError(f"the {what} {text[:200]}... is longer than any path") from error
    return found
