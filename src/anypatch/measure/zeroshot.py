"""Classifying without training: a model's own head where its classes match, and CLIP's text tower."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from anypatch.adaptation import host
from anypatch.core.twins import Subject
from anypatch.errors import DataError
from anypatch.hosts.images import Classes
from anypatch.measure.features import described

PROMPT = "a photo of a {}."  # the plain prompt of CLIP's paper (arXiv:2103.00020, section 3.1.4)


def head_columns(model: nn.Module | Subject, classes: Sequence[str]) -> tuple[list[int] | None, str]:
    """Which outputs of a model's classifier are the data's classes, in their order, and a note for the user.

    Names are compared where the model says them; where it does not, the number of classes has to agree, and their
    order is taken as that of the data.
    """
    subject = described(model)
    owner = host(subject.model)
    found = owner.classes(subject) if owner.has("classes") else Classes()
    if not found.outputs:
        return None, ""
    for names in found.vocabularies:
        places: dict[str, int] = {}
        for place, name in enumerate(names):
            for alias in (name, *name.split(", ")[:1]):
                places.setdefault(_plain(alias), place)
        if all(_plain(c) in places for c in classes):
            return [places[_plain(c)] for c in classes], ""
    if not found.vocabularies and found.outputs == len(classes):
        note = f"the model does not name its {found.outputs} classes: they are taken in the order of the data's"
        return list(range(found.outputs)), note
    return None, "the model's own classifier is not used: its classes are not the data's"


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ")


def text_features(model: nn.Module | Subject, names: Sequence[str], source: str | None) -> NDArray[np.float32]:
    """One vector per class from the model's text tower.

    Raises:
        DataError: the model has no text tower, or its tokenizer cannot be found.
    """
    subject = described(model)
    owner = host(subject.model)
    if not owner.has("tokenize"):
        kind = type(subject.model).__name__
        raise DataError(f"class names are for models with a text tower, such as CLIP; {kind} has none")
    encode = owner.tokenize(subject, [PROMPT.format(n) for n in names], source)
    model = subject.model
    here = all(p.device.type == "cpu" for p in model.parameters())
    towers = copy.deepcopy(model, {id(p): p for p in model.parameters()} if here else {}).cpu().eval()
    with torch.no_grad():
        return encode(towers).float().cpu().numpy()
