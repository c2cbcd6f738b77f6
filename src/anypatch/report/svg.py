"""Pieces of a self-contained page: pictures as data, curves as SVG, text escaped."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def text(value: object) -> str:
    """Escaped for element content and attribute values."""
    return html.escape(str(value), quote=True)


def picture_data(pixels: NDArray[np.uint8], largest: int | None = None, photo: bool = False) -> str:
    """A picture as a data URI: PNG, or JPEG for photographs, at most ``largest`` pixels wide or high."""
    from PIL import Image as Pillow

    image = Pillow.fromarray(pixels).convert("RGB")
    if largest is not None:
        image.thumbnail((largest, largest), Pillow.Resampling.LANCZOS)
    buffer = io.BytesIO()
    kind = "jpeg" if photo else "png"
    image.save(buffer, kind, **({"quality": 84} if photo else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


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


WIDTH, HEIGHT = 380, 300
LEFT, RIGHT, TOP, BOTTOM = 50, 18, 22, 46


def curve(points: Sequence[Point], x_name: str, y_name: str, summary: str, backwards: bool = False) -> str:
    """A trade-off curve as SVG, x logarithmic, the front drawn as a line.

    Args:
        summary: what the picture says, for those who cannot see it.
        backwards: x grows to the left, so that cheaper is left on every curve.
    """
    x_low, x_high = _widened([p.x for p in points])
    ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    y_ticks = _linear_ticks(min(ys), max(ys))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / x_low) / math.log(x_high / x_low)
        across = 1 - across if backwards else across
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(summary)}">']
    for tick in y_ticks:
        _, y = at(x_low, tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for tick in _log_ticks(x_low, x_high):
        x, _ = at(tick, y_low)
        foot = HEIGHT - BOTTOM
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{foot}" y2="{foot + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{foot + 17}" text-anchor="middle">{tick:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    arrow = f"{x_name} →" if not backwards else f"← {x_name}"
    parts.append(f'<text class="name" x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{text(arrow)}</text>')
    parts.append(f'<text class="name" x="4" y="12">{text(y_name)}</text>')
    front = sorted((p for p in points if p.front), key=lambda p: p.x)
    if len(front) > 1:
        line = " ".join("{:.1f},{:.1f}".format(*at(p.x, p.y)) for p in front)
        parts.append(f'<polyline class="front" points="{line}"/>')
    taken = [(*_below(at(p.x, p.y)), 14.0) for p in points]
    for point in sorted(points, key=lambda p: (p.native, p.x)):
        parts.append(_point(point, at, taken))
    return "".join(parts) + "</svg>"


def _point(
    point: Point,
    at: Callable[[float, float], tuple[float, float]],
    taken: list[tuple[float, float, float]],
) -> str:
    x, y = at(point.x, point.y)
    kind = " ".join(n for n, on in (("point", True), ("best", point.front), ("native", point.native)) if on)
    tied = "" if point.index is None else f' data-index="{point.index}"'
    parts = [f'<g class="{kind}"{tied}><title>{text(point.title)}</title>']
    if point.low is not None and point.high is not None:
        (_, bottom), (_, top) = at(point.x, point.low), at(point.x, point.high)
        parts.append(f'<line class="interval" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
    if point.native:
        parts.append(f'<path class="dot" d="M{x:.1f} {y - 7:.1f}l7 7-7 7-7-7z"/>')
    else:
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
    # Beside the point first: an interval's bar runs above and below it.
    wide = 8 + 7 * len(point.label)
    places = ((11, 4, "start"), (-11, 4, "end"), (0, -12, "middle"), (0, 22, "middle"))
    centres = {"start": wide / 2, "end": -wide / 2, "middle": 0}
    free = [
        p
        for p in places
        if all(abs(x + p[0] + centres[p[2]] - a) > (wide + w) / 2 or abs(y + p[1] - b) > 13 for a, b, w in taken)
    ]
    dx, dy, anchor = (free or places)[0]
    taken += [(x + dx + centres[anchor], y + dy, wide)]
    if point.label:
        place = f'x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}"'
        parts.append(f'<text class="label" {place}>{text(point.label)}</text>')
    return "".join(parts) + "</g>"


def _below(place: tuple[float, float]) -> tuple[float, float]:
    """Where the baseline of text over a dot would be."""
    return place[0], place[1] + 4


def _widened(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = max((high / low) ** 0.08, 1.15)
    return low / room, high * room


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers, at most six of them."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(found) <= 6:
            return found
    return found[:: math.ceil(len(found) / 6)]


def _linear_ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose the values."""
    span = max(high - low, abs(high) * 1e-3, 1e-6)
    rough = span / 4
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * s for s in (1, 2, 2.5, 5, 10) if unit * s >= rough)
    first = math.floor(round(low / step, 6))
    last = max(math.ceil(round(high / step, 6)), first + 1)
    return [i * step for i in range(first, last + 1)]
