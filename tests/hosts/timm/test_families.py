"""Every timm module: either in the coverage list, or refused with a reason."""

from __future__ import annotations

import pytest
import timm

import anypatch
from anypatch import UnsupportedModelError
from anypatch.core.empty import empty
from coverage_table import PASS, REFUSED, prove
from families import Family
from families.timm import families

pytestmark = pytest.mark.slow

FAMILIES = {family.name: family for family in families()}
COVERED = {name.split(",")[0] for name, family in FAMILIES.items() if not family.refused}
# deit's and naflexvit's variants of plain models, and networks that share a class, are met under these modules
MODULES = sorted({timm.models._registry._model_to_module[name] for name in timm.list_models()})


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_table(family: Family) -> None:
    row = prove(family)
    assert row.result == (REFUSED if family.refused else PASS), row.reason
    assert bool(row.reason) == family.refused


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_forgotten(module: str) -> None:
    """Whatever model of timm is in hand, its patch changes, or the error says why not; never another error."""
    for name in timm.list_models(module=module)[:: max(1, len(timm.list_models(module=module)) // 3)]:
        model = empty(lambda name=name: timm.create_model(name))
        try:
            geometry = anypatch.geometry(model)
            target = tuple(2 * side for side in geometry.patch_size)
            anypatch.adapt(model, patch_size=target, keep="grid")
        except UnsupportedModelError as error:
            reason = str(error)
        else:
            reason = ""
            assert anypatch.geometry(model).patch_size == target
            assert module in COVERED, f"{name} adapts, but {module} has no proof in the coverage list"
        assert not reason or len(reason) > 40
