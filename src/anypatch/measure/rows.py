"""Rows of a sweep out of features, and the result that holds them."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from numpy.typing import NDArray

from anypatch.core.geometry import Geometry
from anypatch.errors import AnypatchError
from anypatch.files.paths import place
from anypatch.measure.accuracy import (
    Accuracy,
    fidelity,
    knn_accuracy,
    logits_accuracy,
    neighbour_agreement,
    patch_fidelity,
    probe_accuracy,
    zero_shot_accuracy,
)
from anypatch.measure.cache import write_whole
from anypatch.measure.extraction import Extracted
from anypatch.measure.images import ImageSet
from anypatch.report.measurements import Measurements, Row, Side, format_number, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(repr=False)
class SweepResult(Measurements):
    """What a sweep found: ``rows``, the ``native`` row that fidelity compares with, ``settings`` and ``notes``.

    In a notebook it shows itself as charts and a table.

    Examples:
        >>> row = {"patch_size": 16, "image_size": 224, "tokens": 196, "gflops": 35.0, "images_per_second": 4.0}
        >>> SweepResult([row], row, {"model": "vit"})
        SweepResult(vit, 1 patch size: 16)
    """

    def __repr__(self) -> str:
        count = len(self.rows)
        sizes = ", ".join(show(row["patch_size"]) for row in self.rows[:8]) + (", …" if count > 8 else "")
        parts = [str(self.settings.get("model", "model")), f"{count} patch size{'s' * (count != 1)}: {sizes}"]
        quality = self.quality
        if quality is not None:
            known = [row for row in cast(Any, self.rows) if row.get(quality) is not None]
            best = max(known, key=lambda row: row[quality])
            parts.append(f"best {quality} {format_number(quality, best[quality])} at patch {show(best['patch_size'])}")
        return f"SweepResult({', '.join(parts)})"

    def _repr_html_(self) -> str:
        """Charts and a table, in a notebook."""
        from anypatch.report.page import notebook_html

        return notebook_html(self)

    def to_pandas(self) -> DataFrame:
        """The rows as a table; sizes of two sides as text."""
        pandas = _optional("pandas")
        return pandas.DataFrame([{k: flat(v) for k, v in row.items()} for row in self.rows])

    def plot(self) -> Figure:
        """The trade-off curves as a matplotlib figure."""
        _optional("matplotlib")
        from anypatch.report.figure import figure

        return figure(self)

    def save_figure(self, path: str | Path) -> Path:
        """Write the trade-off curves as a picture; the file's ending chooses the format, such as .svg, .png or .pdf.

        Raises:
            AnypatchError: no such format.
            CheckpointError: it cannot be written.
        """
        target = figure_target(path)
        kind = target.suffix.lower()[1:]
        picture = io.BytesIO()
        self.plot().savefig(picture, format=kind, metadata={"Date": None} if kind == "svg" else None)
        write_whole(target, picture.getvalue())
        return target

    def to_html(self, path: str | Path) -> Path:
        """Write the report: one file that opens without a network.

        Raises:
            CheckpointError: it cannot be written.
        """
        from anypatch.report.page import html

        target = place(path)
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
        writer.writerows({k: "" if v is None else flat(v) for k, v in row.items()} for row in self.rows)
        return text.getvalue()

    def save(self, folder: str | Path) -> Path:
        """Write ``sweep.json``, ``sweep.csv`` and ``report.html`` into a folder, which is made if it is not there.

        Raises:
            CheckpointError: they cannot be written.
        """
        target = place(folder)
        write_whole(target / "sweep.json", (json.dumps(self.to_dict(), indent=2) + "\n").encode())
        write_whole(target / "sweep.csv", self.to_csv().encode())
        self.to_html(target / "report.html")
        return target


@dataclass
class Collections:
    """The image sets of a sweep: ``train`` and ``test`` with labels, ``images`` without.

    Attributes:
        watched: the set that fidelity is measured on; empty without images.
        notes: what the user should know.
    """

    sets: dict[str, ImageSet]
    watched: str
    notes: list[str]

    @property
    def labelled(self) -> bool:
        return "train" in self.sets


@dataclass
class Measured:
    """Everything measured at one geometry."""

    geometry: Geometry
    cost: dict[str, Any]
    sets: dict[str, Extracted]


def row_of(
    measured: Measured,
    reference: Measured,
    collections: Collections,
    head: list[int] | None = None,
    texts: NDArray | None = None,
) -> Row:
    """One row.

    Args:
        measured, reference: features here, and those that fidelity compares with.
        collections: the images.
        head: the model's outputs that are the data's classes.
        texts: one vector per class from a text tower.
    """
    row: dict[str, Any] = {
        "patch_size": side(measured.geometry.patch_size),
        "image_size": side(measured.geometry.image_size or ()),
        **measured.cost,
        "fidelity": None,
        "patch_fidelity": None,
        "neighbour_agreement": None,
    }
    if collections.watched:
        row |= _kept(*(m.sets[collections.watched] for m in (measured, reference)))
    if collections.labelled:
        row |= _accuracies(measured, collections, head, texts)
    return cast(Row, {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})


def _kept(ours: Extracted, reference: Extracted) -> dict[str, float]:
    """How much of the reference's behaviour is kept."""
    both = sorted(set(ours.patches) & set(reference.patches))
    pooled, reference_pooled = _same_images(ours, reference)
    return {
        "fidelity": fidelity(pooled, reference_pooled),
        "patch_fidelity": patch_fidelity([ours.patches[i] for i in both], [reference.patches[i] for i in both]),
        "neighbour_agreement": neighbour_agreement(pooled, reference_pooled),
    }


def _same_images(one: Extracted, two: Extracted) -> tuple[NDArray, NDArray]:
    """Features of the images that both could read (a disk may fail now and then)."""
    if one.indices == two.indices:
        return one.pooled, two.pooled
    both = set(one.indices) & set(two.indices)
    first, second = (e.pooled[[place for place, i in enumerate(e.indices) if i in both]] for e in (one, two))
    return first, second


def _accuracies(
    measured: Measured, collections: Collections, head: list[int] | None, texts: NDArray | None
) -> dict[str, Any]:
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
    best = next(n for n in ("zero_shot", "head", "probe") if n in found)  # the model's own answer before a trained one
    row: dict[str, Any] = dict(zip(("accuracy", "accuracy_low", "accuracy_high"), found[best], strict=True))
    row["accuracy_by"] = best
    for name, (value, low, high) in found.items():
        row |= {f"{name}_accuracy": value, f"{name}_low": low, f"{name}_high": high}
    return row


def side(size: tuple[int, ...]) -> Side:
    """One number for a square, else [height, width]."""
    return size[0] if len(set(size)) == 1 else list(size)


def flat(value: Any) -> Any:
    """A pair of sides as text."""
    return show(value) if isinstance(value, (list, tuple)) else value


def figure_target(path: str | Path) -> Path:
    """The path, if matplotlib writes pictures with its ending.

    Raises:
        AnypatchError: it does not, or matplotlib is not installed.
    """
    _optional("matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    target, known = place(path), FigureCanvasBase.get_supported_filetypes()
    if target.suffix.lower()[1:] not in known:
        raise AnypatchError(f"{target.name}: the ending has to be a picture's, such as .svg, .png or .pdf")
    return target


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise AnypatchError(f"this needs {module}: pip install 'anypatch[sweep]'") from error
