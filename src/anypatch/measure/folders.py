"""Folders of image files: with a folder per class, or without labels.

The walk is our own: torchvision's ``ImageFolder`` follows links round in circles, takes hidden folders for classes, and
knows no held-out part.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anypatch.errors import DataError, listed
from anypatch.files.paths import place
from anypatch.measure.images import TEST, TRAIN, Data, ImageSet, split
from anypatch.measure.pixels import as_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset(
    f".{kind}"
    for kind in ("jpg", "jpeg", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jp2", "ppm", "pgm", "pbm")
)


@dataclass(frozen=True)
class _Files:
    """Decodes image files."""

    paths: tuple[Path, ...]

    def __call__(self, index: int) -> Image:
        from PIL import Image as Pillow

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF and the like; what matters is whether it decodes
            with Pillow.open(self.paths[index]) as image:
                return as_rgb(image)


@dataclass(frozen=True)
class _Headers:
    """Opens image files without decoding them."""

    paths: tuple[Path, ...]

    def __call__(self, index: int) -> None:
        from PIL import Image as Pillow

        with Pillow.open(self.paths[index]):
            pass


def existing(folder: str | Path) -> Path:
    root = place(folder)
    if not root.is_dir():
        raise DataError(f"{folder}: {'not a folder' if root.exists() else 'no such folder'}")
    return root


def images_under(root: Path) -> list[Path]:
    """Every image file under a folder, hidden ones left out, in one order on every machine."""
    found = (p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts))


def image_files(
    name: str,
    root: Path,
    paths: Sequence[Path],
    labels: Sequence[int] | None = None,
    classes: Sequence[str] = (),
) -> ImageSet:
    if not paths:
        raise DataError(f"{name}: no images in it (looked for {', '.join(sorted(SUFFIXES)[:6])}, ... at any depth)")
    stats = [p.stat() for p in paths]
    return ImageSet(
        name,
        tuple(p.relative_to(root).as_posix() for p in paths),
        _Files(tuple(paths)),
        tuple(f"{s.st_size}:{s.st_mtime_ns}" for s in stats),
        None if labels is None else tuple(labels),
        tuple(classes),
        _Headers(tuple(paths)),
    )


def class_folder(name: str, root: Path) -> Data:
    train = next((root / n for n in TRAIN if (root / n).is_dir()), None)
    test = next((root / n for n in TEST if (root / n).is_dir()), None)
    if train and test:
        return _split_folder(name, root, train, test)
    images = images_under(root)
    relative = [p.relative_to(root).parts for p in images]
    if not images or any(len(parts) == 1 for parts in relative):
        return Data(image_files(name, root, images))
    classes = sorted({parts[0] for parts in relative})
    numbers = {c: i for i, c in enumerate(classes)}
    everything = image_files(name, root, images, [numbers[parts[0]] for parts in relative], classes)
    empty = _without_images(root, classes)
    return split(everything, empty)


def _split_folder(name: str, root: Path, train: Path, test: Path) -> Data:
    sets = []
    for part in (train, test):
        images = images_under(part)
        if not images:
            raise DataError(f"{name}: no images in {part.name}/")
        loose = [p for p in images if len(p.relative_to(part).parts) == 1]
        if loose:
            raise DataError(
                f"{name}: {loose[0].relative_to(root)} is in no class folder (expected {part.name}/CLASS/IMAGE); "
                "for images without labels use images="
            )
        sets.append((part, images, [p.relative_to(part).parts[0] for p in images]))
    classes = sorted(set(sets[0][2]))
    unknown = sorted(set(sets[1][2]) - set(classes))
    if unknown:
        raise DataError(f"{name}: {test.name}/ has classes that {train.name}/ has not: {listed(unknown)}")
    numbers = {c: i for i, c in enumerate(classes)}
    learned, tested = (
        image_files(name, root, images, [numbers[c] for c in owners], classes) for _, images, owners in sets
    )
    notes = _without_images(train, classes)
    missing = sorted(set(classes) - set(sets[1][2]))
    if missing:
        notes.append(f"{name}: {test.name}/ has no images of {listed(missing)}")
    return Data(tested, learned, notes)


def _without_images(root: Path, classes: Sequence[str]) -> list[str]:
    folders = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    empty = sorted(folders - set(classes))
    return [f"{root.name}: class folders without images, left out: {listed(empty)}"] if empty else []
