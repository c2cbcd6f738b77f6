"""Put files and directories in place whole: a full disk, a kill or a read error leaves what was there before.

What is written goes into a stage, a directory of its own beside the target (``.NAME.anypatch-HEX``), and is put in
place when it is complete and on the disk:

- a file, by a rename;
- a directory, by exchanging it with the one that is there, in one step where the system has such a step
  (``renameat2``), else by two renames. A run that is killed between the two leaves the old directory in its stage,
  and the next run puts it back;
- where nothing may be written beside the target, or it is a mount point or the current directory, its files are moved
  one by one, the configurations away first and in last: a run that is killed meanwhile leaves a directory that no
  library takes for a model, and the next run puts the old files back.

A stage holds a note that its run has locked. What has the name of a stage, this note and no lock was left by a killed
run; nothing else is ever cleaned.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from anypatch.errors import CheckpointError, listed
from anypatch.files.flushing import Flusher, flush_directory, flush_path, flush_tree

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, so nothing is taken for debris
    fcntl = None  # type: ignore[assignment]

MARK = ".anypatch-"
NOTE = "unfinished.txt"
SAYS = "anypatch was writing here and was stopped. Its next run with the same target cleans this up.\n"
RENAME_EXCHANGE = 2  # Linux' flag of renameat2, from linux/fs.h
MAX_NAME = 150  # of the target's in its stage's: a file name has at most 255 bytes
NEW, OLD, PLAN, DONE = "new", "old", "plan.json", "done"
NOT_BESIDE = {errno.EACCES, errno.EPERM, errno.EROFS}  # making a stage: the directory above cannot be written
NOT_AS_ONE = {errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM}  # renaming: a mount point, or another's directory

Replaced = Callable[[str], bool]


# -- replacing ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing_file(target: Path) -> Iterator[BinaryIO]:
    """A file to write into, that becomes ``target`` when the block ends well, and disappears when it does not.

    Raises:
        CheckpointError: it cannot be written; ``target`` is what it was.
    """
    if not target.parent.is_dir():
        raise CheckpointError(f"cannot write {target}: there is no directory {target.parent}")
    if target.is_dir():
        raise CheckpointError(f"{target} is a directory: name the file to write")
    recover(target)
    with _speaking_of(target), _staged(target, target.parent) as stage:
        with (stage / NEW).open("x+b") as file, Flusher(target) as flusher:
            yield file
            flusher.add(file)
        _keep_mode(target, stage / NEW)
        (stage / NEW).replace(target)
        flush_directory(target.parent)


@contextlib.contextmanager
def replacing_directory(target: Path, replaced: Replaced = lambda name: True, parents: bool = False) -> Iterator[Path]:
    """A directory to write into, that becomes ``target`` when the block ends well.

    Args:
        target: where to; a link to a directory is followed.
        replaced: of what is in ``target`` and is not written anew, by its name: whether it belongs to what is being
            replaced, and goes. Everything else stays.
        parents: make the directories above ``target`` that are missing.

    Raises:
        CheckpointError: it cannot be written; ``target`` is what it was.
    """
    if os.path.lexists(target) and not target.is_dir():
        raise CheckpointError(f"{target} is a file: name a directory to write")
    target = target.resolve()
    with _speaking_of(target), _above(target, parents):
        recover(target)
        with _staged(target, _room(target)) as stage:
            (stage / NEW).mkdir()
            yield stage / NEW
            if target.is_dir():
                flush_tree(stage / NEW)
            _put(stage, target, replaced)
            flush_directory(target.parent)


@contextlib.contextmanager
def _above(target: Path, make: bool) -> Iterator[None]:
    """The directories above ``target``; those made here go again when the block fails."""
    missing = [parent for parent in target.parents if not parent.exists()]
    if missing and not make:
        raise CheckpointError(f"cannot write {target}: there is no directory {target.parent}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):  # something else is in it by now
                parent.rmdir()
        raise


@contextlib.contextmanager
def _speaking_of(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}; it is what it was") from error


def _room(target: Path) -> Path:
    """Where the stage goes: beside the target, or in it where it cannot be exchanged as a whole.

    Whoever works in a directory, as this process or the shell that started it may, would be left in the old one.
    """
    if target.is_dir() and (_works_in(target) or any(map(os.path.ismount, (target, *target.iterdir())))):
        return target
    return target.parent


def _works_in(target: Path) -> bool:
    try:
        return Path(os.path.realpath(os.curdir)).is_relative_to(target)
    except OSError:  # a directory that is gone
        return False


@contextlib.contextmanager
def _staged(target: Path, room: Path) -> Iterator[Path]:
    """A stage that this run has locked."""
    try:
        stage, descriptor = _new_stage(target, room)
    except OSError as error:
        if error.errno not in NOT_BESIDE or not target.is_dir() or room == target:
            raise
        stage, descriptor = _new_stage(target, target)
    try:
        yield stage
    finally:
        with contextlib.suppress(OSError):  # then the next run does it
            _settle(stage, target)
        os.close(descriptor)


def _new_stage(target: Path, room: Path) -> tuple[Path, int]:
    prefix = "" if room == target else f".{target.name[:MAX_NAME]}"
    while True:
        stage = room / f"{prefix}{MARK}{uuid.uuid4().hex}"
        stage.mkdir(mode=0o700)
        try:
            descriptor = os.open(stage / NOTE, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
        except FileNotFoundError:
            continue  # another run took it for debris before it had its note
        if _lock(descriptor) is not False and (stage / NOTE).exists():
            os.write(descriptor, SAYS.encode())
            return stage, descriptor
        os.close(descriptor)  # likewise, before the note was locked


def _lock(descriptor: int) -> bool | None:
    """Lock a note: whether it worked, or ``None`` where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


