"""timm: the proof for its families, and independent references where exactness does not hold."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed, resample_abs_pos_embed_nhwc, resample_patch_embed
from torch import Tensor, nn

import anypatch
from anypatch import GeometryError, UnsupportedModelError
from anypatch.proof import check, randomise
from families.timm import families

VIT: dict[str, Any] = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 64}
SWIN: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 2, 2)}
SAM = {**VIT, "img_size": 128, "window_size": 3, "global_attn_indexes": (1,)}
SLOW = {"convmixer", "fasternet", "rdnet", "nest", "sequencer", "mlp_mixer, ResMLP"}
FAMILIES = {family.name: family for family in families()}
PROVED = [name for name, family in FAMILIES.items() if not family.refused and name not in SLOW]
REFUSED = [name for name, family in FAMILIES.items() if family.refused]


def made(name: str, **arguments: Any) -> Any:
    """A model in evaluation mode, every parameter random (timm starts many tables at zero)."""
    model = timm.create_model(name, **arguments).eval()
    with torch.no_grad():
        randomise(model, torch.Generator().manual_seed(1))
    return model


def rebuilt(model: Any, name: str, resampled: dict[str, Tensor], **arguments: Any) -> Any:
    """timm's own model at the new geometry, with the old one's tensors and the resampled ones."""
    reference = timm.create_model(name, **arguments).eval()
    reference.load_state_dict({**model.state_dict(), **resampled})
    return reference


def assert_same_function(adapted: nn.Module, reference: nn.Module, height: int, width: int, tolerance: float) -> None:
    image = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        a, b = adapted(image), reference(image)
    assert b.abs().max() > 0
    assert (a - b).abs().max() <= tolerance * b.abs().max()
    buffers = dict(adapted.named_buffers())
    for key, value in reference.named_buffers():
        assert torch.equal(buffers[key], value), key
    assert {k: v.shape for k, v in adapted.state_dict().items()} == {
        k: v.shape for k, v in reference.state_dict().items()
    }


# -- the proof -------------------------------------------------------------------------------------------------


@pytest.mark.siblings(fast=20)
@pytest.mark.parametrize("name", PROVED)
def test_growing_the_patch_preserves_the_function(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    patch = anypatch.geometry(model).patch_size
    found = check(model, family.patch_size or tuple(2 * side for side in patch))
    assert found.passed, found
    assert found.patch_size != patch


@pytest.mark.parametrize("name", REFUSED)
def test_a_stem_that_is_not_linear_per_patch_is_refused_before_anything_changes(name: str) -> None:
    model = FAMILIES[name].build()
    before = {key: (id(value), value._version) for key, value in model.state_dict(keep_vars=True).items()}
    with pytest.raises(UnsupportedModelError) as caught:
        anypatch.adapt(model, patch_size=32, keep="grid")
    message = str(caught.value)
    assert any(word in message for word in ("convolution", "projection", "patch_embed", "takes no patch_size"))
    assert type(model).__name__ in message or "stages." in message
    after = {key: (id(value), value._version) for key, value in model.state_dict(keep_vars=True).items()}
    assert after == before


def test_a_forgotten_tensor_would_be_seen() -> None:
    """The proof compares what a wrong adaptation would change: here the positions are disturbed afterwards."""
    model = made("vit_tiny_patch16_224", **VIT)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(image)
        model.pos_embed[:, 1:] = model.pos_embed[:, 1:].roll(1, dims=1)
        assert (model(image) - before).abs().max() > 1e-3 * before.abs().max()


# -- independent references ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "image"),
    [((8, 8), (64, 64)), ((32, 32), (64, 64)), ((8, 16), (64, 64)), ((32, 16), (96, 128)), ((12, 20), (96, 100))],
)
def test_vit_agrees_with_timms_own_resampling(patch: tuple[int, int], image: tuple[int, int]) -> None:
    model = made("vit_tiny_patch16_224", **VIT)
    grid = [i // p for i, p in zip(image, patch, strict=True)]
    resampled = {
        "patch_embed.proj.weight": resample_patch_embed(model.patch_embed.proj.weight.detach(), list(patch)),
        "pos_embed": resample_abs_pos_embed(model.pos_embed.detach(), grid, num_prefix_tokens=1),
    }
    arguments = {**VIT, "img_size": image, "patch_size": patch}
    reference = rebuilt(model, "vit_tiny_patch16_224", resampled, **arguments)
    adapted = anypatch.adapt(model, patch_size=patch, image_size=image, kernel="pi")
    assert adapted is model
    assert_same_function(adapted, reference, *image, tolerance=2e-5)
    assert model.patch_embed.grid_size == tuple(grid)
    assert model.patch_embed.img_size == image
    assert tuple(model.patch_embed.patch_size) == patch


@pytest.mark.parametrize("keep", ["image", "grid"])
def test_keep_says_what_follows_the_patch(keep: Any) -> None:
    model = made("vit_tiny_patch16_224", **VIT)
    anypatch.adapt(model, patch_size=32, keep=keep)
    geometry = anypatch.geometry(model)
    assert geometry.patch_size == (32, 32)
    assert (geometry.image_size, geometry.grid) == {
        "image": ((64, 64), (2, 2)),
        "grid": ((128, 128), (4, 4)),
    }[keep]


def test_positions_are_resampled_when_only_the_shape_of_the_grid_changes() -> None:
    model = made("vit_tiny_patch16_224", **{**VIT, "img_size": 96})
    resampled = {"pos_embed": resample_abs_pos_embed(model.pos_embed.detach(), [4, 9], [6, 6], num_prefix_tokens=1)}
    reference = rebuilt(model, "vit_tiny_patch16_224", resampled, **{**VIT, "img_size": (64, 144)})
    anypatch.adapt(model, image_size=(64, 144))
    assert_same_function(model, reference, 64, 144, tolerance=2e-5)


def relative_table(table: Tensor, old: tuple[int, int], new: tuple[int, int], extra: int = 0) -> Tensor:
    """Bicubic resize of a (offsets, heads) table over a window, entries of the class token kept."""
    rows = table[: table.shape[0] - extra]
    maps = rows.T.reshape(1, -1, 2 * old[0] - 1, 2 * old[1] - 1)
    size = (2 * new[0] - 1, 2 * new[1] - 1)
    maps = F.interpolate(maps, size=size, mode="bicubic", antialias=True)
    return torch.cat([maps.reshape(rows.shape[1], -1).T, table[table.shape[0] - extra :]])


@pytest.mark.parametrize("image", [(96, 96), (48, 80)])
def test_beit_relative_tables(image: tuple[int, int]) -> None:
    model = made("beit_base_patch16_224", **VIT)
    grid = tuple(side // 16 for side in image)
    resampled = {
        key: relative_table(value, (4, 4), grid, extra=3)  # type: ignore[arg-type]
        for key, value in model.state_dict().items()
        if key.endswith("relative_position_bias_table")
    }
    assert len(resampled) == 2
    reference = rebuilt(model, "beit_base_patch16_224", resampled, **{**VIT, "img_size": image})
    anypatch.adapt(model, image_size=image)
    assert_same_function(model, reference, *image, tolerance=2e-5)


def test_swin_windows_that_shrink_with_the_grid() -> None:
    name = "swin_tiny_patch4_window7_224"
    model = made(name, **SWIN)
    arguments = {**SWIN, "patch_size": 8, "img_size": 224}
    sizes = {k: v.shape for k, v in timm.create_model(name, **arguments).state_dict().items()}
    resampled = {"patch_embed.proj.weight": resample_patch_embed(model.patch_embed.proj.weight.detach(), [8, 8])}
    for key, value in model.state_dict().items():
        if key.endswith("relative_position_bias_table") and value.shape != sizes[key]:
            side = (int(sizes[key][0] ** 0.5) + 1) // 2
            resampled[key] = relative_table(value, (7, 7), (side, side))
    assert len(resampled) > 1
    reference = rebuilt(model, name, resampled, **arguments)
    anypatch.adapt(model, patch_size=8, kernel="pi")
    assert_same_function(model, reference, 224, 224, tolerance=2e-5)
    assert [info["reduction"] for info in model.feature_info] == [8, 16, 32, 64]


def test_relpos_tables() -> None:
    name, arguments = "vit_relpos_small_patch16_224", {**VIT, "rel_pos_type": "bias"}
    model = made(name, **arguments)
    tables = [key for key in model.state_dict() if key.endswith("relative_position_bias_table")]
    assert tables
    resampled = {key: relative_table(model.state_dict()[key], (4, 4), (6, 5)) for key in tables}
    reference = rebuilt(model, name, resampled, **{**arguments, "img_size": (96, 80)})
    anypatch.adapt(model, image_size=(96, 80))
    assert_same_function(model, reference, 96, 80, tolerance=2e-5)


def test_relpos_mlp_follows_the_grid_through_its_buffers() -> None:
    name = "vit_relpos_small_patch16_224"
    model = made(name, **VIT)
    reference = rebuilt(model, name, {}, **{**VIT, "img_size": (96, 48)})
    anypatch.adapt(model, image_size=(96, 48))
    assert_same_function(model, reference, 96, 48, tolerance=1e-6)


def test_sam_decomposed_relative_positions() -> None:
    name = "samvit_base_patch16"
    model = made(name, **SAM)
    image = (192, 96)
    resampled = {"pos_embed": resample_abs_pos_embed_nhwc(model.pos_embed.detach(), [12, 6])}
    for axis, new in (("h", 12), ("w", 6)):
        key = f"blocks.1.attn.rel_pos_{axis}"
        rows = model.state_dict()[key].T[None]
        resampled[key] = F.interpolate(rows, size=2 * new - 1, mode="linear")[0].T
    reference = rebuilt(model, name, resampled, **{**SAM, "img_size": image})
    anypatch.adapt(model, image_size=image)
    assert_same_function(model, reference, *image, tolerance=2e-5)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("eva02_tiny_patch14_224", 1), ("vit_small_patch16_dinov3", None), ("vit_pe_core_tiny_patch16_384", 1)],
)
def test_rotary_tables(name: str, prefix: int | None) -> None:
    side = 14 if "14" in name else 16
    arguments = {**VIT, "img_size": 4 * side}
    model = made(name, **arguments)
    image, patch = (6 * 20, 3 * 12), (20, 12)
    resampled = {"patch_embed.proj.weight": resample_patch_embed(model.patch_embed.proj.weight.detach(), [20, 12])}
    if prefix is not None:
        resampled["pos_embed"] = resample_abs_pos_embed(model.pos_embed.detach(), [6, 3], num_prefix_tokens=prefix)
    reference = rebuilt(model, name, resampled, **{**arguments, "img_size": image, "patch_size": patch})
    anypatch.adapt(model, patch_size=patch, image_size=image, kernel="pi")
    assert_same_function(model, reference, *image, tolerance=2e-5)


@pytest.mark.parametrize(("name", "channels_first"), [("naflexvit_base_patch16_gap", False), ("gemma4_vit_167m", True)])
def test_linear_embeddings_agree_with_the_kernel_they_are(name: str, channels_first: bool) -> None:
    extra = {"position_embedding_size": 64} if channels_first else {}
    model = made(name, **VIT, **extra)
    key = "encoder.patch_embed.input_proj.weight" if channels_first else "embeds.proj.weight"
    rows = model.state_dict()[key]
    if channels_first:
        kernel = rows.reshape(-1, 3, 16, 16)
        flat = resample_patch_embed(kernel, [24, 12]).flatten(1)
    else:
        kernel = rows.reshape(-1, 16, 16, 3).permute(0, 3, 1, 2)
        flat = resample_patch_embed(kernel, [24, 12]).permute(0, 2, 3, 1).flatten(1)
    arguments = {**VIT, **extra, "img_size": (96, 48), "patch_size": (24, 12)}
    resampled = {key: flat}
    assert model.state_dict()[key].shape != flat.shape
    reference = rebuilt(model, name, resampled, **arguments)
    anypatch.adapt(model, patch_size=(24, 12), image_size=(96, 48), kernel="pi")
    assert_same_function(model, reference, 96, 48, tolerance=2e-5)


@pytest.mark.slow
def test_volo_changes_what_is_linear_after_its_convolutions(tmp_path: Path) -> None:
    volo = made("volo_d1_224", img_size=64)
    assert check(volo, 16).passed
    before = {name: tensor.clone() for name, tensor in volo.state_dict().items()}
    anypatch.adapt(volo, 16, kernel="pi", keep="grid")
    assert anypatch.geometry(volo).image_size == (128, 128)
    wanted = resample_patch_embed(before.pop("patch_embed.proj.weight"), [8, 8])
    torch.testing.assert_close(volo.patch_embed.proj.weight, wanted, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(volo.state_dict()[name], tensor) for name, tensor in before.items())
    anypatch.save(volo, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = torch.randn(1, 3, 128, 128)
    assert torch.equal(again(pixels), volo(pixels))
    for patch in (12, (8, 16)):
        with pytest.raises(GeometryError, match="4, 8 or 16"):
            anypatch.adapt(volo, patch, keep="grid")


def test_volo_and_xcit_change_their_image_size() -> None:
    volo = made("volo_d1_224", img_size=64)
    resampled = {"pos_embed": resample_abs_pos_embed_nhwc(volo.pos_embed.detach(), [6, 6])}
    reference = rebuilt(volo, "volo_d1_224", resampled, img_size=96)
    anypatch.adapt(volo, image_size=96)
    assert_same_function(volo, reference, 96, 96, tolerance=2e-5)
    xcit = made("xcit_nano_12_p8_224", depth=1, img_size=64)
    anypatch.adapt(xcit, image_size=(96, 80))
    assert anypatch.geometry(xcit).grid == (12, 10)


def test_hybrid_changes_image_and_patch_behind_its_backbone() -> None:
    name, arguments = "vit_tiny_r_s16_p8_224", {"depth": 1, "embed_dim": 64, "num_heads": 2, "img_size": 64}
    model = made(name, **arguments)
    assert anypatch.geometry(model).patch_size == (32, 32)  # a stem of stride 4, then 8x8
    with pytest.raises(GeometryError, match="multiple of the backbone's stride"):
        anypatch.adapt(model, patch_size=30, keep="grid")
    resampled = {
        "patch_embed.proj.weight": resample_patch_embed(model.patch_embed.proj.weight.detach(), [4, 4]),
        "pos_embed": resample_abs_pos_embed(model.pos_embed.detach(), [6, 6], num_prefix_tokens=1),
    }
    reference = rebuilt(model, name, resampled, **{**arguments, "img_size": 96, "patch_size": 4})
    anypatch.adapt(model, patch_size=16, image_size=96, kernel="pi")
    assert_same_function(model, reference, 96, 96, tolerance=2e-5)


def test_crossvit_scales_both_branches() -> None:
    model = made("crossvit_tiny_240")
    with pytest.raises(GeometryError, match="multiple of 3"):
        anypatch.adapt(model, patch_size=16, keep="grid")
    with pytest.raises(GeometryError, match="branch 1"):
        anypatch.adapt(model, image_size=252)
    resampled = {
        f"patch_embed.{i}.proj.weight": resample_patch_embed(model.patch_embed[i].proj.weight.detach(), [side, side])
        for i, side in ((0, 24), (1, 32))
    }
    for i, grid in ((0, 10), (1, 7)):
        table = model.state_dict()[f"pos_embed_{i}"]
        resampled[f"pos_embed_{i}"] = resample_abs_pos_embed(table, [grid, grid], num_prefix_tokens=1)
    reference = rebuilt(model, "crossvit_tiny_240", resampled, patch_size=(24, 32))
    anypatch.adapt(model, patch_size=24, kernel="pi")
    assert_same_function(model, reference, 240, 240, tolerance=2e-5)


def test_pit_keeps_the_ratio_of_kernel_and_stride() -> None:
    model = made("pit_ti_224", depth=(1, 1, 1), img_size=64)
    geometry = anypatch.geometry(model)
    assert (geometry.patch_size, geometry.kernel_size, geometry.grid) == ((8, 8), (16, 16), (7, 7))
    anypatch.adapt(model, patch_size=4)
    assert (model.patch_embed.conv.kernel_size, model.patch_embed.conv.stride) == ((8, 8), (4, 4))
    assert model.pos_embed.shape[-2:] == (15, 15)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_tnt_takes_whole_multiples_of_its_own_patch_and_comes_back() -> None:
    model = made("tnt_s_patch16_224", depth=1, img_size=64)
    image = torch.randn(1, 3, 64, 64)
    before = model(image).detach()
    with pytest.raises(GeometryError, match="whole factors"):
        anypatch.adapt(model, patch_size=24, keep="grid")
    anypatch.adapt(model, patch_size=(32, 48), keep="grid", kernel="pi")
    assert model.pixel_embed.proj.kernel_size == (14, 21)
    assert anypatch.geometry(model).image_size == (128, 192)
    anypatch.adapt(model, patch_size=16, keep="grid", kernel="pi")
    assert model.pixel_embed.proj.kernel_size == (7, 7)
    assert torch.isfinite(before).all()
    assert model(image).shape == before.shape


def test_token_mixers_keep_their_grid() -> None:
    model = made("mixer_s32_224", img_size=64)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(GeometryError, match='keep="grid"'):
        anypatch.adapt(model, patch_size=16)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_convit_keeps_a_square_grid() -> None:
    model = made("convit_tiny", **VIT, local_up_to_layer=1)
    with pytest.raises(GeometryError, match="square grids only"):
        anypatch.adapt(model, image_size=(64, 128))
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    anypatch.adapt(model, patch_size=(16, 32), image_size=(64, 128))
    assert model(torch.randn(1, 3, 64, 128)).shape == (1, 1000)


@pytest.mark.siblings(fast=18)
@pytest.mark.parametrize("name", [name for name in PROVED if "mlp_mixer" not in name and name != "convit"])
def test_another_shape_of_grid_is_what_timm_builds_there(name: str) -> None:
    """A model adapted to a wide image computes what timm's own model does with the adapted tensors."""
    model: Any = FAMILIES[name].build().eval()
    with torch.no_grad():
        randomise(model, torch.Generator().manual_seed(1))
    height, width = anypatch.geometry(model).image_size or (0, 0)
    anypatch.adapt(model, image_size=(height, 2 * width))
    reference = rebuilt(model, model.pretrained_cfg["architecture"], {}, **model._model_args)
    assert_same_function(model, reference, height, 2 * width, tolerance=1e-6)


