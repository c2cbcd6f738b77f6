"""File to file: the tensors that follow the geometry are computed, all other bytes are copied as they are."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anypatch import hosts
from anypatch.adaptation import make_plan
from anypatch.core import history
from anypatch.core.account import NotFiniteError
from anypatch.core.empty import empty
from anypatch.core.plan import Plan
from anypatch.errors import CheckpointError, UnsupportedModelError
from anypatch.files import atomic
from anypatch.files import shards as streaming
from anypatch.files.configs import read_config, read_json
from anypatch.files.flushing import Flusher
from anypatch.files.header import TYPE_NAMES, Entry, Header, map_tensors, read_header
from anypatch.files.reading import Checkpoint, read
from anypatch.files.snapshot import Snapshot, copy_link, leads_outside
from anypatch.files.tensors import require_finite, tensor_bytes
from anypatch.hosts import cards
from anypatch.hosts.architectures import infer
from anypatch.hosts.base import plain as plain_size
from anypatch.hosts.fitting import LOADERS, open_clip_from_config, transformers_class
from anypatch.hosts.open_clip.files import require_safe
from anypatch.hosts.timm.files import described
from anypatch.hosts.transformers import processors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OPEN_CLIP = ("open_clip_config.json", "open_clip_model.safetensors")
# Weights in other formats: not converted, and stale beside converted ones.
STALE = re.compile(
    r"(\.bin|\.bin\.index\.json|\.h5|\.msgpack|\.onnx|\.onnx_data|\.pt|\.pth|\.ckpt|\.npz|\.tflite|\.gguf|\.ot)$"
)

Change = Callable[[Tensor], Tensor]


# -- one file ----------------------------------------------------------------------------------------------


def convert_file(
    source: Path,
    target: Path,
    arch: tuple[str, dict[str, Any]] | None,
    ask: Mapping[str, Any],
    prefix: str | None = None,
) -> None:
    """Convert one checkpoint file to a ``.safetensors`` file.

    Raises:
        CheckpointError: the source is damaged or does not fit, or the target cannot be written.
        GeometryError: sizes that do not fit.
    """
    if target.suffix != ".safetensors":
        raise CheckpointError(f"{target}: convert writes .safetensors files")
    checkpoint = read(source, prefix)
    checkpoint.require_one()
    if checkpoint.kind == "npz":
        raise CheckpointError(
            f"{source} is in Google's layout: load it with anypatch.load and save it with anypatch.save"
        )
    # several architectures may fit, but all of them hold these tensors, and those that change are the same
    name, arguments = arch if arch is not None else (infer(checkpoint)[0], {})
    library, _, name = name.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about heads, which are copied as they are
        model = LOADERS[library](name, checkpoint, dict(arguments))
    try:
        plan = make_plan(model, **ask)
    except NotFiniteError as error:  # said with the file's own name for it
        address = error.tensor.untyped_storage().data_ptr()
        for stored, tensor in checkpoint.tensors.items():
            if tensor.numel() and tensor.untyped_storage().data_ptr() == address:
                require_finite(source, stored, tensor)
        raise CheckpointError(f"{source}: {error}") from error
    changed = {} if plan is None else changed_tensors(checkpoint, model, plan)
    if checkpoint.kind == "safetensors":
        header = read_header(source)
        changed = {checkpoint.names[n]: t for n, t in changed.items()}
        sizes = {n: tuple(t.shape) for n, t in changed.items()}
        total = sum(e.end - e.start for e in header.entries.values())
        with _progress(target.name, total) as progress, atomic.replacing_file(target) as file:
            streaming.write_safetensors(file, header, sizes, lambda n: tensor_bytes(changed[n]), progress)
        return
    _write_new(target, checkpoint, changed)


def _write_new(target: Path, checkpoint: Checkpoint, changed: Mapping[str, Tensor]) -> None:
    """Write tensors that came from another format."""
    tensors = {name: changed.get(name, tensor) for name, tensor in checkpoint.tensors.items()}
    unknown = [name for name, tensor in tensors.items() if tensor.dtype not in TYPE_NAMES]
    if unknown:
        raise CheckpointError(f"{checkpoint.path}: tensor {unknown[0]!r} is of a type that .safetensors cannot hold")
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    described = {n: (TYPE_NAMES[t.dtype], tuple(t.shape), t.numel() * t.dtype.itemsize) for n, t in ordered.items()}
    with _progress(target.name, sum(d[2] for d in described.values())) as progress:  # noqa: SIM117
        with atomic.replacing_file(target) as file:
            file.write(streaming.header_bytes(described, {"format": "pt"}))
            for tensor in ordered.values():
                data = tensor_bytes(tensor)
                file.write(data)
                progress(len(data))


def changed_tensors(checkpoint: Checkpoint, model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The file's tensors that change, by their names in the file.

    The model's parameters lie in the file's own memory, which tells which tensor of the file each came from, whatever
    the host library's converter called it.

    Raises:
        CheckpointError: a tensor that changes was computed from several of the file's, or is not finite.
    """
    sources = {t.untyped_storage().data_ptr(): n for n, t in checkpoint.tensors.items() if t.numel()}
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    changed: dict[str, Tensor] = {}
    for name, change in plan.state_changes().items():
        live = own[name]
        stored = sources.get(live.untyped_storage().data_ptr())
        if stored is None:
            if not isinstance(live, nn.Parameter):
                continue  # computed by the constructor, not stored
            raise CheckpointError(
                f"{checkpoint.path}: {name} is made of several tensors of the file, so the file cannot be converted in "
                f"its own layout: use anypatch.load and anypatch.save"
            )
        tensor = checkpoint.tensors[stored]
        require_finite(checkpoint.path, stored, tensor)
        with torch.no_grad():
            changed[stored] = put_back(checkpoint.path, stored, tensor, live.detach(), change(live.detach()))
    return changed


