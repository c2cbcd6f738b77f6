"""Features of image sets at one geometry: in shards, each cached as soon as it is whole, shared among processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anypatch.hosts.images import Preprocess
from anypatch.measure.cache import REASON, Cache, Expected, key_of
from anypatch.measure.decoding import Batch, decode
from anypatch.measure.features import Reader, dtype_of
from anypatch.measure.images import ImageSet
from anypatch.measure.processes import Team

SHARD = 64  # images per cache file: what an interruption can cost
LONGEST = REASON // 8  # characters of a reason: escaped in JSON twice they stay within the cache's room for it
Shard = tuple[dict[str, Tensor], dict[str, str]]
Shapes = dict[str, tuple[int, ...]]  # of one image's features, by name


@dataclass
class Extracted:
    """Features of one image set at one geometry, unreadable images left out.

    Attributes:
        pooled: (n, c). logits: (n, classes), or ``None``.
        patches: for the images whose patch features were kept, (h, w, c).
        indices: which images the rows are.
        failures: for each image that could not be read, why.
    """

    pooled: NDArray[np.float32]
    logits: NDArray[np.float32] | None
    patches: dict[int, Tensor]
    indices: list[int]
    failures: dict[int, str]


@dataclass(frozen=True)
class Work:
    """One image set at one geometry.

    Attributes:
        images: the set.
        size: (height, width) of what the model sees.
        kept: the images whose patch features are kept.
        head: whether logits are kept.
        shapes: of one image's features, as a pass of the model has shown them.
        key: everything that the features depend on besides the images, as plain values.
    """

    images: ImageSet
    size: tuple[int, int]
    kept: frozenset[int]
    head: bool
    shapes: Shapes
    key: dict[str, Any]


@dataclass
class Extractor:
    """What computes features; the same for every geometry.

    Attributes:
        tick: called with a count of images that are done.
    """

    preprocess: Preprocess
    batch_size: int
    workers: int
    team: Team
    cache: Cache
    tick: Callable[[int], None] = field(default=lambda count: None)

    @property
    def shard(self) -> int:
        """Images per shard: whole batches."""
        return max(SHARD // self.batch_size, 1) * self.batch_size

    def extract(self, reader: Callable[[], Reader], work: Work) -> Extracted:
        """Each process computes its shards, or finds them in the cache; then everyone has all.

        Args:
            reader: makes the model, if it is needed.
            work: what to compute.
        """
        key = self._key(work)
        starts = range(0, len(work.images), self.shard)
        mine = [start for place, start in enumerate(starts) if place % self.team.size == self.team.rank]
        found: dict[int, Shard] = {}
        for start in mine:
            known = self._known(key, start, work)
            if known is not None:
                found[start] = known
                self.tick((self._stop(start, work) - start) * self.team.size)
        missing = [start for start in mine if start not in found]
        if missing:
            for start, shard in self._compute(reader(), missing, work):
                found[start] = shard
                self.cache.store(key, self._name(start, work), *shard)
        shards: dict[int, Shard] = {}
        for part in self.team.gather(found):
            shards.update(part)
        return _joined([shards[start] for start in starts])

    def _key(self, work: Work) -> str:
        return key_of(
            {
                **work.key,
                "images": work.images.fingerprint(),
                "patches": sorted(work.kept),
                "head": work.head,
            }
        )

    def _stop(self, start: int, work: Work) -> int:
        return min(start + self.shard, len(work.images))

    def _name(self, start: int, work: Work) -> str:
        return f"{start}-{self._stop(start, work)}"

    def _known(self, key: str, start: int, work: Work) -> Shard | None:
        """A shard from the cache, if it speaks of exactly its images."""
        stop = self._stop(start, work)
        images = range(start, stop)
        kept = work.kept & set(images)
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"indices": (torch.int64, (len(images),))}
        tensors["pooled"] = (torch.float32, (len(images), *work.shapes["pooled"]))
        if work.head and "logits" in work.shapes:
            tensors["logits"] = (torch.float32, (len(images), *work.shapes["logits"]))
        if kept:
            tensors["patches"] = (torch.float16, (len(kept), *work.shapes["patches"]))
            tensors["patch_indices"] = (torch.int64, (len(kept),))
        found = self.cache.load(key, self._name(start, work), Expected(tensors, len(images)))
        return found if found is not None and _is_whole(found, set(images), kept, tensors.keys()) else None

    def _compute(self, reader: Reader, missing: Sequence[int], work: Work) -> Iterator[tuple[int, Shard]]:
        """Run the model over the missing shards while workers decode ahead."""
        owners, batches = [], []
        for start in missing:
            stop = self._stop(start, work)
            for first in range(start, stop, self.batch_size):
                owners.append(start)
                batches.append(range(first, min(first + self.batch_size, stop)))
        pin = self.team.device.type == "cuda"
        decoded = decode(work.images, self.preprocess, work.size, batches, self.workers, pin)
        parts: list[dict[str, Any]] = []
        for place, batch in enumerate(decoded):
            parts.append(self._features(reader, batch, work))
            self.tick(len(batches[place]) * self.team.size)
            if place + 1 == len(owners) or owners[place + 1] != owners[place]:
                yield owners[place], _packed(parts)
                parts = []

    def _features(self, reader: Reader, batch: Batch, work: Work) -> dict[str, Any]:
        """What is kept of one batch."""
        part: dict[str, Any] = {"indices": batch.indices, "failures": batch.failures}
        if not batch.indices:
            return part
        pixels = self.preprocess.normalise(batch.pixels.to(self.team.device, non_blocking=True))
        features = reader(pixels.to(dtype_of(reader.model)))
        part["pooled"] = features.pooled.float().cpu()
        if work.head and features.logits is not None:
            part["logits"] = features.logits.float().cpu()
        wanted = [(row, index) for row, index in enumerate(batch.indices) if index in work.kept]
        if wanted:
            rows = torch.tensor([row for row, _ in wanted], device=features.patches.device)
            part["patches"] = features.patches[rows].cpu().to(torch.float16)
            part["patch_indices"] = [index for _, index in wanted]
        return part


def _is_whole(shard: Shard, images: set[int], kept: frozenset[int], names: Any) -> bool:
    """Whether a shard says of each of its images either features or why there are none."""
    tensors, text = shard
    try:
        failures = {int(i) for i in json.loads(text["failures"])}
    except (KeyError, ValueError, TypeError):
        return False
    indices = tensors["indices"].tolist() if "indices" in tensors else []
    if sorted(indices) != sorted(images - failures) or not failures <= images:
        return False
    read = set(indices)
    lengths = {"indices": len(read), "pooled": len(read), "logits": len(read)}
    lengths |= dict.fromkeys(("patches", "patch_indices"), len(kept & read))
    if any(len(tensors.get(name, ())) != lengths[name] for name in names):
        return False
    return "patch_indices" not in tensors or set(tensors["patch_indices"].tolist()) == kept & read


def _packed(parts: Sequence[dict[str, Any]]) -> Shard:
    """One shard as tensors and text."""
    indices = [i for p in parts for i in p["indices"]]
    failures = {str(i): why[:LONGEST] for p in parts for i, why in p["failures"].items()}
    tensors = {"indices": torch.tensor(indices, dtype=torch.int64)}
    for name in ("pooled", "logits", "patches"):
        found = [p[name] for p in parts if name in p]
        if found:
            tensors[name] = torch.cat(found).contiguous()
    if "patches" in tensors:
        tensors["patch_indices"] = torch.tensor([i for p in parts for i in p.get("patch_indices", ())])
    return tensors, {"failures": json.dumps(failures)}


def _joined(shards: Sequence[Shard]) -> Extracted:
    def together(name: str) -> NDArray[np.float32] | None:
        found = [tensors[name] for tensors, _ in shards if name in tensors]
        return torch.cat(found).numpy() if found else None

    pooled = together("pooled")
    patches: dict[int, Tensor] = {}
    failures: dict[int, str] = {}
    for tensors, text in shards:
        if "patches" in tensors:
            patches.update(zip(tensors["patch_indices"].tolist(), tensors["patches"], strict=True))
        failures.update({int(i): why for i, why in json.loads(text["failures"]).items()})
    return Extracted(
        np.zeros((0, 1), np.float32) if pooled is None else pooled,
        together("logits"),
        patches,
        torch.cat([tensors["indices"] for tensors, _ in shards]).tolist(),
        failures,
    )
