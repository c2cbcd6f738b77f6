"""Processors follow the model by one rule: ``convert``, and load and save, write the same directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

import anypatch
from anypatch import Geometry
from anypatch.hosts.transformers.processors import FILES, follow, resized
from builders import SMALL, transformers_model


def _directory(path: Path, processor: Any = None, image: int = 224, patch: int = 16) -> Path:
    transformers_model("Dinov2", image_size=image, patch_size=patch).save_pretrained(path)
    if processor is not None:
        processor.save_pretrained(path)
    return path


def _both_ways(source: Path, tmp_path: Path, **sizes: Any) -> tuple[Path, Path]:
    anypatch.convert(source, tmp_path / "converted", **sizes)
    anypatch.save(anypatch.load(source, **sizes), tmp_path / "saved")
    return tmp_path / "converted", tmp_path / "saved"


def _equal(a: Path, b: Path) -> None:
    first, second = ({p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()} for d in (a, b))
    assert first.keys() == second.keys()
    for name, data in first.items():
        if name.suffix == ".json":
            assert json.loads(data) == json.loads(second[name]), name
        else:
            assert data == second[name], name


def _bit() -> Any:
    return transformers.BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})


@pytest.mark.parametrize("sizes", [{"image_size": 448}, {"patch_size": 32}, {"patch_size": 8, "image_size": 112}])
def test_convert_and_save_agree(tmp_path: Path, sizes: dict[str, Any]) -> None:
    source = _directory(tmp_path / "source", _bit())
    converted, saved = _both_ways(source, tmp_path, **sizes)
    _equal(converted, saved)
    side = sizes.get("image_size", 224)
    picture = Image.fromarray(np.full((300, 400, 3), 200, np.uint8))
    for place in (converted, saved):
        processor = transformers.AutoImageProcessor.from_pretrained(place)
        pixels = processor(picture, return_tensors="pt").pixel_values
        assert tuple(pixels.shape) == (1, 3, side, side)
        assert (pixels == pixels[..., :1, :1]).all()  # nothing black was put around it
        assert processor.size["shortest_edge"] == 256 * side // 224  # the same share is cropped away


@pytest.mark.parametrize("image", [(224, 448), (448, 224)])
def test_a_crop_that_is_no_square_is_covered(tmp_path: Path, image: tuple[int, int]) -> None:
    model = anypatch.load(_directory(tmp_path / "source", _bit()))
    new = Geometry((16, 16), image)
    found = follow(_bit(), anypatch.geometry(model), new)
    assert (found.crop_size["height"], found.crop_size["width"]) == image
    pixels = found(Image.fromarray(np.full((300, 300, 3), 200, np.uint8)), return_tensors="pt").pixel_values
    assert tuple(pixels.shape[-2:]) == image
    assert (pixels == pixels[..., :1, :1]).all()


def test_a_processor_that_fits_is_left_alone(tmp_path: Path) -> None:
    source = _directory(tmp_path / "source", _bit())
    model = anypatch.load(source, image_size=448)
    processor = transformers.AutoImageProcessor.from_pretrained(source)
    processor.size, processor.crop_size = {"shortest_edge": 460}, {"height": 448, "width": 448}  # to train with
    anypatch.save(model, tmp_path / "out", processor=processor)
    found = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert (found.size["shortest_edge"], found.crop_size["height"]) == (460, 448)
    again = anypatch.load(tmp_path / "out")
    anypatch.save(again, tmp_path / "again")
    _equal_processors(tmp_path / "out", tmp_path / "again")


def _equal_processors(a: Path, b: Path) -> None:
    for name in FILES:
        assert (a / name).is_file() == (b / name).is_file()
        assert not (a / name).is_file() or (a / name).read_bytes() == (b / name).read_bytes()


def test_nothing_changes_where_the_image_does_not(tmp_path: Path) -> None:
    """DINOv2's checkpoints are of 518 pixels, and their processors make 224."""
    source = _directory(tmp_path / "source", _bit(), image=518, patch=14)
    anypatch.save(anypatch.load(source), tmp_path / "same")
    _equal_processors(source, tmp_path / "same")
    anypatch.save(anypatch.load(source, patch_size=7), tmp_path / "halved")
    _equal_processors(source, tmp_path / "halved")
    anypatch.save(anypatch.load(source, image_size=448), tmp_path / "smaller")
    found = transformers.AutoImageProcessor.from_pretrained(tmp_path / "smaller")
    assert (found.size["shortest_edge"], found.crop_size["height"]) == (512, 448)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[]", "is damaged: it is no table"),
        ("\xff", "is damaged"),
        ('{"size": {"height": "x", "width": 64}}', "says sizes that no image has"),
        ('{"crop_size": [[], 3]}', "says sizes that no image has"),
    ],
)
def test_a_damaged_processor_is_named_both_ways(tmp_path: Path, text: str, match: str) -> None:
    source = tmp_path / "in"
    transformers_model(image_size=64, patch_size=16).save_pretrained(source)
    (source / "preprocessor_config.json").write_text(text, encoding="latin-1")
    model = anypatch.load(source, image_size=128)
    for act in (
        lambda: anypatch.save(model, tmp_path / "out"),
        lambda: anypatch.convert(source, tmp_path / "out", image_size=128),
    ):
        with pytest.raises(anypatch.CheckpointError, match=rf"in/preprocessor_config\.json {match}"):
            act()
    assert not (tmp_path / "out").exists()


