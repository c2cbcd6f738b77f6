"""The report of a sweep: one HTML file that needs no network, and the same curves for matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from anypatch.report.svg import Point, curve, picture_data, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from anypatch.measure.sweep import Row, Sample, SweepResult

QUALITIES = {"accuracy": "accuracy", "fidelity": "fidelity (cosine to the native model)"}
COSTS = {"gflops": "GFLOPs per image", "images_per_second": "images per second"}
METHODS = {
    "zero_shot": "zero-shot classification with the text tower",
    "head": "the model's own classifier",
    "probe": "a linear probe",
    "knn": "nearest neighbours",
}
COLUMNS = {
    "patch_size": ("patch", "Patch size in pixels."),
    "image_size": ("image", "Image size in pixels."),
    "tokens": ("tokens", "Tokens that the transformer works on, class and register tokens included."),
    "gflops": ("GFLOPs", "Floating-point operations of one image's forward pass; a multiply-add is two."),
    "images_per_second": ("images/s", "Throughput of the bare forward pass, median of repeated batches."),
    "peak_memory_mb": (
        "memory, MB",
        "Tensors alive at the worst moment of a batch's forward pass, weights included.",
    ),
    "fidelity": ("fidelity", "Mean cosine between an image's pooled feature and the native model's."),
    "patch_fidelity": (
        "patch fidelity",
        "Mean cosine between patch features and the native model's, both averaged onto the coarser grid.",
    ),
    "neighbour_agreement": (
        "neighbours",
        "Share of each image's nearest images (how many is said below) that are also nearest for the native model.",
    ),
    "accuracy": ("accuracy", "With its 95 % interval (Wilson)."),
    "head_accuracy": ("own head", "Accuracy of the model's own classifier, among the data's classes."),
    "zero_shot_accuracy": ("zero-shot", "Accuracy of the nearest class text."),
    "knn_accuracy": ("k-NN", "Accuracy of the 20 nearest training images, by cosine."),
    "probe_accuracy": ("linear probe", "Accuracy of a logistic regression on standardised features."),
}


def html(result: SweepResult) -> str:
    """The report as one HTML document."""
    title = f"Patch sizes of {result.settings.get('model', 'a model')}"
    style, script = (_asset(name) for name in ("report.css", "report.js"))
    body = "\n".join(
        part
        for part in (
            f"<header><h1>{text(title)}</h1><p class=lead>{_lead(result)}</p></header>",
            _notes(result),
            _curves(result),
            _pictures(result),
            _table(result),
            _about(result),
        )
        if part
    )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("anypatch.report").joinpath(name).read_text(encoding="utf-8")


def _lead(result: SweepResult) -> str:
    native = result.native
    parts = [
        f"The pretrained model has patch size {_size(native['patch_size'])} at image size "
        f"{_size(native['image_size'])}. Its weights were resized to {len(result.rows)} patch "
        f"{'size' if len(result.rows) == 1 else 'sizes'} without any training."
    ]
    quality = result.quality
    if quality is not None:
        known = [r for r in result.rows if r.get(quality) is not None]
        # The native size is perfectly faithful to itself, which says nothing.
        others = [r for r in known if quality == "accuracy" or not _is_native(result, r)]
        if others:
            best = max(others, key=lambda r: (r[quality], -r["gflops"]))
            parts += [_best(best, native, quality), _as_good(best, others)]
    return text(" ".join(part for part in parts if part))


def _as_good(best: Row, others: Sequence[Row]) -> str:
    """The cheapest size that the test images cannot tell from the best."""
    low = best.get("accuracy_low")
    if low is None:
        return ""
    row = min((r for r in others if r["accuracy"] >= low), key=lambda r: r["gflops"])
    if row["gflops"] >= best["gflops"]:
        return ""
    return (
        f"Patch {_size(row['patch_size'])} is within the 95 % interval of that, with "
        f"{row['gflops'] / best['gflops']:.2g} times its GFLOPs."
    )


def _best(row: Row, native: Row, quality: str) -> str:
    against = ""
    if quality == "accuracy" and native.get(quality) is not None:
        against = f", against {format_number(quality, native[quality])} for the native model"
    return (
        f"The best {quality} is {format_number(quality, row[quality])}, at patch {_size(row['patch_size'])} with "
        f"{format_number('gflops', row['gflops'])} GFLOPs per image ({row['gflops'] / native['gflops']:.2g} times the "
        f"native model's){against}."
    )


def _notes(result: SweepResult) -> str:
    if not result.notes:
        return ""
    items = "".join(f"<li>{text(note)}</li>" for note in result.notes)
    return f'<aside class="notes" aria-label="Notes"><ul>{items}</ul></aside>'


def _curves(result: SweepResult) -> str:
    quality = result.quality
    if quality is None:
        return ""
    figures = []
    for cost, name in COSTS.items():
        points = _points(result, cost, quality)
        front = ", ".join(p.label for p in points if p.front)
        what = f"{quality} against {name}"
        summary = f"{what}. " + "; ".join(p.title for p in points) + f". On the Pareto front: patch {front}."
        figures.append(
            f"<figure>{curve(points, name, QUALITIES[quality], summary, cost == 'images_per_second')}"
            f"<figcaption>{text(what[0].upper() + what[1:])}. Pareto front: patch {text(front)}.</figcaption></figure>"
        )
    legend = (
        '<p class="legend"><span class="key best"></span>on the Pareto front: nothing cheaper is as good '
        '<span class="key"></span>beaten by another size <span class="key native"></span>the native model'
        + ". Numbers are patch sizes; cheaper is to the left."
        + (" Bars are 95 % intervals." if quality == "accuracy" else "")
        + "</p>"
    )
    return (
        '<section aria-labelledby="curves"><h2 id="curves">What a patch size costs, and what it keeps</h2>'
        f'{legend}<div class="pair">{"".join(figures)}</div></section>'
    )


def _points(result: SweepResult, cost: str, quality: str) -> list[Point]:
    found = []
    for index, (row, front) in enumerate(zip(result.rows, result.pareto(cost), strict=True)):
        if row.get(quality) is not None and row[cost] > 0:
            found.append(_a_point(row, cost, quality, front, index, _is_native(result, row)))
    if not any(_is_native(result, row) for row in result.rows) and result.native.get(quality) is not None:
        found.append(_a_point(result.native, cost, quality, False, None, True))
    return found


def _is_native(result: SweepResult, row: Row) -> bool:
    return all(row[side] == result.native[side] for side in ("patch_size", "image_size"))


def _a_point(row: Row, cost: str, quality: str, front: bool, index: int | None, native: bool) -> Point:
    label = _size(row["patch_size"])
    title = (
        f"{'native, ' if native else ''}patch {label}: {quality} {format_number(quality, row[quality])}, "
        f"{format_number(cost, row[cost])} {COSTS[cost]}"
    )
    bounds = (row.get("accuracy_low"), row.get("accuracy_high")) if quality == "accuracy" else (None, None)
    return Point(row[cost], row[quality], label, title, *bounds, front, native, index)


def _pictures(result: SweepResult) -> str:
    if not result.samples:
        return ""
    start = len(result.rows) // 2
    native = result.native["patch_size"]
    for index, row in enumerate(result.rows):
        if row["patch_size"] == native:
            start = index
    options = "".join(f'<option value="{i}"></option>' for i in range(len(result.rows)))
    labels = "".join(
        f'<li data-patch="{text(_size(row["patch_size"]))}" data-says="{text(_says(row))}"></li>' for row in result.rows
    )
    slider = (
        '<div class="slider"><label for="patch">Patch size <output id="size" for="patch">'
        f"{text(_size(result.rows[start]['patch_size']))}</output></label>"
        f'<input id="patch" type="range" min="0" max="{len(result.rows) - 1}" step="1" value="{start}" list="sizes" '
        f'aria-valuetext="patch size {text(_size(result.rows[start]["patch_size"]))}">'
        f'<datalist id="sizes">{options}</datalist><p id="says">{text(_says(result.rows[start]))}</p>'
        f'<ul id="rows" hidden>{labels}</ul></div>'
    )
    figures = "".join(_sample(result, number, sample, start) for number, sample in enumerate(result.samples))
    return (
        '<section aria-labelledby="pictures"><h2 id="pictures">What the model sees</h2>'
        "<p>Each image with its patch grid, and its patch features: their three leading principal components as red, "
        "green and blue, the same colours for every image and patch size. Like colours mean like features.</p>"
        f'{slider}<div class="samples">{figures}</div></section>'
    )


def _says(row: Row) -> str:
    parts = [
        f"image {_size(row['image_size'])}",
        f"{row['tokens']} tokens",
        f"{format_number('gflops', row['gflops'])} GFLOPs",
        f"{format_number('images_per_second', row['images_per_second'])} images/s",
    ]
    for name in ("fidelity", "accuracy"):
        if row.get(name) is not None:
            parts.append(f"{name} {format_number(name, row[name])}")
    return ", ".join(parts)


def _sample(result: SweepResult, number: int, sample: Sample, start: int) -> str:
    name = text(sample.name)
    height, width = sample.image.shape[:2]
    sources = [picture_data(m) for m in sample.maps]
    grids = [m.shape[:2] for m in sample.maps]
    rows, columns = grids[start]
    thumbs = "".join(
        f'<button type="button" data-index="{i}" aria-pressed="{"true" if i == start else "false"}">'
        f'<img src="{source}" width="{grid[1]}" height="{grid[0]}" data-grid="{grid[0]} {grid[1]}" '
        f'alt="Patch features of {name} at patch size {_size(row["patch_size"])}, {grid[0]} by {grid[1]} patches">'
        f"<span>{text(_size(row['patch_size']))}</span></button>"
        for i, (source, grid, row) in enumerate(zip(sources, grids, result.rows, strict=True))
    )
    size = _size(result.rows[start]["patch_size"])
    return (
        f'<figure class="sample" style="--shape:{width}/{height}"><div class="panels">'
        f'<div class="panel"><img class="photo" src="{picture_data(sample.image, 320, photo=True)}" '
        f'alt="{name}, as the model sees it">{_grid(rows, columns)}</div>'
        f'<div class="panel"><img class="map" src="{sources[start]}" data-name="{name}" '
        f'alt="Patch features of {name} at patch size {size}, {rows} by {columns} patches"></div></div>'
        f'<div class="thumbs" role="group" aria-label="Patch sizes of {name}">{thumbs}</div>'
        f"<figcaption>{name}</figcaption></figure>"
    )


def _grid(rows: int, columns: int) -> str:
    """Lines between patches, over a picture of any size."""
    lines = "".join(f"M{x} 0V{rows}" for x in range(1, columns)) + "".join(f"M0 {y}H{columns}" for y in range(1, rows))
    return (
        f'<svg class="grid" viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path d="{lines}" vector-effect="non-scaling-stroke"/></svg>'
    )


def _table(result: SweepResult) -> str:
    by = str(result.rows[0].get("accuracy_by")) if result.rows else ""
    names = [n for n in COLUMNS if any(row.get(n) is not None for row in (*result.rows, result.native))]
    names = [n for n in names if n != f"{by}_accuracy"]  # shown as `accuracy`
    head = "".join(f'<th scope="col" title="{text(COLUMNS[n][1])}">{text(COLUMNS[n][0])}</th>' for n in names)
    fronts = list(zip(*(result.pareto(cost) for cost in COSTS), strict=True))
    lines = []
    for index, row in enumerate(result.rows):
        lines.append(_line(row, names, f' data-index="{index}"', _front(fronts[index]), result.quality))
    if not any(_is_native(result, row) for row in result.rows):
        lines.append(_line(result.native, names, ' class="native"', "native model", result.quality))
    last = '<th scope="col">on front of</th>' if result.quality else ""
    meanings = "".join(f"<dt>{text(COLUMNS[n][0])}</dt><dd>{text(COLUMNS[n][1])}</dd>" for n in names)
    method = f"<p>Accuracy is that of {text(METHODS[by])}.</p>" if by in METHODS else ""
    return (
        '<section aria-labelledby="table"><h2 id="table">Numbers</h2>'
        f'{method}<div class="scroll" role="region" aria-labelledby="table" tabindex="0"><table>'
        f"<thead><tr>{head}{last}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f"<details><summary>What the columns mean</summary><dl>{meanings}</dl></details></section>"
    )


def _front(on: tuple[bool, ...]) -> str:
    names = [n for n, yes in zip(("GFLOPs", "images/s"), on, strict=True) if yes]
    return ", ".join(names) or "–"


def _line(row: Row, names: list[str], attributes: str, front: str, quality: str | None) -> str:
    cells = "".join(
        f'<th scope="row">{_cell(row, n)}</th>' if n == "patch_size" else f"<td>{_cell(row, n)}</td>" for n in names
    )
    last = f'<td class="words">{text(front)}</td>' if quality else ""
    return f"<tr{attributes}>{cells}{last}</tr>"


def _cell(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None:
        return "–"
    shown = text(format_number(name, value))
    if name.endswith("accuracy"):
        stem = name.removesuffix("_accuracy")
        low, high = row.get(f"{stem}_low"), row.get(f"{stem}_high")
        if low is not None and high is not None:
            shown += f" <small>{low:.3f}–{high:.3f}</small>"
    return shown


def _about(result: SweepResult) -> str:
    said = result.settings
    lines: list[tuple[str, Any]] = [
        ("model", f"{said.get('model')}, read with {said.get('library')}"),
        ("kernel resize", f"{said.get('kernel')}"),
    ]
    for part, facts in (said.get("data") or {}).items():
        classes = f" of {facts['classes']} classes" if facts["classes"] else ""
        lines.append((part, f"{facts['images']} images{classes} from {facts['name']}"))
    if said.get("fidelity_on"):
        count = said.get("patch_fidelity_images")
        near = f"; neighbours are the nearest {said['neighbours']}" if said.get("neighbours") else ""
        lines.append(("fidelity", f"on {said['fidelity_on']}; patch fidelity on {count} of those images{near}"))
    threads = f", {said['threads']} thread{'s' * (said['threads'] > 1)}" if said.get("threads") else ""
    processes = f", {said['processes']} processes" if said.get("processes", 1) > 1 else ""
    versions = ", ".join(f"{name} {version}" for name, version in (said.get("versions") or {}).items())
    lines += [
        ("preprocessing", said.get("preprocess")),
        ("timing", f"{said.get('device')}{threads}{processes}, batch {said.get('batch_size')}, {said.get('dtype')}"),
        ("versions", versions),
    ]
    lines = [(name, value) for name, value in lines if value and "None" not in str(value)]
    items = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in lines)
    return (
        '<section aria-labelledby="about"><h2 id="about">What was measured, and how to measure it again</h2>'
        f'<dl class="facts">{items}</dl><pre tabindex="0"><code>{text(said.get("reproduce", ""))}</code></pre>'
        "</section>"
    )


def _size(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def format_number(name: str, value: Any) -> str:
    if name in ("patch_size", "image_size"):
        return _size(value)
    if name == "tokens":
        return str(value)
    if name in ("gflops", "images_per_second", "peak_memory_mb"):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return f"{value:.3f}" if value < 0.9995 or value > 0.999995 else f"{value:.5f}"


def figure(result: SweepResult) -> Figure:
    """The trade-off curves as a matplotlib figure."""
    from matplotlib.figure import Figure

    quality = result.quality
    drawn = Figure(figsize=(9, 3.8), layout="constrained")
    if quality is None:
        axes = drawn.subplots()
        axes.plot([r["gflops"] for r in result.rows], [r["images_per_second"] for r in result.rows], "o-")
        axes.set(xlabel=COSTS["gflops"], ylabel=COSTS["images_per_second"], xscale="log", yscale="log")
        return drawn
    for axes, (cost, name) in zip(drawn.subplots(1, 2), COSTS.items(), strict=True):
        points = _points(result, cost, quality)
        front = sorted((p for p in points if p.front), key=lambda p: p.x)
        axes.plot([p.x for p in front], [p.y for p in front], color="C0", label="Pareto front")
        for p in points:
            shade = "C1" if p.native else "C0" if p.front else "0.55"
            if p.low is not None and p.high is not None:
                axes.vlines(p.x, p.low, p.high, color=shade, lw=1)
            axes.plot([p.x], [p.y], "D" if p.native else "o", color=shade, mfc=shade if p.front else "none")
            axes.annotate(p.label, (p.x, p.y), (6, -4), textcoords="offset points")
        axes.set(xlabel=name, ylabel=QUALITIES[quality], xscale="log")
        if cost == "images_per_second":
            axes.invert_xaxis()
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_formatter("{x:g}")
    return drawn
