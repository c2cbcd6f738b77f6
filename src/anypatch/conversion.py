"""File to file: the tensors that follow the geometry are computed, all other bytes are copied as they are."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from anypatch import hosts
from anypatch.adaptation import make_plan
from anypatch.core import history
from anypatch.core.account import NotFiniteError
from anypatch.core.ambient import undisturbed
from anypatch.core.geometry import ImageSizeLike, Keep, SizeLike
from anypatch.core.plan import Plan
from anypatch.core.tables import PositionsLike
from anypatch.errors import AnypatchWarning, CheckpointError, listed
from anypatch.files import atomic, shards
from anypatch.files.flushing import Flusher
from anypatch.files.header import TYPE_NAMES, Header, read_header
from anypatch.files.paths import given
from anypatch.files.reading import Checkpoint, read
from anypatch.files.snapshot import Snapshot, copy_link, leads_outside
from anypatch.files.tensors import require_finite, tensor_bytes
from anypatch.hosts import cards, loading
from anypatch.hosts.checkpoints import architecture, fit
from anypatch.hosts.folders import TABLES, without_formats
from anypatch.hosts.opened import changed_tensors
from anypatch.report.progress import shown_progress

# Weights in other formats: not converted, and stale beside converted ones.
STALE = re.compile(
    r"(\.bin|\.bin\.index\.json|\.h5|\.msgpack|\.onnx|\.onnx_data|\.pt|\.pth|\.ckpt|\.npz|\.tflite|\.gguf|\.ot)$"
)
WORTH_A_BAR = 64 << 20  # bytes: less is written in a tenth of a second


def convert(
    source: str | Path,
    target: str | Path,
    patch_size: SizeLike | None = None,
    image_size: ImageSizeLike | None = None,
    *,
    keep: Keep = "image",
    kernel: Any = "wiener",
    positions: PositionsLike = "antialias",
    arch: str | None = None,
    prefix: str | None = None,
    link: bool = False,
) -> None:
    """Convert a checkpoint file or directory to another geometry without loading the model.

    >>> import tempfile, timm
    >>> from safetensors.torch import save_file
    >>> folder = tempfile.TemporaryDirectory()
    >>> source, target = f"{folder.name}/vit.safetensors", f"{folder.name}/vit8.safetensors"
    >>> save_file(timm.create_model("test_vit").state_dict(), source)
    >>> convert(source, target, patch_size=8)
    >>> timm.create_model("test_vit", patch_size=8, checkpoint_path=target).patch_embed.proj.weight.shape
    torch.Size([64, 3, 8, 8])

    Only the tensors that follow the geometry are computed; all other bytes are copied by the operating system. The
    result is what loading, adapting and saving would give. The target appears when it is complete: whatever happens
    before leaves what was there.

    Args:
        source: a checkpoint file, or a directory in the format of transformers, timm or open_clip.
        target: the ``.safetensors`` file or the directory to write; may be ``source``, beside whose model everything
            else then stays.
        patch_size, image_size, keep, kernel, positions: as in :func:`anypatch.adapt`.
        arch: for a file whose tensors do not tell, as in :func:`anypatch.load`.
        prefix: for a file that holds several models: what stands before the name of the patch projection.
        link: give files that do not change a second name instead of copying them (same file system only).

    Raises:
        CheckpointError: the source is damaged or incomplete, or the target cannot be written.
        GeometryError: sizes that do not fit.
        UnsupportedModelError: the model cannot be adapted.
    """
    source, target = given(source, "source"), given(target, "target")
    if os.path.lexists(target) and not target.exists():
        raise CheckpointError(f"{target} is a link to nothing: name another target")
    if not source.exists():
        raise CheckpointError(f"{source} does not exist{_named(str(source))}")
    ask = {
        "patch_size": patch_size,
        "image_size": image_size,
        "keep": keep,
        "kernel": kernel,
        "positions": positions,
    }
    with undisturbed(), _speaking_of(source, target), loading.describing(str(source)):
        if not source.is_dir():
            _convert_file(source, target, arch, ask, prefix)
            return
        if arch is not None or prefix is not None:
            raise CheckpointError(f"{source} says itself what it is: leave out arch and prefix")
        _convert_directory(source, target, ask, link)


def _named(source: str) -> str:
    """What to do with a source that other verbs take: the name of a model in a library."""
    if hosts.by_prefix(source.partition(":")[0]) is None:
        return ""
    return ": convert takes a file or a directory; a model with a name is loaded, adapted and saved (anypatch adapt)"


@contextlib.contextmanager
def _speaking_of(source: Path, target: Path) -> Iterator[None]:
    """Whatever the system refuses meanwhile, such as room for temporary files, is one of our errors."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot convert {source}: {error.strerror or error}; {target} is what it was") from error


