"""The blocks of code of a Markdown document, and what is said about running them.

A comment on the line before a block says so where it cannot be run here, with the reason: `<!-- test: skip REASON -->`;
`<!-- test: slow -->` leaves it to the slow tests; `<!-- test: replace LONG by SHORT -->` runs it with other words
where as it stands it would take minutes. Everything else runs.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DIRECTIVE = re.compile(r"<!-- test: (skip|slow|replace)\b ?(.*?) ?-->")
LANGUAGES = {"python": "python", "": "shell", "sh": "shell", "bash": "shell", "console": "shell", "shell": "shell"}


@dataclass(frozen=True)
class Block:
    """One block: its language (`python`, `shell`, or another, which is not run), its text, its first line's number."""

    language: str
    text: str
    line: int
    skip: str = ""
    slow: bool = False


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a document.

    Raises:
        ValueError: a block is skipped without a reason, or never closed.
    """
    found: list[Block] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        fence = re.match(r"( *)```(\w*)", lines[number])
        if not fence:
            number += 1
            continue
        end = next((i for i in range(number + 1, len(lines)) if lines[i].strip() == "```"), None)
        if end is None:
            raise ValueError(f"{path}:{number + 1}: a block that never ends")
        before = DIRECTIVE.search(lines[number - 1]) if number else None
        if before and before[1] == "skip" and not before[2]:
            raise ValueError(f"{path}:{number}: skipped without a reason")
        text = "\n".join(line.removeprefix(fence[1]) for line in lines[number + 1 : end])
        if before and before[1] == "replace":
            long, _, short = before[2].partition(" by ")
            if not short or long not in text:
                raise ValueError(f"{path}:{number}: nothing to replace: {before[2]!r}")
            text = text.replace(long, short)
        language = LANGUAGES.get(fence[2], fence[2])
        skip = before[2] if before and before[1] == "skip" else ""
        found.append(Block(language, text, number + 2, skip, bool(before and before[1] == "slow")))
        number = end + 1
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The command lines of a shell block: comments cut, continued lines joined, a prompt left out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words:
            yield words
