"""The sweep: its columns, its cache, its errors, and equal numbers from many processes."""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.torch_version import TorchVersion

import anypatch
from anypatch.errors import AnypatchError, DataError, GeometryError, UnsupportedModelError
from anypatch.measure import accuracy as metrics
from anypatch.measure.accuracy import area_matrix, pool_to
from anypatch.measure.cache import Cache
from anypatch.measure.extraction import Extractor
from anypatch.measure.features import Reader
from anypatch.measure.opening import unlabelled
from anypatch.measure.preprocess import preprocess_of
from anypatch.report import measurements
from anypatch.report.colours import shared_colours
from builders import COLOURS, SMALL, image_folder, split_folder, transformers_model, vit, write

SIZES = [4, 8, 16]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYPATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("anypatch.measure.cost.ENOUGH", 0.0)  # seconds of timing


def sweep(model, sizes=SIZES, **options):
    options = {"num_workers": 0, "batch_size": 4, "device": "cpu", "progress": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return anypatch.sweep(model, sizes, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split_folder(tmp_path_factory.mktemp("data"))


def test_tokens_are_patches_as_in_a_budget() -> None:
    """Prefix tokens are not counted, as in ``flexible``'s budget and in what ``tune`` says."""
    model = vit(reg_tokens=4)
    rows = sweep(model, [4, 8]).rows
    grids = [anypatch.geometry(anypatch.at(model, patch)).grid for patch in (4, 8)]
    assert [row["tokens"] for row in rows] == [h * w for h, w in grids]
    flexible = anypatch.flexible(model, (4, 8))
    height, width = anypatch.geometry(model).image_size
    for row in rows:
        assert flexible._chosen((height, width), None, row["tokens"]) == (row["patch_size"],) * 2


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(patch size, images) of every pass for features; those for timing are not counted."""
    seen: list[tuple[int, int]] = []
    original = Extractor._compute

    def compute(self, reader, *args):
        class Counting:
            model = reader.model

            def __call__(self, pixels):
                seen.append((reader.geometry.patch_size[0], len(pixels)))
                return reader(pixels)

        return original(self, Counting(), *args)

    monkeypatch.setattr(Extractor, "_compute", compute)
    return seen


def images_per_patch(passes: list[tuple[int, int]]) -> dict[int, int]:
    found: dict[int, int] = {}
    for patch, count in passes:
        found[patch] = found.get(patch, 0) + count
    return found


def untimed(row):
    """A row without what differs from run to run."""
    return {name: value for name, value in row.items() if name not in measurements.TIMING}


def test_rows_and_files(folder: Path, tmp_path: Path) -> None:
    model = vit()
    before = copy.deepcopy(model.state_dict())
    result = sweep(model, data=folder, output=tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert anypatch.geometry(model).patch_size == (8, 8)
    assert [r["patch_size"] for r in result.rows] == SIZES
    assert [r["image_size"] for r in result.rows] == [32] * 3
    assert [r["tokens"] for r in result.rows] == [64, 16, 4]
    assert result.rows[0]["gflops"] > result.rows[1]["gflops"] > result.rows[2]["gflops"] > 0
    assert result.rows[0]["peak_memory_mb"] > result.rows[2]["peak_memory_mb"]
    assert all(r["images_per_second"] > 0 for r in result.rows)
    same = result.rows[1]
    assert same["fidelity"] == pytest.approx(1, abs=1e-6)
    assert same["patch_fidelity"] == pytest.approx(1, abs=1e-3)
    assert same["neighbour_agreement"] == 1
    assert result.rows[0]["fidelity"] < 0.9999
    for row in result.rows:
        assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1
        assert row["accuracy_by"] == "probe"
        assert row["accuracy"] == row["probe_accuracy"]
        assert row["knn_accuracy"] * 12 == pytest.approx(round(row["knn_accuracy"] * 12))
    assert json.loads((tmp_path / "sweep.json").read_text())["rows"] == result.rows
    with (tmp_path / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["patch_size"] for line in lines] == ["4", "8", "16"]
    assert float(lines[0]["fidelity"]) == result.rows[0]["fidelity"]
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert list(result.to_pandas()["patch_size"]) == SIZES
    assert len(result.plot().axes) == 2


def test_fidelity_is_what_it_says(folder: Path) -> None:
    """Against features read without any of the sweep's machinery."""
    model = vit()
    result = sweep(model, [16], images=folder / "val", cache=False)
    images = unlabelled(folder / "val").test
    preprocess = preprocess_of(model)
    views = [preprocess.view(images.load(i), (32, 32)) for i in range(len(images))]
    pixels = preprocess.normalise(torch.stack([torch.from_numpy(np.array(v)).permute(2, 0, 1) for v in views]))
    other = anypatch.adapt(vit(), 16)
    with torch.no_grad():
        native, coarse = model.forward_features(pixels), other.forward_features(pixels)
    cosine = torch.nn.functional.cosine_similarity
    assert result.rows[0]["fidelity"] == pytest.approx(
        cosine(native[:, 0], coarse[:, 0], dim=1).mean().item(), abs=1e-5
    )
    fine = native[:, 1:].reshape(-1, 2, 2, 2, 2, 24).mean((2, 4)).reshape(-1, 4, 24)
    expected = cosine(fine, coarse[:, 1:], dim=-1).mean().item()
    assert result.rows[0]["patch_fidelity"] == pytest.approx(expected, abs=2e-3)
    assert "accuracy" not in result.rows[0]


def test_keep_grid_and_rectangles(folder: Path) -> None:
    result = sweep(vit(), [4, (8, 16)], keep="grid", images=folder / "val")
    assert [r["image_size"] for r in result.rows] == [16, [32, 64]]
    assert [r["patch_size"] for r in result.rows] == [4, [8, 16]]
    assert {r["tokens"] for r in result.rows} == {16}
    assert "8x16" in result.to_csv()
    assert list(result.to_pandas()["image_size"]) == [16, "32x64"]


def test_grey_model(folder: Path) -> None:
    result = sweep(vit(in_chans=1), [4, 8], images=folder / "val", limit=6)
    assert result.rows[1]["fidelity"] == pytest.approx(1, abs=1e-6)
    assert result.samples[0].image.shape == (32, 32)
    assert "What the model sees" in result.to_html(folder / "grey.html").read_text()


def test_image_size(folder: Path) -> None:
    result = sweep(vit(), [8, 16], image_size=64, images=folder / "val", limit=6, reference="native")
    assert [r["tokens"] for r in result.rows] == [64, 16]
    assert result.native["tokens"] == 16
    assert result.rows[0]["fidelity"] < 1


def test_costs_alone() -> None:
    result = sweep(vit(), [8, 16])
    assert result.rows[0]["gflops"] > 0
    assert result.rows[0]["fidelity"] is None
    assert any("only costs" in note for note in result.notes)
    assert result.quality is None
    assert len(result.plot().axes) == 1


def test_gflops_by_hand() -> None:
    """Two blocks of width 24 on 17 tokens: projections, MLP, attention, and the patch embedding."""
    width, tokens, depth = 24, 17, 2
    block = 2 * tokens * width * width * (3 + 1 + 4 + 4) + 2 * 2 * tokens * tokens * width
    patches = 2 * 16 * (8 * 8 * 3) * width
    assert sweep(vit(), [8]).rows[0]["gflops"] == pytest.approx((depth * block + patches) / 1e9)


def test_peak_memory_by_hand() -> None:
    """A plain chain: weights, input, and the two largest neighbours among the activations."""
    from anypatch.measure.cost import _peak_memory

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1000))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.cat([x] * 10)
            z = y + 1
            del y
            return z[: len(x)] * 2

    class Plain:
        def __init__(self) -> None:
            self.model = Chain()

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return self.model(x)

    x = torch.zeros(500)
    assert _peak_memory(Plain(), x)[0] == 4 * (1000 + 500 + 5000 + 5000)  # type: ignore[arg-type]


