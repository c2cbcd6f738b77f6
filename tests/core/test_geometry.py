"""Sizes: what is accepted, what is refused, and whether the refusal names what would work."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anypatch.core.geometry import Geometry, as_size, target_geometry
from anypatch.errors import GeometryError

VIT = Geometry((16, 16), (224, 224), 1, "timm")


def test_patch_alone_keeps_the_image_or_the_grid() -> None:
    assert target_geometry(VIT, 32).image_size == (224, 224)
    assert target_geometry(VIT, 32).grid == (7, 7)
    kept = target_geometry(VIT, (8, 32), keep="grid")
    assert kept.grid == (14, 14)
    assert kept.image_size == (112, 448)


def test_image_alone_and_both() -> None:
    assert target_geometry(VIT, image_size=(448, 224)).grid == (28, 14)
    both = target_geometry(VIT, 28, 448)
    assert (both.patch_size, both.grid) == ((28, 28), (16, 16))


def test_error_names_sizes_that_fit() -> None:
    with pytest.raises(GeometryError) as error:
        target_geometry(VIT, 15)
    message = str(error.value)
    assert "15x15" in message
    assert "224x224" in message
    images = re.search(r"image_size (\d+)x\d+ or (\d+)x\d+", message)
    patches = re.search(r"patch_size (\d+)x\d+ or (\d+)x\d+;", message)
    assert images is not None
    assert patches is not None
    assert [int(i) for i in images.groups()] == [210, 225]
    assert [int(p) for p in patches.groups()] == [14, 16]


@given(st.integers(1, 600), st.integers(1, 600))
def test_suggested_sizes_always_work(patch: int, image: int) -> None:
    current = Geometry((image, image), (image, image))
    try:
        target_geometry(current, patch, image)
        assert image % patch == 0 or (image, patch) == (image, image)
        return
    except GeometryError as error:
        message = str(error)
    found = re.findall(r"(image_size|patch_size) (\d+)x\d+ or (\d+)x\d+|(image_size|patch_size) (\d+)x\d+", message)
    assert found
    suggestions = message.split(": use ", 1)[1]
    images = re.search(r"image_size (\d+)x\d+(?: or (\d+)x\d+)?", suggestions)
    patches = re.search(r"patch_size (\d+)x\d+(?: or (\d+)x\d+)?", suggestions)
    assert images is not None
    assert patches is not None
    for side in filter(None, images.groups()):
        assert int(side) % patch == 0
    for side in filter(None, patches.groups()):
        assert image % int(side) == 0


@pytest.mark.parametrize("bad", ["16", 0, -4, 16.0, True, (16,), (16, 16, 16), (16, 0), None.__class__, 1 << 20, b"16"])
def test_malformed_sizes(bad: object) -> None:
    with pytest.raises(GeometryError, match="patch_size"):
        target_geometry(VIT, bad)  # type: ignore[arg-type]


def test_absurd_sizes_are_refused_before_anything_is_built() -> None:
    with pytest.raises(GeometryError, match="at most 65536"):
        target_geometry(VIT, image_size=1 << 20)


def test_unknown_keep() -> None:
    with pytest.raises(GeometryError, match="keep"):
        target_geometry(VIT, 32, keep="tokens")  # type: ignore[arg-type]


def test_video_sizes() -> None:
    video = Geometry((2, 16, 16), (16, 224, 224))
    assert video.grid == (8, 14, 14)
    assert target_geometry(video, 32).patch_size == (2, 32, 32)
    assert target_geometry(video, (4, 16, 16), keep="grid").image_size == (32, 224, 224)
    assert as_size((8, 8), 3, "patch_size", (2, 16, 16)) == (2, 8, 8)


def test_overlapping_kernel_scales_with_its_stride() -> None:
    pit = Geometry((8, 8), (224, 224), kernel_size=(16, 16), explicit_grid=(27, 27))
    grown = target_geometry(pit, 16, keep="grid")
    assert grown.kernel_size == (32, 32)
    assert grown.image_size == (26 * 16 + 32,) * 2
    assert grown.grid == (27, 27)


def test_models_without_an_image_size() -> None:
    free = Geometry((14, 14), None)
    assert free.grid is None
    assert target_geometry(free, 28).image_size is None


def test_keeping_the_grid_is_offered_only_where_it_would_help() -> None:
    current = Geometry((16, 16), (224, 224), 1, "timm")
    with pytest.raises(GeometryError, match='or keep="grid"'):
        target_geometry(current, 15)
    with pytest.raises(GeometryError) as error:
        target_geometry(current, 15, 200)
    assert "keep" not in str(error.value)


VOLUME = Geometry((4, 4, 4), (32, 32, 32), 1, "generic")


def test_an_int_on_three_axes_says_which_of_them_it_means() -> None:
    assert target_geometry(VOLUME, 8).patch_size == (4, 8, 8)
    with pytest.raises(GeometryError, match=r"first axis, time or depth, keeps its 4: patch_size=\(5, 5, 5\)"):
        target_geometry(VOLUME, 5)
    with pytest.raises(GeometryError, match=r"one or two numbers are height and width.*patch_size=\(7, 7, 7\)"):
        target_geometry(VOLUME, (5, 7))
    with pytest.raises(GeometryError, match="one or two numbers are height and width; give three"):
        target_geometry(VOLUME, image_size=30)


def test_three_numbers_and_two_axes_need_no_such_word() -> None:
    for geometry, patch in ((VOLUME, (5, 5, 5)), (VIT, 15)):
        with pytest.raises(GeometryError) as error:
            target_geometry(geometry, patch)
        assert "height and width" not in str(error.value)
