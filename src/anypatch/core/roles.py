"""What a tensor whose shape follows the geometry is for, and how it is resampled.

The role is read off the shapes in the two twins, the module that owns the tensor and the two geometries.
Whatever fits no role is an error that names the tensor: never a guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Size as TorchSize
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from anypatch.core import kernels as resize
from anypatch.core import tables as positions
from anypatch.core.geometry import Geometry, Size, show
from anypatch.errors import GeometryError, UnsupportedModelError

MAX_EXTRA = 16  # class, register and distillation tokens that may precede a grid that is not the model's main one


@dataclass(frozen=True)
class Facts:
    """What shapes cannot tell, declared by the host library's file.

    Attributes:
        orders: regular expression on a tensor's name -> flattening order of a patch, such as ``"h w c"``.
        suffix_tokens: tokens after the grid in absolute position tables (YOLOS's detection tokens).
        projections: paths of the layers that see pixels, where they are known; a convolution elsewhere that follows
            the patch is an error.
        grids: grids besides the main one, at a geometry (further branches).
        folded: regular expression on a tensor's name -> (outer, inner), for tables that keep ``outer`` grids of
            ``inner`` values per token in one axis.
        whole_multiples: whether exactness needs whole multiples of the patch (padded or cropped inputs).
        padding: pixels of padding before the first patch that stay the same when the patch changes.
        sampling: how the library itself resamples absolute positions.
        relative: how it resamples a relative table (entries, heads) from one window to another, where it does.
        host: whether positions shall be resampled as the library does it.
    """

    orders: dict[str, str] = field(default_factory=dict)
    suffix_tokens: int = 0
    projections: tuple[str, ...] = ()
    grids: Callable[[Geometry], list[Size]] = field(default=lambda geometry: [])
    folded: dict[str, tuple[int, int]] = field(default_factory=dict)
    whole_multiples: bool = False
    padding: int = 0
    sampling: positions.Sampling = positions.ANTIALIASED
    relative: Callable[[Tensor, Size, Size], Tensor] | None = None
    host: bool = False

    def order(self, name: str) -> str | None:
        return next((order for pattern, order in self.orders.items() if re.search(pattern, name)), None)


Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Role:
    """A name for people, and the resampling of the live tensor: a linear map, differentiable, that keeps its dtype.

    The map is a function of a module with its arguments, never one made on the way: views hold it and are pickled.
    """

    text: str
    apply: Map


@dataclass(frozen=True)
class Case:
    """One tensor whose shape follows the geometry, with everything its role is read from.

    ``owners`` are the module that holds the tensor and its ancestors, as (old twin, new twin) pairs, nearest
    first. ``old_shape`` and ``new_shape`` are the twins'; for tables whose token count does not change between
    the twins, ``axes`` still names the axes that depend on the grid.
    """

    name: str
    old_shape: TorchSize
    new_shape: TorchSize
    axes: tuple[int, ...]
    owners: tuple[tuple[nn.Module, nn.Module], ...]
    old: Geometry
    new: Geometry
    facts: Facts
    method: Any
    sampling: positions.Sampling

    @property
    def shapes(self) -> str:
        return f"{tuple(self.old_shape)} -> {tuple(self.new_shape)}"


def role_of(case: Case) -> Role:
    """The role of a tensor.

    Raises:
        UnsupportedModelError: the tensor fits no role; the message names it.
        GeometryError: the role is clear, but these sizes do not work for it.
    """
    owner = case.owners[0][0]
    leaf = case.name.rpartition(".")[2]
    if isinstance(owner, _ConvNd):
        return _convolution(case, leaf)
    if isinstance(owner, nn.Linear):
        return _linear(case, leaf)
    if isinstance(owner, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)):
        raise UnsupportedModelError(
            f"{case.name} ({case.shapes}) normalises the values of a patch before they are projected: "
            f"the stem is not one linear map per patch"
        )
    return _table(case)


def _convolution(case: Case, leaf: str) -> Role:
    old, new = case.owners[0]
    assert isinstance(old, _ConvNd)
    assert isinstance(new, _ConvNd)
    if isinstance(old, _ConvTransposeNd):
        return _transposed(case, old, new)
    if leaf == "bias" or (set(case.axes) <= {0} and set(new.kernel_size) == {1}):
        return _pixel_rows(case)
    if not set(case.axes) <= set(range(2, len(case.new_shape))):
        raise UnsupportedModelError(
            f"{case.name} changes its channels with the geometry ({case.shapes}): "
            f"the stem is not one linear map per patch"
        )
    if set(old.dilation) != {1}:
        raise UnsupportedModelError(f"{case.name} is a dilated convolution: the stem is not one linear map per patch")
    scales_alike = all(
        k0 * s1 == k1 * s0
        for k0, k1, s0, s1 in zip(old.kernel_size, new.kernel_size, old.stride, new.stride, strict=True)
    )
    if not scales_alike or "same" in (old.padding, new.padding):
        raise UnsupportedModelError(
            f"{case.name}: kernel {show(old.kernel_size)} -> {show(new.kernel_size)} with stride {show(old.stride)} -> "
            f"{show(new.stride)} and padding {old.padding} -> {new.padding}: the stem is not one linear map per patch"
        )
    # Where the window starts, in new pixels: the padding may not have grown with the patch.
    shifts = [
        p0 * k1 / k0 - p1
        for p0, p1, k0, k1 in zip(_padding(old), _padding(new), old.kernel_size, new.kernel_size, strict=True)
    ]
    size = tuple(new.kernel_size)
    what = "patch projection" if old.kernel_size == old.stride else "patch projection, overlapping"
    if any(shifts):
        what += ", shifted"
    return Role(what, resize.KernelResize(tuple(old.kernel_size), size, case.method, shifts))


def _padding(conv: _ConvNd) -> tuple[int, ...]:
    return (0,) * len(conv.kernel_size) if isinstance(conv.padding, str) else tuple(conv.padding)


def _transposed(case: Case, old: nn.Module, new: nn.Module) -> Role:
    """A transposed convolution that paints one patch per token."""
    assert isinstance(old, _ConvTransposeNd)
    assert isinstance(new, _ConvTransposeNd)
    paints = all(m.kernel_size == m.stride and set(m.padding) == {0} for m in (old, new))
    if not paints or len(old.kernel_size) != 2 or not set(case.axes) <= {2, 3}:
        raise UnsupportedModelError(
            f"{case.name} ({case.shapes}) is a transposed convolution that follows the patch, but does not paint one "
            f"patch per token"
        )
    return Role("pixel head (transposed convolution)", partial(_painting, old=old.kernel_size, new=new.kernel_size))


def _painting(weight: Tensor, old: Size, new: Size) -> Tensor:
    rows = weight.permute(1, 2, 3, 0).flatten(0, 2)
    resized = resize.resize_pixels(rows, old, new, "c h w")
    return resized.reshape(weight.shape[1], *new, weight.shape[0]).permute(3, 0, 1, 2).contiguous()


def _patch_channels(case: Case, axis: int) -> int:
    """Channels of a flattened patch, from its length in both twins."""
    old_pixels, new_pixels = math.prod(case.old.patch_size), math.prod(case.new.patch_size)
    length, new_length = case.old_shape[axis], case.new_shape[axis]
    if length % old_pixels or length // old_pixels * new_pixels != new_length:
        raise UnsupportedModelError(
            f"{case.name} ({case.shapes}) does not hold one value per pixel of a {show(case.old.patch_size)} patch"
        )
    return length // old_pixels


def _order(case: Case) -> str:
    order = case.facts.order(case.name)
    if order is None:
        raise UnsupportedModelError(
            f"{case.name} ({case.shapes}) acts on flattened patches, and their flattening order is not known "
            f"for this model"
        )
    return order


def _linear(case: Case, leaf: str) -> Role:
    tokens_old, tokens_new = _tokens(case.old), _tokens(case.new)
    for axis in case.axes:
        if tokens_old and case.old_shape[axis] == tokens_old and case.new_shape[axis] == tokens_new:
            raise GeometryError(
                f"{case.name} ({case.shapes}) mixes a fixed number of tokens ({tokens_old}), "
                f'so the grid cannot change: use keep="grid"'
            )
    if leaf == "weight" and case.axes == (1,):
        channels, order = _patch_channels(case, 1), _order(case)
        return Role(
            f"patch projection ({order})",
            resize.linear_resize(case.old.patch_size, case.new.patch_size, channels, order, case.method),
        )
    if case.axes == (0,):
        return _pixel_rows(case)
    raise UnsupportedModelError(f"{case.name} ({case.shapes}) changes in a way that no known role explains")


def _pixel_rows(case: Case) -> Role:
    shuffle = _shuffle(case)
    if shuffle is None:
        _patch_channels(case, 0)
        (old, new), order = (case.old.patch_size, case.new.patch_size), _order(case)
    else:
        (old, new), order = shuffle, "c h w"
    return Role(f"pixel head ({order})", partial(_rows, old=old, new=new, order=order))


def _rows(weight: Tensor, old: Size, new: Size, order: str) -> Tensor:
    flat = resize.resize_pixels(weight.flatten(1) if weight.ndim > 2 else weight, old, new, order)
    return flat.reshape(flat.shape[0], *weight.shape[1:])


def _shuffle(case: Case) -> tuple[Size, Size] | None:
    """The old and new block sizes of the ``PixelShuffle`` that stands beside a pixel head."""
    for old, new in case.owners[1:2]:
        for a, b in zip(old.children(), new.children(), strict=False):
            if isinstance(a, nn.PixelShuffle) and isinstance(b, nn.PixelShuffle):
                return (a.upscale_factor,) * 2, (b.upscale_factor,) * 2
    return None


def _tokens(geometry: Geometry) -> int | None:
    return None if geometry.grid is None else math.prod(geometry.grid)


def _table(case: Case) -> Role:
    if len(case.axes) > 1:
        return _map(case)
    for pattern, (outer, inner) in case.facts.folded.items():
        if re.search(pattern, case.name):
            return _folded(case, outer, inner)
    (axis,) = case.axes
    old_n, new_n = case.old_shape[axis], case.new_shape[axis]
    relative = re.search(r"rel", case.name) is not None
    finders = (_relative, _tokens_role, _single_axis) if relative else (_tokens_role, _single_axis, _relative)
    for find in finders:
        role = find(case, axis, old_n, new_n)
        if role is not None:
            return role
    raise UnsupportedModelError(
        f"{case.name} ({case.shapes}) follows the geometry, but its {old_n} entries are neither prefix tokens plus a "
        f"{show(case.old.grid)} grid nor relative positions"
    )


def _folded(case: Case, outer: int, inner: int) -> Role:
    """A table whose token axis is folded into one with ``outer`` grids before it and ``inner`` values after it."""
    (axis,) = case.axes
    unfold = partial(_unfolded, axis=axis, outer=outer, inner=inner)
    old, new = unfold(case.old_shape), unfold(case.new_shape)
    role = _table(replace(case, old_shape=old, new_shape=new, axes=(axis + 1,), facts=replace(case.facts, folded={})))
    return Role(role.text, partial(_through, apply=role.apply, unfold=unfold, axis=axis))


def _unfolded(shape: Iterable[int], axis: int, outer: int, inner: int) -> TorchSize:
    sides = list(shape)
    return TorchSize([*sides[:axis], outer, sides[axis] // (outer * inner), inner, *sides[axis + 1 :]])


def _through(table: Tensor, apply: Map, unfold: Callable[[Iterable[int]], TorchSize], axis: int) -> Tensor:
    return apply(table.reshape(unfold(table.shape))).flatten(axis, axis + 2)


def _map(case: Case) -> Role:
    """A table with one axis per grid axis: NHWC, NCHW, or with time."""
    axes = case.axes
    if axes != tuple(range(axes[0], axes[0] + len(axes))) or len(axes) > 3:
        raise UnsupportedModelError(f"{case.name} ({case.shapes}) changes on axes {axes}, which is no grid")
    size = tuple(case.new_shape[a] for a in axes)
    resample = partial(positions.resample_grid, axes=axes, new_grid=size, sampling=case.sampling)
    return Role("absolute positions (map)", resample)


def _grids(case: Case) -> Iterator[tuple[Size, Size]]:
    """(old, new) grids that a table may be over, most likely first."""
    old, new = case.old.grid, case.new.grid
    if old is not None and new is not None:
        yield old, new
        yield from zip(case.facts.grids(case.old), case.facts.grids(case.new), strict=True)
        if len(old) == 3:
            yield old[1:], new[1:]
            yield old[:1], new[:1]
    yield from _pairs(case)
    if old is not None and new is not None:
        for factor in (2, 4, 8, 16):  # of the grids that stages merge to: four halvings leave a 14x14 grid none
            if all(s % factor == 0 for s in (*old, *new)):
                yield tuple(s // factor for s in old), tuple(s // factor for s in new)


def _pairs(case: Case) -> Iterator[tuple[Size, Size]]:
    """Attributes of the owner and its ancestors that are a size in both twins: windows, grids, resolutions."""
    for old, new in case.owners:
        for key, value in vars(old).items():
            a, b = _pair(value), _pair(vars(new).get(key))
            if a is not None and b is not None:
                yield a, b


def _pair(value: Any) -> Size | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int) and value > 0:
        return (value, value)
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(type(v) is int and v > 0 for v in value):
        return tuple(value)
    return None


def _tokens_role(case: Case, axis: int, old_n: int, new_n: int) -> Role | None:
    suffix = case.facts.suffix_tokens
    for i, (old, new) in enumerate(_grids(case)):
        extra = old_n - math.prod(old)
        if extra < 0 or extra != new_n - math.prod(new):
            continue
        if i > 0 and (extra > MAX_EXTRA or (math.prod(old) == math.prod(new) and old_n != new_n)):
            continue
        after = min(suffix, extra)
        prefix = extra - after
        shown = f"{prefix} + {show(old)}" if prefix else show(old)
        apply = partial(positions.resample_tokens, axis=axis, old_grid=old, new_grid=new, prefix=prefix, suffix=after)
        return Role(f"absolute positions ({shown} tokens)", partial(apply, sampling=case.sampling))
    return None


def _single_axis(case: Case, axis: int, old_n: int, new_n: int) -> Role | None:
    """A table for rows or for columns only, absolute or relative (``rel_pos_h``)."""
    sides = [(o, n) for old, new in _grids(case) for o, n in zip(old, new, strict=True)]
    resample = partial(positions.resample_grid, axes=(axis,), new_grid=(new_n,))
    for old, new in sides:
        if (old, new) == (old_n, new_n):
            return Role("absolute positions (one axis)", resample)
        if (2 * old - 1, 2 * new - 1) == (old_n, new_n):
            return Role("relative positions (one axis)", resample)
    return None


def _relative(case: Case, axis: int, old_n: int, new_n: int) -> Role | None:
    for old, new in _grids(case):
        if len(old) != 2:
            continue
        extra = old_n - math.prod(2 * s - 1 for s in old)
        if extra not in (0, 3) or extra != new_n - math.prod(2 * s - 1 for s in new):
            continue
        if case.facts.host:
            return _relative_of_host(case, axis, old, new)
        return Role(
            f"relative positions ({show(old)} window)",
            partial(positions.resample_relative, axis=axis, old_window=old, new_window=new, extra=extra),
        )
    return None if not case.name.endswith(("_h", "_w")) else _single_axis(case, axis, old_n, new_n)


def _relative_of_host(case: Case, axis: int, old: Size, new: Size) -> Role:
    resize_table = case.facts.relative
    if resize_table is None:
        raise UnsupportedModelError(
            f"{case.name} ({case.shapes}) is a relative position table, and {case.old.library} does not resample those "
            f'itself: positions="host" covers absolute tables only here; use positions="antialias"'
        )
    apply = partial(_rows_first, resize_table=resize_table, old=old, new=new, axis=axis)
    return Role(f"relative positions ({show(old)} window)", apply)


def _rows_first(table: Tensor, resize_table: Callable[..., Tensor], old: Size, new: Size, axis: int) -> Tensor:
    return resize_table(table.movedim(axis, 0), old, new).movedim(0, axis).contiguous()


def changed_axes(*shapes: Iterable[int]) -> tuple[int, ...]:
    """Axes on which shapes of equal rank differ."""
    return tuple(i for i, sides in enumerate(zip(*shapes, strict=True)) if len(set(sides)) > 1)
