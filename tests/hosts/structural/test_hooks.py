"""Hooks with numbers of the present geometry in their code, also on models that are fed by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anypatch
from anypatch import UnsupportedModelError
from anypatch.core.recordings import is_pure
from builders import transformers_model

LOG: dict[str, Any] = {}


def resizing(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    kwargs = dict(kwargs)
    kwargs["pixel_values"] = F.interpolate(kwargs["pixel_values"], (32, 32))
    return args, kwargs


def resizing_in_place(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    kwargs.update(pixel_values=_brought(kwargs["pixel_values"]))
    return args, kwargs


def _brought(pixels: Tensor) -> Tensor:
    return F.interpolate(pixels, size=(32, 32))


def asserting(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
    if pixels.shape[-1] != 32:
        raise ValueError("images of 32")


def scaling(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "pixel_values": kwargs["pixel_values"] / 2}


def cutting(module: nn.Module, args: Any, output: Any) -> Any:
    return type(output)(last_hidden_state=output.last_hidden_state[:, :17], pooler_output=output.pooler_output)


def logging(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    LOG["shape"] = kwargs["pixel_values"].shape


def keeping(module: nn.Module, args: Any, kwargs: dict[str, Any], log: dict[str, Any] = LOG) -> None:
    log["shape"] = kwargs["pixel_values"].shape


def aliasing(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    log = module.log
    log["shape"] = kwargs["pixel_values"].shape


PURE = (resizing, resizing_in_place, asserting, scaling, cutting)


@pytest.mark.parametrize("hook", [*PURE, logging, keeping, aliasing], ids=lambda hook: hook.__name__)
def test_what_a_hook_may_be_rehearsed_with(hook: Callable[..., Any]) -> None:
    assert is_pure(hook) is (hook in PURE)


@pytest.mark.parametrize("hook", [resizing, resizing_in_place, asserting], ids=lambda hook: hook.__name__)
@pytest.mark.parametrize("kind", ["ViT", pytest.param("Dinov2", marks=pytest.mark.slow)])
def test_a_size_in_a_hook_of_a_model_that_is_fed_by_name_is_refused(hook: Callable[..., Any], kind: str) -> None:
    model = transformers_model(kind)
    model.register_forward_pre_hook(hook, with_kwargs=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="the number 32 in a hook"):
        anypatch.adapt(model, image_size=48)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    pixels = torch.rand(1, 3, 32, 32)
    model = transformers_model(kind)
    expected = anypatch.adapt(copy.deepcopy(model), 16)(pixels).last_hidden_state
    model.register_forward_pre_hook(hook, with_kwargs=True)
    torch.testing.assert_close(anypatch.adapt(model, 16)(pixel_values=pixels).last_hidden_state, expected)


def transformers_clip() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    text = {**sizes, "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()


def open_clip_clip() -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": 5, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text).eval()


def resizing_first(module: nn.Module, args: Any) -> Any:
    return (F.interpolate(args[0], size=(32, 32)), *args[1:])


def following(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    pixels = kwargs["pixel_values"]
    return args, {**kwargs, "pixel_values": F.interpolate(pixels, size=pixels.shape[-2:])}


@pytest.mark.parametrize(
    ("build", "hook"),
    [(transformers_clip, resizing), (transformers_clip, asserting), (open_clip_clip, resizing_first)],
    ids=["clip", "asserting", "open_clip"],
)
def test_a_size_in_a_hook_of_a_model_with_two_towers_is_refused(
    build: Callable[[], Any], hook: Callable[..., Any]
) -> None:
    """Only its image tower is rehearsed, which its own hooks come before."""
    model = build()
    model.register_forward_pre_hook(hook, with_kwargs=hook is not resizing_first)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="the number 32 in a hook"):
        anypatch.adapt(model, image_size=48)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    anypatch.adapt(model, 16)  # the image stays
    assert anypatch.geometry(model).grid == (2, 2)


@pytest.mark.parametrize("hook", [scaling, following, logging], ids=lambda hook: hook.__name__)
def test_other_hooks_of_a_model_with_two_towers_go_on(hook: Callable[..., Any]) -> None:
    model = transformers_clip()
    expected = anypatch.adapt(copy.deepcopy(model), image_size=48)
    model.register_forward_pre_hook(hook, with_kwargs=True)
    anypatch.adapt(model, image_size=48)
    pixels, ids = torch.rand(1, 3, 48, 48), torch.tensor([[1, 5, 2]])
    given = pixels / 2 if hook is scaling else pixels
    torch.testing.assert_close(
        model(input_ids=ids, pixel_values=pixels).image_embeds, expected(ids, given).image_embeds
    )


def test_a_number_of_tokens_in_a_hook_that_makes_an_output_anew_is_refused() -> None:
    model = transformers_model()
    model.register_forward_hook(cutting)
    with pytest.raises(UnsupportedModelError, match=r"cutting .* takes 17 of 65"):
        anypatch.adapt(model, 4)


@pytest.mark.parametrize("hook", [scaling, logging], ids=lambda hook: hook.__name__)
def test_a_hook_without_sizes_goes_on(hook: Callable[..., Any]) -> None:
    model = transformers_model()
    expected = anypatch.adapt(copy.deepcopy(model), image_size=48)
    model.register_forward_pre_hook(hook, with_kwargs=True)
    LOG.clear()
    anypatch.adapt(model, image_size=48)
    assert not LOG
    pixels = torch.rand(1, 3, 48, 48)
    given = pixels / 2 if hook is scaling else pixels
    torch.testing.assert_close(
        model(pixel_values=pixels).last_hidden_state, expected(pixel_values=given).last_hidden_state
    )
    assert ({} if hook is scaling else {"shape": pixels.shape}) == LOG
