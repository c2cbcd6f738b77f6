"""The preprocessing that each host library gives a model, at any image size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from anypatch.adaptation import host
from anypatch.core.twins import Subject
from anypatch.errors import UnsupportedModelError
from anypatch.hosts.images import Preprocess
from anypatch.measure.features import described


def preprocess_of(model: nn.Module | Subject, source: str | None = None) -> Preprocess:
    """A model's own preprocessing.

    Args:
        model: a live model, at any geometry, or its description.
        source: where it was loaded from, which for some libraries is the only place that says.

    Raises:
        UnsupportedModelError: the model takes neither RGB nor grey images.
    """
    subject = described(model)
    found = host(subject.model).preprocess(subject, source)
    return _for_channels(found, subject.model)


def _for_channels(preprocess: Preprocess, model: Any) -> Preprocess:
    """Grey models get one mean; models of other inputs than images are refused."""
    config = getattr(model, "config", None)
    for said in (getattr(model, "in_chans", None), getattr(config, "num_channels", None)):
        if isinstance(said, int):
            if said not in (1, 3):
                raise UnsupportedModelError(
                    f"{type(model).__name__} takes {said} channels; images have three, or one if grey"
                )
            if said != preprocess.channels:
                mean, std = ((sum(values) / len(values),) * said for values in (preprocess.mean, preprocess.std))
                return replace(preprocess, mean=mean, std=std)
            break
    return preprocess
