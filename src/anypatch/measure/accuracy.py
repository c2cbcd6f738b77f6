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

NEIGHBOURS = 10  # images compared by neighbour_agreement: the usual first ten of retrieval
# Images that vote in k-NN classification, and their temperature: DINO's evaluation (arXiv:2104.14294).
VOTERS, TEMPERATURE = 20, 0.07
# Strength of the linear probe: features are standardised, hundreds wide, and often a few dozen images per class. A
# tenth of scikit-learn's default keeps the probe from learning those by heart; 300 steps converge to three digits.
PROBE_C, PROBE_STEPS = 0.1, 300

Accuracy = tuple[float, float, float]  # value, low, high


def wilson(correct: int, total: int) -> Accuracy:
    """A share and its 95 % interval (Wilson's score interval, right for small samples and near 0 and 1 too)."""
    if total == 0:
        return math.nan, math.nan, math.nan
    from scipy.stats import binomtest

    bounds = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    return correct / total, float(bounds.low), float(bounds.high)


def knn_accuracy(train: NDArray, train_labels: Sequence[int], test: NDArray, test_labels: Sequence[int]) -> Accuracy:
    """The class of the nearest training images by cosine, nearer ones weighing more."""
    KNeighborsClassifier = _sklearn("neighbors", "KNeighborsClassifier")
    votes = min(VOTERS, len(train))
    classifier = KNeighborsClassifier(votes, metric="cosine", weights=_closeness, algorithm="brute")
    predicted = classifier.fit(train, train_labels).predict(test)
    return _share(predicted, test_labels)


def _closeness(distances: NDArray) -> NDArray:
    """Weights by cosine similarity, as DINO's k-NN evaluation has them."""
    return np.exp(-distances / TEMPERATURE)


def probe_accuracy(train: NDArray, train_labels: Sequence[int], test: NDArray, test_labels: Sequence[int]) -> Accuracy:
    """A logistic regression on standardised features."""
    make_pipeline = _sklearn("pipeline", "make_pipeline")
    StandardScaler = _sklearn("preprocessing", "StandardScaler")
    LogisticRegression = _sklearn("linear_model", "LogisticRegression")
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=PROBE_C, max_iter=PROBE_STEPS))
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


def area_matrix(old: int, new: int) -> Tensor:
    """Averages ``old`` cells into ``new`` by the area they share; rows sum to one."""
    edges = torch.arange(new + 1, dtype=torch.float64) * old / new
    cells = torch.arange(old, dtype=torch.float64)
    shared = torch.minimum(edges[1:, None], cells + 1) - torch.maximum(edges[:-1, None], cells)
    shared = shared.clamp_min(0)
    return shared / shared.sum(1, keepdim=True)


def pool_to(patches: Tensor, grid: Sequence[int]) -> Tensor:
    """Patch features (n, h, w, c) averaged onto a coarser grid, cells weighted by the area they share."""
    rows = area_matrix(patches.shape[1], grid[0]).to(patches)
    columns = area_matrix(patches.shape[2], grid[1]).to(patches)
    return torch.einsum("ih,nhwc,jw->nijc", rows, patches, columns)


def _sklearn(module: str, name: str) -> type:
    try:
        import importlib

        return getattr(importlib.import_module(f"sklearn.{module}"), name)
    except ImportError as error:
        raise AnypatchError(
            "accuracy needs scikit-learn: pip install 'anypatch[sweep]', or give images instead of data"
        ) from error
