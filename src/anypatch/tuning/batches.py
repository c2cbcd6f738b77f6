"""Batches of the training: crops, with what the teacher says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anypatch.tuning.data import Feed
from anypatch.tuning.said import Said

Size2 = tuple[int, int]
KEPT = 12  # of the first batches: as many as a trial of the range test takes, which each of them begins with


@dataclass(frozen=True)
class Batch:
    """This process's part of a step: crops at each size, bytes (n, c, h, w), and what the teacher says of them.

    Attributes:
        places: of the crops in the whole batch, which all processes share.
    """

    crops: dict[Size2, Tensor]
    said: Said
    places: list[int]

    def __len__(self) -> int:
        return len(self.places)


@dataclass
class Batches:
    """Batch ``k`` of the training is a function of the seed and its number, whoever asks for it and when.

    No crop comes twice, although the teacher's pass costs nearly as much as a step: what is won goes by how many crops
    were seen, not by how often (120 steps of crops that were seen once taught DINOv2-small as much as 330 of crops
    that came three times: benchmarks/tuning_notes.md).

    Args:
        feed: cuts crops.
        sizes: at which each is wanted, the teacher's first.
        teach: what the teacher says of crops of its size, as it is kept.
    """

    feed: Feed
    sizes: list[Size2]
    teach: Callable[[Tensor], Said]
    kept: dict[int, Batch | None] = field(default_factory=dict, repr=False)
    stream: Iterator[list[list[Tensor] | None]] | None = field(default=None, repr=False)
    following: int = 0  # the number of the batch that the stream gives next

    def __getitem__(self, number: int) -> Batch | None:
        """A batch; ``None`` if none of this process's images of it can be read."""
        if number in self.kept:
            return self.kept[number]
        if self.stream is None or self.following != number:
            self.stream, self.following = self.feed.rows(self.sizes, number), number
        found = self._taught(next(self.stream))
        self.following += 1
        if number < KEPT:
            self.kept[number] = found
        return found

    def _taught(self, row: list[list[Tensor] | None]) -> Batch | None:
        read = {place: crops for place, crops in zip(self.feed.places, row, strict=True) if crops is not None}
        if not read:
            return None
        crops = {
            size: torch.stack(each) for size, each in zip(self.sizes, zip(*read.values(), strict=True), strict=True)
        }
        return Batch(crops, self.teach(crops[self.sizes[0]]), list(read))
