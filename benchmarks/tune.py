"""Tune the real DINOv2 ViT-S/14 for larger patches, and measure what is won back on photographs held out.

    python benchmarks/tune.py 28 16 32 8,14,16,28,32,56 [--steps 900] [--host transformers]
    python benchmarks/tune.py                # makes docs/tuning.md again from the rows that are there

Each row is stored in `docs/tuning/` when it is done, and kept: delete its file to measure it again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

import anypatch
import dinov2
import fidelity
import photographs
from anypatch.measure.accuracy import knn_accuracy, pool_to
from anypatch.report.colours import shared_colours

ROOT = Path(__file__).resolve().parents[1]
ROWS, PAGE, FIGURE = ROOT / "docs/tuning", ROOT / "docs/tuning.md", ROOT / "docs/figures/tuning.png"
TRAIN = dinov2.CACHE / "tune" / "train"
IMAGE = 224
KEPT = 640  # pixels of a wallpaper's shorter side: crops of a fifth of its area are not enlarged
SHOWN = 5  # of the fourteen photographs, a dahlia: of those that the larger patch harms much, or little is to be seen
HOSTS = {"timm": dinov2.timm_model, "transformers": dinov2.transformers_model}
# Of each stamp that trains: whether on photographs, a seed, and whether these are out of focus. Photographs taken from
# near, which the packages hold few of, are made so; one set of each, so that stamps are not most of what is seen.
SCENES = {"scene": (True, 1, False), "light": (False, 2, False), "near": (True, 3, True), "close": (True, 4, True)}
DRAWS = 3  # times that each stamp that tests is placed anew: the mean over them is less a matter of chance
PRECISION = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
Figures = dict[str, float]


def training() -> Path:
    """The folder that is learned from: photographs, wallpapers, and the training half of the stamps on crops of
    wallpapers, sharp and out of focus, and on light backgrounds."""
    if not TRAIN.exists():
        partial = TRAIN.with_name("partial")
        partial.mkdir(parents=True, exist_ok=True)
        paths = photographs.backgrounds()
        for number, path in enumerate(paths):
            with Image.open(path) as image:
                image.draft("RGB", (KEPT, KEPT))
                _small(image.convert("RGB")).save(partial / f"wallpaper-{number:03d}.jpg", quality=95)
        for number, photograph in enumerate(photographs.photographs()):
            _small(photograph).save(partial / f"photograph-{number:03d}.jpg", quality=95)
        members = photographs.stamps(half=0)
        for name, (on, seed, blurred) in SCENES.items():
            behind = paths if on else None
            for number, scene in enumerate(photographs.scenes(members, 2 * IMAGE, behind, seed, blurred)[0]):
                Image.fromarray(scene).save(partial / f"{name}-{number:03d}.jpg", quality=95)
        partial.rename(TRAIN)
    return TRAIN


def _small(image: Image.Image) -> Image.Image:
    share = min(KEPT / min(image.size), 1)
    return image.resize((round(image.width * share), round(image.height * share)), reducing_gap=2.0)


def native(host: str) -> torch.nn.Module:
    return anypatch.adapt(HOSTS[host](), image_size=IMAGE)


def held_out() -> dict[str, torch.Tensor]:
    """What the columns of cosines are measured on, as the model takes it: 28 crops of fourteen photographs, and one of
    each of the 200 photographs that test the Berkeley segmentation data, whose mean is less a matter of chance."""
    photographs.fetch(photographs.TESTING[0].partition("/")[0])  # or the test photographs are fewer
    files = photographs.berkeley("test")
    images = {"": dinov2.crops(fidelity.test_photographs()[0], 2, seed=7)}
    images["berkeley "] = dinov2.crops([np.asarray(Image.open(file).convert("RGB")) for file in files], 1, seed=7)
    return {name: dinov2.pixels(crops, IMAGE) for name, crops in images.items()}


def cosines(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """Mean cosines of class tokens, and of patch maps averaged onto the coarser of both grids, of two models' tokens.

    Enlarged to the finer grid, even the native features that were averaged onto the coarser one are .97 at patch 28.
    """
    classes = torch.cosine_similarity(found[:, 0], wanted[:, 0], dim=-1)
    maps = [tokens[:, 1:].unflatten(1, (round((tokens.shape[1] - 1) ** 0.5),) * 2) for tokens in (found, wanted)]
    grid = [min(sides) for sides in zip(*(m.shape[1:3] for m in maps), strict=True)]
    patches = torch.cosine_similarity(*(pool_to(m, grid) for m in maps), dim=-1)
    return float(classes.mean()), float(patches.mean())


def measured(model: torch.nn.Module, references: dict[str, torch.Tensor], pixels: dict[str, torch.Tensor]) -> Figures:
    """Cosines to the native features on the held-out crops, and what the test half of the stamps says."""
    found = stamps(model)
    for name in pixels:
        tokens = dinov2.features(model, pixels[name])
        found[f"{name}class"], found[f"{name}patch"] = cosines(tokens, references[name])
    return found


def stamps(model: torch.nn.Module, side: int | None = None) -> Figures:
    """k-NN accuracy (a stamp never its own neighbour) and the mask's intersection over union, on light backgrounds:
    means over the times that the stamps are placed.

    The mask is a logistic regression's on patch features: fitted to every other stamp, enlarged to pixels, tested on
    the others.

    Args:
        model: at its geometry.
        side: of a coarser grid, on which its features are averaged.
    """
    members = photographs.stamps(half=1)
    drawn = []
    for seed in range(DRAWS):
        images, masks, labels = photographs.scenes(members, IMAGE, seed=seed)
        tokens = dinov2.features(model, dinov2.pixels(images, IMAGE))
        grid = round((tokens.shape[1] - 1) ** 0.5)
        maps = pool_to(tokens[:, 1:].unflatten(1, (grid, grid)), (side or grid,) * 2)
        drawn.append((_accuracy(tokens[:, 0].numpy(), labels), _mask(maps, torch.from_numpy(np.stack(masks)).float())))
    accuracy, mask = np.mean(drawn, axis=0)
    return {"accuracy": float(accuracy), "mask": float(mask)}


def _accuracy(pooled: np.ndarray, labels: list[str]) -> float:
    number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    truth, every = [number[label] for label in labels], np.arange(len(labels))
    right = [
        knn_accuracy(pooled[every != i], [t for j, t in enumerate(truth) if j != i], pooled[i : i + 1], [truth[i]])[0]
        for i in every
    ]
    return float(np.mean(right))


def _mask(maps: torch.Tensor, exact: torch.Tensor) -> float:
    """Of patch features (n, h, w, c) and masks (n, height, width)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    side = maps.shape[1]
    covered = functional.adaptive_avg_pool2d(exact[:, None], side).flatten(1) > 0.5
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    probe.fit(maps[::2].flatten(0, 2).numpy(), covered[::2].flatten().numpy())
    said = torch.from_numpy(probe.decision_function(maps[1::2].flatten(0, 2).numpy())).view(-1, 1, side, side)
    drawn = functional.interpolate(said, (IMAGE, IMAGE), mode="bilinear")[:, 0] > 0
    both, either = (drawn & (exact[1::2] > 0)).sum((1, 2)), (drawn | (exact[1::2] > 0)).sum((1, 2))
    return float((both / either).mean())


