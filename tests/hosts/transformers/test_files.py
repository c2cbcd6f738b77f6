"""Directories of transformers' format: what is loaded from them and saved to them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import anypatch
from anypatch import CheckpointError, UnsupportedModelError
from builders import transformers_model


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
    model = peft.get_peft_model(transformers_model(), peft.LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1) if "lora_" in name else None
    model.save_pretrained(folder)
    transformers_model().save_pretrained(folder)
    loaded = anypatch.load(folder)
    assert any("lora_" in name for name, _ in loaded.named_parameters())
    return loaded


def _attached(folder: Path) -> Any:
    """Adapters that transformers attached to a model in hand."""
    _with_adapters(folder)
    shutil.rmtree(folder / "base", ignore_errors=True)
    transformers_model().save_pretrained(folder / "base")
    model = transformers.ViTModel.from_pretrained(folder / "base")
    model.load_adapter(str(folder))
    return model


def _renamed(folder: Path) -> Any:
    """A file in somebody's own terms, translated as the caller says."""
    model = transformers_model()
    model.save_pretrained(folder)
    renamed = {f"mine.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return anypatch.load(folder, key_mapping={r"^mine\.": ""})


@pytest.mark.parametrize("make", [_with_adapters, _attached, _renamed])
def test_what_a_loader_translated_is_written_in_the_librarys_own_terms(tmp_path: Path, make: Any) -> None:
    _assert_saves_the_same(make(tmp_path / "in"), tmp_path / "out")


@pytest.mark.slow  # imports two large modules
def test_a_class_that_the_library_keeps_to_its_module(tmp_path: Path) -> None:
    name = "transformers.models.deepseek_ocr2"
    modeling = pytest.importorskip(f"{name}.modeling_deepseek_ocr2")
    kind = modeling.DeepseekOcr2SamVisionEncoder
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 32, "window_size": 2}
    config = kind.config_class(**options, image_size=64, patch_size=8, output_channels=16, global_attn_indexes=[0])
    kind(config).save_pretrained(tmp_path / "in")
    anypatch.convert(tmp_path / "in", tmp_path / "out", 16, image_size=128)
    found = kind.from_pretrained(tmp_path / "out")
    assert found.patch_embed.projection.weight.shape[-2:] == (16, 16)
    assert not hasattr(transformers, kind.__name__)


# -- models that a user changed ---------------------------------------------------------------------------------


def _cut(model: Any) -> None:
    model.layers = model.layers[:1]


def _tied(model: Any) -> None:
    model.layers[1].mlp.fc1.weight = model.layers[0].mlp.fc1.weight


def _both(model: Any) -> None:
    _tied(model)
    model.layers.append(model.layers[0])


@pytest.mark.parametrize("change", [_cut, _tied, _both])
def test_cut_and_tied_layers(tmp_path: Path, change: Any) -> None:
    model = transformers_model(num_hidden_layers=2)
    change(model)
    _assert_saves_the_same(model, tmp_path / "out")
    assert model.config.num_hidden_layers == 2  # the live model is left alone
    written = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert written.num_hidden_layers == len(model.layers)


def _linear(model: Any) -> None:
    model.classifier = torch.nn.Linear(32, 7)


def _no_head(model: Any) -> None:
    model.classifier = torch.nn.Identity()


def _two_heads(model: Any) -> None:
    model.cls_classifier, model.distillation_classifier = torch.nn.Linear(32, 7), torch.nn.Linear(32, 7)


@pytest.mark.parametrize(
    ("kind", "head", "change", "classes"),
    [
        ("ViT", "ForImageClassification", _linear, 7),
        ("ViT", "ForImageClassification", _no_head, 0),
        ("DeiT", "ForImageClassificationWithTeacher", _two_heads, 7),
    ],
)
def test_the_number_of_classes_is_the_heads(tmp_path: Path, kind: str, head: str, change: Any, classes: int) -> None:
    model = transformers_model(kind, head, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    change(anypatch.adapt(model, 4))
    anypatch.save(model, tmp_path / "out")
    assert model.config.id2label == {0: "cat", 1: "dog"}  # the live model is left alone
    found = type(model).from_pretrained(tmp_path / "out")
    assert found.config.num_labels == len(found.config.label2id) == classes
    assert "cat" not in found.config.label2id  # whose row is gone
    wanted = model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.state_dict().items())
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(found(pixels).logits, model(pixels).logits, atol=1e-5, rtol=1e-4)


def _deep_head(model: Any) -> None:
    model.classifier = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Linear(8, 7))


def _one_of_two(model: Any) -> None:
    model.cls_classifier = torch.nn.Linear(32, 7)


