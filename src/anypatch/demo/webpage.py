"""The demo's report: one HTML file. Every string that is not markup goes through `escape`."""

from __future__ import annotations

import base64
import io
import platform
from html import escape
from string import Template

import torch
from torch import Tensor

from anypatch.demo.charts import charts, mark
from anypatch.demo.data import ASSET, IMAGE_SIZE, PATCH_SIZE
from anypatch.demo.rows import BATCH, NAMES, ROUNDS, DemoResult, View, cells, groups, percent


def page(result: DemoResult) -> str:
    """The report: one HTML file that asks the network for nothing."""
    template = Template((ASSET.parent / "demo.html").read_text(encoding="utf-8"))
    original, kept = result.original, result.of("grid")
    changed = [row for row in kept if row is not original]
    smallest, largest = kept[0].patch_size, kept[-1].patch_size
    lead = (
        f"A small Vision Transformer learned handwritten digits at patch size {PATCH_SIZE}. Here "
        "anypatch.adapt(model, patch_size=…) moves copies of it to other patch sizes, without training. "
        "All numbers on this page were measured when it was made."
    )
    measured = (
        f"{result.images} held-out images of scikit-learn’s digits (8×8, enlarged to {IMAGE_SIZE}×{IMAGE_SIZE}), "
        "resized to each model’s image size with antialiasing. Keeping the grid, the image grows with the patch; "
        "keeping the image size, the number of patches changes, and with it the work."
    )
    setup = (
        f"CPU: {platform.machine()}, {torch.get_num_threads()} threads, batches of {BATCH}; torch "
        f"{torch.__version__}. Accuracy and features repeat; images per second depend on the machine and on what "
        f"else it is doing. Each rate is the best of {ROUNDS} batches, taken in turns. “Kernel drawn anew” is one draw "
        "from a normal distribution (standard deviation 0.02, seed 0), as when transformers loads a model with "
        "ignore_mismatched_sizes=True; “kernel interpolated” is bicubic, scaled to keep the response. In anypatch’s "
        "repository, python tools/train_demo.py trains the original again, from a fixed seed."
    )
    sizes = f"{smallest} to {largest}" if changed else str(smallest)
    return template.substitute(
        title=escape(f"One model, patch size {sizes}"),
        lead=escape(lead),
        facts="".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
            for name, value, note in _facts(result)
        ),
        measured=escape(measured),
        key=_key(result),
        charts=charts(result),
        rules=",\n".join(f"#d{digit}:checked ~ #p{digit}" for digit in result.views),
        picks=_picks(result),
        panels="".join(_panel(result, digit) for digit in result.views),
        table=_table(result),
        reproduce=escape("pip install 'anypatch[demo]'\nanypatch demo"),
        setup=escape(setup),
    )


def _facts(result: DemoResult) -> list[tuple[str, str, str]]:
    """The three numbers at the top: name, value, note."""
    facts = [("Original, patch 4", percent(result.original.accuracy), f"of {result.images} unseen digits right")]
    for series, note in (("grid", "same grid, no training"), ("random", "as when mismatched sizes are ignored")):
        rows = [row for row in result.rows if row.series == series and row is not result.original]
        if rows:
            low, high = min(row.accuracy for row in rows), max(row.accuracy for row in rows)
            sizes = f"{rows[0].patch_size} to {rows[-1].patch_size}"
            span = f"{100 * low:.1f}–{percent(high)}" if percent(low) != percent(high) else percent(low)
            name = "anypatch, patch" if series == "grid" else "Kernel drawn anew, patch"
            facts.append((f"{name} {sizes}", span, note))
    return facts


def _key(result: DemoResult) -> str:
    items = []
    for series, name in NAMES.items():
        if any(row.series == series for row in result.rows):
            line = f'<polyline class="s-{series}" points="0,6 30,6"/>{mark(series, 15, 6)}'
            items.append(f'<li><svg viewBox="0 0 30 12" aria-hidden="true">{line}</svg>{escape(name)}</li>')
    return "".join(items)


