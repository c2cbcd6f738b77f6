"""Numbers written in people's code, as two runs of it show them: where the geometry changes, they stay."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from anypatch.core.geometry import Geometry, Size, show
from anypatch.core.traces import Cut, Reshaped, Site, Trace, Windows
from anypatch.hosts.structural.following import TELLING, counts

# Packages whose code speaks for itself: their hosts' twins do.
KNOWN = {"torch", "peft", "timm", "transformers", "open_clip", "torchvision", "diffusers", "accelerate"}
Shown = TypeVar("Shown", Cut, Windows, Reshaped)


def written_number(before: Trace, after: Trace, old: Geometry, new: Geometry) -> str | None:
    """What a run at another geometry takes apart as the present one has it, for a message; ``None`` if nothing."""
    found = itertools.chain(
        _cuts(_own(before.cuts), _own(after.cuts), old),
        _windows(_own(before.windows), _own(after.windows), old, new),
        _layouts(_own(before.reshaped), _own(after.reshaped), old, new),
    )
    return next(found, None)


def _own(shown: Sequence[Shown]) -> list[Shown]:
    return [each for each in shown if each.site.module.partition(".")[0] not in KNOWN]


def _cuts(before: list[Cut], after: list[Cut], old: Geometry) -> Iterator[str]:
    """All tokens, all rows or the whole image were taken by their number, and the same number is no longer all."""
    sides = {*counts(old), *(old.grid or ())[-2:], *(old.image_size or ())[-2:]}
    earlier = _by_key(before)
    for key, cuts in _by_key(after).items():
        for was, now in zip(earlier.get(key, []), cuts, strict=False):
            if was.kept in sides and was.kept > TELLING and (was.before, was.after) != (now.before, now.after):
                length = now.before + now.kept + now.after
                yield _told(now.site, f"takes {now.kept} of {length}, where it takes all now")


def _by_key(cuts: Iterable[Cut]) -> dict[tuple[Any, ...], list[Cut]]:
    found: dict[tuple[Any, ...], list[Cut]] = defaultdict(list)
    for cut in cuts:
        found[cut.asked, cut.site].append(cut)
    return found


def _windows(before: list[Windows], after: list[Windows], old: Geometry, new: Geometry) -> Iterator[str]:
    """The image was cut into windows of the present patch, and is still."""
    for windows in after:
        size = windows.size
        if not _is_patch(size, windows.sides, old, new, new) or min(size) < TELLING:
            continue
        if any(b.site == windows.site and b.size == size and _is_patch(size, b.sides, old, new, old) for b in before):
            yield _told(windows.site, f"cuts the image into windows of {show(size)}")


def _is_patch(size: Size, sides: Size, old: Geometry, new: Geometry, at: Geometry) -> bool:
    """Whether windows are as large as the old patch and not as the new, on an image of a geometry."""
    image = at.image_size
    if image is None or len(size) not in (1, 2):
        return False
    axes = (-2, -1) if len(size) == 2 else (-2,) if sides[0] == image[-2] else (-1,)
    here, there = (tuple(g.patch_size[a] for a in axes) for g in (old, new))
    return size == here != there and tuple(sides) == tuple(image[a] for a in axes)


def _layouts(before: list[Reshaped], after: list[Reshaped], old: Geometry, new: Geometry) -> Iterator[str]:
    """Tokens were laid out on the present grid, the image into the present patches, and are still."""
    if old.grid is None or new.grid is None or old.image_size is None or new.image_size is None:
        return
    sites = {r.site for r in before if _lays_out(r, old, old) or _patchifies(r, old, old)}
    for reshaped in after:
        if reshaped.site not in sites:
            continue
        if old.grid[-2:] != new.grid[-2:] and _lays_out(reshaped, old, new):
            yield _told(reshaped.site, f"lays {reshaped.before} out on the grid of {show(old.grid[-2:])}")
        if old.patch_size[-2:] != new.patch_size[-2:] and _patchifies(reshaped, old, new):
            yield _told(reshaped.site, f"cuts the image into patches of {show(old.patch_size[-2:])}")


def _lays_out(reshaped: Reshaped, grid: Geometry, at: Geometry) -> bool:
    """Whether an axis of the tokens of one geometry becomes the two axes of another's grid."""
    sides = (grid.grid or ())[-2:]
    tokens = counts(at)[0]
    if min(sides) < TELLING or tokens not in reshaped.before or tokens in reshaped.after:
        return False
    if reshaped.after[0] == reshaped.before[0] * tokens:  # each on its own
        return False
    return any(reshaped.after[i : i + 2] == sides for i in range(len(reshaped.after) - 1))


def _patchifies(reshaped: Reshaped, patch: Geometry, at: Geometry) -> bool:
    """Whether the two axes of the image of one geometry become those of patches of another's size."""
    (p, q), (height, width) = patch.patch_size[-2:], (at.image_size or (0, 0))[-2:]
    if min(p, q) < TELLING or not any(
        reshaped.before[i : i + 2] == (height, width) for i in range(len(reshaped.before) - 1)
    ):
        return False
    cut = (height // p, p, width // q, q)
    return any(reshaped.after[i : i + 4] == cut for i in range(len(reshaped.after) - 3))


def _told(site: Site, what: str) -> str:
    return f"{site.function} (line {site.line} of {site.module}) {what}"
