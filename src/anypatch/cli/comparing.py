"""Commands that compare patch sizes: ``sweep``, ``view`` and ``demo``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from anypatch.cli import options as o
from anypatch.cli import output as out
from anypatch.cli.helping import Command
from anypatch.cli.stderr import leads, said_once, working
from anypatch.cli.targets import nothing_empty_left
from anypatch.core.geometry import parse_image_size, parse_sizes
from anypatch.errors import AnypatchError

# typer reads annotations at run time, where Python 3.10 needs Optional.
# ruff: noqa: UP045

COLUMNS = ("patch_size", "image_size", "tokens", "gflops", "images_per_second", "peak_memory_mb")
QUALITY = ("fidelity", "patch_fidelity", "neighbour_agreement", "accuracy")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(cls=Command)(sweep)
    app.command(cls=Command)(view)


def sweep(
    source: o.Source,
    patch_size: o.PatchSizes,
    output: Annotated[
        Path, typer.Option(parser=o.path, metavar="FOLDER", help="For sweep.json, sweep.csv and report.html.")
    ],
    image_size: o.ImageSize = None,
    keep: o.KeepOption = o.Keep.image,
    figure: Annotated[
        Optional[Path],
        typer.Option(
            parser=o.path, metavar="FILE", help="Also write the trade-off as a picture: sweep.svg, .png or .pdf."
        ),
    ] = None,
    data: Annotated[
        Optional[str],
        typer.Option(
            metavar="FOLDER",
            help="Labelled images: a folder train/CLASS and val/CLASS, or CLASS; or a Hugging Face dataset's name.",
        ),
    ] = None,
    images: Annotated[
        Optional[Path], typer.Option(parser=o.path, metavar="FOLDER", help="Images without labels, at any depth.")
    ] = None,
    class_names: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAMES",
            help="For CLIP: a file with one name a line, or names with commas, in the order of the classes.",
        ),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(metavar="NUMBER", help="At most so many images per split.")] = None,
    batch_size: Annotated[int, typer.Option(metavar="NUMBER", help="Images per forward pass.")] = 32,
    workers: Annotated[
        Optional[int],
        typer.Option(metavar="NUMBER", help="Processes that decode images; by the number of cores without it."),
    ] = None,
    device: o.Device = None,
    cache: Annotated[
        Optional[Path],
        typer.Option(parser=o.path, metavar="FOLDER", help="For features; the user's cache without it."),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no features.")] = False,
    kernel: o.KernelOption = o.Kernel.wiener,
    positions: o.PositionsOption = o.Positions.antialias,
    reference: o.ReferenceOption = o.Reference.asked,
    arch: o.Arch = None,
    prefix: o.Prefix = None,
    option: o.Options = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Compare patch sizes on your images: accuracy, fidelity, speed and memory, and an HTML report.

    Start it with `accelerate launch -m anypatch sweep ...` to share the images among processes.
    """
    from anypatch.measure.rows import figure_target
    from anypatch.measure.sweep import sweep

    sizes = parse_sizes(patch_size, "--patch-size")
    image = None if image_size is None else parse_image_size(image_size, "--image-size")
    if no_cache and cache is not None:
        raise AnypatchError("give --cache or --no-cache, not both")
    if figure is not None:
        figure_target(figure)  # before the work
    command = " ".join(["anypatch", *(shlex.quote(a) for a in sys.argv[1:])])
    with said_once(), nothing_empty_left(output), working(f"loading {source}", quiet) as progress:
        result = sweep(
            source,
            sizes,
            image_size=image,
            keep=keep.value,
            data=data,
            images=images,
            output=output,
            class_names=class_names,
            batch_size=batch_size,
            num_workers=workers,
            kernel=kernel.value,
            positions=positions.value,
            reference=reference.value,
            arch=arch,
            limit=limit,
            device=device,
            cache=False if no_cache else cache if cache is not None else True,
            progress=progress,
            reproduce=command,
            **o.loader_options(option, None, prefix),
        )
    if leads():
        if figure is not None:
            result.save_figure(figure)
        _show(result, output, json)


def _show(result: Any, output: Path, json: bool) -> None:
    from anypatch.report.page import COLUMNS as TITLES
    from anypatch.report.page import format_number

    if json:
        out.as_json({**result.to_dict(), "output": str(output)})
        return
    used = [n for n in (*COLUMNS, *QUALITY) if any(row.get(n) is not None for row in result.rows)]
    rows = [["-" if row.get(n) is None else format_number(n, row[n]) for n in used] for row in result.rows]
    out.table([TITLES[n][0] if out.terminal() else n for n in used], rows, right=True)
    if out.terminal():
        out.line(f"report: {output / 'report.html'}")


def view(
    source: o.Source,
    image: Annotated[Path, typer.Argument(parser=o.path, metavar="IMAGE", help="An image file.")],
    *,
    patch_size: o.PatchSizes,
    output: Annotated[Path, typer.Option(parser=o.path, metavar="FILE", help="The picture to write, such as out.png.")],
    image_size: o.ImageSize = None,
    keep: o.KeepOption = o.Keep.image,
    kernel: o.KernelOption = o.Kernel.wiener,
    positions: o.PositionsOption = o.Positions.antialias,
    reference: Annotated[
        Optional[o.Reference],
        typer.Option(help="Draw it, too, and say the others' fidelity to it: asked or native, as in sweep."),
    ] = None,
    device: o.Device = None,
    arch: o.Arch = None,
    prefix: o.Prefix = None,
    option: o.Options = None,
    quiet: o.Quiet = False,
) -> None:
    """Draw an image's patch grid and patch features at several patch sizes, side by side."""
    from anypatch.measure.view import check_target, save_view, view

    sizes = parse_sizes(patch_size, "--patch-size")
    size = None if image_size is None else parse_image_size(image_size, "--image-size")
    check_target(output)
    with nothing_empty_left(output.parent), working(f"loading {source}", quiet):
        picture = view(
            source,
            image,
            sizes,
            image_size=size,
            keep=keep.value,
            kernel=kernel.value,
            positions=positions.value,
            device=device,
            reference=None if reference is None else reference.value,
            arch=arch,
            **o.loader_options(option, None, prefix),
        )
        saved = save_view(picture, output)
    out.line(f"picture: {saved}")


def demo(
    output: Annotated[Path, typer.Option(parser=o.path, metavar="FILE", help="The report to write.")] = Path(
        "anypatch-demo.html"
    ),
    quiet: o.Quiet = False,
) -> None:
    """Adapt the embedded model to several patch sizes, offline, and show what each costs and keeps."""
    from rich.console import Console

    from anypatch.demo import run_demo, table

    with nothing_empty_left(output.parent), working("measuring", quiet) as progress:
        result = run_demo(output=output, progress=lambda done, total: progress("measuring", done, total))
    # 100 columns in a pipe: the demo is read by people there, too, and its table is no wider
    Console(width=None if out.terminal() else 100).print(table(result))
    out.line(f"report: {output}")
