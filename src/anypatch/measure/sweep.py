"""Compare patch sizes: what each costs, and how much of the native model it keeps."""

from __future__ import annotations

import copy
import csv
import importlib.util
import io
import json
import math
import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anypatch import __version__
from anypatch.adaptation import adapt, geometry, make_plan
from anypatch.core.adapters import unwrap
from anypatch.core.geometry import NEAREST, Geometry, ImageSizeLike, Keep, SizeLike, target_geometry
from anypatch.errors import AnypatchError, AnypatchWarning, DataError, GeometryError, UnsupportedModelError
from anypatch.hosts import library
from anypatch.measure.accuracy import (
    Accuracy,
    fidelity,
    knn_accuracy,
    logits_accuracy,
    neighbour_agreement,
    neighbours,
    pareto,
    patch_fidelity,
    probe_accuracy,
    zero_shot_accuracy,
)
from anypatch.measure.cache import Cache, default_folder, key_of, weights_hash, write_whole
from anypatch.measure.cost import measure_cost
from anypatch.measure.features import Reader, shared_colours
from anypatch.measure.images import Data, ImageSet, decode, labelled, read_class_names, unlabelled, unreadable
from anypatch.measure.preprocess import Preprocess, preprocess_of
from anypatch.measure.processes import Team
from anypatch.measure.zeroshot import head_columns, text_features

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

SHARD = 64  # images per cache file: what an interruption can cost
PATCH_IMAGES = 32  # images whose patch features are kept

Progress = Callable[[str, int, int], None]  # (what, done, total)
Row = dict[str, Any]


@dataclass
class Sample:
    """One image of the report: as the model sees it, and its patch features as colours at every patch size."""

    name: str
    image: NDArray[np.uint8]
    maps: list[NDArray[np.uint8]]


