"""Quantised models of transformers: which layers the quantiser has made, whose weights it packs in its own way."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from anypatch.core.empty import empty
from anypatch.errors import UnsupportedModelError


def packed_layers(live: Any, built: Any) -> list[str]:
    """Paths of the layers of a live model whose weights its quantiser packs; none where there is no quantiser.

    Args:
        live: the model.
        built: what transformers builds from the written configuration, before a quantiser sees it.

    Raises:
        UnsupportedModelError: the quantiser that the configuration describes would make another choice of layers.
    """
    if getattr(live, "hf_quantizer", None) is None:
        return []
    plain = {path: layer for path, layer in built.named_modules() if path and not any(True for _ in layer.children())}
    own = dict(live.named_modules())
    made = _made(live, built)
    found = []
    for path, layer in plain.items():
        mine = own.get(path)
        if mine is None or not layer._parameters:
            continue
        if made is None:  # a quantiser that cannot be asked here
            packs = type(mine) is not type(layer) and type(mine).__module__.split(".")[0] != "torch"
        else:
            there = made.get(path, layer)
            packs = type(there) is not type(layer)
            if packs and type(there) is not type(mine):
                raise UnsupportedModelError(
                    f"transformers' {type(live).__name__} would be rebuilt otherwise: its quantiser makes a "
                    f"{type(there).__name__} of {path}, where the model has a {type(mine).__name__}"
                )
        if packs or not all(map(_is_plain, (*mine._parameters.values(), *mine._buffers.values()))):
            found.append(path)
    return found


def _made(live: Any, built: Any) -> dict[str, nn.Module] | None:
    """The layers that transformers would load the weights into: those of ``built``, after its quantiser."""
    try:
        from transformers.quantizers.auto import AutoHfQuantizer

        quantiser: Any = AutoHfQuantizer.from_config(built.config.quantization_config, pre_quantized=True)
        model = copy.deepcopy(built)
        empty(lambda: quantiser.preprocess_model(model, dtype=live.dtype, device_map=None, use_kernels=False) or model)
    except Exception:  # most of them ask for hardware, or for a package, of their own
        return None
    return dict(model.named_modules())


def _is_plain(tensor: torch.Tensor | None) -> bool:
    return tensor is None or (type(tensor) in (torch.Tensor, nn.Parameter) and tensor.is_floating_point())
