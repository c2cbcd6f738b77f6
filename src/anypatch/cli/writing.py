"""Commands that write a model: ``adapt`` and ``convert``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from anypatch.cli import options as o
from anypatch.cli import output as out
from anypatch.cli.helping import Command
from anypatch.cli.models import load_source
from anypatch.cli.stderr import working
from anypatch.cli.targets import nothing_empty_left, require_format, require_target
from anypatch.core.geometry import Geometry, Keep, parse_image_size, parse_size, show, target_geometry
from anypatch.errors import AnypatchWarning, GeometryError
from anypatch.files.paths import place


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(cls=Command)(adapt)
    app.command(cls=Command)(convert)


def adapt(
    source: o.Source,
    output: o.Folder,
    patch_size: o.PatchSize = None,
    image_size: o.ImageSize = None,
    keep: o.KeepOption = o.Keep.image,
    kernel: o.KernelOption = o.Kernel.wiener,
    positions: o.PositionsOption = o.Positions.antialias,
    arch: o.Arch = None,
    prefix: o.Prefix = None,
    option: o.Options = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Load a model, change its patch size or image size, and save it in its library's own format."""
    from anypatch.adaptation import adapt, geometry
    from anypatch.sources import save

    sizes = _sizes(patch_size, image_size)
    require_target(output, source, overwrite)
    if not place(source).exists():
        _require_fit(source, option, sizes, keep.value)
    model = load_source(source, option, arch, True, quiet, prefix)
    before = geometry(model)
    require_format(output, before.library)
    with working("adapting", quiet):
        adapt(model, *sizes, keep=keep.value, kernel=kernel.value, positions=positions.value)
    after = geometry(model)
    if after == before:
        warnings.warn(f"{source} has these sizes already: it is written as it is", AnypatchWarning, stacklevel=1)
    with nothing_empty_left(output), working(f"writing {output}", quiet):
        save(model, output)
    if json:
        found = {"source": source, "output": str(output)}
        out.as_json({**found, "before": out.geometry_json(before), "after": out.geometry_json(after)})
    else:
        out.line(f"{_steps(before, after)}: {output}")


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            parser=o.path,
            metavar="SOURCE",
            help="A checkpoint file, or a folder of transformers, timm or open_clip.",
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(parser=o.path, metavar="TARGET", help="The .safetensors file, or the folder, to write."),
    ],
    patch_size: o.PatchSize = None,
    image_size: o.ImageSize = None,
    keep: o.KeepOption = o.Keep.image,
    kernel: o.KernelOption = o.Kernel.wiener,
    positions: o.PositionsOption = o.Positions.antialias,
    arch: o.Arch = None,
    prefix: o.Prefix = None,
    link: Annotated[bool, typer.Option(help="Hard-link files that do not change instead of copying them.")] = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Convert file to file, without loading the model: only what follows the geometry is computed."""
    from anypatch.conversion import convert
    from anypatch.hosts.loading import speaking_for

    patch, image = _sizes(patch_size, image_size)
    require_target(target, str(source), overwrite)
    with nothing_empty_left(target), working(f"writing {target}", quiet), speaking_for("the host library", str(source)):
        convert(
            source,
            target,
            patch,
            image,
            keep=keep.value,
            kernel=kernel.value,
            positions=positions.value,
            arch=arch,
            prefix=prefix,
            link=link,
        )
    if json:
        out.as_json({"source": str(source), "target": str(target), "patch_size": patch, "image_size": image})
    else:
        out.line(f"wrote {target}")


def _sizes(patch_size: str | None, image_size: str | None) -> tuple[Any, Any]:
    """The sizes that were typed.

    Raises:
        GeometryError: none was, or one is no size.
    """
    if patch_size is None and image_size is None:
        raise GeometryError("nothing to change: give --patch-size, --image-size or both")
    patch = None if patch_size is None else parse_size(patch_size, "--patch-size")
    return patch, None if image_size is None else parse_image_size(image_size, "--image-size")


def _require_fit(source: str, option: list[str] | None, sizes: tuple[Any, Any], keep: Keep) -> None:
    """That the sizes fit a model with a name, found out before its weights are downloaded.

    Raises:
        GeometryError: they do not.
        UnsupportedModelError: the model takes no other patch.
    """
    from anypatch.adaptation import geometry, make_plan
    from anypatch.core.empty import empty

    try:
        model = empty(lambda: load_source(source, option, None, False, True))
        current = geometry(model)
    except Exception:  # whatever it is, loading finds it as well, and says it of the weights that were asked for
        return
    try:
        target_geometry(current, *sizes, keep)
    except GeometryError:
        make_plan(model, *sizes, keep=keep)  # says the same, or what no size would mend
        raise


def _steps(before: Geometry, after: Geometry) -> str:
    names = ("patch", "image", "grid")
    pairs = zip(names, (before.patch_size, before.image_size, before.grid), strict=True)
    new = (after.patch_size, after.image_size, after.grid)
    return ", ".join(f"{name} {show(old)} -> {show(now)}" for (name, old), now in zip(pairs, new, strict=True))
