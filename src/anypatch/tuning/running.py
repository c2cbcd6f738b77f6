"""``tune``: win back what a larger patch loses, without labels, from the model itself at its native geometry."""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anypatch.adaptation import adapt, at, describe, make_plan
from anypatch.core.adapters import unwrap
from anypatch.core.geometry import Geometry, ImageSizeLike, Keep, Size, SizeLike, as_size, show
from anypatch.core.shells import copied
from anypatch.core.tables import PositionsLike
from anypatch.core.twins import Subject
from anypatch.errors import AnypatchWarning, DataError, GeometryError, UnsupportedModelError
from anypatch.files.atomic import replacing_file
from anypatch.files.paths import given
from anypatch.hosts.cards import TUNING, link_tuning
from anypatch.hosts.images import Preprocess
from anypatch.measure.loading import load_model
from anypatch.measure.preprocess import preprocess_of
from anypatch.measure.processes import Team, decoding_workers
from anypatch.report.colours import shared_colours
from anypatch.report.measurements import Sample
from anypatch.report.progress import Progress, shown_progress
from anypatch.tuning.adapters import merged, with_lora
from anypatch.tuning.asked import MINUTES, Asked
from anypatch.tuning.batches import Batches
from anypatch.tuning.checkpoint import Checkpoint, State, require_output
from anypatch.tuning.data import Feed, Split, held_out_pixels, left_out, split
from anypatch.tuning.distance import Fidelity, face
from anypatch.tuning.labels import accuracy, missing
from anypatch.tuning.learning_rate import first_rate, found_rate
from anypatch.tuning.result import TuneResult
from anypatch.tuning.training import Pair, Trainer, digest
from anypatch.tuning.weights import kept

SHOWN = 4  # held-out images in the report, as many as a sweep's


