"""Put the tensors of a file into the host library's own model, built empty at the geometry they were trained at."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.empty import empty
from anypatch.core.geometry import show
from anypatch.errors import AnypatchWarning, CheckpointError, UnsupportedModelError
from anypatch.files import layouts
from anypatch.files.configs import read_config, require_name
from anypatch.files.reading import Checkpoint
from anypatch.files.wrappers import rooted
from anypatch.hosts.base import plain, unknown
from anypatch.hosts.timm.private import construction
from anypatch.hosts.transformers.files import require_safe


def _list(names: list[str], limit: int = 6) -> str:
    shown = ", ".join(names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def assign(model: nn.Module, tensors: dict[str, Tensor], checkpoint: Checkpoint, arch: str) -> nn.Module:
    """Make the file's tensors the model's parameters, without copying them.

    Raises:
        CheckpointError: missing or surplus tensors, or other shapes; the message names them.
    """
    own = model.state_dict(keep_vars=True)
    parameters = {name for name, value in own.items() if isinstance(value, nn.Parameter)}
    surplus = [name for name in tensors if name not in own]
    missing = [
        name
        for name, value in own.items()
        if name not in tensors and (name in parameters or value.is_floating_point() or value.is_meta)
    ]
    if surplus or missing:
        parts = []
        if missing:
            parts.append(f"it lacks {_list(missing)}")
        if surplus:
            parts.append(f"{arch} has no {_list(surplus)}")
        raise CheckpointError(f"{checkpoint.path} does not fit {arch}: {'; '.join(parts)}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{checkpoint.path} does not fit {arch}: {name} has shape {tuple(tensor.shape)}, not "
                f"{tuple(own[name].shape)}; where the image is not square, pass img_size=(height, width)"
            )
        if own[name].is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(f"{checkpoint.path}: {name} is stored as {tensor.dtype}")
    model.load_state_dict(_one_dtype(tensors, checkpoint), strict=False, assign=True)
    return model


def _one_dtype(tensors: dict[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Tensors that a converter made up take the type that most of the file's values have."""
    counts: dict[torch.dtype, int] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    if not counts:
        return tensors
    usual = max(counts, key=lambda dtype: counts[dtype])
    return {
        name: tensor.to(usual) if tensor.is_floating_point() and tensor.dtype not in counts else tensor
        for name, tensor in tensors.items()
    }


# -- timm --------------------------------------------------------------------------------------------------


def load_timm(name: str, checkpoint: Checkpoint, host_kwargs: dict[str, Any]) -> nn.Module:
    """A timm model with a file's weights, at the geometry they were trained at.

    Raises:
        CheckpointError: the file does not fit ``name``.
        UnsupportedModelError: timm knows no such model.
    """
    checkpoint.require_one()
    native = layouts.native(checkpoint.tensors)
    arch = f"timm:{name}"
    if layouts.origin(checkpoint.tensors) == "npz":
        model, _ = build_timm(name, native, host_kwargs)
        return _load_npz(model, checkpoint, arch, native, host_kwargs)
    model, convert = build_timm(name, native, host_kwargs)
    checkpoint = _rooted(model, checkpoint)
    tensors = converted(model, convert, checkpoint, arch)
    _adapt_channels(model, tensors, host_kwargs)
    _fit_head(model, tensors, checkpoint, arch, host_kwargs)
    return assign(model, tensors, checkpoint, arch)