# -- one file ----------------------------------------------------------------------------------------------


def _convert_file(source: Path, target: Path, arch: str | None, ask: Mapping[str, Any], prefix: str | None) -> None:
    if target.suffix != ".safetensors":
        raise CheckpointError(f"{target}: convert writes .safetensors files")
    checkpoint = read(source, prefix)
    checkpoint.require_one()
    if checkpoint.kind == "npz":
        raise CheckpointError(
            f"{source} is in Google's layout: load it with anypatch.load and save it with anypatch.save"
        )
    # several architectures may fit, but all of them hold these tensors, and those that change are the same
    library, name = architecture(checkpoint, arch, several=True)
    model = fit(library, name, checkpoint)
    plan = _plan(model, checkpoint, ask)
    if plan is None:
        _say_unchanged(source)
    changed = {} if plan is None else changed_tensors(checkpoint, model, plan)
    if checkpoint.kind != "safetensors":
        _write_new(target, checkpoint, changed)
        return
    header = read_header(source)
    changed = {checkpoint.names[n]: t for n, t in changed.items()}
    total = sum(e.end - e.start for e in header.entries.values())
    with _progress(target.name, total) as progress, atomic.replacing_file(target) as file:
        shards.write_safetensors(file, header, changed, progress)


def _say_unchanged(source: Path) -> None:
    warnings.warn(f"{source} has these sizes already: it is written as it is", AnypatchWarning, stacklevel=4)


def _plan(model: nn.Module, checkpoint: Checkpoint, ask: Mapping[str, Any]) -> Plan | None:
    """``make_plan``, whose errors say a tensor's name in the file."""
    try:
        return make_plan(model, **ask)
    except NotFiniteError as error:
        address = error.tensor.untyped_storage().data_ptr()
        for stored, tensor in checkpoint.tensors.items():
            if tensor.numel() and tensor.untyped_storage().data_ptr() == address:
                require_finite(checkpoint.path, stored, tensor)
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def _write_new(target: Path, checkpoint: Checkpoint, changed: Mapping[str, Tensor]) -> None:
    """Write tensors that came from another format."""
    tensors = {name: changed.get(name, tensor) for name, tensor in checkpoint.tensors.items()}
    unknown = [name for name, tensor in tensors.items() if tensor.dtype not in TYPE_NAMES]
    if unknown:
        raise CheckpointError(f"{checkpoint.path}: tensor {unknown[0]!r} is of a type that .safetensors cannot hold")
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    described = {n: (TYPE_NAMES[t.dtype], tuple(t.shape), t.numel() * t.dtype.itemsize) for n, t in ordered.items()}
    total = sum(size for _, _, size in described.values())
    with _progress(target.name, total) as progress, atomic.replacing_file(target) as file:
        file.write(shards.header_bytes(described, {"format": "pt"}))
        for tensor in ordered.values():
            data = tensor_bytes(tensor)
            file.write(data)
            progress(len(data))


# -- directories -------------------------------------------------------------------------------------------


def _convert_directory(source: Path, target: Path, ask: Mapping[str, Any], link: bool) -> None:
    in_place = _same(source, target)
    if in_place:
        link = False
    elif source.resolve() in target.resolve().parents or target.resolve() in source.resolve().parents:
        raise CheckpointError(f"{target} and {source} lie within one another")
    snapshot = Snapshot(source)
    texts, headers, values = _converted(source, target, ask)
    written = {*texts, *headers}
    if in_place:  # whatever else is there stays where it is
        _require_none_stale(source, written)
    files = [] if in_place else list(_other_files(source, written))
    if not in_place:
        _require_nothing_else(target, written | {f.relative_to(source).as_posix() for f in files})
    total = sum(h.file_size for h in headers.values()) + sum(f.stat().st_size for f in files)
    with (
        _progress(target.name, total) as progress,
        atomic.replacing_directory(target, lambda name: not in_place) as place,
        Flusher(target) as flusher,
    ):
        for shard, header in headers.items():
            mine = {name: value for name, value in values.items() if name in header.entries}
            if not mine:
                shards.copy_file(header.path, place / shard, flusher, link, progress)
                continue
            with (place / shard).open("xb") as file:
                shards.write_safetensors(file, header, mine, progress)
                flusher.add(file)
        for path in files:
            copied = place / path.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            if leads_outside(path, source):
                copy_link(path, copied)
                continue
            shards.copy_file(path, copied, flusher, link, progress)
        for name, text in texts.items():
            shards.write_text(place / name, text, flusher)
        snapshot.require_unchanged()


