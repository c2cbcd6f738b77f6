"""Messages of the library on the command line: arguments are options there, and sizes are typed with an x."""

from __future__ import annotations

import re

import pytest
import typer.main
from typer.core import TyperGroup

from anypatch.cli import app
from anypatch.cli.words import OPTIONS, RENAMED, as_typed


@pytest.mark.parametrize(
    ("said", "typed"),
    [
        (
            "patch_size 28x28 does not divide image_size 518x518: use image_size 504x504 or 532x532, or patch_size "
            '14x14 or 37x37; or image_size="nearest", which is 532x532; or keep="grid", which changes',
            "patch size 28x28 does not divide image size 518x518: use --image-size 504x504 or 532x532, or --patch-size "
            "14x14 or 37x37; or --image-size nearest, which is 532x532; or --keep grid, which changes",
        ),
        (
            "x is there already: name another, or pass overwrite",
            "x is there already: name another, or give --overwrite",
        ),
        ("is of another run (weights): start without resume", "is of another run (weights): start without --resume"),
        ("give minutes or steps, not both", "give --minutes or --steps, not both"),
        ("minutes must be above 0, got -1.0", "--minutes must be above 0, got -1.0"),
        ("says itself what it is: leave out arch and prefix", "says itself what it is: leave out --arch and --prefix"),
        ("say which to tune at, image_size=", "say which to tune at, --image-size"),
        ("img_size=(224, 448) beside arch= says", "--option 'img_size=(224, 448)' beside --arch says"),
        ("num_workers must be a number", "--workers must be a number"),
        ("not patch_size 16x16 and image_size 224x448", "not patch size 16x16 and image size 224x448"),
        ("only its image_size can change", "only its image size can change"),
        ("say which with prefix='teacher.'", "say which with --prefix teacher."),
    ],
)
def test_arguments_are_options(said: str, typed: str) -> None:
    assert as_typed(said) == typed


@pytest.mark.parametrize(
    "said",
    [
        "runs/image_size/x.pt is there already",
        "config.json: patch_size is 3",
        "vision_config.patch_size is 'patch_size' there",
        "model.patch_size(16) failed",
        "the images have no labels: a folder of images, data and output",
    ],
)
def test_fields_paths_and_words_stay(said: str) -> None:
    assert as_typed(said) == said


def test_every_name_is_an_option() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    known = {option for command in group.commands.values() for parameter in command.params for option in parameter.opts}
    assert {"--" + RENAMED.get(name, name).replace("_", "-") for name in OPTIONS} <= known


@pytest.mark.parametrize("command", ["inspect", "check", "adapt", "convert", "sweep", "view", "tune", "demo"])
def test_help_names_what_an_option_takes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """FOLDER, SIZE or the choices, and no type of Python's."""
    with pytest.raises(SystemExit):
        app([command, "--help"], prog_name="anypatch")
    shown = capsys.readouterr().out
    assert not re.search(r"<(str|int|float|bool|Path|path)>", shown), shown
    assert "{" not in shown
    assert ("--output FOLDER" in shown) == (command in {"adapt", "sweep", "tune"})
