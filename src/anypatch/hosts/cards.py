"""The model card beside what is saved: what the model was, what it became, how, and with which version."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anypatch.core.geometry import Geometry, show
from anypatch.core.history import Step
from anypatch.files.atomic import replacing_file
from anypatch.version import __version__

CARD = "README.md"
OWN = "README.anypatch.md"  # where the place of the card is taken, by the source's or by a user's
SIGN = "<!-- written by anypatch -->"
TUNING = "TUNING.md"  # how weights were tuned, written by tune; it comes along with the weights
LINK = f"How its weights were tuned, and what that gained: [{TUNING}]({TUNING}).\n"
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
EARLIER = "\n## Before that\n"
MAX_CARD = 1 << 20  # bytes of a card that comes along; the longest on the hub take some hundred kilobytes


def card(
    library: str, version: str, kind: str, steps: Sequence[Step], source: str | Path | None, target: Path
) -> dict[str, str]:
    """The card of an adapted model, by file name; nothing where nothing was done.

    The source's own card stays as it is, and so does one that a user wrote into the target; then ours has a name of
    its own. A card of ours in the source is continued.

    Args:
        library: that reads the model.
        version: of the library.
        kind: the model's class.
        steps: what was done to it.
        source: where it came from, if that is known.
        target: the directory that it goes to.
    """
    if not steps:
        return {}
    folder = _folder(source)
    beside = [] if folder is None else [_read(folder / CARD), _read(folder / OWN)]
    before = next((text for text in beside if text and SIGN in text), None)
    text = _text(library, version, kind, steps, source)
    text += f"\n{LINK}" if folder is not None and (folder / TUNING).is_file() else ""
    if before is not None:
        text += EARLIER + before.partition(SIGN)[2].replace("\n# ", "\n### ", 1)
    there = _read(target / CARD)
    taken = own_card(source) is not None or (there is not None and SIGN not in there)
    return {OWN if taken else CARD: text}


def link_tuning(folder: Path, title: str) -> None:
    """The cards of ours in a folder name the one that says how the weights were tuned; there is one at least."""
    if not (folder / CARD).exists():
        _write(folder / CARD, f"{SIGN}\n# {title}\n")
    for path in (folder / CARD, folder / OWN):
        text = _read(path) or ""
        if SIGN in text and LINK not in text:
            now, earlier, rest = text.partition(EARLIER)
            _write(path, f"{now}\n{LINK}{earlier}{rest}")


def own_card(source: str | Path | None) -> Path | None:
    """The card that a source has, if anypatch did not write it."""
    folder = _folder(source)
    text = None if folder is None else _read(folder / CARD)
    return None if folder is None or text is None or SIGN in text else folder / CARD


def beside(source: str | Path | None, target: Path) -> list[Path]:
    """What a source says for people, which comes along unless ``target`` has its own: its card, its licences, and how
    its weights were tuned."""
    folder, card = _folder(source), own_card(source)
    found = [] if folder is None else [path for name in (*LICENCES, TUNING) for path in sorted(folder.glob(name))]
    found = [path for path in found if path.is_file() and path.stat().st_size <= MAX_CARD]
    there = _read(target / CARD)
    if card is not None and (there is None or SIGN in there):
        found.append(card)
    return [path for path in found if path.name == CARD or not (target / path.name).exists()]


def _folder(source: str | Path | None) -> Path | None:
    """The directory that a source names, with or without its library."""
    if source is None:
        return None
    for path in (Path(source), Path(str(source).partition(":")[2] or ".nowhere")):
        if path.is_dir():
            return path
    return None


def _write(path: Path, text: str) -> None:
    with replacing_file(path) as file:
        file.write(text.encode())


def _read(path: Path) -> str | None:
    try:
        if not path.is_file() or path.stat().st_size > MAX_CARD:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _text(library: str, version: str, kind: str, steps: Sequence[Step], source: str | Path | None) -> str:
    first, last = steps[0].old, steps[-1].new
    rows = [("patch size", "patch_size"), ("image size", "image_size"), ("grid", "grid")]
    table = "\n".join(f"| {label} | {_size(first, name)} | {_size(last, name)} |" for label, name in rows)
    done = "\n".join(
        f"- patch {_size(s.old, 'patch_size')} to {_size(s.new, 'patch_size')}, image {_size(s.old, 'image_size')} to "
        f"{_size(s.new, 'image_size')}: kernel `{s.kernel}`, positions `{s.positions}`"
        for s in steps
    )
    name = library if library != "generic" else "torch"
    where = "" if source is None else f" It was loaded from `{_name(source)}`."
    return f"""---
library_name: {name}
tags:
- anypatch
---
{SIGN}
# {kind} at patch {_size(last, "patch_size")}

A {kind} of {name}{f" {version}" if version else ""}, changed to another geometry by anypatch {__version__}.{where}

| | before | now |
|---|---|---|
{table}

{done}

It loads in {name} without anypatch.
"""


def _size(geometry: Geometry, name: str) -> str:
    size = getattr(geometry, name)
    return "any" if size is None else show(size)


def _name(source: str | Path) -> str:
    """A source as others can read it: of a directory or file here, its name."""
    prefix, colon, rest = str(source).partition(":")
    if Path(source).exists():
        return Path(source).name
    return f"{prefix}:{Path(rest).name}" if colon and Path(rest).exists() else str(source)