def put_back(path: Path, name: str, stored: Tensor, view: Tensor, new: Tensor) -> Tensor:
    """The stored tensor with ``view``, which lies in it, replaced by ``new``.

    Raises:
        CheckpointError: the view is not the stored tensor with unit axes added or removed, or a slice of one axis.
    """
    new = new.to(stored.dtype)
    if stored.shape == view.shape and stored.stride() == view.stride():
        return new
    if view.is_contiguous() and stored.is_contiguous() and view.numel() == stored.numel():
        if stored.ndim == 2 and stored.shape[0] == view.shape[0]:
            return new.reshape(new.shape[0], -1)
        kept = [size for size in stored.shape if size != 1]
        if kept == [size for size in view.shape if size != 1]:
            sides = iter(new.shape[axis] for axis, size in enumerate(view.shape) if size != 1)
            return new.reshape([size if size == 1 else next(sides) for size in stored.shape])
    if stored.ndim == view.ndim:
        shorter = [axis for axis in range(stored.ndim) if stored.shape[axis] != view.shape[axis]]
        if len(shorter) == 1 and stored.stride() == view.stride():
            (axis,) = shorter
            offset = view.storage_offset() - stored.storage_offset()
            start = offset // stored.stride(axis)
            before = stored.narrow(axis, 0, start)
            rest = start + view.shape[axis]
            after = stored.narrow(axis, rest, stored.shape[axis] - rest)
            return torch.cat([before, new, after], dim=axis)
    raise CheckpointError(
        f"{path}: {name!r} is laid out in a way that cannot be converted file to file: "
        f"use anypatch.load and anypatch.save"
    )


# -- directories -------------------------------------------------------------------------------------------