# -- putting in place --------------------------------------------------------------------------------------


def _put(stage: Path, target: Path, replaced: Replaced) -> None:
    if not target.exists():
        (stage / NEW).rename(target)
        return
    if stage.parent == target:
        _move_in(stage, target, replaced)
        return
    carried: list[str] = []
    try:
        _carry(target, stage / NEW, replaced, carried)
        _keep_mode(target, stage / NEW)
        _exchange_or_move(stage, target)
    except OSError as error:
        if error.errno not in NOT_AS_ONE or not target.exists():
            raise
        for name in carried:  # what stays is not touched then
            _remove(stage / NEW / name)
        with _staged(target, target) as inner:
            shutil.copytree(stage / NEW, inner / NEW, symlinks=True)
            flush_tree(inner / NEW)
            _move_in(inner, target, replaced)
        return
    before = stage / (OLD if (stage / OLD).exists() else NEW)
    for entry in list(before.iterdir()):  # made by others since it was carried
        if not replaced(entry.name) and not os.path.lexists(target / entry.name):
            entry.rename(target / entry.name)


def _exchange_or_move(stage: Path, target: Path) -> None:
    """One directory in place of another: at once where the system can, else by way of a second name."""
    if _exchange(stage / NEW, target):
        return
    target.rename(stage / OLD)
    (stage / NEW).rename(target)  # if this fails, _settle puts the old one back


def _exchange(a: Path, b: Path) -> bool:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here = -100  # AT_FDCWD
    return bool(call(here, os.fsencode(a), here, os.fsencode(b), RENAME_EXCHANGE) == 0)


def _carry(target: Path, place: Path, replaced: Replaced, carried: list[str]) -> None:
    """Give what stays a second name in the new directory, so that both are whole until the exchange."""
    for entry in target.iterdir():
        if not os.path.lexists(place / entry.name) and not replaced(entry.name):
            carried.append(entry.name)
            _link(entry, place / entry.name)


