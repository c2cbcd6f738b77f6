"""The report in a real browser, and the picture of `anypatch view`."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import anypatch
from anypatch.errors import AnypatchError, DataError, GeometryError
from anypatch.measure.sweep import SweepResult
from anypatch.measure.view import save_view, view
from anypatch.report import svg as html
from anypatch.report.measurements import Sample
from browser import Page, find_browser
from builders import picture, vit, write

NAUGHTY = "<script>alert(1)<img src=x onerror=alert(2)>\" ' & ü.png"
needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium: apt-get install chromium")


def row(patch: int, gflops: float, speed: float, accuracy: float, **more) -> dict:
    found = {"patch_size": patch, "image_size": 224, "tokens": (224 // patch) ** 2, "gflops": gflops}
    found |= {"images_per_second": speed, "peak_memory_mb": 100.0, "fidelity": accuracy, "patch_fidelity": 0.9}
    found |= {"neighbour_agreement": 0.8, "accuracy": accuracy, "accuracy_low": accuracy - 0.05}
    found |= {"accuracy_high": min(accuracy + 0.05, 1.0), "accuracy_by": "probe", "probe_accuracy": accuracy}
    return {**found, "probe_low": accuracy - 0.05, "probe_high": min(accuracy + 0.05, 1.0), **more}


def result() -> SweepResult:
    """Three patch sizes; the middle one is beaten by the coarse one."""
    rows = [row(7, 60.0, 2.0, 0.93), row(14, 12.0, 10.0, 0.80), row(28, 3.0, 40.0, 0.85)]
    generator = np.random.default_rng(0)
    samples = [
        Sample(
            name,
            picture((200, 30, 30), number, 112, 112),
            [generator.integers(0, 255, (224 // r["patch_size"],) * 2 + (3,)).astype(np.uint8) for r in rows],
        )
        for number, name in enumerate(["plain.png", NAUGHTY])
    ]
    settings = {"model": "</title><b>model</b>", "library": "timm", "reproduce": "anypatch sweep '<b>' --data &"}
    settings["data"] = {"test": {"name": NAUGHTY, "images": 12, "classes": 3}}
    return SweepResult(rows, row(16, 9.0, 15.0, 0.9), settings, [f"1 of 9 images cannot be read: {NAUGHTY}"], samples)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    "gflops", [(12.0, 3.0), (12.0, 11.2, 10.5), (36.1, 36.4), (36.1,), (24000.0, 21000.0, 18000.0), (9000.0, 3.0, 0.01)]
)
def test_ticks_of_the_figure_leave_each_other_room(gflops: tuple[float, ...], labelled: bool) -> None:
    """As drawn: of two sizes, of close ones, of one, of many powers of ten; at least two numbers on an axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    rows: list[Any] = [row(14 + i, cost, 120.0 / cost, 0.8) for i, cost in enumerate(gflops)]
    if not labelled:
        rows = [{**r, "accuracy": None, "fidelity": None} for r in rows]
    figure = SweepResult(rows, rows[0]).plot()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        shown = [*axis.get_majorticklabels(), *axis.get_minorticklabels()]
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in shown if text.get_text()]
        assert len(boxes) > 1
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return result().to_html(tmp_path / "report.html")


class Checker(HTMLParser):
    """Collects tags, and complains about tags that are not closed in order."""

    VOID = frozenset(("meta", "link", "img", "input", "br", "line", "path", "circle"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_asks_for_nothing(report: Path) -> None:
    checker = Checker()
    checker.feed(report.read_text())
    assert checker.open == []
    for tag, attributes in checker.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
        if tag == "img":
            assert attributes.get("alt")
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
    assert [t for t, _ in checker.tags].count("script") == 1
    assert "url(" not in report.read_text().split("<body>")[0]


def test_names_are_escaped(report: Path) -> None:
    page = report.read_text()
    assert "<script>alert" not in page
    assert "onerror=alert(2)>" not in page
    assert "<b>model" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_cheaper_size_that_is_as_good_within_the_interval_is_said(tmp_path: Path) -> None:
    found = result()
    found.rows[2]["accuracy"] = 0.89
    page = found.to_html(tmp_path / "x.html").read_text()
    assert "Patch 28 is within the 95 % interval of that, with 0.05 times its GFLOPs." in page


def test_front_and_best_are_said(report: Path) -> None:
    found = result()
    assert found.quality == "accuracy"
    assert found.pareto("gflops") == [True, False, True]
    assert found.pareto("images_per_second") == [True, False, True]
    page = report.read_text()
    assert "The best accuracy is 0.930, at patch 7 with 60 GFLOPs per image (6.7 times" in page
    assert "against 0.900 for the native model" in page
    assert "95 % interval of that" not in page
    assert page.count("Pareto front: patch 7, 28.</figcaption>") == 2
    assert len(re.findall(r'<g class="point best"', page)) == 4


def test_reports_without_images_or_with_one_size() -> None:
    from anypatch.report.page import html as page

    found = result()
    bare = SweepResult(
        [{k: None if "fid" in k or "acc" in k else v for k, v in r.items()} for r in found.rows], found.native
    )
    assert "What a patch size costs" not in page(bare)
    assert "<table>" in page(bare)
    one = SweepResult(
        found.rows[:1], found.rows[0], samples=[Sample("a", found.samples[0].image, found.samples[0].maps[:1])]
    )
    assert "What the model sees" in page(one)
    assert "nan" not in page(one)


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.99991, 1.0), (0.0, 1.0), (1e-9, 2e-9), (0.13, 0.87)])
def test_axis_ticks_enclose(low: float, high: float) -> None:
    ticks = html._linear_ticks(low, high)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert 2 <= len(ticks) <= 8
    assert len(html.log_ticks(*html._widened([low + 0.01, high + 0.01]))) <= 6


