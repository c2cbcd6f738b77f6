"""``flexible``: a patch size or a budget of tokens with every call, one set of weights."""

from __future__ import annotations

import copy
import os
import pickle
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import anypatch
from anypatch import GeometryError, UnsupportedModelError
from builders import random_vit as vit


def test_every_patch_size_equals_an_adapted_copy() -> None:
    model = vit()
    flexible = anypatch.flexible(model, (4, 16, (8, 16)))
    assert flexible.patch_sizes == ((4, 4), (8, 8), (8, 16), (16, 16))
    for image, patch in ((32, 4), (32, 8), (32, (8, 16)), (32, 16), (48, 16), (16, 8), ((64, 32), 4)):
        height, width = (image, image) if isinstance(image, int) else image
        pixels = torch.randn(2, 3, height, width)
        wanted = anypatch.adapt(copy.deepcopy(model), patch, image)(pixels)
        torch.testing.assert_close(flexible(pixels, patch_size=patch), wanted, rtol=0, atol=0)
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(flexible(pixels), model(pixels), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("image", "tokens", "patch"), [(32, 64, 4), (32, 63, 8), (32, 16, 8), (32, 15, 16), (64, 16, 16), (48, 40, 8)]
)
def test_a_budget_of_tokens_takes_the_finest_patch(image: int, tokens: int, patch: int) -> None:
    model = vit()
    flexible = anypatch.flexible(model, (4, 16))
    pixels = torch.randn(1, 3, image, image)
    wanted = anypatch.adapt(copy.deepcopy(model), patch, image)(pixels)
    torch.testing.assert_close(flexible(pixels, tokens=tokens), wanted, rtol=0, atol=0)


def test_what_is_asked_wrongly() -> None:
    model = vit()
    flexible = anypatch.flexible(model, [16])
    pixels = torch.randn(1, 3, 32, 32)
    with pytest.raises(GeometryError, match="not among those of this flexible model: 8x8, 16x16"):
        flexible(pixels, patch_size=4)
    with pytest.raises(GeometryError, match="at most 3 tokens of images of 32x32: 4 are the fewest"):
        flexible(pixels, tokens=3)
    with pytest.raises(GeometryError, match="not both"):
        flexible(pixels, patch_size=8, tokens=3)
    with pytest.raises(GeometryError, match="does not divide"):
        flexible(torch.randn(1, 3, 40, 40), patch_size=16)
    for tokens in ("many", 4.0, True):
        with pytest.raises(GeometryError, match="whole number of patches"):
            flexible(pixels, tokens=tokens)
    for images in (None, pixels[0], [pixels]):
        with pytest.raises(GeometryError, match=r"images are a tensor \(n, channels, height, width\), not"):
            flexible(images, patch_size=16)
    for sizes in ((), 16, [0], ["big"]):
        with pytest.raises(GeometryError):
            anypatch.flexible(model, sizes)
    with pytest.raises(UnsupportedModelError, match="has views"):
        anypatch.adapt(flexible, 4)


def test_modules_that_are_exchanged_are_in_every_view() -> None:
    peft = pytest.importorskip("peft")
    model, pixels = vit(), torch.randn(1, 3, 32, 32)
    flexible = anypatch.flexible(model, [16])
    without = flexible(pixels, patch_size=16)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False))
    model.reset_classifier(3)
    found = flexible(pixels, patch_size=16)
    assert found.shape != without.shape
    torch.testing.assert_close(found, anypatch.adapt(copy.deepcopy(model), 16)(pixels), rtol=0, atol=0)


def test_a_pickled_flexible_model_is_the_same() -> None:
    flexible, pixels = anypatch.flexible(vit(), [16]), torch.randn(1, 3, 32, 32)
    back = pickle.loads(pickle.dumps(flexible))
    for size in (8, 16):
        torch.testing.assert_close(back(pixels, patch_size=size), flexible(pixels, patch_size=size), rtol=0, atol=0)


def test_names_and_state_are_the_models() -> None:
    model = vit()
    flexible = anypatch.flexible(model, [4, 16])
    assert dict(flexible.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert flexible.state_dict().keys() == model.state_dict().keys()
    assert flexible.model is model
    assert anypatch.geometry(flexible) == anypatch.geometry(model)
    flexible.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    pixels = torch.randn(1, 3, 32, 32)
    wanted = anypatch.adapt(copy.deepcopy(model), 16)(pixels)
    torch.testing.assert_close(flexible(pixels, 16), wanted, rtol=0, atol=0)
    flexible.train()
    assert all(m.training for face in (model, flexible.at(16), flexible.at(4)) for m in face.modules())
    assert not any(m.training for m in flexible.eval().at(16).modules())
    copied = copy.deepcopy(flexible)
    with torch.no_grad():
        model.pos_embed.zero_()
    torch.testing.assert_close(copied(pixels, 16), wanted, rtol=0, atol=0)


def test_models_that_take_pixels_by_name() -> None:
    config = transformers.CLIPConfig(
        text_config={
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "vocab_size": 9,
            "intermediate_size": 8,
        },
        vision_config={
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 32,
            "patch_size": 8,
            "intermediate_size": 8,
        },
        projection_dim=4,
    )
    model = transformers.CLIPModel(config).eval()
    flexible = anypatch.flexible(model, [16])
    pixels, words = torch.randn(2, 3, 32, 32), torch.tensor([[1, 2, 8]])
    wanted = anypatch.adapt(copy.deepcopy(model), 16)(pixel_values=pixels, input_ids=words).image_embeds
    torch.testing.assert_close(flexible(pixels, 16, input_ids=words).image_embeds, wanted, rtol=0, atol=0)


# -- several processes -------------------------------------------------------------------------------------------


def _port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _batches() -> list[tuple[int, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(patch, torch.randn(4, 3, 32, 32, generator=generator)) for patch in (4, 8, 16, 8)]


def _train(model: nn.Module, share: Callable[[torch.Tensor], torch.Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for patch, pixels in _batches():
        optimizer.zero_grad()
        model(share(pixels), patch_size=patch).square().mean().backward()
        optimizer.step()


def _work(rank: int, port: int, kind: str, results: Any) -> None:
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    flexible = anypatch.flexible(vit(), (4, 16))
    if kind == "DistributedDataParallel":  # every step uses every parameter: no search for unused ones
        _train(nn.parallel.DistributedDataParallel(flexible), lambda pixels: pixels[rank::2])
        state = {name: value.clone() for name, value in flexible.state_dict().items()}
    else:
        from torch.distributed.fsdp import fully_shard

        fully_shard(flexible)
        _train(flexible, lambda pixels: pixels[rank::2])
        state = {name: p.full_tensor().clone() for name, p in flexible.named_parameters()}
    if rank == 0:
        results.put({name: value.detach().numpy() for name, value in state.items()})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # at an ordinary end gloo's threads, which fully_shard still holds, abort now and then


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DistributedDataParallel", "fully_shard"])
def test_two_processes_train_like_one(kind: str) -> None:
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    port = _port()
    workers = [context.Process(target=_work, args=(rank, port, kind, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    alone = anypatch.flexible(vit(), (4, 16))
    _train(alone, lambda pixels: pixels)
    for worker in workers:
        worker.join(240)
        assert worker.exitcode == 0
    found = results.get()
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(torch.from_numpy(found[name]), parameter.detach(), rtol=1e-5, atol=1e-6)
