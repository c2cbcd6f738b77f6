"""The proof: exactness on random weights and random pixels, with no data and no pretrained weights.

Randomise every parameter of a copy of the model, enlarge each patch of a random input with the resize matrix
``R``, adapt the copy with the pseudo-inverse kernel, and compare outputs. ``<pinv(R)ᵀ w, R x> = <w, x>`` holds
exactly where ``R`` has full column rank (FlexiViT, arXiv:2212.08013, equation 3), so whatever differs by more
than float noise is something the adaptation forgot.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.adaptation import describe, host, plan_for
from anypatch.core import history
from anypatch.core.ambient import undisturbed
from anypatch.core.display import facts_table
from anypatch.core.geometry import Geometry, Size, SizeLike, as_size, show
from anypatch.core.kernels import Pi, resize_matrix
from anypatch.core.limits import require_room
from anypatch.core.modes import on_its_own
from anypatch.core.outputs import named_tensors, ungrown
from anypatch.core.placement import require_values
from anypatch.core.recordings import results
from anypatch.core.shells import copied
from anypatch.core.twins import Subject
from anypatch.core.views import standing
from anypatch.errors import AnypatchError, AnypatchWarning, GeometryError, UnsupportedModelError
from anypatch.hosts.base import Example
from anypatch.hosts.structural.rehearsing import Rehearsal, Run

# Of the relative error. Float32 alone gives up to 8e-6 in docs/coverage.md; another resize than the one that is proved,
# 0.3 and more on timm's test_vit, from patch 16 to 17, 18 or 32.
TOLERANCE = 1e-4


@dataclass(frozen=True, repr=False)
class Check:
    """Result of the proof.

    >>> import timm
    >>> result = check(timm.create_model("test_vit"), patch_size=32)
    >>> result.passed, result.failures
    (True, ())

    Attributes:
        error: the largest relative error over the compared outputs, ``max |a - b| / max |a|``.
        passed: whether it is float noise (below 1e-4), and nothing failed.
        compared: how many tensors were compared: outputs or, where none keeps its shape, what the parts of the
            adapted model return on the way to them.
        patch_size: the patch size that was proved, from the model's own.
        uncompared: outputs that could not be compared, as they grow with the image or are no floating-point numbers.
        failures: what is wrong whatever the error: an output as large as the image that does not grow with it, or a
            forward pass that fails. The check has not passed if there are any.
    """

    error: float
    passed: bool
    compared: int
    patch_size: Size
    uncompared: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()

    def __repr__(self) -> str:
        told = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != ()]
        return f"Check({', '.join(told)})"

    def _repr_html_(self) -> str:
        """The result as a table, in a notebook."""
        facts = {
            "passed": "yes" if self.passed else "no",
            "relative error": f"{self.error:.2g}",
            "tolerance": f"{TOLERANCE:g}",
            "outputs compared": self.compared,
            "patch size": show(self.patch_size),
        }
        for name, told in (("not compared", self.uncompared), ("failures", self.failures)):
            facts |= {name: "; ".join(told)} if told else {}
        return facts_table("Check", facts)


@undisturbed()
@torch.no_grad()
def check(model: nn.Module, patch_size: SizeLike, *, seed: int = 0) -> Check:
    """Prove that adapting ``model`` to a larger ``patch_size`` preserves what it computes.

    >>> import timm
    >>> model = timm.create_model("test_vit")
    >>> result = check(model, patch_size=(16, 24))
    >>> result.passed, result.error < 1e-4
    (True, True)

    The model is not changed. The grid is kept and the image grows with the patch; shrinking loses pixels, so
    no exactness holds there and sizes below the present patch are refused.

    Args:
        model: any model that :func:`anypatch.adapt` takes.
        patch_size: pixels, an int or (height, width); for video also (time, height, width).
        seed: of the random weights and pixels that the proof is made with.

    Returns:
        The relative error of every output, and whether it is float noise.

    Raises:
        GeometryError: ``patch_size`` is smaller than the present one on some axis, or, for stems whose patches
            overlap, is no whole multiple of it.
        UnsupportedModelError: the model cannot be adapted or cannot be fed pixels.
    """
    model = standing(model)
    described = describe(model)
    current = described.geometry
    target = as_size(patch_size, len(current.patch_size), "patch_size", current.patch_size)
    if any(new < old for new, old in zip(target, current.patch_size, strict=True)):
        raise GeometryError(
            f"check proves growing patches: patch_size {show(target)} is smaller than the model's "
            f"{show(current.patch_size)}"
        )
    if target == current.patch_size:
        note = f"patch size {show(target)} is the model's own, so nothing was resized: a larger one proves more"
        warnings.warn(note, AnypatchWarning, 4)
    method = _method(described, target)
    generator = torch.Generator().manual_seed(seed)
    subject = _copied(model)
    randomise(subject, generator)
    inner = describe(subject)
    example = host(subject).example(inner)
    pixels = torch.randn(example.shape, generator=generator, dtype=torch.float32)
    _blank(pixels, current.patch_size, target, inner.facts.padding)
    before = _present(example, subject, inner.part, pixels)
    pictures = _pictures(inner, example, before)
    plan = plan_for(inner, target, keep="grid", kernel=method, rehearse=False)
    if plan is not None:
        plan.apply()
    pixels = enlarge(pixels, _in_units(current.patch_size, example), _in_units(target, example), method)
    adapted = describe(subject)
    example = host(subject).example(adapted)
    try:
        after = _forward(example, subject, adapted.part, pixels)
    except AnypatchError:
        raise
    except Exception as error:
        return Check(math.inf, False, 0, target, failures=(f"the adapted model fails: {error}",))
    found = _compare(before, after, _Sizes(current, adapted.geometry, pictures), target)
    if found.error >= TOLERANCE:
        _require_repeatable(after, _forward(example, subject, adapted.part, pixels))
    return found


def _method(described: Subject, target: Size) -> Pi:
    """How patches are enlarged and their kernel resized; some stems take whole multiples of their stride only."""
    current = described.geometry
    if not (current.overlapping or described.facts.whole_multiples):
        return Pi("bicubic")
    if any(new % old for new, old in zip(target, current.patch_size, strict=True)):
        why = "pad or crop" if described.facts.whole_multiples else "overlap"
        raise GeometryError(
            f"patches {why} (kernel {show(current.kernel_size)}, stride {show(current.patch_size)}): "
            f"check needs a whole multiple of the stride, got {show(target)}"
        )
    return Pi("nearest")


def _copied(model: nn.Module) -> nn.Module:
    """A copy in which every parameter can be given another value.

    Raises:
        UnsupportedModelError: there can be none, or it has no values.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise UnsupportedModelError(
                f"{name} is on the meta device, so nothing can be computed: check the model where its weights are"
            )
        if tensor.is_floating_point():
            require_values(name, tensor)
    try:
        left: dict[int, Any] = {id(tensor): tensor.detach() for tensor in results(model)}
        other = copied(model, left).cpu().float().eval()
    except Exception as error:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be copied to be checked: {error}") from error
    history.note_copy(model, other)
    return other


