"""Sweep the real DINOv2 ViT-S/14 over patches 7 to 56, on Fashion-MNIST and on photographs.

Reports go to `docs/sweep/`, the curve of the README to `docs/figures/sweep.svg`. Features are cached, so an interrupted
run continues.

    python benchmarks/sweep_dinov2.py [fashion-mnist] [photographs]

Fashion-MNIST is Debian's package `dataset-fashion-mnist`; the photographs ship inside scikit-image and scikit-learn.
"""

from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import anypatch
import dinov2

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot".split()  # noqa: SIM905
)
PATCHES = (7, 14, 16, 28, 56)
TRAIN, TEST = 1000, 2000


def fashion_mnist() -> Path:
    """Fashion-MNIST's first images of each class as a folder `train/CLASS/*.png`, `val/CLASS/*.png`."""
    folder = Path(".cache/fashion-mnist")
    for part, prefix, count in (("train", "train", TRAIN), ("val", "t10k", TEST)):
        images = _idx(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = _idx(f"{prefix}-labels-idx1-ubyte.gz", 8)
        for number, name in enumerate(CLASSES):
            place = folder / part / name
            place.mkdir(parents=True, exist_ok=True)
            for index in np.flatnonzero(labels == number)[: count // len(CLASSES)]:
                target = place / f"{index:05d}.png"
                if not target.exists():
                    Image.fromarray(images[index]).save(target)
    return folder


def _idx(name: str, header: int) -> NDArray[np.uint8]:
    with gzip.open(SOURCE / name) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def photographs() -> Path:
    """Two square crops of each photograph as a folder of files."""
    folder = Path(".cache/photographs")
    folder.mkdir(parents=True, exist_ok=True)
    for name in dinov2.CHOOSING + dinov2.TESTING:
        for number, crop in enumerate(dinov2.crops([dinov2.photograph(name)], 2)):
            target = folder / f"{Path(name).stem}-{number + 1}.png"
            if not target.exists():
                Image.fromarray(crop).save(target)
    return folder


def run(name: str) -> anypatch.SweepResult:
    """One sweep, its report and its numbers."""
    side = {"fashion-mnist": 112, "photographs": 224}[name]
    model = anypatch.adapt(dinov2.timm_model(), image_size=side)
    result = anypatch.sweep(
        model,
        PATCHES,
        data=fashion_mnist() if name == "fashion-mnist" else None,
        images=photographs() if name == "photographs" else None,
        cache=".cache/sweep",
        batch_size=4,
        samples=4 if name == "photographs" else 6,
        device="cpu",
        progress=_progress,
        reproduce=f"python benchmarks/sweep_dinov2.py {name}",
    )
    result.settings["model"] = f"DINOv2 ViT-S/14 at {side} pixels"
    folder = Path("docs/sweep")
    folder.mkdir(parents=True, exist_ok=True)
    result.to_html(folder / f"{name}.html")
    (folder / f"{name}.csv").write_text(result.to_csv())
    return result


def _progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty() or done % 40 == 0:
        print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.chdir(ROOT)
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    for chosen in sys.argv[1:] or ("photographs", "fashion-mnist"):
        found = run(chosen)
        print(found.to_pandas().round(4).T.to_string())
        if chosen == "fashion-mnist":
            figures = Path("docs/figures")
            figures.mkdir(parents=True, exist_ok=True)
            found.plot().savefig(figures / "sweep.svg", metadata={"Date": None})
