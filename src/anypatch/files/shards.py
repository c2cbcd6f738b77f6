"""Write files and directories so that a full disk, a kill or a read error leaves what was there before.

Everything is written beside its target and renamed; what replaces something is flushed to the disk first. What a killed
run left behind is cleaned by the next one: a running one holds a lock on what it writes, so debris is what nobody has
locked.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO

from anypatch.errors import CheckpointError
from anypatch.files.reading import BITS, Header

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, so nothing is taken for debris
    fcntl = None  # type: ignore[assignment]

CHUNK = 8 << 20
STEP = 256 << 20  # bytes copied between two signs of progress
MARK = ".anypatch-"
RENAME_EXCHANGE = 2
NO_RANGES = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.EIO}

Progress = Callable[[int], None]


def _silent(count: int) -> None:
    """No progress bar."""


# -- replacing ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing_file(target: Path) -> Iterator[BinaryIO]:
    """A file to write into, that becomes ``target`` when the block ends well, and disappears when it does not.

    Raises:
        CheckpointError: it cannot be written; ``target`` is what it was.
    """
    parent = _parent(target)
    if target.is_dir():
        raise CheckpointError(f"{target} is a directory: name the file to write")
    _clean(target)
    path = parent / _temporary(target)
    with _speaking_of(target):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
        file = os.fdopen(descriptor, "r+b")
        try:
            _lock(descriptor)
            with Flusher(target) as flusher:
                yield file
                flusher.add(file)
            os.fchmod(descriptor, _mode(target))
            path.replace(target)
            _sync_directory(parent)
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        finally:
            with contextlib.suppress(OSError):
                file.close()


@contextlib.contextmanager
def replacing_directory(target: Path, names: set[str]) -> Iterator[Path]:
    """A directory to write into, that becomes ``target`` when the block ends well.

    Args:
        target: where to; if it is there, it may hold nothing but ``names``.
        names: what will be written.

    Raises:
        CheckpointError: it cannot be written, or ``target`` holds other files.
    """
    parent = _parent(target)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file: name a directory to write")
    _clean(target)
    if target.is_dir():
        others = sorted(entry.name for entry in target.iterdir() if entry.name not in names)
        if others:
            raise CheckpointError(
                f"{target} holds other files ({', '.join(others[:5])}): choose another place, or remove them"
            )
    path = parent / _temporary(target)
    lock = -1
    with _speaking_of(target):
        path.mkdir(mode=0o700)
        try:
            lock = os.open(path, os.O_RDONLY)
            _lock(lock)
            yield path
            path.chmod(stat.S_IMODE(target.stat().st_mode) if target.is_dir() else 0o777 & ~_umask())
            os.fsync(lock)
            _put_directory(path, target)
            _sync_directory(parent)
        finally:
            if path.is_dir():  # not in place; or what was in the place
                shutil.rmtree(path, ignore_errors=True)
            if lock >= 0:
                os.close(lock)


def _parent(target: Path) -> Path:
    parent = target.parent
    if not parent.is_dir():
        raise CheckpointError(f"cannot write {target}: there is no directory {parent}")
    return parent


@contextlib.contextmanager
def _speaking_of(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}; it is what it was") from error


def _temporary(target: Path) -> str:
    return f".{target.name[:150]}{MARK}{uuid.uuid4().hex}"


def _lock(descriptor: int) -> None:
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _clean(target: Path) -> None:
    """Remove what killed runs left beside ``target``."""
    if fcntl is None:
        return
    prefix = f".{target.name[:150]}{MARK}"
    try:
        found = [entry for entry in target.parent.iterdir() if entry.name.startswith(prefix)]
    except OSError:
        return
    for path in found:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        except OSError:
            pass  # another run is writing it
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _mode(target: Path) -> int:
    """Permissions of the file that is replaced, or those of any new file."""
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except OSError:
        return 0o666 & ~_umask()


def _sync_directory(path: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_directory(path: Path, target: Path) -> None:
    """Put a directory in place of another: at once where the system can, else by way of a second name."""
    if not target.exists():
        path.rename(target)
        return
    if _exchange(path, target):
        return
    aside = target.parent / _temporary(target)
    target.rename(aside)
    try:
        path.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here = -100  # AT_FDCWD
    return bool(call(here, os.fsencode(a), here, os.fsencode(b), RENAME_EXCHANGE) == 0)


# -- copying -----------------------------------------------------------------------------------------------


def copy_range(source: BinaryIO, start: int, target: BinaryIO, count: int, progress: Progress = _silent) -> None:
    """Append ``count`` bytes of ``source`` to ``target``, within the operating system where it can.

    Raises:
        CheckpointError: the source ended.
    """
    target.flush()
    position, end = start, start + count
    ranges = hasattr(os, "copy_file_range")
    while position < end:
        done = 0
        if ranges:
            try:
                done = os.copy_file_range(
                    source.fileno(), target.fileno(), min(end - position, STEP), offset_src=position
                )
            except OSError as error:
                if error.errno not in NO_RANGES:
                    raise
            if not done:
                ranges = False
                continue
        else:
            data = os.pread(source.fileno(), min(CHUNK, end - position), position)
            if not data:
                raise CheckpointError(f"{source.name} ends at byte {position}: it was cut off while being read")
            _write_all(target.fileno(), data)
            done = len(data)
        position += done
        progress(done)
    target.seek(0, os.SEEK_END)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


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


def _flush(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_file(source: Path, target: Path, flusher: Flusher, link: bool = False, progress: Progress = _silent) -> None:
    """Copy a whole file (or give it a second name).

    Raises:
        CheckpointError: it cannot be read.
    """
    size = source.stat().st_size
    if link:
        try:
            os.link(source.resolve(), target)
            progress(size)
            return
        except OSError:
            pass  # another file system, or one without links
    with source.open("rb") as reader, target.open("xb") as writer:
        copy_range(reader, 0, writer, size, progress)
        flusher.add(writer)
    target.chmod(stat.S_IMODE(source.stat().st_mode) | 0o600)


# -- safetensors -------------------------------------------------------------------------------------------


def write_safetensors(
    file: BinaryIO,
    header: Header,
    shapes: Mapping[str, tuple[int, ...]],
    values: Callable[[str], bytes],
    progress: Progress = _silent,
) -> None:
    """Write ``header``'s file again with some tensors changed; the bytes of the others are copied as they are.

    Args:
        file: where to.
        header: of the file to copy from.
        shapes: the new shape of each tensor that changes.
        values: gives a changed tensor's bytes, one at a time.
        progress: told how many bytes were written.

    Raises:
        CheckpointError: the source ended.
    """
    sizes = {
        name: entry.end - entry.start if name not in shapes else _size(entry.dtype, shapes[name])
        for name, entry in header.entries.items()
    }
    described = {
        name: (entry.dtype, shapes.get(name, entry.shape), sizes[name]) for name, entry in header.entries.items()
    }
    file.write(header_bytes(described, header.metadata))
    with header.path.open("rb") as source:
        run: tuple[int, int] | None = None
        for name, entry in header.entries.items():
            if name not in shapes:
                run = (entry.start if run is None else run[0], entry.end)
                continue
            _copy_run(source, header, run, file, progress)
            run = None
            data = values(name)
            if len(data) != sizes[name]:
                raise CheckpointError(f"{header.path}: tensor {name!r} came out with {len(data)} bytes")
            file.write(data)
            progress(len(data))
        _copy_run(source, header, run, file, progress)
    file.flush()


def _copy_run(
    source: BinaryIO, header: Header, run: tuple[int, int] | None, file: BinaryIO, progress: Progress
) -> None:
    if run is not None:
        copy_range(source, header.data_start + run[0], file, run[1] - run[0], progress)


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count * BITS[dtype] // 8


def header_bytes(described: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """The header of a file that holds tensors of (type, shape, bytes), in this order."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape, size) in described.items():
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write_text(path: Path, text: str, flusher: Flusher) -> None:
    """Write a small new file."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        flusher.add(file)
