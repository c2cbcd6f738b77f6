"""One picture: an image, its patch grid and its patch features at several patch sizes, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from anypatch.adaptation import describe
from anypatch.core.geometry import Geometry, ImageSizeLike, Keep, SizeLike
from anypatch.core.tables import PositionsLike
from anypatch.errors import AnypatchError, DataError
from anypatch.files.paths import place
from anypatch.hosts.images import Preprocess
from anypatch.measure.accuracy import patch_fidelity
from anypatch.measure.decoding import reason
from anypatch.measure.features import Reader, at_geometry, dtype_of
from anypatch.measure.job import on_device
from anypatch.measure.loading import load_model
from anypatch.measure.pixels import as_rgb
from anypatch.measure.preprocess import preprocess_of
from anypatch.measure.processes import best_device, usable
from anypatch.measure.targets import Asked, Reference, show_side, targets_of
from anypatch.report.colours import shared_colours

if TYPE_CHECKING:
    from PIL.Image import Image

PAPER, INK, MUTED = (253, 253, 252), (27, 33, 38), (91, 101, 109)  # the report's colours
GAP = 12  # pixels between pictures


def view(
    source: str | Path | nn.Module,
    image: str | Path,
    patch_sizes: int | Sequence[SizeLike],
    *,
    image_size: ImageSizeLike | None = None,
    keep: Keep = "image",
    kernel: Any = "wiener",
    positions: PositionsLike = "antialias",
    arch: str | None = None,
    device: str | torch.device | None = None,
    reference: Reference | None = None,
    cell: int = 256,
    **host_kwargs: Any,
) -> Image:
    """Draw an image's patch grid and patch features, in common colours, one column per patch size.

    Args:
        source: what :func:`anypatch.load` takes, or a live model, which is left as it is.
        image: an image file.
        patch_sizes, image_size, keep, kernel, positions, arch, device: as in :func:`anypatch.sweep`.
        reference: ``"asked"`` or ``"native"`` as there: it is drawn, too, and the others' patch fidelity to it is said.
        cell: the width of a column in pixels.

    Raises:
        DataError: the image cannot be read.
        GeometryError: sizes that do not fit.
    """
    picture = _open(image)
    subject = describe(load_model(source, arch, host_kwargs))
    found = targets_of(subject, Asked(patch_sizes, image_size, keep, kernel, positions, reference or "asked"))
    targets = found.targets
    if reference is not None and found.reference not in targets:
        targets = [found.reference, *targets]
    preprocess = preprocess_of(subject, None if isinstance(source, nn.Module) else str(source))
    chosen = best_device() if device is None else usable(device)
    base = on_device(subject, chosen)
    views, features = [], []
    for target in targets:
        reader = Reader(at_geometry(base, target, kernel, positions))
        seen, patches = _seen(reader, target, preprocess, picture, chosen)
        views.append(seen)
        features.append(patches)
    heads = [_head(target, patches) for target, patches in zip(targets, features, strict=True)]
    if reference is not None:
        own = targets.index(found.reference)
        for column, (name, facts) in enumerate(heads):
            kept = patch_fidelity([features[column]], [features[own]])
            heads[column] = (f"{name} (reference)" if column == own else f"{name}, fidelity {kept:.3f}", facts)
    return _sheet(views, [line[0] for line in shared_colours([[f] for f in features])], heads, cell)


def _seen(
    reader: Reader, target: Geometry, preprocess: Preprocess, picture: Image, device: torch.device
) -> tuple[Image, Tensor]:
    """What a model sees of a picture, and its patch features (h, w, c)."""
    assert target.image_size is not None
    height, width = target.image_size
    seen = preprocess.view(picture, (height, width))
    pixels = torch.from_numpy(np.array(seen)).view(height, width, -1).permute(2, 0, 1)[None].to(device)
    return seen, reader(preprocess.normalise(pixels).to(dtype_of(reader.model))).patches[0].float().cpu()


def _head(target: Geometry, patches: Tensor) -> tuple[str, str]:
    """What stands above a column."""
    image, grid = show_side(target.image_size or ()), f"{patches.shape[0]} x {patches.shape[1]}"
    return f"patch {show_side(target.patch_size)}", f"image {image}, {grid} patches"


def save_view(picture: Image, path: str | Path) -> Path:
    """Write the picture; the file's ending chooses the format."""
    target = check_target(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target)
    except OSError as error:
        raise AnypatchError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def check_target(path: str | Path) -> Path:
    """The path, if pictures can be written with its ending.

    Raises:
        AnypatchError: an ending of no known format.
    """
    from PIL import Image as Pillow

    target = place(path)
    kind = Pillow.registered_extensions().get(target.suffix.lower())
    if kind not in Pillow.SAVE:
        raise AnypatchError(f"{target.name}: the ending has to be a picture's, such as .png")
    return target


def _open(path: str | Path) -> Image:
    from PIL import Image as Pillow

    if not place(path).exists():
        raise DataError(f"{path} does not exist: name an image file")
    if not place(path).is_file():  # a pipe would wait for a writer
        raise DataError(f"{path} is no file: name an image file")
    try:
        with Pillow.open(place(path)) as image:
            return as_rgb(image)
    except Exception as error:  # decoders raise many kinds
        raise DataError(f"{path} cannot be read as an image ({reason(error)})") from error


def _sheet(views: Sequence[Image], maps: Sequence[Any], heads: Sequence[tuple[str, str]], cell: int) -> Image:
    from PIL import Image as Pillow
    from PIL import ImageDraw, ImageFont

    heights = [round(cell * v.height / v.width) for v in views]
    large, small = (ImageFont.load_default(size) for size in (cell // 13, cell // 19))
    head = cell // 5
    size = (len(views) * (cell + GAP) + GAP, head + 2 * (max(heights) + GAP) + GAP)
    sheet = Pillow.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, (seen, features, (name, facts), height) in enumerate(zip(views, maps, heads, heights, strict=True)):
        left = GAP + column * (cell + GAP)
        draw.text((left, GAP), name, INK, large)
        draw.text((left, GAP + cell // 10), facts, MUTED, small)
        top = head + GAP
        shown = seen.convert("RGB").resize((cell, height), Pillow.Resampling.LANCZOS)
        sheet.paste(_with_grid(shown, features.shape[:2]), (left, top))
        coloured = Pillow.fromarray(features).resize((cell, height), Pillow.Resampling.NEAREST)
        sheet.paste(coloured, (left, top + height + GAP))
    return sheet


def _with_grid(image: Image, grid: tuple[int, int]) -> Image:
    """Lines between patches, light where the image is dark and dark where it is light."""
    pixels = np.array(image).astype(np.float32)
    mask = np.zeros(pixels.shape[:2], bool)
    for row in range(1, grid[0]):
        mask[math.floor(row * pixels.shape[0] / grid[0])] = True
    for column in range(1, grid[1]):
        mask[:, math.floor(column * pixels.shape[1] / grid[1])] = True
    light = pixels.mean(2, keepdims=True) > 127
    line = np.where(light, 0.0, 255.0)
    pixels = np.where(mask[..., None], 0.45 * pixels + 0.55 * line, pixels)
    from PIL import Image as Pillow

    return Pillow.fromarray(pixels.round().astype(np.uint8))
