"""What may stand in a directory of transformers' format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anypatch.errors import CheckpointError
from anypatch.files.configs import PLACE, entries
from anypatch.hosts.timm.safety import require_nested


def require_safe(config: dict[str, Any], path: Path) -> None:
    """Look at what transformers would fetch, open or run on the word of a configuration, at any depth.

    Raises:
        CheckpointError: a backbone that is a place, a kernel from a hub, or an argument of timm's that opens a file.
    """
    require_nested(config, path)
    for keys, value in entries(config, path):
        key = str(keys[-1])
        if not isinstance(value, str):
            continue
        # "repository/kernel" there is compiled code that transformers fetches and runs
        if key.endswith(("attn_implementation", "experts_implementation")) and PLACE.search(value):
            raise CheckpointError(f"{path}: {key} is {value[:100]!r}, which is code from elsewhere")
        # a name of timm's has no slash, a name on a hub one
        if key in ("backbone", "architecture") and (value.count("/") > 1 or PLACE.search(value.replace("/", "", 1))):
            raise CheckpointError(f"{path}: {key} is {value[:100]!r}, which is no name but a place")
