"""The preprocessing that each host library gives a model, at any image size."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anypatch.adaptation import geometry
from anypatch.core.adapters import unwrap
from anypatch.errors import UnsupportedModelError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes a model's input.

    Attributes:
        mean, std: per channel, for pixels in 0..1.
        interpolation: Pillow's name for it, in lower case.
        crop: the side that is kept after resizing, as a share of the resized side.
        mode: ``"center"`` resizes the shorter side and cuts the middle; ``"squash"`` resizes both sides;
            ``"pad"`` resizes the longer side and pads.
        fill: colour of the padding.
        rounds_down: whether half a pixel beside the cut is rounded down (transformers) or to even (torchvision).
        note: anything about it that the user should know; empty if nothing.
    """

    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    interpolation: str = "bicubic"
    crop: float = 1.0
    mode: str = "center"
    fill: tuple[int, ...] = (0, 0, 0)
    rounds_down: bool = False
    note: str = ""

    @property
    def channels(self) -> int:
        return len(self.mean)

    def view(self, image: Image, size: tuple[int, int]) -> Image:
        """The image as the model sees it: RGB or grey, ``size`` = (height, width)."""
        from PIL import Image as Pillow

        image = image.convert("L" if self.channels == 1 else "RGB")
        resample = Pillow.Resampling[self.interpolation.upper()]
        target = self._resized(image, size)
        if target != image.size:
            image = image.resize(target, resample)
        (left, from_left), (top, from_top) = (
            self._corner(have, want) for have, want in ((image.width, size[1]), (image.height, size[0]))
        )
        image = image.crop((left, top, min(left + size[1], image.width), min(top + size[0], image.height)))
        if image.size == (size[1], size[0]):
            return image
        canvas = Pillow.new(image.mode, (size[1], size[0]), self.fill[0] if self.channels == 1 else self.fill)
        canvas.paste(image, (from_left, from_top))
        return canvas

    def _corner(self, have: int, want: int) -> tuple[int, int]:
        """Along one axis, where to start cutting, and how much to pad before."""
        if have < want:
            return 0, (want - have) // 2
        return (have - want) // 2 if self.rounds_down else round((have - want) / 2.0), 0

    def _resized(self, image: Image, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) to resize to, before cropping or padding."""
        height, width = (math.floor(side / self.crop) for side in size)
        if self.mode == "squash":
            return width, height
        if self.mode == "pad":
            ratio = max(image.height / height, image.width / width)
            return max(round(image.width / ratio), 1), max(round(image.height / ratio), 1)
        if height == width:  # the rounding of torchvision's Resize(int)
            if image.width <= image.height:
                return width, int(width * image.height / image.width)
            return int(height * image.width / image.height), height
        ratio = min(image.height / height, image.width / width)
        return max(round(image.width / ratio), width), max(round(image.height / ratio), height)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Bytes (n, c, h, w) to a model's floats."""
        mean = torch.tensor(self.mean, device=pixels.device)[:, None, None]
        std = torch.tensor(self.std, device=pixels.device)[:, None, None]
        return (pixels.float() / 255 - mean) / std

    def describe(self) -> str:
        """One line for people."""
        kept = "" if self.crop == 1 else f", crop {self.crop:.3g}"
        mean, std = (", ".join(f"{v:.3g}" for v in values) for values in (self.mean, self.std))
        return f"{self.interpolation}, {self.mode}{kept}, mean ({mean}), std ({std})"


def preprocess_of(model: nn.Module, source: str | None = None) -> Preprocess:
    """A model's own preprocessing.

    Args:
        model: a live model, at any geometry.
        source: where it was loaded from, which for some libraries is the only place that says.

    Raises:
        UnsupportedModelError: the model takes neither RGB nor grey images.
    """
    inner: Any = unwrap(model)
    library = geometry(model).library
    finder = {
        "timm": _timm,
        "transformers": _transformers,
        "open_clip": _open_clip,
        "torchvision": _torchvision,
    }.get(library)
    if finder is None:
        note = f"{type(inner).__name__} does not say its preprocessing: ImageNet's was used"
        return _for_channels(Preprocess(note=note), inner)
    return _for_channels(finder(inner, source), inner)


def _for_channels(preprocess: Preprocess, model: Any) -> Preprocess:
    """Grey models get one mean; models of other inputs than images are refused."""
    config = getattr(model, "config", None)
    for said in (getattr(model, "in_chans", None), getattr(config, "num_channels", None)):
        if isinstance(said, int):
            if said not in (1, 3):
                raise UnsupportedModelError(
                    f"{type(model).__name__} takes {said} channels; images have three, or one if grey"
                )
            if said != preprocess.channels:
                mean, std = ((sum(values) / len(values),) * said for values in (preprocess.mean, preprocess.std))
                return replace(preprocess, mean=mean, std=std)
            break
    return preprocess


