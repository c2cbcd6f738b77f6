"""The optimisation's constants and the learning rate over a run."""

from __future__ import annotations

import math

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
# The range test: rates tried from the start of the run, doubled as long as they are no worse; each run is as long as it
# has to be to tell, and a fortieth of the steps at most.
FIRST_RATE, LAST_RATE, FACTOR = 4e-6, 1e-2, 2.0
TRIAL_STEPS, TRIAL_SHARE = (4, 12), 1 / 40
# Tokens between blocks that are compared with the teacher's: after these shares of the blocks, and the weight of their
# distance beside the outputs'.
INSIDE, INSIDE_WEIGHT = (1 / 4, 1 / 2, 3 / 4), 3.0
ROUNDS = 6  # times that each crop is seen: what the teacher says of one costs as much as two steps with it
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


def trial_rates() -> list[float]:
    """Rates of the range test, rising."""
    found = [FIRST_RATE]
    while found[-1] * FACTOR <= LAST_RATE:
        found.append(found[-1] * FACTOR)
    return found


def trial_steps(steps: int) -> int:
    least, most = TRIAL_STEPS
    return max(min(round(steps * TRIAL_SHARE), most), least)
