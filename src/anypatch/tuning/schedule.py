"""The optimisation's constants, and the learning rate over a run whose height learning_rate.py finds."""

from __future__ import annotations

import math
from collections.abc import Mapping

# AdamW without weight decay: the start is a solution already, and decay pulls away from it. A shorter memory of squares
# than the usual 0.999 forgets the first steps' gradients within a run of some hundred steps.
BETAS, EPSILON = (0.9, 0.99), 1e-8
CLIP = 1.0  # of the gradient's norm: a single odd batch moves nothing far
WARM_UP = 0.1  # share of the steps over which the rate rises; Adam's first steps have the length of its rate whatever
# the gradient is, which is what destroys features at once
AVERAGE = 0.1  # the moving average remembers this share of the run
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the way from the start to the tuned weights, the first best by held-out fidelity
# The layer that sees pixels steps in coordinates in which pixels are alike (whitening.py), and shorter than the others:
# a random step of its weights moves features fifty times as far as one of any other layer. Directions with less power
# than this share of the mean are stretched no further: gradients there are noise.
PIXELS, DAMPING = 0.5, 0.05
# Tokens between blocks that are compared with the teacher's: after these shares of the blocks, and the weight of their
# distance beside the outputs'. Only where the mean of four native tokens is something that the blocks behind still
# understand: of DINOv2-small that is so from the eighth block on, and before the sixth it is worse than what the
# untouched model has there (benchmarks/tuning_notes.md).
INSIDE, INSIDE_WEIGHT = (2 / 3, 3 / 4, 5 / 6, 11 / 12), 3.0
WRITES = 10  # times that the state is written during a run
LOOKS, LOOKS_SHARE = 10, 0.1  # times that the held-out images are looked at during a run, and the most that it may cost
BACKWARD = 2.0  # times the cost of a forward pass
MOST = 4.0  # weight of one patch size beside the others': the native one has lost nothing, and may lose little


def rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, then down to zero in a straight line.

    >>> [round(rate(step, 10, 1.0), 2) for step in range(10)]
    [1.0, 1.0, 0.89, 0.78, 0.67, 0.56, 0.44, 0.33, 0.22, 0.11]
    """
    rising = max(round(steps * WARM_UP), 1)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * (steps - step) / max(steps - rising, 1)


def balance(fidelity: Mapping[str, float]) -> dict[str, float]:
    """The weight of each patch size's loss, from its fidelity at the start: what is lost counts as a share of it.

    Otherwise those that lost most decide alone, and those near the native one, with least to win, become worse.

    >>> {patch: round(weight, 2) for patch, weight in balance({"14x14": 1.0, "16x16": 0.96, "32x32": 0.84}).items()}
    {'14x14': 4.0, '16x16': 1.67, '32x32': 0.42}
    """
    lost = {patch: max(1 - found, 0.0) for patch, found in fidelity.items()}
    mean = sum(lost.values()) / len(lost)
    return {patch: MOST if mean >= MOST * part else mean / part for patch, part in lost.items()}


def shares(tokens: Mapping[str, int]) -> dict[str, float]:
    """How much of a batch is seen at each patch size, from their numbers of tokens.

    A pass costs about as much as it has tokens, and the mean over n images is as noisy as 1 / sqrt(n): for a given
    cost the sum of several means is least noisy where each takes images as one over the root of its cost (Neyman,
    "On the two different aspects of the representative method", 1934).

    >>> {patch: round(share, 2) for patch, share in shares({"8x8": 784, "14x14": 256, "28x28": 64}).items()}
    {'8x8': 0.16, '14x14': 0.28, '28x28': 0.56}
    """
    wanted = {patch: 1 / math.sqrt(count) for patch, count in tokens.items()}
    return {patch: part / sum(wanted.values()) for patch, part in wanted.items()}


def decay(steps: int) -> float:
    """Of the moving average, for a run of so many steps."""
    return 1 - 1 / max(steps * AVERAGE, 1)


def looks(steps: int, look: float) -> int:
    """How often a run looks at the held-out images, at its end included.

    >>> looks(290, 1.3), looks(100, 8.0)
    (10, 1)
    """
    return max(min(int(steps * LOOKS_SHARE / look), LOOKS), 1)
