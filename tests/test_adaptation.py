"""What must survive an adaptation, what must follow it, and that a failed one changes nothing."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import nn
from torch.testing import assert_close

import anypatch
from anypatch import GeometryError, UnsupportedModelError
from anypatch.adaptation import make_plan
from anypatch.core import plan as plans
from anypatch.core import twins
from anypatch.core.empty import empty
from builders import transformers_model


def vit(**kwargs: Any) -> nn.Module:
    """A small real timm ViT: 64 pixels, patch 16."""
    arguments = {"img_size": 64, "num_classes": 5, "depth": 2, "embed_dim": 48, "num_heads": 3, **kwargs}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    nn.init.normal_(model.head.weight) if arguments["num_classes"] else None
    return model


def snapshot(model: nn.Module) -> bytes:
    """Every tensor and every plain attribute of every module, as bytes."""
    parts: list[Any] = []
    for name, module in model.named_modules():
        plain = {
            k: v for k, v in vars(module).items() if not k.startswith("_") and isinstance(v, (int, tuple, str, dict))
        }
        parts.append((name, type(module).__name__, repr(sorted(plain.items(), key=lambda kv: kv[0]))))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        parts.append((name, tuple(tensor.shape), tensor.dtype, id(tensor), tensor.detach().float().numpy().tobytes()))
    return pickle.dumps(parts)


# -- what it computes ---------------------------------------------------------------------------------------


def test_agrees_with_a_model_built_at_the_new_geometry() -> None:
    model = vit()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    anypatch.adapt(model, (8, 12), (64, 96), kernel="pi")
    direct = vit(img_size=(64, 96), patch_size=(8, 12))
    state["patch_embed.proj.weight"] = resample_patch_embed(state["patch_embed.proj.weight"], [8, 12])
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [8, 8], [4, 4])
    direct.load_state_dict(state)
    pixels = torch.randn(2, 3, 64, 96)
    assert_close(model(pixels), direct(pixels), rtol=1e-4, atol=1e-5)


def test_positions_follow_when_the_token_count_does_not_change() -> None:
    model = vit(img_size=(192, 192))
    table = model.pos_embed.detach().clone()
    anypatch.adapt(model, image_size=(144, 256))
    expected = resample_abs_pos_embed(table, [9, 16], [12, 12])
    assert model.pos_embed.shape == table.shape
    assert_close(model.pos_embed.detach(), expected)
    assert model.patch_embed.grid_size == (9, 16)
    assert model(torch.randn(1, 3, 144, 256)).shape == (1, 5)


def test_image_size_alone_leaves_the_kernel() -> None:
    model = vit()
    kernel = model.patch_embed.proj.weight.detach().clone()
    anypatch.adapt(model, image_size=96)
    assert torch.equal(model.patch_embed.proj.weight, kernel)
    assert anypatch.geometry(model).grid == (6, 6)


def test_there_is_nothing_to_do_for_the_same_geometry() -> None:
    model = vit()
    before = snapshot(model)
    assert anypatch.adapt(model, 16) is model
    assert anypatch.adapt(model) is model
    assert snapshot(model) == before


def test_adapting_twice_goes_through() -> None:
    model = anypatch.adapt(anypatch.adapt(vit(), 8), 32, keep="grid")
    geometry = anypatch.geometry(model)
    assert (geometry.patch_size, geometry.image_size, geometry.grid) == ((32, 32), (256, 256), (8, 8))
    assert model(torch.randn(1, 3, 256, 256)).shape == (1, 5)


@pytest.mark.parametrize("kernel", ["pi", "wiener", "bicubic", "bilinear"])
def test_every_kernel_method_is_the_one_asked_for(kernel: str) -> None:
    model = vit()
    weight = model.patch_embed.proj.weight.detach().clone()
    anypatch.adapt(model, 24, keep="grid", kernel=kernel)
    assert_close(model.patch_embed.proj.weight.detach(), anypatch.resize_kernel(weight, 24, kernel))


# -- what must survive --------------------------------------------------------------------------------------


def test_identity_class_parameters_and_training_mode_survive() -> None:
    model = vit().train()
    cls, proj, parameters = type(model), model.patch_embed.proj, dict(model.named_parameters())
    assert anypatch.adapt(model, 32) is model
    assert type(model) is cls
    assert model.patch_embed.proj is proj
    assert model.training
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameters[name] for name in after)


def test_hooks_survive() -> None:
    model = vit()
    seen: list[torch.Size] = []
    model.patch_embed.proj.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    model.register_forward_pre_hook(lambda m, i: seen.append(i[0].shape))
    anypatch.adapt(model, 32)
    model(torch.randn(1, 3, 64, 64))
    assert seen == [torch.Size([1, 3, 64, 64]), torch.Size([1, 48, 2, 2])]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_survives_and_the_kernel_is_computed_precisely(dtype: torch.dtype) -> None:
    model = vit().to(dtype)
    weight = model.patch_embed.proj.weight.detach().clone()
    anypatch.adapt(model, 24, keep="grid", kernel="pi")
    assert {p.dtype for p in model.parameters()} == {dtype}
    exact = resample_patch_embed(weight.double(), [24, 24]).to(dtype)
    assert_close(model.patch_embed.proj.weight.detach(), exact)


def test_device_survives() -> None:
    model = vit().to("meta")
    anypatch.adapt(model, 32)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.patch_embed.proj.weight.shape == (48, 3, 32, 32)


def test_requires_grad_survives() -> None:
    model = vit()
    model.patch_embed.proj.weight.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    anypatch.adapt(model, 32)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_tied_parameters_stay_tied() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = vit(), nn.Conv2d(3, 48, 16, 16)
            self.second.weight = self.first.patch_embed.proj.weight
            self.pos_embed = self.first.pos_embed

    pair = anypatch.adapt(Pair(), 32)
    assert pair.second.weight is pair.first.patch_embed.proj.weight
    assert pair.second.weight.shape[-1] == pair.second.kernel_size[-1] == pair.second.stride[-1] == 32
    assert pair.pos_embed is pair.first.pos_embed
    assert pair.second(torch.zeros(1, 3, 64, 64)).shape == (1, 48, 2, 2)


def test_a_model_is_not_adapted_under_its_twin() -> None:
    """Two models of one wrapper that share a stem: adapted alone, the first would leave the other with half a stem."""
    pair = nn.ModuleDict({"first": vit(), "second": vit()})
    pair["second"].patch_embed.proj.weight = pair["first"].patch_embed.proj.weight
    with pytest.raises(UnsupportedModelError, match=r"proj\.weight is also a parameter of a Conv2d outside"):
        anypatch.adapt(pair["first"], 32)
    assert pair["second"](torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_training_goes_on() -> None:
    model = vit().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.0)
    F.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.tensor([0, 1])).backward()
    anypatch.adapt(model, 32)
    assert model.patch_embed.proj.weight.grad is None
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.tensor([0, 1])).backward()
    assert model.patch_embed.proj.weight.grad.shape == (48, 3, 32, 32)
    optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.grad.abs().sum() > 0)
    assert not torch.equal(model.pos_embed, before["pos_embed"])


def test_compiles_afterwards_and_when_compiled_before() -> None:
    pixels = torch.randn(1, 3, 64, 64)
    model = vit()
    compiled = torch.compile(model, backend="eager")
    compiled(pixels)
    assert anypatch.adapt(compiled, 32) is compiled
    assert model.patch_embed.proj.weight.shape[-1] == 32
    assert_close(compiled(pixels), model(pixels))


def test_the_global_random_state_is_left_alone() -> None:
    model = clip_tower()  # its constructor draws the class embedding at random
    torch.manual_seed(7)
    state = torch.get_rng_state()
    anypatch.adapt(model, 32)
    assert torch.equal(torch.get_rng_state(), state)


def test_deepcopy_and_pickle_work_afterwards() -> None:
    model = anypatch.adapt(vit(), 32)
    pixels = torch.randn(1, 3, 64, 64)
    assert_close(copy.deepcopy(model)(pixels), model(pixels))


# -- adapters -----------------------------------------------------------------------------------------------


def lora(model: nn.Module, targets: list[str], **kwargs: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **kwargs)
    )
    return wrapped.eval()


@pytest.mark.parametrize("targets", [["qkv", "fc1"], ["proj", "qkv"]])
def test_lora_survives_on_attention_and_on_the_patch_projection(targets: list[str]) -> None:
    model = lora(vit(), targets)
    assert anypatch.adapt(model, 32, keep="grid", kernel="pi") is model
    inner = model.get_base_model()
    merged = copy.deepcopy(model).merge_and_unload()
    pixels = torch.randn(2, 3, 128, 128)
    assert_close(model(pixels), merged(pixels), rtol=1e-4, atol=1e-4)

    reference = lora(vit(), targets).merge_and_unload()
    weight = resample_patch_embed(reference.patch_embed.proj.weight.detach(), [32, 32])
    state = {**reference.state_dict(), "patch_embed.proj.weight": weight}
    direct = vit(img_size=128, patch_size=32)
    direct.load_state_dict(state)
    assert_close(merged(pixels), direct(pixels), rtol=1e-3, atol=1e-4)
    assert inner.patch_embed.grid_size == (4, 4)


def test_lora_trains_afterwards() -> None:
    model = lora(vit(), ["proj", "qkv"]).train()
    anypatch.adapt(model, 32)
    model(torch.randn(1, 3, 64, 64)).sum().backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora" in n for n in trained)
    assert any("patch_embed" in n for n in trained)


def adapt_with(optimizer: torch.optim.Optimizer, model: nn.Module, **sizes: Any) -> set[nn.Parameter]:
    """As the guide does it; returns the parameters that were resized."""
    shapes = {parameter: parameter.shape for parameter in model.parameters()}
    anypatch.adapt(model, **sizes)
    for parameter, shape in shapes.items():
        if parameter.shape != shape:
            optimizer.state.pop(parameter, None)
    return {parameter for parameter, shape in shapes.items() if parameter.shape != shape}


# Of torch's, all but those for sparse gradients and matrices, and LBFGS, whose state is of all parameters together.
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("Adafactor", {}), ("SGD", {"momentum": 0.9}), ("Adagrad", {"fused": True}), ("RMSprop", {"momentum": 0.9}),
    ("NAdam", {}), ("RAdam", {}), ("Adadelta", {}), ("Adamax", {}), ("ASGD", {}), ("Rprop", {}), ("Adagrad", {}),
    ("AdamW", {"amsgrad": True, "fused": True}),
]  # fmt: skip


@pytest.mark.siblings(fast=2)
@pytest.mark.parametrize("sizes", [{"patch_size": 32, "keep": "grid"}, {"image_size": 128}])
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=str)
def test_every_optimizer_goes_on_after_what_the_guide_does(name: str, options: dict[str, Any], sizes: Any) -> None:
    model = vit()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-3, **options)
    for size in (64, 64, 0, 128, 128):
        if not size:
            kept = {p: {k: torch.as_tensor(v).clone() for k, v in s.items()} for p, s in optimizer.state.items()}
            resized = adapt_with(optimizer, model, **sizes)
            assert resized
            for parameter in kept.keys() - resized:
                assert all(
                    torch.equal(torch.as_tensor(optimizer.state[parameter][k]), v) for k, v in kept[parameter].items()
                )
            assert not resized & optimizer.state.keys()
            continue
        optimizer.zero_grad()
        model(torch.rand(1, 3, size, size)).square().mean().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}])
def test_an_optimizer_whose_state_was_cleared_steps_as_a_fresh_one(kind: dict[str, bool]) -> None:
    """For the resized parameters, as the guide clears it; the averages of the others go on."""
    model = vit()

    def step(optimizer: torch.optim.Optimizer, size: int) -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 3, size, size)).square().sum().backward()
        optimizer.step()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, **kind)
    step(optimizer, 64)
    adapt_with(optimizer, model, image_size=96)
    before = model.pos_embed.detach().clone()
    step(optimizer, 96)
    grad = model.pos_embed.grad
    assert_close(before - model.pos_embed, 1e-2 * grad / (grad.abs() + 1e-8), rtol=1e-3, atol=1e-6)  # Adam's first step
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert steps == {1, 2}


def test_modules_to_save_are_adapted_with_the_original() -> None:
    model = lora(vit(), ["qkv"], modules_to_save=["patch_embed"])
    anypatch.adapt(model, 32)
    wrapper = model.get_base_model().patch_embed
    assert wrapper.original_module.proj.weight.shape[-1] == 32
    assert wrapper.modules_to_save["default"].proj.weight.shape[-1] == 32
    assert wrapper.modules_to_save["default"].grid_size == (2, 2)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize("ask", [{"image_size": 96}, {"patch_size": 8}])
def test_modules_to_save_inside_one_another_are_adapted_with_their_originals(ask: dict[str, int]) -> None:
    """``embeddings`` fits patch_embeddings, too: PEFT puts a wrapper of it beside those of the module around it."""
    peft = pytest.importorskip("peft")

    def build(image: int = 64, patch: int = 16) -> Any:
        return transformers_model(image_size=image, patch_size=patch)

    def grown(table: torch.Tensor) -> torch.Tensor:
        grid = table[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
        return torch.cat([table[:, :1], grid.flatten(2).mT], 1)

    inner = build()
    model = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embeddings"]))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    plain = copy.deepcopy(model).merge_and_unload().state_dict()
    before = copy.deepcopy(model)
    anypatch.adapt(model, **ask)
    image, patch = ask.get("image_size", 64), ask.get("patch_size", 16)
    side = image // patch
    assert all(p.shape[-1] == patch for n, p in model.named_parameters() if n.endswith("projection.weight"))
    table = "embeddings.position_embeddings"
    direct = build(image, patch)
    kernel = "embeddings.patch_embeddings.projection.weight"
    resized = anypatch.resize_kernel(plain[kernel], patch)
    direct.load_state_dict({**plain, table: grown(plain[table]), kernel: resized})
    pixels = torch.randn(1, 3, image, image)
    assert_close(model(pixels)[0], direct(pixels)[0], rtol=1e-4, atol=1e-5)
    wrapper, old = model.get_base_model().embeddings, before.get_base_model().embeddings
    original = old.original_module.position_embeddings
    assert_close(wrapper.original_module.position_embeddings, grown(original), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert model(pixels)[0].shape[1] == side**2 + 1


def clip_tower() -> nn.Module:
    return transformers_model("CLIPVision", image_size=64, patch_size=16)


def test_an_adapter_of_transformers_sees_the_new_configuration() -> None:
    model = lora(clip_tower(), ["q_proj"])
    config, inner = model.config, model.get_base_model()
    assert config is inner.config
    anypatch.adapt(model, 32)
    assert inner.config.patch_size == 32
    assert model.config is inner.config
    assert model.base_model.config is inner.config
    assert config.patch_size == 16  # another model may have been built from it


def test_a_wrapper_of_the_users_own_sees_the_new_configuration() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = clip_tower()
            self.settings = {"vision": self.backbone.config}
            self.head = nn.Linear(32, 3)

    model = Classifier()
    anypatch.adapt(model, 32)
    assert model.settings["vision"] is model.backbone.config
    assert model.settings["vision"].patch_size == 32


# -- what must follow ---------------------------------------------------------------------------------------


def test_a_plan_shows_of_long_records_what_differs() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=3)
    shown = {change.name: (change.old, change.new) for change in make_plan(model, 32).changes}
    assert shown["feature_info"] == ([{"reduction": 16}], [{"reduction": 32}])
    assert shown["_model_args"] == ({}, {"patch_size": 32})
    assert shown["patch_embed.grid_size"] == ((14, 14), (7, 7))


def test_attributes_follow() -> None:
    model = vit()
    anypatch.adapt(model, (8, 32))
    embed = model.patch_embed
    assert embed.patch_size == (8, 32)
    assert embed.img_size == (64, 64)
    assert embed.grid_size == (8, 2)
    assert embed.num_patches == 16
    assert embed.proj.kernel_size == (8, 32)
    assert embed.proj.stride == (8, 32)
    assert [f["reduction"] for f in model.feature_info] == [
        f["reduction"] for f in vit(patch_size=(8, 32)).feature_info
    ]


def test_timm_data_config_follows() -> None:
    model = anypatch.adapt(vit(), 32, keep="grid")
    assert model.pretrained_cfg["input_size"] == (3, 128, 128)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 128, 128)


def test_another_model_of_the_same_configuration_is_left_alone() -> None:
    first, second = vit(), vit()
    before = snapshot(second)
    anypatch.adapt(first, 32, keep="grid")
    assert snapshot(second) == before


def test_rotary_tables_follow() -> None:
    model = timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=1, num_classes=0).eval()
    anypatch.adapt(model, 28)
    direct = timm.create_model("eva02_tiny_patch14_224", img_size=56, patch_size=28, depth=1, num_classes=0).eval()
    buffers = dict(direct.named_buffers())
    assert buffers
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    direct.load_state_dict(model.state_dict())
    pixels = torch.randn(1, 3, 56, 56)
    assert_close(model(pixels), direct(pixels))


def test_relative_indexes_follow_and_masks_come_and_go() -> None:
    kwargs = {"depths": (2, 2), "embed_dim": 24, "num_heads": (2, 2), "num_classes": 3, "window_size": 4}
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, **kwargs).eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    anypatch.adapt(model, 16, kernel="pi")  # grid 4x4: one window, so no shift and no mask
    direct = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, patch_size=16, **kwargs).eval()
    for (name, ours), (other, theirs) in zip(model.named_modules(), direct.named_modules(), strict=True):
        assert name == other
        assert {k: None if v is None else v.tolist() for k, v in ours._buffers.items()} == {
            k: None if v is None else v.tolist() for k, v in theirs._buffers.items()
        }
    target = direct.state_dict()
    state["patch_embed.proj.weight"] = resample_patch_embed(state["patch_embed.proj.weight"], [16, 16])
    for key in state:
        if "relative_position_bias_table" in key and state[key].shape != target[key].shape:
            old, new = (round(t[key].shape[0] ** 0.5) for t in (state, target))
            image = state[key].T.reshape(1, -1, old, old)
            state[key] = F.interpolate(image, (new, new), mode="bicubic", antialias=True)[0].flatten(1).T
    direct.load_state_dict(state)
    pixels = torch.randn(1, 3, 64, 64)
    assert_close(model(pixels), direct(pixels), rtol=1e-4, atol=1e-5)


# -- when it raises -----------------------------------------------------------------------------------------


def test_sizes_that_do_not_fit_leave_the_model_untouched() -> None:
    model = vit()
    before = snapshot(model)
    with pytest.raises(GeometryError, match=r"use image_size 52x52 or 65x65, or patch_size 8x8 or 16x16"):
        anypatch.adapt(model, 13)
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", ["parameters", "buffers", "attributes"])
def test_an_error_at_any_step_puts_everything_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=1, num_classes=0).eval()
    model(torch.randn(1, 3, 56, 56)).sum().backward()
    before = snapshot(model)
    gradient = model.patch_embed.proj.weight.grad.clone()
    plan = make_plan(model, 28)
    assert plan is not None
    if kind == "parameters":
        plan.steps.append(plans.SetParameter(nn.Parameter(torch.zeros(2)), None, None))  # assigning None as data raises
    elif kind == "buffers":
        plan.steps.append(plans.SetBuffer(None, "x", None, True))
    else:
        plan.steps.append(plans.SetAttribute(None, "x", 1))
    with pytest.raises((TypeError, AttributeError)):
        plan.apply()
    assert snapshot(model) == before
    assert torch.equal(model.patch_embed.proj.weight.grad, gradient)


def test_a_model_changed_after_it_was_built_is_refused() -> None:
    model = vit()
    model.pos_embed = nn.Parameter(torch.zeros(1, 50, 48))
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"pos_embed has shape \(1, 50, 48\)"):
        anypatch.adapt(model, 32)
    assert snapshot(model) == before


class Moved(nn.Module):
    """A patch embedding of the user's own, which keeps the projection under another name."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.conv = projection


