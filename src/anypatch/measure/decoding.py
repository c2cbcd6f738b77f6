"""Decoding images in worker processes, and naming those that cannot be read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anypatch.measure.images import ImageSet
from anypatch.measure.preprocess import Preprocess
from anypatch.measure.workers import alone, begun


def unreadable(images: ImageSet, threads: int = 8) -> dict[int, str]:
    """Images whose file cannot even be opened, with the reason; decodes nothing."""
    if images.probe is None:
        return {}
    probe = images.probe

    def attempt(index: int) -> str:
        try:
            probe(index)
        except Exception as error:
            return reason(error)
        return ""

    # The warnings' state is one for all threads: it is saved and restored here, not in them.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")
        try:
            found = list(pool.map(attempt, range(len(images))))
        except BaseException:  # Ctrl-C: whatever was not begun is not waited for
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {i: r for i, r in enumerate(found) if r}


def reason(error: BaseException) -> str:
    """One short line, without the machine's paths."""
    text = re.sub(r"'?(/[^\s']+/)", "", (str(error).strip().splitlines() or [""])[0]).replace("'", "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True)
class Batch:
    """Pixels as bytes (n, c, h, w), the images' numbers, and why the unreadable ones are not among them."""

    pixels: Tensor
    indices: list[int]
    failures: dict[int, str]


@dataclass(frozen=True)
class _Views(torch.utils.data.Dataset):
    """Item ``i`` is image ``i``, decoded and cut as the model sees it: bytes (c, h, w), or why it cannot be read."""

    images: ImageSet
    preprocess: Preprocess
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            view = self.preprocess.view(self.images.load(index), self.size)
            return index, torch.from_numpy(np.array(view)).view(*self.size, -1).permute(2, 0, 1)
        except Exception as error:  # any decoder's error means the same: this image is left out
            return index, reason(error)

    def collate(self, items: Sequence[tuple[int, Tensor | str]]) -> Batch:
        """Those that could be read as one tensor."""
        read = [(index, view) for index, view in items if isinstance(view, Tensor)]
        none = torch.zeros(0, self.preprocess.channels, *self.size, dtype=torch.uint8)
        pixels = torch.stack([view for _, view in read]).contiguous() if read else none
        failures = {index: why for index, why in items if isinstance(why, str)}
        return Batch(pixels, [index for index, _ in read], failures)


def decode(
    images: ImageSet,
    preprocess: Preprocess,
    size: tuple[int, int],
    batches: Sequence[Sequence[int]],
    workers: int,
    pin: bool = False,
) -> Iterator[Batch]:
    """Decode batches of images, ahead of whoever consumes them.

    Args:
        images: where from.
        preprocess: how an image becomes what the model sees.
        size: (height, width) of that, in pixels.
        batches: the numbers of the images of each batch.
        workers: processes that decode; 0 for this one.
        pin: whether pixels go into memory from which a GPU copies while it computes.
    """
    views = _Views(images, preprocess, size)
    loader: Any = torch.utils.data.DataLoader(
        views,
        batch_sampler=batches,  # type: ignore[arg-type]  # any sized iterable of lists of indices
        collate_fn=views.collate,
        num_workers=min(workers, len(batches)),
        prefetch_factor=2 if workers and batches else None,
        worker_init_fn=alone,
        generator=torch.Generator(),  # or the loader draws its workers' seeds from the caller's random numbers
    )
    for batch in begun(loader):
        yield replace(batch, pixels=batch.pixels.pin_memory()) if pin else batch
