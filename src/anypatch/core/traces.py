"""What a forward pass without values shows beside the shapes it returns: how it took its tensors apart.

A number written in code (``x[:, :197]``, ``F.unfold(x, 16, stride=16)``) has no name and no shape; where the model is
run at two geometries, the parts that were taken and the windows that were gone over tell it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anypatch.core.geometry import Size
from anypatch.core.modes import Operation, tensors_in

# Operations whose result says nothing of the values that they are given, but for its shape.
SHAPED_ALIKE = ("_like", "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided")
LOOK_UPS = ("embedding", "index", "index_select", "gather")
SPEAKING_FOR_OTHERS = ("torch", "anypatch", "einops")  # what they do, somebody's code asked for
POOLS = ("avg_pool2d", "max_pool2d", "max_pool2d_with_indices")


@dataclass(frozen=True)
class Site:
    """The line of Python that an operation stands in: its module, function and number."""

    module: str
    function: str
    line: int

    def __str__(self) -> str:
        return f"line {self.line} of {self.module}, in {self.function}"


@dataclass(frozen=True)
class Cut:
    """A part of an axis that was taken.

    Attributes:
        asked: what the code asked for: a start and an end, or a number of places.
        kept, before, after: how much of the axis was taken, and how much left out on both sides.
        site: where.
    """

    asked: tuple[Any, ...]
    kept: int
    before: int
    after: int
    site: Site


@dataclass(frozen=True)
class Windows:
    """Windows side by side that a map was cut into.

    Attributes:
        size: of a window.
        sides: of the map, as many.
        site: where.
    """

    size: Size
    sides: Size
    site: Site


@dataclass(frozen=True)
class Reshaped:
    """A tensor that was given other axes."""

    before: Size
    after: Size
    site: Site


@dataclass(frozen=True)
class Averaged:
    """A sum over an axis, scaled by a number.

    Attributes:
        length: of the axis.
        number: what the sum was divided by.
        site: where.
    """

    length: int
    number: float
    site: Site


class Trace:
    """What one forward pass shows.

    Args:
        doubtful: tensors of which shall be told whether they take part, and how; with each the length of the axis that
            is meant.

    Attributes:
        joined: lengths, along the axis, of whatever was put together.
        cuts, windows, reshaped: how tensors that depend on the image were taken apart.
        averaged: how sums of them were scaled.
        used: of the doubtful, by their places, those that anything was computed with.
        placed: likewise, those of which a part was taken by its place, and not by what the image shows there.
    """

    def __init__(self, doubtful: Iterable[tuple[Tensor | None, int]] = ()) -> None:
        self.joined: list[Size] = []
        self.cuts: list[Cut] = []
        self.windows: list[Windows] = []
        self.reshaped: list[Reshaped] = []
        self.averaged: list[Averaged] = []
        self._sums: dict[
            int, int
        ] = {}  # of tensors that are held in _seen: lengths of the axes that they are sums over
        self.used: set[int] = set()
        self.placed: set[int] = set()
        self._doubtful = {id(t): (place, size, t) for place, (t, size) in enumerate(doubtful) if t is not None}
        self._seen: dict[int, Tensor] = {}  # what is computed from the image, held so that no identity comes twice
        self.indexing = False  # whether slices have been noted already

    def starts(self, pixels: Tensor) -> None:
        """From here on, what is computed from ``pixels`` depends on the image."""
        self._seen[id(pixels)] = pixels

    def note(self, operation: Operation, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Note one operation, before its arguments are let go."""
        name = operation.name
        if name == "cat":
            axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            self.joined.append(tuple(part.shape[axis] for part in args[0] if part.ndim > 1))
        given = list(tensors_in((args, kwargs)))
        seen = any(id(tensor) in self._seen for tensor in given)
        self.used |= {self._doubtful[id(tensor)][0] for tensor in given if id(tensor) in self._doubtful}
        first = given[0] if given else None
        if name == "slice" and first is not None and not self.indexing:
            self._cut(first, *_bounds(args))
        if first is not None and id(first) in self._seen:
            self._taken(name, args, kwargs, first, result)
        if name == "sum" and seen and isinstance(result, Tensor) and result.numel():
            self._sums[id(result)] = first.numel() // result.numel() if first is not None else 0
        for tensor in tensors_in(result):
            if seen and not name.endswith(SHAPED_ALIKE):
                self._seen[id(tensor)] = tensor
        if first is None or id(first) not in self._doubtful:
            return
        place, size, _ = self._doubtful[id(first)]
        if name in LOOK_UPS and not any(id(other) in self._seen for other in given[1:]):
            self.placed.add(place)  # by a list of numbers, whatever the image shows
        if operation.view:
            self._doubtful.update({id(tensor): (place, size, tensor) for tensor in tensors_in(result)})

    def indexed(self, tensor: Tensor, index: Any) -> None:
        """Note Python's own ``tensor[index]``, of which torch shows only slices that leave something out."""
        for axis, start, end in _slices(tensor, index):
            self._cut(tensor, axis, start, end)

    def _cut(self, tensor: Tensor, axis: int, start: int, end: int) -> None:
        length = tensor.shape[axis]
        if id(tensor) in self._seen:
            low, high = (min(max(at + length if at < 0 else at, 0), length) for at in (start, end))
            self.cuts.append(Cut((start, end), max(high - low, 0), low, length - high, _site()))
        place, size, _ = self._doubtful.get(id(tensor), (-1, 0, None))
        if length == size and (start != 0 or end not in (size, sys.maxsize)):
            self.placed.add(place)

    def _taken(self, name: str, args: Any, kwargs: dict[str, Any], first: Tensor, result: Any) -> None:
        shape = tuple(first.shape)
        if name in ("index_select", "gather"):
            length, kept = shape[args[1]], args[2].shape[-1 if name == "index_select" else args[1]]
            self.cuts.append(Cut((name, kept), kept, 0, length - kept, _site()))
        elif name == "index":
            for axis, places in enumerate(args[1]):
                if places is not None and places.ndim == 1:
                    kept = len(places)
                    self.cuts.append(Cut((name, kept), kept, 0, shape[axis] - kept, _site()))
        elif name == "select":
            length, at = shape[args[1]], args[2]
            self.cuts.append(Cut((name, at), 1, at % length, length - 1 - at % length, _site()))
        elif name in ("view", "_unsafe_view", "reshape"):
            self.reshaped.append(Reshaped(shape, tuple(result.shape), _site()))
        elif name in ("split", "slice") and (parted := _parted(name, args, kwargs, shape)) is not None:
            self.reshaped.append(Reshaped(shape, parted, _site()))
        elif name in ("div", "mul") and id(first) in self._sums and isinstance(args[1], (int, float)) and args[1]:
            number = args[1] if name == "div" else 1 / args[1]
            self.averaged.append(Averaged(self._sums[id(first)], number, _site()))
        else:
            self.windows += [Windows(size, sides, _site()) for size, sides in _windows(name, args, kwargs, shape)]


