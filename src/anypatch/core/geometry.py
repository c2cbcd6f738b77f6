"""Patch size, image size and grid: what they are, how they fit, and what to say when they do not."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from anypatch.errors import GeometryError

Size = tuple[int, ...]
SizeLike = int | Sequence[int]
NEAREST = "nearest"
ImageSizeLike = SizeLike | Literal["nearest"]
Keep = Literal["image", "grid"]

MAX_SIDE = 1 << 16  # pixels; anything above is a typing mistake, and would allocate gigabytes


@dataclass(frozen=True, repr=False)
class Geometry:
    """How a model cuts its input into patches.

    >>> Geometry(patch_size=(14, 14), image_size=(518, 518), prefix_tokens=1, library="timm")
    Geometry(patch_size=(14, 14), image_size=(518, 518), grid=(37, 37), prefix_tokens=1, library='timm')

    Sizes are ``(height, width)`` in pixels, or ``(time, height, width)`` with frames first for video.

    Attributes:
        patch_size: the stride between patches, which is their size unless patches overlap.
        image_size: the size the model is built for; ``None`` for models without one (any size is accepted).
        grid: patches per axis; ``None`` where ``image_size`` is.
        prefix_tokens: tokens before the grid (class, register and distillation tokens).
        library: name of the host library.
        kernel_size: the size of the window that one patch sees, where it differs from ``patch_size``.
    """

    patch_size: Size
    image_size: Size | None = None
    prefix_tokens: int = 0
    library: str = "generic"
    kernel_size: Size | None = None
    explicit_grid: Size | None = None

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in ("patch_size", "image_size", "grid", "prefix_tokens", "library")}
        if self.overlapping:
            shown["kernel_size"] = self.kernel_size
        return f"Geometry({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def grid(self) -> Size | None:
        """Patches on each axis; ``None`` for a model of any image size."""
        if self.explicit_grid is not None:
            return self.explicit_grid
        if self.image_size is None:
            return None
        return tuple(i // p for i, p in zip(self.image_size, self.patch_size, strict=True))

    def _repr_html_(self) -> str:
        """The geometry as a table, in a notebook."""
        from anypatch.core.display import facts_table

        facts = {"patch size": show(self.patch_size), "image size": show(self.image_size), "grid": show(self.grid)}
        if self.overlapping:
            facts["kernel size"] = show(self.kernel_size)
        facts |= {"prefix tokens": str(self.prefix_tokens), "library": self.library}
        return facts_table("Geometry", facts)

    @property
    def overlapping(self) -> bool:
        """Whether neighbouring patches share pixels (kernel larger than stride)."""
        return self.kernel_size is not None and self.kernel_size != self.patch_size


def as_size(value: SizeLike | str, axes: int, name: str, current: Size | None = None) -> Size:
    """``value`` as a tuple of ``axes`` positive ints.

    An int, or a (height, width) pair for video, leaves the time axis at ``current``.

    Raises:
        GeometryError: not an int or a sequence of the right length, not positive, or absurdly large.
    """
    form = (
        "an int or a (height, width) pair"
        + (f', or "{NEAREST}"' if name == "image_size" and isinstance(value, str) else "")
        + (", or (time, height, width)" if axes == 3 else "")
    )
    if isinstance(value, (str, bytes)) or (not isinstance(value, Sequence) and not hasattr(value, "__index__")):
        raise GeometryError(f"{name} must be {form}, got {value!r}")
    items: Sequence[Any] = value if isinstance(value, Sequence) else (value,) * 2
    try:
        if any(isinstance(item, bool) for item in items):
            raise TypeError
        size = tuple(operator.index(item) for item in items)
    except TypeError:
        raise GeometryError(f"{name} must be {form}, got {value!r}") from None
    if axes == 3 and len(size) == 2:
        size = ((current[0] if current else 1), *size)
    if len(size) != axes:
        raise GeometryError(f"{name} must be {form}, got {value!r}")
    if any(side < 1 for side in size):
        raise GeometryError(f"{name} must be positive, got {value!r}")
    if any(side > MAX_SIDE for side in size):
        raise GeometryError(f"{name} must be at most {MAX_SIDE} on each axis, got {value!r}")
    return size


def show(size: Size | None) -> str:
    """A size as people write it: ``16`` or ``16x32``."""
    if size is None:
        return "any"
    return "x".join(map(str, size))


def parse_size(text: str, name: str) -> int | Size:
    """A size that a person typed: ``16``, or sides with an x between them, rows first.

    >>> parse_size("16", "--patch-size"), parse_size("16x32", "--patch-size")
    (16, (16, 32))

    Raises:
        GeometryError: anything else; a comma, which lists sizes elsewhere, is answered with the x that was meant.
    """
    sides = text.strip().lower().split("x")
    if 1 <= len(sides) <= 3 and all(re.fullmatch("[0-9]{1,9}", side) for side in sides):
        size = tuple(map(int, sides))
        if min(size) == 0:
            raise GeometryError(f"{name} must be positive, got {text!r}")
        return size[0] if len(size) == 1 else size
    meant = "x".join(part.strip() for part in text.split(","))
    if re.fullmatch("[0-9]+(x[0-9]+){1,2}", meant):
        raise GeometryError(f"{name} takes one size, got {text!r}: a rectangle is {meant}, HEIGHTxWIDTH")
    raise GeometryError(f"{name} must be a number of pixels such as 16, or HEIGHTxWIDTH such as 16x32, got {text!r}")


def parse_sizes(text: str, name: str) -> list[int | Size]:
    """Several sizes with commas between them: ``"8,14,16x32"`` is ``[8, 14, (16, 32)]``.

    Raises:
        GeometryError: a part that is no size.
    """
    try:
        return [parse_size(part, name) for part in text.split(",")]
    except GeometryError as error:
        wanted = "sizes with commas, such as 8,14,16x32, each positive"
        raise GeometryError(f"{name} takes {wanted}, got {text!r}") from error


def parse_image_size(text: str, name: str) -> int | Size | Literal["nearest"]:
    """A size, or the word ``nearest``.

    Raises:
        GeometryError: neither.
    """
    if text.strip().lower() == NEAREST:
        return "nearest"
    try:
        return parse_size(text, name)
    except GeometryError as error:
        raise GeometryError(f'{error}; or "{NEAREST}", the nearest size that the patch divides') from None


def target_geometry(
    current: Geometry,
    patch_size: SizeLike | None = None,
    image_size: ImageSizeLike | None = None,
    keep: Keep = "image",
) -> Geometry:
    """The geometry that ``adapt`` is asked for.

    Args:
        current: the model's present geometry.
        patch_size, image_size: as given by the user; ``None`` keeps it, as ``keep`` says. ``image_size="nearest"``
            is the size nearest to the present one that the patch divides, on each axis by itself.
        keep: without ``image_size``, ``"image"`` keeps the image size and ``"grid"`` keeps the grid.

    Raises:
        GeometryError: bad sizes, a bad ``keep``, or a patch that does not divide the image.
    """
    if keep not in ("image", "grid"):
        raise GeometryError(f'keep must be "image" or "grid", got {keep!r}')
    axes = len(current.patch_size)
    patch = current.patch_size
    if patch_size is not None:
        patch = as_size(patch_size, axes, "patch_size", current.patch_size)
    kernel = scaled_kernel(current, patch)
    _require_whole_kernel(current, patch)
    image: Size | None
    if isinstance(image_size, str) and image_size == NEAREST:
        image = None if current.image_size is None else nearest_image(current, patch, kernel)
    elif image_size is not None:
        image = as_size(image_size, axes, "image_size", current.image_size)
    elif current.image_size is None:
        image = None
    elif keep == "grid" and patch != current.patch_size:
        assert current.grid is not None
        image = _image_of(current.grid, patch, kernel)
    else:
        image = current.image_size
    target = replace(current, patch_size=patch, image_size=image, kernel_size=kernel, explicit_grid=None)
    if image is None:
        return target
    if target.overlapping:
        assert kernel is not None
        grid = tuple((i - k) // p + 1 for i, k, p in zip(image, kernel, patch, strict=True))
        if min(grid) < 1:
            raise GeometryError(f"image_size {show(image)} is smaller than the patch kernel {show(kernel)}")
        return replace(target, explicit_grid=grid)
    _require_divisible(image, patch, current, image_size is not None, _first_axis(patch, patch_size, image_size))
    return target


def _first_axis(patch: Size, patch_size: SizeLike | None, image_size: ImageSizeLike | None) -> str:
    """What was taken for an axis that the caller did not name: the frames of a clip, the depth of a volume."""
    given = [size for size in (patch_size, image_size) if size is not None and size != NEAREST]
    short = [size for size in given if not isinstance(size, Sequence) or len(size) < len(patch)]
    if len(patch) < 3 or not short:
        return ""
    first = patch[0]
    everywhere = (patch[-1],) * len(patch)
    if patch_size is None or patch_size not in short:
        return " (one or two numbers are height and width; give three, the first of time or depth, to change all)"
    return (
        f" (one or two numbers are height and width, and the first axis, time or depth, keeps its {first}: "
        f"patch_size={everywhere} changes all three)"
    )


def _require_whole_kernel(current: Geometry, patch: Size) -> None:
    """Where patches overlap, the kernel scales with the stride, and has to be a whole number of pixels."""
    if not current.overlapping or current.kernel_size is None:
        return
    units = [old // math.gcd(old, k) for old, k in zip(current.patch_size, current.kernel_size, strict=True)]
    if any(new % unit for new, unit in zip(patch, units, strict=True)):
        sides = [sorted({max(new // u, 1) * u, -(-new // u) * u}) for new, u in zip(patch, units, strict=True)]
        fits = dict.fromkeys(tuple(side[i] for side in sides) for i in (0, -1))
        kernels = [scaled_kernel(current, size) for size in fits]
        would = " or ".join(f"{show(size)} (kernel {show(k)})" for size, k in zip(fits, kernels, strict=True))
        raise GeometryError(
            f"patches overlap (kernel {show(current.kernel_size)}, stride {show(current.patch_size)}), and patch_size "
            f"is their stride, which scales the kernel: {show(patch)} would give it a fraction of a pixel; use {would}"
        )


def nearest_image(current: Geometry, patch: Size, kernel: Size | None = None) -> Size:
    """The image size nearest to the present one that holds whole patches, on each axis by itself.

    Half way between two, it is the larger: an image can be enlarged to it without losing a pixel, while the smaller
    one drops detail that the model has seen in training. At least one patch; the present size where the patch stays,
    and where patches overlap, as then every size that holds one window fits.
    """
    assert current.image_size is not None
    if patch == current.patch_size:
        return current.image_size
    if current.overlapping and kernel is not None:
        return tuple(max(side, window) for side, window in zip(current.image_size, kernel, strict=True))
    return tuple(max(1, (2 * side + p) // (2 * p)) * p for side, p in zip(current.image_size, patch, strict=True))


def scaled_kernel(current: Geometry, patch: Size) -> Size | None:
    """The kernel of an overlapping stem, scaled with its stride."""
    if current.kernel_size is None:
        return None
    return tuple(
        max(new, round(k * new / old))
        for k, new, old in zip(current.kernel_size, patch, current.patch_size, strict=True)
    )


def with_grid(geometry: Geometry, grid: Size) -> Geometry:
    """The geometry with the image size that gives this grid, its patch as it is.

    >>> with_grid(Geometry((16, 16), (224, 224)), (2, 3)).image_size
    (32, 48)
    """
    image = _image_of(grid, geometry.patch_size, geometry.kernel_size)
    return replace(geometry, image_size=image, explicit_grid=grid if geometry.overlapping else None)


def _image_of(grid: Size, patch: Size, kernel: Size | None) -> Size:
    """The smallest image of so many patches; the last of them may be wider than the stride."""
    return tuple((g - 1) * p + k for g, p, k in zip(grid, patch, kernel or patch, strict=True))


def _require_divisible(image: Size, patch: Size, current: Geometry, asked: bool, axes: str = "") -> None:
    if all(i % p == 0 for i, p in zip(image, patch, strict=True)):
        return
    if image == current.image_size and patch == current.patch_size:
        return  # built like this (a convolution drops the margin); nothing is asked to change
    below = tuple(max(i // p, 1) * p for i, p in zip(image, patch, strict=True))
    above = tuple(-(-i // p) * p for i, p in zip(image, patch, strict=True))
    images = " or ".join(dict.fromkeys((show(below), show(above))))
    smaller = tuple(_divisor(i, p, -1) for i, p in zip(image, patch, strict=True))
    larger = tuple(_divisor(i, p, +1) for i, p in zip(image, patch, strict=True))
    patches = " or ".join(dict.fromkeys((show(smaller), show(larger))))
    close = show(nearest_image(replace(current, image_size=image), patch))
    other = (
        ""
        if asked or current.image_size is None
        else f'; or image_size="{NEAREST}", which is {close}; '
        f'or keep="grid", which changes the image size with the patch'
    )
    raise GeometryError(
        f"patch_size {show(patch)} does not divide image_size {show(image)}{axes}: use image_size {images}, "
        f"or patch_size {patches}{other}"
    )


def _divisor(side: int, near: int, step: int) -> int:
    """The divisor of ``side`` nearest to ``near`` in the direction of ``step``."""
    candidate = min(near, side)
    while 1 < candidate < side and side % candidate:
        candidate += step
    return candidate