# -- how the model was made ------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "num_classes": {"num_classes": 0},
    "in_chans": {"in_chans": 1},
    "class_token": {"class_token": False, "global_pool": "avg"},
    "reg_tokens": {"reg_tokens": 4},
    "dynamic_img_size": {"dynamic_img_size": True},
    "dynamic_img_pad": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "img_size": {"img_size": (48, 80)},
    "patch_size": {"patch_size": 8},
    "patch_drop_rate": {"patch_drop_rate": 0.5},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 2},
    "drop_rates": {"drop_rate": 0.1, "drop_path_rate": 0.1},
    "map pool": {"global_pool": "map", "class_token": False},
    "embed_norm": {"pre_norm": True},
    "features_only": {"features_only": True, "depth": 3},
    "features_only, indices": {"features_only": True, "out_indices": (1,)},
}


@pytest.mark.siblings(fast=7)
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_constructor(option: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **{**VIT, **OPTIONS[option]})
    patch = anypatch.geometry(model).patch_size
    target = (2 * patch[0], 3 * patch[1])
    assert check(model, target).passed
    before = list(model.parameters())
    anypatch.adapt(model, patch_size=target, keep="grid")
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert anypatch.geometry(model).patch_size == target


@pytest.mark.siblings(fast=3)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": 56}),
        ("swinv2_tiny_window8_256", {**SWIN, "img_size": 64}),
        ("beit_base_patch16_224", {**VIT, "out_indices": (0, 1)}),
        ("eva02_tiny_patch14_224", {**VIT, "img_size": 56, "out_indices": (1,)}),
        ("samvit_base_patch16", {**SAM, "out_indices": (0, 1)}),
        ("pit_ti_224", {"depth": (1, 1, 1), "img_size": 64}),
    ],
)
def test_feature_extractors(name: str, arguments: dict[str, Any]) -> None:
    model = timm.create_model(name, features_only=True, **arguments)
    reductions = model.feature_info.reduction()
    patch = anypatch.geometry(model).patch_size
    assert check(model, tuple(2 * side for side in patch)).passed
    anypatch.adapt(model, patch_size=tuple(2 * side for side in patch), keep="grid")
    assert model.feature_info.reduction() == [2 * reduction for reduction in reductions]


