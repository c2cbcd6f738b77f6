"""torchvision's ViT and Swin: exactness, independent references, save without anypatch."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anypatch
from builders import vit as timm_vit

pytest.importorskip("torchvision")
from torchvision.models import resnet18, swin_transformer
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer


def vit(patch: int = 8, image: int = 32, **kwargs) -> VisionTransformer:
    model = VisionTransformer(image, patch, 2, 2, 32, 48, num_classes=5, **kwargs)
    nn.init.normal_(model.heads.head.weight, std=0.1)
    nn.init.normal_(model.class_token)
    return model.eval()


def swin(version: int, patch: tuple[int, int] = (4, 4), window: tuple[int, int] = (3, 4)) -> SwinTransformer:
    block, merging = (SwinTransformerBlock, PatchMerging) if version == 1 else (SwinTransformerBlockV2, PatchMergingV2)
    model = SwinTransformer(
        list(patch), 16, [2, 1], [2, 4], list(window), 2.0, num_classes=5, block=block, downsample_layer=merging
    )
    return model.eval()


def test_geometry_of_vit_and_swin():
    got = anypatch.geometry(vit())
    assert (got.patch_size, got.image_size, got.grid, got.prefix_tokens) == ((8, 8), (32, 32), (4, 4), 1)
    assert got.library == "torchvision"
    got = anypatch.geometry(swin(1, (4, 6)))
    assert (got.patch_size, got.image_size, got.prefix_tokens) == ((4, 6), None, 0)


@pytest.mark.parametrize("patch", [9, 12, 16])
def test_vit_is_exact_when_the_patch_grows(patch):
    assert anypatch.check(vit(), patch).error < 1e-4


def test_vit_with_representation_layer_and_other_head_is_exact():
    assert anypatch.check(vit(representation_size=24), 12).error < 1e-4
    model = vit()
    model.heads = nn.Linear(32, 3)
    assert anypatch.check(model, 12).error < 1e-4


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("patch", [6, (4, 7), (8, 5)])
def test_swin_is_exact_when_the_patch_grows(version, patch):
    assert anypatch.check(swin(version), patch).error < 1e-4


def test_exactness_is_not_vacuous():
    """The proof must fail for a model whose positions the adaptation damages."""

    class Damaged(VisionTransformer):
        def forward(self, x):
            x = super().forward(x)
            return x * self.patch_size

    model = Damaged(32, 8, 2, 2, 32, 48, num_classes=5)
    assert anypatch.check(model, 12).error > 0.1


@pytest.mark.parametrize(("patch", "image"), [(4, 32), (16, 32), (8, 48), (4, 24), (12, 36)])
def test_vit_at_another_grid_equals_one_built_there(patch, image):
    model = vit()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    anypatch.adapt(model, patch, image, kernel="bicubic")

    reference = vit(patch, image)
    side = image // patch
    table = state["encoder.pos_embedding"]
    grid = table[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    state["encoder.pos_embedding"] = torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1)
    kernel = state["conv_proj.weight"]
    if patch != 8:
        kernel = F.interpolate(kernel, size=(patch, patch), mode="bicubic", antialias=True) * (8 / patch) ** 2
    state["conv_proj.weight"] = kernel
    reference.load_state_dict(state)

    x = torch.randn(2, 3, image, image)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-4)
    assert (model.image_size, model.patch_size, model.seq_length) == (image, patch, side * side + 1)
    assert model.conv_proj.stride == (patch, patch)


def test_swin_patch_shrinks_to_one_built_there():
    model = swin(2)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    anypatch.adapt(model, (2, 3), kernel="bicubic")
    reference = swin(2, (2, 3))
    key = "features.0.0.weight"
    state[key] = F.interpolate(state[key], size=(2, 3), mode="bicubic", antialias=True) * (16 / 6)
    reference.load_state_dict(state)
    x = torch.randn(1, 3, 20, 30)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-4)


def timm_swin() -> nn.Module:
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", **options).eval()


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("torchvision", {"patch_size": 8, "keep": "grid"}),
        ("torchvision", {"patch_size": 2}),
        ("timm", {"patch_size": 8, "keep": "grid"}),
    ],
)
def test_a_getter_of_layers_is_adapted_as_the_model_is(name: str, sizes: dict[str, Any]) -> None:
    """It was refused as a model of torchvision's without patches; timm's, at patches as large as its windows, failed
    afterwards: ``window_area`` was taken for the pixels of a patch."""
    from torchvision.models._utils import IntermediateLayerGetter

    model, layers = (swin(1, window=(4, 4)), "features") if name == "torchvision" else (timm_swin(), "layers")
    getter = IntermediateLayerGetter(copy.deepcopy(model), {layers: "map"})
    pixels = torch.rand(1, 3, *([64, 64] if "keep" in sizes else [32, 32]))
    expected = IntermediateLayerGetter(anypatch.adapt(model, **sizes), {layers: "map"})(pixels)["map"]
    torch.testing.assert_close(anypatch.adapt(getter, **sizes)(pixels)["map"], expected, rtol=0, atol=0)


def test_a_feature_extractor_is_made_after_adapting() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    with pytest.raises(anypatch.UnsupportedModelError, match="adapt the model before tracing"):
        anypatch.adapt(create_feature_extractor(vit(), {"encoder": "tokens"}), 16)
    traced = create_feature_extractor(anypatch.adapt(vit(), 16, keep="grid"), {"encoder": "tokens"})
    assert traced(torch.rand(1, 3, 64, 64))["tokens"].shape == (1, 17, 32)


def test_rectangles_are_refused_for_vit_and_leave_it_alone():
    model = vit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(anypatch.GeometryError, match="square"):
        anypatch.adapt(model, (8, 16))
    with pytest.raises(anypatch.GeometryError, match="square"):
        anypatch.adapt(model, image_size=(32, 64))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_convolutional_stem_and_resnet_are_refused():
    stem = [ConvStemConfig(8, 3, 2), ConvStemConfig(8, 3, 2)]
    with pytest.raises(anypatch.UnsupportedModelError, match="conv_proj"):
        anypatch.geometry(vit(4, conv_stem_configs=stem))
    with pytest.raises(anypatch.UnsupportedModelError, match="no patch embedding"):
        anypatch.geometry(resnet18())


LOADER = """
import sys
sys.modules["anypatch"] = None
import importlib, json, torch, safetensors.torch
torch.set_num_threads(1)
for directory in sys.argv[1:]:
    config = json.load(open(f"{directory}/torchvision.json"))
    module = importlib.import_module(config["module"])
    classes = {k: getattr(module, v) for k, v in config["classes"].items()}
    model = getattr(module, config["class"])(**config["arguments"], **classes)
    model.load_state_dict(safetensors.torch.load_file(f"{directory}/model.safetensors"))
    x, y = torch.load(f"{directory}/io.pt")
    assert torch.equal(model.eval()(x), y)
