"""Typed rows: what was measured at each patch size, and how each number is called and written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

Side = int | list[int]  # pixels: one number for a square, else [height, width]


class Row(TypedDict, total=False):
    """What was measured at one patch size; a column that could not be measured is missing or ``None``."""

    patch_size: Side
    image_size: Side
    tokens: int
    gflops: float
    images_per_second: float
    images_per_second_low: float
    images_per_second_high: float
    peak_memory_mb: float
    fidelity: float | None
    patch_fidelity: float | None
    neighbour_agreement: float | None
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    accuracy_by: str
    head_accuracy: float
    head_low: float
    head_high: float
    zero_shot_accuracy: float
    zero_shot_low: float
    zero_shot_high: float
    knn_accuracy: float
    knn_low: float
    knn_high: float
    probe_accuracy: float
    probe_low: float
    probe_high: float


AnyRow = Mapping[str, Any]  # a row whose columns are asked for by name

TIMING = ("images_per_second", "images_per_second_low", "images_per_second_high")  # differ from run to run


class Column(NamedTuple):
    """How a column is called in tables, and what it means."""

    head: str
    meaning: str


COLUMNS = {
    "patch_size": Column("patch", "Patch size in pixels."),
    "image_size": Column("image", "Image size in pixels."),
    "tokens": Column(
        "tokens", "Patches of an image: the grid's height times its width. Prefix tokens are not counted."
    ),
    "gflops": Column("GFLOPs", "Floating-point operations of one image's forward pass; a multiply-add is two."),
    "images_per_second": Column(
        "images/s",
        "Throughput of the bare forward pass in this run: median of repeated batches, the patch sizes taking turns; "
        "below it the middle half of them.",
    ),
    "peak_memory_mb": Column(
        "memory, MB",
        "Tensors alive at the worst moment of a batch's forward pass, weights included.",
    ),
    "fidelity": Column("fidelity", "Mean cosine between an image's pooled feature and the reference's."),
    "patch_fidelity": Column(
        "patch fidelity",
        "Mean cosine between patch features and the reference's, both averaged onto the coarser grid.",
    ),
    "neighbour_agreement": Column(
        "neighbours",
        "Share of each image's nearest images (how many is said below) that are also nearest for the reference.",
    ),
    "accuracy": Column("accuracy", "With its 95 % interval (Wilson)."),
    "head_accuracy": Column("own head", "Accuracy of the model's own classifier, among the data's classes."),
    "zero_shot_accuracy": Column("zero-shot", "Accuracy of the nearest class text."),
    "knn_accuracy": Column("k-NN", "Accuracy of the 20 nearest training images, by cosine."),
    "probe_accuracy": Column("linear probe", "Accuracy of a logistic regression on standardised features."),
}
QUALITIES = {"accuracy": "accuracy", "fidelity": "fidelity (cosine to the reference)"}  # the first that is there
COSTS = {"gflops": "GFLOPs per image", "images_per_second": "images per second"}
METHODS = {
    "zero_shot": "zero-shot classification with the text tower",
    "head": "the model's own classifier",
    "probe": "a linear probe",
    "knn": "nearest neighbours",
}


@dataclass
class Sample:
    """One image of the report, and its patch features as colours at every patch size.

    Attributes:
        name: the image's name.
        image: the image as the model sees it, bytes (h, w, 3) or, for a grey model, (h, w).
        maps: per row, colours (grid height, grid width, 3).
        views: per row, the image as the model sees it there, where the image size changes from row to row.
    """

    name: str
    image: NDArray[np.uint8]
    maps: list[NDArray[np.uint8]]
    views: list[NDArray[np.uint8]] = field(default_factory=list)

    def seen(self, index: int) -> NDArray[np.uint8]:
        """The image as the model sees it in a row."""
        return self.views[index] if self.views else self.image


@dataclass(repr=False)
class Measurements:
    """What was measured at several patch sizes.

    Attributes:
        rows: one per patch size, in the order asked for.
        native: the same columns for the reference, which fidelity compares with: the native patch at the asked image
            size, or the model as it is.
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
        return next((n for n in QUALITIES if any(r.get(n) is not None for r in self.rows)), None)

    def pareto(self, cost: str = "gflops") -> list[bool]:
        """For each row, whether no other row is better in both quality and ``cost``."""
        quality = self.quality
        rows: Sequence[AnyRow] = self.rows
        if quality is None:
            return [False] * len(rows)
        sign = -1.0 if cost == "images_per_second" else 1.0
        gains = [r.get(quality) for r in rows]
        return pareto([sign * r[cost] for r in rows], [-math.inf if g is None else g for g in gains])

    def is_native(self, row: AnyRow) -> bool:
        """Whether a row is at the reference's own geometry."""
        native: AnyRow = self.native
        return all(row[side] == native[side] for side in ("patch_size", "image_size"))

    @property
    def reference(self) -> str:
        """What fidelity is measured against, in words."""
        own = self.settings.get("native") or {}
        image = own.get("image_size")
        if not image or image == self.native.get("image_size"):
            return "the native model"
        return f"the native patch at image size {show(self.native['image_size'])}"


def pareto(cost: Sequence[float], gain: Sequence[float]) -> list[bool]:
    """Which points no other point beats: none has as little cost with more gain, or less cost with as much."""
    points = list(zip(cost, gain, strict=True))
    return [
        not any((c <= cost_ and g >= gain_) and (c < cost_ or g > gain_) for c, g in points) for cost_, gain_ in points
    ]


def columns_of(rows: Sequence[AnyRow]) -> list[str]:
    """The columns to show: those with a number in some row; one that repeats ``accuracy`` is left out."""
    repeated = {f"{row.get('accuracy_by')}_accuracy" for row in rows}
    found = [n for n in COLUMNS if any(row.get(n) is not None for row in rows)]
    return [n for n in found if n not in repeated]


def interval(row: AnyRow, name: str) -> str:
    """The bounds of a number, as ``low–high``; empty where there are none."""
    stem = name.removesuffix("_accuracy")
    low, high = row.get(f"{stem}_low"), row.get(f"{stem}_high")
    if low is None or high is None:
        return ""
    return f"{low:.3f}–{high:.3f}" if "accuracy" in name else f"{format_number(name, low)}–{format_number(name, high)}"


def show(value: Any) -> str:
    """A side or a pair of them: ``16`` or ``16x32``."""
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def format_number(name: str, value: Any) -> str:
    """A column's value as people read it."""
    if name in ("patch_size", "image_size"):
        return show(value)
    if name == "tokens":
        return str(value)
    if name in (*TIMING, "gflops", "peak_memory_mb"):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    # Three digits; five where three would hide that something is not quite perfect.
    return f"{value:.3f}" if value < 0.9995 or value > 0.999995 else f"{value:.5f}"