def test_masks_follow_the_grid() -> None:
    processor = transformers.SamImageProcessor(
        size={"longest_edge": 1024},
        pad_size={"height": 1024, "width": 1024},
        mask_size={"longest_edge": 256},
        mask_pad_size={"height": 256, "width": 256},
    )
    old = Geometry((16, 16), (1024, 1024))
    smaller = follow(processor, old, Geometry((16, 16), (512, 512)))
    assert smaller.size["longest_edge"] == smaller.pad_size["height"] == 512
    assert (
        smaller.mask_size["longest_edge"] == smaller.mask_pad_size["height"] == 128
    )  # four to a token, as the model's
    finer = follow(processor, old, Geometry((8, 8), (1024, 1024)))
    assert finer.size["longest_edge"] == 1024
    assert finer.mask_size["longest_edge"] == finer.mask_pad_size["width"] == 512
    assert follow(smaller, old, Geometry((16, 16), (512, 512))).mask_size["longest_edge"] == 128


def test_what_llava_keeps_itself() -> None:
    fields = {
        "processor_class": "LlavaProcessor",
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_processor": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
    }
    for old in (None, Geometry((14, 14), (336, 336))):
        found = resized(fields, old, Geometry((28, 28), (672, 672)))
        assert found["patch_size"] == 28
        assert found["image_processor"]["crop_size"] == {"height": 672, "width": 672}
        assert found["image_processor"]["size"] == {"shortest_edge": 672}
        kept = ("vision_feature_select_strategy", "num_additional_image_tokens", "processor_class")
        assert {name: found[name] for name in kept} == {name: fields[name] for name in kept}
        assert resized(found, old, Geometry((28, 28), (672, 672))) == found


def test_multiples_stay_where_they_fit() -> None:
    old = Geometry((14, 14), (518, 518))
    assert resized({"ensure_multiple_of": 14}, old, Geometry((28, 28), (532, 532)))["ensure_multiple_of"] == 28
    assert resized({"ensure_multiple_of": 28}, old, Geometry((28, 28), (532, 532)))["ensure_multiple_of"] == 28
    assert resized({"ensure_multiple_of": 14}, old, Geometry((7, 7), (518, 518)))["ensure_multiple_of"] == 14
    assert resized({"size_divisor": 32}, Geometry((16, 16), (384, 384)), Geometry((24, 24), (384, 384))) == {
        "size_divisor": 48
    }


def test_budgets_are_not_scaled_twice() -> None:
    fields = {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056}
    once = resized(fields, Geometry((14, 14), None), Geometry((28, 28), None))
    assert once == {"patch_size": 28, "min_pixels": 4 * 3136, "max_pixels": 4 * 12845056}
    assert resized(once, Geometry((14, 14), None), Geometry((28, 28), None)) == once


def test_numbers_of_patches_follow_the_grid() -> None:
    old = Geometry((16, 16), (256, 256))
    assert resized({"patch_size": 16, "max_num_patches": 256}, old, Geometry((8, 8), (256, 256))) == {
        "patch_size": 8,
        "max_num_patches": 1024,
    }
    assert resized({"patch_size": 16, "max_num_patches": 256}, old, Geometry((8, 8), (128, 128))) == {
        "patch_size": 8,
        "max_num_patches": 256,
    }


def test_detection_sizes_scale_together() -> None:
    fields = {"size": {"shortest_edge": 800, "longest_edge": 1333}}
    found = resized(fields, Geometry((16, 16), (800, 800)), Geometry((16, 16), (400, 400)))
    assert found == {"size": {"shortest_edge": 400, "longest_edge": 666}}


def _tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"a": 0, "photo": 1, "[UNK]": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(path)


def test_everything_that_processors_need_travels(tmp_path: Path) -> None:
    source, small = tmp_path / "source", SMALL
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 3, "eos_token_id": 1, "bos_token_id": 2},
        vision_config={**small, "image_size": 64, "patch_size": 16},
    )
    transformers.CLIPModel(config).save_pretrained(source)
    _tokenizer(source)
    transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64).save_pretrained(source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "qformer_tokenizer").mkdir()
    (source / "qformer_tokenizer" / "tokenizer.json").write_text("{}")
    (source / "optimizer.pt").write_bytes(b"no part of the model")
    anypatch.save(anypatch.load(source, 8), tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("a photo").input_ids == [0, 1]
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "out").crop_size["height"] == 64
    for name in ("chat_template.jinja", "qformer_tokenizer/tokenizer.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "optimizer.pt").exists()
    (source / "optimizer.pt").unlink()
    transformers.CLIPModel.from_pretrained(source).save_pretrained(source)  # the configuration in the form it keeps
    converted, saved = _both_ways(source, tmp_path, patch_size=8)
    _equal(converted, saved)


def _classes() -> list[str]:
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as NAMES

    return sorted({kind for kinds in NAMES.values() for kind in kinds.values() if kind})


@pytest.mark.long
@pytest.mark.parametrize("name", _classes())
def test_every_processor_class_agrees(tmp_path: Path, name: str) -> None:
    """Every image processor that can be built without a network, beside the same model."""
    try:
        processor = getattr(transformers, name)()
    except Exception as error:
        pytest.skip(f"cannot be built: {error}")
    source = _directory(tmp_path / "source", processor)
    for number, sizes in enumerate(({"image_size": 448}, {"patch_size": 32}, {"patch_size": 32, "image_size": 448})):
        (tmp_path / str(number)).mkdir()
        converted, saved = _both_ways(source, tmp_path / str(number), **sizes)
        _equal(converted, saved)
        again = anypatch.load(saved)
        anypatch.save(again, tmp_path / str(number) / "again")
        _equal_processors(saved, tmp_path / str(number) / "again")
