"""Tables over tokens that are numbered one after another: at another grid every token would have another's place."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from anypatch.core.geometry import Geometry, show
from anypatch.core.roles import MAX_EXTRA
from anypatch.core.twins import Twins
from anypatch.errors import GeometryError


def require_places(twins: Twins) -> None:
    """No computed table may number the tokens of a grid whose rows change their length.

    A sinusoid over the flattened grid gives token ``i`` the value of ``i``, wherever on the grid it is (VideoMAE). Of a
    grid with longer rows, the library computes a table that begins with the old one, so that all but the first row
    would be told other places than they were trained with; and it would do so again whenever the model is loaded, so
    that a resampled table could not be saved either.

    Raises:
        GeometryError: there is one; the message names it.
    """
    a, b = twins.before.grid, twins.after.grid
    if a is None or b is None:
        return
    while len(a) > 1 and a[0] == b[0] == 1:
        a, b = a[1:], b[1:]
    if a[1:] == b[1:]:
        return  # only the slowest axis changes, so tokens keep their numbers
    later = dict((twins.probe or twins.new).named_modules())
    after = twins.after if twins.probe is None else None
    for path, module in twins.old.named_modules():
        twin = later.get(path)
        for name, table in _computed(module):
            other = None if twin is None else dict(_computed(twin)).get(name)
            if other is not None and _is_numbered(table, other, twins.before, after):
                full = f"{path}.{name}" if path else name
                raise GeometryError(
                    f"{full} numbers the tokens one after another, so at a {show(b)} grid each would be given the "
                    f"place that another had at {show(a)}; and loading computes it anew, so that no resampled one "
                    f'could be saved: use keep="grid", or sizes that keep the length of a row'
                )


def _computed(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Tables whose values the constructor computes: buffers and plain tensors."""
    named = [*module._buffers.items(), *vars(module).items()]
    return [
        (name, value)
        for name, value in named
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1 and not value.is_meta
    ]


def _is_numbered(table: Tensor, other: Tensor, before: Geometry, after: Geometry | None) -> bool:
    """Whether one table begins with the other along an axis that runs over the tokens of both grids."""
    tokens = math.prod(before.grid or ())
    for axis, length in enumerate(table.shape):
        extra = length - tokens
        if not 0 <= extra <= MAX_EXTRA or table.ndim != other.ndim:
            continue
        if other.shape[axis] == length:
            continue  # as long at another number of tokens
        if after is not None and other.shape[axis] != math.prod(after.grid or ()) + extra:
            continue
        shared = min(length, other.shape[axis])
        first, second = table.narrow(axis, 0, shared), other.narrow(axis, 0, shared)
        if first.shape != second.shape or not torch.equal(first, second):
            continue
        return not torch.equal(first, first.narrow(axis, 0, 1).expand_as(first))
    return False