def _present(example: Example, model: nn.Module, part: nn.Module, pixels: Tensor) -> _Run:
    """What the model returns before it is adapted.

    Raises:
        UnsupportedModelError: it cannot be fed.
    """
    try:
        return _forward(example, model, part, pixels)
    except (AnypatchError, MemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} fails on pixels {tuple(pixels.shape)} as it is, so there is nothing to compare: "
            f"{type(error).__name__}: {error}"
        ) from error


def _require_repeatable(first: _Run, second: _Run) -> None:
    """What a model draws from torch's generators it draws again; from any others it cannot be compared with itself.

    Raises:
        UnsupportedModelError: the same pixels give something else.
    """
    for name, a in first.outputs.items():
        b = second.outputs.get(name, a)
        if a.shape != b.shape or (a.is_floating_point() and _error(a, b) >= TOLERANCE):
            raise UnsupportedModelError(
                f"{name} is another one each time for the same pixels, so nothing can be compared: the model draws "
                f"numbers that are not torch's, or keeps something from one forward pass to the next"
            )


def _pictures(inner: Subject, example: Example, run: _Run) -> frozenset[str]:
    """Outputs that are as large as the image where its side is the number of tokens, too, as that of attention maps is:
    those that have no side of the number of tokens at a wider image, in a rehearsal."""
    image, grid = inner.geometry.image_size, inner.geometry.grid
    if image is None or grid is None or image[-2] not in _counts(inner.geometry):
        return frozenset()
    if not any(_holds(tuple(t.shape), image[-2:]) for t in run.outputs.values()):
        return frozenset()
    wide = (*image[:-1], 2 * image[-1])
    try:
        plan = plan_for(inner, image_size=wide, rehearse=False)
    except AnypatchError:
        return frozenset()
    rehearsed = None if plan is None else Rehearsal(inner.model, lambda: example).at(plan, plan.target)
    if not isinstance(rehearsed, Run):
        return frozenset()
    counts = set(_counts(plan.target)) if plan is not None else set()
    return frozenset(f"output{name}" for name, shape in rehearsed.shapes.items() if not counts & set(shape))


