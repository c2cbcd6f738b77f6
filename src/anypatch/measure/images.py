"""Images to measure on: an ImageFolder, a Hugging Face dataset, or a folder without labels."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from anypatch.errors import DataError
from anypatch.measure.preprocess import Preprocess

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset(
    f".{kind}"
    for kind in ("jpg", "jpeg", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jp2", "ppm", "pgm", "pbm")
)
TRAIN = ("train", "training")
TEST = ("val", "validation", "valid", "test", "testing")
HELD_OUT = 0.2  # share of each class that is tested on, where the data comes without a split


@dataclass(frozen=True)
class ImageSet:
    """Some images, in a fixed order.

    Attributes:
        name: what the user called it.
        keys: one name per image, shown to people.
        load: ``load(i)`` decodes image ``i``.
        stamps: one string per image that changes when its content may have changed.
        labels: one class number per image, or ``None``.
        classes: the names of the classes.
        probe: ``probe(i)`` raises if image ``i`` cannot even be opened; cheap.
    """

    name: str
    keys: tuple[str, ...]
    load: Callable[[int], Image]
    stamps: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()
    probe: Callable[[int], None] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """The images at ``indices``, in that order."""
        chosen = tuple(int(i) for i in indices)
        return replace(
            self,
            keys=tuple(self.keys[i] for i in chosen),
            stamps=tuple(self.stamps[i] for i in chosen),
            labels=None if self.labels is None else tuple(self.labels[i] for i in chosen),
            load=_Indirect(self.load, chosen),
            probe=None if self.probe is None else _Indirect(self.probe, chosen),
        )

    def limited(self, limit: int | None) -> ImageSet:
        """At most ``limit`` images: as evenly over the classes as they allow, or evenly spaced without labels."""
        if limit is None or limit >= len(self):
            return self
        if self.labels is None:
            return self.subset(np.linspace(0, len(self) - 1, limit).round().astype(int).tolist())
        order = np.random.default_rng(0).permutation(len(self))
        seen: Counter[int] = Counter()
        ranked = []
        for place, index in enumerate(order):
            label = self.labels[index]
            ranked.append((seen[label], place, int(index)))
            seen[label] += 1
        return self.subset(sorted(index for _, _, index in sorted(ranked)[:limit]))

    def fingerprint(self) -> str:
        """Changes when an image is added, removed, reordered or edited; not when a folder is moved."""
        digest = hashlib.sha256()
        for key, stamp in zip(self.keys, self.stamps, strict=True):
            digest.update(f"{key}\0{stamp}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Data:
    """What a sweep measures on.

    Attributes:
        test: the images that fidelity and accuracy are measured on.
        train: labelled images that k-NN and the linear probe learn from, or ``None``.
        warnings: what the user should know.
    """

    test: ImageSet
    train: ImageSet | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.test.classes


@dataclass(frozen=True)
class _Indirect:
    """``call(i)`` is ``inner(indices[i])``; a class, so that data workers can pickle it."""

    inner: Callable[[int], Any]
    indices: tuple[int, ...]

    def __call__(self, index: int) -> Any:
        return self.inner(self.indices[index])


@dataclass(frozen=True)
class _Files:
    """Decodes image files."""

    paths: tuple[Path, ...]

    def __call__(self, index: int) -> Image:
        from PIL import Image as Pillow

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF and the like; what matters is whether it decodes
            with Pillow.open(self.paths[index]) as image:
                return image.convert("RGB")


@dataclass(frozen=True)
class _Headers:
    """Opens image files without decoding them."""

    paths: tuple[Path, ...]

    def __call__(self, index: int) -> None:
        from PIL import Image as Pillow

        with Pillow.open(self.paths[index]):
            pass


@dataclass(frozen=True)
class _Rows:
    """Decodes images of a Hugging Face dataset."""

    dataset: Any
    column: str

    def __call__(self, index: int) -> Image:
        return self.dataset[int(index)][self.column].convert("RGB")


def labelled(source: Any, limit: int | None = None) -> Data:
    """Open ``--data``: an ImageFolder, a Hugging Face dataset (name, directory or object), or plain images.

    Raises:
        DataError: nothing there, no images, one class only, or splits whose classes differ.
    """
    data = _open(source)
    if data.train is not None:
        _require_classes(data)
        data = replace(data, train=data.train.limited(limit))
    return replace(data, test=data.test.limited(limit))


def unlabelled(folder: str | Path, limit: int | None = None) -> Data:
    """Open ``--images``: every image under a folder, labels ignored.

    Raises:
        DataError: no such folder, or no images in it.
    """
    root = _existing(folder)
    return Data(_files(str(folder), root, _images_under(root)).limited(limit))


def _open(source: Any) -> Data:
    if not isinstance(source, (str, Path)):
        return _hugging_face(source, str(getattr(source, "builder_name", None) or "dataset"))
    path = Path(source)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _hugging_face(_load_from_disk(path), str(source))
        return _folder(str(source), path)
    if path.exists():
        raise DataError(f"data must be a folder or a Hugging Face dataset's name; {source} is a file")
    if re.fullmatch(r"(hf:)?[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", str(source)):
        return _hugging_face(_load_by_name(str(source)), str(source))
    raise DataError(f"{source}: no such folder")


def _existing(folder: str | Path) -> Path:
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{folder}: {'not a folder' if root.exists() else 'no such folder'}")
    return root


def _images_under(root: Path) -> list[Path]:
    """Every image file under a folder, hidden ones left out, in one order on every machine."""
    found = (p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts))


def _files(
    name: str,
    root: Path,
    paths: Sequence[Path],
    labels: Sequence[int] | None = None,
    classes: Sequence[str] = (),
) -> ImageSet:
    if not paths:
        raise DataError(f"{name}: no images in it (looked for {', '.join(sorted(SUFFIXES)[:6])}, ... at any depth)")
    stats = [p.stat() for p in paths]
    return ImageSet(
        name,
        tuple(p.relative_to(root).as_posix() for p in paths),
        _Files(tuple(paths)),
        tuple(f"{s.st_size}:{s.st_mtime_ns}" for s in stats),
        None if labels is None else tuple(labels),
        tuple(classes),
        _Headers(tuple(paths)),
    )


def _folder(name: str, root: Path) -> Data:
    train = next((root / n for n in TRAIN if (root / n).is_dir()), None)
    test = next((root / n for n in TEST if (root / n).is_dir()), None)
    if train and test:
        return _split_folder(name, root, train, test)
    images = _images_under(root)
    relative = [p.relative_to(root).parts for p in images]
    if not images or any(len(parts) == 1 for parts in relative):
        return Data(_files(name, root, images))
    classes = sorted({parts[0] for parts in relative})
    numbers = {c: i for i, c in enumerate(classes)}
    everything = _files(name, root, images, [numbers[parts[0]] for parts in relative], classes)
    empty = _without_images(root, classes)
    return _split(everything, empty)


def _split_folder(name: str, root: Path, train: Path, test: Path) -> Data:
    sets = []
    for part in (train, test):
        images = _images_under(part)
        if not images:
            raise DataError(f"{name}: no images in {part.name}/")
        loose = [p for p in images if len(p.relative_to(part).parts) == 1]
        if loose:
            raise DataError(
                f"{name}: {loose[0].relative_to(root)} is in no class folder (expected {part.name}/CLASS/IMAGE); "
                "for images without labels use images="
            )
        sets.append((part, images, [p.relative_to(part).parts[0] for p in images]))
    classes = sorted(set(sets[0][2]))
    unknown = sorted(set(sets[1][2]) - set(classes))
    if unknown:
        raise DataError(f"{name}: {test.name}/ has classes that {train.name}/ has not: {_listed(unknown)}")
    numbers = {c: i for i, c in enumerate(classes)}
    learned, tested = (_files(name, root, images, [numbers[c] for c in owners], classes) for _, images, owners in sets)
    notes = _without_images(train, classes)
    missing = sorted(set(classes) - set(sets[1][2]))
    if missing:
        notes.append(f"{name}: {test.name}/ has no images of {_listed(missing)}")
    return Data(tested, learned, notes)


def _without_images(root: Path, classes: Sequence[str]) -> list[str]:
    folders = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    empty = sorted(folders - set(classes))
    return [f"{root.name}: class folders without images, left out: {_listed(empty)}"] if empty else []


def _split(everything: ImageSet, notes: list[str]) -> Data:
    """Hold out a fixed fifth of every class."""
    assert everything.labels is not None
    labels = np.array(everything.labels)
    generator = np.random.default_rng(0)
    held: list[int] = []
    single = []
    for label in range(len(everything.classes)):
        members = generator.permutation(np.flatnonzero(labels == label))
        if len(members) == 1:
            single.append(everything.classes[label])
        held += members[: max(round(len(members) * HELD_OUT), 1) if len(members) > 1 else 0].tolist()
    rest = sorted(set(range(len(everything))) - set(held))
    if single:
        notes = [*notes, f"{everything.name}: only one image, so not tested on: {_listed(single)}"]
    if not held:
        raise DataError(f"{everything.name}: every class has one image only, so there is nothing to test on")
    notes = [*notes, f"{everything.name} comes without a split: a fixed fifth of every class is tested on"]
    return Data(everything.subset(sorted(held)), everything.subset(rest), notes)


def _load_from_disk(path: Path) -> Any:
    datasets = _datasets()
    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read as a Hugging Face dataset: {error}") from error


def _load_by_name(name: str) -> Any:
    plain = name.removeprefix("hf:")
    datasets = _datasets(f"{name}: no such folder; as a Hugging Face dataset's name it")
    dataset, _, config = plain.partition(":")
    try:
        return datasets.load_dataset(dataset, config or None)
    except Exception as error:  # whatever the hub's client raises: it has many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name}: no such folder, and no such Hugging Face dataset ({reason})") from error


def _datasets(what: str = "a Hugging Face dataset") -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{what} needs the package datasets: pip install datasets") from error
    return datasets


def _hugging_face(dataset: Any, name: str) -> Data:
    if not hasattr(dataset, "features") and hasattr(dataset, "keys"):  # DatasetDict
        train = next((dataset[n] for n in TRAIN if n in dataset), None)
        test = next((dataset[n] for n in TEST if n in dataset), None)
        if train is not None and test is not None:
            learned, tested = _rows(train, name), _rows(test, name)
            if tested.labels is None:
                return Data(tested)
            if learned.classes != tested.classes:
                raise DataError(f"{name}: its splits have different classes")
            return Data(tested, learned)
        dataset = train if train is not None else test if test is not None else next(iter(dataset.values()))
    if not hasattr(dataset, "column_names") or not hasattr(dataset, "__len__"):
        raise DataError(f"data must be a folder, a Hugging Face dataset or its name; got {type(dataset).__name__}")
    everything = _rows(dataset, name)
    return Data(everything) if everything.labels is None else _split(everything, [])


def _rows(dataset: Any, name: str) -> ImageSet:
    datasets = _datasets()
    features = dataset.features
    columns = [n for n, f in features.items() if isinstance(f, datasets.Image)]
    if not columns:
        raise DataError(f"{name}: no column of images among {_listed(list(features))}")
    if len(dataset) == 0:
        raise DataError(f"{name}: no images in it")
    column = next((n for n in ("image", "img") if n in columns), columns[0])
    usual = ("label", "labels", "fine_label", "class", "target")
    by_class = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)]
    target = next((n for n in usual if n in by_class), by_class[0] if by_class else None)
    target = target or next((n for n in usual if n in features), None)
    labels: list[int] | None = None
    classes: list[str] = []
    if target is not None:
        values = list(dataset[target])
        if isinstance(features[target], datasets.ClassLabel):
            classes, labels = list(features[target].names), [int(v) for v in values]
        else:
            classes = [str(v) for v in sorted(set(values))]
            numbers = {v: i for i, v in enumerate(classes)}
            labels = [numbers[str(v)] for v in values]
        if labels is not None and min(labels) < 0:  # how datasets mark a hidden test set
            labels, classes = None, []
    stamp = str(getattr(dataset, "_fingerprint", ""))
    return ImageSet(
        name,
        tuple(f"row {i}" for i in range(len(dataset))),
        _Rows(dataset, column),
        (stamp,) * len(dataset),
        None if labels is None else tuple(labels),
        tuple(classes),
    )


def _require_classes(data: Data) -> None:
    assert data.train is not None
    assert data.train.labels is not None
    present = sorted(set(data.train.labels))
    if len(present) < 2:
        only = data.train.classes[present[0]] if present else "none"
        raise DataError(
            f"{data.train.name}: one class only ({only}); accuracy needs at least two. For fidelity alone, give "
            "the folder as images instead of data"
        )


def read_class_names(names: str | Path | Sequence[str] | dict[str, str], classes: Sequence[str]) -> list[str]:
    """Names of the classes in words, in the order of ``classes``.

    Args:
        names: a file (one name a line, or JSON: a list, or an object from class to name), the names themselves, or
            one string with commas.
        classes: the classes as the data calls them.

    Raises:
        DataError: another number of names than classes, or names for classes that are not there.
    """
    value: Any = names
    origin = "class names"
    if isinstance(names, Path) or (isinstance(names, str) and Path(names).is_file()):
        origin = str(names)
        try:
            text = Path(names).read_text(encoding="utf-8")
            value = json.loads(text) if text.lstrip()[:1] in ("[", "{") else text.splitlines()
        except (OSError, ValueError) as error:
            raise DataError(f"{names} cannot be read: {error}") from error
    elif isinstance(names, str):
        if "," not in names:
            raise DataError(f"class names: no such file: {names} (or give the names with commas)")
        value = names.split(",")
    if isinstance(value, dict):
        missing = [c for c in classes if c not in value]
        if missing:
            raise DataError(f"{origin}: no name for class {_listed(missing)}")
        return [str(value[c]) for c in classes]
    found = [str(n).strip() for n in value if str(n).strip()]
    if len(found) != len(classes):
        raise DataError(
            f"{origin}: {len(found)} names for {len(classes)} classes; they have to stand in the order of the "
            f"classes: {_listed(classes)}"
        )
    return found


def _listed(names: Sequence[Any], most: int = 8) -> str:
    shown = ", ".join(str(n) for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def unreadable(images: ImageSet, threads: int = 8) -> dict[int, str]:
    """Images whose file cannot even be opened, with the reason; decodes nothing."""
    if images.probe is None:
        return {}
    probe = images.probe

    def attempt(index: int) -> str:
        try:
            probe(index)
        except Exception as error:
            return reason(error)
        return ""

    # The warnings' state is one for all threads: it is saved and restored here, not in them.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")
        found = list(pool.map(attempt, range(len(images)), chunksize=64))
    return {i: r for i, r in enumerate(found) if r}


def reason(error: BaseException) -> str:
    """One short line, without the machine's paths."""
    text = re.sub(r"'?(/[^\s']+/)", "", (str(error).strip().splitlines() or [""])[0]).replace("'", "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True)
class Batch:
    """Pixels as bytes (n, c, h, w), the images' numbers, and why the unreadable ones are not among them."""

    pixels: Tensor
    indices: list[int]
    failures: dict[int, str]


class _Decoding(torch.utils.data.Dataset):
    """Item ``i`` is batch ``i``, decoded and cut as the model sees it."""

    def __init__(
        self, images: ImageSet, preprocess: Preprocess, size: tuple[int, int], batches: Sequence[Sequence[int]]
    ) -> None:
        self.images, self.preprocess, self.size, self.batches = images, preprocess, size, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, place: int) -> Batch:
        found, indices, failures = [], [], {}
        for index in self.batches[place]:
            try:
                view = self.preprocess.view(self.images.load(index), self.size)
                found.append(torch.from_numpy(np.array(view)).view(*self.size, -1).permute(2, 0, 1))
                indices.append(index)
            except Exception as error:  # any decoder's error means the same: this image is left out
                failures[index] = reason(error)
        pixels = (
            torch.stack(found) if found else torch.zeros(0, self.preprocess.channels, *self.size, dtype=torch.uint8)
        )
        return Batch(pixels.contiguous(), indices, failures)


def _one(batch: list[Batch]) -> Batch:
    return batch[0]


def _quiet(_worker: int) -> None:
    torch.set_num_threads(1)


def decode(
    images: ImageSet,
    preprocess: Preprocess,
    size: tuple[int, int],
    batches: Sequence[Sequence[int]],
    workers: int,
    pin: bool = False,
) -> Iterator[Batch]:
    """Decode batches of images, ahead of whoever consumes them."""
    loader = torch.utils.data.DataLoader(
        _Decoding(images, preprocess, size, batches),
        batch_size=1,
        collate_fn=_one,
        num_workers=min(workers, len(batches)),
        prefetch_factor=2 if workers and batches else None,
        worker_init_fn=_quiet,
    )
    for batch in loader:
        yield replace(batch, pixels=batch.pixels.pin_memory()) if pin else batch