def _parted(name: str, args: Any, kwargs: dict[str, Any], shape: Size) -> Size | None:
    """A shape in which an axis is two, as splitting it into equal parts and taking every so many make it."""
    if name == "split":
        axis, size = args[2] if len(args) > 2 else kwargs.get("dim", 0), args[1]
    else:
        axis, size = args[1] if len(args) > 1 else 0, args[4] if len(args) > 4 else 1
    if not isinstance(size, int) or size < 2:
        return None
    axis %= len(shape)
    return (*shape[:axis], -(-shape[axis] // size), size, *shape[axis + 1 :])


def _bounds(args: tuple[Any, ...]) -> tuple[int, int, int]:
    """Axis, start and end of a slice."""
    axis, start, end = (args[place] if len(args) > place else None for place in (1, 2, 3))
    return axis or 0, start or 0, sys.maxsize if end is None else end


def _slices(tensor: Tensor, index: Any) -> Iterator[tuple[int, int, int]]:
    """Axis, start and end of each slice in an index."""
    items = index if isinstance(index, tuple) else (index,)
    axis = 0
    for place, item in enumerate(items):
        if item is Ellipsis:
            axis = tensor.ndim - sum(1 for later in items[place + 1 :] if later is not None)
        elif isinstance(item, slice):
            if item.step in (None, 1) and all(isinstance(at, (int, type(None))) for at in (item.start, item.stop)):
                yield axis, item.start or 0, sys.maxsize if item.stop is None else item.stop
            axis += 1
        elif item is None or isinstance(item, bool):
            continue
        else:
            axis += item.ndim if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def _windows(name: str, args: Any, kwargs: dict[str, Any], shape: Size) -> Iterator[tuple[Size, Size]]:
    """Sizes of windows that lie side by side, and the sides of the map that they are of."""
    if name == "unfold" and args[2] == args[3]:
        yield (args[2],), (shape[args[1]],)
    elif name == "pixel_unshuffle" or (name == "im2col" and _pair(args[1]) == _pair(args[4])):
        yield _pair(args[1]), shape[-2:]
    elif name in POOLS:
        kernel = _pair(args[1])
        stride = args[2] if len(args) > 2 else kwargs.get("stride", ())
        if not stride or _pair(stride) == kernel:
            yield kernel, shape[-2:]
    elif name == "convolution" and len(args[3]) == 2 and tuple(args[1].shape[2:]) == tuple(args[3]):
        yield tuple(args[3]), shape[-2:]


def _pair(value: Any) -> Size:
    return (value, value) if isinstance(value, int) else (*value, *value)[:2]


def _site() -> Site:
    """Whose code runs: the first that is neither torch's nor ours nor einops'."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in SPEAKING_FOR_OTHERS:
            break
        frame = frame.f_back
    code = frame.f_code
    return Site(frame.f_globals.get("__name__", ""), getattr(code, "co_qualname", code.co_name), frame.f_lineno)
