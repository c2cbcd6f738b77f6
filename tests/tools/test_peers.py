"""`make peers`: what counts, what is explained, what is a fault; a run goes on where it was; one small run, whole."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from transformers import ViTConfig, ViTModel, ViTPreTrainedModel

from peers import adapting, choice, explained, page, running
from peers.adapting import UNFED
from peers.page import document, verdict
from peers.running import CRASHED, Peer, Run, read, run

PLAIN = Run(
    outcomes={
        "same": ("passed", ""),
        "literal": ("passed", ""),
        "wrong": ("passed", ""),
        "large": ("passed", ""),
        "no model": ("passed", ""),
        "red before": ("failed", "no network"),
        "refused": ("passed", ""),
    },
    known={"same", "literal", "wrong", "large", "red before", "refused"},
)
FOUND = Run(
    outcomes={
        "same": ("passed", ""),
        "literal": ("failed", "assert 14 == 7"),
        "wrong": ("failed", "nan"),
        "large": ("skipped", "Fixed input size model > limit."),
        "red before": ("failed", "no network"),
        "refused": ("passed", ""),
    },
    changed={"same", "literal", "wrong", "large", "red before"},
)


@pytest.fixture
def one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explained, "ROWS", (("timm", "", "lit.*", r"14 == 7", "expects a grid of 7"),))


@pytest.mark.usefixtures("one_row")
def test_what_fails_only_on_adapted_models_is_explained_or_a_fault() -> None:
    found = verdict("timm", "grid", PLAIN, FOUND)
    assert found.tests == {"same", "literal", "wrong", "large"}
    assert found.passed == {"same"}
    assert found.explained == {"literal": "expects a grid of 7"}
    assert found.skipped == {"large": "Fixed input size model > limit."}
    assert found.faults == {"wrong": "nan"}
    assert not found.unrun


def test_a_row_explains_its_own_message_only() -> None:
    row = ("timm", "grid", "^literal$", "^assert 14 == 7", "expects a grid of 7")
    for name, mode, test, message, explains in (
        ("timm", "grid", "literal", "assert 14 == 7", True),
        ("timm", "grid", "literal", "nan", False),
        ("timm", "back", "literal", "assert 14 == 7", False),
        ("open_clip", "grid", "literal", "assert 14 == 7", False),
        ("timm", "grid", "wrong", "assert 14 == 7", False),
    ):
        assert (explained.explanation(name, mode, test, message, (row,)) is not None) == explains


def test_a_refusal_that_breaks_the_test_is_a_fault() -> None:
    broken = Run(outcomes={**FOUND.outcomes, "refused": ("failed", "half changed")}, changed=FOUND.changed)
    assert "half changed" in verdict("timm", "grid", PLAIN, broken).faults["refused"]


def test_what_was_not_run_is_said() -> None:
    part = Run(outcomes={"same": ("passed", "")}, changed={"same"})
    assert verdict("timm", "grid", PLAIN, part).unrun == {"literal", "wrong", "large", "refused"}


def test_what_fails_at_the_same_line_of_a_model_built_by_the_library_is_explained() -> None:
    failing = {"wrong": ("failed", "nan [t.py:7]"), "literal": ("failed", "14 [t.py:9]"), "large": ("failed", "x")}
    found = Run(outcomes=failing, changed=set(failing))
    built = Run(outcomes={"wrong": ("failed", "inf [t.py:7]"), "literal": ("failed", "14 [t.py:8]"), "large": CRASHED})
    outcome = verdict("timm", "grid", PLAIN, found, built)
    assert outcome.explained == {"wrong": page.BUILT}
    assert set(outcome.faults) == {"literal", "large"}


@pytest.mark.usefixtures("one_row")
def test_the_page_counts_and_names() -> None:
    peer = Peer("timm", "timm", ())
    text, faults = document({(peer, "none"): PLAIN, (peer, "grid"): FOUND})
    assert faults == 1
    assert f"| timm | {page.SAID['grid']} | 4 | 1 | 1 | 1 | 1 |" in text
    assert "`wrong`: `nan`" in text
    assert "1 test: expects a grid of 7" in text
    assert f"timm {metadata.version('timm')}" in text
    assert "run on an earlier state of anypatch's code" in text
    assert page.PART in text


@pytest.mark.usefixtures("one_row")
def test_a_page_of_one_library_leaves_what_is_said_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Peer("timm", "timm", ()), Peer("open_clip", "open_clip_torch", ())
    monkeypatch.setattr(page, "PEERS", (first, second))
    whole = Run({"same": ("passed", "")}, known={"same"}, changed={"same"}, finished=True, code=running.code())

    def both(one: Run, other: Run, plain: Run = PLAIN) -> str:
        runs = {(first, "none"): PLAIN, (first, "grid"): one, (second, "none"): plain, (second, "grid"): other}
        return document(runs)[0]

    empty, old, new = both(Run(), FOUND, whole), both(FOUND, Run(), whole), both(FOUND, FOUND, whole)
    assert page.kept(new, new, ["timm"]) == page.kept(new, empty, ["open_clip"]) == new
    assert page.kept(old, empty, ["open_clip"]) == new
    alone = document({(second, "none"): whole, (second, "grid"): FOUND})[0]
    assert page.kept(old, alone, ["open_clip"]) == new
    assert page.PART in new
    done = document({(first, "none"): whole, (first, "grid"): whole})[0]
    assert page.PART not in done
    assert (
        page.kept(done.replace(first.version, "timm 0"), document({(second, "none"): whole})[0], ["open_clip"])
        == (document({(second, "none"): whole})[0])
    )


def test_the_place_of_a_failure_is_in_the_test_or_the_library() -> None:
    """Thousands fail in one line of unittest: that line is no sign of the same failure."""

    def at(path: str, lineno: int) -> SimpleNamespace:
        return SimpleNamespace(reprfileloc=SimpleNamespace(path=path, lineno=lineno))

    entries = [at("tests/test_x.py", 3), at("/python/unittest/case.py", 715)]
    crash = SimpleNamespace(message="False is  not true", path="/python/unittest/case.py", lineno=715)
    traceback = SimpleNamespace(reprentries=entries)
    report: Any = SimpleNamespace(longrepr=SimpleNamespace(reprcrash=crash, reprtraceback=traceback))
    assert adapting._last_line(report) == "False is not true [test_x.py:3]"
    entries.append(at("/site-packages/timm/layers.py", 9))
    entries.append(at("/site-packages/torch/nn/modules/conv.py", 560))
    assert adapting._last_line(report) == "False is not true [layers.py:9]"


def test_a_test_one_of_whose_parts_fails_as_it_is_says_nothing() -> None:
    lines: list[dict[str, Any]] = [{"started": "a"}, {"known": "Vit"}]
    lines += [{"test": "a", "outcome": outcome, "last": ""} for outcome in ("failed", "passed")]
    assert adapting._telling(lines) == set()
    assert adapting._telling([*lines[:2], lines[3]]) == {"a"}


def test_a_cut_file_of_results_is_read_to_where_it_goes(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"of": ["timm 1", ""]},
        {"started": "a"},
        {"adapted": "Vit"},
        {"test": "a", "outcome": "passed", "last": ""},
        {"test": "a", "outcome": "failed", "last": "in its teardown"},
        {"started": "b"},
        {"refused": "Net", "why": "a stem"},
        {"uncollected": "test_c.py", "last": "no module d"},
        {"started": "x.py::TestLlava::test_b"},
        {"test": "x.py::TestLlava::test_b", "outcome": "skipped", "last": f"Skipped: {UNFED}"},
    ]
    target = tmp_path / "x.jsonl"
    target.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"test": "b", "outc')
    found = read(target)
    assert found.outcomes["a"] == ("failed", "in its teardown")
    assert found.outcomes["b"] == CRASHED
    assert found.unfed == {"TestLlava"}
    assert found.changed == {"a"}
    assert found.whys == {"Net": "a stem"}
    assert found.uncollected == {"test_c.py": "no module d"}
    assert not found.finished


def test_the_models_of_the_coverage_run_stand_for_the_library() -> None:
    names = choice.CHOICE["timm"]()
    assert {"cait_xxs24_224", "vit_small_patch14_reg4_dinov2"} <= set(names) <= set(timm.list_models())
    assert "resnet18" not in names


TESTS = """
import os
from pathlib import Path

