"""Features as pictures: colours that mean the same for every image and patch size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Colours:
    """Features as colours: the three leading principal components become red, green and blue.

    Args:
        parts: features (n, c); every part weighs the same, however long it is. Colours span the middle
            96 %, so that a few odd tokens do not leave the others one shade.
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
