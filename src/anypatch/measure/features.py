"""Read pooled and patch features out of a live model, whichever host library made it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anypatch.adaptation import geometry
from anypatch.core.adapters import unwrap
from anypatch.errors import UnsupportedModelError


@dataclass
class Features:
    """What a forward pass gives: ``pooled`` (n, c), ``patches`` (n, h, w, c), ``logits`` (n, classes) or None."""

    pooled: Tensor
    patches: Tensor
    logits: Tensor | None = None


class Reader:
    """A model in eval mode, ready to read features from.

    Args:
        model: a model of timm, transformers, open_clip or torchvision, or one with ``forward_features``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model).eval()
        self.geometry = geometry(model)
        self._read = getattr(self, "_" + self.geometry.library, self._generic)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        """Features of normalised pixels (n, 3, h, w)."""
        return self._read(pixels)

    def normal_grid(self, pixels: Tensor) -> tuple[int, int]:
        """The grid that these pixels are cut into."""
        if self.geometry.explicit_grid is not None:
            height, width = self.geometry.explicit_grid[-2:]
            return height, width
        height, width = (s // p for s, p in zip(pixels.shape[-2:], self.geometry.patch_size[-2:], strict=True))
        return height, width

    def _timm(self, pixels: Tensor, model: Any = None) -> Features:
        model = model or self.model
        tokens = model.forward_features(pixels)
        pooled = model.forward_head(tokens, pre_logits=True)
        logits = model.forward_head(tokens) if getattr(model, "num_classes", 0) else None
        return Features(pooled.flatten(1), self._grid(tokens, pixels), logits)

    def _transformers(self, pixels: Tensor) -> Features:
        model: Any = self.model
        if hasattr(model, "get_image_features"):
            with _captured(model.vision_model) as seen:
                pooled = model.get_image_features(pixel_values=pixels)
            return Features(_tensor(pooled, "pooler_output"), self._grid(_hidden(seen[-1]), pixels))
        base = getattr(model, "base_model", model)
        with _captured(base) as seen:
            output = model(pixel_values=pixels)
        hidden = _hidden(seen[-1])
        patches = self._grid(hidden, pixels)
        logits = getattr(output, "logits", None)
        pooled = getattr(output, "image_embeds", None)
        if pooled is None and "siglip" in str(getattr(model.config, "model_type", "")):
            pooled = getattr(seen[-1], "pooler_output", None)
        if pooled is None:
            has_class_token = hidden.dim() == 3 and self.geometry.prefix_tokens > 0
            pooled = hidden[:, 0] if has_class_token else patches.mean((1, 2))
        return Features(pooled, patches, logits if isinstance(logits, Tensor) and logits.dim() == 2 else None)

    def _open_clip(self, pixels: Tensor) -> Features:
        model: Any = self.model
        visual = getattr(model, "visual", model)
        if hasattr(visual, "trunk"):
            with _captured(visual.trunk, "forward_features") as seen:
                pooled = visual(pixels)
            return Features(pooled, self._grid(seen[-1], pixels))
        before = visual.output_tokens
        visual.output_tokens = True
        try:
            pooled, tokens = visual(pixels)
        finally:
            visual.output_tokens = before
        return Features(pooled, self._grid(tokens, pixels))

    def _torchvision(self, pixels: Tensor) -> Features:
        model: Any = self.model
        body = model.encoder if hasattr(model, "encoder") else model.features
        with _captured(body) as seen:
            logits = model(pixels)
        tokens = seen[-1]
        if tokens.dim() == 3 and self.geometry.prefix_tokens:
            return Features(tokens[:, 0], self._grid(tokens, pixels), logits)
        patches = self._grid(getattr(model, "norm", nn.Identity())(tokens), pixels)
        return Features(patches.mean((1, 2)), patches, logits)

    def _generic(self, pixels: Tensor) -> Features:
        model: Any = self.model
        if not hasattr(model, "forward_features"):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no forward_features, so its patch features cannot be read"
            )
        tokens = model.forward_features(pixels)
        if isinstance(tokens, dict):  # DINOv2's own code
            patches = self._grid(tokens["x_norm_patchtokens"], pixels)
            return Features(tokens["x_norm_clstoken"], patches)
        patches = self._grid(tokens, pixels)
        pooled = tokens[:, 0] if tokens.dim() == 3 and self.geometry.prefix_tokens else patches.mean((1, 2))
        return Features(pooled, patches)

    def _grid(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        """Patch tokens laid out on their grid, (n, h, w, c), without prefix tokens."""
        if tokens.dim() == 4:
            width = getattr(self.model, "num_features", None)
            channels_last = tokens.shape[-1] == width if width else tokens.shape[1] > tokens.shape[-1] == width
            if width is None:
                channels_last = tokens.shape[-1] > tokens.shape[1]
            return tokens if channels_last else tokens.permute(0, 2, 3, 1)
        height, width = self.normal_grid(pixels)
        count = tokens.shape[1]
        for prefix in (count - height * width, self.geometry.prefix_tokens, 0):
            if prefix < 0:  # hierarchical: patches merged, by the same factor on both axes
                factor = math.sqrt(height * width / count)
                if factor == int(factor) and height % factor == 0 == width % factor:
                    size = (height // int(factor), width // int(factor))
                    return tokens.unflatten(1, size)
            elif count - prefix == height * width:
                return tokens[:, prefix:].unflatten(1, (height, width))
        raise UnsupportedModelError(
            f"{type(self.model).__name__} gives {count} tokens, which do not fit its grid of {height}x{width} patches"
        )


@contextlib.contextmanager
def _captured(module: nn.Module, method: str | None = None) -> Iterator[list[Any]]:
    """The outputs of a module's forward, or of one of its methods, while the block runs."""
    seen: list[Any] = []
    if method is None:
        handle = module.register_forward_hook(lambda _m, _i, output: seen.append(output))
        try:
            yield seen
        finally:
            handle.remove()
        return
    original = getattr(module, method)

    def recording(*args: Any, **kwargs: Any) -> Any:
        seen.append(original(*args, **kwargs))
        return seen[-1]

    vars(module)[method] = recording
    try:
        yield seen
    finally:
        del vars(module)[method]


def _hidden(output: Any) -> Tensor:
    return _tensor(output, "last_hidden_state")


def _tensor(output: Any, name: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    value = getattr(output, name, None)
    return value if isinstance(value, Tensor) else output[0]


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
