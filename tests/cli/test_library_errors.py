"""`load`: what a source is taken for, random weights on request only, and the libraries' errors as ours."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import anypatch
from anypatch import AnypatchError, CheckpointError, UnsupportedModelError
from anypatch.hosts import library, loading


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("missing", UnsupportedModelError, "'missing' does not exist"),
        ("vit_tiny_patch16_224", UnsupportedModelError, r"does not exist.*did you mean timm:vit_tiny_patch16_224\?"),
        ("vit_small_patch14_dinov2.lvd142m", UnsupportedModelError, r"timm:vit_small_patch14_dinov2.lvd142m\?"),
        ("vit_tinny_patch16_224", UnsupportedModelError, "did you mean timm:vit_tiny_patch16_224"),
        ("facebook/dinov2-base", UnsupportedModelError, r"did you mean transformers:facebook/dinov2-base\?"),
        ("ViT-B-32/openai", UnsupportedModelError, r"did you mean open_clip:ViT-B-32/openai\?"),
        ("vit_b_16", UnsupportedModelError, r"did you mean torchvision:vit_b_16\?"),
        ("tim:vit_tiny", UnsupportedModelError, r"unknown prefix 'tim': did you mean timm:vit_tiny\?"),
        ("open-clip:ViT-B-32/openai", UnsupportedModelError, r"did you mean open_clip:ViT-B-32/openai\?"),
        ("timm:", UnsupportedModelError, "names no model"),
        ("./nowhere", CheckpointError, "does not exist"),
        ("/nowhere/at/all", CheckpointError, "does not exist"),
        ("nowhere.pth", CheckpointError, "does not exist"),
    ],
)
def test_what_is_no_source_says_so_and_what_was_meant(source: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        anypatch.load(source)


def test_a_library_that_is_not_installed_is_not_asked_for_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("timm", "open_clip", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedModelError, match="'vit_b_16' does not exist"):
        anypatch.load("vit_b_16")
    with pytest.raises(UnsupportedModelError, match=r"pip install 'anypatch\[open-clip\]'"):
        anypatch.load("open_clip:ViT-B-32/openai")


# -- random weights are asked for --------------------------------------------------------------------------------


def test_open_clip_without_a_tag_lists_the_tags() -> None:
    with pytest.raises(CheckpointError, match=r"open_clip:ViT-B-32/TAG: openai, .*datacomp_xl.*pretrained=False"):
        anypatch.load("open_clip:ViT-B-32")


def test_timm_and_torchvision_without_weights_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="pretrained=False"):
        anypatch.load("timm:test_vit4")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", _unreachable)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", _unreachable)
    with pytest.raises(CheckpointError, match=r"torchvision cannot load swin_t: .*urlopen error.*pretrained=False"):
        anypatch.load("torchvision:swin_t")


def _unreachable(*arguments: Any, **options: Any) -> Any:
    raise OSError("<urlopen error [Errno -2] Name or service not known>")


@pytest.fixture
def dinov2(tmp_path: Path) -> Path:
    """A directory with a configuration and no weights."""
    config = {"model_type": "dinov2", "architectures": ["Dinov2Model"], "hidden_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_every_library_builds_without_weights(dinov2: Path, tmp_path: Path) -> None:
    built: dict[str, nn.Module] = {
        "timm": anypatch.load("timm:test_vit", 8, pretrained=False),
        "transformers": anypatch.load(f"transformers:{dinov2}", 7, pretrained=False),
        "torchvision": anypatch.load("torchvision:swin_t", 8, pretrained=False),
    }
    for name, model in built.items():
        assert anypatch.geometry(model).library == name
        assert all(p.isfinite().all() for p in model.parameters())
    assert type(built["transformers"]).__name__ == "Dinov2Model"
    assert not built["transformers"].training  # as `from_pretrained` leaves it


def test_open_clip_builds_without_weights() -> None:
    model = anypatch.load("open_clip:ViT-B-32/openai", pretrained=False, vision_cfg=SMALL, text_cfg=SMALL_TEXT)
    assert anypatch.geometry(model).library == "open_clip"


SMALL = {"image_size": 64, "layers": 1, "width": 64, "patch_size": 32}
SMALL_TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}


def test_a_saved_directory_builds_without_reading_its_weights(tmp_path: Path) -> None:
    model = torchvision.models.VisionTransformer(32, 16, 1, 1, 16, 16, num_classes=3)
    anypatch.save(model, tmp_path / "tv")
    anypatch.save(timm.create_model("test_vit", pretrained=False), tmp_path / "timm")
    for folder in ("tv", "timm"):
        (tmp_path / folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError):
            anypatch.load(tmp_path / folder)
        assert anypatch.geometry(anypatch.load(tmp_path / folder, pretrained=False)).image_size


def test_diffusers_builds_without_weights(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    import diffusers

    model = diffusers.UNet2DModel(
        8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    model.save_config(str(tmp_path))
    built = library("diffusers").build(str(tmp_path))
    assert type(built) is diffusers.UNet2DModel
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_pretrained_may_be_said_as_it_is(dinov2: Path) -> None:
    kept = anypatch.load(f"transformers:{dinov2}", pretrained=False)
    kept.save_pretrained(str(dinov2))  # type: ignore[operator]
    again = anypatch.load(f"transformers:{dinov2}", pretrained=True)
    for one, other in zip(kept.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_file_of_weights_is_not_built_without(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="leave out pretrained"):
        anypatch.load(tmp_path / "x.pth", pretrained=False)


# -- the libraries' errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: anypatch.load("timm:test_vit", depht=1, pretrained=False), UnsupportedModelError, "'depht'"),
        (lambda: anypatch.load("torchvision:vit_b_16", weights=None, depht=1), UnsupportedModelError, "'depht'"),
        (lambda: anypatch.load("timm:vit_tiny_patch16_224.no_tag"), CheckpointError, "no_tag"),
        (lambda: anypatch.load("transformers:/nowhere"), CheckpointError, "/nowhere"),
        (lambda: anypatch.load("diffusers:/nowhere"), CheckpointError, "/nowhere"),
        (lambda: anypatch.load("hub:/nowhere:model"), CheckpointError, "/nowhere"),
        (lambda: anypatch.load("torchvision:vit_b_16/NO_SUCH"), CheckpointError, "NO_SUCH"),
        (lambda: anypatch.load("open_clip:ViT-B-32/no_such_tag"), CheckpointError, "no_such_tag"),
        (
            lambda: anypatch.load("open_clip:ViT-B-32", pretrained=False, device="quantum", vision_cfg=SMALL),
            CheckpointError,
            "quantum.*such as cpu",
        ),
    ],
)
def test_what_a_library_refuses_is_one_of_ours_with_its_cause(
    call: Callable[[], Any], kind: type[AnypatchError], message: str
) -> None:
    if "diffusers" in call.__code__.co_consts and not importlib.util.find_spec("diffusers"):
        pytest.skip("needs diffusers")
    with pytest.raises(kind, match=message) as caught:
        call()
    assert caught.value.__cause__ is not None
    assert not isinstance(caught.value.__cause__, AnypatchError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "timm:vit_tiny_patch16_224",
        "timm:hf-hub:nobody/vit",
        "open_clip:ViT-B-32/openai",
        "open_clip:hf-hub:nobody/clip",
        "transformers:facebook/dinov2-base",
        "diffusers:nobody/dit",
        "hub:nobody/dino:dino_vits16",
    ],
)
def test_no_network_is_said_and_what_works_without_one(source: str) -> None:
    """Random weights are proposed where they can be had: not where the configuration is on the hub, too."""
    with pytest.raises(CheckpointError, match=r"without a network.*(directory|clone)") as said:
        anypatch.load(source)
    if "pretrained=False" in str(said.value):
        anypatch.load(source, pretrained=False)
        return
    with pytest.raises(CheckpointError, match="without a network"):
        anypatch.load(source, pretrained=False)


@pytest.mark.parametrize(
    "error", [KeyError("a"), ValueError(""), RuntimeError("x" * 900), AttributeError("b"), IndexError()]
)
def test_any_error_at_all_comes_through_the_door_as_ours(error: Exception) -> None:
    with pytest.raises(CheckpointError) as caught, loading.speaking_for("timm", "NAME"):
        raise error
    assert caught.value.__cause__ is error
    assert str(caught.value).startswith("timm cannot load NAME: ")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), anypatch.GeometryError("mine")])
def test_what_is_ours_or_the_machines_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, loading.speaking_for("timm", "NAME"):
        raise error
    assert caught.value is error


def test_advice_goes_on_with_the_librarys_sentence() -> None:
    with (
        pytest.raises(CheckpointError, match=r"vit: cannot reach the hub; without a network, only"),
        loading.speaking_for("timm", "vit"),
    ):
        raise ConnectionError("cannot reach the hub.")
    with pytest.raises(CheckpointError, match=r"vit: the file is damaged\.$"), loading.speaking_for("timm", "vit"):
        raise ValueError("the file is damaged.")