def _link(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        if os.path.ismount(source):  # what is mounted cannot be linked, and must not be removed with the old
            raise OSError(errno.EBUSY, f"{source} is a mount point")
        target.mkdir()
        for entry in source.iterdir():
            _link(entry, target / entry.name)
        shutil.copystat(source, target)
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system without links
        shutil.copy2(source, target, follow_symlinks=False)


def _move_in(stage: Path, target: Path, replaced: Replaced) -> None:
    """Move what is new into ``target`` file by file, and what it replaces out."""
    new = sorted((entry.name for entry in (stage / NEW).iterdir()), key=_configurations_last)
    (stage / OLD).mkdir()
    (stage / PLAN).write_text(json.dumps(new), encoding="utf-8")
    flush_path(stage / PLAN)
    leaving = [e.name for e in target.iterdir() if e != stage and (e.name in new or replaced(e.name))]
    for name in sorted(leaving, key=_configurations_last, reverse=True):
        (target / name).rename(stage / OLD / name)
    for name in new:
        (stage / NEW / name).rename(target / name)
    flush_directory(target)
    (stage / DONE).touch()


def _configurations_last(name: str) -> tuple[bool, str]:
    return (name.endswith(".json"), name)


def _keep_mode(old: Path, new: Path) -> None:
    """Permissions and owner of what is replaced."""
    with contextlib.suppress(OSError):
        there = old.stat()
        new.chmod(stat.S_IMODE(there.st_mode))
        if (there.st_uid, there.st_gid) != (new.stat().st_uid, new.stat().st_gid):
            os.chown(new, there.st_uid, there.st_gid)


# -- recovering --------------------------------------------------------------------------------------------


def recover(target: Path) -> None:
    """Finish what killed runs with this target left: the old content is back in place, the rest is gone."""
    if fcntl is None:
        return
    beside = re.compile(re.escape(f".{target.name[:MAX_NAME]}{MARK}") + "[0-9a-f]{32}")
    inside = re.compile(re.escape(MARK) + "[0-9a-f]{32}")
    for room, name in ((target.parent, beside), (target, inside)):
        try:
            found = [entry for entry in room.iterdir() if name.fullmatch(entry.name)]
        except OSError:
            continue
        for stage in found:
            _recover(stage, target)


def _recover(stage: Path, target: Path) -> None:
    try:
        descriptor = os.open(stage / NOTE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # no stage of ours; or one that was killed before it had its note, and is empty
        with contextlib.suppress(OSError):
            stage.rmdir()
        return
    try:
        if not _lock(descriptor):
            return
        says = os.read(descriptor, len(SAYS) + 1)
        if says == SAYS.encode() or (not says and os.listdir(stage) == [NOTE]):
            _settle(stage, target)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _settle(stage: Path, target: Path) -> None:
    """Bring the old content back where it is not in place and nothing else is, and remove the stage."""
    old = stage / OLD
    if stage.parent == target:
        if old.is_dir() and not (stage / DONE).exists():
            _move_back(stage, target)
    elif old.exists():
        if not os.path.lexists(target):
            old.rename(target)
        elif (stage / NEW).exists():
            return  # somebody made the target anew meanwhile: the only copy stays where it is
    for name in (PLAN, NEW, OLD, DONE):  # in this order, what a kill leaves of it says the same
        _remove(stage / name)
    with contextlib.suppress(OSError):
        (stage / NOTE).unlink(missing_ok=True)  # last: until then it is known as a stage
        stage.rmdir()


def _move_back(stage: Path, target: Path) -> None:
    try:
        new = json.loads((stage / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        new = []  # nothing was moved before the plan was there
    for name in new:
        if not os.path.lexists(stage / NEW / name) and os.path.lexists(target / name):
            (target / name).rename(stage / NEW / name)
    for entry in (stage / OLD).iterdir():
        entry.rename(target / entry.name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


# -- targets -----------------------------------------------------------------------------------------------


def require_free(target: Path, overwrite: bool = False, source: Path | None = None) -> None:
    """Refuse to replace what is there unless that was asked for.

    Args:
        target: the file or directory that will be written.
        overwrite: whether it was asked for.
        source: what is read for it.

    Raises:
        CheckpointError: ``target`` is ``source``, or is there and is not an empty directory, and ``overwrite`` is not
            set.
    """
    if overwrite or not os.path.lexists(target):
        return
    if source is not None and source.exists() and target.exists() and target.samefile(source):
        raise CheckpointError(f"{target} is the source itself: name another place, or pass overwrite to replace it")
    if not target.is_dir():
        raise CheckpointError(f"{target} is there already: name another place, or pass overwrite to replace it")
    names = sorted(entry.name for entry in target.iterdir())
    if names:
        raise CheckpointError(
            f"{target} is not empty ({listed(names)}): name another place, or pass overwrite to replace the model in it"
        )