@needs_browser
def test_slider_moves_pictures_by_keyboard(report: Path) -> None:
    with Page() as page:
        page.open(report)
        assert page.value("document.getElementById('size').textContent") == "14"
        before = page.value("[...document.querySelectorAll('.map')].map(i => i.src)")
        page.value("document.getElementById('patch').focus()")
        page.press("ArrowRight", 39)
        assert page.value("document.getElementById('patch').value") == "2"
        assert page.value("document.getElementById('size').textContent") == "28"
        after = page.value("[...document.querySelectorAll('.map')].map(i => i.src)")
        assert len(before) == len(after) == 2
        assert all(a != b for a, b in zip(before, after, strict=True))
        assert page.value("document.querySelector('.map').naturalWidth") == 8
        assert page.value("document.querySelector('.grid').getAttribute('viewBox')") == "0 0 8 8"
        assert "patch size 28" in page.value("document.querySelector('.map').alt")
        assert "3 GFLOPs" in page.value("document.getElementById('says').textContent")
        assert "patch size 28" in page.value("document.getElementById('patch').getAttribute('aria-valuetext')")
        assert page.value("document.querySelectorAll('g.on').length") == 2
        assert page.value("document.querySelector('tr.on th').textContent") == "28"
        page.press("Home", 36)
        assert page.value("document.getElementById('size').textContent") == "7"
        page.value("document.querySelectorAll('.thumbs')[1].children[1].click()")
        assert page.value("document.getElementById('patch').value") == "1"
        assert (
            page.value("[...document.querySelectorAll('[aria-pressed=true]')].map(b => b.dataset.index).join()")
            == "1,1"
        )
        assert page.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert page.requests == [report.as_uri()]
        assert page.console == []


@needs_browser
def test_names_reach_the_page_as_text(report: Path) -> None:
    with Page() as page:
        page.open(report)
        captions = page.value("[...document.querySelectorAll('.sample figcaption')].map(c => c.textContent)")
        assert captions == ["plain.png", NAUGHTY]
        assert page.value("document.querySelectorAll('script').length") == 1
        assert page.value("document.title") == "Patch sizes of </title><b>model</b>"
        assert page.console == []