def _converted(
    source: Path, target: Path, ask: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, Header], dict[str, Tensor]]:
    """Texts, headers of the weights, and the tensors that change, of a directory at another geometry."""
    found = hosts.by_folder(source)
    if found is None or not found[0].has("open_folder"):
        raise CheckpointError(
            f"{source} is in no format that converts: "
            f"{without_formats(library.name for library in hosts.HOSTS if library.has('open_folder'))}"
        )
    opened = found[0].open_folder(source)
    plan = make_plan(opened.model, **ask)
    if plan is None:
        _say_unchanged(source)
        return opened.index({}), opened.headers, {}
    values = opened.values(plan)
    texts = opened.texts(plan) | _card(plan, opened.model, source, target, ask) | opened.index(values)
    return texts, opened.headers, values


def _card(plan: Plan, model: nn.Module, source: Path, target: Path, ask: Mapping[str, Any]) -> dict[str, str]:
    old = plan.subject.geometry
    step = history.step(old, plan.target, ask["kernel"], ask["positions"])
    library = hosts.library(old.library)
    return cards.card(library.name, library.version, type(model).__name__, (step,), source, target)


def _require_none_stale(folder: Path, written: set[str]) -> None:
    """Converted where it lies, a directory may hold no second set of weights, nor a training's state of the first."""
    stale = sorted(e.name for e in folder.iterdir() if e.name not in written and not e.is_dir() and _stale(e.name))
    if stale:
        raise CheckpointError(
            f"{folder} holds what would stay at the old geometry beside the converted weights ({listed(stale, 5)}): "
            f"remove it, or convert to another place"
        )


def _require_nothing_else(target: Path, written: set[str]) -> None:
    """``target`` becomes the source at another geometry: it may hold nothing that is not written anew.

    Args:
        target: the directory to write.
        written: files, relative to it.
    """
    if not target.is_dir():
        return
    atomic.recover(target)
    others = []
    for root, directories, names in os.walk(target, followlinks=False):
        place = Path(root)
        links = [name for name in directories if (place / name).is_symlink()]
        found = [(place / name).relative_to(target).as_posix() for name in (*names, *links)]
        others += [name for name in found if name not in written]
        if place != target and not names and not directories:
            others.append(place.relative_to(target).as_posix())
    if others:
        tops = list(dict.fromkeys(_top(name, written) for name in sorted(others)))
        raise CheckpointError(
            f"{target} holds more than the converted model ({listed(tops, 5)}): choose another place, or remove it"
        )


def _top(name: str, written: set[str]) -> str:
    """Of a path, the outermost folder in which nothing is written."""
    parts = name.split("/")
    for count in range(1, len(parts)):
        folder = "/".join(parts[:count])
        if not any(path.startswith(f"{folder}/") for path in written):
            return folder
    return name


def _same(a: Path, b: Path) -> bool:
    return b.exists() and a.samefile(b)


def _other_files(source: Path, written: set[str]) -> Iterator[Path]:
    """Files to copy as they are: tokenizers, cards, code; not weights in other formats, which would be stale."""
    for root, directories, names in os.walk(source, followlinks=False):
        directories[:] = sorted(d for d in directories if not d.startswith(".") and not (Path(root) / d).is_symlink())
        for name in sorted(names):
            path = Path(root) / name
            relative = path.relative_to(source).as_posix()
            if relative in written or name.startswith(".") or not path.is_file():
                continue
            if _stale(name):
                continue
            yield path


def _stale(name: str) -> bool:
    weights = STALE.search(name) or name.endswith((".safetensors", ".safetensors.index.json"))
    return bool(weights) and name not in TABLES


# -- progress ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """What to call with a number of bytes, for work that takes long enough to look at."""
    done = 0
    with shown_progress(None if total >= WORTH_A_BAR else False) as shown:

        def count(size: int) -> None:
            nonlocal done
            done += size
            shown(f"writing {what}, megabytes", done >> 20, total >> 20)

        yield count
