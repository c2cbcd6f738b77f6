"""The demo: its asset is what it says, its numbers are measured, its report stands alone."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from io import BytesIO, StringIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

pytest.importorskip("timm")
pytest.importorskip("sklearn")

import timm
from sklearn.datasets import load_digits

import anypatch
from anypatch import demo
from anypatch.demo.rows import NAMES
from anypatch.demo.webpage import _png


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "demo.html"
    steps = []
    result = demo.run_demo(
        (2, 5, 8, 16), output=path, images=60, progress=lambda done, total: steps.append((done, total))
    )
    return result, path.read_text(encoding="utf-8"), steps


def test_asset_is_small_and_ordinary_timm():
    """Built with timm alone, from the metadata alone; the stated accuracy is found on an independent split."""
    assert demo.ASSET.stat().st_size < 2_000_000
    with safe_open(demo.ASSET, "pt") as file:
        metadata = file.metadata()
    model = timm.create_model(metadata["architecture"], **json.loads(metadata["model_args"])).eval()
    model.load_state_dict(load_file(demo.ASSET), strict=True)

    data = load_digits()
    held_out = np.random.RandomState(0).permutation(1797)[:599]
    small = torch.from_numpy(data.images[held_out] / 16).float().unsqueeze(1)
    images = F.interpolate(small, (32, 32), mode="bicubic", align_corners=False) * 2 - 1
    with torch.no_grad():
        right = (model(images).argmax(-1).numpy() == data.target[held_out]).mean()
    assert int(metadata["held_out_images"]) == 599
    assert right == pytest.approx(float(metadata["held_out_accuracy"]), abs=1e-4 + 1 / 599)
    assert right >= 0.98


def test_training_and_held_out_digits_are_disjoint_and_complete():
    (train, _), (held_out, _) = demo.digits("train"), demo.digits("held out")
    assert len(train) + len(held_out) == 1797
    distances = torch.cdist(train.flatten(1), held_out.flatten(1))
    assert distances.min() > 0.1


def test_demo_model_loads_the_asset():
    state = demo.demo_model().state_dict()
    stored = load_file(demo.ASSET)
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert not demo.demo_model().training


def test_numbers_are_measured(report):
    result, _, steps = report
    assert steps == [(i + 1, len(steps)) for i in range(len(steps))]
    assert len(steps) >= len(result.rows)
    assert {(row.series, row.patch_size) for row in result.rows} == {
        ("grid", 4),
        *(("grid", p) for p in (2, 5, 8, 16)),
        *(("image", p) for p in (2, 8, 16)),
        *(("bicubic", p) for p in (2, 5, 8, 16)),
        *(("random", p) for p in (2, 5, 8, 16)),
    }
    assert result.original.same == 1
    assert result.original.cosine == pytest.approx(1)
    assert len({row.cosine for row in result.rows}) == len(result.rows)
    for row in result.rows:
        assert row.image_size == (32 if row.series == "image" else 8 * row.patch_size)
        assert (row.images_per_second is not None) == (row.series in ("grid", "image"))


def test_one_row_against_a_computation_of_its_own(report):
    result, _, _ = report
    row = next(row for row in result.rows if (row.series, row.patch_size) == ("grid", 5))
    images, labels = (part[:60] for part in demo.demo_data())
    model, original = demo.demo_model(), demo.demo_model()
    anypatch.adapt(model, patch_size=5, image_size=40)
    larger = F.interpolate(images, (40, 40), mode="bicubic", antialias=True)
    with torch.no_grad():
        logits, reference = model(larger), original(images)
        tokens = model.forward_features(larger)[:, 1:].mean(1), original.forward_features(images)[:, 1:].mean(1)
        cosine = F.cosine_similarity(*(model.fc_norm(t) for t in tokens)).mean()
    assert row.accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert row.same == pytest.approx((logits.argmax(1) == reference.argmax(1)).float().mean().item())
    assert row.cosine == pytest.approx(cosine.item(), abs=1e-5)


def test_the_grid_kept_keeps_the_function_and_a_new_kernel_loses_it(report):
    result, _, _ = report
    original = result.original
    for row in result.rows:
        if row.series == "grid" and row.patch_size > 2:
            assert row.cosine > 0.99
            assert row.accuracy >= original.accuracy - 0.05
        if row.series == "random":
            assert row.accuracy < original.accuracy - 0.3


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_report_asks_the_network_for_nothing(report):
    _, text, _ = report
    page = _Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]*", "", text))
    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("iframe")
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))


def test_report_is_readable_without_pictures(report):
    result, text, _ = report
    page = _Page(text)
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("img")
    assert all(image.get("alt") for image in page.all("img"))
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or (svg["role"] == "img" and svg["aria-label"])
    assert len(page.all("h1")) == 1
    charts = " ".join(svg["aria-label"] for svg in page.all("svg") if "aria-label" in svg)
    for words in ("Accuracy, share of digits", "pooled features", "images per second"):
        assert words in charts
    for row in result.rows:
        assert f"{NAMES[row.series]}, patch {row.patch_size}: {100 * row.accuracy:.1f}%" in charts
    labels = {label["for"] for label in page.all("label")}
    assert labels == {radio["id"] for radio in page.all("input")}
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert "$" not in re.sub(r"base64,[^\"]*", "", text)


def test_report_shows_the_numbers(report):
    result, text, _ = report
    for row in result.rows:
        assert f"<td>{row.cosine:.4f}</td>" in text
    assert text.count("(original)") == 1
    assert text.count("px, original") == 2 * len(result.views)


def test_table_shows_every_row(report):
    from rich.console import Console

    result, _, _ = report
    console = Console(width=80, record=True, file=StringIO())
    console.print(demo.table(result))
    shown = console.export_text()
    for row in result.rows:
        assert f"{row.cosine:.4f}" in shown
        assert NAMES[row.series] in shown


def test_pictures_are_png():
    image = pytest.importorskip("PIL.Image")
    grey = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    colour = torch.arange(24, dtype=torch.uint8).reshape(2, 4, 3)
    for pixels in (grey, colour):
        assert np.array_equal(np.asarray(image.open(BytesIO(_png(pixels)))), pixels.numpy())


def test_strings_are_escaped(report, monkeypatch):
    result, _, _ = report
    monkeypatch.setitem(NAMES, "grid", "<script>&")
    text = demo.page(result)
    assert "<script>" not in text
    assert "&lt;script&gt;&amp;" in text


@pytest.mark.parametrize(("module", "package"), [("timm", "timm"), ("sklearn.datasets", "scikit-learn")])
def test_missing_packages_are_named(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(anypatch.AnypatchError, match=rf"needs {package}.*pip install 'anypatch\[demo\]'"):
        demo.run_demo((8,), output=None, images=10)


def test_errors_come_before_the_work(tmp_path):
    with pytest.raises(anypatch.AnypatchError, match="is not a directory"):
        demo.run_demo((8,), output=tmp_path / "nowhere" / "demo.html", images=10)
    with pytest.raises(anypatch.GeometryError):
        demo.run_demo((0,), output=None, images=10)
