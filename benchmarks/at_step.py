"""A training step through `anypatch.at`, against that of a copy adapted in place: what the shared weights cost.

    python benchmarks/at_step.py        # prints a table; a minute on one core

A view computes its projection and tables from the first model's at every call, and sends their gradients back. Forward
and backward passes at 224 pixels, batches of four, one thread, in turns; medians.
"""

from __future__ import annotations

import copy
import statistics
import time

import timm
import torch

import anypatch

PATCHES = (28, 32)
MODELS = ("vit_tiny_patch16_224", "vit_small_patch16_224")
IMAGE, BATCH, TURNS = 224, 4, 7


def step(model: torch.nn.Module, pixels: torch.Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    start = time.process_time()
    model(pixels).square().mean().backward()
    return time.process_time() - start


def ratio(name: str, patch: int) -> float:
    """Of the medians: through a view, over an adapted copy."""
    first = timm.create_model(name)
    copied = anypatch.adapt(copy.deepcopy(first), patch, IMAGE)
    view = anypatch.at(first, patch, IMAGE)
    pixels = torch.rand(BATCH, 3, IMAGE, IMAGE)
    times = [(step(view, pixels), step(copied, pixels)) for _ in range(TURNS)]
    through, bare = zip(*times[1:], strict=True)
    return statistics.median(through) / statistics.median(bare)


def main() -> None:
    torch.set_num_threads(1)
    print(f"| model | {' | '.join(f'patch {patch}' for patch in PATCHES)} |\n|---|{'---:|' * len(PATCHES)}")
    for name in MODELS:
        print(f"| `{name}` | {' | '.join(f'{ratio(name, patch):.2f}' for patch in PATCHES)} |", flush=True)


if __name__ == "__main__":
    main()
