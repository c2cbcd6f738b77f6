"""A directory as it is at one moment: what is read later must be the same files, and links are links."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from anypatch.errors import CheckpointError
from anypatch.files.atomic import MARK
from anypatch.files.opening import Identity


class Snapshot:
    """Which files a directory holds, and which state of them.

    Args:
        folder: the directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._before = _states(folder)

    def require_unchanged(self) -> None:
        """Refuse what was read meanwhile if anything of it was replaced, written to, added or removed.

        Raises:
            CheckpointError: something was; the message names it.
        """
        now = _states(self.folder)
        for name in sorted({*self._before, *now}):
            if self._before.get(name) != now.get(name):
                raise CheckpointError(
                    f"{self.folder / name} was changed while {self.folder} was read: try again when nobody writes to it"
                )


def _states(folder: Path) -> dict[str, Identity]:
    found: dict[str, Identity] = {}
    for root, directories, names in os.walk(folder, followlinks=False):
        if Path(root) == folder:  # what is being put in its place may lie in it meanwhile
            directories[:] = [name for name in directories if not name.startswith(MARK)]
        for name in names:
            path = Path(root, name)
            try:
                about = path.stat()
            except OSError:
                continue  # a link to nothing
            found[path.relative_to(folder).as_posix()] = (
                about.st_dev,
                about.st_ino,
                about.st_size,
                about.st_mtime_ns,
            )
    return found


def leads_outside(path: Path, folder: Path) -> bool:
    """Whether a file is a link to something outside a directory.

    The hub's cache keeps every file as a link to ``blobs`` beside its ``snapshots``: those belong to the directory.
    """
    if not path.is_symlink():
        return False
    place, root = path.resolve(), folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    return root not in place.parents and blobs not in place.parents


def copy_link(path: Path, target: Path) -> None:
    """The same link at another place: to the same file, whose content is not copied."""
    text = os.readlink(path)
    target.symlink_to(text if os.path.isabs(text) else os.path.abspath(path.parent / text))


def copy_within(path: Path, folder: Path, target: Path) -> None:
    """Copy a file or a directory of a directory; what is a link to something outside stays a link.

    Args:
        path: what to copy.
        folder: the directory that it belongs to.
        target: where to.
    """
    if leads_outside(path, folder):
        copy_link(path, target)
    elif path.is_dir():
        target.mkdir()
        for entry in sorted(path.iterdir()):
            copy_within(entry, folder, target / entry.name)
    else:
        shutil.copyfile(path, target)


def require_inside(folder: Path) -> None:
    """Nothing in a directory is a link to something outside, whose content would go along.

    Raises:
        CheckpointError: something is; the message names it.
    """
    for root, directories, names in os.walk(folder, followlinks=False):
        for path in (Path(root, name) for name in (*directories, *names)):
            if leads_outside(path, folder):
                raise CheckpointError(f"{path} is a link to {os.readlink(path)}, outside {folder}: put the file there")