def convert_directory(source: Path, target: Path, ask: Mapping[str, Any], link: bool = False) -> None:
    """Convert a directory in the format of transformers, timm or open_clip.

    Raises:
        CheckpointError: the source is damaged or incomplete, or the target cannot be written.
        GeometryError: sizes that do not fit.
    """
    if _same(source, target):
        link = False
    elif source.resolve() in target.resolve().parents or target.resolve() in source.resolve().parents:
        raise CheckpointError(f"{target} and {source} lie within one another")
    snapshot = Snapshot(source)
    config = read_config(source / "config.json") if (source / "config.json").is_file() else {}
    if (source / OPEN_CLIP[0]).is_file():
        texts, headers, values = _open_clip(source, target, ask)
    elif isinstance(config.get("architecture"), str):
        texts, headers, values = _timm(source, target, config, ask)
    elif "model_type" in config or "architectures" in config:
        texts, headers, values = _transformers(source, target, config, ask)
    else:
        raise CheckpointError(
            f"{source} is in no format that converts: no open_clip_config.json, and no config.json with model_type "
            f"(transformers) or architecture (timm)"
        )
    files = list(_other_files(source, {*texts, *headers}))
    names = {*texts, *headers, *(f.relative_to(source).parts[0] for f in files)}
    _require_nothing_else(target, names)
    total = sum(h.file_size for h in headers.values()) + sum(f.stat().st_size for f in files)
    with (
        _progress(target.name, total) as progress,
        atomic.replacing_directory(target) as place,
        Flusher(target) as flusher,
    ):
        for shard, header in headers.items():
            mine = {name: value for name, value in values.items() if name in header.entries}
            if not mine:
                streaming.copy_file(header.path, place / shard, flusher, link, progress)
                continue
            shapes = {name: tuple(value.shape) for name, value in mine.items()}
            with (place / shard).open("xb") as file:
                streaming.write_safetensors(file, header, shapes, lambda n, m=mine: tensor_bytes(m[n]), progress)  # type: ignore[misc]
                flusher.add(file)
        for path in files:
            copied = place / path.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            if leads_outside(path, source):
                copy_link(path, copied)
                continue
            streaming.copy_file(path, copied, flusher, link, progress)
        for name, text in texts.items():
            streaming.write_text(place / name, text, flusher)
        snapshot.require_unchanged()


def _require_nothing_else(target: Path, names: set[str]) -> None:
    """``target`` becomes the source at another geometry: it may hold nothing that the source does not."""
    if not target.is_dir():
        return
    atomic.recover(target)
    others = sorted(entry.name for entry in target.iterdir() if entry.name not in names)
    if others:
        raise CheckpointError(
            f"{target} holds other files ({', '.join(others[:5])}): choose another place, or remove them"
        )


Converted = tuple[dict[str, str], dict[str, Header], dict[str, Tensor]]


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
            if STALE.search(name) or name.endswith((".safetensors", ".safetensors.index.json")):
                continue
            yield path


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_shards(source: Path) -> tuple[dict[str, Header], dict[str, Any] | None]:
    """Headers of all shards of a directory, by file name, and its index where it has one.

    Raises:
        CheckpointError: a shard is missing or damaged, or the index does not say what the shards hold.
    """
    if not (source / INDEX).is_file():
        if not (source / SINGLE).is_file():
            raise CheckpointError(f"{source} holds neither {SINGLE} nor {INDEX}")
        return {SINGLE: read_header(source / SINGLE)}, None
    index = read_json(source / INDEX)
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise CheckpointError(f"{source / INDEX} is damaged: it has no weight_map")
    headers: dict[str, Header] = {}
    for shard in dict.fromkeys(table.values()):
        if Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard or "\0" in shard:
            raise CheckpointError(f"{source / INDEX} names a file outside the directory: {shard!r}")
        if not (source / shard).is_file():
            raise CheckpointError(f"{source / INDEX} names {shard}, which is missing")
        headers[shard] = read_header(source / shard)
    for name, shard in table.items():
        if name not in headers[shard].entries:
            raise CheckpointError(f"{source / INDEX} says that {name!r} is in {shard}, and it is not")
    for shard, header in headers.items():
        stray = [name for name in header.entries if table.get(name) != shard]
        if stray:
            raise CheckpointError(f"{source / INDEX} does not say that {stray[0]!r} is in {shard}")
    return headers, index


