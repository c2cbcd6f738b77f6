"""Directories put in place whole: killed at every step that touches the file system, in every way there is."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anypatch import CheckpointError
from anypatch.files import atomic

OLD = {"config.json": "old", "weights": "old", "stale": "old", "tower/config.json": "old"}
NEW = {"config.json": "new", "weights": "new", "added": "new"}
FOREIGN = {"notes.txt": "mine", "runs/log/1": "mine"}
MEANT = frozenset((*OLD, "tower"))


def _write(place: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)


def _read(place: Path) -> dict[str, str]:
    return {p.relative_to(place).as_posix(): p.read_text() for p in sorted(place.rglob("*")) if p.is_file()}


def _replace(target: Path) -> None:
    with atomic.replacing_directory(target, replaced=lambda name: name in MEANT) as place:
        _write(place, NEW)


def _in_child(work: Callable[[], None], step: int) -> bool:
    """Run ``work`` in a process that dies before its ``step``-th access to the file system; whether it finished."""
    process = os.fork()
    if not process:
        seen = 0

        def count(event: str, _: Any) -> None:
            nonlocal seen
            if event == "open" or event.startswith(("os.", "shutil.", "ctypes.dlsym", "fcntl.")):
                seen += 1
                if seen == step:
                    os._exit(9)

        sys.addaudithook(count)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, 9)
    return code == 0


def _no_exchange(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(atomic, "_exchange", lambda a, b: False)


def _mounted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os.path, "ismount", lambda path: Path(path).name == "target")


def _not_beside(patch: pytest.MonkeyPatch) -> None:
    real = Path.mkdir

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.name.startswith(".target"):
            raise PermissionError(errno.EACCES, "read-only")
        real(self, *args, **kwargs)

    patch.setattr(Path, "mkdir", mkdir)


def _bound(patch: pytest.MonkeyPatch) -> None:
    """A mount that looks like any directory, until it is renamed."""
    real = Path.rename

    def rename(self: Path, target: Path) -> Any:
        if self.name == "target":
            raise OSError(errno.EBUSY, "busy")
        return real(self, target)

    _no_exchange(patch)
    patch.setattr(Path, "rename", rename)


WAYS = {
    "exchange": lambda patch: None,
    "two renames": _no_exchange,
    "a mount point": _mounted,
    "read-only above": _not_beside,
    "a mount that is busy": _bound,
}


SLOWER = {*WAYS} - {"exchange"}  # each is killed at some hundred steps, too


@pytest.mark.parametrize("way", [pytest.param(w, marks=pytest.mark.slow) if w in SLOWER else w for w in WAYS])
def test_killed_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    WAYS[way](monkeypatch)
    target = tmp_path / "target"
    old, new = {**OLD, **FOREIGN}, {**NEW, **FOREIGN}
    step, stride, outcomes = 0, 1 if way in ("exchange", "two renames") else 3, set()
    while True:
        step += stride
        _write(target, old)
        (target / "added").unlink(missing_ok=True)
        finished = _in_child(lambda: _replace(target), step)
        now = _read(target) if target.is_dir() else {}
        if way == "exchange":
            assert now in (old, new), f"step {step}"
        shown = {name: text for name, text in now.items() if not name.startswith(atomic.MARK)}
        assert "config.json" not in shown or shown in (old, new), f"step {step}: a mixture that loads"
        atomic.recover(target)
        now = _read(target)
        assert now in (old, new), f"step {step}"
        outcomes.add(now == old)
        _replace(target)
        assert _read(target) == new
        assert [p.name for p in tmp_path.iterdir()] == ["target"], f"step {step}"
        assert not (target / "stale").exists()
        if finished:
            break
    assert step > 15
    assert outcomes == {True, False}


@pytest.mark.parametrize("way", WAYS)
def test_what_fails_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    WAYS[way](monkeypatch)
    target = tmp_path / "target"
    _write(target, {**OLD, **FOREIGN})

    def fail(error: BaseException) -> None:
        with atomic.replacing_directory(target) as place:
            _write(place, NEW)
            raise error

    with pytest.raises(CheckpointError, match="no space"):
        fail(OSError(errno.ENOSPC, "no space left"))
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    assert _read(tmp_path) == {f"target/{k}": v for k, v in {**OLD, **FOREIGN}.items()}


def test_the_only_copy_stays_when_somebody_makes_the_target_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _no_exchange(monkeypatch)
    target = tmp_path / "target"
    _write(target, OLD)
    rename = Path.rename

    def dies(self: Path, to: Path) -> Any:
        if self.name == atomic.NEW:
            os._exit(9)
        return rename(self, to)

    process = os.fork()
    if not process:
        Path.rename = dies  # type: ignore[method-assign, assignment]
        _replace(target)
        os._exit(0)
    os.waitpid(process, 0)
    assert not target.exists()
    _write(target, {"own": "a new start"})
    _replace(target)
    (stage,) = (p for p in tmp_path.iterdir() if p != target)
    assert _read(stage / atomic.OLD) == OLD
    assert _read(target) == {**NEW, "own": "a new start"}


def test_links_mounts_and_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "real"
    _write(real, {**OLD, **FOREIGN})
    (real / "latest").symlink_to("runs")
    (real / "broken").symlink_to("nowhere")
    real.chmod(0o750)
    os.chown(real, 1234, 1234) if os.geteuid() == 0 else None
    node = (real / "notes.txt").stat().st_ino
    (tmp_path / "target").symlink_to("real")
    _replace(tmp_path / "target")
    assert (tmp_path / "target").is_symlink()
    assert _read(real) == {**NEW, **FOREIGN}
    assert (real / "latest").readlink() == Path("runs")
    assert (real / "broken").is_symlink()
    assert (real / "notes.txt").stat().st_ino == node  # who has it open goes on writing into it
    assert real.stat().st_mode & 0o777 == 0o750
    assert os.geteuid() or real.stat().st_uid == 1234
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("runs/log"))
    _write(real, OLD)
    inner = (real / "runs" / "log").stat().st_ino
    _replace(real)
    assert _read(real) == {**NEW, **FOREIGN}
    assert (real / "runs" / "log").stat().st_ino == inner  # not touched


def test_missing_parents(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no directory"), atomic.replacing_directory(tmp_path / "a" / "b"):
        pass
    with (
        pytest.raises(ValueError, match="stop"),
        atomic.replacing_directory(tmp_path / "a" / "b" / "c", parents=True),
    ):
        raise ValueError("stop")
    assert not list(tmp_path.iterdir())
    with atomic.replacing_directory(tmp_path / "a" / "b" / "c", parents=True) as place:
        (place / "x").write_text("x")
    assert _read(tmp_path) == {"a/b/c/x": "x"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"), atomic.replacing_directory(tmp_path / "file"):
        pass


def test_threads_that_write_the_same_target(tmp_path: Path) -> None:
    target, errors = tmp_path / "target", []
    _write(target, FOREIGN)

    def run(number: int) -> None:
        try:
            for _ in range(10):
                with atomic.replacing_directory(target, replaced=lambda name: name in ("a", "b")) as place:
                    _write(place, {"a": f"{number}", "b": f"{number}"})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    found = _read(target)
    assert found["a"] == found["b"]
    assert {k: v for k, v in found.items() if k not in "ab"} == FOREIGN
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_targets_that_need_overwrite(tmp_path: Path) -> None:
    full, empty, file = tmp_path / "full", tmp_path / "empty", tmp_path / "file"
    _write(full, NEW)
    empty.mkdir()
    file.write_text("x")
    (tmp_path / "link").symlink_to("full")
    for free in (empty, tmp_path / "missing"):
        atomic.require_free(free, source=full)
    for taken, says in ((full, "not empty"), (file, "there already")):
        with pytest.raises(CheckpointError, match=says):
            atomic.require_free(taken)
        atomic.require_free(taken, overwrite=True)
    for same in (full, tmp_path / "link", full / ".." / "full"):
        with pytest.raises(CheckpointError, match="source itself"):
            atomic.require_free(same, source=full)