def test_one_more_size_computes_only_that(folder: Path, passes: list[tuple[int, int]]) -> None:
    first = sweep(vit(), [8, 16], data=folder)
    assert images_per_patch(passes) == {8: 36, 16: 36}
    passes.clear()
    second = sweep(vit(), [4, 8, 16], data=folder)
    assert images_per_patch(passes) == {4: 36}
    assert [untimed(row) for row in second.rows[1:]] == [untimed(row) for row in first.rows]


def test_cache_follows_weights_images_options_and_versions(
    folder: Path, passes: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_folder(tmp_path, 5)
    sweep(vit(), [16], images=tmp_path)
    passes.clear()
    sweep(vit(), [16], images=tmp_path)
    assert passes == []
    model = vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[0] += 1e-3
    sweep(model, [16], images=tmp_path)
    assert images_per_patch(passes) == {8: 15, 16: 15}
    passes.clear()
    sweep(vit(), [16], images=tmp_path, kernel="bicubic")
    assert images_per_patch(passes) == {16: 15}
    passes.clear()
    write(tmp_path / "red" / "0.png", (1, 2, 3), 999)
    sweep(vit(), [16], images=tmp_path)
    assert images_per_patch(passes) == {8: 15, 16: 15}
    passes.clear()
    sweep(vit(), [16], images=tmp_path, cache=False)
    assert images_per_patch(passes) == {8: 15, 16: 15}
    passes.clear()
    monkeypatch.setattr(torch, "__version__", TorchVersion(f"{torch.__version__}.1"))  # may compute otherwise
    sweep(vit(), [16], images=tmp_path)
    assert images_per_patch(passes) == {8: 15, 16: 15}


def test_interrupted_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[tuple[int, int]]
) -> None:
    image_folder(tmp_path, 30)
    whole = sweep(vit(), [16], images=tmp_path, cache=False)
    passes.clear()

    def stop(what: str, done: int, total: int) -> None:
        if done >= 90 + 70:  # in the second shard of the second geometry
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(vit(), [16], images=tmp_path, progress=stop)
    passes.clear()
    again = sweep(vit(), [16], images=tmp_path)
    assert images_per_patch(passes) == {16: 90 - 64}
    for name in ("fidelity", "patch_fidelity", "neighbour_agreement"):
        assert again.rows[0][name] == whole.rows[0][name]


