"""How long it takes to change the patch size of a model that is already loaded, against building a new one.

    python benchmarks/speed.py        # prints the table in docs/speed.md

What people do instead: timm can build a model at another patch size and resample its weights into it
(`timm.create_model(..., patch_size=32)` with a state dict), which is the baseline. Both run in this process, on the
same weights, alternating; the figures are medians.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

import anypatch

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("vit_tiny_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224", "vit_base_patch16_clip_224")
ROUNDS = 5


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(name: str) -> tuple[float, float]:
    """Median seconds to reach patch 32: ``anypatch.adapt`` in place, and timm building and resampling."""
    model = timm.create_model(name)
    state = model.state_dict()

    def rebuild() -> torch.nn.Module:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": state}, patch_size=32)

    ours, theirs = [], []
    for _ in range(ROUNDS):
        live = copy.deepcopy(model)
        ours.append(seconds(lambda m=live: anypatch.adapt(m, 32)))  # type: ignore[misc]
        theirs.append(seconds(rebuild))
    return statistics.median(ours), statistics.median(theirs)


def main() -> None:
    torch.set_num_threads(2)
    lines = [
        "# Speed",
        "",
        "Changing the patch size of a loaded model from 16 to 32, against building a new timm model at patch 32",
        "from the same weights (`python benchmarks/speed.py`, medians of 5, 2-core x86-64 CPU).",
        "",
        f"torch {torch.__version__.split('+')[0]}, timm {timm.__version__}.",
        "",
        "| model | `anypatch.adapt` (s) | `timm.create_model(patch_size=32)` (s) | ratio |",
        "|---|---:|---:|---:|",
    ]
    measure(MODELS[0])  # warm up imports
    for name in MODELS:
        ours, theirs = measure(name)
        lines.append(f"| {name} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} |")
        print(lines[-1], flush=True)
    (ROOT / "docs" / "speed.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
