"""Crops that are made once, with what the teacher says of them, and come again mirrored in later rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from anypatch.tuning.data import Feed
from anypatch.tuning.mixing import FLIP
from anypatch.tuning.said import Said, mirrored, together

Size2 = tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """This process's part of a step: crops at each size, bytes (n, c, h, w), and what the teacher says of them."""

    crops: dict[Size2, Tensor]
    said: Said

    def __len__(self) -> int:
        return len(self.said.features.pooled)


@dataclass(frozen=True)
class Sample:
    """One crop at each size, and what the teacher says of it."""

    crops: dict[Size2, Tensor]
    said: Said

    def memory(self) -> int:
        """In bytes."""
        return sum(t.numel() * t.element_size() for t in [*self.crops.values(), *self.said.tensors()])


@dataclass
class Pool:
    """Batches of the training. The first rows of them are made as they are asked for; after that every round takes
    the same crops in another order.

    Place ``p`` of a batch is always filled with a crop that place ``p`` of an earlier one held, whoever holds it: so
    each process of several keeps what it needs and no more, and together they do as one process does. A crop is a
    function of the seed and its number alone, so that a resumed run makes the same pool again.

    Args:
        feed: cuts crops.
        sizes: at which each is wanted, the teacher's first.
        teach: what the teacher says of crops of its size, as it is kept.
    """

    feed: Feed
    sizes: list[Size2]
    teach: Callable[[Tensor], Said]
    made: list[list[Sample | None]] = field(default_factory=list, repr=False)
    stream: Iterator[list[list[Tensor] | None]] | None = field(default=None, repr=False)

    def row(self, number: int) -> Batch | None:
        """A batch of the first round as it was made; ``None`` if none of its images can be read."""
        self._make(number + 1)
        return self._joined(self.made[number], [False] * len(self.made[number]))

    def batch(self, step: int, rows: int) -> Batch | None:
        """This process's part of a step, of a training whose pool has so many rows."""
        round_, number = divmod(step, rows)
        if not round_:
            return self.row(number)
        self._make(rows)
        samples, turned = [], []
        for column, place in enumerate(self.feed.places):
            order = np.random.default_rng([self.feed.seed, 4, round_, place]).permutation(rows)
            samples.append(self.made[int(order[number])][column])
            turned.append(np.random.default_rng([self.feed.seed, 5, step, place]).random() < FLIP)
        return self._joined(samples, turned)

    def sample_bytes(self) -> int:
        """Memory that one crop takes, of those made so far; 0 without any."""
        held = [s.memory() for row in self.made for s in row if s is not None]
        return max(held, default=0)

    def _make(self, rows: int) -> None:
        if self.stream is None:
            self.stream = self.feed.rows(self.sizes)
        while len(self.made) < rows:
            crops = next(self.stream)
            read = [crop for crop in crops if crop is not None]
            said = self.teach(torch.stack([crop[0] for crop in read])) if read else None
            row: list[Sample | None] = []
            for crop in crops:
                if crop is None or said is None:
                    row.append(None)
                    continue
                place = sum(sample is not None for sample in row)
                row.append(Sample(dict(zip(self.sizes, crop, strict=True)), said.of(place)))
            self.made.append(row)

    def _joined(self, samples: list[Sample | None], turned: list[bool]) -> Batch | None:
        there = [(sample, turn) for sample, turn in zip(samples, turned, strict=True) if sample is not None]
        if not there:
            return None
        which = torch.tensor([turn for _, turn in there])
        crops = {size: mirrored(torch.stack([s.crops[size] for s, _ in there]), which, 3) for size in self.sizes}
        return Batch(crops, together([s.said for s, _ in there]).mirrored(which))
