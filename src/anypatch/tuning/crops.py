"""Augmented crops: each a pure function of the seed and its number, whoever makes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from anypatch.hosts.images import Preprocess
from anypatch.measure.decoding import reason
from anypatch.measure.images import ImageSet
from anypatch.tuning.mixing import drawn_crops, layout

if TYPE_CHECKING:
    from PIL.Image import Image

KEPT_PIXELS = 2.0  # images are kept at this many times the crop's side: a crop of a quarter of the area is not enlarged
KEPT_BYTES = 256 * 2**20  # of decoded images per process; a thousand of 448x448


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
        from PIL import Image as Pillow

        number = drawn_image(self.seed, sample, len(self.images))
        random = np.random.default_rng([self.seed, 1, sample])
        side = max(max(size) for size in self.sizes)
        try:
            first = self._image(number, side)
        except Exception as error:  # any decoder's error means the same: this image is left out of its batch
            return number, reason(error)
        parts = layout(random)
        numbers = random.integers(len(self.images), size=len(parts) - 1).tolist()
        resample = Pillow.Resampling[self.preprocess.interpolation.upper()]
        crops = drawn_crops(self._with(first, numbers, side), parts, random, self.sizes, resample)
        return number, [_bytes(crop) for crop in crops]

    def _with(self, first: Image, numbers: list[int], side: int) -> Iterator[Image]:
        """An image, and those of the numbers; the first again where one cannot be read, which its own turn reports."""
        yield first
        for number in numbers:
            try:
                yield self._image(number, side)
            except Exception:  # any decoder's error
                yield first

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


def _bytes(image: Image) -> Tensor:
    return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1).contiguous()
