"""``anypatch sweep`` and ``anypatch view``."""

from __future__ import annotations

import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from anypatch.cli.options import Arch, Options, loader_options
from anypatch.errors import AnypatchError, GeometryError

# typer reads annotations at run time, where Python 3.10 needs Optional.
Source = Annotated[
    str, typer.Argument(help="timm:NAME, transformers:NAME_OR_DIR, open_clip:NAME, a file or directory.")
]
PatchSizes = Annotated[str, typer.Option("--patch-size", help="Patch sizes with commas: 8,14,16x32.")]
ImageSize = Annotated[Optional[str], typer.Option(help="Image size in pixels for all of them: 448, or HEIGHTxWIDTH.")]  # noqa: UP045
Keep = Annotated[str, typer.Option(help="Without --image-size: keep the image size (image) or the grid (grid).")]
Kernel = Annotated[str, typer.Option(help="How patch kernels are resized: wiener, pi, bicubic or bilinear.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(sweep)
    app.command()(view)


def sweep(
    source: Source,
    patch_size: PatchSizes,
    output: Annotated[Path, typer.Option(help="Folder for sweep.json, sweep.csv and report.html.")],
    image_size: ImageSize = None,
    keep: Keep = "image",
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Labelled images: a folder train/CLASS and val/CLASS, or CLASS; or a Hugging Face dataset."),
    ] = None,
    images: Annotated[Optional[Path], typer.Option(help="A folder of images without labels.")] = None,  # noqa: UP045
    class_names: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="For CLIP: a file with one name a line, or names with commas, in the order of the classes."),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(help="At most so many images per split.")] = None,  # noqa: UP045
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.")] = 32,
    workers: Annotated[Optional[int], typer.Option(help="Processes that decode images.")] = None,  # noqa: UP045
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, mps.")] = None,  # noqa: UP045
    cache: Annotated[Optional[Path], typer.Option(help="Folder for features; the user's cache by default.")] = None,  # noqa: UP045
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no features.")] = False,
    kernel: Kernel = "wiener",
    arch: Arch = None,
    option: Options = None,
) -> None:
    """Compare patch sizes on your images: accuracy, fidelity, speed and memory, and an HTML report.

    Start it with `accelerate launch -m anypatch sweep ...` to share the images among processes.
    """
    from anypatch.measure.sweep import sweep

    sizes = read_sizes(patch_size, "--patch-size")
    one = None if image_size is None else read_sizes(image_size, "--image-size")
    if one is not None and len(one) != 1:
        raise GeometryError(f"--image-size takes one size, got {image_size!r}")
    command = " ".join(["anypatch", *(shlex.quote(a) for a in sys.argv[1:])])
    with _quiet_unless_leading(), _reporting() as progress:
        result = sweep(
            source,
            sizes,
            image_size=one[0] if one else None,
            keep=keep,  # type: ignore[arg-type]
            data=data,
            images=images,
            output=output,
            class_names=class_names,
            batch_size=batch_size,
            num_workers=workers,
            kernel=kernel,
            arch=arch,
            limit=limit,
            device=device,
            cache=False if no_cache else cache if cache is not None else True,
            progress=progress,
            reproduce=command,
            **loader_options(option, None),
        )
    if _leads():
        out = Console()
        out.print(_table(result))
        out.print(f"report: {escape(str(output / 'report.html'))}", soft_wrap=True)


def view(
    source: Source,
    image: Annotated[Path, typer.Argument(help="An image file.")],
    patch_size: PatchSizes,
    output: Annotated[Path, typer.Option(help="The picture to write, e.g. out.png.")],
    image_size: ImageSize = None,
    keep: Keep = "image",
    kernel: Kernel = "wiener",
    arch: Arch = None,
    option: Options = None,
) -> None:
    """Draw an image's patch grid and patch features at several patch sizes, side by side."""
    from anypatch.measure.view import check_target, save_view, view

    sizes = read_sizes(patch_size, "--patch-size")
    one = None if image_size is None else read_sizes(image_size, "--image-size")
    check_target(output)
    picture = view(
        source,
        image,
        sizes,
        image_size=one[0] if one else None,
        keep=keep,  # type: ignore[arg-type]
        kernel=kernel,
        arch=arch,
        **loader_options(option, None),
    )
    Console().print(f"picture: {escape(str(save_view(picture, output)))}", soft_wrap=True)


def read_sizes(text: str, name: str) -> list[int | tuple[int, int]]:
    """``"8,16x32"`` -> [8, (16, 32)].

    Raises:
        GeometryError: anything else.
    """
    found: list[int | tuple[int, int]] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", part)
        if not match:
            raise GeometryError(f"{name} takes sizes with commas, such as 8,14,16x32; got {text!r}")
        found.append((int(match[1]), int(match[2])) if match[2] else int(match[1]))
    return found


def _leads() -> bool:
    import os

    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def _quiet_unless_leading() -> Iterator[None]:
    """All processes raise the same error; one says it."""
    try:
        yield
    except AnypatchError:
        if _leads():
            raise
        raise typer.Exit(2) from None


@contextmanager
def _reporting() -> Iterator[Any]:
    """A progress bar, and warnings in one line each."""
    console = Console(stderr=True)
    leads = _leads()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with (
        warnings.catch_warnings(),
        Progress(*columns, console=console, transient=True, disable=not (leads and console.is_terminal)) as bar,
    ):
        task = bar.add_task("loading", total=None)

        def warn(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
            if leads and "anypatch" in filename:
                console.print(f"[yellow]note:[/yellow] {escape(str(message))}", soft_wrap=True, highlight=False)

        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = warn  # type: ignore[assignment]

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=escape(what), completed=done, total=total)

        yield progress


def _table(result: Any) -> Table:
    names = ["patch_size", "image_size", "tokens", "gflops", "images_per_second", "peak_memory_mb"]
    names += ["fidelity", "patch_fidelity", "neighbour_agreement", "accuracy"]
    from anypatch.report.page import COLUMNS, format_number

    used = [n for n in names if any(row.get(n) is not None for row in result.rows)]
    table = Table(box=None, header_style="bold")
    for name in used:
        table.add_column(COLUMNS[name][0], justify="right", overflow="fold")
    for row in result.rows:
        table.add_row(*("-" if row.get(n) is None else format_number(n, row[n]) for n in used))
    return table
