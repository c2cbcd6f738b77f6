"""Hugging Face datasets: by name, from a directory, or an object."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anypatch.errors import DataError, listed
from anypatch.measure.images import TEST, TRAIN, Data, ImageSet, split
from anypatch.measure.pixels import as_rgb

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class _Rows:
    """Decodes images of a Hugging Face dataset."""

    dataset: Any
    column: str

    def __call__(self, index: int) -> Image:
        return as_rgb(self.dataset[int(index)][self.column])


def from_disk(path: Path) -> Any:
    datasets = _datasets()
    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read as a Hugging Face dataset: {error}") from error


def by_name(name: str) -> Any:
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


def hugging_face(dataset: Any, name: str) -> Data:
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
    return Data(everything) if everything.labels is None else split(everything, [])


def _rows(dataset: Any, name: str) -> ImageSet:
    datasets = _datasets()
    features = dataset.features
    columns = [n for n, f in features.items() if isinstance(f, datasets.Image)]
    if not columns:
        raise DataError(f"{name}: no column of images among {listed(list(features))}")
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
