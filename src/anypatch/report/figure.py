"""The trade-off curves for matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anypatch.report.measurements import COSTS, QUALITIES, Measurements, show
from anypatch.report.page import points_of
from anypatch.report.svg import log_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(result: Measurements) -> Figure:
    """Quality against each cost, with the Pareto front; without images, throughput against operations."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 3.8), layout="constrained")
    quality = result.quality
    if quality is None:
        axes = drawn.subplots()
        axes.plot([r["gflops"] for r in result.rows], [r["images_per_second"] for r in result.rows], "o-")
        for r in result.rows:
            place = (r["gflops"], r["images_per_second"])
            axes.annotate(show(r["patch_size"]), place, (6, 6), textcoords="offset points")
        axes.set(xlabel=COSTS["gflops"], ylabel=COSTS["images_per_second"], xscale="log", yscale="log")
        _few_ticks(axes, axes.xaxis)
        _few_ticks(axes, axes.yaxis)
        return drawn
    for axes, cost in zip(drawn.subplots(1, 2), COSTS, strict=True):
        _curve(axes, result, cost, quality)
    return drawn


def _curve(axes: Any, result: Measurements, cost: str, quality: str) -> None:
    points = points_of(result, cost, quality)
    front = sorted((p for p in points if p.front), key=lambda p: p.x)
    axes.plot([p.x for p in front], [p.y for p in front], color="C0", label="Pareto front")
    for p in points:
        shade = "C1" if p.native else "C0" if p.front else "0.55"
        if p.low is not None and p.high is not None:
            axes.vlines(p.x, p.low, p.high, color=shade, lw=1)
        axes.plot([p.x], [p.y], "D" if p.native else "o", color=shade, mfc=shade if p.front else "none")
        axes.annotate(p.label, (p.x, p.y), (6, -4), textcoords="offset points")
    axes.set(xlabel=COSTS[cost], ylabel=QUALITIES[quality], xscale="log")
    if cost == "images_per_second":
        axes.invert_xaxis()
    axes.grid(alpha=0.25)
    axes.margins(x=0.12)  # for the label of the last point
    _few_ticks(axes, axes.xaxis)


def _few_ticks(axes: Any, axis: Any) -> None:
    """Round numbers that leave each other room; matplotlib names every small tick of a range below a decade."""
    from matplotlib.ticker import NullLocator

    low, high = sorted(axis.get_view_interval())
    if low == high:
        low, high = low / 2, high * 2
    axis.set_ticks(log_ticks(low, high))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
