"""The report: one HTML file that needs no network. What it says is put together here, the page is in ``templates``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from anypatch.report.measurements import (
    COLUMNS,
    COSTS,
    METHODS,
    QUALITIES,
    AnyRow,
    Measurements,
    Sample,
    columns_of,
    format_number,
    interval,
    show,
)
from anypatch.report.svg import Point, curve
from anypatch.report.templating import picture_data, render

PHOTO = 320  # pixels of a photograph's longer side, about as wide as a page shows it


def html(result: Measurements) -> str:
    """The report as one HTML document."""
    return render("report.html", **report_values(result), pictures=_pictures(result), facts=_facts(result))


def notebook_html(result: Measurements) -> str:
    """The report's sentence, charts and table as a fragment for a notebook's cell."""
    return render("notebook.html", **report_values(result))


def report_values(result: Measurements) -> dict[str, Any]:
    """What the page and a notebook's cell both show."""
    rows: Sequence[AnyRow] = result.rows
    by = str(rows[0].get("accuracy_by")) if rows else ""
    return {
        "title": f"Patch sizes of {result.settings.get('model', 'a model')}",
        "lead": _lead(result),
        "notes": result.notes,
        "charts": _charts(result),
        "bars": result.quality == "accuracy",
        "reference": result.reference,
        "method": METHODS.get(by, ""),
        "table": _table(result),
        "reproduce": result.settings.get("reproduce", ""),
    }


def _lead(result: Measurements) -> str:
    """The most important in a few sentences."""
    native: AnyRow = {**result.native, **(result.settings.get("native") or {})}
    count = len(result.rows)
    parts = [
        f"The pretrained model has patch size {show(native['patch_size'])} at image size "
        f"{show(native['image_size'] or 'any')}. Its weights were resized to {count} patch "
        f"{'size' if count == 1 else 'sizes'} without any training."
    ]
    quality = result.quality
    if quality is not None:
        known: list[AnyRow] = [r for r in result.rows if r.get(quality) is not None]
        # The reference is perfectly faithful to itself, which says nothing.
        others = [r for r in known if quality == "accuracy" or not result.is_native(r)]
        if others:
            best = max(others, key=lambda r: (r[quality], -r["gflops"]))
            parts += [_best(best, result, quality), _as_good(best, others)]
    return " ".join(part for part in parts if part)


def _best(row: AnyRow, result: Measurements, quality: str) -> str:
    native: AnyRow = result.native
    against = ""
    if quality == "accuracy" and native.get(quality) is not None:
        against = f", against {format_number(quality, native[quality])} for {result.reference}"
    whose = "the native model's" if result.reference == "the native model" else f"those of {result.reference}"
    return (
        f"The best {quality} is {format_number(quality, row[quality])}, at patch {show(row['patch_size'])} with "
        f"{format_number('gflops', row['gflops'])} GFLOPs per image ({row['gflops'] / native['gflops']:.2g} times "
        f"{whose}){against}."
    )


def _as_good(best: AnyRow, others: Sequence[AnyRow]) -> str:
    """The cheapest size that the test images cannot tell from the best."""
    low = best.get("accuracy_low")
    if low is None:
        return ""
    row = min((r for r in others if r["accuracy"] >= low), key=lambda r: r["gflops"])
    if row["gflops"] >= best["gflops"]:
        return ""
    return (
        f"Patch {show(row['patch_size'])} is within the 95 % interval of that, with "
        f"{row['gflops'] / best['gflops']:.2g} times its GFLOPs."
    )


def _charts(result: Measurements) -> list[dict[str, Any]]:
    quality = result.quality
    if quality is None:
        return []
    charts = []
    for cost, name in COSTS.items():
        points = points_of(result, cost, quality)
        front = ", ".join(p.label for p in points if p.front)
        what = f"{quality} against {name}"
        summary = f"{what}. " + "; ".join(p.title for p in points) + f". On the Pareto front: patch {front}."
        drawing = curve(points, name, QUALITIES[quality], summary, cost == "images_per_second") if points else Markup()
        charts.append({"drawing": drawing, "caption": what[0].upper() + what[1:], "front": front})
    return charts


def points_of(result: Measurements, cost: str, quality: str) -> list[Point]:
    """The points of a trade-off curve: the rows, and the reference where it is none of them."""
    found = []
    rows: Sequence[AnyRow] = result.rows
    for index, (row, front) in enumerate(zip(rows, result.pareto(cost), strict=True)):
        if row.get(quality) is not None and row[cost] > 0:
            found.append(_point(result, row, (cost, quality), front, index))
    if not any(result.is_native(row) for row in rows) and result.native.get(quality) is not None:
        found.append(_point(result, result.native, (cost, quality), False, None))
    return found


def _point(result: Measurements, row: AnyRow, axes: tuple[str, str], front: bool, index: int | None) -> Point:
    cost, quality = axes
    native = result.is_native(row)
    label = show(row["patch_size"])
    name = "native" if result.reference == "the native model" else "reference"
    title = (
        f"{f'{name}, ' if native else ''}patch {label}: {quality} {format_number(quality, row[quality])}, "
        f"{format_number(cost, row[cost])} {COSTS[cost]}"
    )
    bounds = (row.get("accuracy_low"), row.get("accuracy_high")) if quality == "accuracy" else (None, None)
    return Point(row[cost], row[quality], label, title, *bounds, front, native, index)


