"""Compare patch sizes: what each costs, and how much of the native model it keeps."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from anypatch.adaptation import describe
from anypatch.core.geometry import ImageSizeLike, Keep, SizeLike
from anypatch.core.tables import PositionsLike
from anypatch.core.twins import Subject
from anypatch.errors import AnypatchError, DataError
from anypatch.files.paths import place, require_folder
from anypatch.hosts.images import Preprocess
from anypatch.measure.cache import Cache, default_folder, write_whole
from anypatch.measure.class_names import read_class_names
from anypatch.measure.decoding import unreadable
from anypatch.measure.extraction import Extractor
from anypatch.measure.job import Job
from anypatch.measure.loading import load_model, randomness
from anypatch.measure.notes import Notes
from anypatch.measure.options import Options
from anypatch.measure.preprocess import preprocess_of
from anypatch.measure.processes import Team
from anypatch.measure.rows import Collections, SweepResult, row_of
from anypatch.measure.targets import Asked, Reference, targets_of
from anypatch.measure.zeroshot import head_columns, text_features
from anypatch.report.progress import Progress, shown_progress

__all__ = ["SweepResult", "sweep"]


def sweep(
    source: str | Path | nn.Module,
    patch_sizes: int | Sequence[SizeLike],
    *,
    image_size: ImageSizeLike | None = None,
    keep: Keep = "image",
    data: Any = None,
    images: str | Path | None = None,
    output: str | Path | None = None,
    class_names: Any = None,
    batch_size: int = 32,
    num_workers: int | None = None,
    kernel: Any = "wiener",
    positions: PositionsLike = "antialias",
    reference: Reference = "asked",
    arch: str | None = None,
    limit: int | None = None,
    progress: Progress | bool | None = None,
    cache: str | Path | bool = True,
    device: str | torch.device | None = None,
    preprocess: Preprocess | None = None,
    samples: int = 4,
    reproduce: str | None = None,
    **host_kwargs: Any,
) -> SweepResult:
    """Measure a model at several patch sizes, on your images. The model itself is left as it is.

    Args:
        source: what :func:`anypatch.load` takes, or a live model.
        patch_sizes: the patch sizes to compare.
        image_size, keep, kernel, positions: as in :func:`anypatch.adapt`, the same for every patch size.
        data: labelled images: a folder ``train/CLASS/*`` and ``val/CLASS/*``, or ``CLASS/*``; a Hugging Face
            dataset, its name or its directory. A folder without classes counts as ``images``.
        images: a folder of images without labels; fidelity is measured on these if they are given.
        output: a folder for ``sweep.json``, ``sweep.csv`` and ``report.html``.
        class_names: for CLIP models, the classes in words, for zero-shot accuracy: a file, a list, or an object
            from class to name.
        batch_size: images per forward pass, in timing too.
        num_workers: processes that decode images; chosen by the number of cores if not given.
        reference: what fidelity is measured against: ``"asked"``, the native patch at ``image_size`` (at the nearest
            size that it divides, if need be); ``"native"``, the model as it is. The same without ``image_size``.
        arch: for checkpoint files, as in :func:`anypatch.load`.
        limit: at most so many images per split.
        progress: called with (what, done, total); ``False`` for silence. Without it: a bar in a terminal or a
            notebook, a line every ten seconds anywhere else.
        cache: a folder for features; ``True`` for the user's cache folder, ``False`` for none. Time is never cached.
        device: where to compute; an accelerator if there is one.
        preprocess: instead of the model's own preprocessing.
        samples: how many images the report shows.
        reproduce: a command that the report shows; without it, the Python call.
        **host_kwargs: passed on to the host library's loader.

    Returns:
        One row per patch size: tokens, operations, images per second with its quartiles (timed in this run, the patch
        sizes taking turns), memory, fidelity and accuracy.

    Raises:
        GeometryError: sizes that do not fit, all of them in one message.
        DataError: no images, one class only, class names that do not match.
        UnsupportedModelError: a model that cannot be adapted, or whose features cannot be read.

    Examples:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=2)
        >>> result = sweep(vit, [16, 32], batch_size=1, progress=False)
        >>> [row["tokens"] for row in result.rows]
        [196, 49]
    """
    asked = Asked(patch_sizes, image_size, keep, kernel, positions, reference)
    options = Options(
        source=source if isinstance(source, nn.Module) else str(source),
        asked=asked,
        data=data,
        images=images,
        output=output,
        class_names=class_names,
        batch_size=batch_size,
        num_workers=num_workers,
        arch=arch,
        limit=limit,
        progress=progress,
        cache=cache,
        device=device,
        preprocess=preprocess,
        samples=samples,
        reproduce=reproduce,
        host_kwargs=host_kwargs,
    )
    options.require()
    team = Team(device)
    with _writable(output, team), shown_progress(progress if team.leads else False) as shown:
        return _run(options, team, shown)


def _run(options: Options, team: Team, progress: Progress) -> SweepResult:
    """The sweep, its arguments checked."""
    collections = options.collections()
    subject = describe(load_model(options.source, options.arch, options.host_kwargs))
    targets = targets_of(subject, options.asked)
    notes = Notes(collections)
    preprocess = options.preprocess or preprocess_of(subject, options.origin)
    head = _head(subject, collections, notes)
    texts = _texts(subject, options, collections)
    for note in (randomness(options.host_kwargs), targets.note, preprocess.note):
        notes.add(note)
    if not collections.sets:
        notes.add("no images were given: only costs were measured")
    for name, members in collections.sets.items():
        notes.skipped(name, members, team.lead(functools.partial(unreadable, members)))
    cache = options.cache
    folder = None if cache is False else default_folder() if cache is True else place(cache)
    extractor = Extractor(preprocess, int(options.batch_size), options.workers(team), team, Cache(folder))
    job = Job(subject, options.asked, targets, collections, head is not None, extractor, progress)
    measured = job.run()

    def conclude() -> SweepResult:
        for name, members in collections.sets.items():
            notes.skipped(name, members, measured[0].sets[name].failures)
        rows = [row_of(m, measured[0], collections, head, texts) for m in measured]
        settings = job.settings(options)
        result = SweepResult(rows[1:], rows[0], settings, notes.all, job.samples(measured, options.samples))
        if options.output is not None:
            result.save(options.output)
        return result

    return team.lead(conclude)


def _head(subject: Subject, collections: Collections, notes: Notes) -> list[int] | None:
    if not collections.labelled:
        return None
    columns, note = head_columns(subject, collections.sets["test"].classes)
    notes.add(note)
    return columns


def _texts(subject: Subject, options: Options, collections: Collections) -> NDArray | None:
    if options.class_names is None:
        return None
    if not collections.labelled:
        raise DataError("class names are for labelled data: give data with classes")
    words = read_class_names(options.class_names, collections.sets["test"].classes)
    return text_features(subject, words, options.origin)


@contextlib.contextmanager
def _writable(folder: str | Path | None, team: Team) -> Iterator[None]:
    """Whether a folder can be written, found out before the work; it goes again if it was made here and stays empty.

    Raises:
        AnypatchError: it cannot.
    """
    if folder is None or not team.leads:
        yield
        return
    target = place(folder)
    require_folder(target)
    made = [above for above in (target, *target.parents) if not above.exists()]
    try:
        try:
            write_whole(target / ".anypatch", b"")
            (target / ".anypatch").unlink(missing_ok=True)
        except OSError as error:
            raise AnypatchError(f"cannot write to {folder}: {error.strerror or error}") from error
        yield
    except BaseException:
        for above in made:
            with contextlib.suppress(OSError):  # something was written
                above.rmdir()
        raise
