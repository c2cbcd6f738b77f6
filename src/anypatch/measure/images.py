"""A set of images in a fixed order, with or without labels, and what a sweep measures on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from anypatch.errors import DataError, listed

if TYPE_CHECKING:
    from PIL.Image import Image

TRAIN = ("train", "training")
TEST = ("val", "validation", "valid", "test", "testing")
HELD_OUT = 0.2  # share of each class that is tested on, where the data comes without a split: the usual fifth


@dataclass(frozen=True)
class ImageSet:
    """Some images, in a fixed order.

    Attributes:
        name: what the user called it.
        keys: one name per image, shown to people.
        load: ``load(i)`` decodes image ``i``.
        stamps: one string per image that changes when its content may have changed.
        labels: one class number per image, or ``None``.
        classes: the names of the classes.
        probe: ``probe(i)`` raises if image ``i`` cannot even be opened; cheap.
    """

    name: str
    keys: tuple[str, ...]
    load: Callable[[int], Image]
    stamps: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()
    probe: Callable[[int], None] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """The images at ``indices``, in that order."""
        chosen = tuple(int(i) for i in indices)
        return replace(
            self,
            keys=tuple(self.keys[i] for i in chosen),
            stamps=tuple(self.stamps[i] for i in chosen),
            labels=None if self.labels is None else tuple(self.labels[i] for i in chosen),
            load=Indirect(self.load, chosen),
            probe=None if self.probe is None else Indirect(self.probe, chosen),
        )

    def limited(self, limit: int | None) -> ImageSet:
        """At most ``limit`` images: as evenly over the classes as they allow, or evenly spaced without labels."""
        if limit is None or limit >= len(self):
            return self
        if self.labels is None:
            return self.subset(np.linspace(0, len(self) - 1, limit).round().astype(int).tolist())
        order = np.random.default_rng(0).permutation(len(self))
        seen: Counter[int] = Counter()
        ranked = []
        for place, index in enumerate(order):
            label = self.labels[index]
            ranked.append((seen[label], place, int(index)))
            seen[label] += 1
        return self.subset(sorted(index for _, _, index in sorted(ranked)[:limit]))

    def fingerprint(self) -> str:
        """Changes when an image is added, removed, reordered or edited; not when a folder is moved."""
        digest = hashlib.sha256()
        for key, stamp in zip(self.keys, self.stamps, strict=True):
            digest.update(f"{key}\0{stamp}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Data:
    """What a sweep measures on.

    Attributes:
        test: the images that fidelity and accuracy are measured on.
        train: labelled images that k-NN and the linear probe learn from, or ``None``.
        warnings: what the user should know.
    """

    test: ImageSet
    train: ImageSet | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.test.classes


@dataclass(frozen=True)
class Indirect:
    """``call(i)`` is ``inner(indices[i])``; a class, so that data workers can pickle it."""

    inner: Callable[[int], Any]
    indices: tuple[int, ...]

    def __call__(self, index: int) -> Any:
        return self.inner(self.indices[index])


def split(everything: ImageSet, notes: list[str]) -> Data:
    """Hold out a fixed fifth of every class.

    Our own: scikit-learn's ``train_test_split`` refuses classes of one image and gives small ones nothing to test on.
    """
    assert everything.labels is not None
    labels = np.array(everything.labels)
    generator = np.random.default_rng(0)
    held: list[int] = []
    single = []
    for label in range(len(everything.classes)):
        members = generator.permutation(np.flatnonzero(labels == label))
        if len(members) == 1:
            single.append(everything.classes[label])
        held += members[: max(round(len(members) * HELD_OUT), 1) if len(members) > 1 else 0].tolist()
    rest = sorted(set(range(len(everything))) - set(held))
    if single:
        notes = [*notes, f"{everything.name}: only one image, so not tested on: {listed(single)}"]
    if not held:
        raise DataError(f"{everything.name}: every class has one image only, so there is nothing to test on")
    notes = [*notes, f"{everything.name} comes without a split: a fixed fifth of every class is tested on"]
    return Data(everything.subset(sorted(held)), everything.subset(rest), notes)
