"""Directories whose tensors are not those of their configuration: what transformers says of them is said, too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import anypatch
from anypatch import CheckpointError
from anypatch.errors import AnypatchWarning

transformers = pytest.importorskip("transformers")

State = dict[str, Tensor]
LOADS: tuple[str, ...] = ("load", "convert")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    config.num_labels = 5
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def _edit(folder: Path, edit: Callable[[State], State]) -> None:
    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def _use(verb: str, folder: Path) -> None:
    if verb == "load":
        anypatch.load(folder, patch_size=16)
    else:
        anypatch.convert(folder, folder.with_name("out"), patch_size=16)


@pytest.mark.parametrize("verb", LOADS)
@pytest.mark.parametrize("part", [".1.intermediate.dense.weight", "classifier.bias", ".2.output.dense.bias"])
def test_another_width_is_refused_as_transformers_refuses_it(folder: Path, part: str, verb: str) -> None:
    """Of tensors that have nothing to do with the geometry."""
    _edit(folder, lambda state: {n: torch.cat([t, t]) if n.endswith(part) else t for n, t in state.items()})
    with pytest.raises(RuntimeError, match="mismatched"):
        transformers.ViTForImageClassification.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=part):
        _use(verb, folder)
    assert not folder.with_name("out").exists()


@pytest.mark.parametrize("verb", LOADS)
@pytest.mark.parametrize("part", ["encoder.layer.1.", "classifier."])
def test_what_is_missing_is_said(folder: Path, part: str, verb: str) -> None:
    """transformers makes random values of it, and says so in a log that the command line does not show."""
    _edit(folder, lambda state: {n: t for n, t in state.items() if part not in n})
    host = transformers.ViTForImageClassification.from_pretrained(folder, output_loading_info=True)[1]
    count = len(host["missing_keys"])
    with pytest.warns(AnypatchWarning, match="lacks .* random values") as told:
        _use(verb, folder)
    (said,) = [str(w.message) for w in told if "lacks" in str(w.message)]
    assert f"{count - 3} more" in said or said.count("classifier.") == count


@pytest.mark.parametrize("verb", LOADS)
def test_what_is_left_over_is_said(folder: Path, verb: str) -> None:
    extra = {"aux_head.weight": torch.zeros(7, 3), "optimizer.step": torch.zeros(1)}
    _edit(folder, lambda state: {**state, **extra})
    with pytest.warns(AnypatchWarning, match=r"holds aux_head.weight, optimizer.step, which .* leaves them out"):
        _use(verb, folder)
    if verb == "convert":
        assert extra.keys() <= load_file(folder.with_name("out") / "model.safetensors").keys()


@pytest.mark.parametrize("names", ["of files", "of the model"])
def test_nothing_is_said_of_what_fits(folder: Path, names: str) -> None:
    """Under the names of older files, of which there are other versions of the library, and under the model's."""
    if names == "of the model":
        model = transformers.ViTForImageClassification.from_pretrained(folder)
        _edit(folder, lambda state: {n: t.clone() for n, t in model.state_dict().items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error", AnypatchWarning)
        for verb in LOADS:
            _use(verb, folder)


def test_a_caller_who_chooses_the_class_knows_what_is_left_over(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", AnypatchWarning)
        anypatch.load(folder, model_class="ViTModel", add_pooling_layer=False)
