"""A whole CLIP model of open_clip with the tensors of a file, at the geometry that they were trained at."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from anypatch.core.empty import empty
from anypatch.errors import CheckpointError
from anypatch.files import layouts
from anypatch.files.reading import Checkpoint
from anypatch.files.tensors import assign, compared, rooted_for, shapes
from anypatch.hosts.base import plain, unknown
from anypatch.hosts.open_clip.config import LOCAL, REMEMBERED, construct
from anypatch.hosts.open_clip.safety import require_no_code, require_safe


def fit(name: str, checkpoint: Checkpoint, **host_kwargs: Any) -> nn.Module:
    """A whole CLIP model of open_clip with a file's weights, at the geometry they were trained at.

    Raises:
        CheckpointError: the file does not fit ``name``.
        UnsupportedModelError: open_clip knows no such model.
    """
    import open_clip

    checkpoint.require_one()
    if name.startswith(LOCAL):
        return from_config(require_safe(Path(name[len(LOCAL) :])), checkpoint)
    name = name.split("/")[0]
    model = build_for(name, layouts.native(checkpoint.tensors), host_kwargs)
    checkpoint = rooted_for(model, checkpoint)
    assign(model, renamed(model, checkpoint, f"open_clip:{name}"), checkpoint, f"open_clip:{name}")
    vars(model)[REMEMBERED] = open_clip.get_model_config(name)
    return model


def from_config(cfg: dict[str, Any], checkpoint: Checkpoint) -> nn.Module:
    """The model of an ``open_clip_config.json`` with its weights.

    Raises:
        CheckpointError: the file does not fit the configuration, or no model can be built from it.
    """
    _require_no_code(cfg)
    try:
        model = empty(lambda: construct(cfg))
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint.path.parent}: open_clip cannot build the model of its configuration ({error})"
        ) from error
    return assign(model, renamed(model, checkpoint, "open_clip"), checkpoint, "open_clip")


def build_for(name: str, native: layouts.Native, host_kwargs: Mapping[str, Any]) -> nn.Module:
    """An empty open_clip model at a file's native geometry.

    Raises:
        UnsupportedModelError: open_clip knows no such model.
    """
    import open_clip
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg

    cfg = open_clip.get_model_config(name)
    if cfg is None:
        raise unknown("open_clip", name, open_clip.list_models())
    _require_no_code(cfg)
    vision = cfg["vision_cfg"]
    if "timm_model_name" not in vision and native.patch is not None:
        vision["patch_size"] = native.patch[0]
    if native.image is not None:
        vision["image_size"] = plain(native.image)
    options = {k: v for k, v in host_kwargs.items() if k in inspect.signature(open_clip.create_model).parameters}
    if options:  # of open_clip's own factory, which knows what they mean
        without = {"load_weights": False, "pretrained_text": False}
        arguments = {"vision_cfg": vision, **without, **host_kwargs}
        return empty(lambda: open_clip.create_model(name, **arguments))
    model: Any = empty(lambda: construct(cfg, **host_kwargs))
    set_model_preprocess_cfg(model, {**asdict(PreprocessCfg()), "size": model.visual.image_size})
    return model


def _require_no_code(cfg: Mapping[str, Any]) -> None:
    """As :func:`require_no_code`, of the text tower that a configuration names, if it names one."""
    text = cfg.get("text_cfg")
    if isinstance(text, dict) and "hf_model_name" in text:
        require_no_code(text["hf_model_name"])


def renamed(model: Any, checkpoint: Checkpoint, arch: str) -> dict[str, Tensor]:
    """The file's tensors under open_clip's names, by open_clip's own converters."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    tensors = dict(checkpoint.tensors)
    for name in ("input_resolution", "context_length", "vocab_size"):  # OpenAI's archives
        tensors.pop(name, None)
    try:
        tensors = convert_state_dict(model, tensors)
        if "positional_embedding" in tensors and not hasattr(model, "positional_embedding"):
            tensors = convert_to_custom_text_state_dict(tensors)
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint.path} does not fit {arch}: open_clip's converter failed ({type(error).__name__}: {error})"
        ) from error
    for name in ("logit_scale", "logit_bias"):
        own = getattr(model, name, None)
        if name in tensors and own is not None and own.numel() == tensors[name].numel():
            tensors[name] = tensors[name].reshape(own.shape)
    tensors.pop("text.transformer.embeddings.position_ids", None)
    return tensors


def candidates(checkpoint: Checkpoint) -> Iterator[str]:
    """open_clip's models that hold exactly the file's tensors."""
    import open_clip

    tensors = checkpoint.tensors
    native = layouts.native(tensors)
    facts = _clip_facts(tensors)
    for name in sorted(open_clip.list_models(), key=len):
        cfg = open_clip.get_model_config(name)
        if cfg is None or not _matches_clip(cfg, facts, native):
            continue
        if checkpoint.kind == "torchscript" and not cfg.get("quick_gelu"):
            continue  # OpenAI's archives: all of its models use that activation
        try:
            model = build_for(name, native, {})
            stored = renamed(model, checkpoint, name)
        except Exception:
            continue
        if compared(shapes(stored, floating=True), shapes(model.state_dict(), floating=True)).agree:
            yield name


def _clip_facts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    kernel = tensors.get("visual.conv1.weight")
    text = next((t for n, t in tensors.items() if n in ("ln_final.weight", "text.ln_final.weight")), None)
    words = next(
        (t for n, t in tensors.items() if n in ("token_embedding.weight", "text.token_embedding.weight")), None
    )
    resblock = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.")
    blocks = [int(m[1]) for n in tensors if (m := resblock.match(n))]
    return {
        "width": None if kernel is None else kernel.shape[0],
        "layers": max(blocks) + 1 if blocks else None,
        "text_width": None if text is None else text.shape[0],
        "vocabulary": None if words is None else words.shape[0],
        "trunk": any(n.startswith("visual.trunk.") for n in tensors),
    }


def _matches_clip(cfg: dict[str, Any], facts: dict[str, Any], native: layouts.Native) -> bool:
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    if ("timm_model_name" in vision) != facts["trunk"]:
        return False
    if facts["text_width"] is not None and "hf_model_name" not in text:
        if text.get("width", 512) != facts["text_width"]:
            return False
    elif "hf_model_name" in text and facts["text_width"] is not None:
        return False
    if facts["vocabulary"] is not None and text.get("vocab_size", 49408) != facts["vocabulary"]:
        return False
    if facts["trunk"]:
        return True
    return (
        vision.get("width", 768) == facts["width"]
        and vision.get("layers", 12) == facts["layers"]
        and native.patch is not None
        and vision.get("patch_size") == native.patch[0]
    )
