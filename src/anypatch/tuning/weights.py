"""Sets of weights: kept, put back, averaged over a run, mixed with the start."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def kept(model: nn.Module) -> Weights:
    """A copy of what training changes."""
    return {name: p.detach().clone() for name, p in trained(model).items()}


@torch.no_grad()
def put_back(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in trained(model).items():
        parameter.copy_(weights[name])


@torch.no_grad()
def put_mixed(model: nn.Module, start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> None:
    """``start + share * (end - start)``, as WiSE-FT does with fine-tuned models (arXiv:2109.01903)."""
    for name, parameter in trained(model).items():
        parameter.copy_(torch.lerp(start[name], end[name], share))


@torch.no_grad()
def averaged(average: Weights, model: nn.Module, decay: float) -> None:
    """One step of an exponential moving average, in place."""
    for name, parameter in trained(model).items():
        average[name].lerp_(parameter.detach(), 1 - decay)
