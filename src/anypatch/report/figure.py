"""The trade-off curves for matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anypatch.report.measurements import COSTS, QUALITIES, Measurements
from anypatch.report.page import points_of

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
        axes.set(xlabel=COSTS["gflops"], ylabel=COSTS["images_per_second"], xscale="log", yscale="log")
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
    axes.xaxis.set_major_formatter("{x:g}")