def _rooted(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    tensors = rooted(checkpoint.tensors, (name for name, _ in model.named_parameters()), checkpoint.path)
    return checkpoint if tensors is checkpoint.tensors else replace(checkpoint, tensors=tensors)


def build_timm(
    name: str, native: layouts.Native, host_kwargs: Mapping[str, Any]
) -> tuple[nn.Module, Callable[..., Any] | None]:
    """An empty timm model at a file's native geometry, and timm's converter of checkpoints for it.

    Raises:
        UnsupportedModelError: timm has no such model.
    """
    import timm

    require_name(name, "arch")
    sizes: dict[str, Any] = {}
    if native.patch is not None:
        sizes["patch_size"] = plain(native.patch)
    if native.image is not None:
        sizes["img_size"] = plain(native.image)
    if native.channels is not None:
        sizes["in_chans"] = native.channels
    sizes |= host_kwargs
    attempts = [sizes, {k: v for k, v in sizes.items() if k != "patch_size"}, dict(host_kwargs)]
    error: Exception | None = None
    for arguments in attempts:
        try:
            model = empty(lambda a=arguments: timm.create_model(name, **a))  # type: ignore[misc]
        except RuntimeError as caught:
            if "Unknown model" in str(caught) or "Invalid pretrained tag" in str(caught):
                raise unknown("timm", name, timm.list_models()) from None
            error = error or caught
        except (TypeError, AssertionError, ValueError) as caught:
            error = error or caught
        else:
            made = construction(name.partition(".")[0], **arguments)
            return model, made.converter if made else None
    raise UnsupportedModelError(
        f"timm cannot build {name} with patch_size {show(native.patch)} and image_size {show(native.image)}, "
        f"the sizes of the file: {error}"
    ) from error


def converted(
    model: nn.Module, convert: Callable[..., Any] | None, checkpoint: Checkpoint, arch: str
) -> dict[str, Tensor]:
    """The file's tensors under timm's names, by timm's own converter.

    Raises:
        CheckpointError: the converter does not understand the file, or would have resampled a tensor.
    """
    tensors = dict(checkpoint.tensors)
    if "patch_embed.proj.weight" in tensors and any(".mlp.lin1." in name for name in tensors):
        # Segment Anything's encoder on its own; timm's converter knows it by the name it has in the whole model
        tensors = {f"image_encoder.{name}": tensor for name, tensor in tensors.items()}
    if "decoder_pos_embed" in tensors and "mask_token" in tensors:  # MAE before fine-tuning
        tensors = {n: t for n, t in tensors.items() if not n.startswith(("decoder_", "mask_token"))}
    if convert is None:
        return tensors
    try:
        with torch.no_grad():
            try:
                result = convert(tensors, model)
            except TypeError:
                result = convert(dict(checkpoint.tensors))
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint.path} does not fit {arch}: timm's converter failed ({type(error).__name__}: {error})"
        ) from error
    for name, tensor in result.items():
        before = checkpoint.tensors.get(name)
        if before is None or not isinstance(tensor, Tensor) or before.numel() == tensor.numel():
            continue
        if tensor.untyped_storage().data_ptr() != before.untyped_storage().data_ptr():  # no slice of it: resampled
            raise CheckpointError(
                f"{checkpoint.path} does not fit {arch}: {name} has shape {tuple(before.shape)} in the file and "
                f"{tuple(tensor.shape)} in the model; where the image is not square, pass img_size=(height, width)"
            )
    return {name: tensor.detach() for name, tensor in result.items() if isinstance(tensor, Tensor)}


def _adapt_channels(model: nn.Module, tensors: dict[str, Tensor], host_kwargs: Mapping[str, Any]) -> None:
    """Another number of image channels, asked for with ``in_chans``: timm's own summing or repeating."""
    if "in_chans" not in host_kwargs:
        return
    from timm.models import adapt_input_conv

    own = model.state_dict()
    for name, tensor in tensors.items():
        target = own.get(name)
        if target is None or tensor.ndim != 4 or target.ndim != 4 or tensor.shape == target.shape:
            continue
        if (tensor.shape[0], *tensor.shape[2:]) == (target.shape[0], *target.shape[2:]) and tensor.shape[1] == 3:
            tensors[name] = adapt_input_conv(host_kwargs["in_chans"], tensor)


