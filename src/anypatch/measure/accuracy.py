"""How well features do: accuracy with its interval, and how much of the native model's behaviour is kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anypatch.errors import AnypatchError
from anypatch.measure.features import pool_to

NEIGHBOURS = 10  # images compared by neighbour_agreement
VOTERS = 20  # images that vote in k-NN classification

Accuracy = tuple[float, float, float]  # value, low, high


def wilson(correct: int, total: int, z: float = 1.959963984540054) -> Accuracy:
    """A share and its 95 % interval (Wilson's score interval, right for small samples and near 0 and 1 too)."""
    if total == 0:
        return math.nan, math.nan, math.nan
    share = correct / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low = 0.0 if correct == 0 else max(middle - half, 0.0)
    return share, low, 1.0 if correct == total else min(middle + half, 1.0)


def knn_accuracy(train: NDArray, train_labels: Sequence[int], test: NDArray, test_labels: Sequence[int]) -> Accuracy:
    """The class of the nearest training images by cosine, nearer ones weighing more."""
    KNeighborsClassifier = _sklearn("neighbors", "KNeighborsClassifier")
    votes = min(VOTERS, len(train))
    classifier = KNeighborsClassifier(votes, metric="cosine", weights=_closeness, algorithm="brute")
    predicted = classifier.fit(train, train_labels).predict(test)
    return _share(predicted, test_labels)


def _closeness(distances: NDArray) -> NDArray:
    """Weights by cosine similarity, as DINO's k-NN evaluation has them (temperature 0.07)."""
    return np.exp(-distances / 0.07)


def probe_accuracy(train: NDArray, train_labels: Sequence[int], test: NDArray, test_labels: Sequence[int]) -> Accuracy:
    """A logistic regression on standardised features."""
    make_pipeline = _sklearn("pipeline", "make_pipeline")
    StandardScaler = _sklearn("preprocessing", "StandardScaler")
    LogisticRegression = _sklearn("linear_model", "LogisticRegression")
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged to the last digit is good enough for a probe
        probe.fit(train, train_labels)
    return _share(probe.predict(test), test_labels)


def logits_accuracy(logits: NDArray, labels: Sequence[int]) -> Accuracy:
    """How often the largest logit is the right class's."""
    return _share(logits.argmax(1), labels)


def zero_shot_accuracy(images: NDArray, texts: NDArray, labels: Sequence[int]) -> Accuracy:
    """How often the nearest class text is the right one."""
    return logits_accuracy(_unit(images) @ _unit(texts).T, labels)


def _share(predicted: NDArray, labels: Sequence[int]) -> Accuracy:
    return wilson(int((np.asarray(predicted) == np.asarray(labels)).sum()), len(labels))


def _unit(x: NDArray) -> NDArray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def fidelity(features: NDArray, reference: NDArray) -> float:
    """Mean cosine between each image's features and its reference."""
    return float((_unit(features) * _unit(reference)).sum(1).mean())


def neighbours(count: int) -> int:
    """How many neighbours to compare among ``count`` images: few enough that agreement is not a matter of course."""
    return min(NEIGHBOURS, count // 5)


def neighbour_agreement(features: NDArray, reference: NDArray) -> float:
    """Share of each image's nearest other images that are the same in both; NaN with too few images."""
    k = neighbours(len(features))
    if k < 1:
        return math.nan
    ours, theirs = _nearest(_unit(features), k), _nearest(_unit(reference), k)
    common = [len(set(a) & set(b)) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
    return float(np.mean(common) / k)


def _nearest(unit: NDArray, k: int, block: int = 1024) -> NDArray:
    found = []
    for start in range(0, len(unit), block):
        similar = unit[start : start + block] @ unit.T
        rows = np.arange(len(similar))
        similar[rows, start + rows] = -np.inf
        found.append(np.argpartition(-similar, k - 1, axis=1)[:, :k])
    return np.concatenate(found)


def patch_fidelity(patches: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Mean cosine between patch features (h, w, c), both averaged onto the coarser of the two grids."""
    values = []
    for one, two in zip(patches, reference, strict=True):
        grid = (min(one.shape[0], two.shape[0]), min(one.shape[1], two.shape[1]))
        one, two = (pool_to(x[None].float(), grid) for x in (one, two))
        values.append(torch.nn.functional.cosine_similarity(one, two, dim=-1).mean())
    return float(torch.stack(values).mean()) if values else math.nan


def pareto(cost: Sequence[float], gain: Sequence[float]) -> list[bool]:
    """Which points no other point beats: none has as little cost with more gain, or less cost with as much."""
    points = list(zip(cost, gain, strict=True))
    return [
        not any((c <= cost_ and g >= gain_) and (c < cost_ or g > gain_) for c, g in points) for cost_, gain_ in points
    ]


def _sklearn(module: str, name: str) -> type:
    try:
        import importlib

        return getattr(importlib.import_module(f"sklearn.{module}"), name)
    except ImportError as error:
        raise AnypatchError(
            "accuracy needs scikit-learn: pip install 'anypatch[sweep]', or give images instead of data"
        ) from error
