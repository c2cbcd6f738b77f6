"""Stand-ins for the pretrained weights and the files that documents name, with the same names and the same geometry.

Weights lie in the caches where the libraries look for what they downloaded before (Hugging Face's hub cache), so that
the documents' own lines run through the libraries' own loaders, without a network and with nothing replaced. A timm or
open_clip model is the real architecture with random weights; a transformers model has the real image and patch size and
few, narrow layers. What a document names is found in its text; a transformers model needs a row in `TRANSFORMERS`, a
file a row in `FILES`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REVISION = "0" * 40

_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_DINOV2 = {"model_type": "dinov2", "architectures": ["Dinov2Model"], "image_size": 518, "patch_size": 14, **_TINY}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "facebook/dinov2-small": _DINOV2,
    "facebook/dinov2-base": _DINOV2,
    "google/vit-base-patch16-224": {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "image_size": 224,
        "patch_size": 16,
        "num_labels": 1000,
        **_TINY,
    },
}
PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def provide(text: str, cache: Path, folder: Path) -> None:
    """Everything that a document's text names: weights into a hub cache, files into the folder where it will run."""
    torch.manual_seed(0)
    for name in sorted(timm_names(text)):
        _timm(name, cache)
    for name, tag in sorted(open_clip_names(text)):
        _open_clip(name, tag, cache)
    for name in sorted(n for n in TRANSFORMERS if n in text):
        save_transformers(TRANSFORMERS[name], _snapshot(cache, name))
    for name, make in FILES.items():
        if re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w.-])", text):
            make(folder / name)


def timm_names(text: str) -> set[str]:
    """timm's models whose pretrained weights a text asks for."""
    named = set(re.findall(r"timm:(\w+(?:\.\w+)?)", text))
    named |= set(re.findall(r'timm\.create_model\(\s*"([\w.]+)",\s*pretrained=True', text))
    return {name for name in named if name not in ("NAME",)}


def open_clip_names(text: str) -> set[tuple[str, str]]:
    """open_clip's models and tags that a text asks for."""
    found = set(re.findall(r"open_clip:([\w.-]+)/(\w+)", text))
    found |= set(re.findall(r'create_model\w*\(\s*"([\w.-]+)",\s*pretrained="(\w+)"', text))
    return {pair for pair in found if pair[0] != "NAME"}


def _snapshot(cache: Path, repository: str) -> Path:
    """The folder of a repository in the hub's cache, as a download leaves it."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(REVISION)
    snapshot = place / "snapshots" / REVISION
    snapshot.mkdir(parents=True, exist_ok=True)
    return snapshot


def _timm(name: str, cache: Path) -> None:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        return
    cfg = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    if cfg is None or not cfg.hf_hub_id:
        return
    repository = cfg.hf_hub_id + (f"{cfg.architecture}.{cfg.tag}" if cfg.hf_hub_id.endswith("/") else "")
    _save(timm.create_model(name).state_dict(), _snapshot(cache, repository) / "model.safetensors")


def _open_clip(name: str, tag: str, cache: Path) -> None:
    import open_clip

    cfg = open_clip.get_pretrained_cfg(name, tag)
    if not cfg:
        return
    repository, file = cfg["hf_hub"].rsplit("/", 1)
    model = open_clip.create_model(name, None, load_weights=False)
    _save(model.state_dict(), _snapshot(cache, repository) / (file or "open_clip_model.safetensors"))


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """In half the size: the libraries copy them into parameters of their own type."""
    from safetensors.torch import save_file

    save_file({k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in tensors.items()}, str(path))


def save_transformers(config: dict[str, Any], folder: Path) -> None:
    """A model of a configuration, with random weights and an image processor, as `save_pretrained` leaves it."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    kind = getattr(transformers, config["architectures"][0])
    kind(transformers.AutoConfig.from_pretrained(str(folder))).save_pretrained(str(folder))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))


def _photos(folder: Path, count: int = 6) -> None:
    """Real photographs: crops of two."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        _photo(folder / f"{number}.jpg", number)


def _many_photos(folder: Path) -> None:
    """As many as tuning asks for, and a fifth of them to be held out."""
    _photos(folder, 20)


def _photo(path: Path, number: int = 0) -> None:
    from PIL import Image
    from sklearn.datasets import load_sample_images

    picture = Image.fromarray(load_sample_images().images[number % 2])
    left = 60 * (number // 2) % 240
    top = number // 8
    picture.crop((left, top, left + 400, top + 400)).save(path)


def _classes(folder: Path) -> None:
    """Labelled images, apart for training and testing."""
    for part, number in (("train", 0), ("train", 2), ("val", 4)):
        for kind in (0, 1):
            place = folder / part / f"class-{kind}"
            place.mkdir(parents=True, exist_ok=True)
            _photo(place / f"{number}.jpg", number + kind)


def _clip(folder: Path, patch: int = 16) -> None:
    size = {**_TINY, "projection_dim": 16}
    config = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "vision_config": {**size, "image_size": 224, "patch_size": patch},
        "text_config": {**size, "vocab_size": 99, "eos_token_id": 98, "bos_token_id": 97},
        "projection_dim": 16,
    }
    save_transformers(config, folder)


def _clip14(folder: Path) -> None:
    _clip(folder, 14)


def _vit_file(path: Path, name: str = "vit_small_patch16_224") -> None:
    import timm

    torch.save(timm.create_model(name).state_dict(), path)


def _clip_file(path: Path) -> None:
    _vit_file(path, "vit_base_patch16_clip_quickgelu_224")


def _vit_tensors(path: Path) -> None:
    import timm

    _save(timm.create_model("vit_small_patch16_224").state_dict(), path)


FILES: dict[str, Callable[[Path], None]] = {
    "photos": _photos,
    "my-photos": _many_photos,
    "photo.jpg": _photo,
    "fashion-mnist": _classes,
    "clip": _clip,
    "clip-vit-large-patch14": _clip14,
    "checkpoint.pth": _vit_file,
    "vit.safetensors": _vit_tensors,
    "ViT-B-16.pt": _clip_file,
    "weights.pth": _vit_file,
}
