"""The one chart: a trade-off curve as SVG. Places are computed here, the drawing is ``templates/chart.svg``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from anypatch.report.templating import render


@dataclass(frozen=True)
class Point:
    """A point of a curve; ``low`` and ``high`` bound its interval, ``index`` ties it to the slider."""

    x: float
    y: float
    label: str
    title: str
    low: float | None = None
    high: float | None = None
    front: bool = False
    native: bool = False
    index: int | None = None


# Pixels of the drawing, which a page scales: two charts side by side on a desk, one on a phone, text of 12 pixels.
WIDTH, HEIGHT = 380, 300
LEFT, RIGHT, TOP, BOTTOM = 50, 18, 22, 46  # room for the names and ticks of the axes
LETTER = 7  # width of a digit of that text, about
# Where a label goes, the first that is free: beside the point, as an interval's bar runs above and below it.
PLACES = ((11, 4, "start"), (-11, 4, "end"), (0, -12, "middle"), (0, 22, "middle"))


@dataclass(frozen=True)
class _Scale:
    """From values to places: x logarithmic, and to the left where ``backwards``; y linear."""

    x: tuple[float, float]
    y: tuple[float, float]
    backwards: bool

    def across(self, value: float) -> float:
        share = math.log(value / self.x[0]) / math.log(self.x[1] / self.x[0])
        return LEFT + (1 - share if self.backwards else share) * (WIDTH - LEFT - RIGHT)

    def up(self, value: float) -> float:
        share = (value - self.y[0]) / (self.y[1] - self.y[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def curve(points: Sequence[Point], x_name: str, y_name: str, summary: str, backwards: bool = False) -> Markup:
    """A trade-off curve, x logarithmic, the front drawn as a line.

    Args:
        points: at least one.
        x_name, y_name: what the axes are.
        summary: what the picture says, for those who cannot see it.
        backwards: x grows to the left, so that cheaper is left on every curve.
    """
    ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    y_ticks = _linear_ticks(min(ys), max(ys))
    x_low, x_high = _widened([p.x for p in points])
    scale = _Scale((x_low, x_high), (y_ticks[0], y_ticks[-1]), backwards)
    front = sorted((p for p in points if p.front), key=lambda p: p.x)
    taken = [(scale.across(p.x), scale.up(p.y) + 4, 2.0 * LETTER) for p in points]
    return render(
        "chart.svg",
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        foot=HEIGHT - BOTTOM,
        summary=summary,
        x_name=f"← {x_name}" if backwards else f"{x_name} →",
        y_name=y_name,
        x_ticks=[(f"{tick:g}", scale.across(tick)) for tick in log_ticks(x_low, x_high)],
        y_ticks=[(f"{tick:.3g}", scale.up(tick)) for tick in y_ticks],
        front=[(scale.across(p.x), scale.up(p.y)) for p in front] if len(front) > 1 else [],
        points=[_placed(p, scale, taken) for p in sorted(points, key=lambda p: (p.native, p.x))],
    )


def _placed(point: Point, scale: _Scale, taken: list[tuple[float, float, float]]) -> dict[str, Any]:
    """A point with the places of its dot, its interval and its label, which becomes one of those ``taken``."""
    x, y = scale.across(point.x), scale.up(point.y)
    wide = 8 + LETTER * len(point.label)
    centres = {"start": wide / 2, "end": -wide / 2, "middle": 0}
    free = [
        p
        for p in PLACES
        if all(abs(x + p[0] + centres[p[2]] - a) > (wide + w) / 2 or abs(y + p[1] - b) > 13 for a, b, w in taken)
    ]
    dx, dy, anchor = (free or PLACES)[0]
    taken.append((x + dx + centres[anchor], y + dy, wide))
    bounds = None if point.low is None or point.high is None else (scale.up(point.high), scale.up(point.low))
    kind = " ".join(n for n, on in (("point", True), ("best", point.front), ("native", point.native)) if on)
    label = {"x": x + dx, "y": y + dy, "anchor": anchor, "text": point.label}
    return {"point": point, "kind": kind, "x": x, "y": y, "bounds": bounds, "label": label}


def _widened(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = max((high / low) ** 0.08, 1.15)
    return low / room, high * room


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two bounds of a logarithmic axis, at most six of them and two where there are any.

    >>> log_ticks(3.0, 400.0), log_ticks(10.1, 13.9)
    ([5.0, 10.0, 20.0, 50.0, 100.0, 200.0], [11.0, 12.0, 13.0])
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(found) <= 6:
            break
    found = found[:: math.ceil(len(found) / 6)] if found else []
    # a narrow range, of two sizes or of close ones, may hold one power's number or none
    return found if len(found) > 1 else [tick for tick in _linear_ticks(low, high) if low <= tick <= high]


def _linear_ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose the values."""
    span = max(high - low, abs(high) * 1e-3, 1e-6)
    rough = span / 4
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * s for s in (1, 2, 2.5, 5, 10) if unit * s >= rough)
    first = math.floor(round(low / step, 6))
    last = max(math.ceil(round(high / step, 6)), first + 1)
    return [i * step for i in range(first, last + 1)]
