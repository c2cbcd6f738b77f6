"""The optimisation's constants and the learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

# AdamW without weight decay: the start is a solution already, and decay pulls away from it. A shorter memory of squares
# than the usual 0.999 forgets the first steps' gradients within a run of some hundred steps.
BETAS, EPSILON = (0.9, 0.99), 1e-8
CLIP = 1.0  # of the gradient's norm: a single odd batch moves nothing far
WARM_UP = 0.1  # share of the steps over which the rate rises; Adam's first steps have the length of its rate whatever
# the gradient is, which is what destroys features at once
AVERAGE = 0.1  # the moving average remembers this share of the run
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the way from the start to the tuned weights, the first best by held-out fidelity
# The range test: rates tried from the start of the run, rising by fours as long as they are no worse; each run is as
# long as it has to be to tell, and a twentieth of the steps at most.
FIRST_RATE, LAST_RATE, FACTOR = 1e-6, 1e-2, 4.0
TRIAL_STEPS, TRIAL_SHARE = (3, 12), 1 / 20
# Tokens between blocks that are compared with the teacher's, and the weight of their distance beside the outputs'.
INSIDE, INSIDE_WEIGHT = 3, 3.0
ROUNDS = 4  # times that each crop is seen: what the teacher says of one costs as much as two steps with it
POOL_BYTES = 2 * 2**30  # of crops and what the teacher says of them, all processes together
LOOKS = 10  # times that the held-out images are looked at during a run, and the state is written


def rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, then down to zero in a straight line.

    >>> [round(rate(step, 10, 1.0), 2) for step in range(10)]
    [1.0, 1.0, 0.89, 0.78, 0.67, 0.56, 0.44, 0.33, 0.22, 0.11]
    """
    rising = max(round(steps * WARM_UP), 1)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * (steps - step) / max(steps - rising, 1)


def decay(steps: int) -> float:
    """Of the moving average, for a run of so many steps."""
    return 1 - 1 / max(steps * AVERAGE, 1)


def rows(steps: int) -> int:
    """Batches of the pool that a run of so many steps makes."""
    return max(math.ceil(steps / ROUNDS), 1)


def optimizer(parameters: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters.values(), lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=0.0)


def trial_rates() -> list[float]:
    """Rates of the range test, rising."""
    found = [FIRST_RATE]
    while found[-1] * FACTOR <= LAST_RATE:
        found.append(found[-1] * FACTOR)
    return found


def trial_steps(steps: int) -> int:
    least, most = TRIAL_STEPS
    return max(min(round(steps * TRIAL_SHARE), most), least)