def test_damaged_cache_is_computed_again(folder: Path, tmp_path: Path, passes: list[tuple[int, int]]) -> None:
    first = sweep(vit(), [16], images=folder / "val", cache=tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:40])
    for file in tmp_path.rglob("cost.json"):
        file.write_text("{")
    passes.clear()
    again = sweep(vit(), [16], images=folder / "val", cache=tmp_path)
    assert images_per_patch(passes) == {8: 12, 16: 12}
    assert again.rows[0]["fidelity"] == first.rows[0]["fidelity"]


def test_cache_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = sweep(vit(), [16], images=folder / "val", cache=tmp_path / "file")
    assert result.rows[0]["fidelity"] > 0
    cache = Cache(tmp_path / "file")
    with pytest.warns(UserWarning, match="not cached"):
        cache.store("00", "x", {"a": torch.zeros(1)}, {})


def test_unreadable_images_are_counted_and_named(tmp_path: Path) -> None:
    split_folder(tmp_path)
    clean = sweep(vit(), [16], data=tmp_path)
    (tmp_path / "val" / "red" / "broken.png").write_bytes(b"nothing")
    whole = (tmp_path / "train" / "red" / "0.png").read_bytes()
    (tmp_path / "train" / "red" / "half.png").write_bytes(whole[: len(whole) // 2])
    result = sweep(vit(), [16], data=tmp_path)
    notes = " ".join(result.notes)
    assert "1 of 13 images of test cannot be read" in notes
    assert "val/red/broken.png" in notes
    assert "1 of 25 images of train cannot be read" in notes
    assert "train/red/half.png" in notes
    for name in ("fidelity", "accuracy", "knn_accuracy"):
        assert result.rows[0][name] == clean.rows[0][name]


def test_only_unreadable_images(tmp_path: Path, passes: list[tuple[int, int]]) -> None:
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="none of its 3 images can be read"):
        sweep(vit(), [16], images=tmp_path)
    assert passes == []


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"patch_sizes": [5, 8, 9]}, GeometryError, "patch_size 5.*patch_size 9"),
        ({"patch_sizes": []}, GeometryError, "no patch sizes"),
        ({"patch_sizes": [8, 8]}, GeometryError, "given twice"),
        ({"keep": "both"}, GeometryError, "keep"),
        ({"images": "nowhere/at/all"}, DataError, "no such folder"),
        ({"data": "nowhere/at/all"}, DataError, "no such folder"),
        ({"class_names": ["a", "b"]}, DataError, "2 names for 3 classes"),
        ({"class_names": ["a", "b", "c"]}, DataError, "text tower"),
        ({"class_names": ["a"], "data": None}, DataError, "labelled data"),
        ({"limit": 0}, AnypatchError, "limit"),
        ({"batch_size": 0}, AnypatchError, "batch_size"),
        ({"num_workers": -1}, AnypatchError, "num_workers"),
        ({"arch": "timm:x"}, AnypatchError, "live model"),
        ({"output": "/dev/null/x"}, AnypatchError, "cannot write"),
        ({"kernel": "magic"}, AnypatchError, "magic"),
    ],
)
def test_bad_input_is_said_before_any_work(folder: Path, monkeypatch, options, kind, says: str) -> None:
    monkeypatch.setattr(Reader, "__call__", lambda self, pixels: pytest.fail("work began"))
    given = {"data": folder, "patch_sizes": [8], **options}
    with pytest.raises(kind, match=says) as error:
        sweep(vit(), given.pop("patch_sizes"), **given)
    assert "\n" not in str(error.value)


