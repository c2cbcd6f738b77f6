"""transformers' preprocessing, features, class names and tokenizers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from anypatch.core.twins import Subject
from anypatch.errors import DataError, UnsupportedModelError
from anypatch.hosts.images import IMAGENET, Classes, Encode, Features, Preprocess, captured, on_grid, pooled_of


def preprocess(subject: Subject, source: str | None = None) -> Preprocess:
    """As the image processor beside the checkpoint says, or by default the model type's own."""
    config: Any = subject.model.config
    name = str(getattr(config, "_name_or_path", "") or "")
    if source is not None:
        name = name or source.partition(":")[2] or source
    processor = _processor(name)
    if processor is not None:
        return _from_processor(processor)
    guess = _default_processor(config)
    note = f"no image processor was found beside {name or 'the model'}: the defaults of its class were used"
    return replace(_from_processor(guess) if guess is not None else Preprocess(), note=note)


def _processor(name: str) -> Any:
    if not name:
        return None
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False, local_files_only=Path(name).exists())
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


def features(subject: Subject, pixels: Tensor) -> Features:
    """What the model returns beside the hidden states of its vision part."""
    model: Any = subject.model
    if hasattr(model, "get_image_features"):
        if not hasattr(model, "vision_model"):
            return _of_tower(subject, pixels)
        with captured(model.vision_model) as seen:
            pooled = model.get_image_features(pixel_values=pixels)
        return Features(_tensor(pooled, "pooler_output"), on_grid(subject, _hidden(seen[-1]), pixels))
    base = getattr(model, "base_model", model)
    with captured(base) as seen:
        output = model(pixel_values=pixels)
    hidden = _hidden(seen[-1])
    patches = on_grid(subject, hidden, pixels)
    logits = getattr(output, "logits", None)
    pooled = getattr(output, "image_embeds", None)
    if pooled is None and "siglip" in str(getattr(model.config, "model_type", "")):
        pooled = getattr(seen[-1], "pooler_output", None)
    if pooled is None:
        pooled = pooled_of(subject, hidden, patches)
    return Features(pooled, patches, logits if isinstance(logits, Tensor) and logits.dim() == 2 else None)


def _of_tower(subject: Subject, pixels: Tensor) -> Features:
    """The hidden states of the image tower inside a vision-language model, which the language model is given.

    Raises:
        UnsupportedModelError: no tower takes plain images.
    """
    configs = [part.config for part in subject.about.parts if part.path]
    inside: Any = (m for m in subject.model.modules() if any(getattr(m, "config", None) is c for c in configs))
    tower: Any = next((m for m in inside if "pixel_values" in inspect.signature(m.forward).parameters), None)
    if tower is None:
        raise UnsupportedModelError(f"{type(subject.model).__name__} has no image tower whose features can be read")
    try:
        output = tower(pixels)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UnsupportedModelError(
            f"the {type(tower).__name__} in {type(subject.model).__name__} takes no plain images: {error}"
        ) from error
    hidden = _hidden(output)
    patches = on_grid(subject, hidden, pixels)
    return Features(pooled_of(subject, hidden, patches), patches)


def _hidden(output: Any) -> Tensor:
    return _tensor(output, "last_hidden_state")


def _tensor(output: Any, name: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    value = getattr(output, name, None)
    return value if isinstance(value, Tensor) else output[0]


def classes(subject: Subject) -> Classes:
    """Named by the configuration, unless all it says is ``LABEL_0``, ``LABEL_1``, …"""
    model: Any = subject.model
    if "ForImageClassification" not in type(model).__name__:
        return Classes()
    outputs = int(model.config.num_labels)
    names = tuple(str(model.config.id2label[i]) for i in range(outputs))
    return Classes(outputs, () if names == tuple(f"LABEL_{i}" for i in range(outputs)) else (names,))


def tokenize(subject: Subject, texts: Sequence[str], source: str | None = None) -> Encode:
    """By the tokenizer beside the checkpoint.

    Raises:
        DataError: the model has no text tower, or there is no tokenizer.
    """
    from transformers import AutoTokenizer

    model: Any = subject.model
    if not hasattr(model, "get_text_features"):
        raise DataError(f"class names are for models with a text tower, such as CLIP; {type(model).__name__} has none")
    name = str(getattr(model.config, "_name_or_path", "") or "") or (source or "").partition(":")[2]
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=Path(name).exists())
    except Exception as error:  # its many ways of saying that there is none
        raise DataError(f"class names need the model's tokenizer, and none was found at {name or 'it'}") from error
    padding = "max_length" if "siglip" in str(model.config.model_type) else True
    tokens = tokenizer(list(texts), padding=padding, truncation=True, return_tensors="pt")
    if len(tokens["input_ids"].unique(dim=0)) < len(set(texts)):  # transformers makes up an empty one without files
        raise DataError(f"the model's tokenizer, found at {name}, cannot tell the class names apart: is it complete?")

    def encode(towers: Any) -> Tensor:
        found = towers.get_text_features(**tokens)
        return found if isinstance(found, Tensor) else found.pooler_output

    return encode
