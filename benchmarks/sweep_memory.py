"""Memory of a sweep over five patch sizes, against the model's own.

    python benchmarks/sweep_memory.py        # prints a table; seconds on one core

The models at all patch sizes stand side by side while they are timed in turns. They share every parameter that does not
follow the patch, so together they need the memory of one and of the tensors that differ. Measured as the bytes of the
distinct storages of all parameters and buffers; the activations of a pass come on top, as they do for one model.
"""

from __future__ import annotations

import timm
import torch

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


def ratio(name: str) -> float:
    """Memory of a model at five patch sizes and as it is, over that of the model alone."""
    model = timm.create_model(name).eval()
    subject = describe(model)
    targets = targets_of(subject, Asked(PATCHES)).targets
    faces = [at_geometry(subject, target, "wiener", "antialias") for target in targets]
    return tensor_bytes([model, *faces]) / tensor_bytes([model])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| model | patch sizes | memory, of the model's own |\n|---|---|---:|")
    for chosen in MODELS:
        print(f"| `{chosen}` | {', '.join(map(str, PATCHES))} | {ratio(chosen):.2f} |")
