"""``adapt`` and ``at``: the one path that everything else calls."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from typing import Any, TypeVar, cast

from torch import nn

from anypatch.core import history, outdated
from anypatch.core import plan as plans
from anypatch.core.adapters import unwrap
from anypatch.core.ambient import undisturbed
from anypatch.core.geometry import Geometry, ImageSizeLike, Keep, SizeLike, target_geometry
from anypatch.core.kernels import as_method
from anypatch.core.placement import require_fed, require_unsharded
from anypatch.core.plan import Plan
from anypatch.core.recorded import programs, told
from anypatch.core.shells import Shells
from anypatch.core.tables import ANTIALIASED, PositionsLike
from anypatch.core.twins import Subject
from anypatch.core.views import described, is_view, require_no_view, view
from anypatch.errors import GeometryError, UnsupportedModelError
from anypatch.hosts import recognise
from anypatch.hosts.base import Host
from anypatch.hosts.structural.gradients import require_free_gradients
from anypatch.hosts.structural.rehearsing import require_rehearsed
from anypatch.hosts.structural.surroundings import follow_surroundings

M = TypeVar("M", bound=nn.Module)


def adapt(
    model: M,
    patch_size: SizeLike | None = None,
    image_size: ImageSizeLike | None = None,
    *,
    keep: Keep = "image",
    kernel: Any = "wiener",
    positions: PositionsLike = "antialias",
) -> M:
    """Change the patch size or image size of a live model, in place.

    >>> import timm, torch
    >>> model = timm.create_model("test_vit")  # patches of 16 in an image of 160: a grid of 10x10
    >>> adapt(model, patch_size=8) is model
    True
    >>> geometry(model)
    Geometry(patch_size=(8, 8), image_size=(160, 160), grid=(20, 20), prefix_tokens=1, library='timm')
    >>> model.forward_features(torch.rand(1, 3, 160, 160)).shape  # a class token and 20x20 patches
    torch.Size([1, 401, 64])
    >>> adapt(model, image_size=(96, 192)).patch_embed.grid_size
    (12, 24)

    The model stays the same object, of the same class, with the same hooks, dtype, device, ``requires_grad``,
    adapters and shared parameters; parameters stay the same objects too, so an optimizer keeps working (clear its
    per-parameter state for the resized ones).

    Args:
        model: a live model of timm, transformers, open_clip, torchvision, or laid out like a ViT.
        patch_size: pixels, an int or (height, width); for video also (time, height, width).
        image_size: pixels, likewise; without it ``keep`` decides. ``"nearest"`` is the size nearest to the model's own
            that the patch divides, on each axis by itself; half way between two, the larger, as an image can be
            enlarged to it without losing a pixel. It keeps the scale of things in the image; ``keep="grid"`` keeps the
            number of tokens.
        keep: ``"image"`` keeps the image size and changes the grid; ``"grid"`` keeps the grid.
        kernel: how patch kernels are resized, as in :func:`anypatch.resize_kernel`.
        positions: how absolute position tables are resampled when the grid changes: ``"antialias"``, bicubic with
            antialias for every library, or ``"host"``, as the model's own library does it. Relative tables follow
            where the library resamples those, and are refused where it does not.

    Returns:
        ``model`` itself.

    Going there and back is not the identity: a smaller patch sees less than the larger one it came from. From 14 to 16
    and back to 14 a projection is off by about half a per cent. For a third size, start from the original.

    Raises:
        GeometryError: sizes that do not fit; the message says which would.
        UnsupportedModelError: the model cannot be adapted; the message names the layer and why.
        When it raises, the model is what it was.
    """
    with undisturbed():
        plan = make_plan(model, patch_size, image_size, keep=keep, kernel=kernel, positions=positions)
        if plan is not None:
            outdated.tell(plan)
            plan.apply()
            done = history.step(plan.subject.geometry, plan.target, kernel, positions)
            history.note(unwrap(model), done)
    return model


def make_plan(
    model: nn.Module,
    patch_size: SizeLike | None = None,
    image_size: ImageSizeLike | None = None,
    *,
    keep: Keep = "image",
    kernel: Any = "wiener",
    positions: PositionsLike = "antialias",
    shared: bool = False,
) -> Plan | None:
    """What ``adapt`` would do, or ``None`` if nothing has to change. Arguments and errors are ``adapt``'s.

    ``shared`` for a view, which exchanges no tensor.
    """
    require_no_view(model)
    as_method(kernel)
    _require_positions(positions)
    with undisturbed():
        require_unsharded(unwrap(model))
        subject, how = describe(model), functools.partial(plan_for, kernel=kernel, positions=positions, shared=shared)
        return how(subject, patch_size, image_size, keep=keep)


def plan_for(
    subject: Subject,
    patch_size: SizeLike | None = None,
    image_size: ImageSizeLike | None = None,
    *,
    keep: Keep = "image",
    kernel: Any = "wiener",
    positions: PositionsLike = "antialias",
    shared: bool = False,
    rehearse: bool = True,
) -> Plan | None:
    """``make_plan`` for a model that has been described already; ``rehearse`` unless the caller runs it anyway."""
    method = as_method(kernel)
    _require_positions(positions)
    require_fed(subject.model if subject.wrapper is None else subject.wrapper)
    try:
        target = target_geometry(subject.geometry, patch_size, image_size, keep)
    except GeometryError:
        if patch_size is not None:
            _require_other_patches(subject, method)
        raise
    if (target.patch_size, target.image_size) == (subject.geometry.patch_size, subject.geometry.image_size):
        return None
    if subject.bound and keep == "image" and target.image_size is None:
        raise GeometryError(subject.bound)
    if positions == "host":
        subject = replace(subject, facts=replace(subject.facts, host=True))
    sampling = subject.facts.sampling if positions == "host" else ANTIALIASED

    def make(geometry: Geometry) -> Plan:
        return plans.make(subject, geometry, method, sampling, follow_surroundings, shared=shared)

    plan = make(target)
    if not shared:
        require_free_gradients(plan)
    if rehearse:
        require_rehearsed(plan, lambda: recognise(subject.model).example(subject), make)
    return plan


def _require_positions(positions: str) -> None:
    if positions not in ("antialias", "host"):
        raise GeometryError(f"positions must be 'antialias' or 'host', not {positions!r}")


def _require_other_patches(subject: Subject, method: Any) -> None:
    """Of a stem that takes no other patch, that is what has to be said, before sizes are proposed that would fit.

    Raises:
        UnsupportedModelError: not even a patch twice as large, at the same grid, is possible.
    """
    doubled = tuple(2 * side for side in subject.geometry.patch_size)
    with contextlib.suppress(GeometryError):
        target = target_geometry(subject.geometry, doubled, keep="grid")
        plans.make(subject, target, method, ANTIALIASED, follow_surroundings)


def at(
    model: M,
    patch_size: SizeLike | None = None,
    image_size: ImageSizeLike | None = None,
    *,
    keep: Keep = "image",
    kernel: Any = "wiener",
    positions: PositionsLike = "antialias",
) -> M:
    """A view: a second face of a model at another geometry, that shares its weights.

    The view computes what a deep copy would that was adapted. It is of the model's own class, has its own mode, hooks
    and attributes, as they are now, and the model's own parameters: ``view.parameters()`` are those of ``model``, so
    that training either trains both, and moving either moves both. Tensors that follow the geometry (the projection,
    position tables, pixel heads) are computed from the model's whenever the view reads them, differentiably; so a view
    costs the memory of these while it runs, and follows whatever happens to the weights. Reading them takes some
    milliseconds a forward pass; where the weights stay as they are, ``adapt`` a copy instead.

    ``view.state_dict()`` holds what :func:`anypatch.save` writes, the weights at the view's geometry. Loading, and
    writing into a tensor that the view computes, are for the model, and so are pruning, norms and parametrizations. A
    layer that is put into the view (a head of its own) is the view's alone. Replacing layers of ``model`` (a new head,
    PEFT) after a view was taken asks for another view, and is an UnsupportedModelError when the view runs. A pickled
    view, as a copied one, has weights of its own.

    Args:
        model: as for :func:`adapt`; a model behind ``torch.compile`` is looked through.
        patch_size, image_size, keep, kernel, positions: as for :func:`adapt`. Without a size, a face at the model's
            own geometry.

    Returns:
        The view. It works under ``torch.compile``, autocast, ``torch.func.functional_call`` (with the model's
        parameters), ``copy.deepcopy`` (the copy has weights of its own) and DistributedDataParallel.

    Raises:
        GeometryError, UnsupportedModelError: as for :func:`adapt`; a view has no views.

    Examples:
        >>> import anypatch, timm, torch
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> view = anypatch.at(model, 32)
        >>> view(torch.zeros(1, 3, 224, 224)).sum().backward()
        >>> model.patch_embed.proj.weight.grad.shape
        torch.Size([192, 3, 16, 16])
    """
    return viewed(model, Shells(), patch_size, image_size, keep=keep, kernel=kernel, positions=positions)


def viewed(model: M, shells: Shells, *sizes: Any, **options: Any) -> M:
    """``at``, which fills the shells."""
    while isinstance(model, nn.Module) and "_orig_mod" in model._modules:
        model = cast(M, model._modules["_orig_mod"])
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UnsupportedModelError(f"take the view of {type(model).__name__}'s module, then wrap the view")
    return view(model, make_plan(model, *sizes, **options, shared=True), shells)


def geometry(model: nn.Module) -> Geometry:
    """The model's present geometry.

    >>> import timm
    >>> geometry(timm.create_model("test_vit"))
    Geometry(patch_size=(16, 16), image_size=(160, 160), grid=(10, 10), prefix_tokens=1, library='timm')

    Args:
        model: any model that :func:`anypatch.adapt` takes, wrapped or not.

    Raises:
        UnsupportedModelError: no patch embedding was found.
    """
    return describe(model).geometry


def describe(model: nn.Module) -> Subject:
    """The live model as its host library's file describes it, wrappers taken off."""
    inner = unwrap(model)
    if is_view(inner):
        return replace(described(inner, describe), wrapper=model)
    try:
        return replace(host(inner).subject(inner), wrapper=model)
    except UnsupportedModelError as error:
        for path, program in programs(inner) if isinstance(inner, nn.Module) else ():
            if not path:
                break  # it has been said
            raise UnsupportedModelError(
                f"{error}; {path} is {told(program)}: adapt the model before tracing"
            ) from error
        raise


def host(model: nn.Module) -> Host:
    """The host library of a model, wrappers taken off."""
    return recognise(unwrap(model))
