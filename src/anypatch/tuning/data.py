"""Images to learn from and to test on: opened, checked, split by image, fed in batches."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anypatch.errors import listed
from anypatch.hosts.images import Preprocess
from anypatch.measure.decoding import decode, unreadable
from anypatch.measure.folders import existing, image_files, images_under
from anypatch.measure.images import ImageSet
from anypatch.measure.workers import alone, begun
from anypatch.tuning.asked import require_images
from anypatch.tuning.crops import Crops

LEAST = 16  # images: four of them are tested on, twelve learned from
HELD_OUT = 0.2  # share of the images that is tested on: the usual fifth
MOST_HELD_OUT = 64  # more do not change the third digit of a mean cosine, and are read a dozen times
MOST_VIEWS = 192  # of them, all patch sizes together: six at 64 images each would cost a look as much as eight steps


@dataclass(frozen=True)
class Split:
    """Images that are learned from, images that are tested on, and what the user should know."""

    train: ImageSet
    held_out: ImageSet
    notes: list[str]


def split(images: Any, seed: int, faces: int = 1) -> Split:
    """Open a folder of images and hold a part of them out, whole images, before any crop.

    Args:
        images: the folder.
        seed: of the draw.
        faces: patch sizes at which the held-out images are looked at.

    Raises:
        DataError: no folder, or fewer than 16 images that can be read.
    """
    if isinstance(images, ImageSet):
        everything = images
    else:
        root = existing(images)
        everything = _opened(root)
    failed = unreadable(everything)
    notes = left_out(everything, failed)
    usable = everything.subset([i for i in range(len(everything)) if i not in failed])
    require_images(len(usable), LEAST, everything.name)
    held = max(min(round(len(usable) * HELD_OUT), MOST_HELD_OUT, MOST_VIEWS // faces), 4)
    order = np.random.default_rng([seed, 3]).permutation(len(usable))
    return Split(usable.subset(sorted(order[held:].tolist())), usable.subset(sorted(order[:held].tolist())), notes)


def _opened(root: Path) -> ImageSet:
    """The images of a folder; with labels where each lies in one of several folders, each with several images."""
    paths = images_under(root)
    owners = [path.relative_to(root).parts for path in paths]
    counts = Counter(parts[0] for parts in owners)
    if any(len(parts) == 1 for parts in owners) or len(counts) < 2 or min(counts.values()) < 2:
        return image_files(root.name, root, paths)
    classes = sorted(counts)
    return image_files(root.name, root, paths, [classes.index(parts[0]) for parts in owners], classes)


def held_out_pixels(
    images: ImageSet, preprocess: Preprocess, size: tuple[int, int], batch_size: int, workers: int
) -> tuple[list[Tensor], dict[int, str]]:
    """The images as the model sees them, in batches of bytes; and those that cannot be decoded."""
    places = list(range(len(images)))
    batches = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
    found = list(decode(images, preprocess, size, batches, workers))
    return [batch.pixels for batch in found if len(batch.pixels)], {k: v for b in found for k, v in b.failures.items()}


def left_out(images: ImageSet, failures: dict[int, str]) -> list[str]:
    """A note that names what could not be read, if anything."""
    named = listed([f"{images.keys[i]} ({why})" for i, why in sorted(failures.items())])
    return [f"{len(failures)} images cannot be read, left out: {named}"] if failures else []


@dataclass(frozen=True)
class Feed:
    """Augmented crops in rows of a batch; this process's places of each row.

    Args:
        images, preprocess, batch_size, seed: as for ``Crops``.
        workers: processes that cut crops; 0 for this one.
        rank, size: which of how many processes this is; places of a batch go round.
        failures: images that could not be decoded, and why; filled as they are met.
    """

    images: ImageSet
    preprocess: Preprocess
    batch_size: int
    seed: int
    workers: int
    rank: int = 0
    size: int = 1
    failures: dict[int, str] = field(default_factory=dict)

    @property
    def places(self) -> range:
        """This process's places of a batch."""
        return range(self.rank, self.batch_size, self.size)

    def rows(self, sizes: Sequence[tuple[int, int]], first: int = 0) -> Iterator[list[list[Tensor] | None]]:
        """For each row from ``first`` on, without end, the crop of each of this process's places at the sizes;
        ``None`` if unreadable."""
        crops = Crops(self.images, self.preprocess, self.seed, list(sizes))
        plan = ([row * self.batch_size + place for place in self.places] for row in itertools.count(first))
        loader: Any = torch.utils.data.DataLoader(
            crops,
            batch_sampler=plan,
            collate_fn=list,
            num_workers=self.workers,
            prefetch_factor=2 if self.workers else None,
            worker_init_fn=alone,
            generator=torch.Generator(),  # or the loader draws from the caller's random numbers
        )
        for row in begun(loader):  # its workers end with the generator
            self.failures.update({number: why for number, why in row if isinstance(why, str)})
            yield [None if isinstance(crop, str) else crop for _, crop in row]
