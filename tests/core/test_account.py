"""Nothing in a live model goes unexplained: followed with the right value, or refused by name and nothing changed."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import anypatch
from anypatch import GeometryError, UnsupportedModelError


def vit(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    arguments = {"img_size": 64, "depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 0, **kwargs}
    model = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    nn.init.normal_(model.pos_embed)
    return model


def windowed(**kwargs: Any) -> Any:
    """A model with relative tables inside its attention."""
    arguments = {"img_size": 64, "depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 0, **kwargs}
    model = timm.create_model("beit_base_patch16_224", **arguments).eval()
    for block in model.blocks:
        nn.init.normal_(block.attn.relative_position_bias_table)
    return model


def tokens_to_map(backbone: Any, x: torch.Tensor) -> torch.Tensor:
    h, w = backbone.patch_embed.grid_size
    return backbone.forward_features(x)[:, backbone.num_prefix_tokens :].mT.reshape(len(x), -1, h, w)


def state_of(model: nn.Module) -> list[Any]:
    found: list[Any] = []
    for module in model.modules():
        hidden = vars(nn.Module())
        found.append({k: repr(v) for k, v in vars(module).items() if k not in hidden})
        found += [
            (n, t.detach().clone()) for n, t in [*module._parameters.items(), *module._buffers.items()] if t is not None
        ]
    return found


def refused(model: nn.Module, match: str, *, error: type[Exception] = UnsupportedModelError, **sizes: Any) -> None:
    """adapt raises an error that matches, and leaves the model as it was."""
    before = state_of(model)
    with pytest.raises(error, match=match):
        anypatch.adapt(model, **(sizes or {"patch_size": 32, "keep": "grid"}))
    after = state_of(model)
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        if isinstance(a, tuple):
            assert a[0] == b[0]
            assert torch.equal(a[1].nan_to_num(), b[1].nan_to_num())
        else:
            assert a == b


# -- a module of the user's that knows the patch -----------------------------------------------------------------


class Seg(nn.Module):
    def __init__(self, name: str = "patch_size", value: Any = 16) -> None:
        super().__init__()
        setattr(self, name, value)
        self.name = name
        self.backbone, self.head = vit(), nn.Conv2d(48, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(self.head(tokens_to_map(self.backbone, x)), scale_factor=getattr(self, self.name))


@pytest.mark.parametrize("name", ["patch_size", "stride", "upsample_factor", "scale_factor", "output_stride", "p"])
def test_a_wrapper_that_knows_the_patch_follows(name: str) -> None:
    model = anypatch.adapt(Seg(name).eval(), 32, keep="grid")
    assert getattr(model, name) == 32
    assert model(torch.randn(1, 3, 128, 128)).shape == (1, 4, 128, 128)


@pytest.mark.parametrize("value", [(16, 16), [16, 16], 16.0])
def test_in_whatever_form(value: Any) -> None:
    model = anypatch.adapt(Seg("stride", value).eval(), 32, keep="grid")
    assert model.stride == type(value)([32, 32]) if not isinstance(value, float) else 32.0


@pytest.mark.parametrize(
    ("name", "value", "after"),
    [
        ("img_size", 64, 96), ("input_shape", (3, 64, 64), (3, 96, 96)), ("target_size", [64, 64], [96, 96]),
        ("grid", (4, 4), (6, 6)), ("h", 4, 6), ("num_tokens", 17, 37), ("seq_len", 16, 36), ("feat_size", 4, 6),
        ("tokens_per_side", 4, 6), ("hparams", {"img_size": 64, "lr": 0.1}, {"img_size": 96, "lr": 0.1}),
        ("cfg", types.SimpleNamespace(image_size=64, name="x"), types.SimpleNamespace(image_size=96, name="x")),
        ("num_classes", 16, 16), ("dim", 64, 64), ("num_heads", 4, 4), ("vocab_size", 64, 64), ("batch_size", 16, 16),
        ("width", 64, 64), ("reduction", 16, 16), ("mlp_ratio", 4, 4),
    ],
)  # fmt: skip
def test_sizes_grids_and_counts_follow_by_their_names(name: str, value: Any, after: Any) -> None:
    model = Seg("patch_size")
    setattr(model, name, copy.deepcopy(value))
    anypatch.adapt(model, image_size=96)
    assert getattr(model, name) == after
    assert model.patch_size == 16


def test_settings_that_a_model_shares_with_others_are_not_changed_under_them() -> None:
    shared = {"patch_size": 16, "epochs": 3}
    model, other = Seg("settings", shared), nn.Module()
    other.settings = shared
    anypatch.adapt(model, 32, keep="grid")
    assert model.settings == {"patch_size": 32, "epochs": 3}
    assert other.settings == {"patch_size": 16, "epochs": 3}


def test_one_number_cannot_become_two() -> None:
    refused(Seg(), "patch_size is one number for both axes", error=GeometryError, patch_size=(16, 32), keep="grid")


class Headed(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = vit(), head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(tokens_to_map(self.backbone, x))


@pytest.mark.parametrize(
    "head",
    [
        lambda: nn.Upsample(scale_factor=16), lambda: nn.UpsamplingBilinear2d(scale_factor=16),
        lambda: nn.Upsample(size=(64, 64)), lambda: nn.Upsample(size=64),
        lambda: nn.ConvTranspose2d(48, 3, 16, 16), lambda: nn.Sequential(nn.Conv2d(48, 512, 1), nn.PixelShuffle(16)),
    ],
)  # fmt: skip
def test_heads_that_bring_tokens_back_to_pixels_follow(head: Callable[[], nn.Module]) -> None:
    model = Headed(head()).eval()
    x = torch.randn(1, 3, 64, 64)
    assert model(x).shape[-2:] == (64, 64)
    anypatch.adapt(model, 32, keep="grid")
    assert model(F.interpolate(x, scale_factor=2)).shape[-2:] == (128, 128)


def test_a_transposed_convolution_paints_larger_patches() -> None:
    model = Headed(nn.ConvTranspose2d(48, 3, 16, 16)).eval()
    before = model.head.weight.detach().clone()
    anypatch.adapt(model, 32, keep="grid")
    expected = F.interpolate(before, (32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(model.head.weight, expected, rtol=1e-4, atol=1e-5)


def test_a_shuffled_head_paints_larger_patches() -> None:
    model = Headed(nn.Sequential(nn.Conv2d(48, 512, 1), nn.PixelShuffle(16))).eval()
    weight = model.head[0].weight.detach().clone()  # (2 * 16 * 16, 48, 1, 1)
    anypatch.adapt(model, 32, keep="grid")
    image = weight.reshape(2, 16, 16, 48).permute(0, 3, 1, 2)
    expected = (
        F.interpolate(image, (32, 32), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(2048, 48, 1, 1)
    )
    torch.testing.assert_close(model.head[0].weight, expected, rtol=1e-4, atol=1e-5)
    assert model.head[0].out_channels == 2048
    assert model.head[0].bias.shape == (2048,)


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (lambda: nn.Sequential(nn.Conv2d(48, 512, 1), nn.GELU(), nn.PixelShuffle(16)), r"head\.2 \(PixelShuffle\)"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(48, 8, 4, 4), nn.ConvTranspose2d(8, 3, 4, 4)), "head upsamples"),
        (lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=8)), "head upsamples"),
        (lambda: nn.ConvTranspose2d(48, 3, 20, 16, padding=2), r"head \(ConvTranspose2d\) paints patches that overlap"),
        (lambda: nn.Fold((64, 64), 16, stride=16), r"head \(Fold\)"),
        (lambda: nn.Unfold(16, stride=16), r"head \(Unfold\)"),
        (lambda: nn.Linear(16 * 16, 7), r"head \(Linear\) reads flattened patches"),
    ],
)  # fmt: skip
def test_heads_that_cannot_follow_are_refused_by_name(head: Callable[[], nn.Module], match: str) -> None:
    refused(Headed(head()), match)


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (lambda: nn.Linear(16, 5), r"head \(Linear\) mixes a fixed number of tokens \(16\)"),
        (lambda: nn.Linear(17, 5), r"head \(Linear\) mixes a fixed number of tokens \(17\)"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16 * 48, 5)), r"head\.1 \(Linear\) reads all 16 tokens"),
        (lambda: nn.Conv1d(16, 5, 1), r"head\.weight .*number of tokens"),
        (lambda: nn.LayerNorm((48, 4, 4)), r"head\.bias .*size of the grid"),
        (lambda: nn.Conv2d(48, 5, 4), r"head \(Conv2d\) has a kernel as large as the grid"),
    ],
)  # fmt: skip
def test_heads_over_a_fixed_number_of_tokens_are_refused_by_name(head: Callable[[], nn.Module], match: str) -> None:
    refused(Headed(head()), match, image_size=96)
    anypatch.adapt(Headed(head()), 32, keep="grid")  # the number of tokens stays


def test_a_table_of_the_wrappers_own_follows() -> None:
    model = Headed(nn.Identity())
    model.pos_embed = nn.Parameter(torch.randn(1, 16, 48))
    model.register_buffer("position_table", torch.randn(1, 48, 4, 4))
    before, buffer = model.pos_embed.detach().clone(), model.position_table.clone()
    anypatch.adapt(model, image_size=96)
    expected = F.interpolate(before.mT.reshape(1, 48, 4, 4), (6, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(model.pos_embed, expected.flatten(2).mT)
    torch.testing.assert_close(
        model.position_table, F.interpolate(buffer, (6, 6), mode="bicubic", antialias=True), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(1, 16, 48), (17, 48), (48, 4, 4), (3, 64, 64)])
@pytest.mark.parametrize("kind", ["parameter", "buffer", "plain"])
def test_tensors_without_a_name_that_tells_are_refused(shape: tuple[int, ...], kind: str) -> None:
    model, tensor = Headed(nn.Identity()), torch.randn(shape)
    if kind == "buffer":
        model.register_buffer("bias", tensor)
    else:
        model.bias = nn.Parameter(tensor) if kind == "parameter" else tensor
    refused(model, r"bias has the (number of tokens|size of the (grid|image))", image_size=96)


# -- more than one stem ------------------------------------------------------------------------------------------


class RGBD(nn.Module):
    def __init__(self, rgb: Any) -> None:
        super().__init__()
        self.proj, self.depth = rgb.proj, nn.Conv2d(1, 48, 16, 16)
        self.img_size, self.grid_size = rgb.img_size, rgb.grid_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.proj(x[:, :3]) + self.depth(x[:, 3:])).flatten(2).mT


def test_a_second_stem_follows_with_the_first() -> None:
    model = vit()
    model.patch_embed = RGBD(model.patch_embed)
    x = torch.randn(1, 4, 64, 64)
    expected = model(x)
    anypatch.adapt(model, 32, keep="grid", kernel="pi")
    assert model.patch_embed.depth.kernel_size == model.patch_embed.depth.stride == (32, 32)
    from anypatch.core.kernels import Pi
    from anypatch.proof import enlarge

    torch.testing.assert_close(model(enlarge(x, (16, 16), (32, 32), Pi())), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("conv", [lambda: nn.Conv2d(2, 48, 16, 16), lambda: nn.Conv2d(12, 48, 16, 16)])
def test_a_stem_outside_the_model_follows(conv: Callable[[], nn.Module]) -> None:
    model = Headed(nn.Identity())
    model.radar = conv()
    anypatch.adapt(model, 32, keep="grid")
    assert model.radar.weight.shape[-2:] == (32, 32)


def test_an_overlapping_second_stem_is_refused() -> None:
    model = Headed(nn.Identity())
    model.radar = nn.Conv2d(2, 48, 20, 16, padding=2)
    refused(model, r"radar \(Conv2d\) has the patch as its kernel or stride")


# -- tensors that are not where the twin has them ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["buffer", "plain"])
def test_a_frozen_table_is_resampled(kind: str) -> None:
    free, frozen = vit(), vit()
    table = frozen.pos_embed.detach().clone()
    del frozen.pos_embed
    if kind == "buffer":
        frozen.register_buffer("pos_embed", table)
    else:
        frozen.pos_embed = table
    anypatch.adapt(free, image_size=96)
    anypatch.adapt(frozen, image_size=96)
    assert torch.equal(frozen.pos_embed, free.pos_embed)
    assert ("pos_embed" in frozen._buffers) == (kind == "buffer")
    frozen(torch.randn(1, 3, 96, 96))


def test_a_frozen_relative_table_is_resampled() -> None:
    free, frozen = windowed(), windowed()
    frozen.load_state_dict(free.state_dict())
    attention = frozen.blocks[0].attn
    table = attention.relative_position_bias_table.detach()
    del attention.relative_position_bias_table
    attention.register_buffer("relative_position_bias_table", table)
    for model in (free, frozen):
        anypatch.adapt(model, image_size=96)
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():  # a bias without gradient goes through another kernel of attention
        assert torch.equal(free(x), frozen(x))


EAGER = functools.partial(torch.compile, backend="eager")


class Around(nn.Module):
    """A user's module around a layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    "wrap", [Around, lambda m: Around(Around(m)), nn.Sequential, functools.partial(torch.compile, backend="eager")]
)
def test_a_wrapped_attention_is_looked_through(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain, wrapped = windowed(), windowed()
    wrapped.load_state_dict(plain.state_dict())
    wrapped.blocks[0].attn = wrap(wrapped.blocks[0].attn)
    wrapped_block = wrap is not nn.Sequential
    for model in (plain, wrapped):
        anypatch.adapt(model, image_size=96)
    tables = [next(t for n, t in m.named_parameters() if "relative_position_bias_table" in n) for m in (plain, wrapped)]
    assert torch.equal(*tables)
    if wrapped_block:
        x = torch.randn(1, 3, 96, 96)
        assert torch.equal(plain(x), wrapped(x))


def test_a_wrapped_projection_is_looked_through() -> None:
    model = vit()
    model.patch_embed.proj = Around(model.patch_embed.proj)
    anypatch.adapt(model, 32, keep="grid")
    assert model.patch_embed.proj.inner.weight.shape == (48, 3, 32, 32)
    model(torch.randn(1, 3, 128, 128))


def test_a_wrapper_with_weights_of_its_own_over_the_projection_is_refused() -> None:
    model = vit()
    model.patch_embed.proj = Around(model.patch_embed.proj)
    model.patch_embed.proj.scale = nn.Parameter(torch.ones(48, 1, 1))
    refused(model, r"patch_embed\.proj\.weight changes, and Around over it computes with scale")


@pytest.mark.parametrize(
    ("alter", "match"),
    [
        (lambda m: prune.l1_unstructured(m, "pos_embed", 3), "pos_embed is pruned"),
        (lambda m: weight_norm(m, "pos_embed"), "pos_embed is weight-normed"),
        (lambda m: parametrizations.weight_norm(m, "pos_embed"), "pos_embed is parametrized"),
    ],
)
def test_tables_that_are_computed_from_others_are_refused(alter: Callable[[Any], Any], match: str) -> None:
    model = vit()
    alter(model)
    refused(model, match, image_size=96)


@pytest.mark.parametrize(
    ("alter", "match"),
    [
        (lambda m: prune.random_unstructured(m, "weight", 3), r"proj\.weight is pruned"),
        (weight_norm, r"proj\.weight is weight-normed"),
        (spectral_norm, r"proj\.weight is spectrally normed"),
        (parametrizations.spectral_norm, r"proj\.weight is parametrized"),
        (parametrizations.orthogonal, r"proj\.weight is parametrized"),
    ],
)
def test_projections_that_are_computed_from_others_are_refused(alter: Callable[[Any], Any], match: str) -> None:
    model = vit()
    alter(model.patch_embed.proj)
    refused(model, match)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.proj.weight"])
def test_values_that_would_spread_are_refused(name: str, value: float) -> None:
    model = vit()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[5] = value
    refused(model, rf"{name} has 1 NaN or infinite values", patch_size=32, image_size=96)


# -- adapters ----------------------------------------------------------------------------------------------------


def peft_configs() -> dict[str, Any]:
    import peft

    target = {"target_modules": ["proj"]}
    return {
        "dora": peft.LoraConfig(**target, use_dora=True),
        "loha": peft.LoHaConfig(**target),
        "loha effective": peft.LoHaConfig(**target, use_effective_conv2d=True),
        "lokr": peft.LoKrConfig(**target),
        "oft": peft.OFTConfig(**target, oft_block_size=3, r=0),
        "boft": peft.BOFTConfig(**target, boft_block_size=3),
        "hra": peft.HRAConfig(**target),
    }


@pytest.mark.parametrize("name", ["dora", "loha", "loha effective", "lokr", "oft", "boft", "hra"])
def test_adapters_that_compute_with_the_kernel_are_refused(name: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft_configs()[name]
    config.target_modules = r"patch_embed\.proj"
    try:
        model = peft.get_peft_model(vit(), config)
    except Exception as error:
        pytest.skip(f"this peft does not put {name} on a convolution: {error}")
    refused(model, r"patch_embed\.proj\.weight changes, and \w+ over it computes with")


@pytest.mark.parametrize("kind", ["lora", "ia3", "lora with bias"])
def test_adapters_that_are_exact_stay_so(kind: str) -> None:
    peft = pytest.importorskip("peft")
    target = r"patch_embed\.proj"
    config = {
        "lora": lambda: peft.LoraConfig(target_modules=target, init_lora_weights=False),
        "ia3": lambda: peft.IA3Config(target_modules=target, feedforward_modules=[], init_ia3_weights=False),
        "lora with bias": lambda: peft.LoraConfig(target_modules=target, init_lora_weights=False, lora_bias=True),
    }[kind]()
    assert anypatch.check(peft.get_peft_model(vit(), config), 32).passed


def test_adapters_elsewhere_do_not_matter() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["qkv"], use_dora=True, modules_to_save=["norm"])
    model = peft.get_peft_model(vit(), config)
    anypatch.adapt(model, 32, image_size=96)
    model(torch.randn(1, 3, 96, 96))


# -- functions ---------------------------------------------------------------------------------------------------


def closing_over(patch_size: int) -> Callable[..., Any]:
    return lambda module, inputs, output: output * patch_size


@pytest.mark.parametrize("where", ["hook", "hook of the wrapper", "attribute", "partial", "default"])
def test_functions_that_close_over_the_patch_are_refused(where: str) -> None:
    model = Headed(nn.Identity())
    if where == "hook":
        model.backbone.blocks[0].register_forward_hook(closing_over(16))
    elif where == "hook of the wrapper":
        model.register_forward_hook(closing_over(16))
    elif where == "attribute":
        model.post = closing_over(16)
    elif where == "partial":
        model.post = functools.partial(F.interpolate, scale_factor=16)
    else:
        model.post = lambda x, stride=16: F.interpolate(x, scale_factor=stride)
    refused(model, r"closes over (patch_size|scale_factor|stride) = 16")
    anypatch.adapt(model, image_size=96)


# -- what works, stays -------------------------------------------------------------------------------------------


class Normalise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.mean


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(Normalise(), vit()),
        lambda: nn.Sequential(vit(), nn.Linear(48, 17)),
        lambda: nn.DataParallel(vit()),
        lambda: Around(vit()),
        lambda: torch.compile(vit(), backend="eager"),
        lambda: timm.utils.ModelEmaV2(vit()),
    ],
)
def test_models_around_models(build: Callable[[], Any]) -> None:
    model = anypatch.adapt(build(), 32, image_size=96)
    assert anypatch.geometry(model).grid == (3, 3)


