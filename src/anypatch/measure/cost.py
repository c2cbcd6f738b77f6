"""What a forward pass costs: tokens, operations, time, memory."""

from __future__ import annotations

import statistics
import time
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from anypatch.measure.features import Reader

LONG = 5.0  # seconds; a forward pass longer than this is timed once
ENOUGH = 0.6  # seconds of timing


def measure_cost(reader: Reader, pixels: Tensor) -> dict[str, Any]:
    """Columns ``tokens``, ``gflops``, ``images_per_second`` and ``peak_memory_mb`` of a row.

    Args:
        reader: the model.
        pixels: one batch on the model's device; its content does not matter.
    """
    grid = reader.normal_grid(pixels)
    peak = _peak_memory(reader, pixels)  # also warms up
    return {
        "tokens": reader.geometry.prefix_tokens + grid[0] * grid[1],
        "gflops": _gflops(reader, pixels[:1]),
        "images_per_second": len(pixels) / _seconds(reader, pixels),
        "peak_memory_mb": peak / 1e6,
    }


def _gflops(reader: Reader, pixels: Tensor) -> float:
    """Operations of one image's forward pass, attention included (a multiplication and an addition are two)."""
    counter = FlopCounterMode(display=False)
    # Fused attention kernels are not counted on every device; the plain ones are.
    with counter, sdpa_kernel(SDPBackend.MATH):
        reader(pixels)
    return counter.get_total_flops() / 1e9


def _seconds(reader: Reader, pixels: Tensor) -> float:
    """Median time of a forward pass of a batch."""
    taken: list[float] = []
    while not taken or (taken[0] < LONG and (len(taken) < 3 or sum(taken) < ENOUGH) and len(taken) < 50):
        _wait(pixels.device)
        start = time.perf_counter()
        reader(pixels)
        _wait(pixels.device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _wait(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def _peak_memory(reader: Reader, pixels: Tensor) -> int:
    """Bytes of tensors alive at the worst moment of a forward pass, weights and input included."""
    if pixels.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pixels.device)
        reader(pixels)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(pixels.device)
    with _Alive(reader.model, pixels) as alive:
        reader(pixels)
    return alive.peak


class _Alive(TorchDispatchMode):
    """Adds up the storages that are alive, as torch.cuda does for its own memory."""

    def __init__(self, model: nn.Module, pixels: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()
        for tensor in (*model.parameters(), *model.buffers(), pixels):
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return output
