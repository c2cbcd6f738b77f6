"""The tensors of a scripted module, by the names of the modules that hold them."""

from __future__ import annotations

import pickle
from typing import Any

from torch import Tensor

from anypatch.files.header import MAX_NAME
from anypatch.files.pickles import Inert

MAX_DEPTH = 64  # of modules within modules; those of real models are some ten deep


def scripted_tensors(root: Any) -> dict[str, Tensor]:
    """The parameters and buffers of a scripted module by name; its code is not looked at.

    Raises:
        UnpicklingError: nested deeper, or named longer, than a module is.
    """
    tensors: dict[str, Tensor] = {}
    stack: list[tuple[str, int, Any]] = [("", 0, root)]
    seen: set[int] = set()
    while stack:
        prefix, depth, value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        fields = {**vars(value), **value} if isinstance(value, Inert) else value if isinstance(value, dict) else {}
        for key, item in fields.items():
            if not isinstance(key, str) or not isinstance(item, (Tensor, dict)):
                continue
            # names nested without end would take the square of a file's size
            if len(prefix) + len(key) > MAX_NAME or depth > MAX_DEPTH:
                raise pickle.UnpicklingError(f"a module nested {depth} deep, named {(prefix + key)[:100]}…")
            if isinstance(item, Tensor):
                tensors[prefix + key] = item
            else:
                stack.append((f"{prefix}{key}.", depth + 1, item))
    return tensors