def test_a_model_that_was_resized_and_given_a_new_head() -> None:
    model = made("vit_tiny_patch16_224", **VIT)
    model.set_input_size(img_size=(96, 80))
    model.reset_classifier(7)
    geometry = anypatch.geometry(model)
    assert (geometry.image_size, geometry.grid) == ((96, 80), (6, 5))
    assert check(model, 32).passed
    anypatch.adapt(model, patch_size=32, keep="grid")
    assert model(torch.randn(1, 3, 192, 160)).shape == (1, 7)
    model.reset_classifier(0, "")
    assert check(model, 48).passed


def test_set_input_size_with_a_patch_size() -> None:
    model = made("vit_tiny_patch16_224", **VIT)
    model.set_input_size(img_size=64, patch_size=8)
    assert anypatch.geometry(model).grid == (8, 8)
    assert check(model, (12, 16)).passed


def test_a_dynamic_model_stays_dynamic() -> None:
    model = made("vit_tiny_patch16_224", **VIT, dynamic_img_size=True)
    anypatch.adapt(model, patch_size=8)
    assert model(torch.randn(1, 3, 48, 96)).shape == (1, 1000)


def test_what_timm_keeps_about_the_input_follows() -> None:
    model = made("vit_tiny_patch16_224", **VIT)
    anypatch.adapt(model, patch_size=32, image_size=(128, 96))
    assert resolve_model_data_config(model)["input_size"] == (3, 128, 96)
    assert model.pretrained_cfg["input_size"] == (3, 128, 96)
    assert model.default_cfg is model.pretrained_cfg
    assert {info["reduction"] for info in model.feature_info} == {32}
    untouched = timm.create_model("vit_tiny_patch16_224", **VIT)
    assert untouched.pretrained_cfg["input_size"] == (3, 224, 224)


