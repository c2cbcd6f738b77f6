"""The loop: a teacher, a student at one patch size or several, and what is learned from one to the other."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anypatch.adaptation import describe
from anypatch.core.geometry import Size, show
from anypatch.errors import DataError, UnsupportedModelError
from anypatch.hosts.images import Features
from anypatch.measure.processes import Team
from anypatch.report.progress import Progress, duration
from anypatch.tuning import schedule
from anypatch.tuning.batches import Batch, Batches
from anypatch.tuning.checkpoint import Checkpoint, State
from anypatch.tuning.distance import Face, Fidelity, distances, fidelity
from anypatch.tuning.learning_rate import FIRST_RATE
from anypatch.tuning.said import Said
from anypatch.tuning.weights import Weights, averaged, kept, put_back, put_mixed, trained
from anypatch.tuning.whitening import Optimizer, Whitening, whitenings


@dataclass
class Pair:
    """A teacher and a student, and the held-out images that they are compared on.

    Attributes:
        student: the model whose parameters are trained.
        faces: the student at each patch size.
        held_out: images as the student sees them, by size; bytes in batches.
        wanted: what the teacher says of them.
        precision: of the forward passes: "no", "bf16" or "fp16".
        inside: whether tokens between blocks are compared, too.
        grid: the coarsest on which the teacher's patches are needed; ``None`` for its own.
    """

    teacher: Face
    student: nn.Module
    faces: dict[Size, Face]
    held_out: dict[tuple[int, int], list[Tensor]]
    wanted: list[Features]
    precision: str
    device: torch.device
    inside: bool = False
    grid: tuple[int, int] | None = None

    @contextlib.contextmanager
    def cast(self) -> Iterator[None]:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            yield

    def find_inside(self) -> str:
        """Compare tokens between blocks from now on, if that is possible; else why it is not.

        Both sides are run on a held-out image.
        """
        try:
            with torch.no_grad(), self.cast():
                wanted = self.teacher.inside(self.held_out[self.teacher.image_size][0][:1])
                found = [face.inside(self.held_out[face.image_size][0][:1]) for face in self.faces.values()]
        except UnsupportedModelError as error:
            return str(error)
        if not wanted.inside:
            return "no list of blocks is found in it"
        shapes = [[(t.prefix.shape[1:], t.patches.shape[-1]) for t in said.inside] for said in (wanted, *found)]
        if any(shape != shapes[0] for shape in shapes):
            return "its tokens have another width at another patch size"
        self.inside = True
        maps = [p for s in found for p in (s.features.patches, *(t.patches for t in s.inside))]
        grids = {(int(p.shape[1]), int(p.shape[2])) for p in maps}
        if len(grids) == 1:
            (self.grid,) = grids
        return ""

    def whitened(self) -> dict[nn.Parameter, Whitening]:
        """The layer that sees pixels, with what makes them alike, measured on the held-out images."""
        preprocess = self.teacher.preprocess
        pixels = [preprocess.normalise(batch) for batch in self.held_out[self.teacher.image_size]]
        return whitenings(describe(self.student).part, pixels)

    def teach(self, crops: Tensor) -> Said:
        """What the teacher says of crops, as it is kept."""
        with torch.no_grad(), self.cast():
            said = self.teacher.inside(crops) if self.inside else Said(self.teacher(crops))
        return said.to_keep(self.grid)

    def losses(self, patch: Size, batch: Batch, images: Sequence[int]) -> Tensor:
        """One loss for each of some images of a batch."""
        face = self.faces[patch]
        crops = batch.crops[face.image_size][list(images)]
        with self.cast():
            found = face.inside(crops) if self.inside else Said(face(crops))
        return distances(found, batch.said.of(images).moved(self.device)).loss

    def tokens(self) -> dict[str, int]:
        """Patches of an image at each patch size, which its pass costs about as much as."""
        return {show(patch): math.prod(face.geometry.grid or (1,)) for patch, face in self.faces.items()}

    def shares(self) -> dict[Size, float]:
        """How much of a batch is seen at each patch size."""
        return dict(zip(self.faces, schedule.shares(self.tokens()).values(), strict=True))

    @torch.no_grad()
    def maps(self, count: int) -> list[list[Tensor]]:
        """Patch features (h, w, c) of the first held-out images, for the report: the teacher's, then each face's."""
        with self.cast():
            found = [face(self.held_out[face.image_size][0][:count]) for face in (self.teacher, *self.faces.values())]
        return [list(features.patches.float().cpu()) for features in found]

    def look(self) -> dict[Size, Fidelity]:
        """The student's fidelity on the held-out images at every patch size."""
        with self.cast():
            return {p: fidelity(face, self.held_out[face.image_size], self.wanted) for p, face in self.faces.items()}


