"""Which of a library's models its own tests run on: the smallest of every kind that can be adapted.

timm's tests run on 1,371 models, convolutional networks and those of gigabytes among them, open_clip's on 150. Two
models are of one kind where they are of one class and their parameters have the same names, layers counted once: the
tests of the second repeat those of the first. So every model of the library is built empty, once per version; those
whose patch size is known are grouped, and of each group the one with the least work for a forward pass is taken. What
takes more than `MOST` is left out, and counted on the page.

    python -m peers.kinds timm .cache/peers/timm-1.0.31-kinds.jsonl      # goes on where an earlier run was cut short
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

# Parameters times tokens: ViT-S/16 at 224 has 4.4e9, a forward pass of 2 x that, a second on one core with its backward
# pass. ViT-B/16 has 1.7e10: its tests take four times as long, and prove the same unless a kind has nothing smaller.
MOST = 1.8e10


# So many models of one source file without a known patch size speak for the rest of it: resnets are a third of timm.
FEW = 4


def _timm() -> tuple[list[list[str]], Callable[[str], nn.Module]]:
    import timm

    return [timm.list_models(module=module) for module in timm.list_modules()], timm.create_model


def _open_clip() -> tuple[list[list[str]], Callable[[str], nn.Module]]:
    import open_clip

    names = open_clip.list_models()
    return [[name] for name in names], lambda name: open_clip.create_model(name, pretrained_text=False)


LIBRARIES = {"timm": _timm, "open_clip": _open_clip}


def measure(library: str, target: Path) -> None:
    """Add a line to `target` for every model of the library that is not there yet."""
    groups, create = LIBRARIES[library]()
    known = {line["name"]: line for line in lines(target)}
    with target.open("a", encoding="utf-8") as file:
        for names in groups:
            unknown = 0
            for name in names:
                if name not in known:
                    said = {"unknown": "as others of its file"} if unknown >= FEW else _described(create, name)
                    known[name] = {"name": name, **said}
                    file.write(json.dumps(known[name]) + "\n")
                    file.flush()
                unknown = unknown + 1 if "unknown" in known[name] else -len(names)


def _described(create: Callable[[str], nn.Module], name: str) -> dict[str, Any]:
    import anypatch
    from anypatch.core.empty import empty

    try:
        model = empty(lambda: create(name))
    except Exception as error:  # what the library cannot build without the hub, or at all
        return {"unbuilt": f"{type(error).__name__}: {error}"[:200]}
    try:
        geometry = anypatch.geometry(model)
    except anypatch.AnypatchError as error:
        return {"unknown": str(error)[:200]}
    stem = getattr(model, "visual", model)
    layers = sorted({re.sub(r"\d+", "0", key) for key in stem.state_dict()})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kind = [type(stem).__module__, type(stem).__qualname__, *layers]
    return {"kind": kind, "work": parameters * math.prod(geometry.grid or (1,))}


def lines(target: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in target.read_text("utf-8").splitlines()] if target.is_file() else []


def chosen(target: Path, most: float = MOST) -> tuple[list[str], int]:
    """The smallest model of every kind, and how many kinds have none that is small enough."""
    smallest: dict[tuple[str, ...], tuple[float, str]] = {}
    for line in lines(target):
        if "kind" in line:
            kind, this = tuple(line["kind"]), (line["work"], line["name"])
            smallest[kind] = min(smallest.get(kind, this), this)
    kept = sorted(name for work, name in smallest.values() if work <= most)
    return kept, len(smallest) - len(kept)


if __name__ == "__main__":
    measure(sys.argv[1], Path(sys.argv[2]))