def _pictures(result: Measurements) -> dict[str, Any] | None:
    if not result.samples:
        return None
    native = result.native["patch_size"]
    start = len(result.rows) // 2
    for index, row in enumerate(result.rows):
        if row["patch_size"] == native:
            start = index
    sizes = [{"patch": show(row["patch_size"]), "says": _says(row)} for row in result.rows]
    return {"start": start, "sizes": sizes, "samples": [_sample(result, sample) for sample in result.samples]}


def _says(row: AnyRow) -> str:
    parts = [
        f"image {show(row['image_size'])}",
        f"{row['tokens']} tokens",
        f"{format_number('gflops', row['gflops'])} GFLOPs",
        f"{format_number('images_per_second', row['images_per_second'])} images/s",
    ]
    for name in ("fidelity", "accuracy"):
        if row.get(name) is not None:
            parts.append(f"{name} {format_number(name, row[name])}")
    return ", ".join(parts)


def _sample(result: Measurements, sample: Sample) -> dict[str, Any]:
    height, width = sample.seen(0).shape[:2]
    photos: dict[int, str] = {}  # one picture for every size that is shown, however many rows share it
    maps = []
    for index, (row, colours) in enumerate(zip(result.rows, sample.maps, strict=True)):
        seen = sample.seen(index)
        if id(seen) not in photos:
            photos[id(seen)] = picture_data(seen, PHOTO, photo=True)
        rows, columns = colours.shape[:2]
        maps.append(
            {
                "photo": photos[id(seen)],
                "source": picture_data(colours),
                "rows": rows,
                "columns": columns,
                "lines": _lines(rows, columns),
                "patch": show(row["patch_size"]),
            }
        )
    return {"name": sample.name, "shape": f"{width}/{height}", "maps": maps, "changes": len(photos) > 1}


def _lines(rows: int, columns: int) -> str:
    """Lines between patches, as an SVG path over a picture of any size."""
    upright = "".join(f"M{x} 0V{rows}" for x in range(1, columns))
    return upright + "".join(f"M0 {y}H{columns}" for y in range(1, rows))


def _table(result: Measurements) -> dict[str, Any]:
    names = columns_of([*result.rows, result.native])
    fronts = list(zip(*(result.pareto(cost) for cost in COSTS), strict=True))
    lines = [
        {"index": index, "cells": _cells(row, names), "front": _front(fronts[index])}
        for index, row in enumerate(result.rows)
    ]
    if not any(result.is_native(row) for row in result.rows):
        words = result.reference.removeprefix("the ")
        lines.append({"index": None, "cells": _cells(result.native, names), "front": words})
    return {"columns": [COLUMNS[n] for n in names], "lines": lines, "fronts": result.quality is not None}


def _front(on: tuple[bool, ...]) -> str:
    names = [n for n, yes in zip(("GFLOPs", "images/s"), on, strict=True) if yes]
    return ", ".join(names) or "–"


def _cells(row: AnyRow, names: Sequence[str]) -> list[dict[str, str]]:
    return [
        {"text": "–" if row.get(n) is None else format_number(n, row[n]), "interval": interval(row, n)} for n in names
    ]


def _facts(result: Measurements) -> list[tuple[str, str]]:
    """What was measured, on what, and how: lines of a name and a text."""
    said = result.settings
    lines: list[tuple[str, Any]] = [
        ("model", _joined(said.get("model"), said.get("library") and f"read with {said['library']}")),
        ("kernel resize", said.get("kernel")),
        ("positions", said.get("positions")),
    ]
    for part, facts in (said.get("data") or {}).items():
        classes = f" of {facts['classes']} classes" if facts["classes"] else ""
        lines.append((part, f"{facts['images']} images{classes} from {facts['name']}"))
    if said.get("fidelity_on"):
        count = said.get("patch_fidelity_images")
        near = f"; neighbours are the nearest {said['neighbours']}" if said.get("neighbours") else ""
        lines.append(("fidelity", f"on {said['fidelity_on']}; patch fidelity on {count} of those images{near}"))
        lines.append(("measured against", said.get("reference")))
    versions = ", ".join(f"{name} {version}" for name, version in (said.get("versions") or {}).items())
    lines += [("preprocessing", said.get("preprocess")), ("timing", _timing(said)), ("versions", versions)]
    return [(name, str(value)) for name, value in lines if value]


def _timing(said: dict[str, Any]) -> str:
    """Where, when and how time was measured."""
    threads, processes = said.get("threads"), said.get("processes") or 1
    return _joined(
        said.get("device"),
        threads and f"{threads} thread{'s' * (threads > 1)}",
        f"{processes} processes" if processes > 1 else None,
        said.get("batch_size") and f"batch {said['batch_size']}",
        said.get("dtype"),
        said.get("timed") and f"measured {said['timed']}",
    )


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)
