"""What single layers of torch and einops say: padding, the block that they rearrange, how far they enlarge."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from anypatch.core.account import Extra
from anypatch.core.geometry import Size

LENGTHS = ("axes_lengths", "_axes_lengths")  # of a layer of einops: as they were given, and as it computes with them


def padding_of(conv: Any) -> tuple[int, ...]:
    """Pixels that a convolution adds on each axis; of "same", whose number the input decides, one stands for any."""
    return () if conv.padding == "valid" else (1,) if isinstance(conv.padding, str) else tuple(conv.padding)


def block_of(module: Any) -> Size:
    """(height, width) of the block that a layer makes one place of, or one place a block of."""
    if isinstance(module, nn.PixelShuffle):
        return (module.upscale_factor,) * 2
    if isinstance(module, nn.PixelUnshuffle):
        return (module.downscale_factor,) * 2
    return tuple(module.stride) if isinstance(module.stride, tuple) else (module.stride,) * 2


def layer_before(path: str, extras: Iterable[Extra]) -> tuple[str, nn.Module] | None:
    """The layer before another in an ``nn.Sequential``."""
    parent, _, name = path.rpartition(".")
    modules = {extra.path: extra.module for extra in extras}
    chain = modules.get(parent)
    if not isinstance(chain, nn.Sequential):
        return None
    names = list(chain._modules)
    index = names.index(name)
    if index == 0:
        return None
    where = f"{parent}.{names[index - 1]}"
    return where, chain[index - 1]


def enlarges(module: nn.Module) -> float:
    """By what factor a layer enlarges the sides of a map; 1 of all others."""
    if isinstance(module, nn.PixelShuffle):
        return float(module.upscale_factor)
    if isinstance(module, nn.ConvTranspose2d):
        return float(module.stride[0])
    if isinstance(module, nn.Upsample) and module.scale_factor is not None:
        factor = module.scale_factor
        return float(factor[0] if isinstance(factor, tuple) else factor)
    return 1.0


def lengths_after(layer: Any, follow: Callable[[str, Any], Any]) -> dict[str, Any]:
    """What a layer of einops keeps of the lengths of its pattern's axes, each brought to another geometry by ``follow``
    (name, length); nothing where all stay. The pattern itself has no lengths."""
    before = layer.axes_lengths
    after = {name: follow(name, length) or length for name, length in before.items()}
    return {} if after == before else dict(zip(LENGTHS, (after, tuple(after.items())), strict=True))
