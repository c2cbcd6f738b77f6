"""The command that wins features back: ``tune``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from anypatch.cli import options as o
from anypatch.cli import output as out
from anypatch.cli.helping import Command
from anypatch.cli.stderr import leads, said_once, working
from anypatch.core.geometry import parse_image_size, parse_sizes
from anypatch.errors import AnypatchError

# typer reads annotations at run time, where Python 3.10 needs Optional.
# ruff: noqa: UP045


class Precision(str, Enum):
    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(cls=Command)(tune)


def tune(
    source: o.Source,
    patch_size: o.PatchSizes,
    images: Annotated[
        Path,
        typer.Option(
            parser=o.path, metavar="FOLDER", help="Images, at any depth; a few hundred will do, labels are not needed."
        ),
    ],
    output: Annotated[
        Path, typer.Option(parser=o.path, metavar="FOLDER", help="For the model, its card and the report.")
    ],
    image_size: o.ImageSize = None,
    keep: o.KeepOption = o.Keep.image,
    minutes: Annotated[
        Optional[float], typer.Option(metavar="NUMBER", help="How long, about; 10 without it and without --steps.")
    ] = None,
    steps: Annotated[Optional[int], typer.Option(metavar="NUMBER", help="How many steps, instead of minutes.")] = None,
    learning_rate: Annotated[str, typer.Option(metavar="NUMBER", help="The highest; auto tries several.")] = "auto",
    lora: Annotated[
        Optional[int], typer.Option(metavar="RANK", help="Train adapters of this rank, by peft, and merge them.")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="NUMBER", help="Images per step, of all processes together.")] = 16,
    workers: Annotated[
        Optional[int],
        typer.Option(metavar="NUMBER", help="Processes that cut crops; by the number of cores without it."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="NUMBER", help="Of everything that is drawn.")] = 0,
    precision: Annotated[
        Optional[Precision], typer.Option(help="Of the forward passes; accelerate's own choice without it.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the interrupted run in --output.")] = False,
    overwrite: o.Overwrite = False,
    device: o.Device = None,
    kernel: o.KernelOption = o.Kernel.wiener,
    positions: o.PositionsOption = o.Positions.antialias,
    arch: o.Arch = None,
    prefix: o.Prefix = None,
    option: o.Options = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Adapt a model to a patch size, or to several, and win back without labels what it loses there.

    Start it with `accelerate launch -m anypatch tune ...` for several processes, machines, or mixed precision.
    """
    from anypatch.tuning.running import tune

    sizes = parse_sizes(patch_size, "--patch-size")
    image = None if image_size is None else parse_image_size(image_size, "--image-size")
    with said_once(), working(f"loading {source}", quiet) as progress:
        result = tune(
            source,
            images=images,
            patch_size=sizes,
            image_size=image,
            keep=keep.value,
            minutes=minutes,
            steps=steps,
            learning_rate=_rate(learning_rate),
            lora=lora,
            output=output,
            kernel=kernel.value,
            positions=positions.value,
            batch_size=batch_size,
            num_workers=workers,
            device=device,
            seed=seed,
            progress=progress,
            precision=None if precision is None else precision.value,
            resume=resume,
            overwrite=overwrite,
            **o.loader_options(option, arch, prefix),
        )
    if not leads():
        return
    if json:
        out.as_json({**result.to_dict(), "output": str(output)})
        return
    names = list(result.rows[0])
    rows = [[f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()] for row in result.rows]
    out.table([result.titles.get(n, n) if out.terminal() else n for n in names], rows, right=True)
    if out.terminal():
        for note in result.notes:
            out.line(f"note: {note}")
        out.line(f"report: {output / 'report.html'}")


def _rate(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise AnypatchError(f"--learning-rate must be auto or a number, got {text!r}") from None
