"""What a forward pass costs: tokens, operations, memory, and time, the models taking turns."""

from __future__ import annotations

import platform
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from anypatch.hosts.images import Features
from anypatch.measure.features import Reader

# A pass takes turns with those of the other patch sizes until each has had this many and this much time: nine give a
# median and quartiles that hold, half a second outlasts a stutter of the machine. Whoever is slow has fewer: passes
# longer than LONG are timed once, and none has more than MANY.
TURNS, ENOUGH, LONG, MANY = 9, 0.5, 5.0, 50


@dataclass
class Cost:
    """What a forward pass of a batch costs, and the shapes of what it gives.

    Attributes:
        tokens: patches of an image; prefix tokens are not counted.
        gflops: of one image.
        peak_memory_mb: tensors alive at the worst moment of a batch, weights and input included.
        batch: images of the batch.
        shapes: of one image's features, by name: ``pooled``, ``patches``, and ``logits`` where there are any.
        seconds: of every timed pass of the batch.
    """

    tokens: int
    gflops: float
    peak_memory_mb: float
    batch: int
    shapes: dict[str, tuple[int, ...]]
    seconds: list[float] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether it was timed often enough."""
        taken = self.seconds
        if not taken:
            return False
        return taken[0] > LONG or len(taken) >= MANY or (len(taken) >= TURNS and sum(taken) >= ENOUGH)

    def columns(self) -> dict[str, Any]:
        """The columns of a row: the median throughput with its quartiles."""
        low, middle, high = (self.batch / np.quantile(self.seconds, q) for q in (0.75, 0.5, 0.25))
        return {
            "tokens": self.tokens,
            "gflops": self.gflops,
            "images_per_second": float(middle),
            "images_per_second_low": float(low),
            "images_per_second_high": float(high),
            "peak_memory_mb": self.peak_memory_mb,
        }


def measure_cost(reader: Reader, pixels: Tensor) -> Cost:
    """Everything but the time, which is measured in turns by :func:`take_turns`. Also warms up.

    Args:
        reader: the model.
        pixels: one batch on the model's device; its content does not matter.
    """
    grid = reader.normal_grid(pixels)
    peak, features = _peak_memory(reader, pixels)
    gflops = _gflops(reader, pixels[:1])
    shapes = {"pooled": features.pooled.shape[1:], "patches": features.patches.shape[1:]}
    if features.logits is not None:
        shapes["logits"] = features.logits.shape[1:]
    return Cost(grid[0] * grid[1], gflops, peak / 1e6, len(pixels), {n: tuple(s) for n, s in shapes.items()})


def take_turns(
    models: Sequence[tuple[Reader, Tensor, Cost]], progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Time the forward passes of several models, one after the other in every round, so that load is shared by all.

    Our own loop: ``torch.utils.benchmark.Timer`` runs one statement at a time, and warms up before each.

    Args:
        models: each with its batch and its cost, which gets the seconds.
        progress: called with (models that are done, models).
    """
    waiting = list(models)
    while waiting:
        for reader, pixels, cost in waiting:
            cost.seconds.append(_seconds(reader, pixels))
            progress(sum(c.done for _, _, c in models), len(models))
        waiting = [entry for entry in waiting if not entry[2].done]


def _seconds(reader: Reader, pixels: Tensor) -> float:
    _wait(pixels.device)
    start = time.perf_counter()
    reader(pixels)
    _wait(pixels.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def machine(device: torch.device) -> str:
    """The name of what computes: a GPU's, or the processor's with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = _processor() or platform.processor() or platform.machine()
    return name if device.type == "cpu" else f"{name}, {device.type}"


def _processor() -> str:
    """The processor's name where Linux says it; Python's ``platform`` gives the architecture only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _gflops(reader: Reader, pixels: Tensor) -> float:
    """Operations of one image's forward pass, attention included (a multiplication and an addition are two)."""
    counter = FlopCounterMode(display=False)
    # Fused attention kernels are not counted on every device; the plain ones are.
    with counter, sdpa_kernel(SDPBackend.MATH):
        reader(pixels)
    return counter.get_total_flops() / 1e9


def _peak_memory(reader: Reader, pixels: Tensor) -> tuple[int, Features]:
    """Bytes of tensors alive at the worst moment of a forward pass, weights and input included, and what it gives."""
    if pixels.device.type == "cuda":
        torch.cuda.synchronize(pixels.device)
        before = torch.cuda.memory_allocated(pixels.device)
        torch.cuda.reset_peak_memory_stats(pixels.device)
        features = reader(pixels)
        torch.cuda.synchronize(pixels.device)
        # Other patch sizes' models are on the device as well: what was there before counts as far as it is this one's.
        used = torch.cuda.max_memory_allocated(pixels.device) - before
        return used + _bytes([*reader.model.parameters(), *reader.model.buffers(), pixels]), features
    with _Alive(reader.model, pixels) as alive:
        features = reader(pixels)
    return alive.peak, features


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Memory of tensors, shared storages counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


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
