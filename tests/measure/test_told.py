"""What a sweep says of its numbers: what they are measured against, when and where, and how far it is."""

from __future__ import annotations

import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import anypatch
import builders
from anypatch.adaptation import describe
from anypatch.errors import AnypatchError, GeometryError
from anypatch.measure import cost
from anypatch.measure.cost import Cost, take_turns
from anypatch.measure.features import Reader, at_geometry
from anypatch.measure.fingerprint import fingerprint
from anypatch.measure.sweep import SweepResult
from anypatch.measure.targets import Asked, targets_of
from anypatch.report.progress import EVERY, Lines, duration, shown_progress
from builders import write


@pytest.fixture(autouse=True)
def _timed_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "ENOUGH", 0.0)


def vit(**options) -> nn.Module:
    return builders.vit(**{"img_size": 56, "patch_size": 14, "depth": 1, **options})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for index in range(4):
        write(root / f"{index}.png", (200, 30, 30), index)
    return root


def sweep(model, sizes, **options) -> SweepResult:
    options = {"num_workers": 0, "batch_size": 4, "device": "cpu", "progress": False, "cache": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return anypatch.sweep(model, sizes, **options)


# -- the reference ---------------------------------------------------------------------------------------------


def test_fidelity_is_measured_at_the_asked_image_size(images: Path) -> None:
    found = sweep(vit(), [14, 28], image_size=84, images=images)
    assert found.native["image_size"] == 84
    assert found.native["patch_size"] == 14
    assert found.rows[0]["fidelity"] == pytest.approx(1, abs=1e-6)
    native = sweep(vit(), [14, 28], image_size=84, images=images, reference="native")
    assert native.native["image_size"] == 56
    assert native.rows[0]["fidelity"] < 0.9999
    assert native.rows[1]["fidelity"] != found.rows[1]["fidelity"]
    for result, says in (
        (found, "the native patch 14 at image 84"),
        (native, "the model as it is: patch 14 at image 56"),
    ):
        assert result.settings["reference"] == says
        assert says in result.to_html(images.parent / "report.html").read_text()


def test_the_native_model_is_not_run_unasked(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    read = Reader.__call__
    monkeypatch.setattr(Reader, "__call__", lambda self, x: (seen.add(tuple(x.shape[-2:])), read(self, x))[1])
    sweep(vit(), [14, 28], image_size=84, images=images)
    assert seen == {(84, 84)}


def test_an_image_size_that_the_native_patch_does_not_divide(images: Path) -> None:
    found = sweep(vit(), [16], image_size=64, images=images)
    assert found.native["image_size"] == 70
    assert any("nearest to 64" in note for note in found.notes)
    assert found.rows[0]["image_size"] == 64
    wide = targets_of(describe(vit()), Asked([16], (64, 80)))
    assert wide.reference.image_size == (70, 84)


def test_references_that_are_none() -> None:
    with pytest.raises(AnypatchError, match="reference must be"):
        sweep(vit(), [14], reference="other")
    with pytest.raises(GeometryError) as error:
        sweep(vit(), [7, 14, 28], keep="foo")
    assert str(error.value).count("foo") == 1


def test_without_an_image_size_the_reference_is_the_model() -> None:
    for asked in (Asked([7]), Asked([7], keep="grid"), Asked([16], "nearest")):
        found = targets_of(describe(vit()), asked)
        assert found.reference == found.native == anypatch.geometry(vit())


# -- time ------------------------------------------------------------------------------------------------------


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gets slower with every pass is as slow for the first as for the last."""
    monkeypatch.setattr(cost, "ENOUGH", 0.0)
    clock = iter(np.arange(1000) ** 2 / 1e3)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: float(next(clock)))
    order: list[int] = []
    pixels = torch.zeros(4, 3, 8, 8)
    costs = [Cost(1, 1.0, 1.0, 4, {}) for _ in range(3)]
    take_turns([(lambda x, i=i: order.append(i), pixels, c) for i, c in enumerate(costs)])  # type: ignore[misc]
    assert order == [0, 1, 2] * cost.TURNS
    for one in costs:
        columns = one.columns()
        assert columns["images_per_second_low"] < columns["images_per_second"] < columns["images_per_second_high"]
        assert columns["images_per_second"] == pytest.approx(4 / np.median(one.seconds))


def test_a_long_pass_is_timed_once() -> None:
    assert Cost(1, 1.0, 1.0, 1, {}, [cost.LONG + 1]).done
    assert not Cost(1, 1.0, 1.0, 1, {}, [0.1]).done


def test_time_is_of_this_run(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sweep(vit(), [14, 28], images=images, cache=tmp_path)
    monkeypatch.setattr(cost, "_seconds", lambda reader, pixels: 123.0)
    second = sweep(vit(), [14, 28], images=images, cache=tmp_path)
    assert [row["images_per_second"] for row in second.rows] == [4 / 123.0] * 2
    assert [row["fidelity"] for row in second.rows] == [row["fidelity"] for row in first.rows]
    assert not list(tmp_path.rglob("*.json"))
    page = second.to_html(tmp_path / "report.html").read_text()
    assert second.settings["timed"][:2] == "20"
    for told in (second.settings["device"], second.settings["timed"], "batch 4"):
        assert str(told) in page


# -- memory ----------------------------------------------------------------------------------------------------


def test_models_side_by_side_share_what_does_not_follow() -> None:
    model = vit()
    before = fingerprint(model)
    subject = describe(model)
    faces = [
        at_geometry(subject, target, "wiener", "antialias") for target in targets_of(subject, Asked([7, 28])).targets
    ]
    for face, patch in zip(faces, (7, 28), strict=True):
        fresh = anypatch.adapt(vit(), patch)
        pixels = torch.randn(2, 3, 56, 56)
        assert torch.equal(face(pixels), fresh(pixels))
        shared = {n for n, p in face.named_parameters() if p is dict(model.named_parameters())[n]}
        assert set(dict(model.named_parameters())) - shared == {"patch_embed.proj.weight", "pos_embed"}
    assert fingerprint(model) == before


def test_the_model_and_the_random_numbers_are_left_as_they_were(images: Path) -> None:
    model = vit().train()
    before, state = fingerprint(model), torch.get_rng_state()
    sweep(model, [7, 28], images=images)
    assert fingerprint(model) == before
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


# -- progress --------------------------------------------------------------------------------------------------


def test_lines_come_every_ten_seconds() -> None:
    said: list[str] = []
    now = [0.0]
    lines = Lines(said.append, lambda: now[0])
    for second in range(35):
        now[0] = float(second)
        lines("patch 7, images", second, 100)
    assert said == [f"patch 7, images: {s} of 100, after {s} s" for s in (10, 20, 30)]
    assert EVERY == 10
    assert [duration(s) for s in (8, 200, 7500)] == ["8 s", "3 min 20 s", "2 h 5 min"]


def test_what_is_shown_inside_of_another_is_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[tuple[str, int, int]] = []
    with shown_progress(lambda *what: said.append(what)):
        with shown_progress(None) as inner:
            inner("writing", 1, 2)
        with shown_progress(False) as silent:
            silent("writing", 2, 2)
            with shown_progress(None) as still:
                still("writing", 2, 2)
    assert said == [("writing", 1, 2)]
    with shown_progress(None) as after:
        assert isinstance(after, Lines)


def test_progress_false_is_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anypatch.report.progress.EVERY", 0.0)
    sweep(vit(), [14])
    assert capsys.readouterr().err == ""
    sweep(vit(), [14], progress=None)
    assert "timing" in capsys.readouterr().err


def test_a_notebook_has_an_element(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("IPython")
    import IPython.display

    shown = []

    class Handle:
        def update(self, value: object) -> None:
            shown.append(value)

    monkeypatch.setattr(IPython.display, "display", lambda value, display_id: (shown.append(value), Handle())[1])
    monkeypatch.setattr("anypatch.report.progress._in_notebook", lambda: True)
    with shown_progress(None) as progress:
        progress("<b>", 0, 4)
        progress("<b>", 4, 4)
    assert [value.data for value in shown] == [
        f'<progress value="{done}" max="4"></progress> &lt;b&gt;: {done} of 4' for done in (0, 4)
    ]


# -- notebooks -------------------------------------------------------------------------------------------------


class Balanced(HTMLParser):
    VOID = frozenset(("br", "line", "path", "circle", "polyline"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def balanced(page: str) -> str:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    return page


def test_results_show_themselves(images: Path) -> None:
    found = sweep(vit(), [14, 28], images=images)
    page = balanced(found._repr_html_())
    assert page.count("<tr") == 3
    assert page.count("<svg") == 2
    assert "<script" not in page
    assert repr(found).startswith("SweepResult(")
    assert len(repr(found)) < 120
    assert "gflops" not in repr(found)
    found.settings["model"] = "<script>alert(1)</script>"
    assert "<script" not in found._repr_html_()
    bare = balanced(sweep(vit(), [14, 28])._repr_html_())
    assert bare.count("<svg") == 0


def test_geometry_and_check_show_themselves() -> None:
    geometry = balanced(anypatch.geometry(vit())._repr_html_())
    assert '<th scope="row">patch size</th><td>14' in geometry
    assert '<th scope="row">grid</th><td>4' in geometry
    check = balanced(anypatch.check(vit(), 28)._repr_html_())
    assert '<th scope="row">passed</th><td>yes' in check


def test_the_report_shows_no_more_than_the_model_sees(images: Path) -> None:
    grown = sweep(vit(), [7, 28], keep="grid", images=images)
    assert [view.shape[:2] for view in grown.samples[0].views] == [(28, 28), (112, 112)]
    page = grown.to_html(images.parent / "report.html").read_text()
    assert page.count("data-photo=") == 2 * len(grown.samples)
    same = sweep(vit(), [7, 28], image_size=28, images=images, reference="native")
    assert same.samples[0].image.shape[:2] == (28, 28)
    assert same.samples[0].views == []


def test_a_random_model_is_swept_only_on_request() -> None:
    open_clip = pytest.importorskip("open_clip")
    assert "RN50" in open_clip.list_models()
    with pytest.raises(AnypatchError, match="pretrained"):
        sweep("open_clip:ViT-B-32", [32])


def test_failed_sweeps_leave_no_folder(tmp_path: Path) -> None:
    for wrong in ({"images": "nowhere"}, {"image_size": 13}):
        with pytest.raises(AnypatchError):
            sweep(vit(), [14], output=tmp_path / "a" / "b", **wrong)
    assert list(tmp_path.iterdir()) == []
