"""Run the proof over every family and write the table: ``make coverage-table``."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from anypatch.adaptation import geometry
from anypatch.core.geometry import show
from anypatch.errors import AnypatchError
from anypatch.proof import check
from families import LIBRARIES, Family, families

PASS, REFUSED, NOT_YET = "PASS", "REFUSED", "NOT YET"
PACKAGES = ("torch", "accelerate", "timm", "transformers", "diffusers", "open_clip_torch", "torchvision")
MEASURED = Path(__file__).parents[1] / "src/anypatch/hosts/transformers/measured.json"
HEADER = ("library", "family", "patch embedding", "positions", "patch", "error", "result")


@dataclass(frozen=True)
class Row:
    """What the proof said about one family.

    Attributes:
        family: the family.
        result: ``"PASS"``, ``"REFUSED"`` or ``"NOT YET"``.
        patch: the patch sizes that were proved, such as ``16x16 → 32x48``.
        error: the relative error of the proof, where it ran.
        reason: why the model is refused or not covered yet.
    """

    family: Family
    result: str
    patch: str = ""
    error: float | None = None
    reason: str = ""


def prove(family: Family) -> Row:
    """Build a family's tiny model and run the proof on it; whatever goes wrong becomes the row's reason."""
    patch = ""
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model = family.build()
            current = geometry(model).patch_size
            target = family.patch_size
            if target is None:
                target = tuple(2 * side for side in current)
            found = check(model, target)
        patch = f"{show(current)} → {show(found.patch_size)}"
        if not found.passed:
            return Row(family, NOT_YET, patch, found.error, "the function is not preserved")
        if family.refused:
            return Row(family, NOT_YET, patch, found.error, "passes, although it is listed as refused")
        return Row(family, PASS, patch, found.error)
    except AnypatchError as error:
        return Row(family, REFUSED if family.refused else NOT_YET, patch, reason=str(error))
    except Exception as error:
        return Row(family, NOT_YET, patch, reason=f"{type(error).__name__}: {error}")


def counts(rows: Iterable[Row]) -> Counter[str]:
    """How many rows have each result."""
    return Counter(row.result for row in rows)


def summary(rows: Sequence[Row]) -> str:
    """The counts as one sentence per library and one for all, for the table and the terminal."""
    lines = []
    for library in dict.fromkeys(row.family.library for row in rows):
        lines.append(f"- {library}: {_count([row for row in rows if row.family.library == library])}")
    return "\n".join([*lines, f"- all: {_count(rows)}"])


def _count(rows: Sequence[Row]) -> str:
    found = counts(rows)
    return f"{found[PASS]} {PASS}, {found[REFUSED]} {REFUSED}, {found[NOT_YET]} {NOT_YET}"


def table(rows: Sequence[Row]) -> str:
    """The whole document, Markdown."""
    lines = [
        "# Coverage",
        "",
        "Made by `make coverage-table`, which runs the proof of `anypatch.check` on a tiny model of every "
        "family with random weights: each patch of a random input is enlarged, the model is adapted, and the outputs "
        "are compared. PASS is a relative error below 1e-4. REFUSED is an error that `adapt` raises before it changes "
        "anything, with its reason.",
        "",
        summary(rows),
        "",
        _line(HEADER),
        _line(["---"] * len(HEADER)),
    ]
    for row in rows:
        family = row.family
        result = f"{row.result}: {row.reason}" if row.reason else row.result
        error = "" if row.error is None else f"{row.error:.0e}"
        lines.append(_line([family.library, family.name, family.embedding, family.positions, row.patch, error, result]))
    return "\n".join([*lines, "", f"Versions: {versions()}.", ""])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def versions() -> str:
    """Versions of the host libraries that are installed."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def measure(chosen: Iterable[Family]) -> str:
    """What a plain run of transformers' tiny models tells of their types, as the text of ``measured.json``.

    For each fact and model type: whether all of its models, none of them, or some have it.
    """
    from anypatch.hosts.transformers.model import describe
    from anypatch.hosts.transformers.probing import FACTS, measure_one

    seen: dict[str, dict[str, set[bool]]] = {fact: {} for fact in FACTS}
    for family in chosen:
        if family.refused:
            continue
        for fact in FACTS:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(0)
                model = family.build()
                kinds, found = describe(model).kinds, measure_one(model, fact)
            if fact == "bound_grid":  # a decoder's windows are no matter of the tower's type
                kinds = kinds[:1]
            for kind in kinds if found is not None else ():
                seen[fact].setdefault(kind, set()).add(found)
    answers = {
        fact: {
            "always": sorted(kind for kind, found in types.items() if found == {True}),
            "never": sorted(kind for kind, found in types.items() if found == {False}),
            "sometimes": sorted(kind for kind, found in types.items() if len(found) > 1),
        }
        for fact, types in seen.items()
    }
    return json.dumps(answers, indent=2) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit status 1 if any family is not covered yet."""
    parser = argparse.ArgumentParser(prog="make coverage-table", description=__doc__)
    parser.add_argument("--library", action="append", choices=LIBRARIES, help="only this library; may be repeated")
    parser.add_argument("--family", help="only families whose name contains this")
    parser.add_argument("--output", type=Path, help="default: docs/coverage.md, unless the run is a part only")
    parser.add_argument("--measure", action="store_true", help="write what transformers' models tell by a plain run")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # tiny models: threads would only wait for each other
    if options.measure:
        from families.transformers import variants

        MEASURED.write_text(measure([*families("transformers"), *variants()]), encoding="utf-8")
        return 0
    rows = []
    for family in families(*(options.library or ())):
        if options.family and options.family not in family.name:
            continue
        start = time.perf_counter()
        row = prove(family)
        rows.append(row)
        error = "" if row.error is None else f" {row.error:.0e}"
        reason = f": {row.reason}" if row.reason else ""
        seconds = time.perf_counter() - start
        print(f"{family.library} {family.name}{error} {row.result}{reason} ({seconds:.1f} s)", flush=True)
        gc.collect()
    if not rows:
        print("no family matches", file=sys.stderr)
        return 2
    output = options.output
    if output is None and not options.library and not options.family:
        output = Path("docs/coverage.md")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(table(rows), encoding="utf-8")
    print(summary(rows))
    return 1 if counts(rows)[NOT_YET] else 0


if __name__ == "__main__":
    sys.exit(main())
