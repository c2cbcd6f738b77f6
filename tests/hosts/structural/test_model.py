"""Hand-made models and torch.hub layouts: exactness, independent references, attributes, refusals, saving."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anypatch
from anypatch import DataError
from anypatch.measure.zeroshot import text_features
from hub_models import (
    Attention,
    Block,
    Dino,
    DinoV2,
    HandMade,
    MaskedAutoencoder,
    PairPatchEmbed,
    TwoTowers,
    Video,
    WindowedMap,
)

MODELS = {
    "dino": (Dino, (12, 16)),
    "dinov2": (DinoV2, (16, 28)),
    "mae": (MaskedAutoencoder, (12, (16, 10))),
    "two towers": (TwoTowers, (12,)),
    "windowed map": (WindowedMap, (12, 16)),
    "video": (Video, ((3, 12, 12), (2, 12, 12))),
    "video, separate tables": (lambda: Video(joint=False), ((2, 16, 16), 12)),
    **{
        f"hand-made {t}": (lambda t=t: HandMade(table=t), ((6, 9), 9)) for t in ("embedding", "buffer", "plain", "none")
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_exact_when_the_patch_grows(name):
    build, patches = MODELS[name]
    for patch in patches:
        assert anypatch.check(build().eval(), patch).error < 1e-4


def grid_of(table: torch.Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int) -> torch.Tensor:
    """An independent interpolation of a ``(1, prefix + grid, dim)`` table."""
    grid = table[:, prefix:].transpose(1, 2).unflatten(2, old)
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True)
    return torch.cat([table[:, :prefix], grid.flatten(2).transpose(1, 2)], 1)


def kernel_of(kernel: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    old = kernel.shape[-2:]
    new = F.interpolate(kernel, size=size, mode="bicubic", antialias=True)
    return new * (old[0] * old[1] / (size[0] * size[1]))


def plain_attributes(model: nn.Module) -> dict:
    hidden = set(vars(nn.Module()))
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in hidden and not isinstance(value, torch.Tensor)
    }


@pytest.mark.parametrize(
    ("name", "patch", "image"),
    [("dino", 4, 32), ("dino", 16, 48), ("dino", 8, 64), ("dinov2", 7, 56), ("dinov2", 16, 64), ("dinov2", 14, 42)],
)
def test_another_grid_equals_a_model_built_there(name, patch, image):
    cls = MODELS[name][0]
    model = cls().eval()
    old = anypatch.geometry(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    anypatch.adapt(model, patch, image, kernel="bicubic")

    reference = cls(image, patch).eval()
    side = image // patch
    state["pos_embed"] = grid_of(state["pos_embed"], old.grid, (side, side), 1)
    if (patch, patch) != old.patch_size:
        state["patch_embed.proj.weight"] = kernel_of(state["patch_embed.proj.weight"], (patch, patch))
    reference.load_state_dict(state)
    x = torch.randn(2, 3, image, image)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-4)
    assert plain_attributes(model) == plain_attributes(reference)
    bigger = torch.randn(1, 3, image + 2 * patch, image + 2 * patch)
    torch.testing.assert_close(model(bigger), reference(bigger), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["h w c", "c h w"])
@pytest.mark.parametrize(("patch", "image"), [((4, 8), (32, 48)), (16, 32), (8, (16, 48))])
def test_masked_autoencoder_follows_with_its_pixel_head(order, patch, image):
    model = MaskedAutoencoder(order=order).eval()
    old = copy.deepcopy(model)
    anypatch.adapt(model, patch, image, kernel="bicubic")
    reference = MaskedAutoencoder(image, patch, order=order).eval()
    state = old.state_dict()
    patch, grid = reference.patch_embed.patch_size, reference.patch_embed.patches_resolution
    for key in ("pos_embed", "decoder_pos_embed"):
        state[key] = grid_of(state[key], (4, 4), grid, 1)
    if patch != (8, 8):
        state["patch_embed.proj.weight"] = kernel_of(state["patch_embed.proj.weight"], patch)
    for key in ("decoder_pred.weight", "decoder_pred.bias"):
        rows = state[key].reshape(192, -1)
        image_axes = (8, 8, 3, -1) if order == "h w c" else (3, 8, 8, -1)
        picture = rows.reshape(image_axes).permute(*((2, 3, 0, 1) if order == "h w c" else (0, 3, 1, 2)))
        if patch != (8, 8):
            picture = F.interpolate(picture, size=patch, mode="bicubic", antialias=True)
        back = picture.permute(*((2, 3, 0, 1) if order == "h w c" else (0, 2, 3, 1)))
        state[key] = back.reshape(patch[0] * patch[1] * 3, -1).squeeze(-1)
    reference.load_state_dict(state)
    assert plain_attributes(model) == plain_attributes(reference)
    x = torch.randn(2, 3, *reference.patch_embed.img_size)
    outputs = []
    for m in (model, reference):
        torch.manual_seed(1)
        outputs.append(m(x))
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("table", ["embedding", "buffer", "plain"])
def test_hand_made_positions_follow_wherever_they_are_kept(table):
    model = HandMade(table=table).eval()
    old = {
        "embedding": lambda m: m.position_embedding.weight[None],
        "buffer": lambda m: m.pos_embed.reshape(1, -1, 16),
        "plain": lambda m: m.pos_embed,
    }[table]
    before = old(model).detach().clone()
    anypatch.adapt(model, (8, 4), (48, 12))
    torch.testing.assert_close(old(model), grid_of(before, (6, 4), (6, 3), 0))
    assert model.config == {"image_size": [48, 12], "patch_size": [8, 4], "window": [4, 8], "layers": 1}
    assert (model.grid_size, model.num_patches, model.patch_size) == ((6, 3), 18, (8, 4))
    assert model.tubes == (4, 8)  # shares its tuple with patch_size, and does not follow it
    assert model(torch.randn(1, 1, 48, 12)).shape == (1, 16)


def test_grid_with_as_many_tokens_in_another_shape():
    model = HandMade(size=(24, 32), table="plain")
    before = model.pos_embed.clone()
    anypatch.adapt(model, image_size=(32, 24))  # 6 x 4 -> 8 x 3
    torch.testing.assert_close(model.pos_embed, grid_of(before, (6, 4), (8, 3), 0))


def test_video_tables_over_space_and_over_both():
    for joint in (True, False):
        model = Video(joint=joint)
        got = anypatch.geometry(model)
        assert (got.patch_size, got.image_size, got.grid) == ((2, 8, 8), (4, 32, 32), (2, 4, 4))
        before = model.pos_embed.detach().clone()
        anypatch.adapt(model, 16)
        steps = (2, -1) if joint else (1, -1)
        expected = [grid_of(part[None], (4, 4), (2, 2), 0) for part in before[0].unflatten(0, steps)]
        torch.testing.assert_close(model.pos_embed.detach(), torch.cat(expected, 1))
        assert (model.patch_size, model.tubelet_size, model.num_frames, model.img_size) == (16, 2, 4, 32)
    refuses(Video(joint=False), "temporal_embed", image_size=(8, 32, 32))


def test_relative_tables_of_the_grid_follow_and_those_of_a_window_stay():
    model = WindowedMap().eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert anypatch.geometry(model).prefix_tokens == 0
    anypatch.adapt(model, 4, kernel="bicubic")
    reference = WindowedMap(32, 4).eval()
    state["patch_embed.proj.weight"] = kernel_of(state["patch_embed.proj.weight"], (4, 4))
    state["pos_embed"] = grid_of(state["pos_embed"].flatten(1, 2), (4, 4), (8, 8), 0).unflatten(1, (8, 8))
    for key in ("blocks.1.attn.rel_pos_h", "blocks.1.attn.rel_pos_w"):
        state[key] = F.interpolate(state[key].T[None], size=15, mode="linear")[0].T
    reference.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-4)


def test_text_table_is_untouched_and_attributes_of_the_tower_follow():
    model = TwoTowers(patch_size=4, context_length=65)  # as long as the tower's table
    before = model.positional_embedding.detach().clone()
    model = TwoTowers(context_length=20)
    text = model.positional_embedding
    expected = text.detach().clone()
    anypatch.adapt(model, 4)
    assert model.positional_embedding is text
    assert torch.equal(text, expected)
    assert model.visual.positional_embedding.shape == (65, 32)
    anypatch.adapt(model, image_size=64)
    assert model.visual.input_resolution == 64
    assert before.shape == (65, 16)


class Recorder:
    """Holds what cannot be copied, as trainers do."""

    def __init__(self) -> None:
        self.lock, self.calls = threading.Lock(), 0

    def record(self, *_: object) -> None:
        self.calls += 1


def test_identity_hooks_and_training_state_survive():
    model = DinoV2()
    recorder = Recorder()
    model.blocks[0][0].register_forward_hook(recorder.record)
    model.pos_embed.requires_grad_(False)
    parameters = {k: id(v) for k, v in model.named_parameters()}
    anypatch.adapt(model, 7)
    assert {k: id(v) for k, v in model.named_parameters()} == parameters
    assert not model.pos_embed.requires_grad
    model(torch.randn(1, 3, 56, 56)).sum().backward()
    assert recorder.calls == 1
    assert model.patch_embed.proj.weight.grad.shape == (32, 3, 7, 7)


@pytest.mark.parametrize(
    ("build", "targets"), [(DinoV2, ["proj", "qkv"]), (MaskedAutoencoder, ["patch_embed.proj", "decoder_pred"])]
)
def test_adapters_over_the_projection_and_the_pixel_head_follow(build, targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(build(), config).eval()
    old = anypatch.geometry(model).patch_size[0]
    assert anypatch.check(model, 2 * old).error < 1e-4
    x = torch.randn(2, 3, 8 * old, 8 * old)
    anypatch.adapt(model, 2 * old, keep="grid")
    shapes = {k: tuple(v.shape) for k, v in model.named_parameters()}
    factor = next(v for k, v in shapes.items() if "patch_embed.proj.lora_A" in k)
    assert factor == (2, 3, 2 * old, 2 * old)
    if build is MaskedAutoencoder:
        assert next(v for k, v in shapes.items() if "decoder_pred.lora_B" in k) == (3 * (2 * old) ** 2, 2)
        assert model(x)[1].shape == (2, 16, 3 * (2 * old) ** 2)


def test_masks_still_work_after_adapting():
    model = DinoV2().eval()
    anypatch.adapt(model, 28)
    masks = torch.tensor([[True, False, True, False]])
    features = model.forward_features(torch.randn(1, 3, 56, 56), masks)
    assert features["x_norm_patchtokens"].shape == (1, 4, 32)


def test_directly_constructed_timm_model():
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    model = timm_vit.VisionTransformer(32, 8, embed_dim=32, depth=1, num_heads=2, num_classes=3).eval()
    assert anypatch.geometry(model).library == "generic"
    assert anypatch.check(model, (12, 9)).error < 1e-4
    anypatch.adapt(model, 4)
    built = timm_vit.VisionTransformer(32, 4, embed_dim=32, depth=1, num_heads=2, num_classes=3)
    assert model.patch_embed.grid_size == (8, 8)
    assert model.feature_info == built.feature_info
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in built.state_dict().items()}


def test_a_model_that_holds_a_timm_model():
    timm = pytest.importorskip("timm")

    class Classifier(nn.Module):
        def __init__(self, *backbones: nn.Module) -> None:
            super().__init__()
            self.stages = nn.ModuleList(backbones)
            self.head = nn.Linear(64, 3)

        def forward(self, x):
            return self.head(self.stages[0](x))

    make = lambda: timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=0)  # noqa: E731
    model = Classifier(make()).eval()
    assert anypatch.geometry(model).patch_size == (8, 8)
    assert anypatch.check(model, (12, 9)).error < 1e-4
    anypatch.adapt(model, 4)
    assert model.stages[0].pretrained_cfg["input_size"] == (3, 32, 32)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(anypatch.UnsupportedModelError, match=r"holds 2 models.*stages\.0, stages\.1"):
        anypatch.adapt(Classifier(make(), make()), 4)


# -- what cannot be explained ----------------------------------------------------------------------------------


def refuses(model: nn.Module, match: str, error=anypatch.UnsupportedModelError, **sizes) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = copy.deepcopy(plain_attributes(model))
    with pytest.raises(error, match=match):
        anypatch.adapt(model, **(sizes or {"patch_size": 4}))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert plain_attributes(model) == attributes


class ConvStem(nn.Module):
    def __init__(self, first: int = 3) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(3, 8, first, 2, 1 if first == 3 else 0), nn.GELU(), nn.Conv2d(8, 16, 2, 2))


def test_convolutional_stems_are_refused():
    for first in (3, 2):
        model = HandMade(table="none")
        model.to_patches = nn.Identity()
        model.patch_embed = ConvStem(first)
        match = r"patch_embed\.proj\.0.*kernel 3x3" if first == 3 else "patch_embed.*2 convolutions"
        refuses(model, match)


def test_a_network_without_patches_is_refused():
    refuses(nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)), "neither positions nor")
    refuses(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), "first convolution")
    refuses(nn.Sequential(nn.Linear(48, 16), Block(16)), "flattened patches")
    with pytest.raises(anypatch.UnsupportedModelError):
        anypatch.geometry(nn.ReLU())


def test_fixed_token_mixing_needs_the_grid_kept():
    class Mixer(HandMade):
        def __init__(self) -> None:
            super().__init__(table="none")
            self.mix = nn.Linear(24, 24)

        def forward(self, x):
            x = self.to_patches(x).flatten(2)
            return (x + self.mix(x)).mean(2)

    refuses(Mixer(), r"mix\.weight mixes a fixed number of tokens \(24\)", anypatch.GeometryError, patch_size=(2, 4))
    assert anypatch.check(Mixer(), (6, 12)).error < 1e-4


def test_unexplained_tensors_are_named():
    model = HandMade(table="plain")
    model.register_buffer("token_mask", torch.ones(24, 24))
    refuses(model, "token_mask", patch_size=(2, 4))
    model = HandMade(table="plain")
    model.block.relative_position_bias = nn.Parameter(torch.zeros(77, 2))
    refuses(model, r"block\.relative_position_bias", patch_size=(2, 4))
    model = HandMade(table="none")
    model.pos_embed = nn.Parameter(torch.zeros(1, 50, 16))
    refuses(model, "pos_embed.*named like a position table", patch_size=(2, 4))
    anypatch.adapt(model, (6, 12), keep="grid")


def test_a_pixel_head_whose_order_is_not_told_is_refused():
    class Silent(MaskedAutoencoder):
        patchify = unpatchify = None

    refuses(Silent(), r"decoder_pred.*order")


def test_pixels_and_patch_sizes_that_nothing_explains_are_refused():
    class Renamed(MaskedAutoencoder):
        def __init__(self) -> None:
            super().__init__()
            self.to_rgb, self.decoder_pred = self.decoder_pred, nn.Identity()

    refuses(Renamed(), "Renamed puts patches back together")
    model = HandMade()
    model.patch_size = (2, 8)
    refuses(model, r"patch_size is \(2, 8\), but to_patches cuts patches of 4x8", patch_size=8, keep="grid")


def test_sizes_kept_as_one_number_stay_square():
    refuses(Dino(), r"img_size is one number", anypatch.GeometryError, patch_size=(8, 4), keep="grid")
    refuses(DinoV2(), r"patch_size is one number", anypatch.GeometryError, patch_size=(14, 7), keep="grid")
    refuses(Dino(), r"square|one number", anypatch.GeometryError, image_size=(32, 64))
    refuses(DinoV2(), r"interpolate_pos_encoding.*square", anypatch.GeometryError, image_size=(56, 84))


def test_check_says_when_a_model_needs_other_inputs():
    class TwoInputs(Dino):
        def forward(self, x, times):
            return super().forward(x) + times

    with pytest.raises(anypatch.UnsupportedModelError, match=r"TwoInputs takes other inputs than pixels.*times"):
        anypatch.check(TwoInputs(), 12)


def test_windowed_attention_on_coarser_grids_is_refused():
    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = PairPatchEmbed(32, 4, 16)
            self.attn = Attention(16, 2)
            self.attn.input_resolution = (4, 4)

    refuses(Windowed(), "input_resolution", patch_size=8)


# -- loading and saving ----------------------------------------------------------------------------------------

HUBCONF = """
dependencies = ["torch"]
import sys
sys.path.insert(0, {tests!r})
from hub_models import DinoV2