"""


@pytest.mark.slow
def test_saved_models_load_without_anypatch(tmp_path: Path):
    directories = []
    for name, model, patch in (("vit", vit(representation_size=24), 4), ("v1", swin(1), 8), ("v2", swin(2), (3, 5))):
        directory = tmp_path / name
        anypatch.adapt(model, patch)
        anypatch.save(model, directory)
        x = torch.randn(1, 3, 32, 32)
        y = model(x).detach()
        torch.save((x, y), directory / "io.pt")
        assert torch.equal(anypatch.load(str(directory)).eval()(x), y)
        assert torch.equal(anypatch.load(f"torchvision:{directory}").eval()(x), y)
        directories.append(str(directory))
    subprocess.run([sys.executable, "-c", LOADER, *directories], check=True)


def test_save_refuses_what_arguments_cannot_rebuild(tmp_path):
    model = vit()
    model.heads = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 3))
    with pytest.raises(anypatch.UnsupportedModelError, match="heads"):
        anypatch.save(model, tmp_path)
    model = VisionTransformer(32, 8, 1, 2, 32, 48, norm_layer=nn.LayerNorm)
    with pytest.raises(anypatch.UnsupportedModelError, match="norm_layer"):
        anypatch.save(model, tmp_path)


def test_load_by_name_takes_the_hosts_arguments():
    model = anypatch.load("torchvision:swin_t", 8, weights=None, num_classes=3)
    assert type(model) is swin_transformer.SwinTransformer
    assert model.features[0][0].kernel_size == (8, 8)
    assert model.head.out_features == 3
    with pytest.raises(anypatch.CheckpointError, match="no weights"):
        anypatch.load("torchvision:swin_t/NO_SUCH")


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = timm_vit()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = self.vit.forward_features(x)[:, 1:]
        return {"out": tokens.mT.unflatten(2, (math.isqrt(tokens.shape[1]), -1))}


@pytest.mark.parametrize("sizes", [{"patch_size": 16, "keep": "grid"}, {"image_size": 64}])
def test_a_segmenter_around_somebodys_backbone_is_adapted_with_it(sizes: dict[str, Any]) -> None:
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    model, alone = FCN(Backbone(), FCNHead(24, 3)).eval(), Backbone().eval()
    head, x = copy.deepcopy(model.classifier), torch.rand(1, 3, 64, 64)
    anypatch.adapt(alone.vit, **sizes)
    with torch.no_grad():
        expected = F.interpolate(head(alone(x)["out"]), (64, 64), mode="bilinear")
        torch.testing.assert_close(anypatch.adapt(model, **sizes)(x)["out"], expected)