def head_names(model: nn.Module) -> list[str]:
    """Classifier layers, as timm itself names them."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return [names] if isinstance(names, str) else list(names)


def _fit_head(
    model: nn.Module, tensors: dict[str, Tensor], checkpoint: Checkpoint, arch: str, host_kwargs: Mapping[str, Any]
) -> None:
    """Give the model as many classes as the file's head has, unless the user said how many."""
    heads = head_names(model)
    if not heads or not hasattr(model, "reset_classifier"):
        return
    stored = tensors.get(heads[0] + ".weight")
    classes = 0 if stored is None or stored.ndim != 2 else stored.shape[0]
    wanted = model.num_classes
    if classes == wanted:
        return
    if "num_classes" not in host_kwargs:
        what = f"a head of {classes} classes" if classes else "no classification head"
        warnings.warn(
            f"{checkpoint.path.name} has {what}, so the model has too ({arch}: {wanted})", AnypatchWarning, stacklevel=5
        )
        empty(lambda: _reset(model, int(classes)))
        return
    for head in heads:
        tensors.pop(head + ".weight", None)
        tensors.pop(head + ".bias", None)
    if wanted:
        warnings.warn(
            f"{checkpoint.path.name} has a head of {classes} classes, and {wanted} were asked for: the head is new and "
            f"untrained",
            AnypatchWarning,
            stacklevel=5,
        )
        usual = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
        for head in heads:
            layer = model.get_submodule(head)
            for key, parameter in layer.named_parameters():
                value = torch.zeros(parameter.shape, dtype=usual)
                tensors[f"{head}.{key}"] = nn.init.trunc_normal_(value, std=0.02) if value.ndim > 1 else value


def _reset(model: Any, classes: int) -> nn.Module:
    model.reset_classifier(classes)
    return model


def _load_npz(
    model: Any, checkpoint: Checkpoint, arch: str, native: layouts.Native, host_kwargs: Mapping[str, Any]
) -> nn.Module:
    """Google's layout, by timm's own reader, which copies into the model; what it left unset is missing."""
    if not hasattr(model, "load_pretrained"):
        raise CheckpointError(f"{checkpoint.path} is in Google's layout, which timm cannot read into {arch}")
    prefix = str(native.kernel).removesuffix("embedding/kernel")
    stored = {n[len(prefix) :]: t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}
    classes = stored["head/bias"].shape[0] if "head/bias" in stored else 0
    if classes != getattr(model, "num_classes", classes) and "num_classes" not in host_kwargs:
        what = f"a head of {classes} classes" if classes else "no classification head"
        warnings.warn(
            f"{checkpoint.path.name} has {what}, so the model has too ({arch})", AnypatchWarning, stacklevel=5
        )
        empty(lambda: _reset(model, classes))
    _require_npz_fits(model, stored, checkpoint, arch)
    marks = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                filled = torch.full(parameter.shape, torch.nan, dtype=torch.float32)
                module._parameters[name] = nn.Parameter(filled, parameter.requires_grad)
    for name, parameter in model.named_parameters():
        marks[name] = parameter
    try:
        with torch.no_grad():
            model.load_pretrained(str(checkpoint.path))
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint.path} does not fit {arch}: timm's reader failed ({type(error).__name__}: {error})"
        ) from error
    heads = tuple(head + "." for head in head_names(model))
    unset = [name for name, p in marks.items() if p.numel() and bool(torch.isnan(p.detach()).all())]
    fresh = [name for name in unset if name.startswith(heads)] if heads else []
    missing = [name for name in unset if name not in fresh]
    if missing:
        raise CheckpointError(f"{checkpoint.path} does not fit {arch}: it lacks {_list(missing)}")
    if fresh:
        warnings.warn(
            f"{checkpoint.path.name}: the head is new and untrained ({_list(fresh)})", AnypatchWarning, stacklevel=5
        )
        with torch.no_grad():
            for name in fresh:
                value = marks[name].zero_()
                if value.ndim > 1:
                    nn.init.trunc_normal_(value, std=0.02)
    return model


