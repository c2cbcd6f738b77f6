"""Two sets of weights in one directory: which is taken is what the host library takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import anypatch
from anypatch import CheckpointError
from builders import transformers_model

NAME = "embeddings.cls_token"  # a tensor that does not follow the geometry


def _both(folder: Path, first: Any, second: Any) -> None:
    """One file of the first model, and shards of the second with their index."""
    second.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    save_file(first.state_dict(), folder / "model.safetensors", {"format": "pt"})


def _named(folder: Path, first: Any, second: Any) -> None:
    second.save_pretrained(folder)
    save_file(first.state_dict(), folder / "other.safetensors", {"format": "pt"})
    _say(folder, "other.safetensors")


def _named_shards(folder: Path, first: Any, second: Any) -> None:
    first.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors.index.json").rename(folder / "other.safetensors.index.json")
    save_file(second.state_dict(), folder / "model.safetensors", {"format": "pt"})
    _say(folder, "other.safetensors.index.json")


def _say(folder: Path, name: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))


@pytest.mark.parametrize("write", [_both, _named, _named_shards])
def test_convert_takes_what_transformers_takes(tmp_path: Path, write: Callable[[Path, Any, Any], None]) -> None:
    if write is not _both and not _knows_names():
        pytest.skip("this transformers does not know transformers_weights")
    first, second = transformers_model(), transformers_model()
    assert not torch.equal(first.state_dict()[NAME], second.state_dict()[NAME])
    write(tmp_path / "vit", first, second)
    kind = type(first)
    assert torch.equal(kind.from_pretrained(tmp_path / "vit").state_dict()[NAME], first.state_dict()[NAME])
    anypatch.convert(tmp_path / "vit", tmp_path / "out", patch_size=4)
    converted = kind.from_pretrained(tmp_path / "out")
    reference = anypatch.adapt(first, 4).state_dict()
    assert all(torch.equal(value, reference[name]) for name, value in converted.state_dict().items())


def _knows_names() -> bool:
    import inspect

    from transformers import modeling_utils

    return "transformers_weights" in inspect.getsource(modeling_utils)


@pytest.mark.parametrize("name", ["missing.safetensors", "../vit/model.safetensors", 3, "sub"])
def test_a_name_of_weights_that_is_none(tmp_path: Path, name: Any) -> None:
    transformers_model().save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "sub").mkdir()
    _say(tmp_path / "vit", name)
    with pytest.raises(CheckpointError, match=r"holds no \w+|outside the directory"):
        anypatch.convert(tmp_path / "vit", tmp_path / "out", patch_size=4)
    assert not (tmp_path / "out").exists()


def test_weights_in_another_file_are_for_load_and_save(tmp_path: Path) -> None:
    """What convert does not read, it says what does."""
    model = transformers_model()
    model.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "vit" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds neither .* read by anypatch\.load"):
        anypatch.convert(tmp_path / "vit", tmp_path / "out", patch_size=4)
    anypatch.save(anypatch.load(tmp_path / "vit", patch_size=4), tmp_path / "out")
    shutil.rmtree(tmp_path / "vit")
    assert anypatch.geometry(anypatch.load(tmp_path / "out")).patch_size == (4, 4)


def test_no_room_for_temporary_files_is_one_of_our_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    import timm

    anypatch.save(timm.create_model("test_vit", img_size=32, patch_size=8), tmp_path / "vit")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match=r"cannot convert .*vit: No such file.*out is what it was"):
        anypatch.convert(tmp_path / "vit", tmp_path / "out", patch_size=4)
    assert not (tmp_path / "out").exists()


def test_a_table_that_looks_like_weights_comes_along(tmp_path: Path) -> None:
    """Qwen2.5-Omni does not load without its table of voices, whatever changes in the model."""
    folder = tmp_path / "vit"
    transformers_model().save_pretrained(folder)
    torch.save({"voice": torch.ones(2)}, folder / "spk_dict.pt")
    table = (folder / "spk_dict.pt").read_bytes()
    anypatch.convert(folder, tmp_path / "converted", patch_size=4)
    anypatch.save(anypatch.load(folder, patch_size=4), tmp_path / "saved")
    anypatch.convert(folder, folder, patch_size=4)
    for place in ("converted", "saved", "vit"):
        assert (tmp_path / place / "spk_dict.pt").read_bytes() == table


def test_pickled_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    """The library's own words stand where the file is none whose header can be looked at."""
    model = transformers_model()
    model.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "model.safetensors").unlink()
    state = {**model.state_dict(), NAME: torch.ones(1, 1, 7)}
    torch.save(state, tmp_path / "vit" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="mismatched") as caught:
        anypatch.load(tmp_path / "vit")
    assert "holds neither" not in str(caught.value)
