"""``--prefix``: one of several models in a checkpoint file, for every command that loads one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from anypatch import cli
from tests.builders import image_folder

ARCH = ["--arch", "timm:test_vit"]
QUICK = ["--patch-size", "8", "-q"]
COMMANDS = {
    "inspect": ["inspect", "both.pth", *ARCH],
    "convert": ["convert", "both.pth", "out.safetensors", *ARCH, *QUICK],
    "check": ["check", "both.pth", *ARCH, "--patch-size", "32", "-q"],
    "adapt": ["adapt", "both.pth", *ARCH, *QUICK, "--output", "out"],
    "view": ["view", "both.pth", "images/red/0.png", *ARCH, *QUICK, "--image-size", "32", "--output", "out.png"],
    "sweep": ["sweep", "both.pth", *ARCH, *QUICK, "--image-size", "32", "--images", "images", "--output", "out",
              "--no-cache", "--workers", "0"],
    "tune": ["tune", "both.pth", *ARCH, *QUICK, "--image-size", "32", "--images", "images", "--output", "out",
             "--steps", "1", "--learning-rate", "1e-9", "--batch-size", "2", "--workers", "0"],
}  # fmt: skip
SLOWER = ("check", "view", "sweep", "tune")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with two models, which no command can tell apart by itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("logging.disable", lambda level: None)
    state = timm.create_model("test_vit").state_dict()
    both = {f"encoder_q.{n}": t for n, t in state.items()} | {f"encoder_k.{n}": t + 1 for n, t in state.items()}
    torch.save({"state_dict": both}, tmp_path / "both.pth")
    image_folder(tmp_path / "images", 6)
    return tmp_path


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["anypatch", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=pytest.mark.slow) if name in SLOWER else name for name in COMMANDS]
)
def test_one_of_two_models(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert _run(monkeypatch, *COMMANDS[command]) == 2
    assert "say which with --prefix state_dict.encoder_k" in capsys.readouterr().err.replace("\n", " ")
    assert not (place / "out").exists()
    assert not _run(monkeypatch, *COMMANDS[command], "--prefix", "encoder_q")
    written = [*place.glob("out.safetensors"), *place.glob("out/*.safetensors"), *place.glob("out/*/*.safetensors")]
    wanted = torch.load(place / "both.pth")["state_dict"]["encoder_q.norm.weight"]
    for file in written:
        tensors = load_file(file)
        name = next(n for n in tensors if n.endswith("norm.weight") and "blocks" not in n and "encoder_k" not in n)
        torch.testing.assert_close(tensors[name], wanted)
    assert written or command in ("inspect", "check", "view", "sweep")