def test_no_model() -> None:
    with pytest.raises(UnsupportedModelError):
        sweep(nn.Linear(3, 3), [8])


def test_one_class_only(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one class only"):
        sweep(vit(), [8], data=image_folder(tmp_path, 4, ("red",)))


def test_own_head_by_order_and_by_name(folder: Path) -> None:
    by_order = sweep(vit(num_classes=3), [8], data=folder)
    assert by_order.rows[0]["accuracy_by"] == "head"
    assert any("order" in note for note in by_order.notes)
    assert sweep(vit(num_classes=5), [8], data=folder).rows[0]["accuracy_by"] == "probe"

    model = vit(num_classes=3)
    model.pretrained_cfg["label_names"] = ["Red", "blue", "green"]
    assert sweep(model, [8], data=folder).rows[0]["accuracy_by"] == "head"
    from anypatch.measure.zeroshot import head_columns

    assert head_columns(model, ("blue", "green", "red")) == ([1, 2, 0], "")
    assert head_columns(model, ("blue", "pink", "red"))[0] is None


def test_own_head_counts_right_answers(folder: Path) -> None:
    model = vit(num_classes=3)
    result = sweep(model, [8], data=folder)
    from anypatch.measure.opening import labelled

    images, preprocess = labelled(folder).test, preprocess_of(model)
    views = [preprocess.view(images.load(i), (32, 32)) for i in range(len(images))]
    pixels = preprocess.normalise(torch.stack([torch.from_numpy(np.array(v)).permute(2, 0, 1) for v in views]))
    with torch.no_grad():
        right = (model(pixels).argmax(1) == torch.tensor(images.labels)).float().mean().item()
    assert result.rows[0]["head_accuracy"] == pytest.approx(right)


def test_zero_shot(folder: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
        text_cfg={"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    ).eval()
    result = sweep(model, [8, 16], data=folder, class_names="blue square,green square,red square")
    assert result.rows[0]["accuracy_by"] == "zero_shot"
    assert set(result.rows[0]) >= {"zero_shot_accuracy", "zero_shot_low", "knn_accuracy", "probe_accuracy"}
    tokens = open_clip.tokenizer.SimpleTokenizer(context_length=16)(
        [f"a photo of a {c} square." for c in sorted(COLOURS)]
    )
    from anypatch.measure.opening import labelled

    images, preprocess = labelled(folder).test, preprocess_of(model)
    views = [preprocess.view(images.load(i), (32, 32)) for i in range(len(images))]
    pixels = preprocess.normalise(torch.stack([torch.from_numpy(np.array(v)).permute(2, 0, 1) for v in views]))
    with torch.no_grad():
        similar = model.encode_image(pixels, normalize=True) @ model.encode_text(tokens, normalize=True).T
    right = (similar.argmax(1) == torch.tensor(images.labels)).float().mean().item()
    assert result.rows[0]["zero_shot_accuracy"] == pytest.approx(right)


def test_zero_shot_with_the_tokenizer_beside_a_transformers_model(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz."
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=32)
    tokenizer.save_pretrained(tmp_path)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "max_position_embeddings": 32, "eos_token_id": len(words) - 1}
    vision = {**small, "image_size": 32, "patch_size": 8}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)

    result = sweep(str(tmp_path), [8, 16], data=folder, class_names="blue square,green square,red square")
    assert [row["accuracy_by"] for row in result.rows] == ["zero_shot", "zero_shot"]
    from anypatch.measure.opening import labelled

    images = labelled(folder).test
    pixels = processor([images.load(i) for i in range(len(images))], return_tensors="pt")["pixel_values"]
    tokens = tokenizer([f"a photo of a {c} square." for c in sorted(COLOURS)], padding=True, return_tensors="pt")
    with torch.no_grad():
        right = model(pixel_values=pixels, **tokens).logits_per_image.argmax(1) == torch.tensor(images.labels)
    assert result.rows[0]["zero_shot_accuracy"] == pytest.approx(right.float().mean().item())
    other = tmp_path / "other"
    model.save_pretrained(other)
    with pytest.raises(DataError, match="the model's tokenizer"):
        sweep(str(other), [8], data=folder, class_names="blue square,green square,red square")


@pytest.mark.parametrize("case", ["transformers", "clip", "torchvision", "swin", "no class token"])
def test_features_of_every_library(case: str) -> None:
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 32, 32)
    if case == "transformers":
        model = transformers_model(head="ForImageClassification", num_labels=4)
        hidden = model.vit(pixel_values=pixels).last_hidden_state
        pooled, patches, logits = hidden[:, 0], hidden[:, 1:], model(pixel_values=pixels).logits
    elif case == "clip":
        transformers = pytest.importorskip("transformers")
        tower = SMALL
        model = transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config=tower, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=12
            )
        ).eval()
        seen = model.vision_model(pixel_values=pixels)
        pooled, patches, logits = model.visual_projection(seen.pooler_output), seen.last_hidden_state[:, 1:], None
    elif case == "torchvision":
        torchvision = pytest.importorskip("torchvision")
        model = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 16, num_classes=4).eval()
        seen = []
        model.encoder.register_forward_hook(lambda m, i, o: seen.append(o))
        logits = model(pixels)
        pooled, patches = seen[0][:, 0], seen[0][:, 1:]
    elif case == "swin":
        model = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2)
        ).eval()
        patches = model.forward_features(pixels)
        pooled, logits = patches.mean((1, 2)), model(pixels)
        patches = patches.flatten(1, 2)
    else:
        model = vit(class_token=False, global_pool="avg")
        patches, logits = model.forward_features(pixels), None
        pooled = model(pixels)
    found = Reader(model)(pixels)
    assert torch.allclose(found.pooled, pooled, atol=1e-5)
    assert torch.allclose(found.patches.flatten(1, 2), patches, atol=1e-5)
    assert found.patches.shape[1] == found.patches.shape[2]
    if logits is None:
        assert found.logits is None
    else:
        assert torch.allclose(found.logits, logits, atol=1e-5)