def tune(
    model: nn.Module | str | Path,
    *,
    images: Any,
    patch_size: SizeLike | Sequence[SizeLike],
    image_size: ImageSizeLike | None = None,
    keep: Keep = "image",
    minutes: float | None = None,
    steps: int | None = None,
    learning_rate: float | str = "auto",
    lora: int | None = None,
    output: str | Path | None = None,
    kernel: Any = "wiener",
    positions: PositionsLike = "antialias",
    batch_size: int = 16,
    num_workers: int | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Progress | bool | None = None,
    precision: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    preprocess: Preprocess | None = None,
    **host_kwargs: Any,
) -> TuneResult:
    """Adapt a model and train it, without labels, to say at the new patch size what it says at its own.

    >>> import timm
    >>> model = timm.create_model("test_vit", img_size=64)
    >>> result = tune(model, images="photos", patch_size=32, steps=2, learning_rate=1e-5, num_workers=0)
    >>> model.patch_embed.patch_size, result.rows[0]["patch_size"]
    ((32, 32), '32x32')

    The teacher is the model as it is, frozen. The student is the adapted model, or, for several patch sizes, one set
    of weights that sees each image of a batch at a patch size of its own (FlexiViT, arXiv:2212.08013, draws one for a
    whole step), fewer of them where they cost much. It learns the direction of the teacher's pooled feature and patch
    features, of its tokens between some blocks, and its logits where it has a classifier, on augmented crops. A fifth
    of the images is held out, and the weights with the best fidelity on them are kept: the result is never worse there
    than the adapted model, neither in the pooled feature nor in the patch map. Start it with ``accelerate launch`` to
    share the work among processes, and for mixed precision.

    Args:
        model: a live model, or what :func:`anypatch.load` takes. A live one is changed in place when all is done, and
            left as it was by whatever ends the run before.
        images: a folder of images, at any depth; a few hundred will do.
        patch_size: one patch size, to which the model is adapted, or a sequence of several, for which the model is
            tuned at its native geometry, so that ``adapt``, ``load`` and ``at`` give the tuned model at each. A
            rectangle is a pair within a sequence: ``[(16, 32)]``.
        image_size, keep, kernel, positions: as for :func:`anypatch.adapt`.
        minutes: how long, about; ten if neither this nor ``steps`` is given.
        steps: how many steps, instead.
        learning_rate: its highest value; ``"auto"`` tries several for some steps and takes each back, in a tenth
            of the run at most.
        lora: train adapters of this rank (by peft) in place of all weights, and merge them.
        output: a folder for the model in its library's format, a card, ``tune.json``, ``tune.csv``, ``report.html``,
            and the state that an interrupted run goes on from.
        batch_size: images per step, of all processes together.
        num_workers: processes that cut crops; chosen by the number of cores if not given.
        device: where to compute; an accelerator if there is one.
        seed: of everything that is drawn; nobody else's random numbers are touched.
        progress: called with (what, done, total); ``False`` for silence.
        precision: ``"no"``, ``"bf16"`` or ``"fp16"`` of the forward passes; accelerate's if not given.
        resume: go on from the state in ``output``, to the numbers of a run that was not interrupted.
        overwrite: replace the tuned model in ``output``.
        preprocess: instead of the model's own preprocessing.
        **host_kwargs: passed on to the host library's loader.

    Returns:
        The fidelity before and after at each patch size, and the model.

    Raises:
        GeometryError: a patch size that does not fit, or that leaves fewer than four tokens.
        DataError: fewer than 16 images that can be read, or no time for one step.
        UnsupportedModelError: a model that cannot be adapted, or whose features cannot be read.
        CheckpointError: another run's state; or ``output`` cannot be written, or holds a tuned model already.
    """
    folder = None if output is None else given(output, "output")
    asked = Asked(patch_size, image_size, keep, kernel, positions, minutes, steps, learning_rate, lora, batch_size,
                  seed, precision, folder, resume)  # fmt: skip
    asked.require()
    began = time.monotonic()
    team = Team(device)
    if folder is not None:
        team.lead(lambda: require_output(folder, resume, overwrite))
    source = model if isinstance(model, nn.Module) else str(model)
    user = source if isinstance(source, nn.Module) else load_model(source, host_kwargs.pop("arch", None), host_kwargs)
    subject = describe(user)
    targets = asked.targets(subject)
    for note in asked.pointless(subject.geometry) if team.leads else ():
        warnings.warn(note, AnypatchWarning, stacklevel=2)
    used = preprocess or preprocess_of(subject, source if isinstance(source, str) else None)
    opened = team.lead(lambda: split(images, seed, len(targets)))
    workers = decoding_workers(num_workers, team.size)
    with shown_progress(progress if team.leads else False) as shown:
        run = Run(asked, user, subject, targets, opened, used, team, workers, shown, began)
        result = run.result()
    if folder is not None:
        team.lead(lambda: _write(result, folder))
    return result


