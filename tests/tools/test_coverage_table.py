"""The coverage table: what each outcome looks like, and that one failure stops nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import coverage_table as coverage
from coverage_table import NOT_YET, PASS, REFUSED, Row, prove, summary, table
from families import Family
from families.timm import families


def entry(name: str) -> Family:
    return next(family for family in families() if family.name == name)


def broken() -> nn.Module:
    raise RuntimeError("no such | weights")


def test_two_entries_become_two_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = [entry("vision_transformer"), entry("resnet")]
    monkeypatch.setattr(coverage, "families", lambda *libraries: iter(chosen))
    output = tmp_path / "deep" / "coverage.md"
    assert coverage.main(["--output", str(output)]) == 0
    text = output.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| timm")]
    assert len(rows) == 2
    assert rows[0].startswith("| timm | vision_transformer | conv | absolute, class token | 16x16 → 32x48 | ")
    assert rows[0].endswith("| PASS |")
    assert "| REFUSED: conv1 of ResNet" in rows[1]
    assert "- timm: 1 PASS, 1 REFUSED, 0 NOT YET" in text
    assert f"timm {timm.__version__}" in text.splitlines()[-1]
    assert f"torch {torch.__version__.split('+')[0]}" in text.splitlines()[-1]


def test_a_failure_is_a_row_and_not_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = Family("timm", "broken", broken, "conv", "none")
    monkeypatch.setattr(coverage, "families", lambda *libraries: iter([failing, entry("deit")]))
    assert coverage.main(["--library", "timm"]) == 1
    printed = capsys.readouterr().out
    assert "timm broken NOT YET: RuntimeError: no such | weights" in printed
    assert "timm deit" in printed
    assert "- all: 1 PASS, 0 REFUSED, 1 NOT YET" in printed


@pytest.mark.slow
def test_a_part_of_the_table_does_not_replace_the_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(coverage, "families", lambda *libraries: iter([entry("deit")]))
    assert coverage.main(["--library", "timm"]) == 0
    assert not list(tmp_path.iterdir())
    assert coverage.main([]) == 0
    assert (tmp_path / "docs" / "coverage.md").is_file()
    assert coverage.main(["--family", "no such family"]) == 2


def test_an_outcome_that_was_not_expected_is_not_covered() -> None:
    build = partial(timm.create_model, "vit_tiny_patch16_224", depth=1, img_size=32)
    listed_as_refused = prove(Family("timm", "x", build, "conv", "absolute", refused=True))
    assert (listed_as_refused.result, listed_as_refused.reason) == (
        NOT_YET,
        "passes, although it is listed as refused",
    )
    refused_unexpectedly = prove(Family("timm", "x", entry("resnet").build, "conv", "absolute"))
    assert refused_unexpectedly.result == NOT_YET
    assert refused_unexpectedly.reason


def test_a_wrong_function_is_not_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    from anypatch.core import kernels as resize

    def biased(*arguments: Any) -> torch.Tensor:
        return original(*arguments) * 1.01

    original = resize.KernelResize.__call__
    monkeypatch.setattr(resize.KernelResize, "__call__", biased)
    row = prove(entry("vision_transformer"))
    assert row.result == NOT_YET
    assert row.error is not None
    assert row.error > 1e-4


def test_cells_cannot_break_the_table() -> None:
    family = Family("timm", "a|b", broken, "conv", "none")
    rows = [Row(family, REFUSED, reason="first\nsecond | third"), Row(family, PASS, "4x4 → 8x8", 1e-7)]
    lines = table(rows).splitlines()
    assert "| timm | a\\|b | conv | none |  |  | REFUSED: first second \\| third |" in lines
    assert "| timm | a\\|b | conv | none | 4x4 → 8x8 | 1e-07 | PASS |" in lines
    assert summary(rows).splitlines()[-1] == "- all: 1 PASS, 1 REFUSED, 0 NOT YET"