@dataclass
class Trainer:
    """Steps of one run, which any number of processes share."""

    pair: Pair
    batches: Batches
    team: Team
    progress: Progress
    notes: list[str] = field(default_factory=list)
    whitened: dict[nn.Parameter, Whitening] | None = None
    begun: dict[Size, Fidelity] | None = None  # fidelity at the start, once it is looked at
    ended: dict[Size, Fidelity] | None = None  # and after the last step
    balance: dict[str, float] = field(default_factory=dict)  # weights of the patch sizes' losses; each 1 if not given

    def seen_at(self, step: int) -> list[Size]:
        """The patch size at which each image of a step's batch is seen.

        FlexiViT draws one for a whole step. With a few hundred steps the optimizer then follows now one patch size, now
        another; here each step asks all of them, for the same cost.
        """
        count, random = self.batches.feed.batch_size, np.random.default_rng([self.batches.feed.seed, 2, step])
        shares = self.pair.shares()
        ends = np.cumsum(list(shares.values()))
        marks = (np.arange(count) + random.random()) / count  # in equal distances: each patch size has its share
        sizes = [list(shares)[min(int(i), len(shares) - 1)] for i in np.searchsorted(ends, marks, side="right")]
        return [sizes[i] for i in random.permutation(count)]

    def freeze_unreached(self) -> None:
        """Leave alone what no feature depends on, such as the text tower of a CLIP.

        Raises:
            UnsupportedModelError: nothing can be trained.
        """
        self._gradients(0, self.batches[0], None, shared=False)
        reached = torch.tensor([float(p.grad is not None) for p in trained(self.pair.student).values()])
        self._summed([reached])
        for (_, parameter), found in zip(trained(self.pair.student).items(), reached.tolist(), strict=True):
            parameter.grad = None
            if not found:
                parameter.requires_grad_(False)
        if not trained(self.pair.student):
            raise UnsupportedModelError(f"{type(self.pair.student).__name__} has no parameter that its features need")

    def weight(self, patch: Size) -> float:
        """Of an image's loss at a patch size: each patch size counts alike, however many images are seen at it, times
        its balance."""
        shares = self.pair.shares()
        return self.balance.get(show(patch), 1.0) / (len(shares) * shares[patch])

    def begin(self) -> dict[str, float]:
        """The fidelity at the start, by patch size, from which their losses are weighed."""
        self.begun = self.pair.look()
        looked = {show(patch): found.mean for patch, found in self.begun.items()}
        looked = self.team.gather(looked)[0]  # all go on alike
        self.balance = schedule.balance(looked)
        return looked

    def step(
        self, number: int, batch: Batch | None, optimizer: torch.optim.Optimizer, rate: float, scaler: Any = None
    ) -> float:
        """A step; its loss, the mean over the whole batch."""
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = self._gradients(number, batch, scaler)
        if not math.isfinite(loss):
            return loss
        if scaler is not None and scaler.is_enabled():
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(list(trained(self.pair.student).values()), schedule.CLIP)
        if scaler is not None and scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def _gradients(self, step: int, batch: Batch | None, scaler: Any, shared: bool = True) -> float:
        """Gradients of the mean loss over everyone's images: sums are shared, so that two processes do as one."""
        count = torch.tensor([0.0 if batch is None else float(len(batch))], dtype=torch.float64)
        self._summed([count])
        if not count.item():
            raise DataError(f"{self.batches.feed.images.name}: not one image of a batch can be read")
        total = torch.zeros(1, dtype=torch.float64)
        for patch, images in ({} if batch is None else self._groups(step, batch)).items():
            assert batch is not None
            loss = self.pair.losses(patch, batch, images).sum() / count.item() * self.weight(patch)
            total += loss.item()
            (loss if scaler is None else scaler.scale(loss)).backward()
        self._summed([total])
        if self.team.size > 1 and shared:
            parameters = list(trained(self.pair.student).values())
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self._summed([p.grad for p in parameters if p.grad is not None])
        return total.item()

    def _groups(self, step: int, batch: Batch) -> dict[Size, list[int]]:
        """Images of this process's part of a batch, by the patch size at which they are seen."""
        sizes, found = self.seen_at(step), dict[Size, list[int]]()
        for image, place in enumerate(batch.places):
            found.setdefault(sizes[place], []).append(image)
        return found

    def _summed(self, tensors: Sequence[Tensor]) -> None:
        if self.team.size == 1:
            return
        for tensor in tensors:
            moved = tensor if self.team.device.type == "cpu" else tensor.to(self.team.device)
            torch.distributed.all_reduce(moved)
            if moved is not tensor:
                tensor.copy_(moved)

    def optimizer(self) -> Optimizer:
        """A new one, for a run or a trial."""
        if self.whitened is None:
            self.whitened = self.pair.whitened()
        return Optimizer(trained(self.pair.student).values(), self.whitened)

    # -- the number of steps ---------------------------------------------------------------------------------------

    def steps_within(self, seconds: float) -> int:
        """How many steps there is time for, making their batches included, by the slowest process; 0 if for none.

        A batch and a step are tried on the second of two, and the steps taken back.
        """
        start = kept(self.pair.student)
        optimizer = self.optimizer()
        times = []
        for number in range(2):
            began = time.perf_counter()
            self.step(number, self.batches[number + 1], optimizer, FIRST_RATE)
            times.append(max(self.team.gather(time.perf_counter() - began)))
        put_back(self.pair.student, start)
        return max(int((seconds - sum(times)) / times[-1]), 0)

    def look_steps(self) -> float:
        """How many steps a look at the held-out images costs as much as: it has no backward passes, and every face."""
        images, tokens = sum(map(len, self.pair.held_out[self.pair.teacher.image_size])), self.pair.tokens().values()
        image = sum(share * count for share, count in zip(self.pair.shares().values(), tokens, strict=True))
        return images * sum(tokens) / (self.batches.feed.batch_size * image * (1 + schedule.BACKWARD))

    # -- the run ---------------------------------------------------------------------------------------------------

    def run(self, state: State, checkpoint: Checkpoint) -> None:
        """Train from ``state`` to its last step; the state, the weights in it too, is where the run stands."""
        optimizer = self.optimizer()
        scaler = torch.amp.GradScaler(self.pair.device.type, enabled=self.pair.precision == "fp16")
        state.restore(self.pair.student, optimizer, scaler)
        self.balance = schedule.balance(state.curve[0][1])
        decay, every = schedule.decay(state.steps), max(math.ceil(state.steps / schedule.WRITES), 1)
        look_every = math.ceil(state.steps / schedule.looks(state.steps, self.look_steps()))
        began, first = time.perf_counter(), state.step
        said = f"held-out fidelity {_mean(state.curve[-1][1]):.3f}"
        for step in range(first, state.steps):
            loss = self.step(step, self.batches[step], optimizer, schedule.rate(step, state.steps, state.peak), scaler)
            if not math.isfinite(loss):
                self.notes.append(f"the learning rate {state.peak:g} diverges: stopped at step {step} of {state.steps}")
                break
            averaged(state.average, self.pair.student, decay)
            state.step = step + 1
            if state.step % look_every == 0 or state.step == state.steps:
                found = self.pair.look()
                self.ended = found if state.step == state.steps else None
                looked = {show(p): f.mean for p, f in found.items()}
                state.curve.append((state.step, looked))
                said = f"held-out fidelity {_mean(looked):.3f}"
            if (state.step % every == 0 or state.step == state.steps) and self.team.leads:
                checkpoint.write(state, self.pair.student, optimizer, scaler)
            left = (time.perf_counter() - began) / (state.step - first) * (state.steps - state.step)
            self.progress(f"tuning, {said}, {duration(left)} left", state.step, state.steps)

    def choose(self, start: Weights, average: Weights) -> tuple[dict[Size, Fidelity], dict[Size, Fidelity], float]:
        """Put the best of the last and the averaged weights, each mixed with the start, into the student.

        A set's shares are tried from the whole on, as long as they gain. The best has the highest mean held-out
        fidelity; no patch size but the native one, which starts at one, may have lost, neither in its pooled feature
        nor in its patch map. If nothing is better, the start is put back.

        Returns:
            The fidelity before, after, and the share of the way from the start.
        """
        last = kept(self.pair.student)
        put_back(self.pair.student, start)
        before = self.begun or self.pair.look()
        best, after, chosen = start, before, 0.0
        for number, end in enumerate((last, average)):
            ahead = -math.inf  # the mean fidelity further on
            for place, share in enumerate(schedule.SHARES):
                self.progress("choosing the weights", number * len(schedule.SHARES) + place, 2 * len(schedule.SHARES))
                put_mixed(self.pair.student, start, end, share)
                known = self.ended if end is last and share == 1 else None
                found = known or self.pair.look()
                harms, mean = self._harms(before, found), _mean_of(found)
                if not harms and mean > _mean_of(after):
                    best, after, chosen = kept(self.pair.student), found, share
                if not harms and mean <= ahead:
                    break  # on the way back nothing comes any more: what is won falls off on both sides of its best
                ahead = mean
        put_back(self.pair.student, best)
        return before, after, chosen

    def _harms(self, before: dict[Size, Fidelity], after: dict[Size, Fidelity]) -> bool:
        native = self.pair.teacher.geometry.patch_size
        found = [(before[p], after[p]) for p in before if p != native or len(before) == 1]
        return any(not (b.pooled >= a.pooled and b.patches >= a.patches) for a, b in found)  # not a number is worse


def _mean_of(looked: dict[Size, Fidelity]) -> float:
    return sum(f.mean for f in looked.values()) / len(looked)


def _mean(looked: dict[str, float]) -> float:
    return sum(looked.values()) / len(looked)


def digest(model: nn.Module) -> str:
    """Of the trained parameters' names and values."""
    found = hashlib.sha256()
    for name, parameter in trained(model).items():
        found.update(f"{name}{tuple(parameter.shape)}".encode())
        found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
