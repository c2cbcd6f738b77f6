"""Draws the README's picture with real DINOv2-small weights: one photograph, one model, several patch sizes.

    python tools/figures.py        # writes docs/figures/overview.png

The features are the model's final patch tokens, coloured by their first three principal components, which are
fitted once on the native patch size and used for every other.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import anypatch
import dinov2
from anypatch.report.colours import Colours

PATCHES = (7, 10, 14, 20, 28)
GRID = 32
BACKGROUND, INK, FAINT = "#ffffff", "#1b1f24", "#6a737d"


@torch.no_grad()
def tokens(patch: int, photo: np.ndarray) -> tuple[torch.Tensor, int]:
    """Final patch tokens ``(GRID * GRID, dim)`` at a patch size, the grid kept, and the image size used."""
    model = dinov2.timm_model(img_size=GRID * 14)
    if patch != 14:
        anypatch.adapt(model, patch, keep="grid")
    size = GRID * patch
    return dinov2.features(model, dinov2.pixels([photo], size))[0, 1:], size


def main() -> None:
    photo = dinov2.photograph("chelsea.png")
    side = min(photo.shape[:2])
    photo = photo[:side, 90 : 90 + side]
    found = {patch: tokens(patch, photo) for patch in PATCHES}
    native = found[14][0]
    colours = Colours([native])

    figure, axes = plt.subplots(2, len(PATCHES), figsize=(11, 5.1), facecolor=BACKGROUND)
    for column, patch in enumerate(PATCHES):
        features, size = found[patch]
        cosine = torch.cosine_similarity(features, native, dim=1).mean().item()
        above, below = axes[:, column]
        start = GRID // 2 - 3  # a six-patch window at the same place, drawn at its true number of pixels
        resized = dinov2.pixels([photo], size)[0].permute(1, 2, 0).numpy() * dinov2.STD + dinov2.MEAN
        window = resized[(start - 4) * patch : (start + 2) * patch, (start - 6) * patch : start * patch].clip(0, 1)
        above.imshow(window, interpolation="nearest")
        for line in range(1, 6):
            above.axhline(line * patch - 0.5, color="white", linewidth=0.7, alpha=0.8)
            above.axvline(line * patch - 0.5, color="white", linewidth=0.7, alpha=0.8)
        below.imshow(colours(features).reshape(GRID, GRID, 3), interpolation="nearest")
        title = f"patch {patch}" + (" (pretrained)" if patch == 14 else "")
        above.set_title(title, color=INK, fontsize=12, weight="bold" if patch == 14 else "normal")
        below.set_xlabel("the original" if patch == 14 else f"cosine {cosine:.4f}", color=FAINT, fontsize=10)
        for axis in (above, below):
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
    axes[0, 0].set_ylabel("patches", color=FAINT)
    axes[1, 0].set_ylabel("features", color=FAINT)
    figure.tight_layout(h_pad=0.6, w_pad=0.6)
    target = ROOT / "docs" / "figures" / "overview.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    print(target.relative_to(ROOT))


if __name__ == "__main__":
    main()
