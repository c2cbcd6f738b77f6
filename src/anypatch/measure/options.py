"""The arguments of a sweep as one typed object, checked before any work."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anypatch.errors import AnypatchError, DataError
from anypatch.hosts.images import Preprocess
from anypatch.measure.opening import labelled, unlabelled
from anypatch.measure.processes import Team, decoding_workers, require_number
from anypatch.measure.rows import Collections
from anypatch.measure.targets import Asked
from anypatch.report.progress import Progress


@dataclass(frozen=True)
class Options:
    """What :func:`anypatch.sweep` was asked for; see there."""

    source: str | nn.Module
    asked: Asked
    data: Any = None
    images: str | Path | None = None
    output: str | Path | None = None
    class_names: Any = None
    batch_size: int = 32
    num_workers: int | None = None
    arch: str | None = None
    limit: int | None = None
    progress: Progress | bool | None = None
    cache: str | Path | bool = True
    device: str | torch.device | None = None
    preprocess: Preprocess | None = None
    samples: int = 4
    reproduce: str | None = None
    host_kwargs: dict[str, Any] = field(default_factory=dict)

    def require(self) -> None:
        """Say what is wrong, or missing, before any work.

        Raises:
            AnypatchError: a number out of range, or a package that is not installed.
        """
        needed = {"PIL": "pillow", "jinja2": "jinja2", "platformdirs": "platformdirs"}
        if self.data is not None:
            needed |= {"sklearn": "scikit-learn", "scipy": "scipy"}
        missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
        if missing:
            raise AnypatchError(f"a sweep needs {' and '.join(missing)}: pip install 'anypatch[sweep]'")
        require_number(self.batch_size, "batch_size")
        if self.limit is not None:
            require_number(self.limit, "limit")
        if self.num_workers is not None:
            require_number(self.num_workers, "num_workers", 0)

    @property
    def origin(self) -> str | None:
        """Where the model was loaded from."""
        return self.source if isinstance(self.source, str) else None

    def collections(self) -> Collections:
        """The images, opened.

        Raises:
            DataError: none are there, or labels and no labels are mixed.
        """
        if self.data is None:
            if self.images is None:
                return Collections({}, "", [])
            return Collections({"images": unlabelled(self.images, self.limit).test}, "images", [])
        opened = labelled(self.data, self.limit)
        notes = list(opened.warnings)
        if opened.train is None:
            if self.images is not None:
                raise DataError(f"{opened.test.name} has no labels: give either data or images, not both")
            notes.append(f"{opened.test.name} has no class folders: accuracy is not measured")
            return Collections({"images": opened.test}, "images", notes)
        sets = {"train": opened.train, "test": opened.test}
        if self.images is None:
            return Collections(sets, "test", notes)
        return Collections({**sets, "images": unlabelled(self.images, self.limit).test}, "images", notes)

    def workers(self, team: Team) -> int:
        """Processes that decode."""
        return decoding_workers(self.num_workers, team.size)

    def call(self) -> str:
        """The Python call that gives this result."""
        asked = self.asked
        options = {"image_size": asked.image_size, "data": self.data, "images": self.images, "limit": self.limit}
        usual = Asked(asked.patch_sizes)
        for name in ("keep", "kernel", "positions", "reference"):
            if getattr(asked, name) != getattr(usual, name):
                options[name] = getattr(asked, name)
        simple = (int, str, tuple, list)
        used = {k: v if isinstance(v, simple) else str(v) for k, v in options.items() if v is not None}
        used |= {k: v for k, v in self.host_kwargs.items() if isinstance(v, (*simple, bool))}
        more = "".join(f", {k}={v!r}" for k, v in used.items())
        sizes = asked.patch_sizes if isinstance(asked.patch_sizes, int) else list(asked.patch_sizes)
        shown = repr(self.source) if isinstance(self.source, str) else "model"
        return f"anypatch.sweep({shown}, {sizes!r}{more})"