@pytest.mark.parametrize(
    ("kind", "head", "change", "match"),
    [
        ("ViT", "ForImageClassification", _deep_head, r"classifier\.0\.bias, which it would not have"),
        ("DeiT", "ForImageClassificationWithTeacher", _one_of_two, r"cls_classifier\.bias of shape \(2,\)"),
    ],
)
def test_a_head_that_no_number_of_classes_makes(tmp_path: Path, kind: str, head: str, change: Any, match: str) -> None:
    model = transformers_model(kind, head)
    change(model)
    with pytest.raises(UnsupportedModelError, match=match):
        anypatch.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_value_that_the_configuration_does_not_say(tmp_path: Path) -> None:
    model = transformers_model()
    model.layers[0].layernorm_before.eps = 0.5
    with pytest.raises(UnsupportedModelError, match=r"eps 1e-12 at layers\.0\.layernorm_before, where .* 0\.5"):
        anypatch.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- quantised models ---------------------------------------------------------------------------------------------


def _quantised() -> Any:
    """As transformers loads a model whose linear layers are packed, four values in a byte."""
    from transformers.integrations import replace_with_bitnet_linear
    from transformers.quantizers.quantizer_bitnet import BitNetHfQuantizer

    model: Any = transformers_model(head="ForImageClassification")
    config = transformers.BitNetQuantConfig(modules_to_not_convert=["classifier"])
    replace_with_bitnet_linear(model, ["classifier"], config)
    for layer in model.modules():
        if type(layer).__name__ == "BitLinear":
            layer.to_empty(device="cpu")
            layer.weight.random_(0, 255)
            layer.weight_scale.fill_(2.0)
            layer.bias.normal_()
    model.hf_quantizer, model.is_quantized = BitNetHfQuantizer(config), True
    model.config.quantization_config = config
    return model


def test_a_quantised_model_is_saved_as_it_is(tmp_path: Path) -> None:
    model = anypatch.adapt(_quantised(), 16, image_size=64)
    anypatch.save(model, tmp_path / "out")
    found = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
    assert type(found.vit.layers[0].mlp.fc1).__name__ == "BitLinear"
    assert found.config.patch_size == 16
    wanted = model.state_dict()
    assert wanted.keys() == found.state_dict().keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.state_dict().items())


def _other_head(model: Any) -> None:
    model.classifier = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Linear(8, 2))


def _other_activation(model: Any) -> None:
    model.vit.layers[0].mlp.activation_fn = torch.nn.ReLU()


def _own_parameter(model: Any) -> None:
    model.vit.register_parameter("extra", torch.nn.Parameter(torch.ones(3)))


def _unpacked(model: Any) -> None:
    model.vit.layers[0].mlp.fc1 = torch.nn.Linear(32, 32)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_other_head, r"classifier\.0\.bias, which it would not have"),
        (_other_activation, "a GELUActivation as vit.layers.0.mlp.activation_fn, where the model has a ReLU"),
        (_own_parameter, "vit.extra, which it would not have"),
        (_unpacked, "makes a BitLinear of vit.layers.0.mlp.fc1, where the model has a Linear"),
    ],
)
def test_what_a_quantised_model_would_not_be_again_is_refused(tmp_path: Path, change: Any, match: str) -> None:
    model = _quantised()
    change(model)
    with pytest.raises(UnsupportedModelError, match=match):
        anypatch.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantised_projection_is_not_resampled(tmp_path: Path) -> None:
    """Values that a scale beside them belongs to say nothing on their own."""
    transformers_model().save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    tensors = load_file(path)
    (name,) = (n for n in tensors if n.endswith("projection.weight"))
    tensors[f"{name}_scale"] = torch.ones(1)
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, path, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"projection\.weight is quantised .*projection\.weight_scale lies beside"
    ):
        anypatch.convert(tmp_path / "in", tmp_path / "out", 16)


# -- links ------------------------------------------------------------------------------------------------------


def test_links_to_something_outside_stay_links(tmp_path: Path) -> None:
    """What a directory's author could not read does not go along with what is saved, nor is it written to."""
    secret, folder = tmp_path / "secret", tmp_path / "in"
    secret.mkdir()
    (secret / "key").write_text("{}")
    transformers_model().save_pretrained(folder)
    for name in ("vocab.txt", "README.md", "preprocessor_config.json"):
        (folder / name).symlink_to(secret / "key")
    (folder / "additional_chat_templates").symlink_to(secret)
    (folder / "merges.txt").write_text("mine")
    (folder / "special_tokens_map.json").symlink_to("merges.txt")  # inside
    model = anypatch.load(folder)
    anypatch.adapt(model, 16)
    anypatch.save(model, tmp_path / "out")
    for name in ("vocab.txt", "README.md", "preprocessor_config.json", "additional_chat_templates"):
        assert (tmp_path / "out" / name).is_symlink(), name
    assert not (tmp_path / "out" / "special_tokens_map.json").is_symlink()
    assert (tmp_path / "out" / "special_tokens_map.json").read_text() == "mine"
    assert (secret / "key").read_text() == "{}"
    with pytest.raises(CheckpointError, match=r"is a link to .*secret"):
        anypatch.push_to_hub(model, "some/model")
