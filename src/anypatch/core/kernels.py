"""Resize the linear maps of a patch: stem kernels, flattened stems, pixel heads.

Everything is separable. A method gives one small matrix `M` of shape (new, old) per axis, and a kernel
becomes `M_h @ w @ M_w.T`. The pseudo-inverse of a Kronecker product is the Kronecker product of the
pseudo-inverses, so nothing larger than one axis is ever inverted.

Read `M.T` as an estimator: it maps the new pixels of one axis to an estimate of the old pixels, and the
new kernel is the old kernel applied to that estimate, `<w, M.T x> = <M w, x>`. See docs/method.md.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from anypatch.errors import GeometryError

FILTERS = ("bicubic", "bilinear", "nearest")
_MODES = {"bicubic": "bicubic", "bilinear": "bilinear", "nearest": "nearest"}


def resize_matrix(old: int, new: int, filter: str = "bicubic", antialias: bool = True) -> Tensor:
    """The (new, old) matrix of `torch.nn.functional.interpolate` along one axis, in float64."""
    if filter not in FILTERS:
        raise GeometryError(f"unknown filter {filter!r}; choose from {', '.join(FILTERS)}")
    if filter == "nearest":
        if new % old:
            raise GeometryError(f"filter 'nearest' enlarges by whole factors only, not from {old} to {new}")
        return torch.eye(old, dtype=torch.float64).repeat_interleave(new // old, dim=0)
    basis = torch.eye(old, dtype=torch.float64)[None, :, None, :]
    rows = functional.interpolate(basis, (1, new), mode=_MODES[filter], align_corners=False, antialias=antialias)
    return rows[0, :, 0, :].T.contiguous()


def _moved(matrix: Tensor, shift: float) -> Tensor:
    """Rows of a resize matrix for a window that starts `shift` rows later; rows beyond the patch are zero."""
    if shift != int(shift):
        raise GeometryError(f"a window that moves by {shift:g} pixels needs kernel 'wiener', or another patch size")
    before, after = max(-int(shift), 0), max(int(shift), 0)
    return functional.pad(matrix, (0, 0, before, after))[after : after + len(matrix)]


@dataclass(frozen=True)
class Method(ABC):
    """A way to resize one axis. Subclasses give `matrix`."""

    @abstractmethod
    def matrix(self, old: int, new: int, shift: float = 0.0) -> Tensor:
        """The (new, old) float64 matrix that takes an old kernel's axis to the new one.

        `shift` is how far the new window starts behind the old one, in new pixels. It is zero unless the stem
        pads its input by a number of pixels that does not scale with the patch.
        """


@dataclass(frozen=True)
class Pi(Method):
    """FlexiViT's pseudo-inverse resize (arXiv:2212.08013): `pinv(R).T`, with `R` the resize matrix of a
    patch.

    >>> import timm
    >>> model = timm.create_model("test_vit")
    >>> from anypatch import adapt
    >>> adapt(model, patch_size=32, keep="grid", kernel=Pi("bilinear")).patch_embed.proj.weight.shape
    torch.Size([64, 3, 32, 32])

    `Pi()` is timm's `resample_patch_embed`; `Pi("bilinear")` is big_vision's. Exact when the patch
    grows, for images whose patches were each enlarged with `R`.
    """

    filter: str = "bicubic"
    antialias: bool = True

    def matrix(self, old: int, new: int, shift: float = 0.0) -> Tensor:
        return torch.linalg.pinv(_moved(resize_matrix(old, new, self.filter, self.antialias), shift)).T


@dataclass(frozen=True)
class Interpolate(Method):
    """Plain interpolation of the kernel, scaled by `old / new` per axis so that its sum stays alike.

    >>> kernel = torch.ones(1, 1, 2, 2)
    >>> resize_kernel(kernel, 4, Interpolate("bilinear")).sum() == kernel.sum()
    tensor(True)
    """

    filter: str = "bicubic"
    antialias: bool = True

    def matrix(self, old: int, new: int, shift: float = 0.0) -> Tensor:
        return _moved(resize_matrix(old, new, self.filter, self.antialias), shift) * (old / new)


@dataclass(frozen=True)
class Wiener(Method):
    """The best linear estimate of the old pixels from the new ones, for photographs resized as a whole.

    >>> kernel = torch.ones(1, 1, 2, 2)
    >>> smoother = resize_kernel(kernel, 3, Wiener(slope=3.0))  # the larger, the fewer details the images have
    >>> smoother.shape, round(smoother.sum().item(), 3)  # a flat patch keeps its response
    (torch.Size([1, 1, 3, 3]), 4.0)

    Along each axis, pixels have an unknown mean and a power spectrum `1 / f ** slope` (2 is a first-order
    Markov chain of infinite length). Both pixel grids sample them with the pipeline's resize filter, each
    at its own pitch; without `antialias` they take points. `noise` is white noise on the new pixels, as a
    part of their variance within a patch and its neighbours. A flat patch keeps its response exactly.
    """

    slope: float = 2.5
    noise: float = 1e-4
    filter: str = "bicubic"
    antialias: bool = True

    def __post_init__(self) -> None:
        if self.filter not in FILTERS:
            raise GeometryError(f"unknown filter {self.filter!r}; choose from {', '.join(FILTERS)}")
        if not (0 <= self.slope <= 6 and 0 < self.noise < math.inf):
            raise GeometryError(f"slope is 0 to 6 and noise is above 0, not {self.slope} and {self.noise}")

    def power(self, frequency: Tensor) -> Tensor:
        """Power of the pixels at frequencies in cycles per old pixel, up to a factor."""
        return frequency**-self.slope

    def matrix(self, old: int, new: int, shift: float = 0.0) -> Tensor:
        pitch = old / new  # of a new pixel, in old pixels
        period = 3.0 * old  # a patch and its neighbours, on a circle
        reach = 1.0 if self.antialias else 4.0  # cycles per pixel beyond which nothing is left to alias
        count = math.ceil(reach * period / min(1.0, pitch))
        frequency = torch.arange(1, count + 1, dtype=torch.float64) / period
        power = self.power(frequency)
        power = (power / power.sum()).repeat(2)
        pixels = torch.arange(old + new, dtype=torch.float64) + 0.5
        centre = torch.cat([pixels[:old], (pixels[:new] + shift) * pitch])
        gain = self._gain(torch.stack([frequency, frequency * pitch]))
        gain = torch.cat([gain[:1].expand(old, count), gain[1:].expand(new, count)])
        phase = torch.outer(centre, frequency * (2 * math.pi))
        waves = torch.cat([phase.cos() * gain, phase.sin() * gain], dim=1)  # (old + new, 2 * count)
        covariance = waves @ (waves[old:] * power).T
        across, within = covariance[:old], covariance[old:]
        within.diagonal().add_(self.noise)
        return _estimator(across, within).T

    def _gain(self, frequency: Tensor) -> Tensor:
        return transfer(frequency, self.filter) if self.antialias else torch.ones_like(frequency)


def _estimator(across: Tensor, within: Tensor) -> Tensor:
    """Best linear unbiased estimator (old, new) of pixels of unknown mean: ordinary kriging.

    `across` (old, new) and `within` (new, new) are covariances. Each row of the result sums to one, so that
    a flat patch is estimated exactly.
    """
    right = torch.cat([across, across.new_ones(1, across.shape[1])]).T
    solved = torch.cholesky_solve(right, torch.linalg.cholesky(within)).T
    known, flat = solved[:-1], solved[-1]
    return known + torch.outer(1.0 - known.sum(1), flat / flat.sum())


def transfer(frequency: Tensor, filter: str) -> Tensor:
    """Fourier transform of an antialiased resize filter, at positive frequencies in cycles per pixel.

    Bicubic is Keys' kernel with a = -1/2, as in Pillow and in `interpolate(antialias=True)`; bilinear is the
    triangle; nearest is the mean over the pixel (area).
    """
    one = torch.sinc(frequency)
    if filter == "nearest":
        return one
    if filter == "bilinear":
        return one.square()
    two, four = torch.sinc(2 * frequency), torch.sinc(4 * frequency)
    return (3 * one.square() - two - 3 * two.square() + four) / (math.pi * frequency).square()


MethodLike: TypeAlias = str | Method

METHODS: dict[str, Method] = {
    "wiener": Wiener(),
    "pi": Pi(),
    "bicubic": Interpolate("bicubic"),
    "bilinear": Interpolate("bilinear"),
}


def as_method(method: MethodLike) -> Method:
    """The method that a name stands for; an instance of a method is returned as it is."""
    if isinstance(method, Method):
        return method
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]
    raise GeometryError(
        f"unknown resize method {method!r}; choose from {', '.join(METHODS)}, or pass an instance of "
        "Pi, Wiener, Interpolate or PixelStatistics"
    )


def resize_kernel(
    weight: Tensor,
    size: int | Sequence[int],
    method: MethodLike = "wiener",
    shifts: Sequence[float] = (0.0, 0.0, 0.0),
) -> Tensor:
    """Resize a patch kernel (..., h, w) to (..., *size); with three sizes, (..., t, h, w).

    >>> kernel = torch.rand(384, 3, 14, 14)
    >>> resize_kernel(kernel, 16).shape
    torch.Size([384, 3, 16, 16])
    >>> resize_kernel(kernel, (14, 28), "pi").shape
    torch.Size([384, 3, 14, 28])

    An int stands for both spatial axes. Type and device are kept; arithmetic is float32 or better. The
    result is a new tensor that takes no part in gradients. `shifts` is how far the new window starts behind
    the old one on each axis, in new pixels (see `Method.matrix`).
    """
    new = _sizes(size)
    _need_floating(weight, "kernel")
    if weight.dim() < len(new):
        raise GeometryError(f"a kernel of shape {tuple(weight.shape)} has no {len(new)} axes to resize to {new}")
    old = tuple(weight.shape[-len(new) :])
    if 0 in old:
        raise GeometryError(f"a kernel of shape {tuple(weight.shape)} has no pixels")
    return KernelResize(old, new, method, shifts)(weight.detach())


class KernelResize:
    """`resize_kernel` between two sizes as a differentiable function of the kernel, its matrices computed once.

    Args:
        old, new: (h, w) or (t, h, w).
        method, shifts: as in `resize_kernel`.
    """

    def __init__(
        self, old: Sequence[int], new: Sequence[int], method: MethodLike, shifts: Sequence[float] = (0.0, 0.0, 0.0)
    ) -> None:
        kind = as_method(method)
        axes = list(zip(old, new, shifts, strict=False))
        matrices = {axis: kind.matrix(*axis) for axis in {*axes} if axis[0] != axis[1]}
        self._matrices = [matrices.get(axis) for axis in axes]

    def __call__(self, weight: Tensor) -> Tensor:
        return _apply(weight, self._matrices)


def resize_linear(
    weight: Tensor,
    old_patch: Sequence[int],
    new_patch: Sequence[int],
    channels: int,
    order: str,
    method: MethodLike = "wiener",
) -> Tensor:
    """Resize a stem that is a linear layer over a flattened patch: (D, C * prod(old)) to (D, C *
    prod(new)).

    `order` names the flattened axes, slowest first: "c h w", "h w c", "t h w c", "c t h w".
    """
    return linear_resize(old_patch, new_patch, channels, order, method)(weight.detach())


def linear_resize(
    old_patch: Sequence[int], new_patch: Sequence[int], channels: int, order: str, method: MethodLike
) -> Callable[[Tensor], Tensor]:
    """`resize_linear` as a differentiable function of the weight, its matrices computed once."""
    resize = KernelResize(_patch(old_patch, order), _patch(new_patch, order), method)
    return functools.partial(_flattened, old_patch=old_patch, channels=channels, order=order, resize=resize)


def _flattened(weight: Tensor, old_patch: Sequence[int], channels: int, order: str, resize: KernelResize) -> Tensor:
    kernel, back = _unflatten(weight, old_patch, channels, order)
    return back(resize(kernel))


def resize_pixels(rows: Tensor, old_patch: Sequence[int], new_patch: Sequence[int], order: str) -> Tensor:
    """Resize a head whose outputs are pixels, differentiably: weight (C * prod(old), D) or bias (C * prod(old),).

    The rows are resized like an image (bicubic, antialiased), so the new head gives the resized image of
    the old one. `order` names the flattened axes of the output, slowest first.
    """
    _need_floating(rows, "pixel head")
    channels, left = divmod(rows.shape[0], math.prod(old_patch))
    if left or rows.dim() not in (1, 2):
        raise GeometryError(f"a pixel head of shape {tuple(rows.shape)} does not fit patch {tuple(old_patch)}")
    columns = rows[None] if rows.dim() == 1 else rows.T
    image, back = _unflatten(columns, old_patch, channels, order)
    new = _patch(new_patch, order)
    old = image.shape[-len(new) :]
    matrices = [resize_matrix(o, n) if o != n else None for o, n in zip(old, new, strict=True)]
    resized = back(_apply(image, matrices))
    return resized[0] if rows.dim() == 1 else resized.T.contiguous()


def _apply(weight: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Multiply the last `len(matrices)` axes of `weight` by their matrices (None: leave the axis)."""
    if all(matrix is None for matrix in matrices):
        return weight.clone()
    result = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    for axis in range(-1, -len(matrices) - 1, -1):
        matrix = matrices[axis]
        if matrix is None:
            continue
        matrix = matrix.to(result)
        shape = [*result.shape]
        shape[axis] = matrix.shape[0]
        if axis == -1:
            result = result.reshape(-1, matrix.shape[1]) @ matrix.T
        else:
            result = matrix @ result.reshape(-1, matrix.shape[1], math.prod(shape[axis + 1 :]))
        result = result.reshape(shape)
    return result.to(weight.dtype)


