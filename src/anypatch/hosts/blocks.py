"""Tokens between a model's blocks: found and read alike for every host, by running the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from anypatch.core.twins import Subject
from anypatch.errors import UnsupportedModelError
from anypatch.hosts.images import normal_grid, on_grid


@dataclass(frozen=True)
class Tokens:
    """Tokens after one block: ``prefix`` (n, k, c), k perhaps 0, and ``patches`` on their grid (n, h, w, c)."""

    prefix: Tensor
    patches: Tensor


def block_list(subject: Subject) -> list[nn.Module]:
    """The blocks of the vision part: of all its lists of modules of one class, the one that holds most weights.

    Stages that hold blocks of their own are found as a list of stages; empty where there is no such list.
    """
    found: list[nn.Module] = []
    most = 0
    for module in subject.part.modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len({type(child) for child in module}) != 1:
            continue
        held = sum(p.numel() for p in module.parameters())
        if len(module) > 1 and held > most:
            found, most = list(module), held
    return found


def spread(blocks: Sequence[nn.Module], shares: Sequence[float]) -> list[nn.Module]:
    """The blocks after which these shares of all have run, each once; not the last, whose tokens are the output's.

    >>> layers = [nn.Identity() for _ in range(12)]
    >>> [layers.index(block) + 1 for block in spread(layers, (1 / 2, 3 / 4, 11 / 12))]
    [6, 9, 11]
    """
    places = dict.fromkeys(round(len(blocks) * share) - 1 for share in shares)
    return [blocks[place] for place in places if 0 <= place < len(blocks) - 1]


@contextlib.contextmanager
def reading(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """What each of the blocks gave last, in their order, while the block runs; ``None`` of one that did not run."""
    seen: list[Any] = [None] * len(blocks)

    def keep(place: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[place] = output

        return hook

    handles = [block.register_forward_hook(keep(place)) for place, block in enumerate(blocks)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def as_tokens(subject: Subject, output: Any, pixels: Tensor) -> Tokens:
    """A block's output as tokens of each image, the prefix apart.

    Raises:
        UnsupportedModelError: it is nothing of the kind.
    """
    tokens = output[0] if isinstance(output, (tuple, list)) and output else output
    name = type(subject.model).__name__
    if not (isinstance(tokens, Tensor) and tokens.is_floating_point() and tokens.dim() in (3, 4)):
        raise UnsupportedModelError(f"a block of {name} gives no tokens")
    if tokens.dim() == 3 and len(tokens) != len(pixels) == tokens.shape[1]:  # the sequence comes first
        tokens = tokens.transpose(0, 1)
    if len(tokens) != len(pixels):
        raise UnsupportedModelError(f"a block of {name} gives no tokens image by image")
    if tokens.dim() == 4:
        return Tokens(tokens.new_empty(len(tokens), 0, 0), _channels_last(subject, tokens, pixels))
    patches = on_grid(subject, tokens, pixels)
    return Tokens(tokens[:, : max(tokens.shape[1] - patches.shape[1] * patches.shape[2], 0)], patches)


def _channels_last(subject: Subject, tokens: Tensor, pixels: Tensor) -> Tensor:
    """A map of tokens as (n, h, w, c): its grid is the model's, or that merged by the same factor on both axes."""
    height, width = normal_grid(subject.geometry, pixels)
    for order in ((0, 1, 2, 3), (0, 2, 3, 1)):
        found = tokens.permute(order)
        tall, wide = found.shape[1:3]
        if height % tall == 0 == width % wide and height // tall == width // wide:
            return found
    raise UnsupportedModelError(
        f"a block of {type(subject.model).__name__} gives {tuple(tokens.shape)}, no map of its {height}x{width} patches"
    )
