"""The demo's digits and the small ViT that was trained on them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from anypatch.errors import AnypatchError

if TYPE_CHECKING:
    from torch import nn

ASSET = Path(__file__).parent / "demo-vit.safetensors"
IMAGE_SIZE, PATCH_SIZE, GRID = 32, 4, 8
HELD_OUT = 599  # a third of the 1797 digits


def digits(part: Literal["train", "held out"]) -> tuple[Tensor, Tensor]:
    """Two thirds or one third of scikit-learn's digits: images (N, 1, 32, 32) in [-1, 1], labels (N,)."""
    np, datasets = _need("numpy"), _need("sklearn.datasets", "scikit-learn")
    data = datasets.load_digits()
    order = np.random.RandomState(0).permutation(len(data.target))
    chosen = order[:HELD_OUT] if part == "held out" else order[HELD_OUT:]
    images = torch.tensor(data.images[chosen], dtype=torch.float32)[:, None] / 8 - 1
    return F.interpolate(images, size=IMAGE_SIZE, mode="bicubic"), torch.tensor(data.target[chosen])


def demo_data() -> tuple[Tensor, Tensor]:
    """The digits that the demo model has not seen: images (599, 1, 32, 32) in [-1, 1], labels (599,)."""
    return digits("held out")


def demo_metadata() -> dict[str, str]:
    """What the asset says of itself: architecture, arguments, held-out accuracy."""
    from safetensors import safe_open

    with safe_open(ASSET, "pt") as file:
        return dict(file.metadata())


def demo_model() -> nn.Module:
    """The demo's timm model, in eval mode: a ViT trained on digits at 32 pixels, patch 4."""
    timm, metadata = _need("timm"), demo_metadata()
    model = timm.create_model(
        metadata["architecture"], checkpoint_path=str(ASSET), **json.loads(metadata["model_args"])
    )
    return model.eval()


def _need(module: str, package: str | None = None) -> Any:
    """Import what only the demo needs, or say what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise AnypatchError(
            f"the demo needs {package or module}, which is not installed: pip install 'anypatch[demo]'"
        ) from error
