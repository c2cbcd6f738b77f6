"""Every method that PEFT registers: on layers that stay it is exact, over layers that change it is exact or refused.

The methods are asked of PEFT's own registry, so that a new one is not passed silently.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anypatch
from anypatch import UnsupportedModelError
from builders import transformers_model

peft = pytest.importorskip("peft")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

REGISTRY = {kind.value: config for kind, config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
# Methods for language models: they ask for a configuration, tokens of text or layers that no image model has.
OF_TEXT = {
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING",
    "SHADOW", "XLORA",
}  # fmt: skip
# What their constructors ask for, at the sizes of these models.
OPTIONS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 2}, "ADALORA": {"init_r": 3, "target_r": 2, "total_step": 10}, "OFT": {"r": 0, "oft_block_size": 4},
    "BOFT": {"boft_block_size": 4}, "C3A": {"block_size": 4}, "FOURIERFT": {"n_frequency": 10},
    "VBLORA": {"vector_length": 4, "num_vectors": 8, "topk": 2, "r": 2}, "WAVEFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": []}, "GRALORA": {"r": 4, "gralora_k": 2}, "POLY": {"n_tasks": 1, "n_skills": 2},
    "UNILORA": {"theta_d_length": 32}, "ADAMSS": {"num_subspaces": 2, "subspace_rank": 1}, "ROAD": {"group_size": 4},
    "TRAINABLE_TOKENS": {"token_indices": [0, 1]}, "MISS": {"r": 2}, "SHIRA": {"r": 2},
}  # fmt: skip
LORAS = [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}]
CASES = [(name, {}) for name in sorted(REGISTRY.keys() - OF_TEXT)] + [("LORA", options) for options in LORAS]


def of_timm() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=3, num_classes=0)


def of_transformers() -> nn.Module:
    return transformers_model("CLIPVision", image_size=64, patch_size=16)


# A model, layers that stay, layers that norms are, layers of which one changes.
MODELS: dict[str, tuple[Any, list[str], list[str], list[list[str]]]] = {
    "timm": (of_timm, ["qkv", "fc1"], ["norm1"], [["patch_embed.proj", "qkv"], ["patch_embed.proj"]]),
    "transformers": (
        of_transformers, ["q_proj", "fc1"], ["layer_norm1"], [["patch_embedding", "q_proj"], ["position_embedding"]],
    ),
}  # fmt: skip


def adapted_by(model: nn.Module, name: str, options: dict[str, Any], targets: list[str]) -> Any:
    """The model with a method over layers, its weights drawn; ``None`` where PEFT refuses these layers."""
    config = REGISTRY[name]
    arguments = {**OPTIONS.get(name, {}), **options, "target_modules": targets}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = peft.get_peft_model(model, config(**arguments)).eval()
        except (TypeError, ValueError, NotImplementedError, KeyError, StopIteration, AttributeError):
            return None
    generator = torch.Generator().manual_seed(0)
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return wrapped


def enlarge(x: Tensor, old: int, new: int) -> Tensor:
    """Every patch on its own, bicubic and antialiased."""
    rows = F.interpolate(torch.eye(old)[None, None], size=(new, old), mode="bicubic", antialias=True)[0, 0]
    b, c, h, w = x.shape
    patches = x.reshape(b, c, h // old, old, w // old, old)
    return torch.einsum("bchpwr,sp,tr->bchswt", patches, rows, rows).reshape(b, c, h // old * new, w // old * new)


def features(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        if model.peft_config["default"].peft_type.value == "POLY":  # is told a task with every call
            out = model.base_model(x, task_ids=torch.zeros(len(x), dtype=torch.long))
            return out if isinstance(out, Tensor) else out.last_hidden_state
        inner = model.get_base_model()
        return inner.forward_features(x) if hasattr(inner, "forward_features") else model(x).last_hidden_state


def everything(model: nn.Module) -> dict[str, Tensor]:
    return {**{n: t.clone() for n, t in model.state_dict().items()}, **dict(model.named_buffers())}


def exact_or_refused(model: Any, **sizes: Any) -> str:
    """``"exact"``, or ``"refused"`` with nothing changed."""
    before = everything(model)
    grid = sizes.get("keep") == "grid"
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = features(model, x)
    refusal = ""
    try:
        anypatch.adapt(model, **sizes)
    except UnsupportedModelError as error:
        refusal = str(error)
    if refusal:
        assert "in a way that anypatch cannot follow: merge or remove it" in refusal
        after = everything(model)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        return "refused"
    if grid:
        torch.testing.assert_close(features(model, enlarge(x, 16, 32)), expected, rtol=1e-3, atol=1e-3)
    else:
        features(model, torch.randn(2, 3, 96, 96))
    return "exact"


def cases(name: str, options: dict[str, Any], model: str) -> None:
    build, layers, norms, _ = MODELS[model]
    torch.manual_seed(0)
    made = None
    for targets in (layers, norms, ["position_embedding"]):
        made = made or adapted_by(build(), name, options, targets)
    assert made is not None or model == "timm", f"{name} could be put on nothing: list it, or say its options"
    if made is None:
        return
    over_positions = "position_embedding" in str(getattr(made.peft_config["default"], "target_modules", ""))
    assert exact_or_refused(copy.deepcopy(made), patch_size=32, keep="grid", kernel="pi") == "exact"
    assert over_positions or exact_or_refused(copy.deepcopy(made), image_size=96) == "exact"


@pytest.mark.parametrize("name", ["LORA", "BOFT", "LOKR"])
def test_adapters_over_layers_that_stay_are_exact(name: str) -> None:
    """Whatever sizes their tensors have: BOFT's blocks are as large as the grid here, LoKr's as many as the tokens."""
    cases(name, {}, "timm")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda v: str(v))
def test_every_method_over_layers_that_stay_is_exact(name: str, options: dict[str, Any], model: str) -> None:
    cases(name, options, model)


EXACT = {"LORA", "IA3", "OSF"}  # over a projection or a table that changes; OSF replaces no layer


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda v: str(v))
def test_every_method_over_layers_that_change_is_exact_or_refused(
    name: str, options: dict[str, Any], model: str
) -> None:
    build, _, _, changing = MODELS[model]
    for targets in changing:
        made = adapted_by(build(), name, options, targets)
        if made is None:
            continue
        table = targets == ["position_embedding"]
        sizes: dict[str, Any] = {"image_size": 96} if table else {"patch_size": 32, "keep": "grid", "kernel": "pi"}
        outcome = exact_or_refused(made, **sizes)
        assert outcome == "refused" or name in EXACT or name == "LN_TUNING", (targets, outcome)


def test_every_method_of_the_registry_is_tried_or_of_text() -> None:
    assert REGISTRY.keys() >= OF_TEXT
    assert {name for name, _ in CASES} | OF_TEXT == REGISTRY.keys()


def adapted_by_peft(**options: Any) -> Any:
    targets = ["patch_embed.proj", "qkv"]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=[]) if options.pop("ia3", False) else None
    model = peft.get_peft_model(of_timm().eval(), config or peft.LoraConfig(r=2, target_modules=targets, **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2 + 1)
    return model.eval()


@pytest.mark.siblings(fast=1)
@pytest.mark.parametrize("options", [{}, {"ia3": True}, {"use_rslora": True}])
def test_adapters_that_are_merged_into_the_weights_are_merged_in_their_views(options: dict[str, Any]) -> None:
    model, x = adapted_by_peft(**options), torch.rand(2, 3, 64, 64)
    view = anypatch.at(model, 8)
    with torch.no_grad():
        before = view(x)
        model.merge_adapter()
        torch.testing.assert_close(view(x), before, rtol=1e-3, atol=1e-3)
        later = anypatch.at(model, 8)
        model.unmerge_adapter()
        for face in (view, later):
            torch.testing.assert_close(face(x), before, rtol=1e-3, atol=1e-3)


def test_a_view_merges_no_adapters_into_weights_that_it_computes(tmp_path) -> None:
    model, x = adapted_by_peft(), torch.rand(2, 3, 64, 64)
    view = anypatch.at(model, 8)
    before, native = view(x), model(x)
    for refused in (view.merge_adapter, view.merge_and_unload, view.unmerge_adapter):
        with pytest.raises(UnsupportedModelError, match="merge and unmerge adapters there"):
            refused()
    torch.testing.assert_close(view(x), before)
    torch.testing.assert_close(model(x), native)
    anypatch.save(view, tmp_path / "merged")  # merges in a copy
    saved = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True).eval()
    torch.testing.assert_close(saved(x), before, rtol=1e-3, atol=1e-3)
