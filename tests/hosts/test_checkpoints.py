"""Raw checkpoint files: every layout loads into the host library's own model, at its native geometry."""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import anypatch
from anypatch import CheckpointError, UnsupportedModelError
from anypatch.core.empty import empty
from anypatch.files import layouts
from anypatch.files.reading import read
from anypatch.hosts.checkpoints import infer, load_file
from anypatch.hosts.timm.inference import same_function
from builders import CLIP, openai, transformers_model

TINY = "timm:vit_tiny_patch16_224"
# img_size other than the architecture's own, so that reading the native geometry is put to the test
SIZES: dict[str, Any] = {"img_size": 64, "patch_size": 8, "depth": 2}


def _state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state in which every tensor is random, so that none is a zero or a one by chance."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, tensor in model.state_dict().items():
        fresh = tensor.clone().contiguous()
        if tensor.is_floating_point():
            fresh.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        state[name] = fresh
    return state


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **SIZES)
    model.load_state_dict(_state(model))
    return model.eval()


def _same(model: nn.Module, reference: nn.Module, side: int = 64) -> None:
    pixels = torch.randn(2, 3, side, side)
    torch.testing.assert_close(model.eval()(pixels), reference(pixels), rtol=1e-5, atol=1e-5)


def _wrap(state: dict[str, Tensor], how: str) -> Any:
    return {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "module": {"model": {f"module.{k}": v for k, v in state.items()}, "args": argparse.Namespace(lr=0.1)},
        "compiled": {"state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}},
        "ema": {"state_dict": {k: v * 0 for k, v in state.items()}, "state_dict_ema": state},
        "teacher": {
            "student": {f"module.backbone.{k}": v * 0 for k, v in state.items()},
            "teacher": {**{f"backbone.{k}": v for k, v in state.items()}, "head.last_layer.weight": torch.ones(3)},
        },
        "flat teacher": {
            "model": {
                **{f"student.backbone.{k}": v * 0 for k, v in state.items()},
                **{f"teacher.backbone.{k}": v for k, v in state.items()},
                "teacher.dino_head.mlp.0.weight": torch.ones(3),
            }
        },
    }[how]


@pytest.mark.parametrize("how", ["plain", "state_dict", "module", "compiled", "ema", "teacher", "flat teacher"])
@pytest.mark.parametrize("zipped", [True, False])
def test_training_checkpoints(tiny: nn.Module, tmp_path: Path, how: str, zipped: bool) -> None:
    path = tmp_path / "x.pth"
    torch.save(_wrap(tiny.state_dict(), how), path, _use_new_zipfile_serialization=zipped)
    model = load_file(path, TINY, num_classes=7, depth=2)
    assert anypatch.geometry(model).patch_size == (8, 8)
    assert anypatch.geometry(model).image_size == (64, 64)
    _same(model, tiny)


def test_safetensors_are_mapped_not_copied_and_never_written(tiny: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tiny.state_dict(), path, metadata={"format": "pt"})
    before = path.read_bytes()
    checkpoint = read(path)
    assert checkpoint.metadata == {"format": "pt"}
    model = load_file(path, TINY, num_classes=7, depth=2)
    _same(model, tiny)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert path.read_bytes() == before
    assert not any(p.is_meta for p in model.parameters())
    model(torch.randn(1, 3, 64, 64)).sum().backward()  # still trains


def test_then_adapted_equals_the_library_then_adapted(tiny: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tiny.state_dict(), path)
    model = anypatch.load(path, patch_size=16, arch=TINY, num_classes=7, depth=2)
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=7, **SIZES)
    reference.load_state_dict(tiny.state_dict())
    anypatch.adapt(reference, patch_size=16)
    _same(model, reference.eval())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_dtype_is_kept(tiny: nn.Module, tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "x.safetensors"
    save_file({k: v.to(dtype) for k, v in tiny.state_dict().items()}, path)
    model = anypatch.load(path, patch_size=16, arch=TINY, num_classes=7, depth=2)
    assert {p.dtype for p in model.parameters()} == {dtype}
    wanted = anypatch.resize_kernel(tiny.state_dict()["patch_embed.proj.weight"].to(dtype).float(), 16).to(dtype)
    assert torch.equal(model.state_dict()["patch_embed.proj.weight"].float(), wanted.float())


# -- layouts of other origins ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_tower() -> nn.Module:
    model = timm.create_model("vit_base_patch16_clip_224", num_classes=5, embed_dim=32, num_heads=2, **SIZES)
    state = _state(model)
    state["head.bias"].zero_()
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("how", ["visual.", "module.visual.", "trunk"])
def test_clip_files_into_timm(clip_tower: nn.Module, tmp_path: Path, how: str) -> None:
    if how == "trunk":
        state = {f"visual.trunk.{k}": v for k, v in clip_tower.state_dict().items() if "head" not in k}
        state["visual.head.proj.weight"] = clip_tower.state_dict()["head.weight"]
    else:
        state = openai(clip_tower.state_dict(), how)
    prefix = "module." if how.startswith("module") else ""
    state |= {f"{prefix}logit_scale": torch.tensor(1.0), f"{prefix}ln_final.weight": torch.ones(8)}
    path = tmp_path / "x.pt"
    torch.save({"state_dict": state}, path)
    model = load_file(path, "timm:vit_base_patch16_clip_224", depth=2, embed_dim=32, num_heads=2, num_classes=5)
    assert anypatch.geometry(model).patch_size == (8, 8)
    assert anypatch.geometry(model).image_size == (64, 64)
    _same(model, clip_tower)


@pytest.fixture
def tiny_clip(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A small model that open_clip knows by name."""
    open_clip = pytest.importorskip("open_clip")
    from open_clip import factory

    for name, quick in (("ViT-tiny", False), ("ViT-tiny-quickgelu", True)):
        monkeypatch.setitem(factory._MODEL_CONFIGS, name, {**CLIP, "quick_gelu": quick})
    model = open_clip.create_model("ViT-tiny", load_weights=False)
    model.load_state_dict(_state(model))
    return model.eval()


def test_whole_clip_into_open_clip(tiny_clip: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in tiny_clip.state_dict().items()}, "epoch": 1}, path)
    model = load_file(path, "open_clip:ViT-tiny")
    pixels, text = torch.randn(2, 3, 32, 32), torch.randint(0, 30, (2, 8))
    for ours, theirs in zip(model.eval()(pixels, text), tiny_clip(pixels, text), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"open_clip:ViT-tiny, open_clip:ViT-tiny-quickgelu"):
        load_file(path)  # the activation is not in the tensors


def test_timm_tower_in_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip = pytest.importorskip("open_clip")
    from open_clip import factory

    tower = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 224}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "timm-tiny", {**CLIP, "vision_cfg": tower})
    reference = open_clip.create_model("timm-tiny", load_weights=False)
    reference.load_state_dict(_state(reference))
    path = tmp_path / "x.safetensors"
    save_file(reference.state_dict(), path)
    model = load_file(path)
    assert anypatch.geometry(model).image_size == (224, 224)
    pixels = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(model.eval().encode_image(pixels), reference.eval().encode_image(pixels))


def test_openai_archive_is_read_for_its_weights_only(tiny_clip: nn.Module, tmp_path: Path) -> None:
    class Archive(nn.Module):
        """What OpenAI published: a scripted module, with three buffers that are no weights."""

        def __init__(self) -> None:
            super().__init__()
            for name, tensor in tiny_clip.state_dict().items():
                parent: nn.Module = self
                *path, leaf = name.split(".")
                for part in path:
                    if part not in parent._modules:
                        parent.add_module(part, nn.Module())
                    parent = parent._modules[part]  # type: ignore[assignment]
                parent.register_parameter(leaf, nn.Parameter(tensor.half()))
            self.register_buffer("input_resolution", torch.tensor(32))
            self.register_buffer("context_length", torch.tensor(8))
            self.register_buffer("vocab_size", torch.tensor(30))

        def forward(self, x: Tensor) -> Tensor:
            return x

    path = tmp_path / "ViT-tiny.pt"
    torch.jit.script(Archive()).save(str(path))
    checkpoint = read(path)
    assert checkpoint.kind == "torchscript"
    assert infer(checkpoint) == ["open_clip:ViT-tiny-quickgelu"]  # OpenAI's activation
    model = load_file(path)
    for name, tensor in tiny_clip.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.half()), name


def _google(state: dict[str, Tensor], heads: int, prefix: str = "", stacked: bool = False) -> dict[str, Any]:
    """A timm ViT under the names and axes of Google's archives (``augreg``'s, or big_vision's where stacked)."""
    arrays: dict[str, Any] = {}
    width = state["cls_token"].shape[-1]
    new = bool(prefix)

    def layer(to: str, name: str) -> None:
        arrays[f"{prefix}{to}/kernel"] = state[f"{name}.weight"].T.numpy()
        arrays[f"{prefix}{to}/bias"] = state[f"{name}.bias"].numpy()

    def norm(to: str, name: str) -> None:
        arrays[f"{prefix}{to}/scale"] = state[f"{name}.weight"].numpy()
        arrays[f"{prefix}{to}/bias"] = state[f"{name}.bias"].numpy()

    arrays[f"{prefix}embedding/kernel"] = state["patch_embed.proj.weight"].permute(2, 3, 1, 0).contiguous().numpy()
    arrays[f"{prefix}embedding/bias"] = state["patch_embed.proj.bias"].numpy()
    arrays[f"{prefix}cls"] = state["cls_token"].numpy()
    table = "pos_embedding" if new else "Transformer/posembed_input/pos_embedding"
    arrays[f"{prefix}{table}"] = state["pos_embed"].numpy()
    norm("Transformer/encoder_norm", "norm")
    layer("head", "head")
    blocks = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks."))
    mha, mlp, second = (0, 0, 1) if new else (1, 3, 2)
    for i in range(blocks):
        to, name = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        norm(f"{to}/LayerNorm_0", f"{name}.norm1")
        norm(f"{to}/LayerNorm_{second}", f"{name}.norm2")
        weight = state[f"{name}.attn.qkv.weight"].reshape(3, heads, width // heads, width)
        bias = state[f"{name}.attn.qkv.bias"].reshape(3, heads, width // heads)
        for j, part in enumerate(("query", "key", "value")):
            arrays[f"{prefix}{to}/MultiHeadDotProductAttention_{mha}/{part}/kernel"] = (
                weight[j].permute(2, 0, 1).numpy()
            )
            arrays[f"{prefix}{to}/MultiHeadDotProductAttention_{mha}/{part}/bias"] = bias[j].numpy()
        out = state[f"{name}.attn.proj.weight"].T.reshape(heads, width // heads, width)
        arrays[f"{prefix}{to}/MultiHeadDotProductAttention_{mha}/out/kernel"] = out.numpy()
        arrays[f"{prefix}{to}/MultiHeadDotProductAttention_{mha}/out/bias"] = state[f"{name}.attn.proj.bias"].numpy()
        layer(f"{to}/MlpBlock_{mlp}/Dense_0", f"{name}.mlp.fc1")
        layer(f"{to}/MlpBlock_{mlp}/Dense_1", f"{name}.mlp.fc2")
    if stacked:
        first = f"{prefix}Transformer/encoderblock_0/"
        for key in [k for k in arrays if k.startswith(first)]:
            parts = [arrays.pop(key.replace("block_0/", f"block_{i}/")) for i in range(blocks)]
            arrays[key.replace("encoderblock_0/", "encoderblock/")] = np.stack(parts)
    return arrays


@pytest.mark.parametrize(("prefix", "stacked"), [("", False), ("params/", False), ("params/img/", True)])
def test_google_archives(tiny: nn.Module, tmp_path: Path, prefix: str, stacked: bool) -> None:
    path = tmp_path / "x.npz"
    arrays = _google(tiny.state_dict(), 3, prefix, stacked)
    np.savez(path, **arrays, **({"params/txt/embedding": np.zeros((3, 3), "f4")} if stacked else {}))
    model = load_file(path, TINY, num_classes=7, depth=2)
    assert anypatch.geometry(model).image_size == (64, 64)
    _same(model, tiny)
    with pytest.raises(CheckpointError, match="2 blocks, not 3"):
        load_file(path, TINY, num_classes=7, depth=3)


def test_google_archive_without_a_tensor(tiny: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    arrays = _google(tiny.state_dict(), 3)
    del arrays["Transformer/encoder_norm/scale"]
    np.savez(path, **arrays)
    with pytest.raises(CheckpointError, match="encoder_norm"):
        load_file(path, TINY, num_classes=7, depth=2)


def test_google_archive_that_leaves_a_tensor_unset(tiny: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **_google(tiny.state_dict(), 3))
    with pytest.raises(CheckpointError, match=r"lacks blocks\.0\.ls1\.gamma"):
        load_file(path, TINY, num_classes=7, depth=2, init_values=0.1)


def _timm(name: str, **kwargs: Any) -> nn.Module:
    model = timm.create_model(name, depth=2, img_size=64, num_classes=0, **kwargs)
    model.load_state_dict(_state(model))
    return model.eval()


def test_dinov2_with_registers(tmp_path: Path) -> None:
    reference = _timm("vit_small_patch14_reg4_dinov2", patch_size=8)
    state = reference.state_dict()
    width = state["cls_token"].shape[-1]
    extra = torch.randn(1, 1, width)
    original = {k: v for k, v in state.items() if k not in ("reg_token", "pos_embed", "cls_token")}
    original["register_tokens"] = state["reg_token"]
    original["cls_token"] = state["cls_token"] - extra
    original["pos_embed"] = torch.cat([extra, state["pos_embed"]], dim=1)
    original["mask_token"] = torch.zeros(1, width)
    path = tmp_path / "x.pth"
    torch.save(original, path)
    model = load_file(path, "timm:vit_small_patch14_reg4_dinov2", depth=2)
    assert anypatch.geometry(model).image_size == (64, 64)
    _same(model, reference)


def test_mae_before_fine_tuning(tmp_path: Path) -> None:
    reference = _timm("vit_tiny_patch16_224", patch_size=8)
    state = dict(reference.state_dict())
    state |= {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 65, 8)}
    state["decoder_embed.weight"] = torch.zeros(8, 192)
    path = tmp_path / "x.pth"
    torch.save({"model": state}, path)
    model = load_file(path, TINY, depth=2, num_classes=0)
    _same(model, reference)


def test_ijepa(tmp_path: Path) -> None:
    reference = _timm("vit_tiny_patch16_224", patch_size=8, class_token=False, global_pool="avg", fc_norm=False)
    encoder = {f"module.{k}": v for k, v in reference.state_dict().items()}
    path = tmp_path / "x.pth.tar"
    torch.save({"encoder": encoder, "predictor": {"module.x": torch.ones(2)}, "target_encoder": encoder}, path)
    model = load_file(path, TINY, depth=2, num_classes=0, class_token=False, global_pool="avg", fc_norm=False)
    _same(model, reference)


def test_dinov3(tmp_path: Path) -> None:
    reference = _timm("vit_small_patch16_dinov3")
    state = reference.state_dict()
    names = (("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"))
    original = {}
    for name, tensor in state.items():
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        original[name] = tensor
    original |= {"rope_embed.periods": torch.ones(4), "mask_token": torch.zeros(1, 384)}
    path = tmp_path / "x.pth"
    torch.save(original, path)
    model = load_file(path, "timm:vit_small_patch16_dinov3", depth=2, img_size=64)
    _same(model, reference)


def test_sam(tmp_path: Path) -> None:
    reference = _timm("samvit_base_patch16", embed_dim=32, num_heads=2, global_attn_indexes=(1,), window_size=2)
    state = {}
    for name, tensor in reference.state_dict().items():
        state["image_encoder." + name.replace("mlp.fc", "mlp.lin")] = tensor
    state["mask_decoder.iou_token.weight"] = torch.ones(1, 4)
    path = tmp_path / "x.pth"
    torch.save(state, path)
    sizes: dict[str, Any] = {"embed_dim": 32, "num_heads": 2, "global_attn_indexes": (1,), "window_size": 2}
    model = load_file(path, "timm:samvit_base_patch16", depth=2, **sizes)
    assert anypatch.geometry(model).image_size == (64, 64)
    _same(model, reference)


def test_aimv2(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"embed_dim": 48, "num_heads": 4}
    reference = _timm("aimv2_large_patch14_224", patch_size=8, **sizes)
    swaps = (
        ("patch_embed.", "preprocessor.patchifier."), ("pos_embed", "preprocessor.pos_embed"), ("norm1", "norm_1"),
        ("norm2", "norm_2"), ("mlp.fc1_g", "mlp.fc1"), ("mlp.fc1_x", "mlp.fc3"), ("blocks.", "trunk.blocks."),
    )  # fmt: skip
    original = {}
    for name, tensor in reference.state_dict().items():
        if name.startswith("norm."):
            name = f"trunk.post_trunk_{name}"
        for ours, theirs in swaps:
            name = name.replace(ours, theirs)
        original[name] = tensor
    path = tmp_path / "x.safetensors"
    save_file(original, path)
    model = load_file(path, "timm:aimv2_large_patch14_224", depth=2, num_classes=0, **sizes)
    assert anypatch.geometry(model).patch_size == (8, 8)
    _same(model, reference)


def test_siglip_archive(tmp_path: Path) -> None:
    """big_vision's: stacked blocks, no class token, an attention pool, and a text tower beside it."""
    sizes: dict[str, Any] = {"embed_dim": 64, "num_heads": 2}
    reference = _timm("vit_base_patch16_siglip_224", patch_size=8, **sizes)
    state = reference.state_dict()
    fake = {**state, "cls_token": torch.zeros(1, 1, 64), "head.weight": torch.zeros(1, 64), "head.bias": torch.zeros(1)}
    prefix = "params/img/"
    arrays = _google(fake, 2, prefix, stacked=True)
    for name in ("cls", "head/kernel", "head/bias"):
        del arrays[prefix + name]
    pool = f"{prefix}MAPHead_0/"
    attention = f"{pool}MultiHeadDotProductAttention_0/"
    arrays[f"{pool}probe"] = state["attn_pool.latent"].numpy()
    weights = {"query": ("q", 0, 1), "key": ("kv", 0, 2), "value": ("kv", 1, 2)}
    for name, (layer, part, parts) in weights.items():
        weight = state[f"attn_pool.{layer}.weight"].chunk(parts)[part]
        arrays[f"{attention}{name}/kernel"] = weight.reshape(2, 32, 64).permute(2, 0, 1).numpy()
        arrays[f"{attention}{name}/bias"] = state[f"attn_pool.{layer}.bias"].chunk(parts)[part].reshape(2, 32).numpy()
    arrays[f"{attention}out/kernel"] = state["attn_pool.proj.weight"].T.reshape(2, 32, 64).numpy()
    arrays[f"{attention}out/bias"] = state["attn_pool.proj.bias"].numpy()
    arrays[f"{pool}LayerNorm_0/scale"] = state["attn_pool.norm.weight"].numpy()
    arrays[f"{pool}LayerNorm_0/bias"] = state["attn_pool.norm.bias"].numpy()
    for i in (0, 1):
        arrays[f"{pool}MlpBlock_0/Dense_{i}/kernel"] = state[f"attn_pool.mlp.fc{i + 1}.weight"].T.numpy()
        arrays[f"{pool}MlpBlock_0/Dense_{i}/bias"] = state[f"attn_pool.mlp.fc{i + 1}.bias"].numpy()
    arrays["params/txt/Encoder_0/x"] = np.ones(3, "f4")
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    model = load_file(path, "timm:vit_base_patch16_siglip_224", depth=2, num_classes=0, **sizes)
    _same(model, reference)
    with pytest.raises(CheckpointError, match="MAPHead_0"):
        load_file(path, "timm:vit_base_patch16_siglip_gap_224", depth=2, num_classes=0, **sizes)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "deit3_small_patch16_224"])
def test_other_families(tmp_path: Path, name: str) -> None:
    sizes: dict[str, Any] = {"patch_size": 16, "embed_dim": 48, "num_heads": 4}
    reference = _timm(name, **sizes)
    path = tmp_path / "x.safetensors"
    save_file({k: v.contiguous() for k, v in reference.state_dict().items()}, path)
    model = load_file(path, f"timm:{name}", depth=2, num_classes=0, embed_dim=48, num_heads=4)
    assert anypatch.geometry(model).image_size == (64, 64)
    _same(model, reference)


@pytest.mark.slow
def test_torchvision(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    reference = torchvision.models.vit_b_32(image_size=64, num_classes=3)
    path = tmp_path / "x.pth"
    torch.save(reference.state_dict(), path)
    model = load_file(path)
    assert anypatch.geometry(model).image_size == (64, 64)
    _same(model, reference.eval())


def test_transformers_file_with_its_configuration(tmp_path: Path) -> None:
    reference = transformers_model("Dinov2", num_hidden_layers=2, image_size=56, patch_size=14)
    reference.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 56, 56)
    for arch in (None, f"transformers:{tmp_path}"):
        model = load_file(tmp_path / "model.safetensors", arch)
        torch.testing.assert_close(model.eval()(pixels)[0], reference(pixels)[0])
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_file(tmp_path / "other.safetensors")


# -- which architecture ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"],
)
def test_architecture_is_inferred(tmp_path: Path, name: str) -> None:
    model = timm.create_model(name, num_classes=3)
    path = tmp_path / "x.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    assert infer(read(path)) == [f"timm:{name}"]


def test_what_makes_a_function_the_same() -> None:
    def build(name: str = "vit_tiny_patch16_224", **kwargs: Any) -> nn.Module:
        return empty(lambda: timm.create_model(name, depth=1, **kwargs))

    assert same_function(build(), build("deit_tiny_patch16_224"))
    assert same_function(build(), build(num_classes=3))
    assert not same_function(build(), build(num_heads=6))  # no tensor tells
    assert not same_function(build(), build(norm_layer=partial(nn.LayerNorm, eps=1e-3)))
    assert not same_function(build(), build(act_layer=nn.ReLU))
    assert not same_function(build(), build(global_pool="avg", fc_norm=False))


def test_ambiguous_architecture_lists_the_candidates(tmp_path: Path) -> None:
    state = timm.create_model("vit_base_patch32_clip_224", depth=12, num_classes=0).half().state_dict()
    path = tmp_path / "x.safetensors"
    save_file(state, path)
    with pytest.raises(CheckpointError) as caught:
        load_file(path)
    assert "timm:vit_base_patch32_clip_224" in str(caught.value)
    assert "timm:vit_base_patch32_clip_quickgelu_224" in str(caught.value)


def test_google_archive_architecture_is_inferred(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    path = tmp_path / "x.npz"
    np.savez(path, **_google(model.state_dict(), 3))
    assert infer(read(path)) == ["timm:vit_tiny_patch16_224"]


def test_unknown_tensors_say_that_arch_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a.weight": torch.ones(2, 2)}, path)
    with pytest.raises(CheckpointError, match="arch="):
        load_file(path)


# -- what does not fit -------------------------------------------------------------------------------------


def _stored(tmp_path: Path, state: dict[str, Tensor], name: str = "x") -> Path:
    path = tmp_path / f"{name}.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return path


def test_missing_tensors_are_named(tiny: nn.Module, tmp_path: Path) -> None:
    state = dict(tiny.state_dict())
    del state["blocks.1.attn.qkv.bias"]
    with pytest.raises(CheckpointError, match=r"lacks blocks\.1\.attn\.qkv\.bias"):
        load_file(_stored(tmp_path, state), TINY, depth=2, num_classes=7)


def test_surplus_tensors_are_named(tiny: nn.Module, tmp_path: Path) -> None:
    state = {**tiny.state_dict(), "blocks.0.gate": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"has no blocks\.0\.gate"):
        load_file(_stored(tmp_path, state), TINY, depth=2, num_classes=7)


def test_other_shapes_are_named(tiny: nn.Module, tmp_path: Path) -> None:
    state = {**tiny.state_dict(), "blocks.0.mlp.fc1.bias": torch.ones(5)}
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mlp\.fc1\.bias"):
        load_file(_stored(tmp_path, state), TINY, depth=2, num_classes=7)


def test_swin_windows_are_not_resampled_on_the_way(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "img_size": 64, "num_classes": 0}
    model = timm.create_model("swin_tiny_patch4_window7_224", window_size=4, **sizes)
    path = _stored(tmp_path, model.state_dict())
    with pytest.raises(CheckpointError, match="relative_position_bias_table"):
        load_file(path, "timm:swin_tiny_patch4_window7_224", window_size=8, **sizes)
    loaded = load_file(path, "timm:swin_tiny_patch4_window7_224", window_size=4, **sizes)
    _same(loaded, model.eval())


def test_image_that_is_not_square(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"depth": 1, "num_classes": 0, "img_size": (32, 96)}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    path = _stored(tmp_path, model.state_dict())
    with pytest.raises(CheckpointError, match="img_size"):
        load_file(path, TINY, depth=1, num_classes=0)
    loaded = load_file(path, TINY, **sizes)
    assert anypatch.geometry(loaded).image_size == (32, 96)


@pytest.mark.parametrize("image", [(128, 256), (64, 192), (160, 224)])
def test_positions_of_a_rectangle(tmp_path: Path, image: tuple[int, int]) -> None:
    sizes: dict[str, Any] = {"depth": 1, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", img_size=image, **sizes)
    path = _stored(tmp_path, model.state_dict())
    with pytest.raises(CheckpointError, match=rf"1 other tokens may be .*img_size=\({image[0]}, {image[1]}\)"):
        load_file(path, TINY, **sizes)


def test_positions_that_could_be_two_things(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=(128, 256), depth=1, num_classes=0)  # 1 + 8 * 16
    with pytest.raises(CheckpointError, match="129 positions, which a rectangle may have"):
        load_file(_stored(tmp_path, model.state_dict()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_would_be_resampled_are_finite(tiny: nn.Module, tmp_path: Path, value: float) -> None:
    state = {k: v.clone() for k, v in tiny.state_dict().items()}
    state["pos_embed"][0, 3, 5] = value
    path = _stored(tmp_path, state)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: tensor 'pos_embed' has 1 NaN or infinite"):
        load_file(path, TINY, depth=2, num_classes=7)


def test_heads_of_another_class_count(tiny: nn.Module, tmp_path: Path) -> None:
    path = _stored(tmp_path, tiny.state_dict())
    with pytest.warns(UserWarning, match="head of 7 classes"):
        model = load_file(path, TINY, depth=2)
    assert model.num_classes == 7
    _same(model, tiny)
    with pytest.warns(UserWarning, match="untrained"):
        model = load_file(path, TINY, depth=2, num_classes=11)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 11)
    headless = _stored(tmp_path, {k: v for k, v in tiny.state_dict().items() if not k.startswith("head")}, "y")
    with pytest.warns(UserWarning, match="no classification head"):
        model = load_file(headless, TINY, depth=2)
    assert model.num_classes == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_file(path, TINY, depth=2, num_classes=7)


def test_image_channels(tiny: nn.Module, tmp_path: Path) -> None:
    path = _stored(tmp_path, tiny.state_dict())
    model = load_file(path, TINY, depth=2, num_classes=7, in_chans=1)
    kernel = tiny.state_dict()["patch_embed.proj.weight"]
    torch.testing.assert_close(model.state_dict()["patch_embed.proj.weight"], kernel.sum(1, keepdim=True))


def test_wrong_arch(tiny: nn.Module, tmp_path: Path) -> None:
    path = _stored(tmp_path, tiny.state_dict())
    for arch in ("timm:no_such_model", "open_clip:no-such-model", "torchvision:no_such_model"):
        with pytest.raises(UnsupportedModelError, match=r"knows no model"):
            load_file(path, arch)
    for arch in ("", "keras:vit", "timm:", 3):
        with pytest.raises(CheckpointError, match="arch"):
            load_file(path, arch)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="does not exist"):
        load_file(tmp_path / "none.safetensors", TINY)
    with pytest.raises(CheckpointError, match="directory"):
        load_file(tmp_path, TINY)


def test_native_geometry_of_known_layouts() -> None:
    shapes = {
        "visual.conv1.weight": torch.empty(8, 3, 14, 14, device="meta"),
        "visual.positional_embedding": torch.empty(257, 8, device="meta"),
        "positional_embedding": torch.empty(77, 8, device="meta"),  # the text tower's
    }
    native = layouts.native(shapes)
    assert (native.patch, native.grid, native.image) == ((14, 14), (16, 16), (224, 224))
    assert layouts.square_grid(1374) == 37  # five prefix tokens
    assert layouts.square_grid(1 + 12 * 23) is None
