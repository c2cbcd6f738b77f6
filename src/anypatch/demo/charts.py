"""The demo's charts: one line per way of adapting, over the patch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from anypatch.demo.rows import NAMES, DemoResult, Row, Series, percent


def charts(result: DemoResult) -> str:
    every: tuple[Series, ...] = ("grid", "image", "bicubic", "random")
    charts = [
        _chart(result, "Accuracy", "share of digits labelled correctly", every, lambda r: r.accuracy, 1.0),
        _chart(
            result,
            "Agreement with the original",
            "mean cosine of the pooled features",
            every,
            lambda r: r.cosine,
            1.0,
        ),
        _chart(
            result,
            "Speed",
            "images per second on this machine",
            ("grid", "image"),
            lambda r: r.images_per_second or 0.0,
            None,
        ),
    ]
    return "".join(charts)


def _chart(
    result: DemoResult,
    title: str,
    unit: str,
    every: Sequence[Series],
    value: Callable[[Row], float],
    top: float | None,
) -> str:
    """One line per series over the patch size, on a logarithmic axis."""
    width, height, left, right, above, below = 360, 250, 40, 12, 12, 40
    lines = {s: result.of(s) for s in every if any(row.series == s for row in result.rows)}
    values = [value(row) for rows in lines.values() for row in rows]
    step = 0.25 if top is not None else _round_step(max(values) / 4)
    bottom = math.floor(min([*(amount + 0.05 for amount in values), 0.0]) / step) * step
    ceiling = top if top is not None else math.ceil(max(values) / step) * step
    sizes = sorted({row.patch_size for rows in lines.values() for row in rows})
    span = math.log(sizes[-1] / sizes[0]) or 1.0

    def x(patch_size: int) -> float:
        return left + 8 + (width - left - right - 16) * math.log(patch_size / sizes[0]) / span

    def y(amount: float) -> float:
        return above + (height - above - below) * (1 - (amount - bottom) / (ceiling - bottom))

    parts = []
    for i in range(round((ceiling - bottom) / step) + 1):
        amount = bottom + i * step
        label = f"{amount:.0%}" if title == "Accuracy" else f"{amount:g}" if top is not None else _short(amount)
        rule = "base" if i == 0 else "rule"
        parts.append(
            f'<line class="{rule}" x1="{left}" x2="{width - right}" y1="{y(amount):.1f}" y2="{y(amount):.1f}"/>'
            f'<text x="{left - 6}" y="{y(amount) + 4:.1f}" text-anchor="end">{escape(label)}</text>'
        )
    for size in sizes:
        parts.append(f'<text x="{x(size):.1f}" y="{height - 22}" text-anchor="middle">{size}</text>')
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{height - 4}" text-anchor="middle">patch size (pixels)</text>')
    spoken = []
    for series in reversed(lines):
        # A kernel drawn anew has no place on the way through the original.
        rows = [row for row in lines[series] if series != "random" or row.series == series]
        points = " ".join(f"{x(row.patch_size):.1f},{y(value(row)):.1f}" for row in rows)
        parts.append(f'<polyline class="s-{series}" points="{points}"/>')
        for row in rows:
            reading = percent(value(row)) if title == "Accuracy" else f"{value(row):,.4g}"
            note = f"{NAMES[series]}, patch {row.patch_size}: {reading}"
            parts.append(mark(series, x(row.patch_size), y(value(row)), note))
            spoken.append(note)
    label = f"{title}, {unit}. {'; '.join(spoken)}."
    return (
        f"<figure><figcaption>{escape(title)}<span>{escape(unit)}</span></figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg></figure>'
    )


def mark(series: Series, x: float, y: float, note: str = "") -> str:
    """A point; each series has a shape of its own."""
    title = f"<title>{escape(note)}</title>" if note else ""
    shape = {
        "grid": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="mark s-grid">',
        "image": f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" class="mark s-image">',
        "bicubic": f'<path d="M{x:.1f} {y - 5.5:.1f}l5 9h-10z" class="mark s-bicubic">',
        "random": f'<path d="M{x:.1f} {y - 5.5:.1f}l5.5 5.5-5.5 5.5-5.5-5.5z" class="mark s-random">',
    }[series]
    return f"{shape}{title}</{shape[1 : shape.index(' ')]}>"


def _round_step(rough: float) -> float:
    unit = 10.0 ** math.floor(math.log10(rough))
    return next(step * unit for step in (1, 2, 2.5, 5, 10) if step * unit >= rough)


def _short(amount: float) -> str:
    return f"{amount / 1000:g}k" if amount >= 1000 else f"{amount:g}"
