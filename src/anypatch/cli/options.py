"""Options and arguments of the command line, each said once for every command that has it."""

from __future__ import annotations

import ast
import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from anypatch.errors import AnypatchError, CheckpointError
from anypatch.files.paths import given

# typer reads annotations at run time, where Python 3.10 needs Optional.
# ruff: noqa: UP045


def path(typed: str) -> Path:
    """What was typed, ``~`` being the home directory: shells leave it in ``--output=~/vit``. Nothing at all, as of a
    variable that is not set, is no path, and not the current directory."""
    try:
        return given(typed, "value")
    except CheckpointError as error:
        raise typer.BadParameter(str(error)) from error


class Keep(str, Enum):
    image = "image"
    grid = "grid"


class Positions(str, Enum):
    antialias = "antialias"
    host = "host"


class Reference(str, Enum):
    asked = "asked"
    native = "native"


class Kernel(str, Enum):
    wiener = "wiener"
    pi = "pi"
    bicubic = "bicubic"
    bilinear = "bilinear"


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="timm:NAME, transformers:NAME_OR_DIR, open_clip:NAME/PRETRAINED, torchvision:NAME, hub:REPO:NAME, a "
        "directory or a checkpoint file.",
    ),
]
PatchSize = Annotated[
    Optional[str], typer.Option(metavar="SIZE", help="New patch size in pixels: 16, or HEIGHTxWIDTH.")
]
OnePatchSize = Annotated[
    str, typer.Option("--patch-size", metavar="SIZE", help="Patch size in pixels: 32, or HEIGHTxWIDTH.")
]
PatchSizes = Annotated[str, typer.Option("--patch-size", metavar="SIZES", help="Patch sizes with commas: 8,14,16x32.")]
ImageSize = Annotated[
    Optional[str],
    typer.Option(
        metavar="SIZE",
        help="New image size in pixels: 448, HEIGHTxWIDTH, or nearest: the nearest that the patch divides.",
    ),
]
KeepOption = Annotated[Keep, typer.Option("--keep", help="Without --image-size: keep the image size, or the grid.")]
PositionsOption = Annotated[
    Positions,
    typer.Option("--positions", help="How position tables are resampled: bicubic with antialias, or as the library."),
]
ReferenceOption = Annotated[
    Reference,
    typer.Option(
        "--reference",
        help="What fidelity is measured against: the native patch at the asked image size, or (native) the model as "
        "it is.",
    ),
]
KernelOption = Annotated[
    Kernel,
    typer.Option(
        "--kernel",
        metavar="METHOD",
        help="How patch kernels are resized: wiener, pi (FlexiViT's), bicubic or bilinear.",
    ),
]
Arch = Annotated[
    Optional[str], typer.Option(metavar="NAME", help="Architecture of a checkpoint file, such as timm:NAME.")
]
Prefix = Annotated[
    Optional[str],
    typer.Option(
        metavar="TEXT",
        help="Which of several models in a checkpoint file: what stands before its patch projection's name.",
    ),
]
Options = Annotated[
    Optional[list[str]],
    typer.Option(
        "--option", "-o", metavar="KEY=VALUE", help="Passed to the host library's loader, such as pretrained=False."
    ),
]
Weights = Annotated[
    bool,
    typer.Option("--weights/--no-weights", help="Load the pretrained weights too; without them, nothing big is read."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]
Device = Annotated[
    Optional[str],
    typer.Option(metavar="DEVICE", help="Where to compute: cpu, cuda, cuda:1, mps; an accelerator if there is one."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes: results and errors only.")]
Folder = Annotated[
    Path,
    typer.Option("--output", parser=path, metavar="FOLDER", help="Folder to write, in the host library's own format."),
]

WORDS = {"true": True, "false": False, "none": None, "null": None}


def loader_options(options: list[str] | None, arch: str | None, prefix: str | None = None) -> dict[str, Any]:
    """``KEY=VALUE`` pairs as keyword arguments.

    >>> loader_options(["pretrained=False", "num_classes=10", "img_size=[224, 448]", "tag=openai"], None)
    {'pretrained': False, 'num_classes': 10, 'img_size': [224, 448], 'tag': 'openai'}

    Raises:
        AnypatchError: an option of another form.
    """
    found: dict[str, Any] = {k: v for k, v in (("arch", arch), ("prefix", prefix)) if v is not None}
    for option in options or []:
        key, equals, value = option.partition("=")
        if not equals or not key.isidentifier():
            raise AnypatchError(f"--option takes KEY=VALUE, got {option!r}")
        found[key] = read_value(value)
    return found


def read_value(text: str) -> Any:
    """A value as Python or JSON writes it, in any case for true, false, none and null; anything else is text."""
    word = text.strip().lower()
    if word in WORDS:
        return WORDS[word]
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return text
