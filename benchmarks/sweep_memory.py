"""Memory of a sweep over five patch sizes, against the model's own.

    python benchmarks/sweep_memory.py        # prints a table; a few minutes on one core, Linux only

The models at all patch sizes stand side by side while they are timed in turns. They share every parameter that does not
follow the patch, so together they need the memory of one and of the tensors that differ. Two ratios, each in a process
of its own, so that what was measured before does not count:

tensors: bytes of the distinct storages of all parameters and buffers at five patch sizes and as the model is, over
those of the model alone.

process: the most memory that the process held during the whole of `anypatch.sweep`, from making the model on, over the
most that it held while the model, adapted in place to the finest of these patches, ran one pass. Batches are of one
image, so that weights and not activations are compared.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import timm
import torch

import anypatch
from anypatch.adaptation import describe
from anypatch.measure.features import at_geometry
from anypatch.measure.targets import Asked, targets_of

PATCHES = (8, 14, 16, 28, 32)
MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")


def tensor_bytes(models: list[torch.nn.Module]) -> int:
    """Bytes of the distinct storages of all parameters and buffers."""
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def tensors(name: str) -> float:
    """Bytes of a model at five patch sizes and as it is, over those of the model alone."""
    model = timm.create_model(name).eval()
    subject = describe(model)
    targets = targets_of(subject, Asked(PATCHES)).targets
    faces = [at_geometry(subject, target, "wiener", "antialias") for target in targets]
    return tensor_bytes([model, *faces]) / tensor_bytes([model])


def resident(peak: bool = False) -> int:
    """Bytes of memory that this process holds, or held at most since :func:`forget`."""
    field = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget() -> int:
    """Begin the count of the most that was held anew; what is held now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def _small() -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=1)


def one_pass(name: str) -> int:
    """The most bytes held by the model while it runs one pass at the finest patch."""
    with torch.no_grad():
        anypatch.adapt(_small(), 8)(torch.zeros(1, 3, 224, 224))  # what libraries load when they are first used
        before = forget()
        model = anypatch.adapt(timm.create_model(name).eval(), min(PATCHES))
        model(torch.zeros(1, 3, 224, 224))
    return resident(peak=True) - before


def whole_sweep(name: str) -> int:
    """The most bytes held during a sweep, the model's own among them."""
    options = {"batch_size": 1, "progress": False, "cache": False, "device": "cpu"}
    anypatch.sweep(_small(), [8, 32], **options)
    before = forget()
    anypatch.sweep(timm.create_model(name), PATCHES, **options)
    return resident(peak=True) - before


def apart(what: str, name: str) -> float:
    """One of the measurements, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, what, name], check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        print({"tensors": tensors, "one_pass": one_pass, "whole_sweep": whole_sweep}[sys.argv[1]](sys.argv[2]))
        sys.exit()
    print("| model | patch sizes | tensors | process |\n|---|---|---:|---:|")
    for chosen in MODELS:
        process = apart("whole_sweep", chosen) / apart("one_pass", chosen)
        listed = ", ".join(map(str, PATCHES))
        print(f"| `{chosen}` | {listed} | {apart('tensors', chosen):.2f} | {process:.2f} |", flush=True)