@dataclass
class Run:
    """One call of ``tune``, its arguments checked.

    Attributes:
        user: the model that was given.
        subject: its description.
        targets: the geometry at each patch size.
        workers: processes that cut crops.
        began: when the call began, of ``time.monotonic``.
    """

    asked: Asked
    user: nn.Module
    subject: Subject
    targets: dict[Size, Geometry]
    opened: Split
    preprocess: Preprocess
    team: Team
    workers: int
    progress: Progress
    began: float

    def __post_init__(self) -> None:
        self.native = self.subject.geometry
        self.notes = [
            *self.asked.pointless(self.native),
            *self.opened.notes,
            *([self.preprocess.note] if self.preprocess.note else []),
        ]
        self.precision = self.asked.precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"

    def result(self) -> TuneResult:
        """Train, choose, and only then change the user's model."""
        pair = self._pair()
        feed = Feed(self.opened.train, self.preprocess, self.asked.batch_size, self.asked.seed, self.workers,
                    self.team.rank, self.team.size)  # fmt: skip
        sizes = list(dict.fromkeys((pair.teacher.image_size, *(face.image_size for face in pair.faces.values()))))
        trainer = Trainer(pair, Batches(feed, sizes, pair.teach), self.team, self.progress, self.notes)
        trainer.freeze_unreached()
        start = kept(pair.student)
        key = {**self.asked.key(), "images": self.opened.train.fingerprint(), "weights": digest(pair.student)}
        checkpoint = Checkpoint(self.asked.output, key)
        maps, accuracies = pair.maps(SHOWN), self._accuracies(pair)
        state = self._state(trainer, checkpoint)
        trainer.run(state, checkpoint)
        failures = {number: why for found in self.team.gather(feed.failures) for number, why in found.items()}
        self.notes += left_out(self.opened.train, failures)
        before, after, share = trainer.choose(start, state.average)
        if not share:
            self.notes.append("nothing was gained on held-out images: the weights are those of the start")
        samples = self._samples(pair, [*maps, *pair.maps(SHOWN)[1:]])
        rows = [self._row(patch, before[patch], after[patch]) for patch in self.targets]
        for row, was, now in zip(rows, accuracies[1:], self._accuracies(pair)[1:], strict=False):
            row |= {"accuracy_before": was, "accuracy_after": now}
        settings = self._settings(state, share) | {"native_accuracy": accuracies[0] if accuracies else None}
        self._give(merged(pair.student))
        return TuneResult(self.user, rows, state.curve, settings, self.notes, samples)

    def _accuracies(self, pair: Pair) -> list[float]:
        """The teacher's accuracy and each face's as it is now; nothing where there are no labels."""
        why = missing(self.opened)
        if why is not None:
            self.notes += [why] if why and why not in self.notes else []
            return []

        def measured() -> list[float]:
            return [
                accuracy(f, self.opened, self.asked.batch_size, self.workers)
                for f in (pair.teacher, *pair.faces.values())
            ]

        return self.team.lead(measured)

    def _samples(self, pair: Pair, maps: list[list[torch.Tensor]]) -> list[Sample]:
        """Held-out images for the report, each with its maps in colours that all share."""
        pixels = pair.held_out[pair.teacher.image_size][0][:SHOWN].permute(0, 2, 3, 1)
        seen = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        colours = shared_colours(maps)
        names = self.opened.held_out.keys
        return [Sample(names[i], image.numpy(), [row[i] for row in colours]) for i, image in enumerate(seen)]

    def _pair(self) -> Pair:
        """The teacher, and a student of its own weights, both on this process's device."""
        device = self.team.device
        student = copied(unwrap(self.user)).to(device).float()
        _unfreeze(student)
        teacher_size = _teacher_size(self.user, self.native, self.asked.image_size)
        moved = self.user if _is_on(self.user, device) else copied(unwrap(self.user)).to(device)
        teacher = face(at(moved, None, teacher_size), self.preprocess, device, teacher_size)
        options: Any = {"keep": self.asked.keep, "kernel": self.asked.kernel, "positions": self.asked.positions}
        if not self.asked.several:
            adapt(student, next(iter(self.targets)), self.asked.image_size, **options)
        if self.asked.lora is not None:
            student = with_lora(student, describe(student), self.asked.lora, self.asked.seed)
        faces = {
            patch: face(
                at(student, patch, self.asked.image_size, **options) if self.asked.several else student,
                self.preprocess,
                device,
                target.image_size,
            )
            for patch, target in self.targets.items()
        }
        held_out: dict[tuple[int, int], list[torch.Tensor]] = {}
        failures: dict[int, str] = {}
        for size in {teacher.image_size, *(f.image_size for f in faces.values())}:
            held_out[size], failures = held_out_pixels(
                self.opened.held_out, self.preprocess, size, self.asked.batch_size, self.workers
            )
        self.notes += left_out(self.opened.held_out, failures)
        pair = Pair(teacher, student, faces, held_out, [], self.precision, device)
        if not held_out[teacher.image_size]:
            raise DataError("none of the held-out images can be read")
        try:
            with torch.no_grad(), pair.cast():
                pair.wanted += [teacher(batch) for batch in held_out[teacher.image_size]]
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:  # wants more than pixels
            name = type(unwrap(self.user)).__name__
            raise UnsupportedModelError(f"the features of {name} cannot be read from images alone: {error}") from error
        why = pair.find_inside()
        if why:
            self.notes.append(f"only outputs are compared, not tokens between blocks: {why}")
        return pair

    def _state(self, trainer: Trainer, checkpoint: Checkpoint) -> State:
        """Where the run begins: at a resumed state, or with a learning rate and a number of steps."""
        student = trainer.pair.student
        if self.asked.resume:
            found = self.team.lead(lambda: checkpoint.read(student))
            if found is not None:
                return found
            self.notes.append(f"{self.asked.output} holds no state to resume from: started anew")
        steps = self.asked.steps
        expected = steps if steps is not None else trainer.steps_within(self._left())
        if expected < 1:
            raise DataError(f"no time for one step: {max(self._left(), 0):.0f} s are left after two that were tried")
        rate, began = self.asked.learning_rate, time.monotonic()
        looked = trainer.begin()
        if rate == "auto":
            native = show(self.native.patch_size)
            lost = min([1 - found for patch, found in looked.items() if patch != native], default=0.0)
            peak = found_rate(trainer, expected, first_rate(lost, self.asked.lora is not None))
        else:
            peak = float(rate)
        if steps is None:
            share = 1 - (time.monotonic() - began) / max(self._left() + time.monotonic() - began, 1e-9)
            steps = min(self.team.gather(max(int(expected * share), 1)))
        return State(steps, peak, kept(student), curve=[(0, looked)])

    def _left(self) -> float:
        """Seconds of the minutes that were asked for."""
        return (self.asked.minutes or MINUTES) * 60 - (time.monotonic() - self.began)

    def _give(self, tuned: nn.Module) -> None:
        """The tuned weights into the user's model, adapted if there is one patch size."""
        asked = self.asked
        if not asked.several:
            adapt(self.user, next(iter(self.targets)), asked.image_size, keep=asked.keep, kernel=asked.kernel,
                  positions=asked.positions)  # fmt: skip
        given = dict(unwrap(self.user).named_parameters())
        with torch.no_grad():
            for name, value in unwrap(tuned).named_parameters():
                given[name].copy_(value)

    def _row(self, patch: Size, before: Fidelity, after: Fidelity) -> dict[str, Any]:
        target = self.targets[patch]
        assert target.grid is not None
        return {
            "patch_size": show(patch),
            "image_size": show(target.image_size),
            "tokens": math.prod(target.grid),
            "fidelity_before": before.pooled,
            "fidelity_after": after.pooled,
            "patch_fidelity_before": before.patches,
            "patch_fidelity_after": after.patches,
        }

    def _settings(self, state: State, share: float) -> dict[str, Any]:
        asked = self.asked
        return {
            "model": type(unwrap(self.user)).__name__,
            "native_patch_size": show(self.native.patch_size),
            "native_image_size": show(self.native.image_size),
            "images": len(self.opened.train),
            "held_out_images": len(self.opened.held_out),
            "steps": state.steps,
            "batch_size": asked.batch_size,
            "learning_rate": state.peak,
            "lora": asked.lora,
            "kernel": asked.kernel if isinstance(asked.kernel, str) else repr(asked.kernel),
            "positions": asked.positions,
            "precision": self.precision,
            "seed": asked.seed,
            "share": share,
            "processes": self.team.size,
            "device": str(self.team.device),
            "seconds": round(time.monotonic() - self.began, 1),
        }


