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
from anypatch.hosts.images import Features, Preprocess
from anypatch.measure.accuracy import pool_to


@dataclass(frozen=True)
class Face:
    """A model whose features are read, differentiably."""

    subject: Subject
    host: Host
    preprocess: Preprocess
    device: torch.device

    @property
    def geometry(self) -> Geometry:
        return self.subject.geometry

    @property
    def image_size(self) -> tuple[int, int]:
        size = self.geometry.image_size
        assert size is not None  # models of any size were given one
        return size[-2], size[-1]

    def __call__(self, pixels: Tensor) -> Features:
        """Features of bytes (n, c, h, w)."""
        found = self.preprocess.normalise(pixels.to(self.device))
        return self.host.features(self.subject, found.to(_dtype(self.subject.model)))


def face(model: nn.Module, preprocess: Preprocess, device: torch.device) -> Face:
    """A model as a face, in evaluation mode: a random student never meets its teacher."""
    model.eval()
    subject = describe(model)
    return Face(subject, host(model), preprocess, device)


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@dataclass(frozen=True)
class Distances:
    """Per image (n,): one minus the cosine of the pooled feature, of the patch map, and the divergence of the logits.

    Patch maps are averaged onto the coarser of the two grids; the divergence is Kullback and Leibler's from the
    teacher's classes, as in FlexiViT's distillation (arXiv:2212.08013), zero where there is no classifier.
    """

    pooled: Tensor
    patches: Tensor
    classes: Tensor

    @property
    def loss(self) -> Tensor:
        return self.pooled + self.patches + self.classes


def distances(student: Features, teacher: Features) -> Distances:
    """How far two models' features of the same images are apart."""
    pooled = 1 - functional.cosine_similarity(student.pooled.float(), teacher.pooled.float(), dim=-1)
    grid = [min(a, b) for a, b in zip(student.patches.shape[1:3], teacher.patches.shape[1:3], strict=True)]
    one, two = (pool_to(features.patches.float(), grid) for features in (student, teacher))
    patches = 1 - functional.cosine_similarity(one, two, dim=-1).mean((1, 2))
    if student.logits is None or teacher.logits is None:
        return Distances(pooled, patches, torch.zeros_like(pooled))
    said, wanted = (functional.log_softmax(f.logits.float(), -1) for f in (student, teacher))  # type: ignore[union-attr]
    return Distances(pooled, patches, functional.kl_div(said, wanted, reduction="none", log_target=True).sum(-1))


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
    found = [distances(student(batch), wanted) for batch, wanted in zip(pixels, teacher, strict=True)]
    pooled, patches, loss = (
        torch.cat([getattr(part, name) for part in found]).double().mean().item()
        for name in ("pooled", "patches", "loss")
    )
    return Fidelity(1 - pooled, 1 - patches, loss)