def tiny(pretrained=True, **kwargs):
    import torch
    torch.manual_seed(7)
    return DinoV2(**kwargs)
"""


def test_load_from_a_local_hub_repository(tmp_path):
    (tmp_path / "hubconf.py").write_text(HUBCONF.format(tests=str(Path(__file__).parents[2])))
    model = anypatch.load(f"hub:{tmp_path}:tiny", 16, keep="grid", registers=1)
    got = anypatch.geometry(model)
    assert (got.patch_size, got.image_size, got.grid) == ((16, 16), (64, 64), (4, 4))
    assert model.register_tokens.shape[1] == 1
    with pytest.raises(anypatch.CheckpointError, match="nothing_there"):
        anypatch.load(f"hub:{tmp_path}:nothing_there")
    with pytest.raises(anypatch.UnsupportedModelError, match="hub:REPO:NAME"):
        anypatch.load("hub:tiny")


LOADER = """
import sys
sys.modules["anypatch"] = None
import json, torch, safetensors.torch
directory, tests = sys.argv[1:]
sys.path.insert(0, tests)
from hub_models import DinoV2
torch.set_num_threads(1)
geometry = json.load(open(f"{directory}/geometry.json"))
assert geometry["class"].endswith("DinoV2")
model = DinoV2(geometry["image_size"][0], geometry["patch_size"][0])
model.load_state_dict(safetensors.torch.load_file(f"{directory}/model.safetensors"))
x, y = torch.load(f"{directory}/io.pt")
assert torch.equal(model.eval()(x), y)
"""


@pytest.mark.slow
def test_saved_model_loads_without_anypatch(tmp_path):
    model = DinoV2().eval()
    anypatch.adapt(model, 16, 80)
    anypatch.save(model, tmp_path)
    record = json.loads((tmp_path / "geometry.json").read_text())
    assert (record["patch_size"], record["image_size"], record["prefix_tokens"]) == ([16, 16], [80, 80], 1)
    x = torch.randn(1, 3, 80, 80)
    torch.save((x, model(x).detach()), tmp_path / "io.pt")
    subprocess.run([sys.executable, "-c", LOADER, str(tmp_path), str(Path(__file__).parents[2])], check=True)


class Unnamed(nn.Module):
    """A class token that no name tells, and no image size."""

    def __init__(self, grid: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed = nn.Conv2d(3, 24, 8, 8)
        self.first, self.pos_embed = nn.Parameter(torch.randn(1, 1, 24)), nn.Parameter(torch.randn(1, grid + 1, 24))
        self.attn = nn.TransformerEncoderLayer(24, 2, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patch_embed(x).flatten(2).mT
        return self.attn(torch.cat([self.first.expand(len(x), -1, -1), tokens], 1) + self.pos_embed)


class Trailing(Unnamed):
    """Tokens in any order: the number of those before the patches, and of those after them."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(16 + before + after - 1)
        self.before, self.first = before, nn.Parameter(torch.randn(1, before + after, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, extra = self.patch_embed(x).flatten(2).mT, self.first.expand(len(x), -1, -1)
        parts = [extra[:, : self.before], tokens, extra[:, self.before :]]
        return self.attn(torch.cat([part for part in parts if part.shape[1]], 1) + self.pos_embed)


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 1), (0, 2), (1, 0), (2, 0)])
def test_tokens_after_the_patches_are_refused_another_grid(before, after):
    model = Trailing(before, after)
    table = model.pos_embed.detach().clone()
    if after:
        with pytest.raises(anypatch.UnsupportedModelError, match=r"puts tokens after its 16 patches \("):
            anypatch.adapt(model, image_size=64)
        assert torch.equal(model.pos_embed, table)
        assert anypatch.check(model, 16).passed
        anypatch.adapt(model, 16, keep="grid")
    else:
        anypatch.adapt(model, image_size=64)
        assert torch.equal(model.pos_embed[:, :before], table[:, :before])