def test_open_clip_patch_features() -> None:
    open_clip = pytest.importorskip("open_clip")
    model = open_clip.CLIP(
        embed_dim=12,
        vision_cfg={"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
    ).eval()
    pixels = torch.randn(2, 3, 32, 32)
    found = Reader(model)(pixels)
    assert torch.allclose(found.pooled, model.encode_image(pixels), atol=1e-6)
    assert found.patches.shape == (2, 4, 4, 32)
    assert model.visual.output_tokens is False


def test_grids_pool_by_area() -> None:
    assert torch.allclose(area_matrix(4, 2), torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], dtype=torch.float64))
    expected = torch.tensor([[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]], dtype=torch.float64)
    assert torch.allclose(area_matrix(3, 2), expected)
    for old, new in ((16, 14), (37, 8), (5, 5)):
        matrix = area_matrix(old, new)
        assert torch.allclose(matrix.sum(1), torch.ones(new, dtype=torch.float64))
        assert torch.allclose(matrix.sum(0), torch.full((old,), new / old, dtype=torch.float64))
    assert torch.equal(pool_to(torch.ones(1, 6, 9, 2), (4, 3)).round(decimals=5), torch.ones(1, 4, 3, 2))


def test_colours_are_common_to_all_sizes() -> None:
    torch.manual_seed(0)
    two = torch.eye(8)[[0, 5]]
    fine = two[torch.tensor([[0, 0, 1, 1]] * 4)] + 0.01 * torch.randn(4, 4, 8)
    coarse = two[torch.tensor([[0, 1]] * 2)] + 0.01 * torch.randn(2, 2, 8)
    (one,), (other,) = shared_colours([[fine], [coarse]])
    assert one.shape == (4, 4, 3)
    assert one.dtype == np.uint8
    left, right = one[:, :2, 0].mean(), one[:, 2:, 0].mean()
    assert abs(left - right) > 150
    assert abs(other[:, 0, 0].mean() - left) < 30
    assert abs(other[:, 1, 0].mean() - right) < 30


