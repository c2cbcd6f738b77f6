"""Whether a projection is linear in the pixels of its patches, with what stands around it: asked by trying it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.errors import UnsupportedModelError

MOST = 1 << 20  # values of buffers that are copied for a trial: a wrapper around one layer has a mean and a deviation
HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))


def is_pixelwise(outer: nn.Module, layer: Any) -> bool:
    """Whether the pixels that a convolution inside ``outer`` sees depend each on the one at the same place alone.

    A module that scales colours may stand around a patch projection; one that pads, pools or moves pixels does so
    whatever the patch is, so that the projection is not all that is linear in a patch. Tried on a copy without hooks,
    of which only what comes before the convolution runs; what cannot be tried is believed.

    >>> layer = nn.Conv2d(3, 8, 4, 4)
    >>> is_pixelwise(nn.Sequential(nn.Identity(), layer), layer)
    True
    >>> is_pixelwise(nn.Sequential(nn.AvgPool2d(3, 1, 1), layer), layer)
    False
    """
    if outer is layer or layer.weight.is_meta or sum(b.numel() for b in outer.buffers()) > MOST:
        return True
    memo: dict[int, Any] = {id(p): p for p in outer.parameters()}
    memo[id(layer)] = _Recorder(layer)
    try:
        trial = _without_hooks(copy.deepcopy(outer, memo)).eval()
    except Exception:  # holds what cannot be copied
        return True
    sides = [2 * side for side in layer.stride]
    pixels = torch.rand((1, layer.in_channels, *sides), generator=torch.Generator().manual_seed(0)).to(layer.weight)
    with torch.no_grad():
        return all(_is_alone(trial, pixels, place) for place in ([0] * len(sides), [side // 2 for side in sides]))


def require_own_kernel(full: str, layer: nn.Module) -> None:
    """A convolution of a class of its own may compute its kernel from its weight: it has to be in proportion to it.

    A weight that is standardized, or divided by the number of its entries, does not give a resized kernel where it is
    resized itself. Tried on a copy with a patch twice as large, in which each pixel stands four times; what cannot be
    tried is believed.

    Raises:
        UnsupportedModelError: it is not in proportion; the message names the layer.
    """
    usual = next((kind for kind in (nn.Conv2d, nn.Conv3d) if isinstance(layer, kind)), None)
    if usual is None or layer.weight.is_meta:
        return
    kind: Any = type(layer)
    if (kind.forward, kind._conv_forward) == (usual.forward, usual._conv_forward):
        return
    before, after = _enlarging(layer)
    if before is not None and after is not None and not torch.allclose(before, after, rtol=1e-2, atol=1e-2):
        raise UnsupportedModelError(
            f"{full}: {kind.__name__} computes its kernel from its weight while it runs, and not in proportion to it, "
            f"so no resized weight gives the same: put a {usual.__name__} with the computed kernel in its place"
        )


def _enlarging(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    """What a convolution makes of two patches, and of the same with each pixel repeated on every axis."""
    generator = torch.Generator().manual_seed(0)
    sides = tuple(layer.kernel_size)
    weight = torch.randn((*layer.weight.shape[:2], *sides), generator=generator)
    pixels = torch.rand((1, layer.in_channels, *sides[:-1], 2 * sides[-1]), generator=generator)
    found: list[Tensor | None] = []
    for factor in (1, 2):
        if factor == 2:
            for axis in range(2, pixels.ndim):
                weight, pixels = weight.repeat_interleave(2, axis) / 2, pixels.repeat_interleave(2, axis)
        try:
            memo = {id(layer.weight): nn.Parameter(weight, requires_grad=False)}
            if layer.bias is not None:
                memo[id(layer.bias)] = nn.Parameter(torch.zeros(layer.out_channels), requires_grad=False)
            trial = _without_hooks(copy.deepcopy(layer, memo)).eval().float().cpu()
            vars(trial)["kernel_size"] = vars(trial)["stride"] = tuple(factor * side for side in sides)
            with torch.no_grad():
                found.append(trial(pixels))
        except Exception:  # wants more than pixels, or cannot be copied
            found.append(None)
    return found[0], found[1]


def moves_pixels(path: str, outer: nn.Module) -> str:
    """What is said of a module that is not."""
    return (
        f"{path} ({type(outer).__name__}) pads, pools or moves pixels before the layer in it sees them: the stem is "
        f"not one linear map per patch"
    )


def _without_hooks(trial: nn.Module) -> nn.Module:
    for module in trial.modules():
        for name in HOOKS:
            vars(module)[name] = type(vars(module)[name])()
    return trial


def _is_alone(trial: nn.Module, pixels: Tensor, place: list[int]) -> bool:
    """Whether another pixel at one place is seen as another at that place, and nowhere else."""
    other = pixels.clone()
    index: tuple[Any, ...] = (slice(None), slice(None), *place)
    other[index] += 1
    before, after = (_seen(trial, given) for given in (pixels, other))
    if before is None or after is None:
        return True
    if before.shape[2:] != pixels.shape[2:]:
        return False
    return (before != after).any(1)[0].nonzero().tolist() in ([], [place])


def _seen(trial: nn.Module, pixels: Tensor) -> Tensor | None:
    try:
        trial(pixels)
    except _SeenError as error:
        return error.pixels
    except Exception:  # wants more than pixels
        return None
    return None


class _SeenError(Exception):
    def __init__(self, pixels: Tensor) -> None:
        super().__init__()
        self.pixels = pixels


class _Recorder(nn.Module):
    """Stands for a layer, and says what it is given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        vars(self)["layer"] = layer  # not a child: it is not part of the trial

    def forward(self, pixels: Tensor, *_: Any, **__: Any) -> Tensor:
        raise _SeenError(pixels)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["layer"], name)
