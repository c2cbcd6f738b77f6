"""What tests of several rooms build: small ViTs, pictures with squares of a class's own colour, CLIP by other names."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

COLOURS = {"blue": (40, 60, 230), "green": (40, 200, 60), "red": (220, 40, 40)}


def vit(**options: Any) -> Any:
    """timm's ViT at patch 8 and image 32, without a classifier: the same weights every time, as timm makes them."""
    import timm

    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **options}).eval()


def random_vit(**options: Any) -> Any:
    """The same class with a classifier, every parameter random: norms, biases and scales show, too."""
    import timm

    from anypatch.proof import randomise

    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2, "num_classes": 5}
    model = timm.models.VisionTransformer(**{**sizes, **options}).eval()
    with torch.no_grad():
        randomise(model, torch.Generator().manual_seed(1))
    return model


# The widths of a small model of transformers, as nearly all of its configurations name them.
SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


def transformers_model(kind: str = "ViT", head: str = "Model", **options: Any) -> Any:
    """A small model of transformers at patch 8 and image 32, its weights drawn: `transformers_model("Dinov2")`."""
    import pytest

    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, "image_size": 32, "patch_size": 8, **options})
    return getattr(transformers, kind + head)(config).eval()


def picture(colour: tuple[int, int, int], seed: int, height: int = 44, width: int = 60) -> NDArray[np.uint8]:
    """One picture; its seed decides the noise and where the square is."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(60, 190, (height, width, 3))
    top, left = generator.integers(0, height - 20), generator.integers(0, width - 24)
    pixels[top : top + 20, left : left + 24] = colour
    return pixels.astype(np.uint8)


def write(path: Path, colour: tuple[int, int, int], seed: int) -> Path:
    """Write one picture as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(colour, seed)).save(path)
    return path


def image_folder(root: Path, count: int = 6, classes: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """`root/CLASS/*.png`, `count` pictures of each class."""
    for number, name in enumerate(classes):
        for index in range(count):
            colour = COLOURS.get(name, (90 * number, 30, 200))
            write(root / name / f"{index}.png", colour, 100 * number + index)
    return root


def split_folder(root: Path, train: int = 8, test: int = 4, classes: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """`root/train/CLASS/*.png` and `root/val/CLASS/*.png`."""
    image_folder(root / "train", train, classes)
    for number, name in enumerate(classes):
        for index in range(test):
            colour = COLOURS.get(name, (90 * number, 30, 200))
            write(root / "val" / name / f"{index}.png", colour, 5000 + 100 * number + index)
    return root


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def openai(state: dict[str, Tensor], prefix: str = "visual.") -> dict[str, Tensor]:
    """A timm CLIP tower under OpenAI's names."""
    swaps = (
        ("patch_embed.proj", "conv1"), ("pos_embed", "positional_embedding"), ("norm_pre", "ln_pre"),
        ("attn.qkv.", "attn.in_proj_"), ("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("norm1", "ln_1"),
        ("mlp.fc2", "mlp.c_proj"), ("norm2", "ln_2"), ("blocks.", "transformer.resblocks."),
    )  # fmt: skip
    result = {}
    for name, tensor in state.items():
        if name == "head.bias":
            continue
        if name == "cls_token":
            name, tensor = "class_embedding", tensor[0, 0]
        elif name == "head.weight":
            name, tensor = "proj", tensor.T.contiguous()
        elif name == "pos_embed":
            tensor = tensor[0]
        for ours, theirs in swaps:
            name = name.replace(ours, theirs)
        if name.startswith("norm."):
            name = name.replace("norm.", "ln_post.")
        result[prefix + name] = tensor.contiguous()
    return result


CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": {"context_length": 8, "vocab_size": 30, "width": 32, "heads": 2, "layers": 1},
}