@pytest.mark.parametrize(
    "alter",
    [
        lambda m: setattr(m, "head", nn.Linear(48, 17)),  # as many classes as tokens
        lambda m: setattr(m, "head", nn.Sequential(nn.Dropout(0.1), nn.Linear(48, 16))),
        lambda m: setattr(m, "norm", nn.Identity()),
        lambda m: setattr(m, "blocks", m.blocks[:1]),
        lambda m: m.blocks.append(copy.deepcopy(m.blocks[0])),
        lambda m: setattr(m, "blocks", nn.Sequential(*(Around(b) for b in m.blocks))),
        lambda m: setattr(m, "pos_embed", None),
        lambda m: setattr(m, "epoch", 16),
    ],
)
def test_altered_models(alter: Callable[[Any], Any]) -> None:
    model = vit(depth=2)
    alter(model)
    anypatch.adapt(model, 32, image_size=96)
    model(torch.randn(1, 3, 96, 96))


@pytest.mark.parametrize(
    ("image", "sizes"), [(112, "96x96 or 128x128"), ((64, 112), "64x96 or 64x128"), (16, "32x32 or 32x32")]
)
def test_a_grid_that_a_merging_layer_does_not_divide_is_refused(image: Any, sizes: str) -> None:
    model = timm.create_model("qwen3_vit_88m_merge", depth=1, num_classes=3).eval()
    refused(model, rf"merges 2 x 2 tokens.* such as {sizes}", error=GeometryError, image_size=image)
    anypatch.adapt(model, image_size=96)
    model(torch.randn(1, 3, 96, 96))


