"""What one training crop shows: parts of one image or of several, each turned, coloured and blurred by chance.

A few hundred images are soon learned by heart, and what is learned of them alone holds for no others. The teacher says
what there is in whatever it is shown, so that no label has to be right, and mixtures of images (CutMix,
arXiv:1905.04899; mixup, arXiv:1710.09412; the mosaics of YOLOv4, arXiv:2004.10934) are as good to learn from as
photographs ("Knowledge distillation: a good teacher is patient and consistent", arXiv:2106.05237).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling

# All that follows was measured as one: of photographs unlike the folder's, real DINOv2-small at patch 28 won back 40 %
# and 38 % of what its class token and its patch map lose, in place of 34 % and 35 % with less jitter and without
# mixtures, which stood still after forty steps (benchmarks/tuning_notes.md).
PASTED, FOURFOLD, BLENDED = 0.25, 0.15, 0.15  # shares of crops with another image on them; of four; with one through it
COVERED = (0.1, 0.6)  # of the area, by what is pasted: both remain to be seen
SPLIT = (0.3, 0.7)  # where the four meet
OPACITY = (0.2, 0.5)  # of what is blended: the first image is the one that is seen better

# Scale of a crop's area and its shape: torchvision's RandomResizedCrop, less extreme at the small end than its 0.08,
# so that things keep a size at which the teacher knows them. Crops of 0.3 and more, none of them enlarged, taught no
# more (benchmarks/tuning_notes.md).
AREA, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
FLIP = 0.5  # of the crops are mirrored: half, so that neither side is the usual one
TURNED = 0.3  # by a right angle or two
JITTER, JITTERED = 0.5, 0.8  # brightness, contrast, saturation by up to this factor in so many crops: DINOv2's and more
GREY, SWAPPED = 0.1, 0.1  # without colour; with red, green and blue in another order
BLURRED, RADIUS = 0.15, (0.0015, 0.007)  # in shares of the side: 0.3 to 1.5 pixels of 224
DRAWS = 10  # of a crop's shape, before the whole image is taken


@dataclass(frozen=True)
class Part:
    """Where an image lies on the crop, in shares of it (left, top, right, bottom), and how opaque it is."""

    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    opacity: float = 1.0


@dataclass(frozen=True)
class Look:
    """How an image is shown: quarter turns, the box of it, and what is done to its colours."""

    turns: int
    box: tuple[float, float, float, float]
    mirrored: bool
    factors: tuple[float, ...]
    channels: tuple[int, ...] | None
    grey: bool
    blur: float

    def of(self, image: Image, size: tuple[int, int], resample: Resampling) -> Image:
        """The image so, of size (width, height)."""
        from PIL import Image as Pillow
        from PIL import ImageEnhance, ImageFilter

        found = _turned(image, self.turns).resize(size, resample, box=self.box)
        if self.mirrored:
            found = found.transpose(Pillow.Transpose.FLIP_LEFT_RIGHT)
        kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for enhance, factor in zip(kinds, self.factors, strict=False):
            found = enhance(found).enhance(factor)
        if self.channels is not None and len(self.channels) == len(found.getbands()):
            bands = found.split()
            found = Pillow.merge(found.mode, [bands[i] for i in self.channels])
        if self.grey:
            found = found.convert("L").convert(found.mode)
        return found.filter(ImageFilter.GaussianBlur(self.blur * max(size))) if self.blur else found


def layout(random: Any) -> list[Part]:
    """What lies where on one crop, from the bottom to the top: one image, two, or four.

    Args:
        random: numpy's generator.
    """
    drawn = random.random()
    if drawn < PASTED:
        side, shape = math.sqrt(random.uniform(*COVERED)), math.exp(random.uniform(*map(math.log, RATIO)) / 2)
        wide, tall = min(side * shape, 1.0), min(side / shape, 1.0)
        left, top = random.uniform(0, 1 - wide), random.uniform(0, 1 - tall)
        return [Part(), Part((left, top, left + wide, top + tall))]
    if drawn < PASTED + FOURFOLD:
        x, y = random.uniform(*SPLIT), random.uniform(*SPLIT)
        return [Part(box) for box in ((0, 0, x, y), (x, 0, 1, y), (0, y, x, 1), (x, y, 1, 1))]
    if drawn < PASTED + FOURFOLD + BLENDED:
        return [Part(), Part(opacity=random.uniform(*OPACITY))]
    return [Part()]


def look(image: Image, random: Any, shape: float) -> Look:
    """Draw how an image is shown on a part of a shape (width by height)."""
    turns = int(random.integers(1, 4)) if random.random() < TURNED else 0
    width, height = (image.width, image.height) if turns != 1 and turns != 3 else (image.height, image.width)
    box = random_box(width, height, random, shape)
    mirrored, jittered = random.random() < FLIP, random.random() < JITTERED
    factors = tuple(random.uniform(1 - JITTER, 1 + JITTER, 3).tolist()) if jittered else ()
    colours = random.random()
    swapped = tuple(random.permutation(3).tolist()) if GREY <= colours < GREY + SWAPPED else None
    blur = random.uniform(*RADIUS) if random.random() < BLURRED else 0.0
    return Look(turns, box, mirrored, factors, swapped, colours < GREY, blur)


def drawn_crops(
    images: Iterator[Image], parts: list[Part], random: Any, sizes: list[tuple[int, int]], resample: Resampling
) -> list[Image]:
    """The same crop at each size (height, width): an image for each part, each shown by chance.

    Args:
        images: an image for each part.
    """
    from PIL import Image as Pillow

    height, width = sizes[0]
    shown = []
    for part in parts:
        image, (left, top, right, bottom) = next(images), part.box
        shown.append((image, look(image, random, (right - left) * width / ((bottom - top) * height)), part))
    found = []
    for tall, wide in sizes:
        canvas = Pillow.new(shown[0][0].mode, (wide, tall))
        for image, how, part in shown:
            left, top, right, bottom = (round(s * n) for s, n in zip(part.box, (wide, tall) * 2, strict=True))
            right, bottom = max(right, left + 1), max(bottom, top + 1)
            piece = how.of(image, (right - left, bottom - top), resample)
            if part.opacity < 1:
                piece = Pillow.blend(canvas.crop((left, top, right, bottom)), piece, part.opacity)
            canvas.paste(piece, (left, top))
        found.append(canvas)
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


def _turned(image: Image, turns: int) -> Image:
    from PIL import Image as Pillow

    turn = Pillow.Transpose
    return image.transpose((turn.ROTATE_90, turn.ROTATE_180, turn.ROTATE_270)[turns - 1]) if turns else image
