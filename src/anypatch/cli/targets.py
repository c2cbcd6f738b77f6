"""What a command may write to: nothing is replaced unasked, formats are not mixed, nothing empty is left behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from anypatch.errors import AnypatchError, CheckpointError
from anypatch.files.atomic import require_free
from anypatch.files.paths import place


@contextlib.contextmanager
def nothing_empty_left(*targets: Path) -> Iterator[None]:
    """Remove the directories that a failed command made on the way to its targets and left empty."""
    made: list[Path] = []
    for target in targets:
        for above in (target, *target.parents):
            if above.exists():
                break
            made.append(above)
    try:
        yield
    except BaseException:
        for above in made:
            with contextlib.suppress(OSError):  # a file, or not empty: something was written
                above.rmdir()
        raise


def require_target(target: Path, source: str, overwrite: bool) -> None:
    """Refuse a target that is the source, or is there already, without ``--overwrite``.

    Raises:
        CheckpointError: the message says which, and what would work.
    """
    read = place(source)
    if not read.exists() and ":" in source:  # a prefix before a directory
        read = place(source.partition(":")[2].removeprefix("local-dir:"))
    require_free(target, overwrite, read if read.exists() else None)


def require_format(target: Path, library: str) -> None:
    """Refuse to write one library's files among another's, where stale ones would stay beside them.

    Raises:
        CheckpointError: the directory is in another library's format.
    """
    from anypatch.sources import recognise_directory

    try:
        other = recognise_directory(target)[0]
    except AnypatchError:
        return
    if other != library:
        raise CheckpointError(
            f"{target} holds a model of {other}, and this one is {library}'s: name another directory, as files of "
            f"{other} would stay in it"
        )
