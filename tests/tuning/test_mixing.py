"""Mixtures of images: what lies where, and that a crop is the same at every size and for every process."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from anypatch.hosts.images import Preprocess
from anypatch.measure.folders import image_files
from anypatch.tuning import mixing
from anypatch.tuning.crops import Crops
from anypatch.tuning.mixing import Look, Part, drawn_crops, layout, look

BICUBIC = Image.Resampling.BICUBIC


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_layouts_come_as_often_as_is_said() -> None:
    random = np.random.default_rng(0)
    drawn = [layout(random) for _ in range(4000)]
    counts = Counter("blended" if parts[-1].opacity < 1 else len(parts) for parts in drawn)
    expected = {"blended": mixing.BLENDED, 4: mixing.FOURFOLD, 2: mixing.PASTED}
    for kind, share in expected.items():
        assert abs(counts[kind] / len(drawn) - share) < 0.03, kind
    for parts in drawn:
        areas = [(r - x) * (b - t) for x, t, r, b in (part.box for part in parts)]
        assert all(0 <= x < r <= 1 + 1e-9 and 0 <= t < b <= 1 + 1e-9 for x, t, r, b in (part.box for part in parts))
        if len(parts) == 4:
            assert abs(sum(areas) - 1) < 1e-9
        elif parts[-1].opacity == 1 and len(parts) == 2:
            assert areas[1] <= mixing.COVERED[1] + 1e-9


def test_parts_lie_where_they_are_drawn(monkeypatch) -> None:
    monkeypatch.setattr(mixing, "JITTERED", 0.0)
    monkeypatch.setattr(mixing, "GREY", 0.0)
    monkeypatch.setattr(mixing, "SWAPPED", 0.0)
    monkeypatch.setattr(mixing, "BLURRED", 0.0)
    random = np.random.default_rng(0)
    red, blue = plain((200, 0, 0)), plain((0, 0, 100))
    parts = [Part(), Part((0.5, 0.25, 1.0, 0.75))]
    small, large = drawn_crops(iter([red, blue]), parts, random, [(16, 32), (32, 64)], BICUBIC)
    assert (small.size, large.size) == ((32, 16), (64, 32))
    expected = np.zeros((16, 32, 3), np.uint8)
    expected[..., 0] = 200
    expected[4:12, 16:] = (0, 0, 100)
    assert np.array_equal(np.asarray(small), expected)
    assert np.array_equal(np.asarray(large), expected.repeat(2, 0).repeat(2, 1))
    (mixed,) = drawn_crops(iter([red, blue]), [Part(), Part(opacity=0.25)], random, [(16, 16)], BICUBIC)
    assert np.array_equal(np.asarray(mixed), np.full((16, 16, 3), (150, 0, 25)))


def test_a_look_by_hand() -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 0], pixels[0, 1] = (255, 0, 0), (0, 255, 0)
    image = Image.fromarray(pixels)
    whole = (0.0, 0.0, 2.0, 2.0)
    turned = Look(1, whole, mirrored=False, factors=(), channels=None, grey=False, blur=0.0)
    assert np.array_equal(np.asarray(turned.of(image, (2, 2), BICUBIC)), np.rot90(pixels))
    mirrored = Look(0, whole, mirrored=True, factors=(), channels=(2, 0, 1), grey=False, blur=0.0)
    assert np.array_equal(np.asarray(mirrored.of(image, (2, 2), BICUBIC)), pixels[:, ::-1][..., [2, 0, 1]])
    grey = np.asarray(Look(0, whole, False, (), None, grey=True, blur=0.0).of(image, (2, 2), BICUBIC))
    assert (grey[..., 0] == grey[..., 1]).all()
    assert abs(int(grey[0, 0, 0]) - 0.299 * 255) <= 1


def test_looks_suit_any_image_and_shape() -> None:
    random = np.random.default_rng(0)
    for size in ((1, 1), (3, 400), (400, 3), (50, 40)):
        for mode in ("RGB", "L"):
            image = Image.new(mode, size)
            for _ in range(60):
                found = look(image, random, float(random.uniform(0.2, 5)))
                assert found.of(image, (9, 5), BICUBIC).size == (9, 5)


def test_a_crop_is_a_function_of_the_seed_and_its_number(tmp_path: Path) -> None:
    draws = np.random.default_rng(1)
    for number in range(6):
        Image.fromarray(draws.integers(0, 255, (40, 50, 3), np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "6.png").write_bytes(b"no image")
    paths = sorted(tmp_path.iterdir())
    preprocess = Preprocess((0.0,) * 3, (1.0,) * 3, "bicubic")

    def crops(seed: int) -> Crops:
        return Crops(image_files("x", tmp_path, paths), preprocess, seed, [(16, 16), (32, 32)])

    one, other = crops(0), crops(0)
    wanted = [one[k] for k in range(40)]
    for k in reversed(range(40)):
        number, found = other[k]
        assert number == wanted[k][0]
        if number == 6:
            assert isinstance(found, str)
        else:
            assert all(torch.equal(a, b) for a, b in zip(found, wanted[k][1], strict=True))
            assert [tuple(crop.shape) for crop in found] == [(3, 16, 16), (3, 32, 32)]
    assert not all(
        isinstance(a, str) or torch.equal(a[0], b[0])
        for (_, a), (_, b) in zip(wanted, map(crops(1).__getitem__, range(40)), strict=True)
    )