def _stored(headers: Mapping[str, Header], name: str) -> Tensor:
    """One tensor, mapped from its shard."""
    header = next(h for h in headers.values() if name in h.entries)
    return map_tensors(header, [name])[name]


# -- transformers ------------------------------------------------------------------------------------------


def _transformers(source: Path, target: Path, raw: dict[str, Any], ask: Mapping[str, Any]) -> Converted:
    headers, index = read_shards(source)
    try:
        kind, config = transformers_class(str(source))
        model: Any = empty(lambda: kind(config))
    except ImportError as error:
        raise UnsupportedModelError(f"converting {source} needs transformers installed ({error})") from error
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{source / 'config.json'}: transformers cannot build the model ({type(error).__name__}: {error})"
        ) from error
    before = copy.deepcopy(model.config.to_dict())
    plan = make_plan(model, **ask)
    texts: dict[str, str] = {}
    values: dict[str, Tensor] = {}
    entries = {name: entry for header in headers.values() for name, entry in header.entries.items()}
    if plan is not None:
        own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        for name, change in plan.state_changes().items():
            stored = _name_in_file(name, own[name], entries, source, model)
            if stored is None or stored in values:
                continue
            tensor = _stored(headers, stored)
            path = next(h.path for h in headers.values() if stored in h.entries)
            require_finite(path, stored, tensor)
            with torch.no_grad():
                values[stored] = change(tensor).to(tensor.dtype)
        plan.apply()
        config_text = merged(raw, before, model.config.to_dict())
        texts["config.json"] = _dump(config_text)
        for name in processors.FILES:
            if (source / name).is_file():
                read_json(source / name)  # or its error
        texts |= processors.texts(source, plan.subject.geometry, plan.target)
        texts |= _card(plan, model, source, target, ask)
    if index is not None:
        texts[INDEX] = _dump(_reindexed(index, entries, values))
    return texts, headers, values


def _name_in_file(name: str, live: Tensor, entries: Mapping[str, Entry], source: Path, model: nn.Module) -> str | None:
    """What a model's tensor is called in its file: libraries rename and move modules between versions.

    Raises:
        CheckpointError: the file has no such tensor, or one of another shape.
    """
    shape = tuple(live.shape)
    candidates = [name]
    base = getattr(model, "base_model_prefix", "")
    if base:
        candidates += [f"{base}.{name}", name.removeprefix(f"{base}.")]
    for candidate in candidates:
        if candidate in entries:
            if entries[candidate].shape != shape:
                raise CheckpointError(
                    f"{source}: tensor {candidate!r} has shape {entries[candidate].shape}, but config.json says {shape}"
                )
            return candidate
    parts = name.split(".")
    for length in range(len(parts) - 1, 1, -1):
        suffix = "." + ".".join(parts[-length:])
        found = [n for n in entries if ("." + n).endswith(suffix)]
        fitting = [n for n in found if entries[n].shape == shape]
        if len(fitting) == 1:
            return fitting[0]
        if found:
            raise CheckpointError(f"{source}: cannot tell which of {', '.join(found[:4])} is the model's {name}")
    if not isinstance(live, nn.Parameter):
        return None  # a buffer that this file does not store
    raise CheckpointError(f"{source} lacks {name}, which the model of its config.json has")


def _reindexed(index: dict[str, Any], entries: Mapping[str, Entry], values: Mapping[str, Tensor]) -> dict[str, Any]:
    result = copy.deepcopy(index)
    metadata = result.get("metadata")
    if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), (int, float)):
        grown = sum(v.numel() * v.dtype.itemsize - (entries[n].end - entries[n].start) for n, v in values.items())
        metadata["total_size"] += grown
        counted = metadata.get("total_parameters")
        if isinstance(counted, int):
            metadata["total_parameters"] = counted + sum(
                v.numel() - _count(entries[n].shape) for n, v in values.items()
            )
    return result


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def merged(raw: Any, before: Any, after: Any) -> Any:
    """``raw`` with what differs between ``before`` and ``after`` set to ``after``'s; all else as it was written."""
    if isinstance(after, dict) and isinstance(before, dict):
        result = dict(raw) if isinstance(raw, dict) else {}
        for key, value in after.items():
            if key not in before or _plain(before[key]) != _plain(value):
                result[key] = merged(result.get(key), before.get(key), value)
        return result
    return _plain(after)


