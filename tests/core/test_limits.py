"""Memory is estimated before it is taken, and the caller may allow more."""

from __future__ import annotations

import resource
import threading

import pytest
import timm
import torch
from torch import nn

import anypatch
from anypatch import AnypatchError
from anypatch.core.empty import empty
from anypatch.core.limits import DEFAULT, LimitError, limit


def _taken() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "beitv2_base_patch16_224", "vit_relpos_small_patch16_224"])
def test_adapting_to_an_enormous_image(name: str) -> None:
    model = timm.create_model(name, depth=1)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = _taken()
    with pytest.raises(AnypatchError, match=r"would take [\d.]+ GB .*memory_limit"):
        anypatch.adapt(model, image_size=224 * 64)
    assert _taken() - before < 1 << 30
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_the_bound_may_be_raised_and_lowered() -> None:
    model = timm.create_model("beit_base_patch16_224", depth=1)
    # the indices: (28 * 28 + 1)**2 numbers of 8 bytes, and on the way two coordinates of each
    with anypatch.memory_limit(4 << 20), pytest.raises(AnypatchError, match="GB are allowed"):
        anypatch.adapt(model, image_size=448)
    with anypatch.memory_limit(64 << 20):
        anypatch.adapt(model, image_size=448)
    assert limit() == DEFAULT
    seen: list[int] = []
    with anypatch.memory_limit(5):
        thread = threading.Thread(target=lambda: seen.append(limit()))
        thread.start()
        thread.join()
    assert seen == [DEFAULT]  # another thread's work is not bounded by it


def test_weights_and_the_image_of_a_proof_are_bounded_before_they_are_made() -> None:
    """A patch of 5000 for one of 50 took the machine's memory, kernel by kernel and pixel by pixel."""
    model = timm.create_model("test_vit")  # 64 channels, 10 x 10 patches of 16
    before = _taken()
    with pytest.raises(LimitError, match=r"weights at patch 5000x5000 would take 19\.2 GB more, and 4\.3 GB are"):
        anypatch.adapt(model, 5000, keep="grid")
    with pytest.raises(LimitError, match=r"image of the proof, of patches of 2000x2000, would take 9\.6 GB more"):
        anypatch.check(timm.create_model("test_vit", img_size=160, in_chans=3, embed_dim=8, num_heads=1), 2000)
    assert _taken() - before < 1 << 30
    with anypatch.memory_limit(64 * 3 * 4 * (32 * 32 - 16 * 16) + 1):
        anypatch.adapt(model, 32, keep="grid")


def _holding(*buffers: torch.Tensor) -> nn.Module:
    module = nn.Module()
    for index, buffer in enumerate(buffers):
        module.register_buffer(str(index), buffer)
    return module


@pytest.mark.parametrize(
    "build",
    [
        lambda: _holding(torch.zeros(1 << 40)),
        lambda: torch.arange(1 << 40),
        lambda: _holding(torch.zeros(1 << 20)[:, None] * torch.zeros(1 << 20)),
        lambda: torch.zeros(1).expand(1 << 40).contiguous(),
        lambda: torch.zeros(2).repeat(1 << 40),
        pytest.param(lambda: _holding(*(torch.arange(1 << 28) for _ in range(100))), marks=pytest.mark.slow),
    ],
)
def test_whatever_asks_for_it(build: object) -> None:
    before = _taken()
    with pytest.raises(LimitError):
        empty(build)  # type: ignore[arg-type]
    assert _taken() - before < 5 << 30


def test_what_is_dropped_does_not_count() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for _ in range(20):
                self.last = torch.arange(1 << 19)

    with anypatch.memory_limit(16 << 20):
        empty(Model)


def test_parameters_take_none() -> None:
    with anypatch.memory_limit(16 << 20):
        assert empty(lambda: nn.Linear(1 << 14, 1 << 14)).weight.is_meta  # type: ignore[union-attr]


def test_the_environment_says_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYPATCH_MEMORY_LIMIT", "123")
    assert limit() == 123
    monkeypatch.setenv("ANYPATCH_MEMORY_LIMIT", "")
    assert limit() == 4 << 30


@pytest.mark.parametrize("text", ["8G", "-1", "1e9", "0x10", "²"])
def test_a_misspelt_bound_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """It went unsaid, and the default held."""
    monkeypatch.setenv("ANYPATCH_MEMORY_LIMIT", text)
    with pytest.raises(AnypatchError, match=r"ANYPATCH_MEMORY_LIMIT .*bytes"):
        limit()
