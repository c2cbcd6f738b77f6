"""Sizes as people type them, and the nearest image size that fits."""

from __future__ import annotations

import math

import pytest
import timm
from hypothesis import given
from hypothesis import strategies as st

import anypatch
from anypatch import Geometry, GeometryError
from anypatch.core.geometry import parse_image_size, parse_size, parse_sizes, target_geometry

DINO = Geometry((14, 14), (518, 518), 1, "timm")


def test_dinov2_at_patch_16_is_512_pixels() -> None:
    assert target_geometry(DINO, 16, "nearest").image_size == (512, 512)  # 6 pixels away; 528 is 10 away


def test_half_way_between_two_sizes_is_the_larger() -> None:
    assert target_geometry(DINO, 28, "nearest").image_size == (532, 532)  # 504 and 532 are both 14 away


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 64), st.integers(1, 64))
def test_no_size_that_fits_is_nearer(height: int, width: int, rows: int, columns: int) -> None:
    target = target_geometry(Geometry((65, 65), (height, width)), (rows, columns), "nearest")
    assert target.image_size is not None
    for found, side, patch in zip(target.image_size, (height, width), (rows, columns), strict=True):
        every = range(patch, side + 2 * patch, patch)
        assert found in every
        assert abs(found - side) == min(abs(size - side) for size in every)
        assert found == max(size for size in every if abs(size - side) == abs(found - side))


def test_an_image_smaller_than_half_a_patch_is_one_patch() -> None:
    assert target_geometry(DINO, 2000, "nearest").image_size == (2000, 2000)


def test_time_follows_its_own_axis() -> None:
    video = Geometry((2, 14, 14), (16, 224, 224))
    assert target_geometry(video, (3, 16, 16), "nearest").image_size == (15, 224, 224)


def test_overlapping_patches_keep_the_size_or_take_one_window() -> None:
    spectrogram = Geometry((10, 10), (128, 1024), kernel_size=(16, 16), explicit_grid=(12, 101))
    assert target_geometry(spectrogram, 15, "nearest").image_size == (128, 1024)  # a kernel of 24
    assert target_geometry(spectrogram, (100, 10), "nearest").image_size == (160, 1024)


def test_the_same_patch_changes_nothing_and_models_of_any_size_stay_so() -> None:
    assert target_geometry(DINO, None, "nearest") == target_geometry(DINO, 14, "nearest") == target_geometry(DINO)
    assert target_geometry(Geometry((4, 4)), 8, "nearest").image_size is None


def test_adapt_takes_it_and_names_it_where_a_patch_does_not_divide() -> None:
    model = timm.create_model("test_vit", pretrained=False)  # 160 pixels, patch 16
    with pytest.raises(GeometryError, match=r'image_size="nearest", which is 165x165'):
        anypatch.adapt(model, 33)
    assert anypatch.adapt(model, 33, "nearest") is model
    assert anypatch.geometry(model).image_size == (165, 165)
    assert model.pos_embed.shape[1] == 25 + model.num_prefix_tokens


def test_load_and_changes_take_it() -> None:
    from anypatch.inspection import changes_for

    model = anypatch.load("timm:test_vit", 12, "nearest", pretrained=False)
    assert anypatch.geometry(model).image_size == (156, 156)  # 160 is 4 above 156 and 8 below 168
    assert changes_for(model, 16, "nearest")


def test_another_word_is_refused_and_the_right_one_named() -> None:
    with pytest.raises(GeometryError, match=r"nearest.*'near'"):
        target_geometry(DINO, 16, "near")  # type: ignore[arg-type]


def test_repr_shows_the_grid() -> None:
    assert repr(DINO) == (
        "Geometry(patch_size=(14, 14), image_size=(518, 518), grid=(37, 37), prefix_tokens=1, library='timm')"
    )


def test_sizes_as_they_are_typed() -> None:
    assert parse_size("16", "--patch-size") == 16
    assert parse_size("16x32", "--patch-size") == (16, 32)
    assert parse_size("2X16x32", "--patch-size") == (2, 16, 32)
    assert parse_sizes("7,14, 16x32", "--patch-size") == [7, 14, (16, 32)]
    assert parse_image_size("Nearest", "--image-size") == "nearest"
    assert parse_image_size("448", "--image-size") == 448


@pytest.mark.parametrize("text", ["", "x", "16x", "big", "-16", "1.5", "1e3", "٣", "1x2x3x4", "1,2,3,4", "16;32"])
def test_what_is_no_size_is_refused_with_what_was_given(text: str) -> None:
    with pytest.raises(GeometryError) as caught:
        parse_size(text, "--patch-size")
    assert repr(text) in str(caught.value)
    with pytest.raises(GeometryError, match="nearest"):
        parse_image_size(text, "--image-size")


def test_a_comma_is_answered_with_the_rectangle() -> None:
    with pytest.raises(GeometryError, match=r"--patch-size takes one size, got '16,32': a rectangle is 16x32"):
        parse_size("16,32", "--patch-size")
    with pytest.raises(GeometryError, match="a rectangle is 2x16x32"):
        parse_size("2, 16,32", "--patch-size")


@given(st.text(max_size=12))
def test_no_text_raises_anything_else(text: str) -> None:
    try:
        size = parse_size(text, "--patch-size")
    except GeometryError:
        return
    assert math.prod(size if isinstance(size, tuple) else (size,)) >= 0
