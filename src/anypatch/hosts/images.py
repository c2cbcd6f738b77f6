"""What the Images part of the contract gives: preprocessing, features, classes; and what every host reads alike."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from anypatch.core.geometry import Geometry
from anypatch.core.twins import Subject
from anypatch.errors import UnsupportedModelError

if TYPE_CHECKING:
    from PIL.Image import Image

Encode: TypeAlias = Callable[[nn.Module], Tensor]  # of a model with a text tower: one vector per text

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of its colours, as torchvision has them
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # as OpenAI's has them


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


def interpolation(name: Any) -> str:
    """Pillow's name for an interpolation, from a library's."""
    name = str(name).lower()
    return name if name in ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming") else "bilinear"


@dataclass
class Features:
    """What a forward pass gives: ``pooled`` (n, c), ``patches`` (n, h, w, c), ``logits`` (n, classes) or None."""

    pooled: Tensor
    patches: Tensor
    logits: Tensor | None = None


@dataclass(frozen=True)
class Classes:
    """What a model's own classifier tells apart.

    Attributes:
        outputs: how many classes; 0 where there is no classifier.
        vocabularies: the ways in which they are known to be named, each in the order of the outputs.
    """

    outputs: int = 0
    vocabularies: tuple[tuple[str, ...], ...] = ()


def normal_grid(geometry: Geometry, pixels: Tensor) -> tuple[int, int]:
    """The grid that pixels (n, c, h, w) are cut into."""
    if geometry.explicit_grid is not None:
        height, width = geometry.explicit_grid[-2:]
        return height, width
    height, width = (s // p for s, p in zip(pixels.shape[-2:], geometry.patch_size[-2:], strict=True))
    return height, width


def on_grid(subject: Subject, tokens: Tensor, pixels: Tensor) -> Tensor:
    """Patch tokens laid out on their grid, (n, h, w, c), without prefix tokens.

    Raises:
        UnsupportedModelError: their number does not fit the grid.
    """
    if tokens.dim() == 4:
        width = getattr(subject.model, "num_features", None)
        channels_last = tokens.shape[-1] == width if width else tokens.shape[1] > tokens.shape[-1] == width
        if width is None:
            channels_last = tokens.shape[-1] > tokens.shape[1]
        return tokens if channels_last else tokens.permute(0, 2, 3, 1)
    height, width = normal_grid(subject.geometry, pixels)
    count = tokens.shape[1]
    for prefix in (count - height * width, subject.geometry.prefix_tokens, 0):
        if prefix < 0:  # hierarchical: patches merged, by the same factor on both axes
            factor = math.sqrt(height * width / count)
            if factor == int(factor) and height % factor == 0 == width % factor:
                size = (height // int(factor), width // int(factor))
                return tokens.unflatten(1, size)
        elif count - prefix == height * width:
            return tokens[:, prefix:].unflatten(1, (height, width))
    raise UnsupportedModelError(
        f"{type(subject.model).__name__} gives {count} tokens, which do not fit its grid of {height}x{width} patches"
    )


def pooled_of(subject: Subject, tokens: Tensor, patches: Tensor) -> Tensor:
    """What stands for the whole image where no layer pools: the class token, or else the mean of the patches."""
    return tokens[:, 0] if tokens.dim() == 3 and subject.geometry.prefix_tokens else patches.mean((1, 2))


@contextlib.contextmanager
def captured(module: nn.Module, method: str | None = None) -> Iterator[list[Any]]:
    """The outputs of a module's forward, or of one of its methods, while the block runs."""
    seen: list[Any] = []
    if method is None:
        handle = module.register_forward_hook(lambda _m, _i, output: seen.append(output))
        try:
            yield seen
        finally:
            handle.remove()
        return
    original = getattr(module, method)

    def recording(*args: Any, **kwargs: Any) -> Any:
        seen.append(original(*args, **kwargs))
        return seen[-1]

    vars(module)[method] = recording
    try:
        yield seen
    finally:
        del vars(module)[method]