def _require_npz_fits(model: Any, stored: Mapping[str, Tensor], checkpoint: Checkpoint, arch: str) -> None:
    """timm's reader takes what it looks for and leaves the rest: see that there is no rest."""
    blocks = {n.split("/")[1] for n in stored if n.startswith("Transformer/encoderblock_")}
    have = len(blocks)
    if "Transformer/encoderblock/LayerNorm_0/scale" in stored:
        have = stored["Transformer/encoderblock/LayerNorm_0/scale"].shape[0]
    if have != len(model.blocks):
        raise CheckpointError(f"{checkpoint.path} does not fit {arch}: it has {have} blocks, not {len(model.blocks)}")
    for key, present in {
        "MAPHead_0/": getattr(model, "attn_pool", None) is not None,
        "cls": getattr(model, "cls_token", None) is not None,
    }.items():
        found = [n for n in stored if n.startswith(key)]
        if found and not present:
            raise CheckpointError(f"{checkpoint.path} does not fit {arch}: {arch} has no {_list(found)}")
    width = stored["embedding/kernel"].shape[-1]
    if width != model.embed_dim:
        raise CheckpointError(f"{checkpoint.path} does not fit {arch}: it is {width} wide, not {model.embed_dim}")


# -- open_clip ---------------------------------------------------------------------------------------------


def load_open_clip(name: str, checkpoint: Checkpoint, host_kwargs: dict[str, Any]) -> nn.Module:
    """A whole CLIP model of open_clip with a file's weights, at the geometry they were trained at.

    Raises:
        CheckpointError: the file does not fit ``name``.
        UnsupportedModelError: open_clip knows no such model.
    """
    from anypatch.hosts.open_clip import config as host

    checkpoint.require_one()
    name = name.split("/")[0]
    native = layouts.native(checkpoint.tensors)
    model = build_open_clip(name, native, host_kwargs)
    checkpoint = _rooted(model, checkpoint)
    tensors = open_clip_names(model, checkpoint, f"open_clip:{name}")
    assign(model, tensors, checkpoint, f"open_clip:{name}")
    import open_clip

    remembered = getattr(host, "REMEMBERED", None)
    if remembered:
        setattr(model, remembered, open_clip.get_model_config(name))
    return model


def open_clip_from_config(cfg: dict[str, Any], checkpoint: Checkpoint) -> nn.Module:
    """The model of an ``open_clip_config.json`` with its weights.

    Raises:
        CheckpointError: the file does not fit the configuration, or no model can be built from it.
    """
    from open_clip import CLIP, CoCa, CustomTextCLIP

    cfg = copy.deepcopy(cfg)
    custom = cfg.pop("custom_text", False) or "hf_model_name" in cfg.get("text_cfg", {})
    kind = CoCa if "multimodal_cfg" in cfg else CustomTextCLIP if custom else CLIP
    try:
        model = empty(lambda: kind(**cfg))
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint.path.parent}: open_clip cannot build the model of its configuration ({error})"
        ) from error
    return assign(model, open_clip_names(model, checkpoint, "open_clip"), checkpoint, "open_clip")


def build_open_clip(name: str, native: layouts.Native, host_kwargs: Mapping[str, Any]) -> nn.Module:
    """An empty open_clip model at a file's native geometry.

    Raises:
        UnsupportedModelError: open_clip knows no such model.
    """
    import logging

    import open_clip

    cfg = open_clip.get_model_config(name)
    if cfg is None:
        raise unknown("open_clip", name, open_clip.list_models())
    vision = copy.deepcopy(cfg["vision_cfg"])
    if "timm_model_name" not in vision and native.patch is not None:
        vision["patch_size"] = native.patch[0]
    if native.image is not None:
        vision["image_size"] = plain(native.image)
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it reports every step, and that no weights were loaded
    try:
        return empty(lambda: open_clip.create_model(name, load_weights=False, vision_cfg=dict(vision), **host_kwargs))
    finally:
        logging.root.setLevel(level)


def open_clip_names(model: Any, checkpoint: Checkpoint, arch: str) -> dict[str, Tensor]:
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


# -- torchvision -------------------------------------------------------------------------------------------


