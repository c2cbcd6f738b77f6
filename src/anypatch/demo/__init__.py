"""`anypatch demo`: a small ViT that the package carries, at many patch sizes, measured on this machine."""

from __future__ import annotations

import base64
import copy
import io
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from anypatch.errors import AnypatchError
from anypatch.measure.features import Colours

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

Keep = Literal["grid", "image"]
Series = Literal["grid", "image", "bicubic", "random"]
Progress = Callable[[int, int], None]

ASSET = Path(__file__).parent / "demo-vit.safetensors"
IMAGE_SIZE, PATCH_SIZE, GRID = 32, 4, 8
HELD_OUT = 599  # a third of the 1797 digits
PATCH_SIZES = (2, 3, 4, 5, 6, 8, 12, 16)
BATCH, ROUNDS = 64, 3
NAMES: dict[Series, str] = {
    "grid": "anypatch, same grid",
    "image": "anypatch, same image",
    "bicubic": "kernel interpolated",
    "random": "kernel drawn anew",
}


def digits(part: Literal["train", "held out"]) -> tuple[Tensor, Tensor]:
    """Two thirds or one third of scikit-learn's digits: images (N, 1, 32, 32) in [-1, 1], labels (N,)."""
    np, datasets = _need("numpy"), _need("sklearn.datasets", "scikit-learn")
    data = datasets.load_digits()
    order = np.random.RandomState(0).permutation(len(data.target))
    chosen = order[:HELD_OUT] if part == "held out" else order[HELD_OUT:]
    images = torch.tensor(data.images[chosen], dtype=torch.float32)[:, None] / 8 - 1
    return F.interpolate(images, size=IMAGE_SIZE, mode="bicubic"), torch.tensor(data.target[chosen])


def demo_data() -> tuple[Tensor, Tensor]:
    """The digits that the demo model has not seen: images (599, 1, 32, 32) in [-1, 1], labels (599,)."""
    return digits("held out")


def demo_metadata() -> dict[str, str]:
    """What the asset says of itself: architecture, arguments, held-out accuracy."""
    from safetensors import safe_open

    with safe_open(ASSET, "pt") as file:
        return dict(file.metadata())


def demo_model() -> nn.Module:
    """The demo's timm model, in eval mode: a ViT trained on digits at 32 pixels, patch 4."""
    timm, metadata = _need("timm"), demo_metadata()
    model = timm.create_model(
        metadata["architecture"], checkpoint_path=str(ASSET), **json.loads(metadata["model_args"])
    )
    return model.eval()


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


def run_demo(
    patch_sizes: Sequence[int] = PATCH_SIZES,
    *,
    output: str | Path | None = Path("anypatch-demo.html"),
    images: int | None = None,
    progress: Progress | None = None,
) -> DemoResult:
    """Adapt the demo model to each patch size, measure every copy, write a report.

    Args:
        patch_sizes: pixels; the original's own is always among them.
        output: the HTML report, or ``None`` for none.
        images: measure on the first so many held-out images, instead of all.
        progress: called with (done, total) as the work goes on.
    """
    output = None if output is None else Path(output)
    if output is not None and not output.parent.is_dir():
        raise AnypatchError(f"cannot write {output}: {output.parent} is not a directory")
    digit_images, labels = (part[:images] for part in demo_data())
    model = demo_model()
    plan = _plan(patch_sizes)
    examples = {digit: int((labels == digit).nonzero()[0]) for digit in sorted({*labels.tolist()})}
    candidates = [_adapted(model, series, patch_size) for series, patch_size in plan]
    inputs = [_resized(digit_images, candidate.patch_embed.img_size[0]) for candidate in candidates]
    total, done = len(plan) + ROUNDS, 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    rates: dict[int, float] = {}
    for _ in range(ROUNDS):  # in rounds, so that a busy moment does not fall on one model alone
        for i, (series, _patch_size) in enumerate(plan):
            if series in ("grid", "image"):
                rates[i] = max(rates.get(i, 0.0), _rate(candidates[i], inputs[i][:BATCH]))
        step()

    rows: list[Row] = []
    views: dict[int, list[View]] = {digit: [] for digit in examples}
    for i, (series, patch_size) in enumerate(plan):
        run = _forward(candidates[i], inputs[i])
        if i == 0:
            reference, colours = run, Colours([run.tokens.flatten(0, 1)])
        answers = run.logits.argmax(1)
        row = Row(
            series,
            patch_size,
            inputs[i].shape[-1],
            accuracy=_mean(answers == labels),
            same=_mean(answers == reference.logits.argmax(1)),
            cosine=_mean(F.cosine_similarity(run.pooled, reference.pooled)),
            images_per_second=rates.get(i),
        )
        rows.append(row)
        for digit, n in examples.items():
            confidence = run.logits[n].softmax(0).max().item()
            shown = colours(run.tokens[n]).reshape(row.grid, row.grid, 3)
            views[digit].append(View(row, inputs[i][n, 0], shown, int(answers[n]), confidence))
        step()
    result = DemoResult(tuple(rows), len(labels), {digit: tuple(seen) for digit, seen in views.items()})
    if output is not None:
        output.write_text(page(result), encoding="utf-8")
    return result


