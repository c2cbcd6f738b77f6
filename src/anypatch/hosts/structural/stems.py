"""Where a hand-made model cuts patches out of pixels."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from anypatch.core.geometry import show
from anypatch.core.pixelwise import is_pixelwise, moves_pixels
from anypatch.errors import UnsupportedModelError
from anypatch.hosts.base import ancestors
from anypatch.hosts.structural.following import ints
from anypatch.hosts.structural.tables import CONVOLUTIONS, Table, position_tensors

PIXEL_CHANNELS = 4  # what an image has at most; a stem that reads more is known by cutting patches before anything else
EMBEDDING = re.compile(r"patch|stem|tokeni[sz]", re.I)
ATTENTION = re.compile(r"attention|attn", re.I)


def stem_of(model: nn.Module) -> str:
    """The path of the first convolution that sees pixels.

    Raises:
        UnsupportedModelError: there is none, or the stem is not one linear map per patch.
    """
    spatial = {
        path: m
        for path, m in model.named_modules()
        if isinstance(m, CONVOLUTIONS) and max(m.kernel_size) > 1 and "lora_" not in path
    }
    if not spatial:
        _require_no_generated_kernel(model)
        raise UnsupportedModelError(
            f"{type(model).__name__} has no patch embedding that anypatch can find: no convolution with a kernel "
            f"(of linear layers over flattened patches the flattening order is not known)"
        )
    path = _first(spatial)
    conv = spatial[path]
    padding = conv.padding if isinstance(conv.padding, str) else any(conv.padding)
    if conv.kernel_size != conv.stride or padding not in (False, "valid"):
        raise UnsupportedModelError(
            f"{path or type(conv).__name__}, the first convolution, has kernel {show(conv.kernel_size)}, stride "
            f"{show(conv.stride)} and padding {conv.padding}: the stem is not one linear map per patch"
        )
    if set(conv.dilation) != {1} or conv.groups != 1:
        raise UnsupportedModelError(f"{path} is dilated or grouped: the stem is not one linear map per patch")
    for ancestor in ancestors(path)[:-1]:
        module = model.get_submodule(ancestor)
        if [m for m in module.modules() if isinstance(m, CONVOLUTIONS)] == [conv] and not is_pixelwise(module, conv):
            raise UnsupportedModelError(moves_pixels(ancestor, module))
        named = EMBEDDING.search(ancestor.rpartition(".")[2]) or EMBEDDING.search(type(module).__name__)
        inside = [p for p in spatial if p.startswith(f"{ancestor}.")]
        if named and len(inside) > 1 and _is_embedding(module) and not _parallel([spatial[p] for p in inside]):
            raise UnsupportedModelError(
                f"{ancestor} ({type(module).__name__}) is {len(inside)} convolutions ({', '.join(inside[:3])}): the "
                f"stem is not one linear map per patch"
            )
    return path


def _require_no_generated_kernel(model: nn.Module) -> None:
    """A patch embedding that computes its kernel while it runs (DOFA's, from wavelengths) has none to resize.

    Raises:
        UnsupportedModelError: it is one; the message says what can be done for another image size.
    """
    for path, module in model.named_modules():
        named = EMBEDDING.search(path.rpartition(".")[2]) or EMBEDDING.search(type(module).__name__)
        value = vars(module).get("kernel_size", vars(module).get("patch_size"))
        size = (value, value) if type(value) is int else ints(value)
        if not path or not named or size is None:
            continue
        flat = any(isinstance(m, nn.Linear) and m.in_features % math.prod(size) == 0 for m in module.modules())
        if not flat:  # no layer over flattened patches either
            positions = [f"{p}.{n}" if p else n for p, n, t in position_tensors(model, "") if t.ndim > 1]
            advice = f" (another would need {positions[0]} resampled by hand)" if positions else ""
            raise UnsupportedModelError(
                f"{path} ({type(module).__name__}) of {type(model).__name__} has a patch of {show(size)}, but no layer "
                f"with a kernel: it computes its kernel while it runs, so there is none to resize, and the image size "
                f"alone cannot be changed either{advice}"
            )


def _first(spatial: dict[str, Any]) -> str:
    """The convolution that sees pixels: one that reads few channels, or one that cuts patches before any such."""
    for path, conv in spatial.items():
        if conv.in_channels <= PIXEL_CHANNELS or _cuts_patches(conv):
            return path
    return next(iter(spatial))


def _cuts_patches(conv: Any) -> bool:
    padding = conv.padding != "valid" if isinstance(conv.padding, str) else any(conv.padding)
    return conv.kernel_size == conv.stride and not padding


def _parallel(convs: list[Any]) -> bool:
    """Whether convolutions cut the same patches side by side (one per group of bands), none after another."""
    first = convs[0]
    return all(
        _cuts_patches(c)
        and (c.stride, c.out_channels) == (first.stride, first.out_channels)
        and c.in_channels != first.out_channels
        for c in convs
    )


def stems_of(model: nn.Module, stem: str) -> tuple[str, ...]:
    """All convolutions that cut the stem's patches out of pixels: a second modality's, one per group of bands."""
    first: Any = model.get_submodule(stem)
    parent = stem.rpartition(".")[0]
    found = []
    for path, conv in model.named_modules():
        if not isinstance(conv, CONVOLUTIONS) or not _cuts_patches(conv) or conv.stride != first.stride:
            continue
        pixels = conv.in_channels <= PIXEL_CHANNELS or conv.in_channels == first.in_channels
        beside = path.rpartition(".")[0] == parent and conv.in_channels != first.out_channels
        if (pixels or beside) and conv.groups == 1 and "lora_" not in path:
            found.append(path)
    return tuple(found)


def _is_embedding(module: nn.Module) -> bool:
    """Whether a module embeds patches, rather than being a whole model with "patch" in its name."""
    return not any(isinstance(m, nn.MultiheadAttention) or ATTENTION.search(type(m).__name__) for m in module.modules())


def require_vit(model: nn.Module, stem: str, tables: tuple[Table, ...]) -> None:
    """A convolution that cuts patches is a ViT's where positions or attention follow: ConvNeXt's is none.

    Raises:
        UnsupportedModelError: nothing of the kind follows.
    """
    if tables or EMBEDDING.search(stem):
        return
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) or ATTENTION.search(f"{path} {type(module).__name__}"):
            return
        if EMBEDDING.search(type(module).__name__) or "patch_size" in vars(module):
            return
    raise UnsupportedModelError(
        f"{type(model).__name__} has no patch embedding that anypatch can find: {stem or 'it'} cuts the image into "
        f"patches, but neither positions nor attention follow"
    )