def _holds(shape: Size, pair: Size) -> bool:
    return any(shape[i : i + 2] == pair for i in range(len(shape) - 1))


def _counts(geometry: Geometry) -> tuple[int, int]:
    tokens = math.prod(geometry.grid or ())
    return tokens, tokens + geometry.prefix_tokens


@dataclass
class _Run:
    """What a forward pass returned, and what the children of the adapted part returned on the way, by name."""

    outputs: dict[str, Tensor]
    inside: dict[str, Tensor]


def _forward(example: Example, model: nn.Module, part: nn.Module, pixels: Tensor) -> _Run:
    inside: dict[str, Tensor] = {}
    handles = []
    for name, child in part.named_children():
        if isinstance(child, torch.jit.ScriptModule):
            continue  # takes no hooks

        def record(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            inside.update({f"{name}{where}": t.detach().clone() for where, t in named_tensors(output)})

        handles.append(child.register_forward_hook(record))
    try:
        with on_its_own():  # masking in masked autoencoders draws the same twice, and nobody else's numbers
            outputs = example.call(model, pixels)
    finally:
        for handle in handles:
            handle.remove()
    return _Run({f"output{where}": t for where, t in named_tensors(outputs)}, inside)


@dataclass(frozen=True)
class _Sizes:
    """The geometries between which outputs are compared."""

    old: Geometry
    new: Geometry
    pictures: frozenset[str] = frozenset()

    def ungrown(self, name: str, before: Tensor, after: Tensor) -> bool:
        """Whether an output that was as large as the image is not as large as the new one.

        A side that is also the number of tokens tells nothing, as hidden states and attention maps have it, too; but
        for those that were seen to be pictures.
        """
        old, new = self.old.image_size, self.new.image_size
        if old is None or new is None:
            return False
        if old[-2] in _counts(self.old) and name not in self.pictures:
            return False
        return ungrown(before.shape, after.shape, old, new)


def _compare(before: _Run, after: _Run, sizes: _Sizes, target: Size) -> Check:
    if before.outputs.keys() != after.outputs.keys():
        raise UnsupportedModelError(
            f"the adapted model returns {len(after.outputs)} tensors, the original {len(before.outputs)}"
        )
    worst, compared, left, failures = 0.0, 0, [], []
    for name, a in before.outputs.items():
        b = after.outputs[name]
        if sizes.ungrown(name, a, b):
            failures.append(
                f"{name} {tuple(a.shape)} has the size of the image, but becomes {tuple(b.shape)} where the image "
                f"becomes {show(sizes.new.image_size)}"
            )
        if a.is_floating_point() and a.shape == b.shape:
            worst, compared = max(worst, _error(a, b)), compared + 1
            if a.numel() and not bool(torch.isfinite(a).any()):
                failures.append(f"{name} {tuple(a.shape)} is NaN or infinite everywhere, which proves nothing")
        else:
            left.append(f"{name} {tuple(a.shape)} -> {tuple(b.shape)}")
    if not compared:  # everything that is returned grows with the image: what it is computed from does not
        inside = [(a, after.inside[n]) for n, a in before.inside.items() if n in after.inside]
        errors = [_error(a, b) for a, b in inside if a.is_floating_point() and a.shape == b.shape]
        if not errors:
            raise UnsupportedModelError(
                f"no output keeps its shape, so nothing can be compared: {', '.join(left) or 'there is none'}"
            )
        worst, compared = max(errors), len(errors)
    passed = worst < TOLERANCE and not failures
    return Check(worst, passed, compared, target, tuple(left), tuple(failures))


def _error(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value; infinite where one alone is NaN or infinite."""
    if not a.numel():
        return 0.0
    finite = torch.isfinite(a)
    if not bool(finite.all()):  # such as the logits of classes that are masked out
        if not torch.equal(a[~finite].nan_to_num(0.5), b[~finite].nan_to_num(0.5)):
            return math.inf
        a, b = a[finite], b[finite]
        return _error(a, b)
    scale = a.abs().max().item()
    error = (a - b).abs().max().item() / scale if scale else b.abs().max().item()
    return error if error == error else math.inf


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter and every learned statistic a random value that keeps activations of order one."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or not p.is_floating_point() or not p.numel():
                continue
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
            if p.ndim >= 2:
                linear = name.endswith("weight")  # "in_proj_weight" of torch's own attention, too
                p.copy_(noise * (1.0 / max(p[0].numel(), 1) ** 0.5 if linear else 0.5))
            else:
                p.copy_(noise * 0.2 + (1.0 if name in ("weight", "gamma", "lambda1") else 0.0))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)


def _in_units(size: Size, example: Example) -> Size:
    """A patch in entries of the map that is fed: pixels, unless the linear part of the stem comes later."""
    unit = (1,) * (len(size) - len(example.unit)) + example.unit
    return tuple(s // u for s, u in zip(size, unit, strict=True))


def _blank(pixels: Tensor, patch: Size, target: Size, padding: int) -> None:
    """Set to zero what a window with a fixed padding no longer sees, as it starts later in a larger patch."""
    for axis, old, new in zip((-2, -1), patch[-2:], target[-2:], strict=True):
        unseen = math.floor(padding - padding * old / new)
        rows = torch.arange(pixels.shape[axis])
        pixels.index_fill_(axis, rows[(rows + padding) % old < unseen], 0.0)


def enlarge(pixels: Tensor, patch: Size, target: Size, method: Pi) -> Tensor:
    """Enlarge every patch on its own: ``(..., grid * patch) -> (..., grid * target)`` on each spatial axis."""
    grown = pixels.nbytes * math.prod(target) // math.prod(patch)
    require_room(grown, f"the image of the proof, of patches of {show(target)},")
    for offset, (old, new) in enumerate(zip(patch, target, strict=True)):
        axis = pixels.ndim - len(target) + offset
        if old == new:
            continue
        if method.filter == "nearest":
            pixels = pixels.repeat_interleave(new // old, dim=axis)
            continue
        matrix = resize_matrix(old, new, method.filter).to(pixels.dtype)  # (new, old)
        whole = pixels.shape[axis] // old * old
        cut = pixels.narrow(axis, 0, whole).unflatten(axis, (-1, old)).movedim(axis + 1, -1)
        pixels = (cut @ matrix.T).movedim(-1, axis + 1).flatten(axis, axis + 1)
    return pixels


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in an output, in order."""
    return (tensor for _, tensor in named_tensors(value))
