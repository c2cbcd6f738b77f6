"""Pooled and patch features of a live model, and what is made of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anypatch.adaptation import describe, host
from anypatch.hosts.images import Features, normal_grid


class Reader:
    """A model in eval mode, ready to read features from.

    Args:
        model: a model of a host library that knows images, or one with ``forward_features``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.host, self.subject = host(model), describe(model)
        self.model = self.subject.model.eval()
        self.geometry = self.subject.geometry

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        """Features of normalised pixels (n, 3, h, w)."""
        return self.host.features(self.subject, pixels)

    def normal_grid(self, pixels: Tensor) -> tuple[int, int]:
        """The grid that these pixels are cut into."""
        return normal_grid(self.geometry, pixels)


def area_matrix(old: int, new: int) -> Tensor:
    """Averages ``old`` cells into ``new`` by the area they share; rows sum to one."""
    edges = torch.arange(new + 1, dtype=torch.float64) * old / new
    cells = torch.arange(old, dtype=torch.float64)
    shared = torch.minimum(edges[1:, None], cells + 1) - torch.maximum(edges[:-1, None], cells)
    shared = shared.clamp_min(0)
    return shared / shared.sum(1, keepdim=True)


def pool_to(patches: Tensor, grid: Sequence[int]) -> Tensor:
    """Patch features (n, h, w, c) averaged onto a coarser grid, cells weighted by the area they share."""
    rows = area_matrix(patches.shape[1], grid[0]).to(patches)
    columns = area_matrix(patches.shape[2], grid[1]).to(patches)
    return torch.einsum("ih,nhwc,jw->nijc", rows, patches, columns)


class Colours:
    """Features as colours: the three leading principal components become red, green and blue.

    Args:
        parts: features (n, c); every part weighs the same, however long it is. Colours span the middle 96 %.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        flat = [part.double() for part in parts]
        self._mean = torch.stack([f.mean(0) for f in flat]).mean(0)
        covariance = torch.stack([(f - self._mean).T @ (f - self._mean) / len(f) for f in flat]).mean(0)
        basis = torch.linalg.eigh(covariance).eigenvectors[:, -3:].flip(1)
        # A principal component has no sign of its own: the heaviest entry is made positive, so runs agree.
        self._basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        places = [(f - self._mean) @ self._basis for f in flat]
        self._low, self._high = (torch.stack([p.quantile(q, dim=0) for p in places]).mean(0) for q in (0.02, 0.98))

    def __call__(self, features: Tensor) -> Tensor:
        """Colours (..., 3) in [0, 1] of features (..., c)."""
        places = (features.double() - self._mean) @ self._basis
        shown = ((places - self._low) / (self._high - self._low).clamp_min(1e-12)).clamp(0, 1)
        return torch.nn.functional.pad(shown, (0, 3 - shown.shape[-1]))


def shared_colours(maps: Sequence[Sequence[Tensor]]) -> list[list[NDArray[np.uint8]]]:
    """Patch features as RGB pictures in colours common to all of them.

    Args:
        maps: for each patch size, for each image, features (h, w, c).

    Returns:
        Pictures (h, w, 3) in the same nesting.
    """
    unit = [[torch.nn.functional.normalize(m.double(), dim=-1) for m in row] for row in maps]
    colours = Colours([torch.cat([m.flatten(0, 1) for m in row]) for row in unit])
    return [[(colours(m) * 255).round().to(torch.uint8).numpy() for m in row] for row in unit]
