"""What neither names nor shapes tell of people's own modules, rehearsed: numbers in code, and behind odd names.

Where there is a module of the user's, the model is run before anything is changed, as it is and as it would be, on
tensors that have shapes alone. A map that is as large as the image and would not be afterwards is refused (a decoder
that enlarges tokens as often as the present patch needs), and so is one that would keep its old sides while the rest
of it grows. Where the user's module holds a number of the present geometry that nothing follows, what runs today and
would not afterwards is refused, too.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from anypatch.core.account import Doubt
from anypatch.core.geometry import Geometry, Size, show, with_grid
from anypatch.core.outputs import ungrown
from anypatch.core.plan import Plan
from anypatch.core.recordings import is_pure
from anypatch.core.rehearsal import Door, shapes, staged, watch
from anypatch.core.steps import SetBuffer, SetParameter
from anypatch.core.traces import Trace
from anypatch.errors import AnypatchError, GeometryError, UnsupportedModelError
from anypatch.hosts.base import Example
from anypatch.hosts.structural.following import TELLING, counts
from anypatch.hosts.structural.probing import held, one_more, rootless, settled
from anypatch.hosts.structural.suspects import owned, require_no_pixel_places, suspects
from anypatch.hosts.structural.written import written_number

SHOWN = 3  # suspects in a message
# Attributes that have the grid's numbers by chance: a model of 64 channels with 64 tokens, of 8 heads over 8x8 tokens.
NAMED_OTHERWISE = re.compile(r"dim|width|hidden|heads?$|depth|layers|blocks|class|channel|feature|d_model|chans", re.I)


def require_rehearsed(plan: Plan, example: Callable[[], Example], remake: Callable[[Geometry], Plan | None]) -> None:
    """Refuse a plan after which the model would not run, or would give maps of the old size.

    Args:
        plan: what would be done.
        example: what to feed the model; may raise where it cannot be fed.
        remake: the plan for another geometry.

    Raises:
        UnsupportedModelError, GeometryError: the message names what is left of the present geometry.
    """
    old, new = plan.subject.geometry, plan.target
    require_no_pixel_places(plan)
    squared = _becomes_rectangular(old, new)
    found = list(suspects(plan))
    named = list(dict.fromkeys(text for text, _ in found))
    if not named and not plan.doubts and not any(True for _ in owned(plan.subject.model)):
        return
    run = Rehearsal(plan.subject.model, example)
    before = run.at(None, old)
    if isinstance(before, Exception):
        _require_no_doubt(plan)
        return  # cannot be told
    _require_leading(plan, before.trace.joined)
    told = _told(named)
    after = run.at(plan, new)
    if isinstance(after, Exception):
        _require_no_doubt(plan)
        why = _line(str(after) or type(after).__name__)
        if not named and not squared and not run.pixels_alone:
            return  # perhaps it was fed what fits the present geometry alone
        if not named and squared:
            raise _square(plan, why)
        raise UnsupportedModelError(
            f"{type(plan.subject.model).__name__} runs as it is, but would not at patch {show(new.patch_size)} and "
            f"image {show(new.image_size)} ({why}): {told}, which nothing says how to follow. Change it "
            f"together with the model: adapt the model inside on its own, and set this by hand"
        )
    _require_settled(plan, run, before, after, remake)
    _require_whole_image(plan, before.grids, after.grids, told)
    for name, shape in before.shapes.items():
        now = after.shapes.get(name, shape)
        stale, certain = _stale(shape, now, old, new)
        certain = certain or any(not NAMED_OTHERWISE.search(leaf) for _, leaf in found)
        if stale and certain and (named or squared) and not _in_tokens(name, shape, run, remake, plan):
            raise _kept(plan, f"{shape}, and would become {now}, which keeps {stale}: {told}", name)
        if _shrinks(shape, now, old, new):
            shown = f"{shape}, as large as the image, and would become {now} for an image of {show(new.image_size)}"
            raise _kept(plan, f"{shown}: {told}", name, "change what enlarges its tokens")
    _require_nothing_written(plan, run, before, after, remake)
    if squared and math.isqrt(math.prod(new.grid or ())) ** 2 == math.prod(new.grid or ()):
        _require_no_root(run, remake, plan, before.shapes)


def _require_whole_image(plan: Plan, before: dict[str, Size], after: dict[str, Size], told: str) -> None:
    """What cuts the whole image into patches today has to do so afterwards: nothing may bring it to its old size.

    Raises:
        UnsupportedModelError: it would cut another grid.
    """
    for path, grid in before.items():
        seen = after.get(path)
        if grid == plan.subject.geometry.grid and seen is not None and seen != plan.target.grid:
            raise UnsupportedModelError(
                f"{path} of {type(plan.subject.model).__name__} cuts the image into {show(grid)} patches, and would "
                f"cut one of {show(plan.target.image_size)} into {show(seen)}, as something before it keeps a size: "
                f"{told}, which nothing says how to follow. Adapt the model inside on its own, and set this by hand"
            )


def _require_leading(plan: Plan, joined: list[Size]) -> None:
    """Of a hand-made model, tokens that have no place on the grid are taken for the first of its position table.

    Raises:
        UnsupportedModelError: they are put after the grid, and a table over both would change.
    """
    old, new = plan.subject.geometry, plan.target
    (tokens, all_tokens), extra = counts(old), old.prefix_tokens
    both = [lengths for lengths in joined if sum(lengths) == all_tokens and tokens in lengths]
    changes = old.grid != new.grid and any(
        isinstance(step, (SetParameter, SetBuffer)) and step.role is not None and all_tokens in _shape(step)
        for step in plan.steps
    )
    known = plan.subject.path or plan.subject.facts.suffix_tokens
    if extra and changes and both and all(lengths[-1] != tokens for lengths in both) and not known:
        raise UnsupportedModelError(
            f"{type(plan.subject.model).__name__} puts tokens after its {tokens} patches ({both[0]} are put together), "
            f"and anypatch takes the first {extra} entries of its position table for those that have no place on the "
            f'grid: use keep="grid", or put them before the patches'
        )


def _shape(step: SetParameter | SetBuffer) -> Size:
    tensor = step.parameter if isinstance(step, SetParameter) else step.module._buffers[step.name]
    return () if tensor is None else tuple(tensor.shape)


@dataclass(frozen=True)
class Run:
    """One forward pass of a rehearsal.

    Attributes:
        shapes: of what the model returned.
        grids: what each convolution that cuts patches made of the image.
        trace: what it shows besides, with the doubts of the plan in their order.
    """

    shapes: dict[str, Size]
    grids: dict[str, Size]
    trace: Trace


class Rehearsal:
    """A model and what to feed it.

    Args:
        model: the live model, which stays as it is.
        example: makes what to feed it; may raise.
    """

    def __init__(self, model: nn.Module, example: Callable[[], Example]) -> None:
        self.model = model
        self.example = example
        self.pixels_alone = False  # whether nothing else was fed last
        self.door: Door | None = None

    def at(self, plan: Plan | None, geometry: Geometry) -> Run | Exception:
        """The model as it would be after a plan, at a geometry; or why it returns nothing."""
        try:
            fed = self.example()
            image = geometry.image_size
            if image is None or fed.unit != (1, 1) or len(fed.shape) < len(image) + 2:
                return ValueError("not fed pixels")
            self.pixels_alone = fed.pixels_alone
            like = next(p for p in self.model.parameters() if p.is_floating_point())
            size = (*fed.shape[: len(fed.shape) - len(image)], *image)
            stage = staged(self.model, plan, is_pure)
            grids = watch(stage, geometry.patch_size)
            trace = Trace(self._doubtful(stage, [] if plan is None else plan.doubts))
            self.door = door = self.door or Door(fed.call)
            return Run(shapes(stage, door, size, like.dtype, trace), grids, trace)
        except Exception as error:
            return error

    def _doubtful(self, stage: nn.Module, doubts: Sequence[Doubt]) -> Iterator[tuple[Tensor | None, int]]:
        paths = {id(module): path for path, module in self.model.named_modules()}
        for doubt in doubts:
            path = paths.get(id(doubt.module))
            yield None if path is None else held(stage.get_submodule(path), doubt.name), doubt.size


def _require_settled(
    plan: Plan, run: Rehearsal, before: Run, after: Run, remake: Callable[[Geometry], Plan | None]
) -> None:
    """What has the number of tokens has it by chance, if the model runs with more or fewer of them.

    Raises:
        UnsupportedModelError: that cannot be told; the message names it.
    """
    old, new = plan.subject.geometry, plan.target
    if not plan.doubts:
        return
    assert old.grid is not None
    assert new.grid is not None
    if math.prod(new.grid) != math.prod(old.grid) and settled(before.trace, after.trace, old, new, plan.doubts):
        return
    probe = with_grid(new, one_more(new.grid if math.prod(new.grid) > math.prod(old.grid) else old.grid))
    with contextlib.suppress(AnypatchError):
        other = remake(probe)
        further = run.at(other, probe)
        doubts = [] if other is None else other.doubts
        if isinstance(further, Run) and doubts and settled(before.trace, further.trace, old, probe, doubts):
            return
    _require_no_doubt(plan)


def _require_no_doubt(plan: Plan) -> None:
    if plan.doubts:
        raise plan.doubts[0].error


def _require_nothing_written(
    plan: Plan, run: Rehearsal, before: Run, after: Run, remake: Callable[[Geometry], Plan | None]
) -> None:
    """Raises UnsupportedModelError: people's own code takes apart by numbers of the present geometry."""
    old, new = plan.subject.geometry, plan.target
    what = written_number(before.trace, after.trace, old, new)
    if what is None:
        return
    if old.grid is not None and new.grid is not None and math.prod(old.grid) == math.prod(new.grid):
        probe = with_grid(new, one_more(new.grid))  # as many channels as tokens, laid out or not, are told by no shape
        with contextlib.suppress(AnypatchError):
            further = run.at(remake(probe), probe)
            if isinstance(further, Run) and written_number(before.trace, further.trace, old, probe) is None:
                return
    raise UnsupportedModelError(
        f"{what}, and would do the same at patch {show(plan.target.patch_size)} and image "
        f"{show(plan.target.image_size)}: write it by the sizes of its tensors before adapting"
    )