def _timm(model: Any, source: str | None) -> Preprocess:
    from timm.data import resolve_model_data_config

    cfg = resolve_model_data_config(model)
    mode = {"center": "center", "squash": "squash", "border": "pad"}[cfg.get("crop_mode") or "center"]
    mean = tuple(cfg["mean"])
    return Preprocess(
        mean,
        tuple(cfg["std"]),
        _interpolation(cfg["interpolation"]),
        float(cfg["crop_pct"]),
        mode,
        tuple(round(255 * v) for v in mean),
    )


def _open_clip(model: Any, source: str | None) -> Preprocess:
    visual = getattr(model, "visual", model)
    cfg = dict(getattr(visual, "preprocess_cfg", None) or {})
    mean = cfg.get("mean") or getattr(visual, "image_mean", None) or CLIP[0]
    std = cfg.get("std") or getattr(visual, "image_std", None) or CLIP[1]
    mode = {"squash": "squash", "longest": "pad"}.get(cfg.get("resize_mode") or "shortest", "center")
    fill = cfg.get("fill_color", 0)
    colour = tuple(fill) if isinstance(fill, (tuple, list)) else (fill,) * 3
    return Preprocess(tuple(mean), tuple(std), _interpolation(cfg.get("interpolation", "bicubic")), 1.0, mode, colour)


def _torchvision(model: Any, source: str | None) -> Preprocess:
    name = (source or "").rpartition("/")[2]
    architecture = (source or "").partition(":")[2].partition("/")[0]
    with contextlib.suppress(Exception):
        from torchvision.models import get_model_weights

        weights = get_model_weights(architecture)
        chosen = weights["DEFAULT" if name in ("", "DEFAULT") else name]
        return _from_presets(chosen.transforms())
    note = "the torchvision model does not say its weights: ImageNet's usual preprocessing was used"
    return Preprocess(crop=224 / 256, interpolation="bilinear", note=note)


def _from_presets(presets: Any) -> Preprocess:
    crop = presets.crop_size[0] / presets.resize_size[0]
    return Preprocess(tuple(presets.mean), tuple(presets.std), presets.interpolation.value, crop)


def _transformers(model: Any, source: str | None) -> Preprocess:
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if source is not None:
        name = name or source.partition(":")[2] or source
    processor = _processor(name)
    if processor is not None:
        return _from_processor(processor)
    guess = _default_processor(model.config)
    note = f"no image processor was found beside {name or 'the model'}: the defaults of its class were used"
    return replace(_from_processor(guess) if guess is not None else Preprocess(), note=note)


def _processor(name: str) -> Any:
    if not name:
        return None
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name, local_files_only=Path(name).exists())
    except (OSError, ValueError, KeyError, ImportError):
        return None


def _default_processor(config: Any) -> Any:
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as NAMES

    kind = str(getattr(config, "model_type", ""))
    if kind.startswith("dinov2"):
        # DINOv2's checkpoints all use ImageNet's mean, unlike the class they name.
        return transformers.BitImageProcessor(
            image_mean=IMAGENET[0],
            image_std=IMAGENET[1],
            size={"shortest_edge": 256},
            crop_size={"height": 224, "width": 224},
        )
    names = NAMES.get(kind)
    candidates = list(names.values()) if isinstance(names, dict) else list(names or ())
    for name in candidates:
        with contextlib.suppress(Exception):
            return getattr(transformers, str(name))()
    return None


def _from_processor(processor: Any) -> Preprocess:
    from PIL import Image as Pillow

    def side(value: Any, name: str) -> int:
        if isinstance(value, int):
            return value
        return int((value.get(name) if isinstance(value, dict) else getattr(value, name, None)) or 0)

    def pair(value: Any) -> tuple[int, int] | None:
        found = side(value, "height"), side(value, "width")
        return found if all(found) else None

    size: Any = processor.size
    shortest = 0 if isinstance(size, int) else side(size, "shortest_edge")
    cropped = pair(getattr(processor, "crop_size", None)) if getattr(processor, "do_center_crop", False) else None
    crop, mode = 1.0, "center"
    if not shortest:
        mode = "squash"
        resized = pair(size)
        if cropped and resized:
            crop = min(cropped[0] / resized[0], 1.0)
    elif cropped:
        crop = min(cropped[0] / shortest, 1.0)
    resample = getattr(processor, "resample", None)
    number = int(resample) if resample is not None else int(Pillow.Resampling.BICUBIC)
    usual = getattr(processor, "do_normalize", True)
    mean = tuple(processor.image_mean) if usual else (0.0, 0.0, 0.0)
    std = tuple(processor.image_std) if usual else (1.0, 1.0, 1.0)
    return Preprocess(mean, std, Pillow.Resampling(number).name.lower(), crop, mode, rounds_down=True)


def _interpolation(name: Any) -> str:
    name = str(name).lower()
    return name if name in ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming") else "bilinear"
