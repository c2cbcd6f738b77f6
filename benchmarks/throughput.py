"""How much slower a sweep reads features than the bare forward pass computes them.

    python benchmarks/throughput.py [--images 192] [--runs 5] [--patch-size 16]

In one process, in turn: `anypatch.sweep` over JPEG files of 640x480 pixels (decoding, resizing, cropping and
normalising in workers, features written to a cache that is empty), from its first to its last image; and the same model
on as many images that are there as tensors. One core is left to the workers. The weights are random: time does not
depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

import anypatch


def photographs(folder: Path, count: int) -> None:
    """Files of about the size that photographs have: smooth, with some noise."""
    generator = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), np.uint8)).resize((640, 480), Image.BICUBIC)
        noise = generator.integers(-12, 13, (480, 640, 3))
        pixels = (np.asarray(coarse).astype(np.int64) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:04d}.jpg", quality=90)


def swept(model: torch.nn.Module, patch: int, folder: Path, batch: int) -> tuple[float, int]:
    """Seconds between the first batch and the last, and the images between them."""
    ticks: list[tuple[float, int]] = []

    def tick(what: str, done: int, total: int) -> None:
        if not what.startswith("timing"):
            ticks.append((time.perf_counter(), done))

    with tempfile.TemporaryDirectory() as cache:
        anypatch.sweep(model, [patch], images=folder, cache=cache, batch_size=batch, samples=0, progress=tick)
    return ticks[-1][0] - ticks[0][0], ticks[-1][1] - ticks[0][1]


@torch.inference_mode()
def bare(model: Any, count: int, batch: int) -> float:
    """Seconds for the forward passes alone."""
    pixels = torch.randn(batch, 3, 224, 224)
    model.eval()
    start = time.perf_counter()
    for _ in range(count // batch):
        model.forward_features(pixels)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput of a sweep against the bare forward pass.")
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    threads = max(torch.get_num_threads() - 1, 1)
    torch.set_num_threads(threads)
    model = timm.create_model(options.model)
    anypatch.adapt(model, options.patch_size)
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        photographs(Path(name), options.images)
        bare(model, 2 * options.batch, options.batch)
        for _ in range(options.runs):
            ours, count = swept(model, options.patch_size, Path(name), options.batch)
            theirs = bare(model, count, options.batch)
            ratios.append(theirs / ours)
            print(f"sweep {count / ours:.1f} images/s, bare forward {count / theirs:.1f}, ratio {ratios[-1]:.3f}")
    print(
        f"{options.model}, patch {options.patch_size}, {threads} thread(s), {options.runs} runs: a sweep reads "
        f"{statistics.median(ratios):.2f} times as many images per second as the bare forward pass"
    )


if __name__ == "__main__":
    main()
