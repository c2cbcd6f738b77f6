"""Commands that look at a model and write nothing: ``inspect`` and ``check``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from anypatch.cli import options as o
from anypatch.cli import output
from anypatch.cli.helping import Command
from anypatch.cli.stderr import working
from anypatch.core.geometry import Size, parse_image_size, parse_size, show, target_geometry
from anypatch.files.paths import place

if TYPE_CHECKING:
    from anypatch.core.plan import Change


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(cls=Command)(inspect)
    app.command(cls=Command)(check)


def load_source(
    source: str, options: list[str] | None, arch: str | None, weights: bool, quiet: bool, prefix: str | None = None
) -> Any:
    """The model at its native geometry; without weights where it has a name and they are not asked for."""
    from anypatch.sources import load

    found = o.loader_options(options, arch, prefix)
    if not weights and not place(source).is_file() and arch is None:
        found.setdefault("pretrained", False)
    with working(f"loading {source}" if weights else f"building {source}", quiet):
        return load(source, **found)


def inspect(
    source: o.Source,
    *,
    patch_size: o.PatchSize = None,
    image_size: o.ImageSize = None,
    keep: o.KeepOption = o.Keep.image,
    weights: o.Weights = False,
    arch: o.Arch = None,
    prefix: o.Prefix = None,
    option: o.Options = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Say what a model is and, with sizes, what adapting it would change: every tensor with its role."""
    from anypatch.inspection import changes_for, inspect

    patch = None if patch_size is None else parse_size(patch_size, "--patch-size")
    image = None if image_size is None else parse_image_size(image_size, "--image-size")
    model = load_source(source, option, arch, weights, quiet, prefix)
    with working("inspecting", quiet):
        facts = inspect(model)
        asked = patch is not None or image is not None
        changes = changes_for(model, patch, image, keep=keep.value) if asked else []
    geometry = facts.geometry
    target = target_geometry(geometry, patch, image, keep.value) if asked else geometry
    if json:
        found: dict[str, Any] = {"source": source, "class": facts.class_name, **output.geometry_json(geometry)}
        found |= {"embedding": facts.embedding, "positions": facts.positions}
        if asked:
            found["adapted"] = output.geometry_json(target)
            said = ("name", "kind", "role", "old", "new")
            found["changes"] = [{name: getattr(change, name) for name in said} for change in changes]
        output.as_json(found)
        return
    pairs = [
        ("library", geometry.library),
        ("class", facts.class_name),
        ("patch size", _step(geometry.patch_size, target.patch_size)),
        ("image size", _step(geometry.image_size, target.image_size)),
        ("grid", _step(geometry.grid, target.grid)),
        ("prefix tokens", str(geometry.prefix_tokens)),
        ("embedding", facts.embedding),
        ("positions", facts.positions),
    ]
    output.values(pairs)
    if asked:
        _show(changes)


def _show(changes: Sequence[Change]) -> None:
    """On a terminal tensors and the rest apart; in a pipe one table, whose last column says which is which."""
    columns = ("name", "role", "old", "new")
    rows = [(c.name, c.role, str(c.old), str(c.new)) for c in changes]
    if not output.terminal():
        output.table((*columns, "kind"), [(*r, c.kind) for r, c in zip(rows, changes, strict=True)], title="changes")
        return
    tensors = [row for row, change in zip(rows, changes, strict=True) if change.kind == "tensor"]
    others = [row for row, change in zip(rows, changes, strict=True) if change.kind != "tensor"]
    if not changes:
        output.line("\nnothing would change")
    for found, what in ((tensors, "tensors, resampled"), (others, "attributes, buffers and modules, set anew")):
        if found:
            output.table(columns, found, title=f"{len(found)} {what}")


def _step(old: Size | None, new: Size | None) -> str:
    return show(old) if old == new else f"{show(old)} -> {show(new)}"


def check(
    source: o.Source,
    *,
    patch_size: o.OnePatchSize,
    weights: o.Weights = False,
    arch: o.Arch = None,
    prefix: o.Prefix = None,
    option: o.Options = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Prove on random weights that growing the patch preserves what the model computes."""
    from anypatch.proof import check

    patch = parse_size(patch_size, "--patch-size")
    model = load_source(source, option, arch, weights, quiet, prefix)
    with working("proving", quiet):
        result = check(model, patch)
    if json:
        found = {"source": source, "patch_size": result.patch_size, "passed": result.passed}
        output.as_json({**found, "error": result.error, "compared": result.compared})
    else:
        verdict = "PASS" if result.passed else "FAIL"
        output.line(
            f"{verdict} relative error {result.error:.1e} over {result.compared} outputs at patch "
            f"{show(result.patch_size)}"
        )
    if not result.passed:
        raise typer.Exit(1)
