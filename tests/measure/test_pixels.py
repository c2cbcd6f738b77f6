"""Pictures of every kind become 8-bit colours: scaled or refused, never clipped."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anypatch.errors import DataError
from anypatch.hosts.images import Preprocess
from anypatch.measure.decoding import decode
from anypatch.measure.opening import unlabelled
from anypatch.measure.pixels import as_rgb
from anypatch.measure.spectra import PixelStatistics
from anypatch.measure.view import view
from builders import picture

RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64).round().astype(np.uint16)
# Computed by hand: the level nearest to value * 255 / 65535.
EIGHT = np.floor(RAMP.astype(np.float64) / 257 + 0.5).astype(np.uint8)


def grey(image: Image.Image) -> np.ndarray:
    found = np.asarray(as_rgb(image))
    assert found.dtype == np.uint8
    assert (found == found[..., :1]).all()
    return found[..., 0]


def again(image: Image.Image, kind: str, **options) -> Image.Image:
    """The picture as a file of a kind gives it back."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


SIXTEEN = Image.fromarray(RAMP)
BIG = Image.frombytes("I;16B", (64, 64), RAMP.astype(">u2").tobytes())


@pytest.mark.parametrize(
    "image",
    [
        SIXTEEN,
        BIG,
        again(SIXTEEN, "PNG"),
        again(SIXTEEN, "TIFF"),
        again(BIG, "TIFF"),
        again(SIXTEEN, "JPEG2000", irreversible=False),
        Image.open(io.BytesIO(b"P5\n64 64\n65535\n" + RAMP.astype(">u2").tobytes())),
    ],
    ids=["I;16", "I;16B", "png", "tiff", "tiff, big", "jpeg 2000", "pgm"],
)
def test_sixteen_bits_are_scaled(image: Image.Image) -> None:
    assert np.array_equal(grey(image), EIGHT)


def test_a_pgm_of_ten_bits_uses_its_own_white() -> None:
    image = Image.open(io.BytesIO(b"P5\n3 1\n1023\n" + struct.pack(">3H", 0, 512, 1023)))
    assert grey(image)[0].tolist() == [0, 128, 255]


def test_floats_are_scaled_or_refused() -> None:
    share = Image.fromarray((RAMP / 65535).astype(np.float32))
    for image in (share, again(share, "TIFF")):
        assert np.array_equal(grey(image), EIGHT)
    levels = np.array([[0, 1.4, 254.6, 255]], np.float32)
    assert grey(Image.fromarray(levels))[0].tolist() == [0, 1, 255, 255]
    for wrong in ([[0, 65535]], [[-0.5, 0.5]], [[np.nan, 0.5]], [[np.inf, 0.5]]):
        with pytest.raises(ValueError, match="white"):
            as_rgb(Image.fromarray(np.array(wrong, np.float32)))


def test_thirty_two_bits_are_levels_or_refused() -> None:
    assert grey(Image.fromarray(np.array([[0, 7, 255]], np.int32)))[0].tolist() == [0, 7, 255]
    for wrong in ([[0, 256]], [[-1, 255]], [[0, 1 << 30]]):
        image = Image.fromarray(np.array(wrong, np.int32))
        for one in (image, again(image, "TIFF")):
            with pytest.raises(ValueError, match="white"):
                as_rgb(one)


COLOUR = picture((200, 20, 20), 0)


def test_transparency_is_dropped_as_torchvision_does() -> None:
    grey_levels = np.asarray(Image.fromarray(COLOUR).convert("L"))
    alpha = Image.fromarray(np.full(grey_levels.shape, 90, np.uint8))
    base = Image.fromarray(grey_levels)
    assert np.array_equal(grey(Image.merge("LA", (base, alpha))), grey_levels)
    colours = Image.fromarray(COLOUR)
    colours.putalpha(alpha)
    assert np.array_equal(np.asarray(as_rgb(colours)), COLOUR)
    palette = Image.fromarray(grey_levels // 64).convert("P")
    for image in (palette, palette.convert("PA"), again(palette, "PNG", transparency=b"\0\x80\xff\x10")):
        assert np.array_equal(np.asarray(as_rgb(image)), np.asarray(palette.convert("RGB")))


def test_one_bit_and_cmyk() -> None:
    bits = Image.fromarray(np.array([[True, False]]))
    assert grey(bits)[0].tolist() == [255, 0]
    assert grey(again(bits, "PNG"))[0].tolist() == [255, 0]
    inks = Image.new("CMYK", (2, 1), (0, 255, 255, 0))
    assert np.asarray(as_rgb(again(inks, "TIFF")))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(kind: str, orientation: int) -> None:
    """Turned by hand as the EXIF standard numbers it: where row 0 and column 0 of the file are seen."""
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24] = (255, 0, 0)
    upright[16:, 24:] = (0, 0, 255)
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = again(Image.fromarray(np.ascontiguousarray(turned)), kind, exif=exif)
    found = np.asarray(as_rgb(stored)).astype(int)
    assert found.shape == upright.shape
    assert np.abs(found - upright)[4:12, 4:20].max() < 12
    assert np.abs(found - upright)[20:28, 28:44].max() < 12
    assert np.array_equal(as_rgb(as_rgb(stored)), as_rgb(stored))  # not turned twice


def test_a_broken_exif_block_says_nothing_of_the_pixels() -> None:
    stored = again(Image.fromarray(COLOUR), "PNG")
    stored.info["exif"] = b"Exif\0\0MM\0*\xff\xff\xff\xff"
    assert np.array_equal(np.asarray(as_rgb(stored)), COLOUR)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_picture_counts(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    stored = again(frames[0], kind, save_all=True, append_images=frames[1:])
    assert stored.n_frames == 3
    red, green, _ = np.asarray(as_rgb(stored))[8, 8]
    assert red > 230
    assert green < 20


def test_every_door_reads_them_alike(tmp_path: Path) -> None:
    """Folders, Hugging Face datasets, `view`, and the statistics of pixels."""
    SIXTEEN.save(tmp_path / "a.png")
    Image.fromarray(np.full((64, 64), 1 << 20, np.int32)).save(tmp_path / "b.tif")
    exact = Preprocess((0.5,), (0.5,))
    (batch,) = decode(unlabelled(tmp_path).test, exact, (64, 64), [[0, 1]], 0)
    assert np.array_equal(batch.pixels[0, 0].numpy(), EIGHT)
    assert list(batch.failures) == [1]
    assert "white" in batch.failures[1]
    with pytest.raises(DataError, match="white"):
        view(None, tmp_path / "b.tif", [8])  # type: ignore[arg-type]
    kinds = {}
    for name, image in (("sixteen", SIXTEEN), ("eight", Image.fromarray(EIGHT))):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "a.png")
        kinds[name] = PixelStatistics.from_images(tmp_path / name, 64, progress=False)
    assert kinds["sixteen"] == kinds["eight"]
    datasets = pytest.importorskip("datasets")
    from anypatch.measure.opening import labelled

    table = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]}).cast_column("image", datasets.Image())
    assert np.array_equal(np.asarray(labelled(table).test.load(0))[..., 0], EIGHT)
