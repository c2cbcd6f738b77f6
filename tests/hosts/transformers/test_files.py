"""Directories of transformers' format: what is loaded from them and saved to them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import anypatch

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def _vit() -> Any:
    return transformers.ViTModel(transformers.ViTConfig(**SMALL)).eval()


def _assert_saves_the_same(model: Any, place: Path) -> None:
    """What transformers loads from what was saved says what the model says."""
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = model.eval()(pixels).last_hidden_state
        anypatch.save(model, place)
        found = type(model).from_pretrained(place).eval()(pixels).last_hidden_state
        assert torch.equal(model(pixels).last_hidden_state, wanted)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


# -- names that a loader translated, and whose translation nobody asks for the next time ------------------------


def _with_adapters(folder: Path) -> Any:
    """A whole model and adapters in one directory, which transformers loads together."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(_vit(), peft.LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1) if "lora_" in name else None
    model.save_pretrained(folder)
    _vit().save_pretrained(folder)
    loaded = anypatch.load(folder)
    assert any("lora_" in name for name, _ in loaded.named_parameters())
    return loaded


def _attached(folder: Path) -> Any:
    """Adapters that transformers attached to a model in hand."""
    _with_adapters(folder)
    shutil.rmtree(folder / "base", ignore_errors=True)
    _vit().save_pretrained(folder / "base")
    model = transformers.ViTModel.from_pretrained(folder / "base")
    model.load_adapter(str(folder))
    return model


def _renamed(folder: Path) -> Any:
    """A file in somebody's own terms, translated as the caller says."""
    model = _vit()
    model.save_pretrained(folder)
    renamed = {f"mine.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return anypatch.load(folder, key_mapping={r"^mine\.": ""})


@pytest.mark.parametrize("make", [_with_adapters, _attached, _renamed])
def test_what_a_loader_translated_is_written_in_the_librarys_own_terms(tmp_path: Path, make: Any) -> None:
    _assert_saves_the_same(make(tmp_path / "in"), tmp_path / "out")
