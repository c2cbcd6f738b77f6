"""Augmented crops: each a pure function of the seed and its number, whoever makes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from anypatch.hosts.images import Preprocess
from anypatch.measure.decoding import reason
from anypatch.measure.images import ImageSet

if TYPE_CHECKING:
    from PIL.Image import Image

# Scale of a crop's area and its shape: torchvision's RandomResizedCrop, less extreme at the small end than its 0.08,
# so that things keep a size at which the teacher knows them. Crops of 0.3 and more, none of them enlarged, taught no
# more (benchmarks/tuning_notes.md).
AREA, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
FLIP = 0.5  # of the crops are mirrored: half, so that neither side is the usual one
# Brightness, contrast and saturation by up to this factor in 80 % of crops: DINOv2's jitter.
JITTER, JITTERED = 0.4, 0.8
KEPT_PIXELS = 2.0  # images are kept at this many times the crop's side: a crop of a quarter of the area is not enlarged
KEPT_BYTES = 256 * 2**20  # of decoded images per process; a thousand of 448x448
DRAWS = 10  # of a crop's shape, before the whole image is taken


@dataclass
class Crops(torch.utils.data.Dataset):
    """Item ``k`` is sample ``k`` of the training: its image's number, and its crop at each of the sizes, bytes
    (c, h, w), or why it cannot be read. There is no end of samples."""

    images: ImageSet
    preprocess: Preprocess
    seed: int
    sizes: list[tuple[int, int]]
    kept: dict[int, Any] = field(default_factory=dict, repr=False)
    held: int = 0

    def __getitem__(self, sample: int) -> tuple[int, list[Tensor] | str]:
        number = drawn_image(self.seed, sample, len(self.images))
        random = np.random.default_rng([self.seed, 1, sample])
        try:
            image = self._image(number, max(max(size) for size in self.sizes))
        except Exception as error:  # any decoder's error means the same: this image is left out of its batch
            return number, reason(error)
        return number, [_bytes(crop) for crop in augmented(image, random, self.sizes, self.preprocess)]

    def _image(self, number: int, side: int) -> Image:
        if number in self.kept:
            return self.kept[number]
        image = self.images.load(number).convert("L" if self.preprocess.channels == 1 else "RGB")
        limit = round(side * KEPT_PIXELS)
        if min(image.size) > limit:
            share = limit / min(image.size)
            image = image.resize((round(image.width * share), round(image.height * share)), reducing_gap=2.0)
        size = image.width * image.height * len(image.getbands())
        if self.held + size <= KEPT_BYTES:
            self.kept[number], self.held = image, self.held + size
        return image


def drawn_image(seed: int, sample: int, count: int) -> int:
    """The image of a sample: every image once before any comes twice."""
    round_, place = divmod(sample, count)
    return int(np.random.default_rng([seed, 0, round_]).permutation(count)[place])


def augmented(image: Image, random: Any, sizes: list[tuple[int, int]], preprocess: Preprocess) -> list[Image]:
    """One random crop, perhaps mirrored and in other colours, at each size."""
    from PIL import Image as Pillow
    from PIL import ImageEnhance

    height, width = sizes[0]
    box = random_box(image.width, image.height, random, width / height)
    mirrored, jittered = random.random() < FLIP, random.random() < JITTERED
    factors = random.uniform(1 - JITTER, 1 + JITTER, 3)
    resample = Pillow.Resampling[preprocess.interpolation.upper()]
    found = []
    for tall, wide in sizes:
        crop = image.resize((wide, tall), resample, box=box)
        if mirrored:
            crop = crop.transpose(Pillow.Transpose.FLIP_LEFT_RIGHT)
        if jittered:
            for enhance, factor in zip(
                (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors, strict=True
            ):
                crop = enhance(crop).enhance(float(factor))
        found.append(crop)
    return found


def random_box(width: int, height: int, random: Any, shape: float) -> tuple[float, float, float, float]:
    """A crop of random area and shape, around ``shape``; the largest that fits where none is found."""
    for _ in range(DRAWS):
        area = width * height * random.uniform(*AREA)
        ratio = shape * math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        wide, tall = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if wide <= width and tall <= height:
            left, top = random.uniform(0, width - wide), random.uniform(0, height - tall)
            return left, top, left + wide, top + tall
    wide, tall = min(width, height * shape), min(height, width / shape)
    left, top = (width - wide) / 2, (height - tall) / 2
    return left, top, left + wide, top + tall


def _bytes(image: Image) -> Tensor:
    return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1).contiguous()