LUMINANCE = """(() => {
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const parse = c => c.match(/[0-9.]+/g).slice(0, 3).map(v => linear(v / 255));
  const light = c => { const [r, g, b] = parse(c); return .2126 * r + .7152 * g + .0722 * b; };
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!c.startsWith('rgba(') ) return c; } return 'rgb(255,255,255)'; };
  const found = [];
  const all = 'h1,h2,p,li,td,th,dt,dd,small,figcaption,summary,label,output,code,.curve text';
  for (const e of document.querySelectorAll(all)) {
    if (!e.textContent.trim() || e.closest('[hidden]')) continue;
    const style = getComputedStyle(e), ink = e.closest('svg') ? style.fill : style.color;
    const [a, b] = [light(ink), light(ground(e))].sort((x, y) => y - x);
    found.push((a + .05) / (b + .05));
  }
  return Math.min(...found);
})()"""


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_readable_on_a_phone_light_and_dark(report: Path, dark: bool) -> None:
    with Page(360, 740, dark=dark) as page:
        page.open(report)
        assert page.value("document.documentElement.scrollWidth") <= 360
        assert page.value("Math.min(...[...document.querySelectorAll('button')].map(b => b.offsetHeight))") >= 24
        assert page.value("parseFloat(getComputedStyle(document.body).fontSize)") >= 16
        assert page.value(LUMINANCE) >= 4.5
        paper = page.value("getComputedStyle(document.documentElement).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == dark


@needs_browser
def test_everything_is_reached_by_tab(report: Path) -> None:
    with Page() as page:
        page.open(report)
        reached = []
        for _ in range(12):
            page.press("Tab", 9)
            reached.append(page.value("document.activeElement.id || document.activeElement.tagName"))
        assert reached[0] == "patch"
        assert reached.count("BUTTON") == 6
        assert {"DIV", "SUMMARY", "PRE"} <= set(reached)


def small() -> nn.Module:
    return vit(depth=1, num_classes=1000)


def test_view(tmp_path: Path) -> None:
    image = write(tmp_path / "a.png", (200, 30, 30), 0)
    drawn = view(small(), image, [4, 8, 16], cell=128)
    assert drawn.size == (3 * (128 + 12) + 12, 128 // 5 + 2 * (128 + 12) + 12)
    pixels = np.array(drawn)
    for column, count in enumerate((8, 4, 2)):  # the lower picture is made of squares of one colour
        left, top = 12 + column * 140, 25 + 12 + 128 + 12
        part = pixels[top : top + 128, left : left + 128]
        cells = part.reshape(count, 128 // count, count, 128 // count, 3)
        assert (cells == cells[:, :1, :, :1]).all()
        assert len(np.unique(part.reshape(-1, 3), axis=0)) > count
    assert save_view(drawn, tmp_path / "sub" / "out.png").is_file()


def test_view_shows_the_reference_and_the_fidelity_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anypatch import sweep
    from anypatch.measure import view as room

    model, image = small(), write(tmp_path / "images" / "a.png", (200, 30, 30), 0)
    below = slice(128 // 5, None)  # the heads say other things
    two, with_it = view(model, image, [8, 4], cell=128), view(model, image, [4], reference="native", cell=128)
    assert np.array_equal(np.array(two)[below], np.array(with_it)[below])
    (row,) = sweep(model, [4], images=tmp_path / "images", cache=False, num_workers=0, progress=False).rows
    monkeypatch.setattr(room, "_sheet", lambda views, maps, heads, cell: heads)
    heads = view(model, image, [4, 8], reference="native")
    assert [head for head, _ in heads] == [f"patch 4, fidelity {row['patch_fidelity']:.3f}", "patch 8 (reference)"]
    assert [head for head, _ in view(model, image, [8], image_size=64, reference="asked")] == ["patch 8 (reference)"]


def test_view_errors(tmp_path: Path) -> None:
    image = write(tmp_path / "a.png", (200, 30, 30), 0)
    (tmp_path / "b.png").write_bytes(b"nothing")
    for name, said in (("b.png", "cannot be read as an image"), ("c.png", "does not exist")):
        with pytest.raises(DataError, match=said):
            view(small(), tmp_path / name, [8])
    with pytest.raises(GeometryError, match="does not divide"):
        view(small(), image, [5])
    with pytest.raises(AnypatchError, match="reference must be"):
        view(small(), image, [8], reference="other")  # type: ignore[arg-type]
    with pytest.raises(AnypatchError, match="ending"):
        save_view(Image.new("RGB", (4, 4)), tmp_path / "out.xyz")


@pytest.fixture
def command():
    import typer

    from anypatch.cli.comparing import register

    app = typer.Typer()
    register(app)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_command_line(tmp_path: Path, command) -> None:
    anypatch.save(small(), tmp_path / "model")
    for index in range(6):
        write(tmp_path / "images" / f"{index}.png", (200, 30, 30), index)
    output, source = tmp_path / "out", f"timm:local-dir:{tmp_path / 'model'}"
    common = ["--patch-size", "4,8,16x8", "--image-size", "64"]
    ran = command(
        "sweep",
        source,
        *common,
        "--images",
        tmp_path / "images",
        "--output",
        output,
        "--no-cache",
        "--workers",
        "0",
        "--batch-size",
        "2",
    )
    assert ran.exit_code == 0, ran.output
    assert {p.name for p in output.iterdir()} == {"sweep.json", "sweep.csv", "report.html"}
    assert "16x8" in ran.output
    ran = command("view", source, tmp_path / "images" / "0.png", *common, "--output", tmp_path / "v.png")
    assert ran.exit_code == 0, ran.output
    assert Image.open(tmp_path / "v.png").width > 700


@pytest.mark.parametrize(
    ("sizes", "says"), [("8,", "sizes with commas"), ("eight", "sizes with commas"), ("0", "positive"), ("8x", "sizes")]
)
def test_command_line_errors(tmp_path: Path, command, sizes: str, says: str) -> None:
    anypatch.save(small(), tmp_path / "model")
    ran = command("sweep", f"timm:local-dir:{tmp_path / 'model'}", "--patch-size", sizes, "--output", tmp_path / "out")
    assert isinstance(ran.exception, AnypatchError)
    assert says in str(ran.exception)
