"""Places as callers write them: the home directory, the current one, nothing at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import anypatch
from anypatch import CheckpointError, DataError, SweepResult, cli
from anypatch.measure.view import save_view, view
from builders import write


def _tiny() -> Any:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=3)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory, and another one that is the current one."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_the_home_directory(home: Path) -> None:
    anypatch.save(_tiny(), "~/vit")
    anypatch.convert("~/vit", "~/vit8", 8)
    torch.save(timm.create_model("test_vit").state_dict(), home / "file.pth")
    anypatch.convert("~/file.pth", Path("~/file8.safetensors"), 8)
    for source in ("~/vit8", "timm:local-dir:~/vit8", "timm:~/vit8"):
        assert anypatch.geometry(anypatch.load(source)).patch_size == (8, 8)
    assert anypatch.geometry(anypatch.load("~/file8.safetensors", arch="timm:test_vit")).patch_size == (8, 8)
    assert sorted(path.name for path in home.iterdir()) == ["file.pth", "file8.safetensors", "vit", "vit8"]
    assert not list((home.parent / "here").iterdir())


@pytest.mark.slow
def test_images_and_reports_in_the_home_directory(home: Path) -> None:
    write(home / "photos" / "0.png", (40, 60, 230), 0)
    result = anypatch.sweep(
        _tiny(), [8], images="~/photos", output="~/out", cache="~/cache", batch_size=1, num_workers=0, progress=False
    )
    result.to_html("~/deep/report.html")
    save_view(view(_tiny(), "~/photos/0.png", [8]), "~/view.png")
    assert sorted(path.name for path in home.iterdir()) == ["cache", "deep", "out", "photos", "view.png"]
    assert not list((home.parent / "here").iterdir())


def test_a_report_where_none_can_be_is_one_error(home: Path) -> None:
    row: Any = {"patch_size": 16, "image_size": 224, "tokens": 196, "gflops": 35.0, "images_per_second": 4.0}
    (home / "file").write_text("")
    for write_it in (SweepResult([row], row).to_html, SweepResult([row], row).save):
        with pytest.raises(CheckpointError, match=r"cannot write .*file"):
            write_it("~/file/report.html")


@pytest.mark.slow
def test_what_is_in_the_home_directory_is_not_replaced_unasked(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shells leave the ~ of --output=~/vit to the command."""
    anypatch.save(_tiny(), "~/vit")
    before = (home / "vit" / "config.json").read_bytes()
    source = ["timm:test_vit", "-o", "pretrained=False", "--patch-size", "8"]
    for arguments in (["adapt", *source, "--output=~/vit"], ["convert", "~/vit", "~/vit", "--patch-size", "8"]):
        assert cli.run(arguments) == cli.FAILED
        assert "--overwrite" in " ".join(capsys.readouterr().err.split())
    assert (home / "vit" / "config.json").read_bytes() == before
    assert cli.run(["adapt", *source, "--output=~/other"]) == 0
    assert (home / "other" / "config.json").is_file()


def test_a_name_that_begins_so_is_no_home(home: Path) -> None:
    anypatch.save(_tiny(), "~vit")
    assert (home.parent / "here" / "~vit" / "config.json").is_file()
    assert anypatch.geometry(anypatch.load("timm:~vit", 8)).patch_size == (8, 8)


def _save(target: str) -> None:
    anypatch.save(anypatch.adapt(_tiny(), 8), target)


def _convert(target: str) -> None:
    anypatch.convert(target, target, 8)


@pytest.mark.parametrize(("act", "below"), [(_save, False), (_convert, False), (_save, True)])
def test_the_current_directory_stays_the_one_it_is(
    home: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[str], None], below: bool
) -> None:
    """A directory that was exchanged for another would leave this process, and the shell around it, in the old one."""
    here = home.parent / "here"
    anypatch.save(_tiny(), here)
    (here / "sub").mkdir()
    for name in ("notes.txt", "sub/more.txt"):
        (here / name).write_text("mine")
    if below:
        monkeypatch.chdir("sub")
    act(".." if below else ".")
    assert Path().resolve().samefile(here / "sub" if below else here)
    assert sorted(path.name for path in here.iterdir() if not path.name.startswith("README")) == [
        "config.json", "model.safetensors", "notes.txt", "sub",
    ]  # fmt: skip
    assert anypatch.geometry(anypatch.load(".." if below else ".")).patch_size == (8, 8)


@pytest.mark.parametrize("path", ["", "a\0b", "\ud800", "n" * 300, "n/" * 3000, 3])
def test_what_is_no_path(home: Path, path: Any) -> None:
    with pytest.raises(CheckpointError, match=r"the directory .*(must be a path|longer than any path)"):
        anypatch.save(_tiny(), path)
    with pytest.raises(CheckpointError, match=r"the source .*(must be a path|longer than any path)"):
        anypatch.convert(path, "out", 8)
    if isinstance(path, str):
        with pytest.raises(CheckpointError, match=r"the source .*(must be a path|longer than any path)"):
            anypatch.load(path)


@pytest.mark.parametrize("path", ["", "a\0b", "\ud800", "n" * 300, "loop/x"])
def test_what_is_no_path_behind_a_prefix_or_elsewhere(home: Path, path: str) -> None:
    Path("loop").symlink_to("loop")
    says = r"must be a path|longer than any path|leads back to itself"
    prefixes = ("timm:", "timm:local-dir:", "transformers:", "open_clip:", "torchvision:", "diffusers:", "hub:")
    for prefix in prefixes if path else ():
        with pytest.raises(CheckpointError, match=says):
            anypatch.load(prefix + path)
    for name in ("images", "data", "output", "cache"):
        with pytest.raises(CheckpointError, match=says):
            anypatch.sweep(_tiny(), [8], **{"output": "out", name: path})
    with pytest.raises(CheckpointError, match=says):
        anypatch.tune(_tiny(), images=path, patch_size=8)
    assert [entry.name for entry in Path().iterdir()] in (["loop"], ["loop", "out"])  # costs may be measured first


def test_a_pipe_is_no_image(home: Path) -> None:
    os.mkfifo("image.png")
    with pytest.raises(DataError, match=r"image\.png is no file"):
        view(_tiny(), "image.png", [8])


def test_names_of_many_classes_are_no_path() -> None:
    from anypatch.measure.class_names import read_class_names

    classes = [f"n{i:08}" for i in range(1000)]
    assert read_class_names(", ".join(f"a thing, number {i}".replace(",", "") for i in range(1000)), classes)[-1] == (
        "a thing number 999"
    )


def test_links_in_a_circle(home: Path) -> None:
    anypatch.save(_tiny(), "vit")
    Path("loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="loop is a link to nothing"):
        anypatch.convert("vit", "loop", 8)
