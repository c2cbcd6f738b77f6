"""Adapters held against what they were merged into: a layer's answer to one input, before and after."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from anypatch.core.adapters import beneath, is_peft, wrapped
from anypatch.errors import UnsupportedModelError

ROWS = 1024  # of a table of embeddings that are looked up, evenly spread; with those that an adapter names
# Relative error that is rounding: adapters that invert or exponentiate a matrix are off by 1e-6 in single precision; a
# weight that is rounded to b bits moves an output by 2^-b, and the sum of an adapter's terms by as much again.
SINGLE, ROUNDINGS = 1e-4, 2


class Answers:
    """What every layer under an adapter answers to one input, to be asked again once the adapters are merged.

    Args:
        model: with its adapters, in memory; asked as in inference.
    """

    def __init__(self, model: nn.Module) -> None:
        self._asked = {path: (kind, probe, answer) for path, kind, probe, answer in _asked(model)}

    def require_same(self, model: nn.Module) -> None:
        """Every layer answers what it answered.

        Raises:
            UnsupportedModelError: one does not; the message names it.
        """
        for path, (kind, probe, before) in self._asked.items():
            after = _answer(model.get_submodule(path), probe)
            if after is None or after.shape != before.shape:
                raise UnsupportedModelError(
                    f"the adapter over {path} ({kind}) cannot be merged: {path} fails without it"
                )
            error = float((after - before).norm() / before.norm().clamp_min(torch.finfo(torch.float32).tiny))
            if not error <= max(SINGLE, ROUNDINGS * torch.finfo(probe.dtype).eps if probe.is_floating_point() else 0):
                raise UnsupportedModelError(
                    f"the adapter over {path} ({kind}) cannot be merged, so the model cannot be saved as its library "
                    f"builds it: merged, the layer gives other values than it does now (relative error {error:.1e})"
                )


def _asked(model: nn.Module) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    inside = ""
    for path, layer in model.named_modules(remove_duplicate=False):
        if not is_peft(layer) or not path or (inside and path.startswith(inside)):
            continue
        inside = path + "."
        probe = _probe(layer)
        answer = None if probe is None else _answer(layer, probe)
        if probe is not None and answer is not None and bool(torch.isfinite(answer).all()):
            yield path, type(layer).__name__, probe, answer


def _probe(layer: nn.Module) -> Tensor | None:
    """An input of the layer that an adapter wraps, where its kind says what it takes."""
    inner = _inside(layer)
    weight = inner._parameters.get("weight")
    if weight is None:
        weight = inner._parameters.get("in_proj_weight")
    if weight is None or weight.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    if isinstance(inner, nn.Embedding):
        rows = torch.linspace(0, inner.num_embeddings - 1, min(ROWS, inner.num_embeddings)).long()
        tables = [getattr(module, "token_indices", None) or {} for module in layer.modules()]
        named = [index for table in tables for indices in table.values() for index in indices]
        return torch.cat([rows, torch.tensor(named, dtype=torch.long)])[None].to(weight.device)
    if not weight.is_floating_point():
        return None  # packed by a quantiser, which rounds by more than any limit here
    if isinstance(inner, _ConvNd):
        reach = [(k - 1) * d + 1 for k, d in zip(inner.kernel_size, inner.dilation, strict=True)]
        shape: tuple[int, ...] = (2, inner.in_channels, *reach)
    elif isinstance(inner, nn.MultiheadAttention):
        shape = (2, 3, inner.embed_dim)
    else:  # transformers' Conv1D keeps its matrix the other way round
        shape = (2, 3, weight.shape[0 if type(inner).__name__ == "Conv1D" else -1])
    return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)


def _inside(layer: nn.Module) -> nn.Module:
    """The layer that adapters, or an adapter in a wrapper of PEFT's, are over; the layer itself without any."""
    return next((beneath(wrapped(module)[0]) for module in layer.modules() if wrapped(module)), layer)


@torch.no_grad()
def _answer(layer: nn.Module, probe: Tensor) -> Tensor | None:
    """What a layer gives in inference; ``None`` where it needs more than one input."""
    training = {module: module.training for module in layer.modules()}
    layer.eval()
    attends = isinstance(_inside(layer), nn.MultiheadAttention)
    try:
        found = layer(*(probe,) * (3 if attends else 1))
    except Exception:
        return None
    finally:
        for module, mode in training.items():
            module.training = mode
    found = found[0] if isinstance(found, tuple) else found
    return found.float() if isinstance(found, Tensor) else None