def table(result: DemoResult) -> Table:
    """The measurements, for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"A ViT trained at patch {PATCH_SIZE}, on {result.images} handwritten digits it has not seen"
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    shown.add_column("", no_wrap=True)
    for heading in ("patch", "image", "patches", "accuracy", "same\nanswers", "cosine", "images/s"):
        shown.add_column(heading, justify="right")
    for name, rows in _groups(result):
        shown.add_section()
        for i, row in enumerate(rows):
            shown.add_row("" if i else name, *_cells(row), style="bold" if row is result.original else None)
    return shown


def _plan(patch_sizes: Sequence[int]) -> list[tuple[Series, int]]:
    """What to measure, the original first."""
    others = sorted({*patch_sizes} - {PATCH_SIZE})
    plan: list[tuple[Series, int]] = [("grid", PATCH_SIZE)]
    plan += [("grid", p) for p in others]
    plan += [("image", p) for p in others if p > 0 and IMAGE_SIZE % p == 0]
    plan += [("bicubic", p) for p in others]
    plan += [("random", p) for p in others]
    return plan


def _adapted(model: nn.Module, series: Series, patch_size: int) -> Any:
    """A copy of the model at another patch size."""
    from anypatch.adaptation import adapt

    candidate: Any = adapt(
        copy.deepcopy(model),
        patch_size,
        keep="image" if series == "image" else "grid",
        kernel="bicubic" if series == "bicubic" else "wiener",
    )
    if series == "random":
        draws = torch.Generator().manual_seed(0)
        torch.nn.init.normal_(candidate.patch_embed.proj.weight, std=0.02, generator=draws)
        torch.nn.init.zeros_(candidate.patch_embed.proj.bias)
    return candidate


def _resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True)


@dataclass(frozen=True)
class _Run:
    logits: Tensor
    pooled: Tensor
    tokens: Tensor


def _forward(model: Any, images: Tensor) -> _Run:
    """Logits, pooled features and final patch features of all images."""
    outputs = []
    with torch.inference_mode():
        for batch in images.split(BATCH):
            features = model.forward_features(batch)
            pooled = model.forward_head(features, pre_logits=True)
            outputs.append((model.head(pooled), pooled, features[:, model.num_prefix_tokens :]))
    return _Run(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))


def _rate(model: nn.Module, batch: Tensor) -> float:
    """Images per second of one forward pass."""
    with torch.inference_mode():
        start = time.perf_counter()
        model(batch)
        return len(batch) / (time.perf_counter() - start)


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def _groups(result: DemoResult) -> list[tuple[str, list[Row]]]:
    """The rows under their headings: the original's stands with the kept grid only."""
    groups = []
    for series, name in NAMES.items():
        rows = [row for row in result.of(series) if row.series == series]
        if rows:
            groups.append((name, rows))
    return groups


def _cells(row: Row) -> tuple[str, ...]:
    rate = "" if row.images_per_second is None else f"{row.images_per_second:,.0f}"
    return (
        str(row.patch_size),
        f"{row.image_size}×{row.image_size}",
        f"{row.grid}×{row.grid}",
        _percent(row.accuracy),
        _percent(row.same),
        f"{row.cosine:.4f}",
        rate,
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


# The report. Every string that is not markup goes through `escape`.


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
    facts = [("Original, patch 4", _percent(original.accuracy), f"of {result.images} unseen digits right")]
    for series, note in (("grid", "same grid, no training"), ("random", "as when mismatched sizes are ignored")):
        rows = [row for row in result.rows if row.series == series and row is not original]
        if rows:
            low, high = min(row.accuracy for row in rows), max(row.accuracy for row in rows)
            sizes = f"{rows[0].patch_size} to {rows[-1].patch_size}"
            span = f"{100 * low:.1f}–{_percent(high)}" if _percent(low) != _percent(high) else _percent(low)
            name = "anypatch, patch" if series == "grid" else "Kernel drawn anew, patch"
            facts.append((f"{name} {sizes}", span, note))
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
            for name, value, note in facts
        ),
        measured=escape(measured),
        key=_key(result),
        charts=_charts(result),
        rules=",\n".join(f"#d{digit}:checked ~ #p{digit}" for digit in result.views),
        picks=_picks(result),
        panels="".join(_panel(result, digit) for digit in result.views),
        table=_table(result),
        reproduce=escape("pip install 'anypatch[demo]'\nanypatch demo"),
        setup=escape(setup),
    )


def _key(result: DemoResult) -> str:
    items = []
    for series, name in NAMES.items():
        if any(row.series == series for row in result.rows):
            line = f'<polyline class="s-{series}" points="0,6 30,6"/>{_mark(series, 15, 6)}'
            items.append(f'<li><svg viewBox="0 0 30 12" aria-hidden="true">{line}</svg>{escape(name)}</li>')
    return "".join(items)


def _charts(result: DemoResult) -> str:
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
            reading = _percent(value(row)) if title == "Accuracy" else f"{value(row):,.4g}"
            note = f"{NAMES[series]}, patch {row.patch_size}: {reading}"
            mark = _mark(series, x(row.patch_size), y(value(row)), note)
            parts.append(mark)
            spoken.append(note)
    label = f"{title}, {unit}. {'; '.join(spoken)}."
    return (
        f"<figure><figcaption>{escape(title)}<span>{escape(unit)}</span></figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg></figure>'
    )


def _mark(series: Series, x: float, y: float, note: str = "") -> str:
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
    for name, rows in _groups(result):
        lines = [f'<tr><th scope="rowgroup" colspan="{len(headings)}">{escape(name)}</th></tr>']
        for row in rows:
            cells = list(_cells(row))
            cells[0] += " (original)" if row is result.original else ""
            lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
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


def _need(module: str, package: str | None = None) -> Any:
    """Import what only the demo needs, or say what to install."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise AnypatchError(
            f"the demo needs {package or module}, which is not installed: pip install 'anypatch[demo]'"
        ) from error
