"""What ``save`` writes loads again in the host library and says the same, whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import anypatch
from anypatch import CheckpointError, UnsupportedModelError
from anypatch.core.merging import merged
from anypatch.files import atomic, flushing
from builders import SMALL, transformers_model


def _vit() -> Any:
    return transformers_model(num_hidden_layers=2, image_size=64, patch_size=16)


def _tiny(**arguments: Any) -> Any:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=7, **arguments).eval()


def _shake(model: nn.Module) -> nn.Module:
    """Adapters start at zero: give every parameter a value that shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def _contents(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


# -- models that are more than their library builds ----------------------------------------------------------


def _loha(peft: Any) -> Any:
    return peft.LoHaConfig(target_modules=["q_proj"])


ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "LoRA": lambda peft: peft.LoraConfig(target_modules=["q_proj", "v_proj"]),
    "LoRA over the projection": lambda peft: peft.LoraConfig(target_modules=["q_proj", "projection"]),
    "LoRA and a trained layer": lambda peft: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["layernorm"]),
    "IA3": lambda peft: peft.IA3Config(target_modules=["q_proj", "fc1"], feedforward_modules=["fc1"]),
    "DoRA": lambda peft: peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
    "LoHa": _loha,
}


@pytest.mark.siblings(fast=7)
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("injected", [False, True])
def test_adapters_are_merged(tmp_path: Path, kind: str, injected: bool) -> None:
    peft = pytest.importorskip("peft")
    make = peft.inject_adapter_in_model if injected else lambda config, model: peft.get_peft_model(model, config)
    model = _shake(make(ADAPTERS[kind](peft), _vit()))
    model._hf_peft_config_loaded = injected  # what transformers' own add_adapter leaves beside what it injects
    anypatch.adapt(model, 32, image_size=128)
    pixels = torch.randn(1, 3, 128, 128)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(pixels).last_hidden_state
        anypatch.save(model, tmp_path / "out")
        found = transformers.ViTModel.from_pretrained(tmp_path / "out").eval()(pixels).last_hidden_state
        assert torch.equal(model(pixels).last_hidden_state, wanted)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("model_there", [False, True])
def test_a_directory_with_an_adapter_takes_no_whole_model(tmp_path: Path, model_there: bool) -> None:
    """transformers would put that adapter on the model beside it, which was never trained with it."""
    peft = pytest.importorskip("peft")
    peft.get_peft_model(_vit(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "out")
    if model_there:
        _vit().save_pretrained(tmp_path / "out")
    before = _contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"out holds an adapter of PEFT .*name another directory"):
        anypatch.save(_vit(), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"out holds an adapter"):
        anypatch.convert(tmp_path / "out", tmp_path / "other", 32)
    assert _contents(tmp_path) == before


def test_adapters_that_are_switched_off_are_left_out(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = _vit()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = base(pixels).last_hidden_state
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
        for name, parameter in model.named_parameters():
            parameter.add_(1.0) if "lora_" in name else None
        with model.disable_adapter():
            anypatch.save(model, tmp_path / "out")
        found = transformers.ViTModel.from_pretrained(tmp_path / "out").eval()(pixels).last_hidden_state
    torch.testing.assert_close(found, wanted)


def test_adapters_in_a_timm_model_are_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = _shake(peft.get_peft_model(_tiny(), peft.LoraConfig(target_modules=["qkv"], modules_to_save=["head"])))
    anypatch.adapt(model, 8)
    _same_after_saving(model, tmp_path)


def _replicated(peft: Any) -> Any:
    return peft.get_peft_model(_vit(), peft.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 1], [0, 2]]))


def _tied_weights(peft: Any) -> Any:
    model = _vit()
    model.layers[1].attention.q_proj.weight = model.layers[0].attention.q_proj.weight
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


def _one_layer_twice(peft: Any) -> Any:
    model = _vit()
    model.layers[1].attention.q_proj = model.layers[0].attention.q_proj
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


def _one_over_another(peft: Any) -> Any:
    model = peft.get_peft_model(_vit(), peft.LoraConfig(target_modules=["q_proj"]), mixed=True)
    model.add_adapter("second", peft.LoHaConfig(target_modules=["q_proj", "v_proj"]))
    model.set_adapter(["default", "second"])
    return model


