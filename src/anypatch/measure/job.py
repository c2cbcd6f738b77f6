"""A sweep's work: models at every geometry side by side, timed in turns, then their features."""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from anypatch import __version__
from anypatch.adaptation import describe
from anypatch.core.geometry import Geometry
from anypatch.core.shells import copied
from anypatch.core.twins import Subject
from anypatch.hosts import library
from anypatch.measure.accuracy import neighbours
from anypatch.measure.cost import Cost, machine, measure_cost, take_turns
from anypatch.measure.extraction import Extractor, Work
from anypatch.measure.features import Reader, at_geometry, dtype_of
from anypatch.measure.fingerprint import fingerprint, surroundings, versions
from anypatch.measure.loading import title
from anypatch.measure.options import Options
from anypatch.measure.rows import Collections, Measured, side
from anypatch.measure.targets import Asked, Targets, show_side
from anypatch.report.colours import shared_colours
from anypatch.report.measurements import Sample
from anypatch.report.progress import Progress

PATCH_IMAGES = 32  # images whose patch features are kept: the mean cosine holds to two digits, at megabytes per size
CACHE_FORMAT = 2  # goes up when what is stored, or how images are read, changes between two versions


@dataclass
class Job:
    """Everything that stays the same from one patch size to the next."""

    subject: Subject
    asked: Asked
    targets: Targets
    collections: Collections
    head: bool
    extractor: Extractor
    progress: Progress

    def __post_init__(self) -> None:
        self.sets, self.watched = self.collections.sets, self.collections.watched
        self.team = self.extractor.team
        self.dtype = dtype_of(self.subject.model)
        self.base = on_device(self.subject, self.team.device)
        count = len(self.sets[self.watched]) if self.watched else 0
        chosen = np.linspace(0, count - 1, min(PATCH_IMAGES, count)).round().astype(int)
        self.kept = frozenset(chosen.tolist())
        self.readers: dict[Geometry, Reader] = {}
        self.timed = ""

    def run(self) -> list[Measured]:
        """The reference first, then each target. What any of them costs is measured before the long part."""
        every = [self.targets.reference, *self.targets.targets]
        distinct = list(dict.fromkeys(every))
        # Before the features: a fingerprint of each model, which tells whether cached features are its own.
        known, self.timed = self.team.lead(lambda: self._costs(distinct))
        total = len(distinct) * sum(len(s) for s in self.sets.values())
        done = 0
        found = {}
        for target in distinct:
            mark, cost = known[target]
            sets = {}
            for name in self.sets:

                def tick(count: int, what: str = f"patch {show_side(target.patch_size)}, {name}") -> None:
                    nonlocal done
                    done = min(done + count, total)
                    self.progress(what, done, total)

                self.extractor.tick = tick
                work = self._work(name, target, cost, mark)
                sets[name] = self.extractor.extract(functools.partial(self._reader, target), work)
            self.readers.pop(target, None)
            found[target] = Measured(target, cost.columns(), sets)
        return [found[target] for target in every]

    def _costs(self, distinct: Sequence[Geometry]) -> tuple[dict[Geometry, tuple[str, Cost]], str]:
        """A fingerprint of the model at each geometry, and what it costs; all of them stand side by side."""
        found = {}
        turns = []
        for place, target in enumerate(distinct):
            self.progress(f"preparing patch {show_side(target.patch_size)}", place, len(distinct))
            reader = self._reader(target)
            mark = fingerprint(reader.model)
            pixels = self._batch(target)
            found[target] = mark, measure_cost(reader, pixels)
            turns.append((reader, pixels, found[target][1]))
        take_turns(turns, lambda done, total: self.progress("timing the patch sizes in turns", done, total))
        return found, time.strftime("%Y-%m-%d %H:%M")

    def _reader(self, target: Geometry) -> Reader:
        """The model at a geometry, on the device; made once."""
        if target not in self.readers:
            self.readers[target] = Reader(at_geometry(self.base, target, self.asked.kernel, self.asked.positions))
        return self.readers[target]

    def _batch(self, target: Geometry) -> torch.Tensor:
        assert target.image_size is not None
        shape = (self.extractor.batch_size, self.extractor.preprocess.channels, *target.image_size)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(shape, generator=generator, dtype=torch.float32)
        return pixels.to(self.team.device, self.dtype)

    def _work(self, name: str, target: Geometry, cost: Cost, mark: str) -> Work:
        """One image set at one geometry, with all that its features depend on."""
        assert target.image_size is not None
        native = self.targets.native
        changed = (target.patch_size, target.image_size) != (native.patch_size, native.image_size)
        host = library(native.library)
        key = {
            "format": CACHE_FORMAT,
            "model": mark,
            "patch": target.patch_size,
            "image": target.image_size,
            "resized": (fingerprint(self.asked.kernel), self.asked.positions) if changed else None,
            "dtype": str(self.dtype),
            "preprocess": fingerprint(replace(self.extractor.preprocess, note="")),
            "surroundings": surroundings(self.team.device),
            "versions": {"anypatch": __version__, "torch": torch.__version__, native.library: host.version}
            | versions("numpy", "pillow"),
        }
        size = (target.image_size[0], target.image_size[1])
        kept = self.kept if name == self.watched else frozenset()
        return Work(self.sets[name], size, kept, self.head, cost.shapes, key)

    def samples(self, measured: Sequence[Measured], count: int) -> list[Sample]:
        """Pictures for the report: what the model sees at each patch size, never larger than that."""
        targets = measured[1:]
        if not self.watched or not targets:
            return []
        patches = [m.sets[self.watched].patches for m in targets]
        common = sorted(set.intersection(*(set(p) for p in patches)))
        if not common or count < 1:
            return []
        places = np.linspace(0, len(common) - 1, min(count, len(common))).round().astype(int)
        chosen = [common[i] for i in places.tolist()]
        colours = shared_colours([[p[i].float() for i in chosen] for p in patches])
        images = self.sets[self.watched]
        found = []
        for place, index in enumerate(chosen):
            image = images.load(index)
            sizes = [m.geometry.image_size or () for m in targets]
            seen = {s: np.array(self.extractor.preprocess.view(image, (s[0], s[1]))) for s in dict.fromkeys(sizes)}
            views = [seen[s] for s in sizes] if len(seen) > 1 else []
            found.append(Sample(images.keys[index], seen[sizes[0]], [line[place] for line in colours], views))
        return found

    def settings(self, options: Options) -> dict[str, Any]:
        """What was measured, on what, and how; all of it plain values."""
        native, asked, extractor = self.targets.native, self.asked, self.extractor
        host = library(native.library)
        device = self.team.device
        sets = {
            part: {"name": images.name, "images": len(images), "classes": len(images.classes)}
            for part, images in self.sets.items()
        }
        return {
            "model": title(options.source),
            "library": native.library,
            "native": {"patch_size": side(native.patch_size), "image_size": side(native.image_size or ())},
            "reference": self.targets.describe(),
            "keep": asked.keep,
            "kernel": asked.kernel if isinstance(asked.kernel, str) else type(asked.kernel).__name__,
            "positions": asked.positions,
            "data": sets,
            "fidelity_on": self.watched or None,
            "patch_fidelity_images": len(self.kept),
            "neighbours": neighbours(len(self.sets[self.watched])) if self.watched else None,
            "preprocess": extractor.preprocess.describe(),
            "batch_size": extractor.batch_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": machine(device),
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "processes": self.team.size,
            "timed": self.timed,
            "versions": {
                "anypatch": __version__,
                "torch": torch.__version__,
                **({native.library: host.version} if host.version else {}),
                "python": platform.python_version(),
            },
            "reproduce": options.reproduce or options.call(),
        }


def on_device(subject: Subject, device: torch.device) -> Subject:
    """The model on a device: itself if it is there, else a copy."""
    place = torch.empty(0, device=device).device  # with its number
    model = subject.model
    if all(tensor.device == place for tensor in (*model.parameters(), *model.buffers())):
        return subject
    return describe(copied(model).to(place))
