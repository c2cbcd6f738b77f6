"""Weights that are computed from others whenever a model runs, and hooks on gradients: followed, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn.utils import parametrizations, parametrize, prune

import anypatch
from anypatch import UnsupportedModelError
from builders import random_vit, transformers_model, vit


def of_no_library() -> Any:
    model = vit()
    model.pretrained_cfg = {}
    return model


MODELS: dict[str, Callable[[], Any]] = {"timm": vit, "hand-made": of_no_library}
COMPUTED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "weight norm": (torch.nn.utils.weight_norm, r"weight-normed .*remove_weight_norm"),
    "spectral norm": (torch.nn.utils.spectral_norm, r"spectrally normed .*remove_spectral_norm"),
    "parametrized": (parametrizations.weight_norm, "is parametrized; remove the parametrization"),
    "parametrized by its spectrum": (parametrizations.spectral_norm, "is parametrized; remove the parametrization"),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"is pruned .*prune\.remove"),
}


@pytest.mark.siblings(fast=3)
@pytest.mark.parametrize("model", [*MODELS][::-1])
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_projection_that_is_computed_is_said_to_be(model: str, kind: str) -> None:
    compute, message = COMPUTED[kind]
    live, plain = MODELS[model](), MODELS[model]()
    compute(live.patch_embed.proj)
    with pytest.raises(UnsupportedModelError, match=f"patch_embed.proj.weight {message}|{message}"):
        anypatch.adapt(live, 16, keep="grid")
    x = torch.rand(2, 3, 64, 64)
    expected = anypatch.adapt(plain, image_size=64)  # another image is none of its concern
    with torch.no_grad():
        live(torch.rand(1, 3, 32, 32))
        plain.patch_embed.proj.weight.copy_(live.patch_embed.proj.weight)
        torch.testing.assert_close(anypatch.adapt(live, image_size=64)(x), expected(x))


@pytest.mark.parametrize("model", MODELS)
def test_a_pruned_table_is_said_to_be(model: str) -> None:
    live = MODELS[model]()
    prune.l1_unstructured(live, "pos_embed", 0.5)
    with pytest.raises(UnsupportedModelError, match="pos_embed is pruned"):
        anypatch.adapt(live, image_size=64)
    anypatch.adapt(live, 16, keep="grid")


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_class_that_torch_put_in_the_place_of_a_librarys_is_the_librarys() -> None:
    live, plain = random_vit(), random_vit()
    live.pretrained_cfg = plain.pretrained_cfg = {"architecture": "vit_tiny_patch16_224"}
    live, plain = vit(num_classes=3), vit(num_classes=3)
    parametrize.register_parametrization(live, "cls_token", Twice())
    with torch.no_grad():
        plain.cls_token.mul_(2)
        assert anypatch.geometry(live).library == "timm"
        x = torch.rand(2, 3, 64, 64)
        for model in (live, plain):
            anypatch.adapt(model, 16, image_size=64)
        torch.testing.assert_close(live(x), plain(x))


def test_masks_of_pruned_layers_that_stay_are_not_taken_for_images() -> None:
    model = transformers_model()  # as wide as its image is
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            prune.custom_from_mask(layer, "weight", torch.ones_like(layer.weight))
    expected = anypatch.adapt(prunable(model), 16, image_size=64)
    x = torch.rand(1, 3, 64, 64)
    anypatch.adapt(model, 16, image_size=64)
    torch.testing.assert_close(model(x).last_hidden_state, expected(x).last_hidden_state)


def prunable(model: nn.Module) -> Any:
    """The same model without masks, as all of them are ones."""
    plain = transformers_model()
    state = {n.removesuffix("_orig"): t for n, t in model.state_dict().items() if not n.endswith("_mask")}
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_that_masks_the_gradient_of_what_changes_is_named(model: str, register: str) -> None:
    live = MODELS[model]()
    mask = torch.ones_like(live.patch_embed.proj.weight)
    handle = getattr(live.patch_embed.proj.weight, register)(lambda g: None if g.grad is None else g.grad.mul_(mask))
    with pytest.raises(UnsupportedModelError, match=r"a hook on patch_embed.proj.weight holds mask, of shape \(24, 3"):
        anypatch.adapt(live, 16, keep="grid")
    anypatch.at(live, 16, keep="grid")  # whose gradients reach the model in its own shape
    handle.remove()
    channels = torch.ones(24, 1, 1, 1)
    live.patch_embed.proj.weight.register_hook(lambda g: g * channels)
    live.blocks[0].attn.qkv.weight.register_hook(lambda g: g * torch.ones_like(g))
    anypatch.adapt(live, 16, keep="grid")
    live(torch.rand(2, 3, 64, 64)).sum().backward()
    assert live.patch_embed.proj.weight.grad.shape == (24, 3, 16, 16)


def test_a_hook_may_hold_its_parameter_and_what_it_records_of_gradients() -> None:
    """Decay of weights, and logs of gradients, which are others after the next backward pass."""
    live, log, seen = vit(), dict[str, Tensor](), list[Tensor]()

    def recording(name: str, parameter: nn.Parameter) -> Callable[[Tensor], Tensor]:
        def hook(gradient: Tensor) -> Tensor:
            log[name] = gradient.clone()
            seen.append(gradient)
            return gradient + 0.5 * parameter.detach()

        return hook

    for name, parameter in live.named_parameters():
        parameter.register_hook(recording(name, parameter))
    live(torch.rand(2, 3, 32, 32)).sum().backward()
    anypatch.adapt(live, 16)
    live.zero_grad()
    live(torch.rand(2, 3, 32, 32)).sum().backward()
    for name, parameter in live.named_parameters():
        torch.testing.assert_close(parameter.grad, log[name] + 0.5 * parameter.detach())


@pytest.mark.parametrize("kind", ["register_hook", "register_prehook", "optimizer"])
def test_what_waits_on_the_node_of_a_gradient_would_wait_in_vain(kind: str) -> None:
    model = random_vit()
    called: list[Any] = []
    weight = model.patch_embed.proj.weight
    node: Any = weight.view_as(weight).grad_fn.next_functions[0][0]
    if kind == "optimizer":
        _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    else:
        getattr(node, kind)(lambda *grads: called.append(grads))
    with pytest.raises(UnsupportedModelError, match=r"waits for the gradient of (pos_embed|patch_embed\.proj\.weight)"):
        anypatch.adapt(model, 4)
    assert weight.shape[-1] == 8
    before = weight.detach().clone()
    anypatch.at(model, 4)(torch.rand(1, 3, 32, 32)).square().sum().backward()  # a view exchanges no parameter
    assert called or not torch.equal(weight, before)


def test_a_graph_that_was_let_go_and_a_hook_that_was_taken_off_wait_for_nothing() -> None:
    model = random_vit()
    weight = model.patch_embed.proj.weight
    node: Any = weight.view_as(weight).grad_fn.next_functions[0][0]
    node.register_hook(lambda *grads: None).remove()
    model(torch.rand(1, 3, 32, 32)).sum().backward()
    anypatch.adapt(model, 4)(torch.rand(1, 3, 32, 32)).sum().backward()
    assert weight.grad.shape[-1] == 4