def test_without_a_patch_embedding_the_reason_is_said() -> None:
    for name in ("resnet18", "efficientnet_b0"):
        with pytest.raises(UnsupportedModelError, match="overlapping convolution"):
            anypatch.geometry(timm.create_model(name))


# -- saved in timm's own format --------------------------------------------------------------------------------

SAVED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rectangle": ("vit_tiny_patch16_224", VIT, {"patch_size": (8, 32), "image_size": (64, 96)}),
    "head": ("vit_tiny_patch16_224", {**VIT, "num_classes": 5, "reg_tokens": 2}, {"patch_size": 32}),
    "image": ("vit_small_patch16_dinov3", VIT, {"image_size": (64, 96)}),
    "beit": ("beit_base_patch16_224", VIT, {"patch_size": 8}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, {"patch_size": 8}),
    "sam": ("samvit_base_patch16", SAM, {"patch_size": 32}),
    "naflex": ("naflexvit_base_patch16_gap", VIT, {"patch_size": 32}),
    "pit": ("pit_ti_224", {"depth": (1, 1, 1), "img_size": 64}, {"patch_size": 4}),
}

LOADER = """
import sys, json, torch, timm
sys.modules["anypatch"] = None
try:
    import anypatch
except ImportError:
    pass
else:
    raise SystemExit("anypatch can be imported")
torch.set_num_threads(1)
for directory in sys.argv[1:]:
    model = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
    data = torch.load(f"{directory}/data.pt")
    with torch.no_grad():
        found = model(data["image"])
    torch.testing.assert_close(found, data["output"], rtol=1e-6, atol=1e-6)
    size = timm.data.resolve_model_data_config(model)["input_size"]
    assert tuple(size) == (3, *data["image"].shape[-2:]), size
print("loaded", len(sys.argv) - 1)
"""


