"""Trains the small ViT that `anypatch demo` carries: scikit-learn's digits, enlarged to 32×32, patch 4.

    python tools/train_demo.py            # a few minutes on one CPU core; rewrites the asset
    python tools/train_demo.py --verify   # measures the asset's held-out accuracy again, in a second

Seed, split and thread count are fixed, so the same machine gives the same weights. The held-out third is looked at
once, after the last epoch. The result is an ordinary timm checkpoint; its metadata says how to build the model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from anypatch.demo import ASSET, GRID, IMAGE_SIZE, PATCH_SIZE, demo_data, demo_metadata, demo_model, digits

ARCHITECTURE = "vit_tiny_patch16_224"
ARGUMENTS = {
    "img_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 4,
    "global_pool": "avg",
}
SEED, EPOCHS, BATCH, PEAK_RATE, WEIGHT_DECAY, SMOOTHING = 0, 50, 32, 2e-3, 0.05, 0.05


def main() -> None:
    """Train and write the asset, or verify the one that is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--verify", action="store_true", help="measure the present asset; do not train")
    if parser.parse_args().verify:
        stated, found = float(demo_metadata()["held_out_accuracy"]), accuracy(demo_model(), *demo_data())
        print(f"stated {stated:.4f}, found {found:.4f}")
        sys.exit(abs(stated - found) > 1e-4)

    model = train(*digits("train"))
    images, labels = demo_data()
    found = accuracy(model, images, labels)
    metadata = {
        "format": "pt",
        "architecture": ARCHITECTURE,
        "model_args": json.dumps(ARGUMENTS),
        "held_out_accuracy": f"{found:.4f}",
        "held_out_images": str(len(labels)),
        "data": "scikit-learn digits (8x8), bicubic to 32x32, pixels in [-1, 1]",
        "made_by": "tools/train_demo.py",
        "license": "Apache-2.0",
    }
    ASSET.parent.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, ASSET, metadata)
    print(f"held-out accuracy {found:.4f} on {len(labels)} images; {ASSET} is {ASSET.stat().st_size / 1e6:.2f} MB")


def train(images: Tensor, labels: Tensor) -> nn.Module:
    """A ViT from scratch: AdamW, one-cycle rate, small random rotations, scalings and shifts."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    model = timm.create_model(ARCHITECTURE, **ARGUMENTS)
    # Plain noise as the initial positions costs this little data ten epochs on a plateau; cosines do not.
    model.pos_embed.data[:, 1:] = cosines(GRID, model.embed_dim)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * math.ceil(len(labels) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.1)
    draws = torch.Generator().manual_seed(SEED)
    start = time.perf_counter()
    for epoch in range(EPOCHS):
        total = 0.0
        for batch in torch.randperm(len(labels), generator=draws).split(BATCH):
            logits = model(jitter(images[batch], draws))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        elapsed = time.perf_counter() - start
        print(f"epoch {epoch + 1:2}/{EPOCHS}  loss {total / len(labels):.3f}  {elapsed:4.0f} s", flush=True)
    return model.eval()


def jitter(images: Tensor, draws: torch.Generator) -> Tensor:
    """Each image turned by up to 12°, scaled by up to 12 %, shifted by up to a pixel; the ground stays black."""

    def draw(most: float) -> Tensor:
        return (torch.rand(len(images), generator=draws) * 2 - 1) * most

    angle, scale = draw(math.radians(12)), 1 + draw(0.12)
    right, down = draw(2 / IMAGE_SIZE), draw(2 / IMAGE_SIZE)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    maps = torch.stack([torch.stack([cosine, -sine, right], 1), torch.stack([sine, cosine, down], 1)], 1)
    places = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, places, align_corners=False) - 1


def cosines(grid: int, width: int) -> Tensor:
    """Smooth initial positions: (grid², width), half of it for the row and half for the column."""
    angles = (torch.arange(grid) + 0.5)[:, None] * torch.arange(1, width // 4 + 1)[None] * (math.pi / grid)
    axis = torch.cat([angles.cos(), angles.sin()], 1)
    rows, columns = axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)
    return 0.3 * torch.cat([rows, columns], -1).reshape(grid * grid, width)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The fraction of images that the model labels correctly."""
    with torch.inference_mode():
        return (model(images).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    main()
