"""The classes of labelled data in words."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anypatch.errors import DataError, listed
from anypatch.files.paths import at_home, place


def read_class_names(names: str | Path | Sequence[str] | dict[str, str], classes: Sequence[str]) -> list[str]:
    """Names of the classes in words, in the order of ``classes``.

    Args:
        names: a file (one name a line, or JSON: a list, or an object from class to name), the names themselves, or
            one string with commas.
        classes: the classes as the data calls them.

    Raises:
        DataError: another number of names than classes, or names for classes that are not there.
    """
    value: Any = names
    origin = "class names"
    if isinstance(names, Path) or (isinstance(names, str) and os.path.isfile(at_home(names))):
        origin = str(names)
        try:
            text = place(names).read_text(encoding="utf-8")
            value = json.loads(text) if text.lstrip()[:1] in ("[", "{") else text.splitlines()
        except (OSError, ValueError) as error:
            raise DataError(f"{names} cannot be read: {error}") from error
    elif isinstance(names, str):
        if "," not in names:
            raise DataError(f"class names: no such file: {names} (or give the names with commas)")
        value = names.split(",")
    if isinstance(value, dict):
        missing = [c for c in classes if c not in value]
        if missing:
            raise DataError(f"{origin}: no name for class {listed(missing)}")
        return [str(value[c]) for c in classes]
    found = [str(n).strip() for n in value if str(n).strip()]
    if len(found) != len(classes):
        raise DataError(
            f"{origin}: {len(found)} names for {len(classes)} classes; they have to stand in the order of the "
            f"classes: {listed(classes)}"
        )
    return found