def test_wilson_interval() -> None:
    assert metrics.wilson(8, 10) == pytest.approx((0.8, 0.4901625, 0.9433178), abs=1e-6)
    assert metrics.wilson(0, 10) == pytest.approx((0, 0, 0.2775328), abs=1e-6)
    assert metrics.wilson(10, 10)[2] == 1
    assert math.isnan(metrics.wilson(0, 0)[0])


def test_pareto_front() -> None:
    assert measurements.pareto([1, 2, 3, 4], [0.5, 0.4, 0.9, 0.9]) == [True, False, True, False]
    assert measurements.pareto([1, 1], [0.5, 0.5]) == [True, True]


def test_neighbours() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(60, 8)).astype(np.float32)
    assert metrics.neighbour_agreement(features, features) == 1
    assert metrics.neighbour_agreement(features * 3, features) == 1
    unrelated = generator.normal(size=(60, 8)).astype(np.float32)
    assert metrics.neighbour_agreement(unrelated, features) == pytest.approx(10 / 59, abs=0.06)
    assert math.isnan(metrics.neighbour_agreement(features[:4], features[:4]))


def test_accuracy_of_separable_and_of_random_features() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(300) % 3
    good = np.eye(3)[labels] + 0.05 * generator.normal(size=(300, 3))
    noise = generator.normal(size=(300, 16))
    for measure in (metrics.knn_accuracy, metrics.probe_accuracy):
        assert measure(good[:200], labels[:200], good[200:], labels[200:])[0] == 1
        assert 0.15 < measure(noise[:200], labels[:200], noise[200:], labels[200:])[0] < 0.55


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(tmp_path: Path) -> None:
    """`accelerate launch -m anypatch sweep`, over gloo, against one process."""
    folder = split_folder(tmp_path / "data", 50, 30)
    (folder / "val" / "red" / "broken.png").write_bytes(b"nothing")
    anypatch.save(vit(num_classes=3), tmp_path / "model")
    source = f"timm:local-dir:{tmp_path / 'model'}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"]

    def run(prefix: list[str], sizes: str, output: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *prefix, "anypatch", "sweep", source, "--patch-size", sizes]
        command += ["--data", str(folder), "--output", str(output), "--no-cache", "--workers", "0"]
        command += ["--batch-size", "8"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)

    found = {}
    for name, prefix in (("one", []), ("two", launch)):
        ran = run(prefix, "4,16", tmp_path / name)
        assert ran.returncode == 0, ran.stderr[-3000:]
        assert ran.stdout.count("patch_size\t") == 1  # the table's head, plain in a pipe
        assert ran.stderr.count("cannot be read") == 1
        found[name] = json.loads((tmp_path / name / "sweep.json").read_text())
    assert found["two"]["settings"]["processes"] == 2
    assert found["one"]["notes"] == found["two"]["notes"]
    for one, two in zip(found["one"]["rows"], found["two"]["rows"], strict=True):
        assert untimed(one) == untimed(two)
    wrong = run([], "5,16", tmp_path / "wrong")
    assert wrong.returncode == 2
    said = [line for line in wrong.stderr.splitlines() if not line.startswith("loading ")]  # a slow machine's progress
    assert said[0].startswith("error: patch size 5x5 does not divide")
    assert len(said) == 1