@pytest.mark.parametrize("make", [_replicated, _tied_weights, _one_layer_twice, _one_over_another])
def test_adapters_over_layers_that_share_their_weights(tmp_path: Path, make: Callable[[Any], Any]) -> None:
    model = _shake(make(pytest.importorskip("peft")))
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = model(pixel_values=pixels).last_hidden_state
        anypatch.save(model, tmp_path / "out")
        found = transformers.ViTModel.from_pretrained(tmp_path / "out").eval()(pixels).last_hidden_state
        assert torch.equal(model(pixel_values=pixels).last_hidden_state, wanted)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def _llava() -> Any:
    tower = {"model_type": "clip_vision_model", **SMALL, "image_size": 32, "patch_size": 16}
    text = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 60,
    }
    text |= {"intermediate_size": 64, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=50, tie_word_embeddings=True
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_an_adapter_over_one_of_two_tied_layers_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = _shake(peft.get_peft_model(_llava(), peft.LoraConfig(target_modules=["lm_head"])))
    with pytest.raises(UnsupportedModelError, match=r"rebuilt otherwise, with .*lm_head\.weight"):
        anypatch.save(model, tmp_path / "out")


def test_adapters_that_are_tied_themselves_keep_the_tie(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 3])
    model = _shake(peft.get_peft_model(_llava(), config))
    inputs = {"pixel_values": torch.randn(1, 3, 32, 32), "input_ids": torch.tensor([[1, 50, 50, 50, 50, 3]])}
    with torch.no_grad():
        wanted = model(**inputs).logits
        anypatch.save(model, tmp_path / "out")
        found = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()(**inputs).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_adapters_that_do_not_merge_exactly_are_refused_by_name(tmp_path: Path) -> None:
    """PEFT's trained rows leave out the bias of a linear layer as long as they are not merged."""
    peft = pytest.importorskip("peft")
    config = peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["q_proj"])
    model = _shake(peft.get_peft_model(_vit(), config))
    with pytest.raises(UnsupportedModelError, match=r"adapter over layers\.0\..*q_proj \(TrainableTokensLayer\)"):
        anypatch.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_trained_prompts_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(_vit(), peft.LoraConfig(target_modules=["q_proj"]))
    model.prompt_encoder = nn.ModuleDict({"default": nn.Embedding(4, 32)})
    with pytest.raises(UnsupportedModelError, match="prompts"):
        anypatch.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _same_after_saving(model: Any, tmp_path: Path) -> None:
    """A timm model and what timm loads."""
    side = anypatch.geometry(model).image_size
    pixels = torch.randn(2, 3, *(side or ()))
    with torch.no_grad():
        wanted = model.eval()(pixels)
        anypatch.save(model, tmp_path / "out")
        found = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()(pixels)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def _weight_norm(model: Any) -> None:
    torch.nn.utils.weight_norm(model.blocks[0].mlp.fc1)


def _parametrised(model: Any) -> None:
    parametrizations.weight_norm(model.blocks[0].mlp.fc2)
    parametrizations.spectral_norm(model.blocks[1].mlp.fc1)


def _pruned(model: Any) -> None:
    prune.l1_unstructured(model.blocks[1].attn.qkv, "weight", amount=0.3)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight_orig.mul_(2)  # after the last forward pass


def _compiled(model: Any) -> None:
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")


def _parallel(model: Any) -> None:
    model.blocks[1] = nn.DataParallel(model.blocks[1])


def _tied(model: Any) -> None:
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight


def _other_order(model: Any) -> None:
    model.to(memory_format=torch.channels_last)


CHANGES = [_weight_norm, _parametrised, _pruned, _compiled, _parallel, _tied, _other_order]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_models_are_saved_as_their_library_builds_them(tmp_path: Path, change: Callable[[Any], None]) -> None:
    model = _tiny()
    change(model)
    names = set(model.state_dict())
    kind = {name: type(module) for name, module in model.named_modules()}
    _same_after_saving(model, tmp_path)
    assert set(model.state_dict()) == names
    assert {name: type(module) for name, module in model.named_modules()} == kind


def test_what_is_not_touched_shares_its_memory() -> None:
    model = _tiny()
    _pruned(model)
    copied = merged(model)
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in copied.parameters()}
    assert len(shared) == len(list(model.parameters())) - 2
    assert merged(_tiny().requires_grad_(False)) is not None
    plain = _tiny()
    assert merged(plain) is plain


def _no_head(model: Any) -> None:
    model.head = nn.Identity()


def _linear_head(model: Any) -> None:
    model.head = nn.Linear(192, 3)


def _no_swin_head(model: Any) -> None:
    model.head.fc = nn.Identity()


def _no_distilled_head(model: Any) -> None:
    model.head = model.head_dist = nn.Identity()


@pytest.mark.parametrize(
    ("name", "change", "arguments"),
    [
        ("vit_tiny_patch16_224", _no_head, {"depth": 1}),
        ("vit_tiny_patch16_224", _linear_head, {"depth": 1}),
        ("deit_tiny_distilled_patch16_224", _no_distilled_head, {"depth": 1}),
        ("swin_tiny_patch4_window7_224", _no_swin_head, {"window_size": 2, "depths": (1, 1, 1, 1), "embed_dim": 24}),
    ],
)
def test_replaced_heads(tmp_path: Path, name: str, change: Callable[[Any], None], arguments: dict[str, Any]) -> None:
    model = timm.create_model(name, img_size=64, **arguments)
    change(model)
    anypatch.adapt(model, [2 * p for p in anypatch.geometry(model).patch_size], image_size=128)
    _same_after_saving(model, tmp_path)
    assert model.num_classes == 1000  # the live model is left alone


