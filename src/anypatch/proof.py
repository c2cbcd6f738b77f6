"""The proof: exactness on random weights and random pixels, with no data and no pretrained weights.

Randomise every parameter of a copy of the model, enlarge each patch of a random input with the resize matrix
``R``, adapt the copy with the pseudo-inverse kernel, and compare outputs. ``<pinv(R)ᵀ w, R x> = <w, x>`` holds
exactly where ``R`` has full column rank (FlexiViT, arXiv:2212.08013, equation 3), so whatever differs by more
than float noise is something the adaptation forgot.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.adaptation import adapt, describe, host
from anypatch.core.display import facts_table
from anypatch.core.geometry import Size, SizeLike, as_size, show
from anypatch.core.kernels import Pi, resize_matrix
from anypatch.core.views import standing
from anypatch.errors import GeometryError, UnsupportedModelError
from anypatch.hosts.base import Example

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Check:
    """Result of the proof.

    Attributes:
        error: the largest relative error over the compared outputs, ``max |a - b| / max |a|``.
        passed: whether it is float noise (below 1e-4).
        compared: how many output tensors were compared.
        patch_size: the patch size that was proved, from the model's own.
    """

    error: float
    passed: bool
    compared: int
    patch_size: Size

    def _repr_html_(self) -> str:
        """The result as a table, in a notebook."""
        facts = {
            "passed": "yes" if self.passed else "no",
            "relative error": f"{self.error:.2g}",
            "tolerance": f"{TOLERANCE:g}",
            "outputs compared": self.compared,
            "patch size": show(self.patch_size),
        }
        return facts_table("Check", facts)


@torch.no_grad()
def check(model: nn.Module, patch_size: SizeLike, *, seed: int = 0) -> Check:
    """Prove that adapting ``model`` to a larger ``patch_size`` preserves what it computes.

    The model is not changed. The grid is kept and the image grows with the patch; shrinking loses pixels, so
    no exactness holds there and sizes below the present patch are refused.

    Raises:
        GeometryError: ``patch_size`` is smaller than the present one on some axis, or, for stems whose patches
            overlap, is no whole multiple of it.
        UnsupportedModelError: the model cannot be adapted or cannot be fed pixels.
    """
    model = standing(model)
    described = describe(model)
    current = described.geometry
    target = as_size(patch_size, len(current.patch_size), "patch_size", current.patch_size)
    if any(new < old for new, old in zip(target, current.patch_size, strict=True)):
        raise GeometryError(
            f"check proves growing patches: patch_size {show(target)} is smaller than the model's "
            f"{show(current.patch_size)}"
        )
    method = Pi("bicubic")
    if current.overlapping or described.facts.whole_multiples:
        if any(new % old for new, old in zip(target, current.patch_size, strict=True)):
            why = "pad or crop" if described.facts.whole_multiples else "overlap"
            raise GeometryError(
                f"patches {why} (kernel {show(current.kernel_size)}, stride {show(current.patch_size)}): "
                f"check needs a whole multiple of the stride, got {show(target)}"
            )
        method = Pi("nearest")
    generator = torch.Generator().manual_seed(seed)
    subject = copy.deepcopy(model).cpu().float().eval()
    randomise(subject, generator)
    inner = describe(subject)
    example = host(subject).example(inner)
    pixels = torch.randn(example.shape, generator=generator)
    _blank(pixels, current.patch_size, target, inner.facts.padding)
    before = list(tensors(_forward(example, subject, pixels, seed)))
    adapt(subject, target, keep="grid", kernel=method)
    pixels = enlarge(pixels, _in_units(current.patch_size, example), _in_units(target, example), method)
    adapted = describe(subject)
    example = host(subject).example(adapted)
    after = list(tensors(_forward(example, subject, pixels, seed)))
    return _compare(before, after, target)


def _forward(example: Any, model: nn.Module, pixels: Tensor, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # masking in masked autoencoders
        return example.call(model, pixels)


def _compare(before: list[Tensor], after: list[Tensor], target: Size) -> Check:
    if len(before) != len(after):
        raise UnsupportedModelError(f"the adapted model returns {len(after)} tensors, the original {len(before)}")
    worst, compared = 0.0, 0
    for a, b in zip(before, after, strict=True):
        if not a.is_floating_point() or a.shape != b.shape:
            continue
        scale = a.abs().max().item()
        error = (a - b).abs().max().item() / scale if scale else (b.abs().max().item())
        worst = max(worst, error if error == error else float("inf"))
        compared += 1
    if not compared:
        shapes = ", ".join(f"{tuple(a.shape)} -> {tuple(b.shape)}" for a, b in zip(before, after, strict=True))
        raise UnsupportedModelError(f"no output keeps its shape, so nothing can be compared: {shapes}")
    return Check(worst, worst < TOLERANCE, compared, target)


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter and every learned statistic a random value that keeps activations of order one."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or not p.is_floating_point() or not p.numel():
                continue
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
            if p.ndim >= 2:
                linear = name.endswith("weight")  # "in_proj_weight" of torch's own attention, too
                p.copy_(noise * (1.0 / max(p[0].numel(), 1) ** 0.5 if linear else 0.5))
            else:
                p.copy_(noise * 0.2 + (1.0 if name in ("weight", "gamma", "lambda1") else 0.0))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)


def _in_units(size: Size, example: Example) -> Size:
    """A patch in entries of the map that is fed: pixels, unless the linear part of the stem comes later."""
    unit = (1,) * (len(size) - len(example.unit)) + example.unit
    return tuple(s // u for s, u in zip(size, unit, strict=True))


def _blank(pixels: Tensor, patch: Size, target: Size, padding: int) -> None:
    """Set to zero what a window with a fixed padding no longer sees, as it starts later in a larger patch."""
    for axis, old, new in zip((-2, -1), patch[-2:], target[-2:], strict=True):
        unseen = math.floor(padding - padding * old / new)
        rows = torch.arange(pixels.shape[axis])
        pixels.index_fill_(axis, rows[(rows + padding) % old < unseen], 0.0)


def enlarge(pixels: Tensor, patch: Size, target: Size, method: Pi) -> Tensor:
    """Enlarge every patch on its own: ``(..., grid * patch) -> (..., grid * target)`` on each spatial axis."""
    for offset, (old, new) in enumerate(zip(patch, target, strict=True)):
        axis = pixels.ndim - len(target) + offset
        if old == new:
            continue
        if method.filter == "nearest":
            pixels = pixels.repeat_interleave(new // old, dim=axis)
            continue
        matrix = resize_matrix(old, new, method.filter).to(pixels.dtype)  # (new, old)
        whole = pixels.shape[axis] // old * old
        cut = pixels.narrow(axis, 0, whole).unflatten(axis, (-1, old)).movedim(axis + 1, -1)
        pixels = (cut @ matrix.T).movedim(-1, axis + 1).flatten(axis, axis + 1)
    return pixels


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in an output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