def _write(result: TuneResult, output: Path) -> None:
    """The model in its library's format, the cards, the report; the state goes."""
    from anypatch.sources import save

    save(result.model, output)
    with replacing_file(output / TUNING) as file:
        file.write(result.card().encode())
    patches = ", ".join(row["patch_size"] for row in result.rows)
    link_tuning(output, f"{result.settings['model']}, tuned for patch {patches}")
    result.save(output)
    Checkpoint(output, {}).remove()


def _teacher_size(model: nn.Module, native: Geometry, image_size: ImageSizeLike | None) -> Any:
    """The image size of the teacher: the one asked for, at the nearest that the native patch divides."""
    if image_size is None:
        return None
    with contextlib.suppress(GeometryError):
        make_plan(model, None, image_size)
        return image_size if native.image_size else as_size(image_size, len(native.patch_size), "image_size", None)
    if isinstance(image_size, str):
        return image_size
    sides = as_size(image_size, len(native.patch_size), "image_size", native.image_size)[-2:]
    return tuple(max(round(s / p), 1) * p for s, p in zip(sides, native.patch_size[-2:], strict=True))


def _unfreeze(model: nn.Module) -> None:
    """A model that is wholly frozen, as for inference, is trained whole; else who froze a part meant it."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    if not any(p.requires_grad for p in parameters):
        for parameter in parameters:
            parameter.requires_grad_(True)


def _is_on(model: nn.Module, device: torch.device) -> bool:
    return all(p.device.type == device.type for p in model.parameters())