def _cut(model: Any) -> None:
    model.blocks = model.blocks[:1]


def _without_the_first(model: Any) -> None:
    del model.blocks[0]


def _pruned_by_timm(model: Any) -> None:
    model.prune_intermediate_layers([0], prune_norm=False, prune_head=False)


@pytest.mark.parametrize("change", [_cut, _without_the_first, _pruned_by_timm])
def test_cut_blocks_are_saved_as_the_depth(tmp_path: Path, change: Callable[[Any], None]) -> None:
    model = _tiny()
    change(anypatch.adapt(model, 8))
    _same_after_saving(model, tmp_path)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]["depth"] == 1


def _other_epsilon(model: Any) -> None:
    model.blocks[1].norm1.eps = 0.5


def _other_heads(model: Any) -> None:
    model.blocks[0].attn.num_heads, model.blocks[0].attn.head_dim = 6, 32


def _deep_head(model: Any) -> None:
    model.head = nn.Sequential(nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 2))


def _activation(model: Any) -> None:
    model.blocks[0].mlp.act = nn.ReLU()


def _on_meta(model: Any) -> None:
    model.blocks[1].to("meta")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_deep_head, r"head\.0"),
        (_activation, "a GELU as"),
        (_on_meta, "meta device"),
        (_other_epsilon, r"eps 1e-06 at blocks\.1\.norm1, where the model has 0\.5"),
        (_other_heads, r"head_dim 64 at blocks\.0\.attn"),
    ],
)
def test_what_timm_would_not_rebuild_is_refused_by_name(
    tmp_path: Path, change: Callable[[Any], None], says: str
) -> None:
    model = _tiny()
    anypatch.save(model, tmp_path / "out")
    before = _contents(tmp_path)
    change(model)
    with pytest.raises(UnsupportedModelError, match=says):
        anypatch.save(model, tmp_path / "out")
    assert _contents(tmp_path) == before


def _extractor() -> Any:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, features_only=True, out_indices=(1,))


def _quantised(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_extractor, "timm cannot write FeatureGetterNet.*save its state_dict"),
        (lambda: _quantised(_tiny()), r"of timm's .* is quantised by torch"),
        (lambda: _quantised(_vit()), r"of transformers' ViTModel is quantised by torch"),
    ],
)
def test_what_a_library_cannot_write_is_refused_in_our_words(
    tmp_path: Path, make: Callable[[], Any], says: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        anypatch.save(make(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_swin_whose_pooling_went_with_its_head_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1, 1, 1))
    model.head = nn.Identity()  # timm's own model without classes pools all the same
    with pytest.raises(UnsupportedModelError, match="pool"):
        anypatch.save(model, tmp_path / "out")


def test_changed_models_of_transformers_are_refused(tmp_path: Path) -> None:
    model = _vit()
    model.layers[0].mlp.activation_fn = nn.ReLU()
    with pytest.raises(UnsupportedModelError, match="ReLU"):
        anypatch.save(model, tmp_path / "out")


def test_pooling_sizes_follow(tmp_path: Path) -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24)
    assert model.pretrained_cfg["pool_size"] == (7, 7)
    anypatch.adapt(model, image_size=448)
    assert (
        model.pretrained_cfg["pool_size"] == model.forward_features(torch.zeros(1, 3, 448, 448)).shape[1:3] == (14, 14)
    )
    anypatch.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["pool_size"] == [14, 14]


# -- directories ---------------------------------------------------------------------------------------------


def test_a_model_of_another_library_is_replaced_and_all_else_stays(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    _vit().save_pretrained(folder, max_shard_size="20KB")
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"stale")
    mine = {"training_args.bin": "mine", "optimizer.pt": "mine", "runs/1/events": "mine", "notes.json": "mine"}
    for name, text in mine.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    anypatch.save(_tiny(), folder)
    assert {*_contents(folder)} - {"README.md"} == {"config.json", "model.safetensors", *mine}
    timm.create_model(f"local-dir:{folder}", pretrained=True)
    torchvision = pytest.importorskip("torchvision")
    small = torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 64)
    anypatch.save(small, folder)
    assert {*_contents(folder)} - {"README.md"} == {"torchvision.json", "model.safetensors", *mine}
    anypatch.save(_vit(), folder)
    assert {*_contents(folder)} - {"README.md"} == {"config.json", "model.safetensors", *mine}
    assert all((folder / name).read_text() == text for name, text in mine.items())


