"""Pixel statistics of the user's own images, as a resize method.

The Wiener kernel needs the power spectrum of the pixels. Its default is a power law, which photographs
follow closely; images that do not (text, microscopy, radar) can be measured instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anypatch.core.kernels import Wiener
from anypatch.errors import GeometryError
from anypatch.files.paths import place
from anypatch.measure.folders import images_under
from anypatch.measure.pixels import as_rgb
from anypatch.report.progress import shown_progress

BINS = 48  # between the two below, five to an octave: finer than a spectrum of photographs has features
LOWEST, HIGHEST = 1 / 256, 4.0  # cycles per pixel of the model's image
LEAST = 16  # pixels of a side: below, a window leaves no frequency to tell from another
AT_ONCE = 1 << 22  # values in one Fourier transform, which takes eight bytes and more for each
LARGEST = 2048  # longer sides are cut: memory stays bounded by one image of this size


@dataclass(frozen=True)
class PixelStatistics(Wiener):
    """A Wiener resize whose spectrum was measured: `adapt(model, 16,
    kernel=PixelStatistics.from_images(folder))`.

    >>> import numpy as np
    >>> images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    >>> measured = PixelStatistics.from_images(images, image_size=64, progress=False)
    >>> import timm
    >>> from anypatch import adapt
    >>> adapt(timm.create_model("test_vit"), patch_size=20, kernel=measured).patch_embed.patch_size
    (20, 20)

    `frequencies` (cycles per pixel of the model's image, ascending) and `powers` are the measured
    spectrum; it is interpolated between them on logarithmic scales and follows `1 / f ** slope` beyond.
    Channel normalisation and a correlation between channels that is the same at every distance cancel
    out of the estimator, so neither is kept.
    """

    frequencies: tuple[float, ...] = ()
    powers: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.frequencies) != len(self.powers) or len(self.powers) < 2:
            raise GeometryError("PixelStatistics needs as many powers as frequencies, two at least; see from_images")
        if min(self.powers) <= 0 or min(self.frequencies) <= 0 or [*self.frequencies] != sorted(self.frequencies):
            raise GeometryError("PixelStatistics needs ascending frequencies and powers, all above zero")

    def power(self, frequency: Tensor) -> Tensor:
        at = np.log(frequency.numpy())
        known, powers = np.log(self.frequencies), np.log(self.powers)
        inside = np.interp(at, known, powers)
        beyond = np.minimum(at - known[0], 0) + np.maximum(at - known[-1], 0)
        return torch.from_numpy(np.exp(inside - self.slope * beyond))

    @classmethod
    def from_images(
        cls,
        images: Path | str | Iterable[Any],
        image_size: int = 224,
        *,
        filter: str = "bicubic",
        antialias: bool = True,
        noise: float = 1e-4,
        limit: int | None = 1000,
        progress: bool = True,
    ) -> PixelStatistics:
        """Measure a folder of images (searched through), or an iterable of paths, PIL images or arrays
        (h, w[, c]).

        One pass, one image in memory at a time. `image_size` is the side that the shorter side of an
        image becomes for the model as it was trained; `limit` images are enough (None: all); `filter`,
        `antialias` and `noise` are as for `Wiener`.
        """
        if image_size < 1:
            raise GeometryError(f"image_size is a positive int, not {image_size!r}")
        edges = np.geomspace(LOWEST, HIGHEST, BINS + 1)
        total, count, used = np.zeros(BINS), np.zeros(BINS), 0
        for image in _reported(_found(images), limit, progress):
            pixels = _array(image)
            scale = min(pixels.shape[:2]) / image_size  # pixels of the file per pixel of the model's image
            pixels = pixels[:LARGEST, :LARGEST]
            if min(pixels.shape[:2]) < LEAST:
                continue
            used += 1
            for axis in (0, 1):
                frequency, power = _periodogram(pixels, axis)
                place = np.digitize(frequency * scale, edges) - 1
                inside = (place >= 0) & (place < BINS)
                total += np.bincount(place[inside], power[inside] / scale, BINS)
                count += np.bincount(place[inside], minlength=BINS)
        found = (count > 0) & (total > 0)
        if found.sum() < 2:
            raise GeometryError(f"no image to measure among {used} of at least {LEAST} pixels with any contrast")
        powers = total[found] / count[found]
        middle = np.sqrt(edges[:-1] * edges[1:])[found]
        return cls(
            noise=noise,
            filter=filter,
            antialias=antialias,
            frequencies=tuple(middle.tolist()),
            powers=tuple((powers / powers.max()).tolist()),
        )


def _periodogram(pixels: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in cycles per pixel and mean power of the lines along `axis` of (h, w, c), Hann window."""
    lines = np.moveaxis(pixels, axis, -1).reshape(-1, pixels.shape[axis])
    length = lines.shape[-1]
    window = np.hanning(length + 2)[1:-1]
    lines = (lines - lines.mean(-1, keepdims=True)) * window
    power = np.zeros(length // 2 + 1)
    for part in np.array_split(lines, math.ceil(lines.size / AT_ONCE)):
        power += np.square(np.abs(np.fft.rfft(part))).sum(0)
    return np.fft.rfftfreq(length)[2:], power[2:] / (len(lines) * np.square(window).sum())


def _found(images: Path | str | Iterable[Any]) -> Iterable[Any]:
    if not isinstance(images, str | Path):
        return images
    folder = place(images)
    if not folder.is_dir():
        raise GeometryError(f"{folder} is not a folder of images")
    return images_under(folder)


def _reported(images: Iterable[Any], limit: int | None, show: bool) -> Iterator[Any]:
    """The first ``limit`` images, and progress as they are taken, if it is known how many there are."""
    total = len(images) if isinstance(images, Sized) else limit
    total = total if limit is None or total is None else min(total, limit)
    with shown_progress(None if show and total is not None else False) as progress:
        for number, image in enumerate(itertools.islice(images, limit), 1):
            yield image
            progress("measuring images", number, total or 0)


def _array(image: Any) -> np.ndarray:
    """Pixels (h, w, c) in float32 from a path, a PIL image, a tensor or an array."""
    if isinstance(image, str | Path):
        from PIL import Image

        with Image.open(image) as file:
            image = as_rgb(file)
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3:
        raise GeometryError(f"an image is an array (height, width[, channels]), not of shape {pixels.shape}")
    return pixels
