"""Read configurations that somebody else wrote: bounded in size and depth, and nothing in them names what to open.

What a configuration may say is its host library's business; this is what no configuration of any library may do.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from anypatch.errors import CheckpointError, listed
from anypatch.files.opening import first_line, open_regular

MAX_TEXT = 64 << 20  # bytes; configurations with the names of 21,000 classes take one megabyte
MAX_NESTING = 64  # the deepest of transformers' own is 6
# How many of a thing a model has one after another. The largest models have some hundred layers and experts; each
# becomes a module, so a number without bound is memory without bound.
COUNTS = re.compile(
    r"(^|_)(depths?|layers|blocks|experts|heads|stages|queries|num_hidden_layers|num_layers|n_layers?|num_layer)$"
)
MAX_COUNT = 10_000  # a hundred times what the largest have
# Of which transformers makes a table of names, whether or not there is a head.
LABELS = re.compile(r"(^|_)num_labels$")
MAX_LABELS = 1 << 20  # ImageNet-21k has 21,843
MAX_NAME = 255  # bytes of the name of a file, on every usual file system
MAX_NUMBER = 1 << 40  # of any meaning: above it, a product of two overflows what torch counts in
# Not a name but a place, for any library: a directory, a drive, an address, a prefix that says where from.
PLACE = re.compile(r"[/\\:]|^[.~]")


def read_json(path: Path) -> dict[str, Any]:
    """A file of JSON that holds a table.

    Raises:
        CheckpointError: it does not exist, is no regular file, too large, nested too deeply, or no table.
    """
    with open_regular(path) as file:
        data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise CheckpointError(f"{path} has more than {MAX_TEXT} bytes, which no configuration has")
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise CheckpointError(f"{path} is damaged: nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it is no table")
    return value


def read_config(path: Path) -> dict[str, Any]:
    """A configuration of a model: as :func:`read_json`, and with numbers that a model can have.

    Raises:
        CheckpointError: as :func:`read_json`; or a number of layers, or any other, that no model has.
    """
    config = read_json(path)
    for keys, value in entries(config, path):
        if type(value) is int:
            name = next((k for k in reversed(keys) if isinstance(k, str)), "")
            if COUNTS.search(name) and value > MAX_COUNT:
                raise CheckpointError(f"{path}: {name} is {value}, and no model has more than {MAX_COUNT}")
            if LABELS.search(name) and value > MAX_LABELS:
                raise CheckpointError(f"{path}: {name} is {value}, and no model has more than {MAX_LABELS}")
            if abs(value) > MAX_NUMBER:
                raise CheckpointError(f"{path}: {name} is {value}, which is no size of a model")
    return config


def entries(config: Any, path: Path) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every plain value of a configuration, with the keys that lead to it.

    Raises:
        CheckpointError: nested too deeply.
    """
    stack: list[tuple[tuple[Any, ...], Any]] = [((), config)]
    while stack:
        keys, value = stack.pop()
        if len(keys) > MAX_NESTING:
            raise CheckpointError(f"{path} is damaged: nested more than {MAX_NESTING} deep")
        if isinstance(value, dict):
            stack += [((*keys, key), item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            stack += [((*keys, index), item) for index, item in enumerate(value)]
        else:
            yield keys, value


def require_allowed(arguments: Any, allowed: Collection[str], where: str) -> dict[str, Any]:
    """Constructor arguments that a file names, after each was held against those that describe a model.

    Raises:
        CheckpointError: another argument, or one whose text is a place and not a name.
    """
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{where} is no table of arguments: {str(arguments)[:100]}")
    surplus = [str(key)[:100] for key in arguments if key not in allowed]
    if surplus:
        raise CheckpointError(
            f"{where} has {listed(surplus)}, which is nothing that describes a model: a configuration may not "
            f"say what else to open or run; remove it"
        )
    for key, value in arguments.items():
        for keys, text in entries(value, Path(where)):
            if isinstance(text, str) and PLACE.search(text):
                raise CheckpointError(
                    f"{where}: {'.'.join(map(str, (key, *keys)))} is {text[:100]!r}, which is no name"
                )
    return arguments


def require_name(value: Any, where: str) -> str:
    """The name of an architecture that a file says; not a place where to find one.

    Raises:
        CheckpointError: it is none.
    """
    if not isinstance(value, str) or not value or PLACE.search(value):
        raise CheckpointError(f"{where} names {str(value)[:100]!r}, which is no architecture of the library's own")
    return value


def require_file_name(value: Any, where: str) -> str:
    """The name of a file beside the one that says it; not a place elsewhere.

    Raises:
        CheckpointError: it is none.
    """
    plain = isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\\0")
    plain = plain and len(value.encode("utf-8", "surrogatepass")) <= MAX_NAME
    if not plain or (os.name == "nt" and ":" in value):
        raise CheckpointError(f"{where} names a file outside the directory: {str(value)[:200]!r}")
    return str(value)