def _plain(value: Any) -> Any:
    """As JSON would give it back."""
    return json.loads(json.dumps(value, default=str))


# -- timm and open_clip ------------------------------------------------------------------------------------


def _timm(source: Path, target: Path, raw: dict[str, Any], ask: Mapping[str, Any]) -> Converted:
    headers, _ = read_shards(source)
    if list(headers) != [SINGLE]:
        raise CheckpointError(f"{source}: timm reads {SINGLE} only, not shards")
    name, arguments = described(raw, source / "config.json")
    checkpoint = read(source / SINGLE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LOADERS["timm"](name, checkpoint, arguments)
    plan = make_plan(model, **ask)
    if plan is None:
        return {}, headers, {}
    values = {checkpoint.names[n]: t for n, t in changed_tensors(checkpoint, model, plan).items()}
    before = _timm_config(model)
    plan.apply()
    text = merged(raw, before, _timm_config(model))
    sizes = {"img_size": plan.target.image_size, "patch_size": plan.target.patch_size}
    old = {"img_size": plan.subject.geometry.image_size, "patch_size": plan.subject.geometry.patch_size}
    arguments = dict(raw.get("model_args") or {})
    for key, size in sizes.items():
        if size is not None and (size != old[key] or key in arguments):
            arguments[key] = plain_size(size)
    text["model_args"] = _plain(arguments)
    return {"config.json": _dump(text), **_card(plan, model, source, target, ask)}, headers, values


def _timm_config(model: nn.Module) -> dict[str, Any]:
    """What timm would write for a model."""
    from timm.models._hub import save_config_for_hf

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "config.json"
        save_config_for_hf(model, str(path))
        return read_config(path)


def _open_clip(source: Path, target: Path, ask: Mapping[str, Any]) -> Converted:
    raw = read_json(source / OPEN_CLIP[0])
    require_safe(source)
    cfg = raw.get("model_cfg")
    if not isinstance(cfg, dict) or not isinstance(cfg.get("vision_cfg"), dict):
        raise CheckpointError(f"{source / OPEN_CLIP[0]} has no model_cfg with a vision_cfg")
    if "timm_model_name" in cfg["vision_cfg"]:
        raise UnsupportedModelError(f"{source} has a timm tower: use anypatch.load and anypatch.save")
    path = source / OPEN_CLIP[1]
    checkpoint = read(path)
    model = open_clip_from_config(cfg, checkpoint)
    plan = make_plan(model, **ask)
    headers = {OPEN_CLIP[1]: read_header(path)}
    if plan is None:
        return {}, headers, {}
    values = {checkpoint.names[n]: t for n, t in changed_tensors(checkpoint, model, plan).items()}
    text = copy.deepcopy(raw)
    assert plan.target.image_size is not None
    text["model_cfg"]["vision_cfg"]["patch_size"] = plain_size(plan.target.patch_size)
    text["model_cfg"]["vision_cfg"]["image_size"] = plain_size(plan.target.image_size)
    if isinstance(text.get("preprocess_cfg"), dict) and "size" in text["preprocess_cfg"]:
        text["preprocess_cfg"]["size"] = plain_size(plan.target.image_size)
    return {OPEN_CLIP[0]: _dump(text), **_card(plan, model, source, target, ask)}, headers, values


def _card(plan: Plan, model: nn.Module, source: Path, target: Path, ask: Mapping[str, Any]) -> dict[str, str]:
    old = plan.subject.geometry
    step = history.step(old, plan.target, ask["kernel"], ask["positions"])
    library = hosts.library(old.library)
    return cards.card(library.name, library.version, type(model).__name__, (step,), source, target)


# -- progress ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar by bytes on a terminal, for what takes long enough to look at."""
    if total < 64 << 20 or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