import pytest
import timm
import torch

HERE = Path(__file__).parent


@pytest.mark.parametrize("model_name", ["test_vit", "resnet10t"])
def test_forward(model_name):
    model = timm.create_model(model_name)
    assert model(torch.randn(1, *model.default_cfg["input_size"])).shape == (1, 1000)


def test_literal():
    assert timm.create_model("test_vit").patch_embed.num_patches == 100


@pytest.mark.parametrize("model_name", [f"x{i}" for i in range(70)] + ["test_vit"])
def test_every(model_name):
    timm.create_model(model_name)


def test_without_a_model():
    assert True


def test_that_ends_the_process():
    timm.create_model("test_vit")
    if os.environ["ANYPATCH_PEERS"] != "none":
        os._exit(3)
"""


def test_of_models_inside_each_other_the_outermost_is_adapted_and_as_a_control_built_at_its_sizes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built: list[int] = []

    class Tower(ViTModel):
        pass

    class Whole(ViTPreTrainedModel):
        def __init__(self, config: ViTConfig) -> None:
            super().__init__(config)
            self.tower = Tower(config)
            self.post_init()
            if self.device.type != "meta":
                built.append(config.patch_size)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.tower(pixel_values).last_hidden_state

    result = tmp_path / "x.jsonl"
    monkeypatch.setenv("ANYPATCH_PEERS", "image")
    monkeypatch.setenv("ANYPATCH_PEERS_RESULT", str(result))
    adapting.adapt_on_construction(Tower)
    adapting.adapt_on_construction(Whole)
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32,
                       patch_size=4)  # fmt: skip
    for control in (False, True):
        if control:
            monkeypatch.setenv(adapting.FAILED, "")
        built.clear()
        model = Whole(config)
        assert adapting.results(result) == [{"adapted": "Whole"}]
        assert (model.config.patch_size, config.patch_size) == (8, 4)
        assert model.tower.embeddings.position_embeddings.shape == (1, 17, 16)
        assert model.tower.embeddings.patch_embeddings.projection.kernel_size == (8, 8)
        assert built.count(8) == 1 + control  # a twin, and the control itself
        assert Whole(model.config).config.patch_size == 8  # of what was saved another is built as it is
        result.unlink()


@pytest.mark.long
def test_one_small_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a fake archive: its tests as they are, and on models with half the patch."""
    source = tmp_path / f"timm-{metadata.version('timm')}"
    (source / "tests").mkdir(parents=True)
    (source / "tests" / "test_models.py").write_text(TESTS)
    monkeypatch.setattr(running, "CACHE", tmp_path)
    peer = Peer("timm", "timm", ("tests",), all_models=True)
    monkeypatch.setitem(choice.CHOICE, "timm", lambda: ["test_vit"])

    said: list[str] = []
    plain = run(peer, "none", say=said.append)
    assert plain.finished
    assert {name.split("::")[1] for name in plain.telling} == {
        "test_forward[test_vit]",
        "test_literal",
        "test_every[test_vit]",
        "test_that_ends_the_process",
    }
    assert not plain.of("failed")  # those of the seventy that are not chosen did not run
    found = run(peer, "grid", say=said.append)
    assert found.finished
    assert set(found.outcomes) == plain.telling
    assert {name.split("::")[1] for name in found.changed} == {name.split("::")[1] for name in plain.telling}
    outcome = verdict("timm", "grid", plain, found)
    assert {name.split("::")[1] for name in outcome.passed} == {
        "test_forward[test_vit]",
        "test_literal",
        "test_every[test_vit]",
    }
    assert list(outcome.faults.values()) == ["the process ended"]
    turned = run(peer, "image", say=said.append)
    assert "assert" in verdict("timm", "image", plain, turned).faults["tests/test_models.py::test_literal"]
    # A second call runs nothing more.
    count = len(said)
    assert run(peer, "grid", say=said.append).outcomes == found.outcomes
    assert len(said) == count


