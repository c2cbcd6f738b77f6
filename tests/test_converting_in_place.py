"""What lies beside a model: kept where the directory is converted in its place, never lost, named where it is in the
way."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import anypatch
from anypatch import CheckpointError

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "vit"
    transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **SMALL)).save_pretrained(path)
    return path


def _contents(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in sorted(path.rglob("*")):
        if entry.is_symlink():
            found[entry.relative_to(path).as_posix()] = os.readlink(entry)
        else:
            found[entry.relative_to(path).as_posix()] = None if entry.is_dir() else entry.read_bytes()
    return found


def _add(folder: Path, names: tuple[str, ...]) -> None:
    """Files of these names; a directory where one ends in a stroke, a link where it holds an arrow."""
    for name in names:
        path, arrow, where = (folder / name.partition("->")[0]), *name.partition("->")[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        if arrow:
            path.symlink_to(where)
        elif name.endswith("/"):
            path.mkdir()
        else:
            path.write_text(f"the words of {name}")


BESIDE = {
    "a repository": (".git/HEAD", ".git/objects/", ".gitattributes"),
    "a download": (".cache/huggingface/download/config.json.metadata",),
    "empty folders": ("runs/", "logs/nested/"),
    "a folder of hidden files": ("notes/read.txt", "notes/.hidden"),
    "checkpoints of a training": (
        "checkpoint-1/config.json",
        "checkpoint-1/optimizer.pt",
        "checkpoint-1/m.safetensors",
    ),
    "links": ("away->/", "nothing->/no/such/place", "notes/up->../config.json"),
    "another format in a folder": ("onnx/model.onnx", "onnx/readme.txt"),
}


@pytest.mark.siblings(fast=3)
@pytest.mark.parametrize("names", BESIDE.values(), ids=BESIDE)
def test_what_lies_beside_the_model_stays(folder: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    anypatch.convert(folder, tmp_path / "converted", patch_size=4)
    _add(folder, names)
    before = _contents(folder)
    anypatch.convert(folder, folder, patch_size=4)
    assert _contents(folder) == before | _contents(tmp_path / "converted")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "model.fp16.safetensors", "tf_model.h5"])
def test_what_would_stay_at_the_old_geometry_is_named(folder: Path, name: str) -> None:
    _add(folder, (name,))
    before = _contents(folder)
    with pytest.raises(
        CheckpointError, match=rf"would stay at the old geometry .*\({name}\): remove it, or convert to"
    ):
        anypatch.convert(folder, folder, patch_size=4)
    assert _contents(folder) == before


@pytest.mark.parametrize(
    ("theirs", "mine", "said"),
    [
        ((), (".git/HEAD", ".git/objects/"), ".git"),
        ((), ("runs/",), "runs"),
        (("notes/read.txt",), ("notes/mine.txt",), "notes/mine.txt"),
        (("notes/read.txt",), ("notes/deep/.mine",), "notes/deep"),
        (("notes/read.txt",), ("notes/away->/",), "notes/away"),
        (("notes/read.txt",), ("notes/optimizer.pt",), "notes/optimizer.pt"),
    ],
)
def test_nothing_in_a_target_is_lost(
    folder: Path, tmp_path: Path, theirs: tuple[str, ...], mine: tuple[str, ...], said: str
) -> None:
    _add(folder, theirs)
    target = tmp_path / "out"
    anypatch.convert(folder, target, patch_size=4)
    anypatch.convert(folder, target, patch_size=4)  # what it wrote itself is no obstacle
    _add(target, mine)
    before = _contents(target)
    with pytest.raises(CheckpointError, match=rf"holds more than the converted model \({said}\): choose another place"):
        anypatch.convert(folder, target, patch_size=4)
    assert _contents(target) == before
