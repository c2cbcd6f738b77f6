"""Views: a second face of a model at another geometry, that shares its weights."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import anypatch
from anypatch import AnypatchError, GeometryError, UnsupportedModelError
from anypatch.adaptation import describe, host
from anypatch.inspection import inspect
from anypatch.proof import randomise, tensors
from builders import random_vit as vit
from builders import transformers_model
from families import LIBRARIES, Family, families

FAST = {
    "timm": ("vision_transformer", "beit", "swin_transformer_v2", "eva, EVA-02"),
    "transformers": ("vit", "dinov2", "dinov3_vit", "clip", "swin"),
    "open_clip": ("ViT-M-16-alt",),
    "torchvision": ("VisionTransformer (vit_b_16)", "SwinTransformer, version 2 (swin_v2_t)"),
    "generic": (
        "DINOv2 layout, registers",
        "hand-made, position map in a buffer",
        "MAE layout, with decoder and pixel head",
    ),
}
ALL = [family for library in LIBRARIES for family in families(library) if not family.refused]
QUICK = [f for f in ALL if f.name in FAST.get(f.library, ())]


def model_of(family: Family) -> nn.Module:
    model = family.build().eval()
    with torch.no_grad():
        randomise(model, torch.Generator().manual_seed(0))
    return model


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2)
    ).eval()


def adapted(model: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
    return anypatch.adapt(copy.deepcopy(model), *arguments, **options)


def outputs(model: nn.Module) -> list[Tensor]:
    """What a model says of its host's example."""
    example = host(model).example(describe(model))
    pixels = torch.randn(example.shape, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    return list(tensors(example.call(model, pixels)))


def require_view_equals_adapted(family: Family, keep: Any) -> None:
    model = model_of(family)
    patch = anypatch.geometry(model).patch_size
    target = family.patch_size or tuple(2 * side for side in patch)
    try:
        copied = adapted(model, target, keep=keep)
    except AnypatchError as error:  # such as a grid that cannot shrink
        with pytest.raises(type(error)):
            anypatch.at(model, target, keep=keep)
        return
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    view = anypatch.at(model, target, keep=keep)
    assert isinstance(view, type(model))
    assert (type(view).__name__, type(view).__module__) == (type(model).__name__, type(model).__module__)
    assert anypatch.geometry(view) == anypatch.geometry(copied)
    assert [id(p) for p in view.parameters()] == [id(p) for p in model.parameters()]
    expected, found = copied.state_dict(), view.state_dict()
    assert list(expected) == list(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    try:
        wanted = outputs(copied)
    except (RuntimeError, ValueError):  # too few tokens for this family's own pooling, or no plain images
        return
    given = outputs(view)
    assert wanted
    for a, b in zip(wanted, given, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
    loss = sum((b.float() ** 2).sum() for b in given if b.is_floating_point() and b.requires_grad)
    wanted_loss = sum((a.float() ** 2).sum() for a in wanted if a.is_floating_point() and a.requires_grad)
    if isinstance(loss, Tensor):
        loss.backward()
        wanted_loss.backward()
        pairs = zip(model.named_parameters(), copied.parameters(), strict=True)
        for (name, p), q in pairs:
            reaches = q.grad is not None and bool(q.grad.abs().sum() > 0)
            assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == reaches, name
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def names(family: Family) -> str:
    return f"{family.library}-{family.name}"


@pytest.mark.parametrize("family", QUICK, ids=names)
def test_view_equals_adapted_copy(family: Family) -> None:
    require_view_equals_adapted(family, "image")


def test_every_host_is_in_the_quick_list() -> None:
    assert {f.library for f in QUICK} == set(FAST)
    assert len(QUICK) == sum(map(len, FAST.values()))


@pytest.mark.long
@pytest.mark.parametrize("keep", ["image", "grid"])
@pytest.mark.parametrize("family", ALL, ids=names)
def test_view_equals_adapted_copy_in_every_family(family: Family, keep: str) -> None:
    require_view_equals_adapted(family, keep)


# -- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [vit, swin], ids=["vit", "swin"])
def test_gradients_are_those_of_finite_differences(build: Callable[[], nn.Module]) -> None:
    model = build().double()
    view = anypatch.at(model, 2 * anypatch.geometry(model).patch_size[0])
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    weights = torch.randn(view(pixels).shape, dtype=torch.float64)

    def loss() -> Tensor:
        return (view(pixels) * weights).sum()

    loss().backward()
    changed = [n for n, t in view.state_dict().items() if n in dict(model.named_parameters())]
    changed = [n for n in changed if view.state_dict()[n].shape != model.state_dict()[n].shape]
    assert changed
    for name in changed:
        parameter = model.get_parameter(name)
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        step = 1e-5
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = loss()
            parameter.add_(direction, alpha=-2 * step)
            below = loss()
            parameter.add_(direction, alpha=step)
        slope = ((above - below) / (2 * step)).item()
        assert slope == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-5), name


def test_training_either_trains_both() -> None:
    model = vit()
    view = anypatch.at(model, 16)
    pixels = torch.randn(2, 3, 32, 32)
    optimizer = torch.optim.SGD(view.parameters(), lr=0.1)
    native, seen = model(pixels).detach(), view(pixels)
    seen.square().sum().backward()
    optimizer.step()
    assert not torch.allclose(model(pixels), native)
    torch.testing.assert_close(view(pixels), adapted(model, 16)(pixels), rtol=0, atol=0)


def test_torch_func() -> None:
    model = vit()
    view = anypatch.at(model, 16)
    pixels = torch.randn(2, 3, 32, 32)
    other = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
    moved = copy.deepcopy(model)
    moved.load_state_dict(other)
    kept = view(pixels)
    found = torch.func.functional_call(view, other, (pixels,))
    torch.testing.assert_close(found, adapted(moved, 16)(pixels), rtol=0, atol=0)
    torch.testing.assert_close(view(pixels), kept, rtol=0, atol=0)
    slopes = torch.func.grad(lambda p: torch.func.functional_call(view, p, (pixels,)).square().sum())(other)
    assert slopes["pos_embed"].shape == model.pos_embed.shape
    assert slopes["patch_embed.proj.weight"].abs().sum() > 0


# -- following ---------------------------------------------------------------------------------------------------


def _in_place(model: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.copy_(q)


def _through_data(model: nn.Module, other: nn.Module) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.data.copy_(q.data)  # tells no version counter


def _exchanged(model: nn.Module, other: nn.Module) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.data = q.data.clone()


def _loaded(model: nn.Module, other: nn.Module) -> None:
    model.load_state_dict(other.state_dict())


def _assigned(model: nn.Module, other: nn.Module) -> None:
    model.load_state_dict(other.state_dict(), assign=True)


@pytest.mark.parametrize("change", [_in_place, _through_data, _exchanged, _loaded, _assigned])
@pytest.mark.parametrize("grad", [True, False])
def test_view_follows_the_weights(change: Callable[[nn.Module, nn.Module], None], grad: bool) -> None:
    model, other = vit(), vit()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    view = anypatch.at(model, 16)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.set_grad_enabled(grad):
        view(pixels)
        change(model, other)
        torch.testing.assert_close(view(pixels), adapted(other, 16)(pixels), rtol=0, atol=0)


@pytest.mark.parametrize("build", [vit, swin], ids=["vit", "swin"])
@pytest.mark.parametrize("face", ["model", "view"])
def test_view_moves_with_the_model(build: Callable[[], nn.Module], face: str) -> None:
    model = build()
    view = anypatch.at(model, 2 * anypatch.geometry(model).patch_size[0])
    (model if face == "model" else view).double()
    reference = adapted(build().double() if build is swin else model, anypatch.geometry(view).patch_size)
    reference.load_state_dict(view.state_dict())
    pixels = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(view(pixels), reference(pixels))
    assert all(t.dtype == torch.float64 for t in view.state_dict().values() if t.is_floating_point())
    model.to("meta")
    assert all(t.is_meta for t in view.state_dict().values())


def test_computed_buffers_move_and_lose_nothing_on_the_way() -> None:
    model = timm.create_model(
        "eva02_tiny_patch14_224", img_size=28, patch_size=7, embed_dim=16, depth=1, num_heads=2, num_classes=3
    ).eval()
    view = anypatch.at(model, 14)
    pixels = torch.randn(1, 3, 28, 28)
    exact = {n: b.clone() for n, b in adapted(model, 14).named_buffers()}
    model.half()
    assert view.rope.pos_embed.dtype == torch.float16
    model.float()
    assert torch.equal(view.rope.pos_embed, exact["rope.pos_embed"])
    assert view(pixels).shape == (1, 3)


def test_view_costs_no_memory_of_its_own() -> None:
    model = vit()
    view = anypatch.at(model, 16)
    owned = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert {t.untyped_storage().data_ptr() for t in [*view.parameters(), *view.buffers()]} == owned
    held = [v for m in view.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    assert not held
    assert type(view).pos_embed.fget is not None  # computed, never kept
    assert view.pos_embed is not view.pos_embed


# -- the model is left alone -------------------------------------------------------------------------------------


def test_modes_hooks_and_attributes_are_each_faces_own() -> None:
    model = vit()
    view = anypatch.at(model, 16)
    view.train()
    assert not any(m.training for m in model.modules())
    seen: list[str] = []
    view.blocks[0].register_forward_hook(lambda *_: seen.append("view"))
    model(torch.randn(1, 3, 32, 32))
    assert not seen
    view(torch.randn(1, 3, 32, 32))
    assert seen == ["view"]
    assert model.patch_embed.patch_size == (8, 8)
    assert view.patch_embed.patch_size == (16, 16)


class Helper:
    def __init__(self, owner: nn.Module) -> None:
        self.owner, self.calls = owner, 0


class Entangled(nn.Module):
    """References to itself and to what it holds, in all the ways that modules have."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 8, 8)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, 16))
        self.blocks = nn.ModuleList([nn.Identity()])
        self.img_size, self.patch_size = 32, 8
        self.embed = self._embed
        self.listed = [self.patch_embed]
        self.bound = functools.partial(Entangled._embed, self)
        self.back = weakref.ref(self)
        self.helper = Helper(self)
        self.cache: dict[str, Tensor] = {}

    def _embed(self, pixels: Tensor) -> Tensor:
        return self.patch_embed(pixels).flatten(2).transpose(1, 2) + self.pos_embed

    def forward(self, pixels: Tensor) -> Tensor:
        ways = [
            self.embed(pixels),
            self.bound(pixels),
            self.back()._embed(pixels),
            self.helper.owner._embed(pixels),
            self.listed[0](pixels).flatten(2).transpose(1, 2) + self.pos_embed,
        ]
        self.cache.setdefault("positions", self.pos_embed)
        return torch.stack(ways) + self.cache["positions"]


def test_references_stay_inside_the_view() -> None:
    model = Entangled()
    pixels = torch.randn(2, 3, 32, 32)
    view = anypatch.at(model, 16)
    native = model(pixels)
    assert view(pixels).shape == (5, 2, 4, 16)
    assert torch.equal(model(pixels), native)
    assert view.helper.owner is view
    assert model.helper.owner is model


def test_shared_layers_stay_shared() -> None:
    model = vit()
    model.blocks[1] = model.blocks[0]
    view = anypatch.at(model, 16)
    assert view.blocks[1] is view.blocks[0]


def test_config_of_transformers_is_the_views_own() -> None:
    model = transformers_model("Dinov2", image_size=28, patch_size=7)
    view = anypatch.at(model, 14)
    assert (model.config.patch_size, view.config.patch_size) == (7, 14)
    assert view.embeddings.config is view.config


# -- surroundings ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("build", [vit, pytest.param(swin, marks=pytest.mark.slow)], ids=["vit", "swin"])
def test_compile_in_one_graph(build: Callable[[], nn.Module]) -> None:
    model = build()
    view = anypatch.at(torch.compile(model), 2 * anypatch.geometry(model).patch_size[0])
    pixels = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(view, backend="aot_eager", fullgraph=True)
    view(pixels).square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = compiled(pixels)
    found.square().sum().backward()
    torch.testing.assert_close(found, view(pixels))
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    torch.testing.assert_close(compiled(pixels), view(pixels))


def test_autocast_leaves_the_resampling_exact() -> None:
    model = vit()
    view, copied = anypatch.at(model, 16), adapted(model, 16)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert view.pos_embed.dtype == torch.float32
        torch.testing.assert_close(view(pixels), copied(pixels), rtol=0, atol=0)


@pytest.mark.parametrize("ambient", [torch.no_grad, torch.inference_mode])
def test_without_gradients_and_then_with(ambient: Any) -> None:
    model = vit()
    pixels = torch.randn(1, 3, 32, 32)
    with ambient():
        view = anypatch.at(model, 16)
        without = view(pixels)
    assert not without.requires_grad
    view(pixels).sum().backward()
    assert model.pos_embed.grad is not None
    torch.testing.assert_close(view(pixels), without, rtol=0, atol=0)


def test_copies() -> None:
    model = vit()
    view = anypatch.at(model, 16)
    pixels = torch.randn(1, 3, 32, 32)
    kept = view(pixels)
    alone = copy.deepcopy(view)
    both = copy.deepcopy((model, view))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(alone(pixels), kept, rtol=0, atol=0)
    torch.testing.assert_close(both[1](pixels), kept, rtol=0, atol=0)
    with torch.no_grad():
        both[0].pos_embed.add_(1)
    assert not torch.equal(both[1](pixels), kept)


@pytest.mark.parametrize("family", QUICK, ids=names)
def test_a_pickled_view_is_the_same(family: Family) -> None:
    """As `torch.save` of a whole module and processes that are started afresh do it."""
    model = model_of(family)
    target = tuple(2 * side for side in anypatch.geometry(model).patch_size)
    view = anypatch.at(model, target, keep="image" if family.library == "generic" else "grid")
    back = pickle.loads(pickle.dumps(view))
    for a, b in zip(outputs(view), outputs(back), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
    assert isinstance(back, type(model))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    changed = [bool((p != 0).any()) for p in back.parameters()]
    assert any(changed)


def test_adapters_are_seen_through() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["proj", "qkv"], init_lora_weights=False)
    model = peft.get_peft_model(vit(), lora).eval()
    pixels = torch.randn(1, 3, 32, 32)
    view = anypatch.at(model, 16)
    assert type(view).__name__ == type(model).__name__
    torch.testing.assert_close(view(pixels), adapted(model, 16)(pixels), rtol=0, atol=0)
    view(pixels).sum().backward()
    reached = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is not None]
    assert any("patch_embed" in name and "lora_A" in name for name in reached)


# -- the other verbs ---------------------------------------------------------------------------------------------


def test_a_view_is_not_adapted_nor_viewed() -> None:
    model = vit()
    view = anypatch.at(model, 16)
    for verb in (anypatch.adapt, anypatch.at, lambda model, size: anypatch.flexible(model, [size])):
        with pytest.raises(UnsupportedModelError, match="view of another model"):
            verb(view, 8)
    with pytest.raises(UnsupportedModelError, match="view of another model"):
        anypatch.adapt(nn.Sequential(view), 8)
    with pytest.raises(GeometryError, match="does not divide"):
        anypatch.at(model, 7)


def test_a_model_adapted_after_its_view() -> None:
    model = vit()
    view = anypatch.at(model, 16)
    anypatch.adapt(model, 4)
    with pytest.raises(GeometryError, match="take another view"):
        view(torch.randn(1, 3, 32, 32))


def test_own_geometry_and_wrapped_models() -> None:
    model = vit()
    pixels = torch.randn(1, 3, 32, 32)
    same = anypatch.at(model)
    assert same is not model
    assert torch.equal(same(pixels), model(pixels))
    with pytest.raises(UnsupportedModelError, match="then wrap the view"):
        anypatch.at(nn.DataParallel(model), 16)


def test_geometry_check_inspect_and_save(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3).eval()
    with torch.no_grad():
        randomise(model, torch.Generator().manual_seed(1))
    view, copied = anypatch.at(model, 32), adapted(model, 32)
    assert inspect(view) == inspect(copied)
    assert anypatch.check(view, 64).passed
    anypatch.save(view, tmp_path / "view")
    anypatch.save(copied, tmp_path / "copied")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "view" / name).read_bytes() == (tmp_path / "copied" / name).read_bytes()


def test_loading_and_setting_are_for_the_model() -> None:
    model = vit()
    view = anypatch.at(model, 16)
    with pytest.raises(RuntimeError, match="load into the model"):
        view.load_state_dict(view.state_dict())
    with pytest.raises(UnsupportedModelError, match="set it there"):
        view.pos_embed = nn.Parameter(torch.zeros(1, 5, 16))
    with pytest.raises(UnsupportedModelError, match="cannot be deleted"):
        del view.pos_embed


def test_an_error_inside_is_not_taken_for_a_missing_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else ``nn.Module.__getattr__`` would give the model's own table, at the wrong geometry."""
    from anypatch.core import views

    view = anypatch.at(vit(), 16)

    def broken(*_: Any) -> Tensor:
        raise AttributeError("no such thing")

    monkeypatch.setattr(views.Follows, "value", broken)
    with pytest.raises(RuntimeError, match="pos_embed cannot be computed"):
        view.pos_embed  # noqa: B018


# -- the model is adapted while views are there ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"])
@pytest.mark.parametrize("sizes", [{"patch_size": 28}, {"patch_size": 28, "keep": "grid"}, {"image_size": 224}])
def test_a_view_of_a_model_that_was_adapted_since_says_so(name: str, sizes: dict[str, Any]) -> None:
    """Also a view at the model's own geometry, which resamples nothing, of models that take any image size."""
    model = timm.create_model(name, patch_size=14, img_size=112, dynamic_img_size=True, depth=1).eval()
    same, other = anypatch.at(model), anypatch.at(model, patch_size=7)
    x = torch.randn(1, 3, 112, 112)
    before = same(x), other(x)
    anypatch.adapt(model, **sizes)
    for view, expected in zip((same, other), before, strict=True):
        if "dinov3" in name and "image_size" in sizes:  # no tensor that is shared follows the image size
            assert torch.equal(view(x), expected)
            continue
        with pytest.raises(GeometryError, match="adapted since"):
            view(x)
    x = torch.randn(1, 3, *(anypatch.geometry(model).image_size or ()))
    assert torch.equal(anypatch.at(model)(x), model(x))


def _new_head(model: nn.Module) -> None:
    model.reset_classifier(3)


def _no_head(model: nn.Module) -> None:
    del model.head


def _lora(model: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False))


def _another_projection(model: nn.Module) -> None:
    model.patch_embed.proj = nn.Conv2d(3, 16, 8, 8)


def _one_more_block(model: nn.Module) -> None:
    model.blocks.append(copy.deepcopy(model.blocks[0]))


def _parametrised(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.blocks[0].attn.qkv)


@pytest.mark.parametrize("patch", [16, None])
@pytest.mark.parametrize("change", [_new_head, _no_head, _lora, _another_projection, _one_more_block, _parametrised])
def test_a_view_says_that_modules_were_exchanged(change: Callable[[nn.Module], None], patch: int | None) -> None:
    """It would go on with those that were there."""
    model, x = vit(), torch.randn(1, 3, 32, 32)
    view = anypatch.at(model, patch)
    alone, before = copy.deepcopy(view), view(x)
    change(model)
    with pytest.raises(UnsupportedModelError, match="replaced, added or taken away since this view was taken"):
        view(x)
    if patch:  # by whatever way the tensors are read
        with pytest.raises(UnsupportedModelError, match="since this view was taken"):
            view.forward_features(x)
    assert torch.equal(alone(x), before)  # a copy has modules of its own


def test_a_view_outlives_its_model() -> None:
    model, x = vit(), torch.randn(1, 3, 32, 32)
    view = anypatch.at(model, 16)
    before = view(x)
    del model
    gc.collect()
    assert torch.equal(view(x), before)


def test_a_view_goes_on_after_there_and_back() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1).eval()
    same = anypatch.at(model)
    anypatch.adapt(model, 32)
    anypatch.adapt(model, 16)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(same(x), model(x))


# -- functions that somebody put in the place of methods ------------------------------------------------------------

PATCHED = vit()


def in_globals(*args: Any) -> Tensor:
    return type(PATCHED).forward(PATCHED, *args)


def replaced(kind: str) -> Any:
    model = copy.deepcopy(PATCHED)
    old = model.forward

    def closing(x: Tensor) -> Tensor:
        return old(x)

    def method(self: nn.Module, x: Tensor) -> Tensor:
        return old(x)

    if kind == "closure":
        model.forward = closing
    elif kind == "method":
        model.forward = types.MethodType(method, model)
    elif kind == "default":
        model.forward = lambda x, model=model: type(model).forward(model, x)
    elif kind == "decorated":
        model.forward = torch.no_grad()(functools.wraps(old)(closing))
    elif kind == "compiled":
        model.forward = torch.compile(model.forward, backend="eager")
    elif kind == "part":
        stem = model.patch_embed.forward
        model.patch_embed.forward = lambda *args: stem(*args)
    return model


@pytest.mark.parametrize(
    "kind", ["closure", "method", "default", "decorated", pytest.param("compiled", marks=pytest.mark.slow), "part"]
)
def test_a_function_in_the_place_of_a_method_runs_the_view(kind: str) -> None:
    model = replaced(kind)
    view, other = anypatch.at(model, 16), adapted(PATCHED, 16)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(view(x), other(x))
        torch.testing.assert_close(model(x), PATCHED(x))


def test_so_does_one_that_names_the_model() -> None:
    other = adapted(PATCHED, 16)
    PATCHED.forward = in_globals
    try:
        view = anypatch.at(PATCHED, 16)
    finally:
        del PATCHED.forward
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(view(x), other(x))


def test_a_rehearsal_does_not_run_the_model_through_a_function_of_its_own() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.calls = vit(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.model(x)

    model = Counting()
    old = model.forward
    model.forward = lambda x: old(x)
    anypatch.adapt(model, 16)
    assert model.calls == 0
    assert model(torch.randn(1, 3, 32, 32)).shape[0] == model.calls


@pytest.mark.parametrize("kind", ["closure", "default", "part"])
def test_check_is_of_a_copy_that_runs_itself(kind: str) -> None:
    model = replaced(kind)
    seen: list[int] = []
    model.blocks[0].register_forward_hook(lambda module, *_: seen.append(id(module)))
    assert anypatch.check(model, 16).passed
    assert id(model.blocks[0]) not in seen


@pytest.mark.parametrize("layer", ["patch_embed.proj", "blocks.0.attn.qkv"])
@pytest.mark.parametrize(
    "compute",
    [lambda m: prune.l1_unstructured(m, "weight", 0.5), weight_norm, spectral_norm],
    ids=["prune", "wn", "sn"],
)
def test_a_view_says_that_a_parameter_was_put_in_the_place_of_another(
    layer: str, compute: Callable[[Any], Any]
) -> None:
    """Pruning and norms take the parameter away that a view reads, and keep others."""
    model = vit()
    view = anypatch.at(model, 16, keep="grid")
    compute(model.get_submodule(layer))
    with pytest.raises(UnsupportedModelError, match=r"weight.* was replaced, added or taken away since this view"):
        view(torch.rand(1, 3, 64, 64))


RESTRUCTURED: dict[str, Callable[[Any], Any]] = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "bias": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "by hand": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", nn.Dropout(0.5)),
    "old weight norm": weight_norm,
    "old spectral norm": spectral_norm,
}


@pytest.mark.parametrize("layer", ["patch_embed.proj", "blocks.0.attn.qkv"])
@pytest.mark.parametrize("how", RESTRUCTURED)
def test_what_is_laid_over_a_views_layers_is_for_the_model(layer: str, how: str) -> None:
    """It was taken out of the model, whose next run was an AttributeError of torch's."""
    model, image = vit(), torch.rand(1, 3, 32, 32)
    view = anypatch.at(model, 16)
    names, order = list(model.state_dict()), [id(p) for p in model.parameters()]
    wanted, kinds = [model(image), view(image)], [type(module) for module in view.modules()]
    with pytest.raises(UnsupportedModelError, match=r"model"):
        RESTRUCTURED[how](view.get_submodule(layer))
    assert list(model.state_dict()) == list(view.state_dict()) == names
    assert [id(p) for p in model.parameters()] == [id(p) for p in view.parameters()] == order
    assert [type(module) for module in view.modules()] == kinds
    assert torch.equal(model(image), wanted[0])
    assert torch.equal(view(image), wanted[1])
    RESTRUCTURED[how](model.blocks[0].attn.qkv)  # as it says
    assert anypatch.at(model, 16)(image).shape == wanted[1].shape


def _half(layer: nn.Module) -> None:
    """A parametrization that changes what is computed each time it is laid over."""

    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    nn.utils.parametrize.register_parametrization(layer, "weight", Half())


def _parametrization(layer: nn.Module) -> None:
    nn.utils.parametrize.remove_parametrizations(layer, "weight")


LAID: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "prune": (RESTRUCTURED["prune"], lambda layer: prune.remove(layer, "weight")),
    "by hand": (_half, _parametrization),
    "weight norm": (nn.utils.parametrizations.weight_norm, _parametrization),
    "old weight norm": (weight_norm, nn.utils.remove_weight_norm),
    "old spectral norm": (spectral_norm, nn.utils.remove_spectral_norm),
}


@pytest.mark.parametrize("how", LAID)
def test_what_lies_over_the_models_layers_is_taken_off_there(how: str) -> None:
    """Taken off through a view, it left the model without its parameters, or with others than the view."""
    lay, take_off = LAID[how]
    model, image = vit(), torch.rand(1, 3, 32, 32)
    lay(model.blocks[0].attn.qkv)
    model.eval()
    view, state = anypatch.at(model, 16), {k: v.clone() for k, v in model.state_dict().items()}
    wanted, text = [model(image), view(image)], repr(view)
    with pytest.raises(UnsupportedModelError, match="take that off the layers of the model, then take a view"):
        take_off(view.blocks[0].attn.qkv)
    assert text == repr(view)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert list(view.state_dict()) == list(model.state_dict()) == list(state)
    assert torch.equal(model(image), wanted[0])
    assert torch.equal(view(image), wanted[1])
    take_off(model.blocks[0].attn.qkv)  # as it says
    torch.testing.assert_close(anypatch.at(model, 16)(image), wanted[1])


def test_what_lies_over_the_layers_of_a_views_copy_is_its_own() -> None:
    model, image = vit(), torch.rand(1, 3, 32, 32)
    for block, how in zip(model.blocks, ("prune", "by hand"), strict=False):
        LAID[how][0](block.attn.qkv)
    other = copy.deepcopy(anypatch.at(model, 16))
    wanted = other(image)
    assert nn.utils.parametrize.is_parametrized(other.blocks[1].attn.qkv, "weight")
    for block, how in zip(other.blocks, ("prune", "by hand"), strict=False):
        LAID[how][1](block.attn.qkv)
    torch.testing.assert_close(other(image), wanted)
    assert type(other.blocks[0].attn.qkv) is nn.Linear
    assert anypatch.geometry(anypatch.at(model, 16)).patch_size == (16, 16)


def test_values_that_torch_lost_on_the_way_are_said() -> None:
    """``orthogonal`` writes its factors where the weight was, before there is anything to notice."""
    view = anypatch.at(model := vit(), 16)
    with pytest.raises(UnsupportedModelError, match="load them"):
        nn.utils.parametrizations.orthogonal(view.blocks[0].attn.proj)
    assert isinstance(model.blocks[0].attn.proj.weight, nn.Parameter)


@pytest.mark.parametrize("layer", ["patch_embed.proj", "blocks.0.attn.qkv"])
def test_parameters_with_a_view_can_be_swapped(layer: str) -> None:
    """``torch.utils.swap_tensors`` takes none that somebody refers to weakly; torch moves models with it on request."""
    model, image = vit(), torch.rand(1, 3, 32, 32)
    view = anypatch.at(model, 16)
    weight = model.get_submodule(layer).weight
    torch.utils.swap_tensors(weight, nn.Parameter(torch.randn_like(weight)))
    with torch.no_grad():
        assert torch.equal(view(image), adapted(model, 16)(image))


def test_a_views_own_layers_are_its_own() -> None:
    """Layers that replace others, and those of a copy, may be laid over; the model is as it was."""
    model, image = vit(), torch.rand(1, 3, 32, 32)
    view = anypatch.at(model, 16)
    before = model(image)
    view.head = nn.utils.parametrizations.weight_norm(nn.Linear(model.num_features, 3))
    torch.testing.assert_close(view(image), view.head(view.forward_head(view.forward_features(image), pre_logits=True)))
    other = copy.deepcopy(view)
    nn.utils.parametrizations.weight_norm(other.blocks[0].attn.qkv)
    torch.testing.assert_close(other(image), view(image))
    assert torch.equal(model(image), before)


def test_adapters_in_a_view() -> None:
    """PEFT makes more layers of the class of that which it wraps; a view's stem has one of its own."""
    peft = pytest.importorskip("peft")
    model, image = vit(), torch.rand(1, 3, 32, 32)
    view = anypatch.at(model, 16)
    before = [model(image), view(image)]
    lora = peft.get_peft_model(view, peft.LoraConfig(target_modules=["proj", "qkv"], init_lora_weights=False))
    assert torch.equal(model(image), before[0])
    assert not torch.allclose(lora(image), before[1], atol=1e-4)
    with lora.disable_adapter():
        assert torch.equal(lora(image), before[1])


def test_a_view_runs_with_a_parameter_that_was_added_to_its_model() -> None:
    model = vit()
    view, image = anypatch.at(model, 16, keep="grid"), torch.rand(1, 3, 64, 64)
    before = view(image)
    model.norm.scale = nn.Parameter(torch.tensor(2.0))
    torch.testing.assert_close(view(image), before)
    assert view.norm.scale is model.norm.scale