@dataclass
class SweepResult:
    """What a sweep found.

    Attributes:
        rows: one per patch size, in the order asked for.
        native: the same columns for the model as it is, which fidelity compares with.
        settings: what was measured, on what, and how.
        notes: what the user should know: skipped images, guesses.
        samples: pictures for the report.
    """

    rows: list[Row]
    native: Row
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def quality(self) -> str | None:
        """The column that the curve shows: accuracy where there is one, else fidelity; ``None`` without images."""
        names = ("accuracy", "fidelity")
        return next((n for n in names if any(r.get(n) is not None for r in self.rows)), None)

    def pareto(self, cost: str = "gflops") -> list[bool]:
        """For each row, whether no other row is better in both quality and ``cost``."""
        if self.quality is None:
            return [False] * len(self.rows)
        sign = -1.0 if cost == "images_per_second" else 1.0
        gains = [r.get(self.quality) for r in self.rows]
        return pareto([sign * r[cost] for r in self.rows], [-math.inf if g is None else g for g in gains])

    def to_pandas(self) -> DataFrame:
        """The rows as a table; sizes of two sides as text."""
        pandas = _optional("pandas")
        return pandas.DataFrame([{k: _flat(v) for k, v in row.items()} for row in self.rows])

    def plot(self) -> Figure:
        """The trade-off curves as a matplotlib figure."""
        from anypatch.report.page import figure

        _optional("matplotlib")
        return figure(self)

    def to_html(self, path: str | Path) -> Path:
        """Write the report: one file that opens without a network."""
        from anypatch.report.page import html

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, html(self).encode("utf-8", "replace"))
        return target

    def to_dict(self) -> dict[str, Any]:
        """What ``sweep.json`` holds."""
        return {"rows": self.rows, "native": self.native, "settings": self.settings, "notes": self.notes}

    def to_csv(self) -> str:
        """What ``sweep.csv`` holds."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: "" if v is None else _flat(v) for k, v in row.items()} for row in self.rows)
        return text.getvalue()

    def save(self, folder: str | Path) -> Path:
        """Write ``sweep.json``, ``sweep.csv`` and ``report.html`` into a folder."""
        target = _writable(folder)
        write_whole(target / "sweep.json", (json.dumps(self.to_dict(), indent=2) + "\n").encode())
        write_whole(target / "sweep.csv", self.to_csv().encode())
        self.to_html(target / "report.html")
        return target


def sweep(
    source: str | Path | nn.Module,
    patch_sizes: int | Sequence[SizeLike],
    *,
    image_size: ImageSizeLike | None = None,
    keep: Keep = "image",
    data: Any = None,
    images: str | Path | None = None,
    output: str | Path | None = None,
    class_names: Any = None,
    batch_size: int = 32,
    num_workers: int | None = None,
    kernel: Any = "wiener",
    arch: str | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
    cache: str | Path | bool = True,
    device: str | torch.device | None = None,
    preprocess: Preprocess | None = None,
    samples: int = 4,
    reproduce: str | None = None,
    **host_kwargs: Any,
) -> SweepResult:
    """Measure a model at several patch sizes, on your images. The model itself is left as it is.

    Args:
        source: what :func:`anypatch.load` takes, or a live model.
        patch_sizes: the patch sizes to compare.
        image_size, keep, kernel: as in :func:`anypatch.adapt`, the same for every patch size.
        data: labelled images: a folder ``train/CLASS/*`` and ``val/CLASS/*``, or ``CLASS/*``; a Hugging Face
            dataset, its name or its directory. A folder without classes counts as ``images``.
        images: a folder of images without labels; fidelity is measured on these if they are given.
        output: a folder for ``sweep.json``, ``sweep.csv`` and ``report.html``.
        class_names: for CLIP models, the classes in words, for zero-shot accuracy: a file, a list, or an object
            from class to name.
        batch_size: images per forward pass, in timing too.
        num_workers: processes that decode images; chosen by the number of cores if not given.
        arch: for checkpoint files, as in :func:`anypatch.load`.
        limit: at most so many images per split.
        progress: called with (what, done, total).
        cache: a folder for features; ``True`` for the user's cache folder, ``False`` for none.
        device: where to compute; an accelerator if there is one.
        preprocess: instead of the model's own preprocessing.
        samples: how many images the report shows.
        reproduce: a command that the report shows; without it, the Python call.
        **host_kwargs: passed on to the host library's loader.

    Raises:
        GeometryError: sizes that do not fit, all of them in one message.
        DataError: no images, one class only, class names that do not match.
        UnsupportedModelError: a model that cannot be adapted, or whose features cannot be read.
    """
    if not isinstance(source, nn.Module):
        source = str(source)
    _require_packages(data is not None)
    team = Team(device)
    folder = None if output is None else _writable(output)
    collections = _open_data(data, images, limit)
    model = load_model(source, arch, host_kwargs)
    native, targets = geometries_of(model, patch_sizes, image_size, keep, kernel)
    notes = _Notes(collections)
    origin = source if isinstance(source, str) else None
    job = _Job(
        model=model,
        preprocess=preprocess or preprocess_of(model, origin),
        kernel=kernel,
        collections=collections,
        head=_head(model, collections, notes),
        batch_size=_positive(batch_size, "batch_size"),
        workers=_workers(num_workers, team),
        team=team,
        cache=Cache(None if cache is False else default_folder() if cache is True else Path(cache)),
        progress=progress or (lambda what, done, total: None),
    )
    texts = _texts(model, class_names, collections, origin)
    if not collections.sets:
        notes.add("no images were given: only costs were measured")
    if job.preprocess.note:
        notes.add(job.preprocess.note)
    for name, members in collections.sets.items():
        notes.skipped(name, members, team.lead(lambda members=members: unreadable(members)))  # type: ignore[misc]
    measured = job.run(native, targets)

    def conclude() -> SweepResult:
        for name, members in collections.sets.items():
            notes.skipped(name, members, measured[0].sets[name].failures)
        rows = [_row(m, measured[0], collections, job.head, texts) for m in measured]
        settings = _settings(source, native, job, keep)
        settings["reproduce"] = reproduce or _call(
            source, patch_sizes, image_size=image_size, keep=keep, data=data, images=images, limit=limit
        )
        result = SweepResult(rows[1:], rows[0], settings, notes.all, job.samples(measured, samples))
        if folder is not None:
            result.save(folder)
        return result

    return team.lead(conclude)


@dataclass
class _Collections:
    """The image sets of a sweep: ``train`` and ``test`` with labels, ``images`` without."""

    sets: dict[str, ImageSet]
    watched: str  # the set that fidelity is measured on
    notes: list[str]

    @property
    def labelled(self) -> bool:
        return "train" in self.sets


@dataclass
class _Extracted:
    """Features of one image set at one geometry, unreadable images left out."""

    pooled: NDArray[np.float32]
    logits: NDArray[np.float32] | None
    patches: dict[int, Tensor]
    indices: list[int]
    failures: dict[int, str]


@dataclass
class _Measured:
    geometry: Geometry
    cost: dict[str, Any]
    sets: dict[str, _Extracted]


class _Notes:
    """Notes for the user, each also a warning when it appears."""

    def __init__(self, collections: _Collections) -> None:
        self.all: list[str] = []
        self._skipped: dict[str, str] = {}
        for note in collections.notes:
            self.add(note)

    def add(self, note: str) -> None:
        if note not in self.all:
            self.all.append(note)
            warnings.warn(note, AnypatchWarning, stacklevel=3)

    def skipped(self, name: str, images: ImageSet, failures: dict[int, str]) -> None:
        """Count and name unreadable images; said again only if more were found."""
        if not failures:
            return
        if len(failures) == len(images):
            first = next(iter(failures))
            raise DataError(
                f"{images.name}: none of its {len(images)} images can be read ({images.keys[first]}: {failures[first]})"
            )
        shown = "; ".join(f"{images.keys[i]} ({why})" for i, why in sorted(failures.items())[:20])
        more = f"; and {len(failures) - 20} more" if len(failures) > 20 else ""
        note = f"{len(failures)} of {len(images)} images of {name} cannot be read and are left out: {shown}{more}"
        before = self._skipped.get(name)
        if before in self.all:
            if before == note:
                return
            self.all.remove(before)
        self._skipped[name] = note
        self.add(note)


@dataclass
class _Job:
    """Everything that stays the same from one patch size to the next."""

    model: nn.Module
    preprocess: Preprocess
    kernel: Any
    collections: _Collections
    head: list[int] | None
    batch_size: int
    workers: int
    team: Team
    cache: Cache
    progress: Progress

    def __post_init__(self) -> None:
        self.sets, self.watched = self.collections.sets, self.collections.watched
        self.own = geometry(self.model)
        self.weights: dict[Geometry, str] = {}
        self.dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        count = len(self.sets[self.watched]) if self.watched else 0
        chosen = np.linspace(0, count - 1, min(PATCH_IMAGES, count)).round().astype(int)
        self.kept = frozenset(chosen.tolist())
        self.done = self.total = 0

    def run(self, native: Geometry, targets: Sequence[Geometry]) -> list[_Measured]:
        """The native geometry first, then each target. What any of them costs is measured before the long part."""
        every = [native, *targets]
        distinct = list(dict.fromkeys(every))
        self.total = len(distinct) * sum(len(s) for s in self.sets.values())
        self.done = 0
        costs = {}
        for place, target in enumerate(distinct):
            self.progress(f"timing patch {short(target.patch_size)}", place, len(distinct))
            self.weights[target], costs[target] = self.team.lead(lambda target=target: self._cost(target))  # type: ignore[misc]
        found = {}
        for target in distinct:
            subject = _Lazy(lambda target=target: self._reader(target))  # type: ignore[misc]
            sets = {name: self._extract(subject, target, name) for name in self.sets}
            found[target] = _Measured(target, costs[target], sets)
        return [found[target] for target in every]

    def _reader(self, target: Geometry) -> Reader:
        """A copy of the model at a geometry, on the device."""
        copied = copy.deepcopy(self.model)
        if not self._is_native(target):
            image = None if self.own.image_size is None else target.image_size
            adapt(copied, target.patch_size, image, kernel=self.kernel)
        return Reader(copied.to(self.team.device))

    def _is_native(self, target: Geometry) -> bool:
        return target.patch_size == self.own.patch_size and self.own.image_size in (None, target.image_size)

    def _key(self, target: Geometry, **parts: Any) -> str:
        return key_of(
            {
                "version": __version__,
                "weights": self.weights[target],
                "patch": target.patch_size,
                "image": target.image_size,
                **parts,
            }
        )

    def _cost(self, target: Geometry) -> tuple[str, dict[str, Any]]:
        """A hash of the adapted weights, which tells whether cached features are theirs, and what they cost."""
        reader = self._reader(target)
        self.weights[target] = weights_hash(reader.model)
        device = self.team.device
        machine = platform.processor() or platform.machine()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine
        key = self._key(target, device=name, threads=torch.get_num_threads(), batch=self.batch_size)
        known = self.cache.load_json(key, "cost")
        if known is None:
            assert target.image_size is not None
            shape = (self.batch_size, self.preprocess.channels, *target.image_size)
            generator = torch.Generator().manual_seed(0)
            pixels = torch.randn(shape, generator=generator, dtype=torch.float32).to(device, self.dtype)
            known = measure_cost(reader, pixels)
            self.cache.store_json(key, "cost", known)
        return self.weights[target], known

    def _extract(self, reader: _Lazy, target: Geometry, name: str) -> _Extracted:
        """Features of an image set: each process computes its shards, then everyone has all."""
        images = self.sets[name]
        kept = self.kept if name == self.watched else frozenset()
        key = self._key(
            target,
            images=images.fingerprint(),
            preprocess={k: v for k, v in asdict(self.preprocess).items() if k != "note"},
            patches=sorted(kept),
            head=self.head is not None,
        )
        shard = max(SHARD // self.batch_size, 1) * self.batch_size
        starts = range(0, len(images), shard)
        mine = [start for place, start in enumerate(starts) if place % self.team.size == self.team.rank]
        found: dict[int, tuple[dict[str, Tensor], dict[str, str]]] = {}
        for start in mine:
            stop = min(start + shard, len(images))
            known = self.cache.load(key, f"{start}-{stop}")
            if known is not None and "indices" in known[0]:
                found[start] = known
                self._tick(name, target, (stop - start) * self.team.size)
        missing = [start for start in mine if start not in found]
        if missing:
            self._compute(reader.get(), target, name, images, kept, key, shard, missing, found)
        shards: dict[int, tuple[dict[str, Tensor], dict[str, str]]] = {}
        for part in self.team.gather(found):
            shards.update(part)
        return _joined([shards[start] for start in starts])

    def _compute(
        self,
        reader: Reader,
        target: Geometry,
        name: str,
        images: ImageSet,
        kept: frozenset[int],
        key: str,
        shard: int,
        missing: Sequence[int],
        found: dict[int, tuple[dict[str, Tensor], dict[str, str]]],
    ) -> None:
        """Run the model over the missing shards while workers decode ahead; store each as soon as it is whole."""
        assert target.image_size is not None
        owners, batches = [], []
        for start in missing:
            stop = min(start + shard, len(images))
            for first in range(start, stop, self.batch_size):
                owners.append(start)
                batches.append(range(first, min(first + self.batch_size, stop)))
        device = self.team.device
        size = (target.image_size[0], target.image_size[1])
        decoded = decode(images, self.preprocess, size, batches, self.workers, pin=device.type == "cuda")
        parts: list[dict[str, Any]] = []
        for place, batch in enumerate(decoded):
            part: dict[str, Any] = {"indices": batch.indices, "failures": batch.failures}
            if batch.indices:
                pixels = self.preprocess.normalise(batch.pixels.to(device, non_blocking=True)).to(self.dtype)
                features = reader(pixels)
                part["pooled"] = features.pooled.float().cpu()
                if self.head is not None and features.logits is not None:
                    part["logits"] = features.logits.float().cpu()
                wanted = [(row, index) for row, index in enumerate(batch.indices) if index in kept]
                if wanted:
                    rows = torch.tensor([row for row, _ in wanted])
                    part["patches"] = features.patches.cpu()[rows].to(torch.float16)
                    part["patch_indices"] = [index for _, index in wanted]
            parts.append(part)
            self._tick(name, target, len(batches[place]) * self.team.size)
            if place + 1 == len(owners) or owners[place + 1] != owners[place]:
                start = owners[place]
                found[start] = _packed(parts)
                self.cache.store(key, f"{start}-{min(start + shard, len(images))}", *found[start])
                parts = []

    def _tick(self, name: str, target: Geometry, count: int) -> None:
        self.done = min(self.done + count, self.total)
        self.progress(f"patch {short(target.patch_size)}, {name}", self.done, self.total)

    def samples(self, measured: Sequence[_Measured], count: int) -> list[Sample]:
        """Pictures for the report."""
        rows = measured[1:]
        if not self.watched or not rows:
            return []
        patches = [m.sets[self.watched].patches for m in rows]
        common = sorted(set.intersection(*(set(p) for p in patches)))
        if not common or count < 1:
            return []
        places = np.linspace(0, len(common) - 1, min(count, len(common))).round().astype(int)
        chosen = [common[i] for i in places.tolist()]
        colours = shared_colours([[p[i].float() for i in chosen] for p in patches])
        images = self.sets[self.watched]
        size = measured[0].geometry.image_size
        assert size is not None
        found = []
        for place, index in enumerate(chosen):
            view = np.array(self.preprocess.view(images.load(index), (size[0], size[1])))
            found.append(Sample(images.keys[index], view, [line[place] for line in colours]))
        return found


class _Lazy:
    """A reader that is built when it is first needed: not at all if everything is in the cache."""

    def __init__(self, build: Callable[[], Reader]) -> None:
        self._build = build
        self._value: Reader | None = None

    def get(self) -> Reader:
        if self._value is None:
            self._value = self._build()
        return self._value


def _packed(parts: Sequence[dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """One shard as tensors and text."""
    indices = [i for p in parts for i in p["indices"]]
    failures = {str(i): why for p in parts for i, why in p["failures"].items()}
    tensors = {"indices": torch.tensor(indices, dtype=torch.int64)}
    for name in ("pooled", "logits", "patches"):
        found = [p[name] for p in parts if name in p]
        if found:
            tensors[name] = torch.cat(found)
    if "patches" in tensors:
        tensors["patch_indices"] = torch.tensor([i for p in parts for i in p.get("patch_indices", ())])
    return tensors, {"failures": json.dumps(failures)}


def _joined(shards: Sequence[tuple[dict[str, Tensor], dict[str, str]]]) -> _Extracted:
    def together(name: str) -> NDArray[np.float32] | None:
        found = [tensors[name] for tensors, _ in shards if name in tensors]
        return torch.cat(found).numpy() if found else None

    pooled = together("pooled")
    patches: dict[int, Tensor] = {}
    failures: dict[int, str] = {}
    for tensors, text in shards:
        if "patches" in tensors:
            patches.update(zip(tensors["patch_indices"].tolist(), tensors["patches"], strict=True))
        failures.update({int(i): why for i, why in json.loads(text["failures"]).items()})
    return _Extracted(
        np.zeros((0, 1), np.float32) if pooled is None else pooled,
        together("logits"),
        patches,
        torch.cat([tensors["indices"] for tensors, _ in shards]).tolist(),
        failures,
    )


def _row(
    measured: _Measured,
    native: _Measured,
    collections: _Collections,
    head: list[int] | None,
    texts: NDArray | None,
) -> Row:
    image = measured.geometry.image_size
    assert image is not None
    row: Row = {
        "patch_size": _side(measured.geometry.patch_size),
        "image_size": _side(image),
        **measured.cost,
        "fidelity": None,
        "patch_fidelity": None,
        "neighbour_agreement": None,
    }
    if collections.watched:
        ours, reference = (m.sets[collections.watched] for m in (measured, native))
        both = sorted(set(ours.patches) & set(reference.patches))
        pooled, native_pooled = _same_images(ours, reference)
        row["fidelity"] = fidelity(pooled, native_pooled)
        row["patch_fidelity"] = patch_fidelity([ours.patches[i] for i in both], [reference.patches[i] for i in both])
        row["neighbour_agreement"] = neighbour_agreement(pooled, native_pooled)
    if collections.labelled:
        _add_accuracies(row, measured, collections, head, texts)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _same_images(one: _Extracted, two: _Extracted) -> tuple[NDArray, NDArray]:
    """Features of the images that both could read (a disk may fail now and then)."""
    if one.indices == two.indices:
        return one.pooled, two.pooled
    both = set(one.indices) & set(two.indices)
    first, second = (e.pooled[[place for place, i in enumerate(e.indices) if i in both]] for e in (one, two))
    return first, second


def _add_accuracies(
    row: Row,
    measured: _Measured,
    collections: _Collections,
    head: list[int] | None,
    texts: NDArray | None,
) -> None:
    train, test = (measured.sets[name] for name in ("train", "test"))
    train_labels, test_labels = (
        [labels[i] for i in measured.sets[name].indices]
        for name, labels in ((n, collections.sets[n].labels or ()) for n in ("train", "test"))
    )
    found: dict[str, Accuracy] = {
        "knn": knn_accuracy(train.pooled, train_labels, test.pooled, test_labels),
        "probe": probe_accuracy(train.pooled, train_labels, test.pooled, test_labels),
    }
    if head is not None and test.logits is not None:
        found["head"] = logits_accuracy(test.logits[:, head], test_labels)
    if texts is not None:
        found["zero_shot"] = zero_shot_accuracy(test.pooled, texts, test_labels)
    best = next(n for n in ("zero_shot", "head", "probe") if n in found)
    row["accuracy"], row["accuracy_low"], row["accuracy_high"] = found[best]
    row["accuracy_by"] = best
    for name, (value, low, high) in found.items():
        row[f"{name}_accuracy"], row[f"{name}_low"], row[f"{name}_high"] = value, low, high


def _require_packages(accuracy: bool) -> None:
    """Say what is missing before any work."""
    needed = {"PIL": "pillow", **({"sklearn": "scikit-learn"} if accuracy else {})}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise AnypatchError(f"a sweep needs {' and '.join(missing)}: pip install 'anypatch[sweep]'")


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise AnypatchError(f"this needs {module}: pip install 'anypatch[sweep]'") from error


def _open_data(data: Any, images: str | Path | None, limit: int | None) -> _Collections:
    if limit is not None:
        limit = _positive(limit, "limit")
    sets: dict[str, ImageSet] = {}
    notes: list[str] = []
    watched = ""
    if data is not None:
        opened: Data = labelled(data, limit)
        notes += opened.warnings
        if opened.train is None:
            if images is not None:
                raise DataError(f"{opened.test.name} has no labels: give either data or images, not both")
            notes.append(f"{opened.test.name} has no class folders: accuracy is not measured")
            sets, watched = {"images": opened.test}, "images"
        else:
            sets, watched = {"train": opened.train, "test": opened.test}, "test"
    if images is not None:
        opened = unlabelled(images, limit)
        sets["images"], watched = opened.test, "images"
    return _Collections(sets, watched, notes)


def load_model(source: str | Path | nn.Module, arch: str | None, host_kwargs: dict[str, Any]) -> nn.Module:
    if isinstance(source, nn.Module):
        if arch is not None or host_kwargs:
            raise AnypatchError("arch and loader options are for sources, not for a live model")
        return unwrap(source)
    from anypatch.sources import load

    if arch is not None:
        host_kwargs = {**host_kwargs, "arch": arch}
    return unwrap(load(source, **host_kwargs))


def geometries_of(
    model: nn.Module, patch_sizes: Any, image_size: ImageSizeLike | None, keep: Keep, kernel: Any
) -> tuple[Geometry, list[Geometry]]:
    """The native geometry and the asked ones; every size that does not fit is in one message."""
    current = geometry(model)
    if len(current.patch_size) != 2:
        raise UnsupportedModelError(f"a sweep is for images; {type(model).__name__} takes video")
    asked = [patch_sizes] if hasattr(patch_sizes, "__index__") else list(patch_sizes)
    if not asked:
        raise GeometryError("no patch sizes were given")
    if current.image_size is None and image_size in (None, NEAREST):
        raise GeometryError(f"{type(model).__name__} takes any image size: say which with image_size")
    native = current
    if current.image_size is None:
        native = target_geometry(current, None, image_size)
    targets: list[Geometry] = []
    wrong = []
    for size in asked:
        try:
            target = target_geometry(current, size, image_size, keep)
        except GeometryError as error:
            wrong.append(str(error))
            continue
        if target in targets:
            wrong.append(f"patch_size {short(target.patch_size)} is given twice")
        targets.append(target)
    if wrong:
        raise GeometryError("; ".join(wrong))
    for target in targets:
        image = None if current.image_size is None else target.image_size
        make_plan(model, target.patch_size, image, kernel=kernel)
    return native, targets


def _head(model: nn.Module, collections: _Collections, notes: _Notes) -> list[int] | None:
    if not collections.labelled:
        return None
    columns, note = head_columns(model, collections.sets["test"].classes)
    if note:
        notes.add(note)
    return columns


def _texts(model: nn.Module, names: Any, collections: _Collections, source: str | None) -> NDArray | None:
    if names is None:
        return None
    if not collections.labelled:
        raise DataError("class names are for labelled data: give data with classes")
    words = read_class_names(names, collections.sets["test"].classes)
    return text_features(model, words, source)


def _positive(value: int, name: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise AnypatchError(f"{name} must be a positive int, got {value!r}")
    return int(value)


def _workers(asked: int | None, team: Team) -> int:
    if asked is not None:
        if isinstance(asked, bool) or not hasattr(asked, "__index__") or asked < 0:
            raise AnypatchError(f"num_workers must be an int, 0 or more, got {asked!r}")
        return int(asked)
    import os

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, (cores - 1) // team.size))


def _writable(folder: str | Path) -> Path:
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_whole(target / ".anypatch", b"")
        (target / ".anypatch").unlink(missing_ok=True)
    except OSError as error:
        raise AnypatchError(f"cannot write to {folder}: {error.strerror or error}") from error
    return target


def _settings(source: str | nn.Module, native: Geometry, job: _Job, keep: Keep) -> dict[str, Any]:
    device = job.team.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    version = library(native.library).version
    sets = {}
    for part, images in job.sets.items():
        sets[part] = {"name": images.name, "images": len(images), "classes": len(images.classes)}
    return {
        "model": _title(source),
        "library": native.library,
        "native": {"patch_size": _side(native.patch_size), "image_size": _side(native.image_size or ())},
        "keep": keep,
        "kernel": job.kernel if isinstance(job.kernel, str) else type(job.kernel).__name__,
        "data": sets,
        "fidelity_on": job.watched or None,
        "patch_fidelity_images": len(job.kept),
        "neighbours": neighbours(len(job.sets[job.watched])) if job.watched else None,
        "preprocess": job.preprocess.describe(),
        "batch_size": job.batch_size,
        "dtype": str(job.dtype).removeprefix("torch."),
        "device": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "processes": job.team.size,
        "versions": {
            "anypatch": __version__,
            "torch": torch.__version__,
            **({native.library: version} if version else {}),
            "python": platform.python_version(),
        },
    }


def _title(source: str | nn.Module) -> str:
    if isinstance(source, str):
        return source
    inner = unwrap(source)
    cfg = getattr(inner, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(inner).__name__)


def _call(source: str | nn.Module, patch_sizes: Any, **options: Any) -> str:
    """The Python call that gives this result."""
    shown = repr(source) if isinstance(source, str) else "model"
    used = {k: v for k, v in options.items() if v is not None and not (k == "keep" and v == "image")}
    simple = {k: v if isinstance(v, (int, str, tuple, list)) else str(v) for k, v in used.items()}
    more = "".join(f", {k}={v!r}" for k, v in simple.items())
    sizes = patch_sizes if isinstance(patch_sizes, int) else list(patch_sizes)
    return f"anypatch.sweep({shown}, {sizes!r}{more})"


def _side(size: Sequence[int]) -> int | list[int]:
    """One number for a square, else [height, width]."""
    return size[0] if len(set(size)) == 1 else list(size)


def short(size: Sequence[int]) -> str:
    """``16`` for a square, else ``16x32``."""
    return str(_flat(_side(size)))


def _flat(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else value
