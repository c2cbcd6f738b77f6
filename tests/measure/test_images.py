"""Opening images: folders, Hugging Face datasets, bad data; each host library's own preprocessing."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from anypatch.errors import DataError, UnsupportedModelError
from anypatch.hosts.images import Preprocess
from anypatch.measure.class_names import read_class_names
from anypatch.measure.decoding import decode, unreadable
from anypatch.measure.opening import labelled, unlabelled
from anypatch.measure.preprocess import preprocess_of
from builders import COLOURS, image_folder, picture, split_folder, transformers_model, write


def counts(images) -> dict[str, int]:
    return dict(Counter(images.classes[label] for label in images.labels))


def test_folder_with_a_split(tmp_path: Path) -> None:
    data = labelled(split_folder(tmp_path, 3, 2))
    assert data.classes == ("blue", "green", "red")
    assert counts(data.train) == {"blue": 3, "green": 3, "red": 3}
    assert counts(data.test) == {"blue": 2, "green": 2, "red": 2}
    assert data.test.keys[0] == "val/blue/0.png"
    index = data.test.keys.index("val/red/1.png")
    assert np.array_equal(np.array(data.test.load(index)), picture(COLOURS["red"], 5000 + 201))


def test_folder_without_a_split_holds_out_a_fifth_of_each_class(tmp_path: Path) -> None:
    data = labelled(image_folder(tmp_path, 10))
    assert counts(data.test) == {"blue": 2, "green": 2, "red": 2}
    assert counts(data.train) == {"blue": 8, "green": 8, "red": 8}
    assert not set(data.train.keys) & set(data.test.keys)
    assert data.test.keys == labelled(tmp_path).test.keys
    assert any("fixed fifth" in note for note in data.warnings)


def test_labels_stay_with_their_images(tmp_path: Path) -> None:
    data = labelled(image_folder(tmp_path, 7), limit=5)
    for part in (data.train, data.test):
        for index, key in enumerate(part.keys):
            name = key.split("/")[0]
            assert part.classes[part.labels[index]] == name
            pixels = np.array(part.load(index)).reshape(-1, 3)
            assert (pixels == COLOURS[name]).all(1).sum() >= 20 * 24


def test_limit_spreads_over_classes(tmp_path: Path) -> None:
    data = labelled(split_folder(tmp_path, 9, 4), limit=7)
    assert sorted(counts(data.train).values()) == [2, 2, 3]
    assert len(data.test) == 7


def test_plain_folder_has_no_labels(tmp_path: Path) -> None:
    for index in range(5):
        write(tmp_path / f"{index}.png", (10, 20, 30), index)
    write(tmp_path / "more" / "a.png", (10, 20, 30), 9)
    (tmp_path / "notes.txt").write_text("not an image")
    write(tmp_path / ".hidden" / "a.png", (10, 20, 30), 9)
    assert labelled(tmp_path).train is None
    images = unlabelled(tmp_path)
    assert images.test.keys == ("0.png", "1.png", "2.png", "3.png", "4.png", "more/a.png")
    assert images.test.labels is None
    assert unlabelled(tmp_path, limit=3).test.keys == ("0.png", "2.png", "more/a.png")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda root: root / "nowhere" / "at" / "all", "no such folder"),
        (lambda root: "./missing", "missing: no such folder$"),
        (lambda root: write(root / "a.png", (0, 0, 0), 0), "is a file"),
        (lambda root: root, "no images in it"),
        (lambda root: image_folder(root, 4, ("red",)), r"one class only \(red\)"),
        (lambda root: image_folder(root, 1), "one image only"),
        (lambda root: split_folder(root, 2, 2, ("red",)), r"one class only \(red\)"),
        (
            lambda root: (split_folder(root, 2, 2), write(root / "train" / "x.png", (0, 0, 0), 0))[0],
            "train/CLASS/IMAGE",
        ),
        (lambda root: (split_folder(root, 2, 2), write(root / "val" / "pink" / "x.png", (0, 0, 0), 0))[0], "pink"),
        (lambda root: (image_folder(root / "train"), (root / "val").mkdir(), root)[2], "no images in val/"),
    ],
)
def test_bad_folders(tmp_path: Path, make, says: str) -> None:
    with pytest.raises(DataError, match=says) as error:
        labelled(make(tmp_path))
    assert "\n" not in str(error.value)


def test_missing_images_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        unlabelled(tmp_path / "gone")
    with pytest.raises(DataError, match="no images"):
        unlabelled(tmp_path)


def test_empty_and_missing_classes_are_named(tmp_path: Path) -> None:
    split_folder(tmp_path, 2, 2)
    (tmp_path / "train" / "yellow").mkdir()
    for path in (tmp_path / "val" / "green").iterdir():
        path.unlink()
    notes = " ".join(labelled(tmp_path).warnings)
    assert "yellow" in notes
    assert "no images of green" in notes


def test_hugging_face_objects_and_directories(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(picture(c, i)) for i in range(5) for c in COLOURS.values()]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS))})
    table = datasets.Dataset.from_dict({"img": images, "label": [0, 1, 2] * 5}, features=features)
    single = labelled(table)
    assert counts(single.test) == {"blue": 1, "green": 1, "red": 1}
    assert np.array_equal(np.array(single.train.load(0)), np.array(images[int(single.train.keys[0].split()[1])]))
    datasets.DatasetDict(train=table, validation=table.select(range(3))).save_to_disk(str(tmp_path / "saved"))
    split = labelled(tmp_path / "saved")
    assert (len(split.train), len(split.test)) == (15, 3)
    assert split.test.labels == (0, 1, 2)
    assert split.classes == tuple(COLOURS)
    with pytest.raises(DataError, match="no column of images among label"):
        labelled(table.remove_columns("img"))
    assert labelled(table.remove_columns("label")).train is None


def test_text_labels_of_a_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(picture((9, 9, 9), i)) for i in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": images, "label": ["zebra", "ant"] * 5}, features=features)
    data = labelled(table)
    assert data.classes == ("ant", "zebra")
    for part in (data.train, data.test):
        assert [(int(key.split()[1]) + 1) % 2 for key in part.keys] == list(part.labels)
    assert counts(data.train) == {"ant": 4, "zebra": 4}


def test_hugging_face_dataset_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    images = [picture(COLOURS["red"], n) for n in range(6)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 3}, features=features)
    asked = []

    def hub(name: str, config: str | None) -> object:
        asked.append((name, config))
        return datasets.DatasetDict(train=table, test=table.select(range(2)))

    monkeypatch.setattr(datasets, "load_dataset", hub)
    for source in ("owner/birds", "hf:owner/birds", "owner/birds:small"):
        data = labelled(source)
        assert data.train is not None
        assert (len(data.train), len(data.test), data.classes) == (6, 2, ("a", "b"))
    assert asked == [("owner/birds", None), ("owner/birds", None), ("owner/birds", "small")]


def test_unknown_dataset_name() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="no such Hugging Face dataset") as error:
        labelled("nobody/no-such-dataset-here")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="got object"):
        labelled(object())


def test_fingerprint_follows_content(tmp_path: Path) -> None:
    image_folder(tmp_path, 3)
    before = labelled(tmp_path).train.fingerprint()
    assert labelled(tmp_path).train.fingerprint() == before
    key = labelled(tmp_path).train.keys[0]
    write(tmp_path / key, (1, 2, 3), 77)
    assert labelled(tmp_path).train.fingerprint() != before


def test_unreadable_images_are_found_and_left_out(tmp_path: Path) -> None:
    for index in range(4):
        write(tmp_path / f"{index}.png", (10, 20, 30), index)
    (tmp_path / "1.png").write_bytes(b"not a picture")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    images = unlabelled(tmp_path).test
    assert set(unreadable(images)) == {1}  # a truncated file opens, and shows when it is decoded
    batches = list(decode(images, Preprocess(), (16, 16), [[0, 1], [2, 3]], 0))
    assert [b.indices for b in batches] == [[0], [3]]
    assert set(batches[0].failures) == {1}
    assert set(batches[1].failures) == {2}
    assert str(tmp_path) not in " ".join(batches[0].failures.values())
    assert batches[0].pixels.shape == (1, 3, 16, 16)


def test_looking_for_unreadable_images_leaves_warnings_alone(tmp_path: Path) -> None:
    for index in range(200):
        (tmp_path / f"{index}.png").write_bytes(b"not a picture")
    images = unlabelled(tmp_path).test
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        before = list(warnings.filters)
        assert len(unreadable(images)) == 200
        assert warnings.filters == before


def test_decoding_in_workers_gives_the_same(tmp_path: Path) -> None:
    for index in range(5):
        write(tmp_path / f"{index}.png", (10, 20, 30), index)
    images = unlabelled(tmp_path).test
    here, there = (list(decode(images, Preprocess(), (16, 24), [[0, 1], [2, 3], [4]], n)) for n in (0, 2))
    for one, two in zip(here, there, strict=True):
        assert one.indices == two.indices
        assert torch.equal(one.pixels, two.pixels)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "1", "I;16"])
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    base = Image.fromarray(picture((200, 20, 20), 0))
    image = Image.fromarray(np.zeros((30, 40), np.uint16)) if mode == "I;16" else base.convert(mode)
    image.save(tmp_path / f"a.{suffix}")
    (batch,) = decode(unlabelled(tmp_path).test, Preprocess(), (16, 16), [[0]], 0)
    assert batch.pixels.shape == (1, 3, 16, 16)
    assert not batch.failures


def test_class_names(tmp_path: Path) -> None:
    classes = ("n01", "n02")
    lines = tmp_path / "names.txt"
    lines.write_text("tench\ngoldfish\n")
    mapping = tmp_path / "names.json"
    mapping.write_text(json.dumps({"n02": "goldfish", "n01": "tench", "n03": "shark"}))
    for given in (
        str(lines),
        lines,
        mapping,
        ["tench", "goldfish"],
        "tench, goldfish",
        {"n01": "tench", "n02": "goldfish"},
    ):
        assert read_class_names(given, classes) == ["tench", "goldfish"]
    with pytest.raises(DataError, match="3 names for 2 classes"):
        read_class_names("a,b,c", classes)
    with pytest.raises(DataError, match="no name for class n02"):
        read_class_names({"n01": "tench"}, classes)
    with pytest.raises(DataError, match="no such file"):
        read_class_names("names.txt", classes)
    broken = tmp_path / "broken.json"
    broken.write_text("[1,")
    with pytest.raises(DataError, match="cannot be read"):
        read_class_names(broken, classes)


def photo(height: int, width: int) -> Image.Image:
    generator = np.random.default_rng(height * width)
    small = Image.fromarray(generator.integers(0, 255, (9, 12, 3)).astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def ours(preprocess: Preprocess, image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(preprocess.view(image, size))).permute(2, 0, 1)[None]
    return preprocess.normalise(pixels)[0]


SHAPES = [(60, 91), (91, 60), (33, 200), (48, 48), (20, 31)]


@pytest.mark.parametrize("size", [(48, 48), (40, 64)])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop", [0.875, 0.95, 1.0])
def test_timm_preprocessing(size: tuple[int, int], mode: str, crop: float) -> None:
    overlay = {"crop_mode": mode, "crop_pct": crop, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
    overlay |= {"interpolation": "bicubic", "input_size": (3, *size)}
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=size,
        patch_size=8,
        depth=1,
        embed_dim=8,
        num_heads=1,
        pretrained_cfg_overlay=overlay,
    )
    config = timm.data.resolve_model_data_config(model)
    theirs = timm.data.create_transform(**config, is_training=False)
    preprocess = preprocess_of(model)
    for shape in SHAPES:
        image = photo(*shape)
        assert (ours(preprocess, image, size) - theirs(image)).abs().max() < 1e-5, shape


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_open_clip_preprocessing(mode: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    from open_clip.transform import PreprocessCfg, image_transform_v2

    model = open_clip.CLIP(
        embed_dim=8,
        vision_cfg={"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 48},
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 8, "heads": 1, "layers": 1},
    )
    config = PreprocessCfg(size=48, resize_mode=mode, interpolation="bicubic", fill_color=7)
    model.visual.preprocess_cfg = vars(config)
    theirs = image_transform_v2(config, is_train=False)
    preprocess = preprocess_of(model)
    for shape in SHAPES:
        image = photo(*shape)
        assert (ours(preprocess, image, (48, 48)) - theirs(image)).abs().max() < 1e-5, shape


def test_transformers_preprocessing(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers_model(image_size=48).save_pretrained(tmp_path)
    processors = [
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48}),
        transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48}),
        transformers.ViTImageProcessorPil(size={"height": 48, "width": 48}, image_std=[0.2, 0.3, 0.4]),
    ]
    for processor in processors:
        processor.save_pretrained(tmp_path)
        model = transformers.ViTModel.from_pretrained(tmp_path)
        preprocess = preprocess_of(model)
        assert not preprocess.note
        for shape in SHAPES[:4]:
            image = photo(*shape)
            theirs = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
            assert (ours(preprocess, image, (48, 48)) - theirs).abs().max() < 2.5 / 255 / 0.2, shape
            assert (ours(preprocess, image, (48, 48)) - theirs).abs().mean() < 0.2 / 255 / 0.2, shape


def test_transformers_without_a_processor_says_so() -> None:
    preprocess = preprocess_of(transformers_model("Dinov2", image_size=56, patch_size=14))
    assert "no image processor" in preprocess.note
    assert preprocess.mean == (0.485, 0.456, 0.406)
    assert preprocess.crop == 224 / 256


def test_torchvision_preprocessing() -> None:
    torchvision = pytest.importorskip("torchvision")
    weights = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1
    with torch.device("meta"):
        model = torchvision.models.vit_b_16()
    preprocess = preprocess_of(model, "torchvision:vit_b_16/IMAGENET1K_V1")
    assert not preprocess.note
    for shape in SHAPES[:3]:
        image = photo(*(4 * side for side in shape))
        theirs = weights.transforms()(image)
        # torchvision rounds the crop's corner like us; its resize of a PIL image is Pillow's.
        assert (ours(preprocess, image, (224, 224)) - theirs).abs().max() < 1e-5
    assert "ImageNet" in preprocess_of(model).note


def test_channels_of_the_model() -> None:
    sizes = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 8, "num_heads": 1}
    grey = preprocess_of(timm.create_model("vit_tiny_patch16_224", in_chans=1, **sizes))
    assert (grey.channels, grey.mean) == (1, (0.5,))
    with pytest.raises(UnsupportedModelError, match="5 channels"):
        preprocess_of(timm.create_model("vit_tiny_patch16_224", in_chans=5, **sizes))


def test_grey_models_get_grey_pixels(tmp_path: Path) -> None:
    write(tmp_path / "a.png", (10, 200, 30), 0)
    (batch,) = decode(unlabelled(tmp_path).test, Preprocess((0.5,), (0.5,)), (16, 24), [[0]], 0)
    assert batch.pixels.shape == (1, 1, 16, 24)
