"""Runs the README's own `anypatch sweep` lines with the real DINOv2 ViT-S/14, on Fashion-MNIST and on photographs.

    python benchmarks/sweep_dinov2.py [fashion-mnist] [photos]

Nothing is measured here: the weights and the images that the lines name are laid where the command line looks for them,
and the lines are run as the README has them, in `.cache/sweep-dinov2`. Reports go to `docs/sweep/`, the picture that a
line draws to `docs/figures/`. Features are cached, so an interrupted run continues.

Fashion-MNIST is Debian's package `dataset-fashion-mnist`; the photographs ship inside scikit-image and scikit-learn.
"""

from __future__ import annotations

import gzip
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import dinov2

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / ".cache" / "sweep-dinov2"
WEIGHTS = "models--timm--vit_small_patch14_dinov2.lvd142m"  # as a download from the hub is kept
SOURCE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot".split()  # noqa: SIM905
)
TRAIN, TEST = 1000, 2000


def lines() -> dict[str, list[str]]:
    """The words of the README's sweeps, by the folder of images that each names."""
    found = {}
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        words = shlex.split(line) if line.startswith("anypatch sweep ") else []
        for option, value in pairwise(words):
            if option in ("--data", "--images"):
                found[value.rstrip("/")] = words
    return found


def weights() -> None:
    """The real weights in a hub cache, so that timm's own loader finds them."""
    dinov2.timm_model()  # writes them in the original release's names
    snapshot = PLACE / "hub" / WEIGHTS / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(dinov2.build().with_name("timm.safetensors"), snapshot / "model.safetensors")
    reference = PLACE / "hub" / WEIGHTS / "refs" / "main"
    reference.parent.mkdir(exist_ok=True)
    reference.write_text(snapshot.name)


def fashion_mnist(folder: Path) -> None:
    """Fashion-MNIST's first images of each class as a folder `train/CLASS/*.png`, `val/CLASS/*.png`."""
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


def _idx(name: str, header: int) -> NDArray[np.uint8]:
    with gzip.open(SOURCE / name) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def photographs(folder: Path) -> None:
    """Two square crops of each photograph as a folder of files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in dinov2.CHOOSING + dinov2.TESTING:
        for number, crop in enumerate(dinov2.crops([dinov2.photograph(name)], 2)):
            target = folder / f"{Path(name).stem}-{number + 1}.png"
            if not target.exists():
                Image.fromarray(crop).save(target)


IMAGES: dict[str, Callable[[Path], None]] = {"fashion-mnist": fashion_mnist, "photos": photographs}


def run(name: str, words: list[str]) -> None:
    """One line of the README, and what it wrote where the README shows it."""
    IMAGES[name](PLACE / name)
    here = {"HF_HUB_CACHE": str(PLACE / "hub"), "HF_HUB_OFFLINE": "1", "ANYPATCH_CACHE": str(PLACE / "features")}
    print(shlex.join(words), flush=True)
    command = [sys.executable, "-m", "anypatch", *words[1:]]
    subprocess.run(command, cwd=PLACE, env={**os.environ, **here}, check=True)
    options = dict(pairwise(words))
    written = PLACE / options["--output"]
    shutil.copyfile(written / "report.html", ROOT / "docs" / "sweep" / f"{name}.html")
    shutil.copyfile(written / "sweep.csv", ROOT / "docs" / "sweep" / f"{name}.csv")
    if "--figure" in options:
        shutil.copyfile(PLACE / options["--figure"], ROOT / "docs" / "figures" / Path(options["--figure"]).name)


if __name__ == "__main__":
    weights()
    known = lines()
    for chosen in sys.argv[1:] or known:
        run(chosen, known[chosen])
