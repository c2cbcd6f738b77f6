"""Options that several commands read alike."""

from __future__ import annotations

import json
from typing import Annotated, Any, Optional

import typer

from anypatch.errors import AnypatchError

# typer reads annotations at run time, where Python 3.10 needs Optional.
Arch = Annotated[Optional[str], typer.Option(help="Architecture of a checkpoint file, e.g. timm:NAME.")]  # noqa: UP045
Options = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--option", "-o", metavar="KEY=VALUE", help="Passed to the host library's loader, e.g. pretrained=false."
    ),
]


def loader_options(options: list[str] | None, arch: str | None) -> dict[str, Any]:
    """``KEY=VALUE`` pairs as keyword arguments; values are JSON where they parse, else text."""
    found: dict[str, Any] = {} if arch is None else {"arch": arch}
    for option in options or []:
        key, equals, value = option.partition("=")
        if not equals or not key.isidentifier():
            raise AnypatchError(f"--option takes KEY=VALUE, got {option!r}")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found
