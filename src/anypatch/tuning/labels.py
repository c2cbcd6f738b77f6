"""Accuracy before and after, where the folder that is learned from has a folder for each class."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from anypatch.measure.accuracy import knn_accuracy
from anypatch.measure.images import ImageSet
from anypatch.tuning.data import Split, held_out_pixels
from anypatch.tuning.distance import Face

# Images that vote: enough for five neighbours in each of a hundred classes. More would cost more than they tell.
MOST_VOTING = 512


@dataclass(frozen=True)
class Labelled:
    """Images as a face of one size sees them, in batches of bytes, and their classes."""

    pixels: list[Tensor]
    labels: list[int]

    @classmethod
    def of(cls, images: ImageSet, face: Face, batch_size: int, workers: int) -> Labelled:
        pixels, failures = held_out_pixels(images, face.preprocess, face.image_size, batch_size, workers)
        assert images.labels is not None
        return cls(pixels, [label for i, label in enumerate(images.labels) if i not in failures])


def missing(opened: Split) -> str | None:
    """Why accuracy is not measured, as a note; ``None`` if it is, the empty text where there are no labels."""
    if opened.train.labels is None:
        return ""
    return None if find_spec("sklearn") else "accuracy over the class folders needs scikit-learn: anypatch[sweep]"


def accuracy(face: Face, opened: Split, batch_size: int, workers: int) -> float:
    """Share of held-out images whose class the nearest images that were learned from say, by the pooled feature."""
    voting = Labelled.of(opened.train.limited(MOST_VOTING), face, batch_size, workers)
    asked = Labelled.of(opened.held_out, face, batch_size, workers)
    one, two = (_pooled(face, each.pixels) for each in (voting, asked))
    return knn_accuracy(one.numpy(), voting.labels, two.numpy(), asked.labels)[0]


@torch.no_grad()
def _pooled(face: Face, batches: list[Tensor]) -> Tensor:
    return torch.cat([face(batch).pooled.float().cpu() for batch in batches])
