"""How long it takes to resize a 768x3 patch kernel, next to timm's `resample_patch_embed`, with nothing cached.

python benchmarks/kernel_speed.py      # prints a table; exit status 1 if a goal is missed
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from timm.layers.patch_embed import resample_patch_embed

from anypatch.core.kernels import METHODS, resize_kernel

GOALS = {(14, 16): 8.0, (16, 32): 15.0, (32, 64): 25.0}
METHOD_NAMES = tuple(METHODS)


def seconds(call: Callable[[], object], budget: float) -> float:
    """The fastest of several calls, as many as fit in `budget` seconds (three at least)."""
    call()
    best, calls, end = float("inf"), 0, time.perf_counter() + budget
    while calls < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best, calls = min(best, time.perf_counter() - start), calls + 1
    return best


def measure(old: int, new: int, budget: float = 1.0) -> dict[str, float]:
    """Seconds by method, "timm" among them."""
    weight = torch.randn(768, 3, old, old)
    found = {"timm": seconds(lambda: resample_patch_embed(weight, [new, new]), budget)}
    for name in METHOD_NAMES:
        found[name] = seconds(lambda name=name: resize_kernel(weight, new, name), budget)
    return found


def table(budget: float = 1.0) -> tuple[list[str], bool]:
    """Markdown lines, and whether every method met every goal."""
    lines = [
        "| patch | timm | " + " | ".join(METHOD_NAMES) + " | goal |",
        "|---|---|" + "---|" * len(METHOD_NAMES) + "---|",
    ]
    met = True
    for (old, new), goal in GOALS.items():
        found = measure(old, new, budget)
        ratios = {name: found["timm"] / found[name] for name in METHOD_NAMES}
        met = met and min(ratios.values()) >= goal
        cells = [f"{1000 * found[name]:.2f} ms ({ratios[name]:.0f}x)" for name in METHOD_NAMES]
        lines.append(f"| {old} → {new} | {1000 * found['timm']:.1f} ms | " + " | ".join(cells) + f" | {goal:.0f}x |")
    return lines, met


if __name__ == "__main__":
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
    lines, met = table()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__.split('+')[0]}")
    print("\n".join(lines))
    sys.exit(not met)
