"""The command line: ``anypatch inspect | adapt | check | convert | sweep | view | demo``."""

from __future__ import annotations

import re
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from anypatch import __version__
from anypatch.cli.options import Arch, Options, loader_options
from anypatch.cli.sweep import register as register_sweep
from anypatch.errors import AnypatchError, GeometryError

app = typer.Typer(
    name="anypatch",
    help="Any pretrained Vision Transformer, at any patch size.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)


class Keep(str, Enum):
    image = "image"
    grid = "grid"


class Positions(str, Enum):
    antialias = "antialias"
    host = "host"


class Kernel(str, Enum):
    wiener = "wiener"
    pi = "pi"
    bicubic = "bicubic"
    bilinear = "bilinear"


Source = Annotated[
    str,
    typer.Argument(
        help="timm:NAME, transformers:NAME_OR_DIR, open_clip:NAME/PRETRAINED, torchvision:NAME, a file or directory."
    ),
]
PatchSize = Annotated[Optional[str], typer.Option(help="New patch size in pixels: 16, or HEIGHTxWIDTH.")]  # noqa: UP045
RequiredPatchSize = Annotated[str, typer.Option("--patch-size", help="Patch size in pixels: 32, or HEIGHTxWIDTH.")]
ImageSize = Annotated[Optional[str], typer.Option(help="New image size in pixels: 448, or HEIGHTxWIDTH.")]  # noqa: UP045
KeepOption = Annotated[Keep, typer.Option(help="Without --image-size: keep the image size, or the grid.")]
PositionsOption = Annotated[
    Positions, typer.Option(help="How position tables are resampled: bicubic with antialias, or as the library does.")
]
KernelOption = Annotated[Kernel, typer.Option(help="How patch kernels are resized.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def _say_version(wanted: bool) -> None:
    if wanted:
        out.print(f"anypatch {__version__}", highlight=False)
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version.")]


@app.callback()
def _main(debug: Debug = False, version: Version = False) -> None:
    """Any pretrained Vision Transformer, at any patch size."""


def size(text: str | None, name: str) -> int | tuple[int, ...] | None:
    """``"16"`` -> 16, ``"16x32"`` -> (16, 32), ``None`` -> None.

    Raises:
        GeometryError: anything else.
    """
    if text is None:
        return None
    if not re.fullmatch(r"\d+([x,]\d+){0,2}", text):
        raise GeometryError(f"{name} must be a number of pixels or HEIGHTxWIDTH, got {text!r}")
    sides = tuple(int(side) for side in re.split("[x,]", text))
    return sides[0] if len(sides) == 1 else sides


def load_source(source: str, options: list[str] | None, arch: str | None) -> Any:
    """Load at the native geometry, with a spinner."""
    from anypatch.sources import load

    with spinner(f"loading {source}"):
        return load(source, **loader_options(options, arch))


def spinner(text: str) -> Progress:
    progress = Progress(
        SpinnerColumn(),
        TextColumn(escape(text)),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    progress.add_task(text, total=None)
    return progress


@app.command()
def inspect(
    source: Source,
    patch_size: PatchSize = None,
    image_size: ImageSize = None,
    keep: KeepOption = Keep.image,
    arch: Arch = None,
    option: Options = None,
) -> None:
    """Say what a model is and, with sizes, what adapting it would change: every tensor with its role."""
    from anypatch.core.geometry import show
    from anypatch.inspection import changes_for, inspect

    patch, image = size(patch_size, "--patch-size"), size(image_size, "--image-size")
    model = load_source(source, option, arch)
    facts = inspect(model)
    geometry = facts.geometry
    table = Table(show_header=False, box=None)
    for name, value in (
        ("library", geometry.library),
        ("class", facts.class_name),
        ("patch size", show(geometry.patch_size)),
        ("image size", show(geometry.image_size)),
        ("grid", show(geometry.grid)),
        ("prefix tokens", str(geometry.prefix_tokens)),
        ("embedding", facts.embedding),
        ("positions", facts.positions),
    ):
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    out.print(table)
    if patch is None and image is None:
        return
    changes = changes_for(model, patch, image, keep=keep.value)
    table = Table(title=f"{len(changes)} changes")
    for column in ("name", "role", "old", "new"):
        table.add_column(column, overflow="fold")
    for change in changes:
        table.add_row(*(escape(str(cell)) for cell in (change.name, change.role, change.old, change.new)))
    out.print(table)


@app.command()
def adapt(
    source: Source,
    output: Annotated[Path, typer.Option(help="Directory to write, in the host library's own format.")],
    patch_size: PatchSize = None,
    image_size: ImageSize = None,
    keep: KeepOption = Keep.image,
    kernel: KernelOption = Kernel.wiener,
    positions: PositionsOption = Positions.antialias,
    arch: Arch = None,
    option: Options = None,
) -> None:
    """Load a model, change its patch size or image size, and save it in its library's own format."""
    from anypatch.adaptation import adapt, geometry
    from anypatch.core.geometry import show
    from anypatch.sources import save

    patch, image = size(patch_size, "--patch-size"), size(image_size, "--image-size")
    if patch is None and image is None:
        raise GeometryError("nothing to change: give --patch-size, --image-size or both")
    model = load_source(source, option, arch)
    before = geometry(model)
    with spinner("adapting"):
        adapt(model, patch, image, keep=keep.value, kernel=kernel.value, positions=positions.value)
    after = geometry(model)
    with spinner(f"writing {output}"):
        save(model, output)
    out.print(
        f"patch {show(before.patch_size)} -> {show(after.patch_size)}, image {show(before.image_size)} -> "
        f"{show(after.image_size)}, grid {show(before.grid)} -> {show(after.grid)}: {escape(str(output))}"
    )


@app.command()
def check(source: Source, patch_size: RequiredPatchSize, arch: Arch = None, option: Options = None) -> None:
    """Prove on random weights that growing the patch preserves what the model computes."""
    from anypatch.proof import check

    patch = size(patch_size, "--patch-size")
    assert patch is not None
    model = load_source(source, option, arch)
    with spinner("proving"):
        result = check(model, patch)
    verdict = "[green]PASS[/green]" if result.passed else "[red]FAIL[/red]"
    out.print(f"{verdict} relative error {result.error:.1e} over {result.compared} outputs at patch {patch_size}")
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint file, or a directory of transformers, timm or open_clip.")
    ],
    target: Annotated[Path, typer.Argument(help="The .safetensors file or the directory to write.")],
    patch_size: PatchSize = None,
    image_size: ImageSize = None,
    keep: KeepOption = Keep.image,
    kernel: KernelOption = Kernel.wiener,
    positions: PositionsOption = Positions.antialias,
    arch: Arch = None,
    link: Annotated[bool, typer.Option(help="Hard-link files that do not change instead of copying them.")] = False,
) -> None:
    """Convert file to file, without loading the model: only what follows the geometry is computed."""
    from anypatch.conversion import convert

    patch, image = size(patch_size, "--patch-size"), size(image_size, "--image-size")
    if patch is None and image is None:
        raise GeometryError("nothing to change: give --patch-size, --image-size or both")
    convert(
        source,
        target,
        patch,
        image,
        keep=keep.value,
        kernel=kernel.value,
        positions=positions.value,
        arch=arch,
        link=link,
    )
    out.print(f"wrote {escape(str(target))}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The report to write.")] = Path("anypatch-demo.html"),
) -> None:
    """Adapt the embedded model to several patch sizes, offline, and show what each costs and keeps."""
    from anypatch.demo import run_demo, table

    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("measuring", total=None)
        result = run_demo(
            output=output,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    out.print(table(result))
    out.print(f"report: {escape(str(output))}")


register_sweep(app)


def main() -> None:
    """Entry point: errors are one line and exit status 2, unless ``--debug`` is given."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        app(arguments, prog_name="anypatch")
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)
    except AnypatchError as error:
        if debug:
            raise
        _fail(str(error))
    except Exception as error:
        if debug:
            raise
        _fail(f"{type(error).__name__}: {error}")


def _fail(message: str) -> None:
    err.print("error: " + escape(" ".join(message.split())), style="red", soft_wrap=True, highlight=False)
    sys.exit(2)
