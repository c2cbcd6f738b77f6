"""The tensors in whatever a model returns, each with where it is in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

MAX_DEPTH = 8  # outputs that refer to themselves end somewhere


def named_tensors(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """All tensors in an output, in order, with where they are in it (``.logits``, ``[0]``).

    Looks into mappings, sequences, dataclasses and plain objects of the caller's own.

    Examples:
        >>> import torch
        >>> [name for name, _ in named_tensors({"maps": [torch.zeros(1), torch.zeros(2)]})]
        ['.maps[0]', '.maps[1]']
    """
    if isinstance(value, Tensor):
        yield path, value
    elif depth > MAX_DEPTH:
        return
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(item, f"{path}.{key}", depth + 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for i, item in enumerate(value):
            yield from named_tensors(item, f"{path}[{i}]", depth + 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            yield from named_tensors(getattr(value, item.name, None), f"{path}.{item.name}", depth + 1)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and not callable(value):
        for key, item in list(vars(value).items()):
            yield from named_tensors(item, f"{path}.{key}", depth + 1)


def ungrown(before: Sequence[int], after: Sequence[int], old: Sequence[int], new: Sequence[int]) -> bool:
    """Whether an output that was as large as the image is not as large as the new one, pixels being on the axes of
    NCHW, NHWC or NHW.

    Examples:
        >>> ungrown((1, 5, 64, 64), (1, 5, 64, 64), (64, 64), (128, 128))
        True
        >>> ungrown((1, 64, 64), (1, 128, 128), (64, 64), (128, 128))
        False
    """
    if len(before) < 3:
        return False
    for start in (len(before) - 2, len(before) - 3) if len(before) > 3 else (1,):
        if tuple(before[start : start + 2]) == tuple(old[-2:]):
            return tuple(after[start : start + 2]) != tuple(new[-2:])
    return False
