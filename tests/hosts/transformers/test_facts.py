"""Facts by row: every key is a model type of the installed library, and what can be measured is measured."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import pkgutil
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    BeitConfig,
    BeitModel,
    ViTConfig,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

import anypatch
from anypatch import GeometryError, UnsupportedModelError
from anypatch.hosts.transformers import facts
from anypatch.hosts.transformers.facts import ROWS, measured, takes_some_only

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 16}


def installed_types() -> set[str]:
    """Model types of all configuration classes, those inside others included."""
    found = set()
    for package in pkgutil.iter_modules(transformers.models.__path__):
        module = importlib.import_module(f"transformers.models.{package.name}")
        for file in pkgutil.iter_modules(module.__path__):
            if file.name.startswith("configuration_"):
                inner = importlib.import_module(f"{module.__name__}.{file.name}")
                found |= {getattr(value, "model_type", "") for value in vars(inner).values() if isinstance(value, type)}
    return found


@pytest.mark.slow
def test_every_key_is_a_type_of_the_library() -> None:
    types = installed_types()
    named = {*ROWS, *(kind for answers in measured().values() for kinds in answers.values() for kind in kinds)}
    assert not named - types


def test_rows_say_something() -> None:
    assert [kind for kind, row in ROWS.items() if row == facts.Row()] == []
    for answers in measured().values():
        kinds = [kind for found in answers.values() for kind in found]
        assert len(kinds) == len(set(kinds))


def test_a_type_that_begins_like_a_known_one_has_no_row() -> None:
    class New(ViTConfig):
        model_type = "beit_of_the_future"

    assert facts.row(New()) == facts.Row()
    assert takes_some_only("square_grid", ("beit_of_the_future",)) is None


def beit(**over: Any) -> Any:
    return BeitModel(BeitConfig(patch_size=4, **SIZES, **over))


def future(cls: Any, config: Any, fields: dict[str, Any]) -> Any:
    """A model of a type that nobody has measured."""

    class New(config):  # type: ignore[misc]
        model_type = "a_type_of_the_future"

    return cls(New(patch_size=4, **SIZES, **fields))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("cls", "config", "fields", "square"),
    [
        (ViTModel, ViTConfig, {}, False),
        (ViTForMaskedImageModeling, ViTConfig, {"encoder_stride": 4}, True),
        (BeitModel, BeitConfig, {"use_relative_position_bias": True}, False),
        (BeitModel, BeitConfig, {"use_absolute_position_embeddings": True}, True),
        (ViTMAEForPreTraining, ViTMAEConfig, {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2,
                                              "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 16}, True),
    ],
)  # fmt: skip
def test_classes_that_take_a_grid_for_a_square_are_found_by_a_run(
    known: bool, cls: Any, config: Any, fields: dict[str, Any], square: bool
) -> None:
    """Within one type classes and options differ; of a type that is not known nothing is written down."""
    model = cls(config(patch_size=4, **SIZES, **fields)) if known else future(cls, config, fields)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if square:
        with pytest.raises(GeometryError, match=r"\d+x\d+ grid|square"):
            anypatch.adapt(model, image_size=(8, 32))  # 2 x 8: as many tokens as 4 x 4, a square number
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    else:
        anypatch.adapt(model, image_size=(8, 32))
        assert anypatch.geometry(model).grid == (2, 8)
        model(torch.zeros(1, 3, 8, 32))


def test_square_patches_of_an_unknown_type_are_found_by_a_run() -> None:
    from transformers import DPTConfig, DPTModel

    fields = {"backbone_out_indices": [0], "neck_hidden_sizes": [8], "reassemble_factors": [1]}
    with pytest.raises(UnsupportedModelError, match="only square patches"):
        anypatch.adapt(future(DPTModel, DPTConfig, fields), (4, 8))
    anypatch.adapt(future(ViTModel, ViTConfig, {}), (4, 8))


def tiny(name: str) -> Any:
    """The coverage run's model of a family."""
    from families.transformers import families

    return next(family.build() for family in families() if family.name == name).eval()


def built_by_the_library(name: str, image: int) -> Any:
    """A model of the same configuration that was never adapted, for another image size."""
    model = tiny(name)
    config = model.config
    towers = [getattr(config, field) for field in ("vision_config", "backbone_config") if hasattr(config, field)]
    for part in (config, *towers):
        if hasattr(part, "image_size"):
            part.image_size = image if isinstance(part.image_size, int) else [image, image]
    return type(model)(config).eval()


