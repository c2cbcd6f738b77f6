"""PixelStatistics against images whose spectrum is known, and against what it promises."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from anypatch.core.kernels import Wiener, resize_kernel
from anypatch.errors import GeometryError
from anypatch.measure.spectra import PixelStatistics


def noise_images(slope: float, count: int, side: int = 256, seed: int = 0) -> list[np.ndarray]:
    """Images whose rows and columns have the power spectrum 1 / f ** slope."""
    generator = np.random.default_rng(seed)
    frequency = np.abs(np.fft.fftfreq(side))
    frequency[0] = 1 / side
    gain = frequency ** (-slope / 2)
    white = np.fft.fft2(generator.normal(size=(count, side, side)))
    return list(np.fft.ifft2(white * gain[:, None] * gain).real)


def exponent(statistics: PixelStatistics, low: float, high: float) -> float:
    one, two = statistics.power(torch.tensor([low, high], dtype=torch.float64))
    return -math.log(two / one) / math.log(high / low)


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_measured(slope: float) -> None:
    found = PixelStatistics.from_images(noise_images(slope, 8), 256, progress=False)
    assert exponent(found, 0.05, 0.4) == pytest.approx(slope, abs=0.15)


def test_steep_spectra_do_not_leak_through_the_borders_of_images() -> None:
    pieces = [image[:128, :128] for image in noise_images(3.5, 8, side=512)]  # pieces do not wrap around
    found = PixelStatistics.from_images(pieces, 128, progress=False)
    assert exponent(found, 0.05, 0.3) == pytest.approx(3.5, abs=0.3)


def test_power_is_interpolated_on_logarithmic_scales_and_follows_the_slope_beyond() -> None:
    known = PixelStatistics(slope=2.0, frequencies=(0.1, 0.4), powers=(1.0, 0.25))
    at = torch.tensor([0.05, 0.1, 0.2, 0.4, 0.8], dtype=torch.float64)
    wanted = torch.tensor([4.0, 1.0, 0.5, 0.25, 0.0625], dtype=torch.float64)
    torch.testing.assert_close(known.power(at), wanted)


def test_power_is_per_pixel_of_the_models_image_whatever_the_files_size() -> None:
    def wave(frequency: float, side: int) -> np.ndarray:  # in cycles per pixel of a model's image of 64 pixels
        return np.sin(2 * np.pi * frequency * np.arange(side) * 64 / side)[None] + np.zeros((side, 1))

    at = torch.tensor([0.1, 0.3], dtype=torch.float64)
    ratios = []
    for large, small in ((0.1, 0.3), (0.3, 0.1)):
        images = [wave(large, 256), wave(small, 128)]
        found = PixelStatistics.from_images(images, 64, progress=False).power(at)
        ratios.append(float(found[0] / found[1]))
    assert ratios[0] == pytest.approx(ratios[1], rel=0.3)


def test_the_unit_of_power_does_not_matter() -> None:
    one = PixelStatistics(frequencies=(0.01, 0.5), powers=(1.0, 0.01))
    two = PixelStatistics(frequencies=(0.01, 0.5), powers=(1000.0, 10.0))
    torch.testing.assert_close(one.matrix(14, 10), two.matrix(14, 10))


def test_measured_power_laws_give_the_kernel_of_that_law() -> None:
    white = PixelStatistics.from_images(noise_images(0.0, 8), 256, progress=False)
    walk = PixelStatistics.from_images(noise_images(2.0, 8), 256, progress=False)
    wanted = {slope: Wiener(slope).matrix(14, 10) for slope in (0.0, 2.0)}
    for found, slope in ((white, 0.0), (walk, 2.0)):
        matrix = found.matrix(14, 10)
        assert (matrix - wanted[slope]).norm() < 0.2 * (wanted[0.0] - wanted[2.0]).norm()


def test_frequencies_are_in_pixels_of_the_models_image() -> None:
    wave = np.sin(2 * np.pi * 0.05 * np.arange(512))[None] + np.zeros((512, 1))
    images = [wave + 0.01 * n for n in noise_images(0.0, 1, side=512)]
    for size, expected in ((512, 0.05), (128, 0.2)):
        found = PixelStatistics.from_images(images, size, progress=False)
        at = torch.linspace(0.02, 0.4, 200, dtype=torch.float64)
        assert float(at[found.power(at).argmax()]) == pytest.approx(expected, rel=0.1)


def test_scale_and_offset_of_the_pixels_do_not_matter() -> None:
    images = noise_images(2.0, 2)
    one = PixelStatistics.from_images(images, 256, progress=False)
    two = PixelStatistics.from_images([5 * i + 100 for i in images], 256, progress=False)
    np.testing.assert_allclose(one.powers, two.powers, rtol=1e-3)


def test_a_folder_is_read_once_and_up_to_the_limit(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = [np.clip(128 + 20 * i, 0, 255).astype(np.uint8) for i in noise_images(0.0, 3, side=64)]
    (tmp_path / "deeper").mkdir()
    for place, array in zip(("a.png", "deeper/b.PNG", "deeper/c.jpg"), pixels, strict=True):
        image.fromarray(array).convert("RGB").save(tmp_path / place)
    (tmp_path / "notes.txt").write_text("not an image")
    two = PixelStatistics.from_images(tmp_path, 64, limit=2, progress=False)
    same = PixelStatistics.from_images(pixels[:2], 64, progress=False)
    np.testing.assert_allclose(two.powers, same.powers, rtol=1e-4)
    three = PixelStatistics.from_images(str(tmp_path), 64, progress=True)
    assert three.powers != two.powers


def test_one_image_at_a_time_is_in_memory() -> None:
    seen: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    def stream() -> Iterator[np.ndarray]:
        for seed in range(6):
            alive.append(sum(ref() is not None for ref in seen))
            image = noise_images(0.0, 1, side=32, seed=seed)[0]
            seen.append(weakref.ref(image))
            yield image
            del image

    PixelStatistics.from_images(stream(), 32, progress=False)
    assert len(alive) == 6
    assert max(alive) <= 2


def test_flat_response_is_kept() -> None:
    found = PixelStatistics.from_images(noise_images(1.0, 2), 224, progress=False)
    weight = torch.randn(4, 3, 14, 14, dtype=torch.float64)
    torch.testing.assert_close(resize_kernel(weight, (9, 20), found).sum((-2, -1)), weight.sum((-2, -1)))


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GeometryError, match="folder"):
        PixelStatistics.from_images(tmp_path / "none", progress=False)
    with pytest.raises(GeometryError, match="no image"):
        PixelStatistics.from_images(tmp_path, progress=False)
    with pytest.raises(GeometryError, match="no image"):
        PixelStatistics.from_images([np.ones((32, 32, 3))], progress=False)
    with pytest.raises(GeometryError, match="no image"):
        PixelStatistics.from_images(noise_images(0.0, 3, side=8), progress=False)
    with pytest.raises(GeometryError, match="shape"):
        PixelStatistics.from_images([np.ones(32)], progress=False)
    with pytest.raises(GeometryError, match="image_size"):
        PixelStatistics.from_images([], 0, progress=False)
    with pytest.raises(GeometryError, match="from_images"):
        PixelStatistics()
    with pytest.raises(GeometryError, match="ascending"):
        PixelStatistics(frequencies=(0.1, 0.2), powers=(1.0, 0.0))
    with pytest.raises(GeometryError, match="ascending"):
        PixelStatistics(frequencies=(0.2, 0.1), powers=(1.0, 1.0))
