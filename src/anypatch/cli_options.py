"""Options that several commands read alike."""

from __future__ import annotations

import json
from typing import Any

from anypatch.errors import AnypatchError


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