GEMMA: dict[str, Any] = {"depth": 1, "embed_dim": 32, "num_heads": 2, "head_dim": 16, "position_embedding_size": 16}


@pytest.mark.parametrize(
    ("name", "arguments", "merges"),
    [
        ("gemma4_vit_167m_enc", {}, True),
        ("gemma4_vit_167m", {"encoder_pool": "soft"}, True),
        ("gemma4_vit_167m", {"encoder_pool": ""}, False),
    ],
)
def test_so_is_one_that_a_pooling_of_tokens_does_not_divide(name: str, arguments: dict[str, Any], merges: bool) -> None:
    model = timm.create_model(name, img_size=96, **GEMMA, **arguments).eval()
    if merges:
        refused(model, r"merges 3 x 3 tokens.* such as 96x96 or 144x144", error=GeometryError, image_size=128)
    size = 144 if merges else 128
    anypatch.adapt(model, image_size=size)
    assert torch.isfinite(model(torch.randn(1, 3, size, size))).all()


# -- numbers that coincide with the geometry ---------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [16, 17, 256, 768])
def test_hidden_widths_that_coincide_with_the_geometry(hidden: int) -> None:
    """16 patches, 17 tokens, 256 and 768 values in a patch of one or three channels: between two layers, a width."""
    for sizes in ({"patch_size": 32, "keep": "grid"}, {"image_size": 96}):
        model = Headed(nn.Identity())
        model.mlp = nn.Sequential(nn.Linear(48, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, 7))
        model.queue = nn.Parameter(torch.zeros(hidden, 50))
        anypatch.adapt(model, **sizes)