def test_a_projection_that_was_moved_is_refused() -> None:
    model = transformers_model(image_size=64, patch_size=16)
    model.embeddings.patch_embeddings = Moved(model.embeddings.patch_embeddings.projection)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="no layer in the place of the patch projection"):
        anypatch.adapt(model, 32)
    assert snapshot(model) == before


def test_quantized_weights_are_refused() -> None:
    model = vit()
    model.patch_embed.proj.weight = nn.Parameter(model.patch_embed.proj.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="int8"):
        anypatch.adapt(model, 32)


def test_what_is_no_vision_transformer_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="dict"):
        anypatch.adapt({}, 32)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError):
        anypatch.adapt(nn.Linear(4, 4), 32)


def test_unknown_kernel_lists_the_known_ones() -> None:
    model = vit()
    before = snapshot(model)
    with pytest.raises(GeometryError, match="wiener"):
        anypatch.adapt(model, 32, kernel="lanczos")
    assert snapshot(model) == before


def test_modules_that_are_replaced_keep_the_training_mode() -> None:
    class Stem(nn.Module):
        def __init__(self, patch: int, image: int) -> None:
            super().__init__()
            self.patch_size, self.img_size = patch, image
            self.proj = nn.Conv2d(3, 4, patch, patch)
            self.pool = nn.Identity() if image // patch > 2 else nn.Dropout(0.5)

    from anypatch.core.geometry import Geometry
    from anypatch.core.kernels import as_method

    live = Stem(16, 64).train()
    subject = twins.Subject(live, Geometry((16, 16), (64, 64)), lambda g: Stem(g.patch_size[0], g.image_size[0]).eval())
    plans.make(subject, Geometry((32, 32), (64, 64)), as_method("pi")).apply()
    assert isinstance(live.pool, nn.Dropout)
    assert live.pool.training
    assert live.proj.weight.shape == (4, 3, 32, 32)


