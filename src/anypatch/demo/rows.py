"""What the demo measures: one row a model, one view a digit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from anypatch.demo.data import PATCH_SIZE

Series = Literal["grid", "image", "bicubic", "random"]
BATCH, ROUNDS = 64, 3  # images a batch; batches from which the best rate is taken
NAMES: dict[Series, str] = {
    "grid": "anypatch, same grid",
    "image": "anypatch, same image",
    "bicubic": "kernel interpolated",
    "random": "kernel drawn anew",
}


@dataclass(frozen=True)
class Row:
    """One measured model.

    Attributes:
        series: how it was adapted: by anypatch keeping the grid or the image size, or, for comparison, with the
            kernel merely interpolated, or drawn anew as transformers' ``ignore_mismatched_sizes=True`` does.
        patch_size, image_size: pixels.
        accuracy: share of the images labelled correctly.
        same: share of the images labelled as the original model labels them.
        cosine: mean cosine of the pooled features with the original's.
        images_per_second: throughput of this machine; ``None`` where the shapes equal another row's.
    """

    series: Series
    patch_size: int
    image_size: int
    accuracy: float
    same: float
    cosine: float
    images_per_second: float | None

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class View:
    """What one model made of one digit: its input (H, W), its patch features as colours (h, w, 3), its answer."""

    row: Row
    pixels: Tensor
    colours: Tensor
    answer: int
    confidence: float


@dataclass(frozen=True)
class DemoResult:
    """What `run_demo` measured; ``views`` maps a digit to its views, in the order of ``rows``."""

    rows: tuple[Row, ...]
    images: int
    views: dict[int, tuple[View, ...]]

    @property
    def original(self) -> Row:
        return next(row for row in self.rows if row.series == "grid" and row.patch_size == PATCH_SIZE)

    def of(self, series: Series) -> list[Row]:
        """The rows of one series, by patch size; the original belongs to all."""
        rows = [row for row in self.rows if row.series == series]
        return sorted({*rows, self.original}, key=lambda row: row.patch_size)


def groups(result: DemoResult) -> list[tuple[str, list[Row]]]:
    """The rows under their headings: the original's stands with the kept grid only."""
    groups = []
    for series, name in NAMES.items():
        rows = [row for row in result.of(series) if row.series == series]
        if rows:
            groups.append((name, rows))
    return groups


def cells(row: Row) -> tuple[str, ...]:
    rate = "" if row.images_per_second is None else f"{row.images_per_second:,.0f}"
    return (
        str(row.patch_size),
        f"{row.image_size}×{row.image_size}",
        f"{row.grid}×{row.grid}",
        percent(row.accuracy),
        percent(row.same),
        f"{row.cosine:.4f}",
        rate,
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"
