"""AdamW whose steps for the layer that sees pixels are taken in coordinates in which pixels are alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from anypatch.tuning import schedule


@dataclass(frozen=True)
class Whitening:
    """A symmetric linear map of kernels (out, c, h, w) that is nearly the inverse root of the pixels' covariance.

    Natural images hold most power in slow waves and in what the channels share. Adam's step has the same length for
    every weight, so that all pixels of a kernel together move the answer to a slow wave thousands of times as much as
    that to fine structure; at a rate that slow waves bear, fine structure is not learned. A cosine transform of the
    kernel and the principal axes of the channels are nearly the principal axes of the pixels (Ahmed, Natarajan, Rao,
    "Discrete cosine transform", 1974), so that the map needs no large matrix.

    Attributes:
        channels: principal axes, in rows.
        rows, columns: cosine transforms of a kernel's sides.
        scale: of each coefficient (c, h, w); about one on average.
    """

    channels: Tensor
    rows: Tensor
    columns: Tensor
    scale: Tensor

    @classmethod
    def of(cls, conv: nn.Conv2d, images: Sequence[Tensor]) -> Whitening:
        """Measured on the patches that a convolution sees of images, normalised pixels (n, c, h, w)."""
        height, width = conv.kernel_size
        rows, columns = (cosines(side).to(conv.weight) for side in (height, width))
        every = torch.cat([image.flatten(2).transpose(1, 2).flatten(0, 1) for image in images]).to(conv.weight)
        channels = torch.linalg.eigh(every.T @ every / len(every))[1].T
        total, count = torch.zeros(conv.in_channels, height, width).to(conv.weight), 0
        for image in images:
            unfolded: Any = functional.unfold(
                image.to(conv.weight), conv.kernel_size, conv.dilation, (0, 0), conv.stride
            )
            patches = unfolded.transpose(1, 2).reshape(-1, conv.in_channels, height, width)
            total += torch.einsum("dc,nchw,uh,vw->nduv", channels, patches, rows, columns).square().sum(0)
            count += len(patches)
        power = total / count
        return cls(channels, rows, columns, (power / power.mean() + schedule.DAMPING).rsqrt())

    def __call__(self, kernels: Tensor) -> Tensor:
        found = torch.einsum("dc,ochw,uh,vw->oduv", self.channels, kernels, self.rows, self.columns) * self.scale
        return torch.einsum("dc,oduv,uh,vw->ochw", self.channels, found, self.rows, self.columns)


def cosines(side: int) -> Tensor:
    """The orthonormal cosine transform (type II) of so many samples, frequencies in rows.

    >>> torch.allclose(cosines(5) @ cosines(5).T, torch.eye(5), atol=1e-6)
    True
    """
    at = torch.arange(side, dtype=torch.float64)
    found = torch.cos(math.pi / side * (at[None] + 0.5) * at[:, None]) * math.sqrt(2 / side)
    found[0] /= math.sqrt(2)
    return found.float()


class Optimizer(torch.optim.AdamW):
    """AdamW without weight decay that takes the steps of some parameters in whitened coordinates, where its moments
    are, too."""

    def __init__(self, parameters: Iterable[nn.Parameter], whitened: Mapping[nn.Parameter, Whitening]) -> None:
        super().__init__(parameters, lr=0.0, betas=schedule.BETAS, eps=schedule.EPSILON, weight_decay=0.0)
        self.whitened = dict(whitened)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step, as AdamW's."""
        before = {}
        for parameter, whitening in self.whitened.items():
            if parameter.grad is not None:
                before[parameter] = parameter.clone()
                parameter.grad = whitening(parameter.grad)
        found = super().step(closure)
        for parameter, old in before.items():
            parameter.copy_(old + schedule.PIXELS * self.whitened[parameter](parameter - old))
        return found


def whitenings(part: nn.Module, pixels: Sequence[Tensor]) -> dict[nn.Parameter, Whitening]:
    """Of the convolution that sees pixels, measured on normalised images (n, c, h, w); none where another kind of layer
    does, or where it is not trained."""
    for module in part.modules():
        if type(module) is nn.Conv2d and module.in_channels == pixels[0].shape[1] and module.groups == 1:
            weight = module.weight
            return (
                {weight: Whitening.of(module, pixels)}
                if isinstance(weight, nn.Parameter) and weight.requires_grad
                else {}
            )
    return {}