def test_libraries_and_modes_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a run that is cut short has done is spread over all of them."""
    from peers import __main__ as peers

    first, second = Peer("first", "timm", ()), Peer("second", "timm", ())
    monkeypatch.setattr(peers, "PEERS", (first, second))
    monkeypatch.setattr(running, "CACHE", tmp_path)
    left = {("first", "none"): 3, ("first", "grid"): 2, ("first", "grid, built"): 0, ("second", "grid"): 1}
    turns = []

    def fake(peer: Peer, mode: str, select: str, chunks: int, control: bool) -> Run:
        assert chunks == 1
        name = (peer.name, mode + ", built" * control)
        if left.get(name, 0):
            left[name] -= 1
            turns.append(name)
            with running.result_file(peer, mode, select, control).open("a") as file:
                file.write(json.dumps({"started": str(len(turns))}) + "\n")
        return Run()

    monkeypatch.setattr(peers, "run", fake)
    peers.main(["--mode", "grid", "--nice", "0"])
    assert turns == [
        *[("first", "none"), ("first", "grid"), ("second", "grid")],
        *[("first", "none"), ("first", "grid")],
        ("first", "none"),
    ]
    left["first", "none"] = 3
    peers.main(["--mode", "grid", "--nice", "0", "--chunks", "2"])
    assert left["first", "none"] == 1
    peers.main(["--mode", "grid", "--nice", "0", "--adapted"])
    assert left["first", "none"] == 1
