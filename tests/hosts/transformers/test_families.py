"""transformers: every family's proof, and every family at other grids against the model built there."""

from __future__ import annotations

import pytest

import anypatch
from anypatch import GeometryError, UnsupportedModelError
from anypatch.proof import check
from families.transformers import families
from tests.hosts.transformers.test_model import assert_as_built, assert_follows, doubled, made

pytestmark = pytest.mark.slow

FAMILIES = {family.name: family for family in families()}
PROVED = [name for name, family in FAMILIES.items() if not family.refused]
REFUSED = [name for name, family in FAMILIES.items() if family.refused]


def test_names_are_unique() -> None:
    assert len(FAMILIES) == len(list(families()))


@pytest.mark.parametrize("name", PROVED)
def test_growing_the_patch_is_exact(name: str) -> None:
    model = FAMILIES[name].build()
    assert check(model, FAMILIES[name].patch_size or doubled(model)).passed


@pytest.mark.parametrize("name", PROVED)
def test_other_grids_are_as_in_a_model_built_there(name: str) -> None:
    assert_follows(name)


@pytest.mark.parametrize("name", PROVED)
def test_rectangles_work_or_are_refused(name: str) -> None:
    model = made(name)
    patch = anypatch.geometry(model).patch_size
    try:
        found = check(model, (*patch[:-2], 2 * patch[-2], 3 * patch[-1]))
    except UnsupportedModelError as error:
        assert "only square" in str(error)  # noqa: PT017
    else:
        assert found.passed, found
    image = anypatch.geometry(model).image_size
    if image is None:
        return
    try:
        anypatch.adapt(model, image_size=(*image[:-2], 2 * image[-2], 3 * image[-1]))
    except (GeometryError, UnsupportedModelError) as error:
        assert "square" in str(error) or "length of a row" in str(error)  # noqa: PT017
    else:
        assert_as_built(model)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    model = FAMILIES[name].build()
    with pytest.raises(UnsupportedModelError):
        check(model, doubled(model))
