"""How far a student's features are from the teacher's: the loss, and the fidelity that is reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from anypatch.adaptation import describe, host
from anypatch.core.geometry import Geometry
from anypatch.core.twins import Subject
from anypatch.hosts.base import Host
from anypatch.hosts.blocks import Tokens, as_tokens, block_list, reading, spread
from anypatch.hosts.images import Features, Preprocess
from anypatch.measure.accuracy import pool_to
from anypatch.tuning import schedule
from anypatch.tuning.said import Said


@dataclass(frozen=True)
class Face:
    """A model whose features are read, differentiably."""

    subject: Subject
    host: Host
    preprocess: Preprocess
    device: torch.device
    image_size: tuple[int, int]

    @property
    def geometry(self) -> Geometry:
        return self.subject.geometry

    def __call__(self, pixels: Tensor) -> Features:
        """Features of bytes (n, c, h, w)."""
        return self.host.features(self.subject, self._prepared(pixels))

    def inside(self, pixels: Tensor) -> Said:
        """Features, and the tokens after some of the blocks.

        Raises:
            UnsupportedModelError: blocks that give no tokens.
        """
        prepared = self._prepared(pixels)
        with reading(spread(block_list(self.subject), schedule.INSIDE)) as seen:
            found = self.host.features(self.subject, prepared)
        return Said(found, [as_tokens(self.subject, output, prepared) for output in seen])

    def _prepared(self, pixels: Tensor) -> Tensor:
        return self.preprocess.normalise(pixels.to(self.device)).to(_dtype(self.subject.model))


def face(model: nn.Module, preprocess: Preprocess, device: torch.device, any_size: Sequence[int] | None = None) -> Face:
    """A model as a face, in evaluation mode: a random student never meets its teacher.

    Args:
        model: at its geometry.
        preprocess: of its images.
        device: where it is.
        any_size: of the images, for a model that takes any.
    """
    model.eval()
    subject = describe(model)
    size = subject.geometry.image_size or any_size
    assert size is not None  # models of any size were given one
    return Face(subject, host(model), preprocess, device, (size[-2], size[-1]))


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@dataclass(frozen=True)
class Distances:
    """Per image (n,): one minus the cosine of the pooled feature, of the patch map, and of the tokens between blocks,
    and the divergence of the logits.

    Patch maps are averaged onto the coarser of the two grids; the divergence is Kullback and Leibler's from the
    teacher's classes, as in FlexiViT's distillation (arXiv:2212.08013), zero where there is no classifier; so is the
    distance inside where no blocks are compared.
    """

    pooled: Tensor
    patches: Tensor
    classes: Tensor
    inside: Tensor

    @property
    def loss(self) -> Tensor:
        return self.pooled + self.patches + self.classes + schedule.INSIDE_WEIGHT * self.inside


def distances(student: Said, teacher: Said) -> Distances:
    """How far two models' features of the same images are apart."""
    one, two = student.features, teacher.features
    pooled = 1 - functional.cosine_similarity(one.pooled.float(), two.pooled.float(), dim=-1)
    patches = _apart(*_on_one_grid(one.patches, two.patches)).mean((1, 2))
    between = [_between(*pair) for pair in zip(student.inside, teacher.inside, strict=False)]
    inside = torch.stack(between).mean(0) if between else torch.zeros_like(pooled)
    if one.logits is None or two.logits is None:
        return Distances(pooled, patches, torch.zeros_like(pooled), inside)
    said, wanted = (functional.log_softmax(logits.float(), -1) for logits in (one.logits, two.logits))
    classes = functional.kl_div(said, wanted, reduction="none", log_target=True).sum(-1)
    return Distances(pooled, patches, classes, inside)


def _between(student: Tokens, teacher: Tokens) -> Tensor:
    """Of the tokens after a block, the prefix with the patches, each token alike."""
    patches = _apart(*_on_one_grid(student.patches, teacher.patches)).flatten(1)
    if not student.prefix.shape[1]:
        return patches.mean(1)
    return torch.cat([_apart(student.prefix, teacher.prefix), patches], 1).mean(1)


def _on_one_grid(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Patch maps (n, h, w, c), each averaged onto the coarser grid."""
    grid = [min(a, b) for a, b in zip(one.shape[1:3], two.shape[1:3], strict=True)]
    return tuple(  # type: ignore[return-value]
        patches.float() if list(patches.shape[1:3]) == grid else pool_to(patches.float(), grid)
        for patches in (one, two)
    )


def _apart(one: Tensor, two: Tensor) -> Tensor:
    return 1 - functional.cosine_similarity(one.float(), two.float(), dim=-1)


@dataclass(frozen=True)
class Fidelity:
    """Mean cosines over held-out images, and the mean loss."""

    pooled: float
    patches: float
    loss: float

    @property
    def mean(self) -> float:
        return (self.pooled + self.patches) / 2


@torch.no_grad()
def fidelity(student: Face, pixels: Sequence[Tensor], teacher: Sequence[Features]) -> Fidelity:
    """A student's fidelity to what the teacher said of the same images."""
    found = [distances(Said(student(batch)), Said(wanted)) for batch, wanted in zip(pixels, teacher, strict=True)]
    pooled, patches, loss = (
        torch.cat([getattr(part, name) for part in found]).double().mean().item()
        for name in ("pooled", "patches", "loss")
    )
    return Fidelity(1 - pooled, 1 - patches, loss)