def _picks(result: DemoResult) -> str:
    parts = []
    for i, (digit, views) in enumerate(result.views.items()):
        checked = " checked" if i == 0 else ""
        picture = _picture(views[0].pixels, f"handwritten {digit}")
        parts.append(f'<input type="radio" name="digit" id="d{digit}"{checked}><label for="d{digit}">{picture}</label>')
    return "".join(parts)


def _panel(result: DemoResult, digit: int) -> str:
    """All models' views of one digit."""
    parts = []
    for series, name in NAMES.items():
        views = [view for view in result.views[digit] if view.row.series == series]
        if series in ("grid", "image"):
            views = [view for view in result.views[digit] if view.row in result.of(series)]
        if series == "bicubic" or not [view for view in views if view.row.series == series]:
            continue
        note = {
            "grid": "the image grows with the patch",
            "image": f"{IMAGE_SIZE}×{IMAGE_SIZE} pixels, fewer or more patches",
            "random": "as when a library ignores mismatched sizes on loading",
        }[series]
        cards = "".join(
            _card(view, digit, view.row is result.original)
            for view in sorted(views, key=lambda view: view.row.patch_size)
        )
        parts.append(f'<h3>{escape(name)} <span>· {escape(note)}</span></h3><div class="strip">{cards}</div>')
    return f'<div class="panel" id="p{digit}">{"".join(parts)}</div>'


def _card(view: View, digit: int, original: bool) -> str:
    row = view.row
    lines = "".join(
        f"M{i * row.patch_size} 0V{row.image_size}M0 {i * row.patch_size}H{row.image_size}" for i in range(1, row.grid)
    )
    overlay = f'<svg viewBox="0 0 {row.image_size} {row.image_size}" aria-hidden="true"><path d="{lines}"/></svg>'
    name = f"handwritten {digit} at {row.image_size} pixels, cut into {row.grid}×{row.grid} patches"
    features = f"features of the {row.grid}×{row.grid} patches at patch size {row.patch_size}, as colours"
    right = view.answer == digit
    verdict = f'reads {view.answer}<span class="sure">, {view.confidence:.0%}</span>'
    if not right:
        verdict = f'<span class="wrong">✗ {verdict}</span>'
    size = f"{row.image_size} px" + (", original" if original else "")
    return (
        f'<figure class="view"><div class="{"pair first" if original else "pair"}">'
        f'<div class="frame">{_picture(view.pixels, name)}{overlay}</div>'
        f'<div class="frame">{_picture(view.colours, features)}</div></div>'
        f"<figcaption><b>patch {row.patch_size}</b><br>{escape(size)}<br>{verdict}</figcaption></figure>"
    )


def _table(result: DemoResult) -> str:
    headings = ("Patch", "Image", "Patches", "Accuracy", "Same answers", "Cosine", "Images/s")
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    bodies = []
    for name, rows in groups(result):
        lines = [f'<tr><th scope="rowgroup" colspan="{len(headings)}">{escape(name)}</th></tr>']
        for row in rows:
            shown = list(cells(row))
            shown[0] += " (original)" if row is result.original else ""
            lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in shown) + "</tr>")
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    return f"<table><thead><tr>{head}</tr></thead>{''.join(bodies)}</table>"


def _picture(pixels: Tensor, alt: str) -> str:
    """An image element that carries its PNG: grey (h, w) in [-1, 1], or colours (h, w, 3) in [0, 1]."""
    scaled = (pixels + 1) / 2 if pixels.ndim == 2 else pixels
    data = base64.b64encode(_png((scaled.clamp(0, 1) * 255).round().to(torch.uint8))).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'


def _png(pixels: Tensor) -> bytes:
    """Bytes (h, w) or (h, w, 3) as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "png", optimize=True)
    return buffer.getvalue()
