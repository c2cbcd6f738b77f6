"""Files as training scripts leave them: a prefix before the patch projection decides, not a list of names."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file as read_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

import anypatch
from anypatch import CheckpointError
from anypatch.files import layouts
from anypatch.files.reading import read
from builders import transformers_model

TINY = "timm:vit_tiny_patch16_224"
ARGUMENTS: dict[str, Any] = {"num_classes": 5}
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, **ARGUMENTS)
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(v.shape, generator=generator) * 0.1 for k, v in model.state_dict().items()}


def _behind(prefix: str, state: State, factor: float = 1.0) -> State:
    return {prefix + name: (tensor * factor).contiguous() for name, tensor in state.items()}


OTHERS = {"criterion.weight": torch.ones(3), "epoch": 3}


@pytest.mark.siblings(fast=6)
@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("best.pth.tar", lambda s: {"state_dict": s, "epoch": 3, "best_acc1": np.float64(0.7)}),
        ("last.ckpt", lambda s: {"state_dict": _behind("model.", s), "hyper_parameters": argparse.Namespace(lr=1.0)}),
        ("net.ckpt", lambda s: {"state_dict": {**_behind("net.", s), **OTHERS}, "pytorch-lightning_version": "2"}),
        ("no_suffix", lambda s: {"state_dict": _behind("encoder_q.backbone.", s), "where": pathlib.PurePosixPath("x")}),
        ("compiled.pt", lambda s: {"model": _behind("_orig_mod.module.", s)}),
        ("blocks.pt", lambda s: {k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in s.items()}),
        ("fsdp.pt", lambda s: {"app": {"module": _behind("_fsdp_wrapped_module.student.", s)}}),
        ("anything.weights", lambda s: {"run": {"best": {"my_own_vit_7": {"tower": _behind("deep.er.", s)}}}}),
        ("ema.pt", lambda s: {"model": _behind("", s, 0), "model_ema": s}),
        ("ema2.pt", lambda s: {"state_dict": _behind("", s, 0), "ema_state_dict": _behind("module.", s)}),
        ("ema3.pt", lambda s: {**_behind("online_model.", s, 0), **_behind("ema_model.", s)}),
        ("dino.pt", lambda s: {"student": _behind("module.", s, 0), "teacher": _behind("module.", s), "epoch": 1}),
        ("distilled.pt", lambda s: {"state_dict": {**_behind("student.", s, 0), **_behind("teacher.", s)}}),
        ("depth_anything.pth", lambda s: {**_behind("pretrained.", s), "depth_head.scratch.weight": torch.ones(2)}),
        ("list.pt", lambda s: {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "weights": s}),
    ],
)  # fmt: skip
def test_training_checkpoints(tmp_path: Path, state: State, name: str, wrap: Callable[[State], Any]) -> None:
    torch.save(wrap(state), tmp_path / name)
    model = anypatch.load(tmp_path / name, arch=TINY, **ARGUMENTS)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    anypatch.convert(tmp_path / name, tmp_path / "out.safetensors", patch_size=16, arch=TINY)
    anypatch.adapt(model, 16)
    written = read_tensors(tmp_path / "out.safetensors")
    assert torch.equal(written["patch_embed.proj.weight"], model.state_dict()["patch_embed.proj.weight"])


@pytest.mark.siblings(fast=2)
@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.vit.", "_orig_mod.net."])
def test_prefixes_in_safetensors(tmp_path: Path, state: State, prefix: str) -> None:
    path = tmp_path / "x.safetensors"
    table = {**_behind(prefix, state), "temperature": torch.ones(1)}
    save_file(table, path)
    model = anypatch.load(path, arch=TINY, **ARGUMENTS)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    anypatch.convert(path, tmp_path / "out.safetensors", patch_size=16, arch=TINY)  # under the names it has
    written = read_tensors(tmp_path / "out.safetensors")
    anypatch.adapt(model, 16)
    assert written.keys() == table.keys()
    for name, tensor in written.items():
        expected = model.state_dict().get(name.removeprefix(prefix), torch.ones(1))
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_several_models_are_listed_and_one_is_chosen(tmp_path: Path, state: State, suffix: str) -> None:
    table = {**_behind("module.base_encoder.", state), **_behind("module.momentum_encoder.", state, 0.5)}
    path = tmp_path / f"moco.{suffix}"
    save_file(table, path) if suffix == "safetensors" else torch.save({"state_dict": table}, path)
    with pytest.raises(CheckpointError, match=r"base_encoder'.*momentum_encoder'.*prefix="):
        anypatch.load(path, arch=TINY, **ARGUMENTS)
    with pytest.raises(CheckpointError, match=r"several models"):
        anypatch.convert(path, tmp_path / "out.safetensors", patch_size=16, arch=TINY)
    for prefix, factor in (("module.base_encoder", 1.0), ("module.momentum_encoder.", 0.5)):
        model = anypatch.load(path, arch=TINY, prefix=prefix, **ARGUMENTS)
        assert all(torch.equal(tensor, state[key] * factor) for key, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"no patch projection behind .queue.; there is one behind "):
        anypatch.load(path, arch=TINY, prefix="queue", **ARGUMENTS)


def test_what_the_message_says_is_what_prefix_takes(tmp_path: Path, state: State) -> None:
    torch.save({"a": state, "b": _behind("", state, 2)}, tmp_path / "x.pt")
    checkpoint = read(tmp_path / "x.pt")
    assert checkpoint.others == ["a", "b"]
    model = anypatch.load(tmp_path / "x.pt", arch=TINY, prefix="b", **ARGUMENTS)
    assert torch.equal(model.state_dict()["cls_token"], 2 * state["cls_token"])


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_block_chunks_of_dinov2(tmp_path: Path, chunks: int) -> None:
    arguments: dict[str, Any] = {"img_size": 64, "patch_size": 8, "depth": 6, "num_classes": 0, "init_values": 1e-5}
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    size = 6 // chunks

    def chunked(name: str) -> str:
        if not name.startswith("blocks."):
            return f"teacher.backbone.{name}"
        _, index, rest = name.split(".", 2)
        return f"teacher.backbone.blocks.{int(index) // size}.{index}.{rest}"

    torch.save({"model": {chunked(k): v for k, v in model.state_dict().items()}}, tmp_path / "dinov2.pth")
    loaded = anypatch.load(tmp_path / "dinov2.pth", arch=TINY, depth=6, init_values=1e-5)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_stages_are_no_chunks() -> None:
    staged = {f"blocks.{stage}.{block}.norm.weight": "" for stage in range(3) for block in range(2)}
    assert layouts.unchunked({**staged, "pos_embed": ""}) == {**staged, "pos_embed": ""}


@pytest.mark.parametrize("prefix", ["", "model.", "image_encoder.", "sam.image_encoder."])
def test_segment_anything(tmp_path: Path, prefix: str) -> None:
    """The whole model, its encoder alone, and either behind a prefix; in the terms of the original code."""
    model = timm.create_model("samvit_base_patch16", depth=2, img_size=128, embed_dim=32, num_heads=2)

    def original(name: str) -> str:
        return prefix + name.replace("mlp.fc", "mlp.lin")

    state = {original(k): v for k, v in model.state_dict().items() if not k.startswith("head.")}
    torch.save(state, tmp_path / "sam.pth")
    loaded = anypatch.load(
        tmp_path / "sam.pth", arch="timm:samvit_base_patch16", depth=2, embed_dim=32, num_heads=2, num_classes=0
    )
    pixels = torch.randn(1, 3, 128, 128)
    assert torch.equal(loaded.eval().forward_features(pixels), model.eval().forward_features(pixels))


@pytest.mark.parametrize("prefix", ["", "model.", "lit.net."])
def test_prefixes_before_the_names_of_transformers(tmp_path: Path, prefix: str) -> None:
    model = transformers_model(head="ForImageClassification", num_hidden_layers=2)
    model.config.architectures = ["ViTForImageClassification"]
    model.config.save_pretrained(tmp_path)
    torch.save({"state_dict": {**_behind(prefix, model.state_dict()), "loss.w": torch.ones(1)} if prefix
                else model.state_dict()}, tmp_path / "lit.ckpt")  # fmt: skip
    loaded = anypatch.load(tmp_path / "lit.ckpt", arch=f"transformers:{tmp_path}")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_prefix_before_the_names_of_torchvision(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    full: nn.Module = torchvision.models.swin_t(num_classes=3)
    save_file({f"model.{k}": v.contiguous() for k, v in full.state_dict().items()}, tmp_path / "tv.safetensors")
    loaded = anypatch.load(tmp_path / "tv.safetensors", arch="torchvision:swin_t")
    assert all(torch.equal(v, full.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_keys_that_would_move_a_cursor_are_quoted_in_the_error(tmp_path: Path) -> None:
    torch.save({"\x1b[2J": 1, **{f"key {i}": i for i in range(9)}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"its keys are '\\x1b\[2J', key 0, .*, key 6 and 2 more$"):
        read(tmp_path / "x.pt")