def load_torchvision(name: str, checkpoint: Checkpoint, host_kwargs: dict[str, Any]) -> nn.Module:
    """A torchvision model with a file's weights.

    Raises:
        CheckpointError: the file does not fit ``name``.
        UnsupportedModelError: torchvision knows no such model.
    """
    checkpoint.require_one()
    name = name.split("/")[0]
    checkpoint = _rooted(build_torchvision(name, {}, host_kwargs), checkpoint)
    model = build_torchvision(name, checkpoint.tensors, host_kwargs)
    return assign(model, dict(checkpoint.tensors), checkpoint, f"torchvision:{name}")


def build_torchvision(name: str, tensors: Mapping[str, Any], host_kwargs: Mapping[str, Any]) -> nn.Module:
    """An empty torchvision model for a file's tensors.

    Raises:
        UnsupportedModelError: torchvision knows no such model.
    """
    from torchvision.models import get_model, get_model_builder, list_models

    try:
        get_model_builder(name)
    except (KeyError, ValueError):
        raise unknown("torchvision", name, list_models()) from None
    native = layouts.native(tensors)
    arguments: dict[str, Any] = {}
    if native.image is not None:
        arguments["image_size"] = native.image[0]
    head = tensors.get("heads.head.weight", tensors.get("head.weight"))
    if head is not None:
        arguments["num_classes"] = head.shape[0]
    try:
        return empty(lambda: get_model(name, weights=None, **{**arguments, **host_kwargs}))
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UnsupportedModelError(f"torchvision cannot build {name} for this file: {error}") from error


# -- transformers ------------------------------------------------------------------------------------------


def load_transformers(name: str, checkpoint: Checkpoint, host_kwargs: dict[str, Any]) -> nn.Module:
    """A transformers model of the configuration ``name`` (a directory or a hub name) with a file's weights.

    Raises:
        CheckpointError: the file does not fit the configuration.
    """
    kind, config = transformers_class(name, host_kwargs.pop("config", None))
    host_kwargs.setdefault("dtype", "auto")
    tensors = _transformers_names(kind, config, checkpoint)
    try:
        model, report = kind.from_pretrained(
            None, config=config, state_dict=tensors, output_loading_info=True, **host_kwargs
        )
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint.path} does not fit transformers:{name}: {type(error).__name__}: {str(error)[:500]}"
        ) from error
    missing, surplus = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or surplus:
        parts = [f"it lacks {_list(missing)}"] if missing else []
        parts += [f"{kind.__name__} has no {_list(surplus)}"] if surplus else []
        raise CheckpointError(f"{checkpoint.path} does not fit transformers:{name}: {'; '.join(parts)}")
    return model


def _transformers_names(kind: Any, config: Any, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The file's tensors without a prefix that training code put before all of transformers' own names."""
    table = dict(checkpoint.whole or checkpoint.tensors)
    try:
        model: Any = empty(lambda: kind(config))
    except Exception:
        return table  # from_pretrained says why
    own = [name for name, _ in model.named_parameters()]
    base = f"{getattr(model, 'base_model_prefix', '')}."
    inner = [name.removeprefix(base) for name in own if name.startswith(base)]
    known = {*own, *inner, *(base + name for name in own)}  # with or without the base model's name, as it takes them
    if any(name in known for name in table):
        return table
    for names in (own, inner):
        found = rooted(table, names, checkpoint.path)
        if found is not table:
            return found
    return dict(checkpoint.tensors)


def transformers_class(name: str, config: Any = None) -> tuple[Any, Any]:
    """The class that a configuration names, and the configuration.

    Raises:
        CheckpointError: no configuration, or one that names no class.
    """
    import transformers

    if config is None:
        try:
            if (path := Path(name, "config.json")).exists():
                require_safe(read_config(path), path)
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"transformers has no configuration for {name!r}: {error}") from error
    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        try:
            kind = type(transformers.AutoModel.from_config(config)) if not names else None
        except Exception:
            kind = None
    if kind is None:
        raise CheckpointError(f"{name}: its configuration names no class of transformers ({names})")
    return kind, config


LOADERS: dict[str, Callable[[str, Checkpoint, dict[str, Any]], nn.Module]] = {
    "timm": load_timm,
    "open_clip": load_open_clip,
    "torchvision": load_torchvision,
    "transformers": load_transformers,
}