def fed(model: Any, image: int) -> None:
    entry = getattr(getattr(model, "model", model), "get_image_features", model)
    extra = (1,) if "pixel_attention_mask" in inspect.signature(entry).parameters else ()  # images per sample
    sizes = (
        {"image_sizes": torch.tensor(2 * [[image, image]])}
        if "image_sizes" in inspect.signature(entry).parameters
        else {}
    )
    with torch.no_grad():
        entry(pixel_values=torch.rand(2, *extra, 3, image, image), **sizes)


@pytest.mark.parametrize(
    ("name", "image", "fits"),
    [
        ("internvl", 20, "16x16 or 24x24"),  # neighbours become one token
        pytest.param("rf_detr", 20, "16x16 or 24x24", marks=pytest.mark.slow),  # two windows a side
        pytest.param("rf_detr", 8, "16x16", marks=pytest.mark.slow),  # 8 queries of 4 tokens
        pytest.param("lw_detr", 40, "32x32 or 48x48", marks=pytest.mark.slow),  # the constructor does not take 36
        pytest.param("idefics3", 20, "16x16 or 24x24", marks=pytest.mark.slow),  # asks for values of masks
        pytest.param("mistral3", 4, "8x8", marks=pytest.mark.slow),  # three by three are two by two, and one is none
        pytest.param("gemma3", 4, "8x8", marks=pytest.mark.slow),  # pooled to two by two
        pytest.param("modernvbert", 24, "16x16 or 32x32", marks=pytest.mark.slow),  # counts images by their values
    ],
)
def test_a_grid_that_the_forward_pass_does_not_take_is_refused_with_sizes_that_fit(
    name: str, image: int, fits: str
) -> None:
    with pytest.raises(Exception, match=r"shape|size|range|stride"):  # the library's own model does not, either
        fed(built_by_the_library(name, image), image)
    model = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(GeometryError, match=f"does not take image_size {image}x{image} .*use image_size {fits}$"):
        anypatch.adapt(model, image_size=image)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for size in fits.split(" or "):
        if (side := int(size.split("x")[0])) != anypatch.geometry(model).image_size[0]:  # type: ignore[index]
            fed(anypatch.adapt(model, image_size=side), side)
            fed(built_by_the_library(name, side), side)


@pytest.mark.siblings(fast=1)
@pytest.mark.parametrize(
    ("name", "image"), [("glm4v", 20), ("glm4v", 4), ("minimax_m3_vl", 12), ("glm_ocr", 20), ("minicpmv4_6", 12)]
)
def test_a_table_with_an_odd_side_is_proved_on_images_that_a_processor_makes(name: str, image: int) -> None:
    """Merged neighbours bind the images, which come cut to whole blocks, not the table of positions."""
    model = anypatch.adapt(tiny(name), image_size=image)
    patch = anypatch.geometry(model).patch_size
    assert anypatch.check(model, tuple(2 * side for side in patch)).passed
    library = built_by_the_library(name, image)
    library.load_state_dict(model.state_dict())


def test_what_binds_the_grid_of_a_type_that_nobody_has_measured_is_found_by_a_run() -> None:
    class Merged(ViTModel):
        class config_class(ViTConfig):  # noqa: N801
            model_type = "a_type_of_the_future"

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            tokens = super().forward(pixel_values, interpolate_pos_encoding=False).last_hidden_state[:, 1:]
            side = math.isqrt(tokens.shape[1])
            return tokens.reshape(len(tokens), side // 2, 2, side // 2, 2, tokens.shape[-1]).mean((2, 4))

    model = Merged(Merged.config_class(patch_size=4, **{**SIZES, "hidden_size": 20}))
    with pytest.raises(GeometryError, match=r"a 5x5 grid, .*: use image_size 16x16 or 24x24$"):
        anypatch.adapt(model, image_size=20)
    with pytest.raises(GeometryError, match=r'a 1x1 grid, .*: use image_size 32x32, or keep="grid"$'):
        anypatch.adapt(model, 16)
    assert anypatch.adapt(model, image_size=24)(torch.rand(1, 3, 24, 24)).shape == (1, 3, 3, 20)


@pytest.mark.long
def test_the_measured_file_is_what_a_fresh_run_gives() -> None:
    from coverage_table import measure
    from families.transformers import families, variants

    assert json.loads(measure([*families(), *variants()])) == measured()


def test_a_run_leaves_nothing_in_what_the_library_keeps_for_the_whole_process() -> None:
    """BEiT keeps indices by the window's size, for all of its models: without values they would be anything."""
    from transformers.models.beit.modeling_beit import BeitRelativePositionBias

    model = BeitModel(BeitConfig(patch_size=4, use_relative_position_bias=True, **{**SIZES, "image_size": 44}))
    anypatch.adapt(model, image_size=(28, 44))
    for window in ((11, 11), (7, 11), (22, 33)):  # the last is what a run is made at
        assert BeitRelativePositionBias.generate_relative_position_index(window).device.type == "cpu"