def test_twins_hold_no_memory() -> None:
    twin = empty(lambda: timm.create_model("vit_large_patch16_224"))
    assert all(p.is_meta for p in twin.parameters())


def test_stale_caches_are_dropped() -> None:
    """A tensor that the library computed on first use at the old geometry must not be used at the new one."""
    model = vit()
    model.patch_embed.cached = None
    twin_build = plans.build_twins

    def with_cache(*args: Any) -> Any:
        pair = twin_build(*args)
        for twin in (pair.old, pair.new):
            twin.patch_embed.cached = None
        return pair

    model.patch_embed.cached = torch.ones(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "build_twins", with_cache)
        anypatch.adapt(model, 32)
    assert model.patch_embed.cached is None


def test_what_cannot_be_saved_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(anypatch.UnsupportedModelError):
        anypatch.save(nn.Linear(3, 3), tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "near"),
    [
        ("timm:vit_tinny_patch16_224", "vit_tiny_patch16_224"),
        ("open_clip:ViT-B-33", "ViT-B-32"),
        ("torchvision:vit_b_99", "vit_b_16"),
    ],
)
def test_unknown_names_say_which_are_like_them(source: str, near: str) -> None:
    with pytest.raises(anypatch.UnsupportedModelError, match=f"knows no model .* did you mean .*{near}"):
        anypatch.load(source)


def test_arch_is_for_files() -> None:
    with pytest.raises(anypatch.UnsupportedModelError, match="arch is for checkpoint files"):
        anypatch.load("timm:vit_tiny_patch16_224", pretrained=False, arch="timm:vit_small_patch16_224")


def test_a_size_that_does_not_fit_is_named_for_entry_points_that_fix_the_patch_themselves() -> None:
    """While the error was handled, Python said "given twice" by a KeyError, which nobody expected."""
    mixer = timm.create_model("resmlp_12_224", img_size=64)
    with pytest.raises(GeometryError, match="32x48 does not divide"):
        anypatch.adapt(mixer, (32, 48))