@pytest.mark.slow
def test_saved_models_load_where_anypatch_is_not_installed(tmp_path: Path) -> None:
    for label, (name, arguments, target) in SAVED.items():
        model = made(name, **arguments)
        anypatch.adapt(model, **target)
        if label == "head":
            model.reset_classifier(7)
        directory = tmp_path / label
        anypatch.save(model, directory)
        image = torch.randn(1, 3, *anypatch.geometry(model).image_size)
        with torch.no_grad():
            torch.save({"image": image, "output": model(image)}, directory / "data.pt")
    directories = [str(tmp_path / label) for label in SAVED]
    done = subprocess.run([sys.executable, "-c", LOADER, *directories], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"loaded {len(SAVED)}"
    config = json.loads((tmp_path / "rectangle" / "config.json").read_text())
    assert config["model_args"]["patch_size"] == [8, 32]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("tnt_s_patch16_224", {"depth": 1, "img_size": 64}), ("mixer_s32_224", {"img_size": 64})],
)
def test_what_timm_could_not_rebuild_is_not_saved(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    model = made(name, **arguments)
    anypatch.adapt(model, patch_size=64, keep="grid")
    with pytest.raises(UnsupportedModelError, match="state_dict"):
        anypatch.save(model, tmp_path / "model")
    assert not list(tmp_path.glob("model/*"))


# -- models that timm did not record ---------------------------------------------------------------------------


def unrecorded(name: str, **arguments: Any) -> Any:
    """A model as older timm makes it: nothing says which arguments it was made with."""
    model = made(name, **arguments)
    del model._model_args
    return model


@pytest.mark.siblings(fast=1)
@pytest.mark.parametrize("arguments", [{}, {"img_size": 64, "patch_size": 8}, {"in_chans": 1, "num_classes": 3}])
def test_geometry_is_read_off_an_unrecorded_model(arguments: dict[str, Any], tmp_path: Path) -> None:
    model = unrecorded("vit_tiny_patch16_224", **arguments)
    patch = anypatch.geometry(model).patch_size[0]
    assert check(model, (2 * patch, 3 * patch)).passed
    del model  # checked on a copy; now saved without a record
    model = unrecorded("vit_tiny_patch16_224", **arguments)
    anypatch.save(model, tmp_path / "model")
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert again.patch_embed.patch_size == (patch, patch)


def test_an_unrecorded_model_with_unknown_arguments_is_refused() -> None:
    for arguments in ({"depth": 2}, {"class_token": False, "global_pool": "avg"}, {"features_only": True}):
        model = unrecorded("vit_tiny_patch16_224", **arguments)
        with pytest.raises(UnsupportedModelError, match="did not record"):
            anypatch.adapt(model, patch_size=32)


def test_a_model_without_its_projection_is_refused() -> None:
    model = made("vit_tiny_patch16_224", **VIT)
    plan_for = copy.deepcopy(model)
    projection = model.patch_embed.proj
    model.patch_embed.proj = nn.Sequential(projection)
    model._traits = {**model._traits, "first_conv": "patch_embed.proj.0"}
    with pytest.raises(UnsupportedModelError):
        anypatch.adapt(model, patch_size=32)
    assert projection.weight.shape == plan_for.patch_embed.proj.weight.shape