def test_features_of_several_kinds_side_by_side() -> None:
    model = Headed(nn.Linear(768, 10))  # class token and mean of a width of 384: 3 * 16 * 16, too
    model.backbone = vit(embed_dim=384)
    anypatch.adapt(model, 32)
    model.head = nn.Linear(3 * 32 * 32, 384)  # patches into tokens
    refused(model, "reads flattened patches", patch_size=16)


def test_a_table_whose_length_is_also_a_width_is_refused() -> None:
    model = Headed(nn.Identity())
    model.mlp = nn.Sequential(nn.Linear(48, 16), nn.Linear(16, 7))
    model.bias = nn.Parameter(torch.zeros(1, 16, 48))
    refused(model, "bias has the number of tokens", image_size=96)


class Pooling(nn.Module):
    """Attention as people write it: ``scale`` is one over the root of the width of a head, ``h`` their number."""

    def __init__(self, **values: Any) -> None:
        super().__init__()
        self.h, self.scale, self.head_dim = 4, 64**-0.5, 64
        self.backbone, self.qkv = vit(img_size=32, patch_size=8), nn.Linear(48, 768)


def test_attention_of_the_users_own_keeps_its_scale_and_heads() -> None:
    model = anypatch.adapt(Pooling(), 16, image_size=96)
    assert (model.h, model.scale) == (4, 0.125)
    model = Seg("scale", 1 / 16)  # of image coordinates to the map
    assert anypatch.adapt(model, 32, keep="grid").scale == 1 / 32


@pytest.mark.parametrize(
    "hparams",
    [{"max_length": 17, "tokenizer": "x"}, {"text_len": 16}, {"max_text_tokens": 16, "max_len": 16}, {"width": 64}],
)
def test_lengths_of_sentences_stay(hparams: dict[str, Any]) -> None:
    model = Seg("hparams", dict(hparams))
    anypatch.adapt(model, image_size=96)
    assert model.hparams == hparams


def test_a_hook_that_closes_over_numbers_that_happen_to_be_sizes() -> None:
    model, log = vit(), []
    width, layers, batch, k = 64, 4, 16, 17

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        log.append((width, layers, batch, k))

    model.blocks[0].register_forward_hook(hook)
    anypatch.adapt(model, 32, image_size=96, kernel="pi")
    model(torch.zeros(1, 3, 96, 96))
    assert log == [(64, 4, 16, 17)]