def test_a_processor_that_lies_there_already_stays(tmp_path: Path) -> None:
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    anypatch.save(_vit(), tmp_path)
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path).size["height"] == 64


def test_saving_into_the_directory_that_was_loaded(tmp_path: Path) -> None:
    _vit().save_pretrained(tmp_path)
    model = anypatch.load(tmp_path, 8)  # its weights are mapped from the file that is replaced
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    anypatch.save(model, tmp_path)
    found = transformers.ViTModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("make", [_tiny, _vit])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, make: Callable[[], Any]) -> None:
    anypatch.save(make(), tmp_path / "out")
    before, other = _contents(tmp_path), anypatch.adapt(make(), 32)
    process = os.fork()
    if not process:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30 << 10,) * 2)
        try:
            anypatch.save(other, tmp_path / "out")
        except CheckpointError as error:
            os._exit(3 if "cannot write" in str(error) else 4)
        except BaseException:
            os._exit(5)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 3
    assert _contents(tmp_path) == before


def test_a_disk_that_fails_to_flush_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anypatch.save(_tiny(), tmp_path / "out")
    before = _contents(tmp_path)

    def failing(descriptor: int) -> None:
        raise OSError(5, "the disk is broken")

    monkeypatch.setattr(flushing, "_flush", failing)
    with pytest.raises(CheckpointError, match="the disk is broken"):
        anypatch.save(anypatch.adapt(_tiny(), 32), tmp_path / "out")
    assert _contents(tmp_path) == before


# -- kills ---------------------------------------------------------------------------------------------------


def _torchvision() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.VisionTransformer(64, 16, 1, 2, 32, 64).eval()


def _open_clip() -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 64, "patch_size": 16, "width": 96, "layers": 1, "head_width": 32},
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
    ).eval()


class Handmade(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 32, 16, 16)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, 32))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2) + self.pos_embed


HOSTS: dict[str, Callable[[], Any]] = {
    "timm": _tiny,
    "transformers": _vit,
    "torchvision": _torchvision,
    "open_clip": _open_clip,
    "structural": Handmade,
}


def _die_before(step: int) -> None:
    """Kill this process before its ``step``-th access to the file system, counted from the first write on."""
    seen = 0

    def count(event: str, arguments: Any) -> None:
        nonlocal seen
        if event == "open" or event.startswith(("os.", "shutil.", "ctypes.dlsym", "fcntl.")):
            seen += bool(seen or atomic.MARK in str(arguments))
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def _kills(make: Callable[[], Any], target: Path, stride: int) -> int:
    """Kill ``save`` before its accesses to the file system, one run each; how many kills there were."""
    old, new = make(), anypatch.adapt(make(), 32)
    states = []
    for model in (new, old):
        anypatch.save(model, target)
        states.append(_contents(target))
    step, met = 1, 0
    while True:
        process = os.fork()
        if not process:
            _die_before(step)
            anypatch.save(new, target)
            os._exit(0)
        finished = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        assert _contents(target) in states, f"step {step}"
        if finished:
            break
        met += 1
        step += stride
        if _contents(target) == states[0]:
            anypatch.save(old, target)
    anypatch.save(old, target)
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    assert _contents(target) == states[1]
    return met


@pytest.mark.siblings(fast=2)
@pytest.mark.parametrize("host", HOSTS)
def test_a_kill_leaves_the_old_or_the_new(tmp_path: Path, host: str) -> None:
    assert _kills(HOSTS[host], tmp_path / "out", 13) > 1


@pytest.mark.long
@pytest.mark.parametrize("host", HOSTS)
def test_kills_before_every_access_to_the_disk(tmp_path: Path, host: str) -> None:
    assert _kills(HOSTS[host], tmp_path / "out", 1) > 20


@pytest.mark.long
@pytest.mark.parametrize("host", HOSTS)
def test_two_hundred_kills_at_any_moment(tmp_path: Path, host: str) -> None:
    make, target = HOSTS[host], tmp_path / "out"
    old, new = make(), anypatch.adapt(make(), 32)
    states = []
    for model in (new, old):
        anypatch.save(model, target)
        states.append(_contents(target))
    began = time.monotonic()
    anypatch.save(new, target)
    whole = time.monotonic() - began
    met = 0
    for kill in range(200):
        process = os.fork()
        if not process:
            anypatch.save(new if kill % 2 else old, target)
            os._exit(0)
        time.sleep(whole * 1.1 * kill / 200)
        os.kill(process, signal.SIGKILL)
        met += os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) != 0
        assert _contents(target) in states, f"kill {kill}"
    assert met > 100
    anypatch.save(old, target)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
