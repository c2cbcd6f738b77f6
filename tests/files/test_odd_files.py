"""What a file or a configuration may say that is odd: the error says it, in words of ours, and nothing is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save, save_file
from torch import Tensor

import anypatch
from anypatch import CheckpointError
from anypatch.files.tensors import listed

ARCH = "timm:test_vit"
KERNEL, TABLE = "patch_embed.proj.weight", "pos_embed"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in timm.create_model("test_vit").state_dict().items()}


def _refused(path: Path, match: str) -> str:
    said = []
    for act in (
        lambda: anypatch.load(path, 8, arch=ARCH),
        lambda: anypatch.convert(path, path.with_name("out.safetensors"), 8, arch=ARCH),
    ):
        with pytest.raises(CheckpointError, match=match) as caught:
            act()
        said.append(str(caught.value))
        assert len(said[-1]) < 1500
        said[-1].encode()
    return said[0]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("x" * 1_000_000, r"the name 'x+'… of a tensor has 1000000 characters"),
        ("\\ud800embed", r"the name '\\ud800embed' of a tensor is no text"),
        ("\\u001b[2Jembed", r"has no '\\x1b\[2Jembed'$"),
        ("", "has no ''$"),
    ],
)
def test_odd_names(tmp_path: Path, state: dict[str, Tensor], name: str, match: str) -> None:
    data = save(state)
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"pos_embed"', f'"{name}"'.encode())
    path = tmp_path / "odd names é.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    _refused(path, match)


@pytest.mark.parametrize("kind", ["models", "tensor"])
def test_long_names_in_archives(tmp_path: Path, state: dict[str, Tensor], kind: str) -> None:
    long = "x" * 100_000
    path, other = tmp_path / "odd.pth", {name: tensor + 1 for name, tensor in state.items()}
    torch.save({**state, long: torch.ones(2)} if kind == "tensor" else {long: state, long[1:]: other}, path)
    with pytest.raises(CheckpointError, match=r"of a tensor has \d+ characters") as caught:
        anypatch.load(path, 8)
    assert len(str(caught.value)) < 500


def test_names_are_quoted_where_nobody_would_see_them() -> None:
    assert listed(["a.b", "", "\x1b[2J", "é"]) == r"a.b, '', '\x1b[2J', é"


def test_tables_and_kernels_without_values(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "empty.safetensors"
    for name, shape in ((KERNEL, (64, 3, 0, 0)), (TABLE, (1, 0, 64))):
        save_file({**state, name: torch.zeros(shape)}, path)
        _refused(path, rf"{name}' of shape .* holds no values")


def test_advice_on_rectangles_is_for_tables_of_positions(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "other.safetensors"
    for name, tensor in ((KERNEL, torch.zeros(65, 3, 16, 16)), (TABLE, torch.zeros(64))):
        save_file({**state, name: tensor}, path)
        assert "img_size" not in _refused(path, rf"{name} has shape")
    save_file({**state, TABLE: torch.zeros(1, 99, 64)}, path)
    assert "img_size=(height, width)" in _refused(path, "pos_embed has shape")


def test_whole_numbers_say_what_would_work(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "int8.safetensors"
    save_file({**state, KERNEL: state[KERNEL].to(torch.int8)}, path)
    _refused(path, r"stored as torch.int8, where timm:test_vit has torch.float32: .* use those in floating point")


# -- configurations ----------------------------------------------------------------------------------------


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    path = tmp_path / "vit"
    transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **small)).save_pretrained(path)
    return path


def _says(folder: Path, **change: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return folder


def test_an_architecture_that_is_no_model_is_not_called(vit: Path, tmp_path: Path) -> None:
    """``pipeline`` is a function of transformers, which converting called with the configuration."""
    for name in ("pipeline", "AutoTokenizer", "logging", "os.system"):
        _says(vit, architectures=[name])
        assert type(anypatch.load(vit, 4)).__name__ == "ViTModel"  # of the type that the configuration says
        with pytest.raises(CheckpointError, match=rf"names no class of transformers \(\['{name}'\]\)"):
            anypatch.convert(vit, tmp_path / "out", 4)


@pytest.mark.slow
def test_a_pipeline_is_no_model_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    from anypatch.hosts.diffusers.model import _model_class

    assert _model_class("DiTTransformer2DModel") is diffusers.DiTTransformer2DModel
    for name in ("DiTPipeline", "DiffusionPipeline", "logging", "no such", None):
        assert _model_class(name) is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architectures": [1]}, r"config.json: architectures is \[1\], which names no class"),
        ({"architectures": {"a": 1}}, "config.json: architectures is .*, which names nothing"),
        ({"model_type": ["vit"]}, "config.json: model_type is .*, which names nothing"),
        ({"quantization_config": [1]}, "config.json: quantization_config is .*, which names nothing"),
        ({"patch_size": "8x8"}, r"(cannot load|takes no configuration from) .*'patch_size'.*'8x8'"),
        ({"patch_size": 5}, r"' has shape .*\b(17|8), .*, but config.json says .*\b(37|5), "),
        ({"image_size": 0}, r"position_embeddings' has shape \(1, 17, 16\), but config.json says \(1, 1, 16\)"),
        ({"hidden_act": "evil"}, "evil"),
    ],
)
def test_configurations_of_transformers(vit: Path, tmp_path: Path, change: dict[str, Any], match: str) -> None:
    _says(vit, **change)
    for act in (lambda: anypatch.load(vit, 4), lambda: anypatch.convert(vit, tmp_path / "out", 4)):
        with pytest.raises(CheckpointError, match=match):
            act()
    assert not (tmp_path / "out").exists()


def test_a_tensor_of_another_shape_is_named(vit: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has shape \(32,.*\), but config.json says \(64,.*\)"):
        anypatch.load(_says(vit, intermediate_size=64), 4)


def test_a_package_that_the_library_asks_for_is_named(vit: Path) -> None:
    pytest.importorskip("accelerate")
    _says(vit, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(anypatch.AnypatchError, match="bitsandbytes") as caught:
        anypatch.load(vit, 4)
    assert "anypatch[transformers]" not in str(caught.value)