@pytest.mark.siblings(fast=4)
@pytest.mark.parametrize("image", [(32, 48), (24, 40), (16, 32), (32, 64), (24, 80)])  # 25, 16, 9, 33 and 31 entries
@pytest.mark.parametrize("inside", [False, True])
def test_a_rectangle_that_a_model_was_adapted_to_is_known_afterwards(image, inside):
    model = nn.Sequential(nn.Identity(), Unnamed()) if inside else Unnamed()
    table = (model[1] if inside else model).pos_embed.detach().clone()
    anypatch.adapt(model, image_size=image)
    for known in (model, model[1]) if inside else (model,):
        found = anypatch.geometry(known)
        assert (found.image_size, found.prefix_tokens) == (image, 1)
    assert anypatch.check(model, 16).passed
    anypatch.adapt(model, image_size=32)
    back = (model[1] if inside else model).pos_embed
    assert torch.equal(back[:, 0], table[:, 0])
    grid = tuple(side // 8 for side in image)
    there = resample(table[:, 1:].mT.unflatten(-1, (4, 4)), grid)
    torch.testing.assert_close(back[:, 1:], resample(there, (4, 4)).flatten(2).mT)


def pickled(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES = {
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "saved": pickled,
    "copied twice": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
    "a part": lambda model: copy.deepcopy(nn.Sequential(nn.Identity(), model))[1],
}


@pytest.mark.siblings(fast=4)
@pytest.mark.parametrize("kind", COPIES)
def test_a_rectangle_that_a_model_was_adapted_to_is_known_to_its_copies(kind):
    """16 patches and a token before them are a square's as well as a rectangle's."""
    model = Unnamed()
    anypatch.adapt(model, image_size=(16, 64))
    other = COPIES[kind](model)
    assert anypatch.geometry(other).image_size == (16, 64)
    anypatch.adapt(model, image_size=(32, 64))
    anypatch.adapt(other, image_size=(32, 64))
    assert torch.equal(other.pos_embed, model.pos_embed)
    assert anypatch.geometry(copy.deepcopy(other)).image_size == (32, 64)


def test_a_copy_of_a_view_knows_the_rectangle_that_the_view_has():
    model = Unnamed()
    view = copy.deepcopy(anypatch.at(model, image_size=(16, 64)))
    assert (anypatch.geometry(view).image_size, anypatch.geometry(model).image_size) == ((16, 64), (32, 32))
    model = anypatch.adapt(Unnamed(), image_size=(16, 64))
    view = copy.deepcopy(anypatch.at(model, image_size=(64, 16)))
    assert (anypatch.geometry(view).image_size, anypatch.geometry(model).image_size) == ((64, 16), (16, 64))


def test_a_square_leaves_nothing_in_the_model():
    model = Unnamed()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    anypatch.adapt(model, image_size=64)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    model.img_size = (64, 64)  # which then says it
    anypatch.adapt(model, image_size=(32, 64))
    assert {name: set(vars(module)) - {"img_size"} for name, module in model.named_modules()} == before


def resample(maps, size):
    return F.interpolate(maps, size=size, mode="bicubic", antialias=True)


def test_a_table_over_a_grid_that_nothing_tells_is_refused_another_image():
    model = Unnamed(32)
    with pytest.raises(anypatch.GeometryError, match=r"pos_embed, of shape \(1, 33, 24\), is over a grid that cannot"):
        anypatch.adapt(model, image_size=32)
    model.img_size = (32, 64)
    anypatch.adapt(model, image_size=(64, 32))
    assert model(torch.randn(1, 3, 64, 32)).shape == (1, 33, 24)
    anypatch.adapt(Unnamed(32), 16, keep="grid")


def test_a_table_that_was_changed_since_is_looked_at_anew():
    model = Unnamed()
    anypatch.adapt(model, image_size=(32, 48))
    model.pos_embed = nn.Parameter(torch.randn(1, 50, 24))
    assert anypatch.geometry(model).image_size == (56, 56)


def test_class_names_need_the_tokenizer_of_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Dino()
    model.encode_text = nn.Identity()
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    with pytest.raises(DataError, match=r"pip install 'anypatch\[open-clip\]'"):
        text_features(model, ["a cat"], None)
