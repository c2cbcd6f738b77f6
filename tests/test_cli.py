"""The command line, run as people run it: exit statuses, one-line errors, what is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.testing import assert_close

VIT = ["timm:test_vit", "-o", "pretrained=false"]


def anypatch(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "anypatch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, check=False)


def test_version() -> None:
    assert anypatch("--version").stdout == "anypatch 0.1.0\n"


def test_inspect_says_what_the_model_is() -> None:
    result = anypatch("inspect", *VIT)
    assert result.returncode == 0, result.stderr
    for text in ("timm", "VisionTransformer", "16x16", "160x160", "10x10", "patch projection", "absolute positions"):
        assert text in result.stdout


def test_inspect_lists_what_would_change() -> None:
    result = anypatch("inspect", *VIT, "--patch-size", "8x32")
    assert result.returncode == 0, result.stderr
    flat = result.stdout.replace("\n", " ")
    for text in ("pos_embed", "(64, 3, 16, 16)", "(64, 3, 8, 32)", "10x10 tokens"):
        assert text in flat


def test_adapt_writes_a_directory_that_timm_loads(tmp_path: Path) -> None:
    result = anypatch("adapt", *VIT, "--patch-size", "32", "--keep", "grid", "--output", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert "16x16 -> 32x32" in result.stdout.replace("\n", "")
    code = f"""
import sys; sys.modules["anypatch"] = None
import timm, torch
m = timm.create_model("local-dir:{tmp_path / "out"}", pretrained=True).eval()
torch.manual_seed(0)
torch.save(m(torch.randn(1, 3, 320, 320)), "{tmp_path / "y.pt"}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert model.patch_embed.patch_size == (32, 32)
    torch.manual_seed(0)
    assert_close(model(torch.randn(1, 3, 320, 320)), torch.load(tmp_path / "y.pt", weights_only=True))


def test_check_passes_and_says_so() -> None:
    result = anypatch("check", *VIT, "--patch-size", "24")
    assert result.returncode == 0, result.stderr
    assert "PASS" in result.stdout


def test_a_failed_check_exits_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    import typer
    from typer.testing import CliRunner

    from anypatch.cli import app

    module = importlib.import_module("anypatch.proof")
    monkeypatch.setattr(module, "check", lambda model, patch: module.Check(0.5, False, 1, (32, 32)))
    result = CliRunner().invoke(app, ["check", *VIT, "--patch-size", "32"])
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert isinstance(app, typer.Typer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", *VIT, "--patch-size", "33"], "use image_size 132x132 or 165x165, or patch_size 32x32 or 40x40"),
        (["inspect", *VIT, "--patch-size", "big"], "'big'"),
        (["inspect", "nonsense"], "timm:NAME"),
        (["inspect", "timm:no_such_model", "-o", "pretrained=false"], "no_such_model"),
        (["adapt", *VIT, "--output", "x"], "--patch-size"),
        (["inspect", *VIT, "-o", "pretrained"], "KEY=VALUE"),
        (["check", *VIT, "--patch-size", "8"], "smaller"),
        (["check", "timm:resnet18", "-o", "pretrained=false", "--patch-size", "8"], "error:"),
    ],
)
def test_errors_are_one_line_and_exit_with_two(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = anypatch(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert message in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback() -> None:
    result = anypatch("--debug", "inspect", "nonsense")
    assert result.returncode != 0
    assert "Traceback" in result.stderr
