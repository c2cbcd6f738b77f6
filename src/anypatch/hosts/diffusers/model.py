"""diffusers: diffusion transformers that cut latents into patches, HunyuanVideo 1.5's among them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.geometry import Geometry, Size, show
from anypatch.core.modes import DTYPE
from anypatch.core.roles import Facts
from anypatch.core.twins import Subject
from anypatch.errors import UnsupportedModelError
from anypatch.hosts.base import Example
from anypatch.hosts.folders import is_format
from anypatch.hosts.rebuilding import require_rebuilds
from anypatch.hosts.vetting import WHERE

NAME = "diffusers"

# Flattening order of the patches that the last layer paints: (class, tensor, order).
ORDERS = (
    (r"HunyuanVideo", r"^proj_out\.", "c t h w"),
    (r"Wan", r"^proj_out\.", "t h w c"),
    (r"DiTTransformer2D", r"^proj_out_2\.", "h w c"),
    (r"SD3Transformer2D|PixArtTransformer2D", r"^proj_out\.", "h w c"),
)
# Arguments of `from_pretrained` that say where a model is, not what it is.
HUB = (*WHERE, "subfolder", "force_download")
GRID = 4  # patches on a side, for models that take any size


def recognises(model: nn.Module) -> bool:
    """Any class that derives from diffusers' ``ModelMixin``."""
    return any(c.__name__ == "ModelMixin" and c.__module__.split(".")[0] == "diffusers" for c in type(model).__mro__)


def subject(model: nn.Module) -> Subject:
    geometry = _geometry(model)
    orders = {tensor: order for kind, tensor, order in ORDERS if re.match(kind, type(model).__name__)}
    return Subject(model, geometry, build=lambda g: _build(model, g, geometry), facts=Facts(orders=orders))


def _config(model: nn.Module) -> Any:
    return model.config


def _geometry(model: nn.Module) -> Geometry:
    config = _config(model)
    patch = config.get("patch_size")
    name = type(model).__name__
    if isinstance(patch, int):
        time = config.get("patch_size_t")
        patch = (patch, patch) if time is None else (time, patch, patch)
    if not isinstance(patch, (list, tuple)) or len(patch) not in (2, 3):
        raise UnsupportedModelError(
            f"{name} has no patch_size in its configuration: it does not cut latents into patches"
        )
    patch = tuple(patch)
    if not any(isinstance(m, (nn.Conv2d, nn.Conv3d)) and tuple(m.stride) == patch for m in model.modules()):
        raise UnsupportedModelError(
            f"{name} has patch_size {show(patch)}, but no convolution that reads one such patch: its input is packed "
            f"before it reaches the model"
        )
    side = config.get("sample_size")
    image: Size | None = (side, side) if isinstance(side, int) and len(patch) == 2 else None
    return Geometry(patch, image, 0, NAME)


def _build(model: nn.Module, geometry: Geometry, current: Geometry) -> nn.Module:
    config = {k: v for k, v in dict(_config(model)).items() if not k.startswith("_")}
    patch = geometry.patch_size
    if isinstance(config["patch_size"], int):
        if patch[-1] != patch[-2]:
            raise UnsupportedModelError(f"{type(model).__name__} accepts only square patches, not {show(patch)}")
        config["patch_size"] = patch[-1]
        if len(patch) == 3:
            config["patch_size_t"] = patch[0]
    else:
        config["patch_size"] = type(config["patch_size"])(patch)
    image = geometry.image_size
    if image is not None:
        if image[0] != image[1]:
            raise UnsupportedModelError(f"{type(model).__name__} accepts only square samples, not {show(image)}")
        config["sample_size"] = image[0]
    try:
        return type(model)(**config)
    except (TypeError, ValueError, AssertionError) as error:
        raise UnsupportedModelError(
            f"diffusers cannot build {type(model).__name__} with patch_size {show(patch)}: {error}"
        ) from error


def example(subject: Subject) -> Example:
    model, geometry = subject.model, subject.geometry
    config = _config(model)
    image = geometry.image_size or tuple(GRID * p for p in geometry.patch_size)
    if type(model).__name__ != "HunyuanVideo15Transformer3DModel":
        raise UnsupportedModelError(
            f"check does not know the conditions that {type(model).__name__} takes beside its latents"
        )
    return Example((1, config.in_channels, *image), _hunyuan)


def _hunyuan(model: nn.Module, latents: Tensor) -> Any:
    """The tokens before the last projection, and the latents that it paints."""
    config = _config(model)
    generator = torch.Generator().manual_seed(0)

    def words(length: int, width: int) -> Tensor:
        return torch.randn(1, length, width, generator=generator)

    tokens: list[Tensor] = []
    hook = model.get_submodule("norm_out").register_forward_hook(lambda _, __, out: tokens.append(out))
    try:
        painted = model(
            latents,
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=words(5, config.text_embed_dim),
            encoder_attention_mask=torch.ones(1, 5),
            encoder_hidden_states_2=words(4, config.text_embed_2_dim),
            encoder_attention_mask_2=torch.ones(1, 4),
            image_embeds=words(3, config.image_embed_dim),
            return_dict=False,
        )
    finally:
        hook.remove()
    return [*tokens, painted]


def names_folder(path: Path) -> str | None:
    """A directory in diffusers' format."""
    return str(path) if is_format(path, NAME) else None


def load(name: str, **host_kwargs: Any) -> nn.Module:
    """A model from the hub or a directory; ``subfolder="transformer"`` where it is part of a pipeline."""
    import diffusers

    kind = host_kwargs.pop("model_class", None) or diffusers.AutoModel
    if host_kwargs.get("pretrained") is True:
        del host_kwargs["pretrained"]
    # it would take the process's default dtype
    return kind.from_pretrained(name, **{"trust_remote_code": False, "torch_dtype": DTYPE, **host_kwargs})


def build(name: str, **host_kwargs: Any) -> nn.Module:
    import diffusers

    kind = host_kwargs.pop("model_class", None)
    about = {k: host_kwargs.pop(k) for k in tuple(host_kwargs) if k in HUB}
    config: Any = diffusers.AutoModel.load_config(name, **about)
    kind = kind or _model_class(config.get("_class_name"))
    if kind is None:
        raise UnsupportedModelError(f"diffusers has no class {config.get('_class_name')!r}, which {name} names")
    return kind.from_config({**config, **host_kwargs}).eval()


def _model_class(name: Any) -> Any:
    """The class of a model that a configuration names; a pipeline or any other attribute of the library is none."""
    import diffusers

    kind = getattr(diffusers, str(name), None)
    return kind if isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin) else None


def repository(name: str) -> tuple[str, str] | None:
    """Every name is one on the hub."""
    return name, "config.json"


def save(model: nn.Module, directory: Path, final: Path, **extras: Any) -> None:
    """Write what ``from_pretrained`` reads."""
    live: Any = model
    live.save_pretrained(str(directory), **extras)
    kind = type(live)
    require_rebuilds(
        directory, live, lambda: kind.from_config(kind.load_config(str(directory))), f"diffusers' {kind.__name__}"
    )
