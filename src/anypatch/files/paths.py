"""Places as callers write them."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from anypatch.errors import CheckpointError

# What stands for the home directory, alone or before a slash, after the prefixes of a source.
HOME = re.compile(r"^((?:[a-z_-]+:){0,2})~(?=/|$)")
PREFIXES = re.compile(r"^(?:[a-z_-]+:){1,2}")


def at_home(source: str) -> str:
    """A source in which ``~`` is the home directory.

    >>> at_home("timm:local-dir:~/vit").startswith("timm:local-dir:~")
    False
    """
    found = HOME.match(source)
    return source if found is None else found[1] + os.path.expanduser("~") + source[found.end() :]


def place(path: str | Path, what: str = "path") -> Path:
    """A path in which ``~`` is the home directory.

    Raises:
        CheckpointError: no file can have it, as for :func:`require_possible`.
    """
    text = os.fspath(path)
    require_possible(text, what)
    return Path(at_home(text))


def require_folder(path: Path) -> None:
    """That a folder can be made of a path, or is there.

    Raises:
        CheckpointError: it is a file.
    """
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file: name a folder")


def require_possible(text: str, what: str) -> None:
    """A path, or a source with a prefix, that a system can be asked about: it may be there or not.

    Raises:
        CheckpointError: it is empty, too long, goes round in a circle, or has a null character or half a letter in it.
    """
    bare = PREFIXES.sub("", at_home(text), count=1)
    if not text:
        raise CheckpointError(f"the {what} must be a path, got ''")
    try:
        os.fsencode(text)
        os.lstat(bare)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise CheckpointError(f"the {what} {text[:200]}... is longer than any path") from error
        if error.errno == errno.ELOOP:
            raise CheckpointError(f"the {what} {text[:200]} is a link that leads back to itself") from error
    except ValueError as error:  # also of text that no file's name can be encoded from
        raise CheckpointError(f"the {what} must be a path, got {text!a}") from error


def given(path: str | Path, what: str) -> Path:
    """A path that a caller gave, ``~`` being the home directory.

    Args:
        path: as it was given.
        what: it is for, in the error.

    Raises:
        CheckpointError: it is no path: nothing at all, of another type, or none that can be.
    """
    text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
    if not text:
        raise CheckpointError(f"the {what} must be a path, got {path!r}")
    return place(text, what)
