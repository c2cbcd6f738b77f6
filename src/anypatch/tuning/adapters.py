"""LoRA by peft, put into a student and merged again, without a random number of anyone else's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from anypatch.core.twins import Subject
from anypatch.errors import AnypatchError, UnsupportedModelError


def with_lora(model: nn.Module, subject: Subject, rank: int, seed: int) -> Any:
    """The model with LoRA (arXiv:2106.09685) of ``rank`` over every linear layer of its vision part.

    Raises:
        AnypatchError: peft is not installed.
        UnsupportedModelError: the model has adapters of its own, or no linear layers.
    """
    try:
        import peft
    except ImportError as error:
        raise AnypatchError("lora needs peft: pip install 'anypatch[tune]'") from error
    if any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in model.modules()):
        raise UnsupportedModelError("the model has adapters already: merge them, or tune without lora")
    inside = {id(m) for m in subject.part.modules()}
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and id(m) in inside]
    if not names:
        raise UnsupportedModelError(f"{type(model).__name__} has no linear layers for lora")
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names, bias="none")
    wrapped = peft.get_peft_model(model, config, low_cpu_mem_usage=True)  # on the meta device: draws no numbers
    generator = torch.Generator().manual_seed(seed)
    device = next(p.device for p in model.parameters() if not p.is_meta)
    for layer in wrapped.modules():
        for name, parameter in list(layer._parameters.items()):
            if parameter is not None and parameter.is_meta:
                layer._parameters[name] = nn.Parameter(torch.zeros(parameter.shape, device=device))
    for path, layer in wrapped.named_modules():
        if isinstance(layer, nn.Linear) and ".lora_A." in path:  # peft's own start: uniform as nn.Linear's, B zero
            bound = 1 / math.sqrt(layer.in_features)
            drawn = torch.rand(layer.weight.shape, generator=generator) * 2 * bound - bound
            layer.weight.data.copy_(drawn)
    return wrapped


def merged(model: nn.Module) -> nn.Module:
    """The model with its adapters in its own weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model  # type: ignore[operator]
