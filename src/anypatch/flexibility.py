"""``flexible``: one model that takes a patch size, or a budget of tokens, with every call."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.adaptation import geometry, viewed
from anypatch.core import outdated
from anypatch.core.adapters import HELD
from anypatch.core.geometry import Geometry, Size, SizeLike, as_size, show, target_geometry
from anypatch.core.pace import Pace
from anypatch.core.shells import SHARED, Shells
from anypatch.core.tables import PositionsLike
from anypatch.core.views import require_no_view
from anypatch.errors import GeometryError

VIEWS = 64  # views kept for pairs of a patch and an image size; each is some thousand small objects
_LOCK = threading.Lock()


def flexible(
    model: nn.Module, patch_sizes: Sequence[SizeLike], *, kernel: Any = "wiener", positions: PositionsLike = "antialias"
) -> Flexible:
    """A model that takes a patch size, or a budget of tokens, with every call, and whatever image size fits.

    Args:
        model: as for :func:`anypatch.at`. It stays what it is, and its weights are the flexible model's.
        patch_sizes: those that calls may ask for; the model's own is always among them.
        kernel, positions: as for :func:`anypatch.adapt`.

    Returns:
        A module whose parameters, buffers and state dict are the model's, under the model's names; hooks, modes and
        plain settings of the model's modules hold at every patch size. Train it like the
        model (FlexiViT, arXiv:2212.08013, draws a patch size for every step): wrapped in DistributedDataParallel or
        sharded, every parameter that the model uses takes part in every step, whatever its patch size.

    Raises:
        GeometryError: no patch size, or one that does not fit.
        UnsupportedModelError: as for :func:`anypatch.adapt`.

    Examples:
        >>> import anypatch, timm, torch
        >>> model = anypatch.flexible(timm.create_model("vit_tiny_patch16_224", depth=1), (8, 16, 32))
        >>> model(torch.zeros(1, 3, 224, 224), patch_size=32).shape
        torch.Size([1, 1000])
        >>> model(torch.zeros(1, 3, 128, 192), tokens=100).shape  # patch 16: 96 tokens
        torch.Size([1, 1000])
    """
    require_no_view(model)
    return Flexible(model, patch_sizes, {"kernel": kernel, "positions": positions})


class Flexible(nn.Module):
    """A model and its views; see :func:`flexible`.

    Attributes:
        model: the model.
        patch_sizes: what calls may ask for, the finest first.
    """

    def __init__(self, model: nn.Module, patch_sizes: Sequence[SizeLike], options: dict[str, Any]) -> None:
        super().__init__()
        native = geometry(model)
        if isinstance(patch_sizes, (int, str)) or not patch_sizes:
            raise GeometryError(f"patch_sizes are a sequence of sizes, not {patch_sizes!r}")
        axes = len(native.patch_size)
        sizes = {as_size(size, axes, "patch_size", native.patch_size) for size in patch_sizes} | {native.patch_size}
        # The model's own dictionaries, so that names, wrappers and shards are the model's.
        vars(self).update({name: vars(model)[name] for name in (*SHARED, "_modules", "_non_persistent_buffers_set")})
        vars(self).update({HELD: model, "_native": native, "_options": options, "_views": {}})
        outdated.watch(self, model)
        self.training = model.training
        self.patch_sizes: tuple[Size, ...] = tuple(sorted(sizes, key=lambda size: (math.prod(size), size)))
        for size in self.patch_sizes:
            if native.image_size is None or self._tokens(native.image_size, size):
                self.at(size)

    @property
    def model(self) -> nn.Module:
        return vars(self)[HELD]

    def forward(
        self, images: Tensor, patch_size: SizeLike | None = None, tokens: int | None = None, **inputs: Any
    ) -> Any:
        """What the model, adapted to this patch and image size, says.

        Args:
            images: normalised pixels (n, channels, height, width).
            patch_size: one of ``patch_sizes``; without it and without ``tokens``, the model's own.
            tokens: at most so many patches per image: the finest patch that fits.
            **inputs: what else the model's ``forward`` takes.

        Raises:
            GeometryError: a patch size that is not among ``patch_sizes`` or does not fit the images, or a budget
                below the coarsest patch.
        """
        size = self._image_size(images)
        patch = self._chosen(size, patch_size, tokens)
        view = self.at(patch, size)
        name = _pixels_name(view)
        return view(images, **inputs) if name is None else view(**{name: images}, **inputs)

    def at(self, patch_size: SizeLike, image_size: SizeLike | None = None) -> nn.Module:
        """The model's view at a patch and an image size, made once and kept."""
        native: Geometry = vars(self)["_native"]
        patch = self._listed(patch_size)
        image = native.image_size
        if image is not None and image_size is not None:
            image = as_size(image_size, len(image), "image_size", image)
        if (patch, image) == (native.patch_size, native.image_size):
            return self.model
        if outdated.changed(self):  # a new head, an adapter: views are taken anew, as they would go on without
            vars(self)["_views"] = {}
            outdated.watch(self, self.model)
        found = vars(self)["_views"].get((patch, image))
        if found is None:
            return self._make(patch, image)
        if not torch.compiler.is_compiling():
            found[1].keep()
        return found[0]

    @torch.compiler.disable
    def _make(self, patch: Size, image: Size | None) -> nn.Module:
        views, shells = vars(self)["_views"], Shells()
        if not views:  # of a copy
            outdated.watch(self, self.model)
        made = viewed(self.model, shells, patch, image, **vars(self)["_options"])
        pace = Pace(shells)
        with _LOCK:
            while len(views) >= VIEWS:
                views.pop(next(iter(views)), None)
            return views.setdefault((patch, image), (made, pace))[0]

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, views are taken when they are asked for."""
        return {**vars(self), "_views": {}}

    def _listed(self, patch_size: SizeLike) -> Size:
        native: Geometry = vars(self)["_native"]
        patch = as_size(patch_size, len(native.patch_size), "patch_size", native.patch_size)
        if patch not in self.patch_sizes:
            known = ", ".join(show(size) for size in self.patch_sizes)
            raise GeometryError(f"patch_size {show(patch)} is not among those of this flexible model: {known}")
        return patch

    def _image_size(self, images: Tensor) -> Size:
        native: Geometry = vars(self)["_native"]
        if not isinstance(images, Tensor) or images.dim() < 4:
            given = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise GeometryError(f"images are a tensor (n, channels, height, width), not {given}")
        lead = () if native.image_size is None else tuple(native.image_size[:-2])
        return (*lead, *images.shape[-2:])

    def _chosen(self, image: Size, patch_size: SizeLike | None, tokens: int | None) -> Size:
        if tokens is None:
            native: Geometry = vars(self)["_native"]
            return native.patch_size if patch_size is None else self._listed(patch_size)
        if patch_size is not None:
            raise GeometryError("give a patch_size or a budget of tokens, not both")
        if isinstance(tokens, bool) or not isinstance(tokens, int):
            raise GeometryError(f"tokens are a whole number of patches per image, not {tokens!r}")
        counts = {patch: count for patch in self.patch_sizes if (count := self._tokens(image, patch))}
        for patch, count in counts.items():
            if count <= tokens:
                return patch
        least = f"{min(counts.values())} are the fewest" if counts else "no patch size fits them"
        raise GeometryError(f"no patch size leaves at most {tokens} tokens of images of {show(image)}: {least}")

    def _tokens(self, image: Size, patch: Size) -> int:
        """Patches of an image; 0 where they do not fit."""
        try:
            grid = target_geometry(vars(self)["_native"], patch, image).grid
        except GeometryError:
            return 0
        return 0 if grid is None else math.prod(grid)

    # -- one model, whichever face is looked at --------------------------------------------------------------------

    def train(self, mode: bool = True) -> Flexible:
        """Sets the mode of the model and of all its views."""
        super().train(mode)
        for face in (self.model, *(made for made, _ in list(vars(self)["_views"].values()))):
            face.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.model.load_state_dict(*args, **kwargs)


def _pixels_name(module: nn.Module) -> str | None:
    """The argument that pixels are given by, where it is not the first."""
    names = list(inspect.signature(module.forward).parameters)
    return "pixel_values" if "pixel_values" in names[1:] else None