# -- verdicts ----------------------------------------------------------------------------------------------------


def _stale(before: Size, after: Size, old: Geometry, new: Geometry) -> tuple[str, bool]:
    """What of the present geometry an output would keep, empty if nothing or if it cannot be told; whether for certain.

    It is not where all else has changed as the geometry does: a map (n, 64, 8, 8) of 64 channels over 64 tokens becomes
    (n, 64, 4, 4), and tokens that are put into 64 places look the same.
    """
    if len(before) != len(after):
        return "", True
    sizes = []
    if old.image_size is not None and new.image_size is not None:
        sizes.append(("the size of the image", old.image_size[-2:], new.image_size[-2:]))
    if old.grid is not None and new.grid is not None:
        sizes.append(("the grid", old.grid[-2:], new.grid[-2:]))
    for what, a, b in sizes:
        if a == b or min(a) <= TELLING or (len(before) == 3 and a[0] in counts(old)):  # tokens, and their width
            continue
        for i in range(1, len(before) - 1):
            others = [(x, y) for x, y in _axes(before, after, i, 2) if x != y]
            if before[i : i + 2] == a == after[i : i + 2] and (others or what != "the grid"):
                return f"{what} ({show(a)})", not (others and _follow(before, after, others, old, new))
    if old.grid is not None and new.grid is not None and math.prod(old.grid) != math.prod(new.grid):
        for count in set(counts(old)):
            if count > TELLING**2 and count in before[1:]:
                i = before.index(count, 1)
                others = [(x, y) for x, y in _axes(before, after, i, 1) if x != y]
                if after[i] == count and others and not _is_image(before, after, i, old, new):
                    return f"the number of tokens ({count})", not _follow(before, after, others, old, new)
    return "", True


