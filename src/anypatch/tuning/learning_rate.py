"""The height of the learning rate, found by a range test: its constants, how long it may take, and the search."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from anypatch.tuning import schedule
from anypatch.tuning.weights import kept, put_back

if TYPE_CHECKING:
    from anypatch.tuning.training import Trainer

# The range test begins at a rate that is known to be good for pretrained ViTs (of DINOv2-small 8e-6 to 1e-5, 1.6e-5
# is no better and 3e-5 worse: benchmarks/tuning_notes.md) and goes up by this factor as long as that is better, else
# down. A good rate for LoRA is about ten times that for all weights (Schulman and others, "LoRA without regret", 2025).
FIRST_RATE, LORA_TIMES, FACTOR = 1e-5, 10.0, 2.0
# That rate is for a model whose features have lost this much (DINOv2-small at patch 28). Adam's steps have the length
# of the rate, so that noise keeps features at a distance that grows as its square: where less is lost, a step that is
# shorter by the root has the same share of it to win.
LOST, SHORTEST = 0.1, 0.25
# Short runs want higher rates than long ones (Wu, Ren, Liao, Grosse, "Understanding short-horizon bias in stochastic
# meta-optimization", 2018), so that each rate is tried at so many times its height. Without it, six steps of
# DINOv2-small at patch 32 found 2e-5, at which the held-out fidelity went up and down for the next hundred.
TRIAL_TIMES = 2.0
# A few steps tell two low rates apart by chance, and the lower one gets less far in a run: it has to be better by this
# factor. DINOv2-small at patch 28: 5e-6 won by 0.993 after four steps, and 160 at 1e-5 won back as much or more.
LOWER_LOSS = 0.95
LEAST_RATE, LAST_RATE = 1e-7, 1e-2
RANGE_SHARE = 0.1  # of the run's steps, the most that the range test may cost
# Each trial is a run of its own, with warm-up and fall to zero, of so many steps.
TRIAL_STEPS, TRIAL_SHARE = (4, 12), 1 / 40


def first_rate(lost: float, lora: bool) -> float:
    """Where the range test begins, for a student whose fidelity is short of one by ``lost`` at the start, at the patch
    size that loses least; two digits.

    >>> first_rate(0.2, lora=False), first_rate(0.04, lora=False), first_rate(0.0, lora=True)
    (1e-05, 6.3e-06, 2.5e-05)
    """
    share = min(max(math.sqrt(max(lost, 0.0) / LOST), SHORTEST), 1.0)
    return float(f"{FIRST_RATE * share * (LORA_TIMES if lora else 1.0):.1e}")


def trial_steps(steps: int) -> int:
    """Of each trial of the range test, in a run of so many steps.

    >>> [trial_steps(steps) for steps in (10, 300, 10_000)]
    [4, 8, 12]
    """
    least, most = TRIAL_STEPS
    return max(min(round(steps * TRIAL_SHARE), most), least)


def trials(steps: int, look: float) -> int:
    """How many rates a run of so many steps can afford to try, where a look at the held-out images costs as much as
    ``look`` steps: one comes after each trial.

    >>> trials(290, 1.3), trials(50, 1.3)
    (3, 0)
    """
    return int(steps * RANGE_SHARE / (trial_steps(steps) + look))


def found_rate(trainer: Trainer, steps: int, first: float) -> float:
    """The range test: short runs from the start, judged on the held-out images and taken back.

    It takes a tenth of the steps at most; each of its runs is at a multiple of the rate, being short. From
    ``first`` it goes up as long as that is better, or else down; where there is no time for two, ``first`` it is.
    """
    student = trainer.pair.student
    most, start = trials(steps, trainer.look_steps()), kept(student)
    found: dict[float, float] = {}

    def better(peak: float, than: float) -> bool:
        if len(found) == most or not LEAST_RATE <= peak <= LAST_RATE:
            return False
        trainer.progress("finding the learning rate", len(found), most)
        found[peak] = _loss_after(trainer, peak * TRIAL_TIMES, trial_steps(steps))
        put_back(student, start)
        if peak < than:
            return found[peak] < found[than] * LOWER_LOSS or math.isinf(found[than])
        return found[peak] < found[than]

    if most < 2:
        trainer.notes.append(f"too few steps to try learning rates: {first:g}, which suits most pretrained models")
        return first
    better(first, first)
    best = first
    for factor in (FACTOR, 1 / FACTOR):
        while better(best * factor, best):
            best *= factor
        if best != first:
            break
    tried = ", ".join(f"{peak:g} {loss:.4f}" for peak, loss in sorted(found.items()))
    trainer.notes.append(f"learning rate {best:g} by the held-out loss after {trial_steps(steps)} steps: {tried}")
    return best


def _loss_after(trainer: Trainer, peak: float, steps: int) -> float:
    """The held-out loss after a short run, the mean over the patch sizes; infinite if the rate diverges."""
    optimizer = trainer.optimizer()
    losses = [trainer.step(i, trainer.batches[i], optimizer, schedule.rate(i, steps, peak)) for i in range(steps)]
    found = math.inf
    if all(map(math.isfinite, losses)):
        looked = trainer.pair.look()
        found = sum(f.loss * trainer.weight(patch) for patch, f in looked.items()) / len(looked)
    return trainer.team.gather(found if math.isfinite(found) else math.inf)[0]  # all go on alike