def _sizes(size: int | Sequence[int]) -> tuple[int, ...]:
    """A validated (h, w) or (t, h, w)."""
    sizes = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    if len(sizes) not in (2, 3) or not all(type(s) is int and s > 0 for s in sizes):
        raise GeometryError(f"a kernel size is a positive int, a pair or a triple of them, not {size!r}")
    return sizes


def _need_floating(weight: Tensor, what: str) -> None:
    if not isinstance(weight, Tensor):
        raise GeometryError(f"a {what} is a torch.Tensor, not {type(weight).__name__}")
    if not weight.is_floating_point():
        raise GeometryError(f"a {what} of type {weight.dtype} cannot be resized; it must be floating point")


def _patch(patch: Sequence[int], order: str) -> tuple[int, ...]:
    """`patch` as a tuple, with as many sizes as `order` has axes beside the channels."""
    sizes = _sizes(patch)
    if len(sizes) != len(_names(order)) - 1:
        raise GeometryError(f"patch {sizes} does not fit the axes {order!r}")
    return sizes


def _names(order: str) -> list[str]:
    names = order.split()
    if sorted(names) not in (["c", "h", "w"], ["c", "h", "t", "w"]):
        raise GeometryError(f"order {order!r} must name c, h, w and perhaps t, separated by spaces")
    return names


def _unflatten(
    weight: Tensor, patch: Sequence[int], channels: int, order: str
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Split (D, C * prod(patch)) into (D, C, *patch), and a function that flattens a resized one again."""
    names = _names(order)
    _need_floating(weight, "linear map")
    wanted = ["c", *[n for n in ("t", "h", "w") if n in names]]
    sizes = dict(zip(wanted, (channels, *_patch(patch, order)), strict=True))
    if weight.dim() != 2 or weight.shape[1] != math.prod(sizes.values()):
        raise GeometryError(
            f"shape {tuple(weight.shape)} is not a map over {channels} channels of patch {tuple(patch)}"
        )
    there = [0, *[1 + names.index(n) for n in wanted]]
    back = [0, *[1 + wanted.index(n) for n in names]]
    kernel = weight.reshape(weight.shape[0], *[sizes[n] for n in names]).permute(there)
    return kernel, lambda resized: resized.permute(back).reshape(weight.shape[0], -1)