def _is_image(before: Size, after: Size, axis: int, old: Geometry, new: Geometry) -> bool:
    """Whether an axis is a side of a map as large as the image, which is as long as there were tokens by chance."""
    sizes = [g.image_size[-2:] if g.image_size is not None else None for g in (old, new)]
    return any([before[i : i + 2], after[i : i + 2]] == sizes for i in (axis - 1, axis))


def _axes(before: Size, after: Size, start: int, count: int) -> Iterator[tuple[int, int]]:
    """Lengths of all axes but ``count`` from ``start`` on."""
    pairs = list(zip(before, after, strict=True))
    yield from (*pairs[:start], *pairs[start + count :])


def _follow(before: Size, after: Size, changed: list[tuple[int, int]], old: Geometry, new: Geometry) -> bool:
    """Whether what changes has changed as the geometry does."""
    known = set(zip(old.patch_size, new.patch_size, strict=True))
    known |= {(c * math.prod(old.patch_size), c * math.prod(new.patch_size)) for c in (1, 3)}
    if old.image_size is not None and new.image_size is not None:
        known |= set(zip(old.image_size, new.image_size, strict=True))
    if old.grid is not None and new.grid is not None:
        known |= set(zip(old.grid, new.grid, strict=True))
        known |= set(zip(counts(old), counts(new), strict=True))
        (h, w), (new_h, new_w) = old.grid[-2:], new.grid[-2:]
        for (a, b), (x, y) in itertools.pairwise(zip(before, after, strict=True)):
            factor = a // h
            if factor and (a, b, x, y) == (factor * h, factor * new_h, factor * w, factor * new_w):  # upsampled
                known |= {(a, b), (x, y)}
    return set(changed) <= known


