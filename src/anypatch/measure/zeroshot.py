"""Classifying without training: a model's own head where its classes match, and CLIP's text tower."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from anypatch.adaptation import geometry
from anypatch.core.adapters import unwrap
from anypatch.errors import DataError

PROMPT = "a photo of a {}."


def head_columns(model: nn.Module, classes: Sequence[str]) -> tuple[list[int] | None, str]:
    """Which outputs of a model's classifier are the data's classes, in their order, and a note for the user.

    Names are compared where the model says them; where it does not, the number of classes has to agree, and their
    order is taken as that of the data.
    """
    inner: Any = unwrap(model)
    library = geometry(model).library
    outputs = _outputs(inner, library)
    if not outputs:
        return None, ""
    vocabularies = _vocabularies(inner, library, outputs)
    for names in vocabularies:
        places: dict[str, int] = {}
        for place, name in enumerate(names):
            for alias in (name, *name.split(", ")[:1]):
                places.setdefault(_plain(alias), place)
        if all(_plain(c) in places for c in classes):
            return [places[_plain(c)] for c in classes], ""
    if not vocabularies and outputs == len(classes):
        note = f"the model does not name its {outputs} classes: they are taken in the order of the data's"
        return list(range(outputs)), note
    return None, "the model's own classifier is not used: its classes are not the data's"


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ")


def _outputs(model: Any, library: str) -> int:
    if library == "timm":
        return int(getattr(model, "num_classes", 0) or 0)
    if library == "transformers":
        heads = "ForImageClassification" in type(model).__name__
        return int(model.config.num_labels) if heads else 0
    if library == "torchvision":
        head = getattr(model, "heads", None) or getattr(model, "head", None)
        layers = [m for m in head.modules() if isinstance(m, nn.Linear)] if isinstance(head, nn.Module) else []
        return layers[-1].out_features if layers else 0
    return 0


def _vocabularies(model: Any, library: str, outputs: int) -> list[list[str]]:
    """The ways in which a model's classes are known to be named, each in the order of its outputs."""
    if library == "transformers":
        names = [str(model.config.id2label[i]) for i in range(outputs)]
        return [] if names == [f"LABEL_{i}" for i in range(outputs)] else [names]
    if library == "torchvision":
        from torchvision.models._meta import _IMAGENET_CATEGORIES

        return [list(_IMAGENET_CATEGORIES)] if outputs == 1000 else []
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if cfg.get("label_names"):
        return [list(cfg["label_names"])]
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    if not subset:
        return []
    info = ImageNetInfo(subset)
    return [info.label_names(), info.label_descriptions()]


def text_features(model: nn.Module, names: Sequence[str], source: str | None) -> NDArray[np.float32]:
    """One vector per class from the model's text tower.

    Raises:
        DataError: the model has no text tower, or its tokenizer cannot be found.
    """
    inner: Any = copy.deepcopy(unwrap(model)).cpu().eval()
    prompts = [PROMPT.format(n) for n in names]
    with torch.no_grad():
        if hasattr(inner, "encode_text"):
            tokens = _open_clip_tokenizer(inner, source)(prompts)
            found = inner.encode_text(tokens)
        elif hasattr(inner, "get_text_features"):
            found = inner.get_text_features(**_transformers_tokens(inner, prompts, source))
            found = found if isinstance(found, torch.Tensor) else found.pooler_output
        else:
            raise DataError(
                f"class names are for models with a text tower, such as CLIP; {type(inner).__name__} has none"
            )
    return found.float().cpu().numpy()


def _open_clip_tokenizer(model: Any, source: str | None) -> Any:
    import open_clip

    if source and source.startswith("open_clip:"):
        name = source.removeprefix("open_clip:").partition("/")[0]
        if name in open_clip.list_models():
            return open_clip.get_tokenizer(name)
    vocabulary = getattr(model, "vocab_size", None)
    if vocabulary not in (None, 49408):
        raise DataError(f"the tokenizer for a vocabulary of {vocabulary} is not known: give the source by name")
    length = int(getattr(model, "context_length", 77))
    return open_clip.tokenizer.SimpleTokenizer(context_length=length)


def _transformers_tokens(model: Any, prompts: list[str], source: str | None) -> Any:
    from transformers import AutoTokenizer

    name = str(getattr(model.config, "_name_or_path", "") or "") or (source or "").partition(":")[2]
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=Path(name).exists())
    except Exception as error:  # its many ways of saying that there is none
        raise DataError(f"class names need the model's tokenizer, and none was found at {name or 'it'}") from error
    padding = "max_length" if "siglip" in str(model.config.model_type) else True
    tokens = tokenizer(prompts, padding=padding, truncation=True, return_tensors="pt")
    if len(tokens["input_ids"].unique(dim=0)) < len(set(prompts)):  # transformers makes up an empty one without files
        raise DataError(f"the model's tokenizer, found at {name}, cannot tell the class names apart: is it complete?")
    return tokens
