"""Numbers written in people's code, as two runs of it show them: where the geometry changes, they stay."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from anypatch.core.geometry import Geometry, Size, show
from anypatch.core.traces import Averaged, Cut, Reshaped, Site, Trace, Windows
from anypatch.hosts.structural.following import TELLING, counts

# Packages whose code speaks for itself: their hosts' twins do.
KNOWN = {"torch", "peft", "timm", "transformers", "open_clip", "torchvision", "diffusers", "accelerate"}
Shown = TypeVar("Shown", Cut, Windows, Reshaped, Averaged)


def written_number(before: Trace, after: Trace, old: Geometry, new: Geometry) -> str | None:
    """What a run at another geometry takes apart as the present one has it, for a message; ``None`` if nothing."""
    found = itertools.chain(
        _cuts(_own(before.cuts), _own(after.cuts), old, new),
        _windows(_own(before.windows), _own(after.windows), old, new),
        _layouts(_own(before.reshaped), _own(after.reshaped), old, new),
        _averages(_own(before.averaged), _own(after.averaged), old, new),
    )
    return next(found, None)


def _own(shown: Sequence[Shown]) -> list[Shown]:
    return [each for each in shown if each.site.module.partition(".")[0] not in KNOWN]


def _cuts(before: list[Cut], after: list[Cut], old: Geometry, new: Geometry) -> Iterator[str]:
    """All tokens, all rows or the whole image were taken by their number, and the same number is no longer all."""
    earlier = _by_axis(before)
    for (site, length), cuts in _by_axis(after).items():
        for (place, present), same in earlier.items():
            if place != site or not {cut.asked for cut in same} & {cut.asked for cut in cuts}:
                continue
            was, now = _taken(same, present), _taken(cuts, length)
            if _is_all(was, present, length, old, new) and (was.before, was.after) != (now.before, now.after):
                yield _told(site, f"takes {now.kept} of {length}, where it takes all now")
            elif _is_all(was, present, length, old, new) and _are_gone(same, cuts):
                yield _told(site, f"takes parts of {present}, of which some would be empty of {length}")
            elif _is_last(same, present, old) and (now.kept, now.after) != (1, 0):
                yield _told(site, f"takes place {was.before} of {length}, where it takes the last now")
            elif _is_inner(same, present, length, old, new) and now.before == was.before:
                yield _told(site, f"takes place {was.before} of {length}, another patch than of {present}")


def _by_axis(cuts: Iterable[Cut]) -> dict[tuple[Site, int], list[Cut]]:
    found: dict[tuple[Site, int], list[Cut]] = defaultdict(list)
    for cut in cuts:
        found[cut.site, cut.before + cut.kept + cut.after].append(cut)
    return found


def _taken(cuts: list[Cut], length: int) -> Cut:
    """What a line takes of an axis in all its rounds, as one part."""
    places = {place for cut in cuts for place in range(cut.before, cut.before + cut.kept)}
    ends = (min(places), length - 1 - max(places)) if places else (length, 0)
    return Cut((), len(places), *ends, cuts[0].site)


def _is_all(was: Cut, length: int, following: int, old: Geometry, new: Geometry) -> bool:
    """Whether all of a side or of the tokens was taken, perhaps without what stands beside them on the same axis.

    As many of something else are no such: the registers on the axis of tokens, those that are looked at most.
    """
    pairs = [*zip(counts(old), counts(new), strict=True)]
    for a, b in ((old.grid, new.grid), (old.image_size, new.image_size)):
        pairs += zip((a or ())[-2:], (b or ())[-2:], strict=False)
    left = length - was.kept
    if was.kept <= TELLING or left != was.before + was.after or left in counts(old):
        return False
    return any(was.kept == a and (left == 0 or following - length == b - a) for a, b in pairs)


def _are_gone(before: list[Cut], after: list[Cut]) -> bool:
    """Whether nothing is left of some of the parts that were taken; the last of them may be shorter."""
    kept = {cut.asked: cut.kept for cut in before}
    return any(cut.kept == 0 < kept.get(cut.asked, 0) for cut in after)


def _is_last(cuts: list[Cut], length: int, old: Geometry) -> bool:
    """Whether the last token was taken by its number."""
    asked = {cut.asked for cut in cuts}
    return asked == {("select", length - 1)} and length in counts(old) and length > TELLING**2


def _is_inner(cuts: list[Cut], length: int, following: int, old: Geometry, new: Geometry) -> bool:
    """Whether one patch within the grid was taken by its number: not a token beside the patches, nor the first or last
    of them."""
    tokens, more = counts(old)[0], counts(new)[0]
    beside = length - tokens
    if tokens <= TELLING**2 or not following - length == more - tokens != 0 or beside < 0:
        return False
    if len({cut.asked for cut in cuts}) != 1:
        return False
    kind, at = cuts[0].asked[0], cuts[0].asked[-1]
    return kind == "select" and beside < at < length - 1 - beside


def _averages(before: list[Averaged], after: list[Averaged], old: Geometry, new: Geometry) -> Iterator[str]:
    """A sum over all tokens was divided by their number, or its root, and would be by the same."""
    numbers = {(each.site, each.number) for each in before if _is_mean(each, old)}
    for each in after:
        if (each.site, each.number) in numbers and each.length in counts(new) and not _is_mean(each, new):
            yield _told(each.site, f"divides a sum over {each.length} by {each.number:g}")


def _is_mean(averaged: Averaged, geometry: Geometry) -> bool:
    means = (averaged.length, math.sqrt(averaged.length))  # a mean, or a sum that is as large as one of them
    near = any(math.isclose(averaged.number, mean, rel_tol=1e-6) for mean in means)
    return averaged.length in counts(geometry) and near


def _windows(before: list[Windows], after: list[Windows], old: Geometry, new: Geometry) -> Iterator[str]:
    """The image was cut into windows of the present patch, and is still."""
    for windows in after:
        size = windows.size
        whole = any(b.site == windows.site and b.size == b.sides == size for b in before)
        if whole and windows.sides != size and _are_tokens(size, old) and _are_tokens(windows.sides, new):
            yield _told(windows.site, f"takes windows of {show(size)}, which are all of it now")
        if not _is_patch(size, windows.sides, old, new, new) or min(size) < TELLING:
            continue
        if any(b.site == windows.site and b.size == size and _is_patch(size, b.sides, old, new, old) for b in before):
            yield _told(windows.site, f"cuts the image into windows of {show(size)}")


def _are_tokens(sides: Size, geometry: Geometry) -> bool:
    return math.prod(sides) in counts(geometry) and math.prod(sides) > TELLING**2


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
    laid = {r.site for r in before if _lays_out(r, old, old)}
    sites = laid | {r.site for r in before if _patchifies(r, old, old)}
    for reshaped in after:
        if reshaped.site not in sites:
            continue
        if old.grid[-2:] != new.grid[-2:] and _lays_out(reshaped, old, new):
            yield _told(reshaped.site, f"lays {reshaped.before} out on the grid of {show(old.grid[-2:])}")
        elif old.grid[-2:] != new.grid[-2:] and reshaped.site in laid and _keeps_side(reshaped, old, new):
            yield _told(reshaped.site, f"lays {reshaped.before} out as {reshaped.after}, which is no grid of them")
        if old.patch_size[-2:] != new.patch_size[-2:] and _patchifies(reshaped, old, new):
            yield _told(reshaped.site, f"cuts the image into patches of {show(old.patch_size[-2:])}")


def _lays_out(reshaped: Reshaped, grid: Geometry, at: Geometry) -> bool:
    """Whether an axis of the tokens of one geometry becomes the two axes of another's grid."""
    sides = (grid.grid or ())[-2:]
    tokens, before, after = counts(at)[0], reshaped.before, reshaped.after
    if min(sides) < TELLING or tokens not in before or _count((at.image_size or ())[-2:], before):
        return False
    starts = {math.prod(before[:i]) for i, length in enumerate(before) if length == tokens}
    if at != grid and any(length == tokens and math.prod(after[:i]) in starts for i, length in enumerate(after)):
        return False  # they stay what they are
    if after[0] == before[0] * tokens:  # each on its own
        return False
    kept = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
    return _count(sides, after[kept:]) > _count(sides, before[kept:])


def _keeps_side(reshaped: Reshaped, old: Geometry, new: Geometry) -> bool:
    """Whether an axis of all tokens becomes two, of which one is as long as a side of the present grid alone."""
    (h, w), sides = (old.grid or ())[-2:], (new.grid or ())[-2:]
    before, after, tokens = reshaped.before, reshaped.after, counts(new)[0]
    starts = {math.prod(before[:i]) for i, length in enumerate(before) if length == tokens}
    for i, (a, b) in enumerate(itertools.pairwise(after)):
        if math.prod(after[:i]) in starts and (a - 1) * b < tokens <= a * b and (a, b) != sides:
            return (a == h and a != sides[0]) or (b == w and b != sides[1])
    return False


def _count(sides: Size, shape: Size) -> int:
    return sum(shape[i : i + 2] == sides for i in range(len(shape) - 1))


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