def _in_tokens(name: str, shape: Size, run: Rehearsal, remake: Callable[[Geometry], Plan | None], plan: Plan) -> bool:
    """Whether a shape that stays is one of tokens, of which there are as many as before, and only looks like an image.

    Of another number of tokens the model then returns another shape.
    """
    old, new = plan.subject.geometry, plan.target
    if old.grid is None or new.grid is None or math.prod(old.grid) != math.prod(new.grid):
        return False
    probe = with_grid(new, one_more(new.grid))
    with contextlib.suppress(AnypatchError):
        after = run.at(remake(probe), probe)
        if isinstance(after, Run) and probe.grid is not None:
            now, more = after.shapes.get(name, shape), math.prod(probe.grid) - math.prod(new.grid)
            return any(a in counts(old) and b == a + more for a, b in zip(shape, now, strict=False))
    return False


def _shrinks(before: Size, after: Size, old: Geometry, new: Geometry) -> bool:
    """Whether an output as large as the image would not be; not told where the side is the number of tokens, too."""
    if old.image_size is None or new.image_size is None or min(old.image_size[-2:]) <= TELLING:
        return False
    return old.image_size[-2] not in counts(old) and ungrown(before, after, old.image_size, new.image_size)


def _becomes_rectangular(old: Geometry, new: Geometry) -> bool:
    if old.grid is None or new.grid is None or len(old.patch_size) != 2:
        return False
    return len(set(old.grid)) == 1 < len(set(new.grid))


def _require_no_root(
    run: Rehearsal, remake: Callable[[Geometry], Plan | None], plan: Plan, before: dict[str, Size]
) -> None:
    """Refuse a model that fails at a grid whose number of tokens has no root, or that cuts it wrongly."""
    old = plan.subject.geometry
    assert old.grid is not None
    probe = with_grid(plan.target, rootless(old.grid))
    try:
        other = remake(probe)
    except AnypatchError:
        return
    after = run.at(other, probe)
    if isinstance(after, Exception):
        raise _square(plan, str(after))
    for name, shape in before.items():
        if _stale(shape, after.shapes.get(name, shape), old, probe)[0]:
            raise _square(plan, f"of a {show(probe.grid)} grid it would make {after.shapes[name]}")


def _kept(plan: Plan, what: str, name: str, remedy: str = "set this") -> UnsupportedModelError:
    return UnsupportedModelError(
        f"output{name} of {type(plan.subject.model).__name__} is {what}, which nothing says how to follow. Adapt the "
        f"model inside on its own, and {remedy} by hand"
    )


def _square(plan: Plan, why: str) -> GeometryError:
    new = plan.target
    return GeometryError(
        f"{type(plan.subject.model).__name__} takes its tokens for a square grid ({_line(why)}), and "
        f"{show(new.image_size)} at patch {show(new.patch_size)} is a {show(new.grid)} one: adapt to a square image"
    )


def _told(suspects: list[str]) -> str:
    more = f" and {len(suspects) - SHOWN} more" if len(suspects) > SHOWN else ""
    return f"it holds {'; '.join(suspects[:SHOWN])}{more}" if suspects else "something in it stays as it is"


def _line(text: str) -> str:
    return (text.splitlines() or [""])[0][:200]