def row(patches: list[int], host: str, steps: int, rate: float | str, precision: str | None) -> dict[str, Any]:
    """Tune for the patch sizes, and measure each before and after beside the native model."""
    pixels, teacher = held_out(), native(host)
    reference = {name: dinov2.features(teacher, crops) for name, crops in pixels.items()}
    found: dict[str, Any] = {"patches": patches, "host": host}
    found["native"] = measured(teacher, reference, pixels)
    found["native_mask"] = {p: stamps(teacher, IMAGE // p)["mask"] for p in patches if IMAGE // p < IMAGE // 14}
    found["before"] = {p: measured(anypatch.adapt(native(host), p, IMAGE), reference, pixels) for p in patches}
    tuned, began = native(host), time.process_time()
    several = len(patches) > 1
    result = anypatch.tune(
        tuned, images=training(), patch_size=patches if several else patches[0], image_size=IMAGE, steps=steps,
        learning_rate=rate, num_workers=0, device="cpu", precision=precision,
    )  # fmt: skip
    found |= {"cpu_seconds": time.process_time() - began, "settings": result.settings, "curve": result.curve,
              "notes": [note.replace(f"{ROOT}/", "") for note in result.notes], "folder": result.rows}  # fmt: skip
    faces = {p: anypatch.at(tuned, p, IMAGE) if several else tuned for p in patches}
    found["after"] = {p: measured(face, reference, pixels) for p, face in faces.items()}
    if patches == [28]:
        picture(teacher, anypatch.adapt(native(host), 28, IMAGE), tuned)
    return found


def picture(*models: torch.nn.Module) -> None:
    """One photograph, and its features at patch 14, 28 untouched and 28 tuned, in common colours; above the last two,
    their mean cosine to the first, on the coarser grid."""
    from matplotlib.figure import Figure

    crop = dinov2.crops(fidelity.test_photographs()[0], 1, seed=7)[SHOWN]
    tokens = [dinov2.features(model, dinov2.pixels([crop], IMAGE)) for model in models]
    maps = [[t[0, 1:].unflatten(0, (round((t.shape[1] - 1) ** 0.5), -1))] for t in tokens]
    titles = ["224 x 224 pixels", "patch 14"]
    for name, found in zip(("untouched", "tuned"), tokens[1:], strict=True):
        titles.append(f"patch 28, {name}: {cosines(found, tokens[0])[1]:.2f}")
    figure = Figure(figsize=(9.2, 2.6), dpi=100, layout="constrained")
    panels = [np.asarray(Image.fromarray(crop).resize((IMAGE, IMAGE))), *(panel for (panel,) in shared_colours(maps))]
    for axes, panel, title in zip(figure.subplots(1, len(panels)), panels, titles, strict=True):
        axes.imshow(panel, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, metadata={"Software": None}, pil_kwargs={"optimize": True})


def page(rows: list[dict[str, Any]]) -> str:
    """docs/tuning.md: its text from `benchmarks/tuning_notes.md`, its table from the rows."""
    lines = [
        "| tuned for | library | images | steps | precision | minutes | patch | | folder | class | patch map "
        "| Berkeley: class | patch map | accuracy | mask | of native on this grid |",
        f"|---|---|---:|---:|---|---:|---:|---|{'---:|' * 8}",
    ]
    for found in rows:
        head = f"| {', '.join(map(str, found['patches']))} | {found['host']} | {found['settings']['images']} "
        head += f"| {found['settings']['steps']} | {PRECISION[found['settings']['precision']]} "
        head += f"| {found['cpu_seconds'] / 120:.1f} "
        for patch in map(str, found["patches"]):
            for name, when in (("untouched", "before"), ("tuned", "after")):
                cells = f"{_folder(found, patch, when)} | {_cells(found[when][patch])} | {_ceiling(found, patch)}"
                lines.append(f"{head}| {patch} | {name} | {cells} |")
        lines.append(f"{head}| 14 | native | 1.000 | {_cells(found['native'])} | |")
    notes = (Path(__file__).with_name("tuning_notes.md")).read_text()
    return notes.replace("TABLE", "\n".join(lines))


def _folder(found: dict[str, Any], patch: str, when: str) -> str:
    """The mean fidelity of class and patch map on the held-out images of the folder that is learned from."""
    rows = [row for row in found.get("folder") or [] if row["patch_size"] == f"{patch}x{patch}"]
    return f"{(rows[0][f'fidelity_{when}'] + rows[0][f'patch_fidelity_{when}']) / 2:.3f}" if rows else ""


def _ceiling(found: dict[str, Any], patch: str) -> str:
    """The mask that the native features say when they are averaged onto the patch size's grid."""
    mask = (found.get("native_mask") or {}).get(patch)
    return "" if mask is None else f"{mask:.3f}"


def _cells(figures: Figures) -> str:
    names = ("class", "patch", "berkeley class", "berkeley patch", "accuracy", "mask")
    return " | ".join(f"{figures[name]:.3f}" for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patches", nargs="*", help="a patch size, or several with commas for one set of weights")
    parser.add_argument("--steps", type=int, default=260)
    parser.add_argument("--host", choices=HOSTS, default="timm")
    parser.add_argument("--learning-rate", type=float, help="found by the range test if not given")
    parser.add_argument("--precision", help="of the passes that train: bf16 where the processor has units for it")
    given = parser.parse_args()
    ROWS.mkdir(parents=True, exist_ok=True)
    for text in given.patches:
        target = ROWS / f"{given.host}-{text.replace(',', '-')}.json"
        if not target.exists():
            sizes, rate = [int(p) for p in text.split(",")], given.learning_rate or "auto"
            found = row(sizes, given.host, given.steps, rate, given.precision)
            target.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page([json.loads(path.read_text()) for path in sorted(ROWS.glob("*.json"))]))


if __name__ == "__main__":
    main()
