"""What a table of tensors tells by its names and shapes alone: where it comes from, and its native geometry."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anypatch.core.geometry import Size

# Patch projections by origin, most specific first. What follows the name is the layout of the kernel.
KERNELS = (
    (r"(^|\.)patch_embed\.proj\.weight$", "o i h w"),  # timm, DINO, DINOv2, MAE, BEiT, DeiT, EVA, SAM, I-JEPA
    (r"(^|\.)patch_embed\.projection\.weight$", "o i h w"),
    (r"(^|\.)patchifier\.proj\.weight$", "o i h w"),  # AIMv2
    (r"(^|\.)vision_embed\.proj(\.A)?\.weight$", "o i h w"),  # BEiT-3
    (r"(^|\.)embeddings\.patch_embeddings\.projection\.weight$", "o i h w"),  # transformers
    (r"(^|\.)embeddings\.patch_embeddings\.weight$", "o i h w"),
    (r"(^|\.)embeddings\.patch_embedding\.weight$", "o i h w"),
    (r"(^|visual\.)conv1\.weight$", "o i h w"),  # OpenAI CLIP, OpenCLIP
    (r"(^|\.)conv_proj\.weight$", "o i h w"),  # torchvision
    (r"(^|/)embedding/kernel$", "h w i o"),  # Google's .npz
    (r"(^|\.)embeds\.proj\.weight$", "o (h w i)"),  # NaFlex
    (r"(^|\.)patch_generator\.embedder\.weight$", "o (h w i)"),  # RADIO
)
POSITIONS = re.compile(
    r"(^|[./])(pos_embed|pos_embedding|positional_embedding|position_embeddings?(\.weight)?|embed_positions(\.A)?\.weight)$"
)
# Projections that stand at the root of a model in its library's own terms, so that what is before them is a wrapper's.
# Left out: transformers' names, which begin with the name of the model in the class that holds it.
ROOTED = re.compile(r"(?:^|(?<=\.))(patch_embed\.proj(ection)?|visual\.conv1|conv_proj|embeds\.proj)\.weight$")
# What open_clip, Segment Anything and AIMv2 themselves put before it, which converters look for.
INNER = ("visual.trunk.", "image_encoder.", "preprocessor.")
CHUNKED = re.compile(r"^blocks\.(\d+)\.(\d+)\.")
NOT_IMAGE = re.compile(r"(^|[./])(text|txt|decoder|predictor|language)([_./]|model)")
MAX_PREFIX = 16  # tokens before the grid; class, distillation and register tokens of known models are at most nine


def wrapper(name: str) -> str | None:
    """What stands before the name of a patch projection, or ``None`` where ``name`` is no such name.

    >>> wrapper("module.base_encoder.patch_embed.proj.weight")
    'module.base_encoder.'
    >>> wrapper("model.visual.trunk.patch_embed.proj.weight")
    'model.'
    """
    found = ROOTED.search(name)
    if found is None or NOT_IMAGE.search(name):
        return None
    prefix = name[: found.start()]
    inner = next((part for part in INNER if prefix == part or prefix.endswith("." + part)), "")
    return prefix.removesuffix(inner)


def unchunked(names: Mapping[str, str]) -> dict[str, str]:
    """Names of blocks that DINOv2's training keeps in chunks (``blocks.0.3.norm1.weight``), as one stack.

    The second number counts through all chunks; where it does not, as in models of several stages, nothing changes.
    """
    found = {name: match for name in names if (match := CHUNKED.match(name))}
    if not found or not all(name in found for name in names if name.startswith("blocks.")):
        return dict(names)
    chunks: dict[int, set[int]] = {}
    for match in found.values():
        chunks.setdefault(int(match[1]), set()).add(int(match[2]))
    order = [index for chunk in sorted(chunks) for index in sorted(chunks[chunk])]
    if order != list(range(len(order))) or "pos_embed" not in names:
        return dict(names)
    return {CHUNKED.sub(r"blocks.\2.", name): stored for name, stored in names.items()}


@dataclass(frozen=True)
class Native:
    """The geometry that tensors were trained at, as far as they tell.

    Attributes:
        kernel: name of the patch projection.
        patch: its patch size.
        channels: of the image.
        grid: patches per axis, where a table of positions over a square grid tells.
    """

    kernel: str | None
    patch: Size | None
    channels: int | None
    grid: Size | None

    @property
    def image(self) -> Size | None:
        if self.patch is None or self.grid is None:
            return None
        return tuple(p * g for p, g in zip(self.patch, self.grid, strict=True))


def native(shapes: Mapping[str, Any]) -> Native:
    """Read the native geometry off names and shapes (of tensors, or anything with a ``shape``)."""
    kernel, patch, channels = _kernel(shapes)
    return Native(kernel, patch, channels, _grid(shapes))


def _kernel(shapes: Mapping[str, Any]) -> tuple[str | None, Size | None, int | None]:
    for pattern, layout in KERNELS:
        for name, tensor in shapes.items():
            if not re.search(pattern, name) or NOT_IMAGE.search(name):
                continue
            shape = tuple(tensor.shape)
            if layout == "o i h w" and len(shape) == 4:
                return name, shape[2:], shape[1]
            if layout == "h w i o" and len(shape) == 4:
                return name, shape[:2], shape[2]
            if len(shape) == 2 and shape[1] % 3 == 0:
                side = math.isqrt(shape[1] // 3)
                if side * side * 3 == shape[1]:
                    return name, (side, side), 3
    return None, None, None


def _grid(shapes: Mapping[str, Any]) -> Size | None:
    for name, tensor in shapes.items():
        shape = tuple(tensor.shape)
        if POSITIONS.search(name) and not NOT_IMAGE.search(name) and not _is_text(name, shapes):
            if len(shape) == 4 and shape[1] > 1:
                return (shape[1], shape[2])
            if len(shape) in (2, 3):
                side = square_grid(shape[-2])
                if side is not None:
                    return (side, side)
    for name, tensor in shapes.items():
        shape = tuple(tensor.shape)
        if name.endswith("relative_position_bias_table") and len(shape) == 2 and "layers." not in name:
            side = math.isqrt(max(shape[0] - 3, 0))
            if side % 2 and side * side == shape[0] - 3:
                return ((side + 1) // 2,) * 2
    return None


def _is_text(name: str, shapes: Mapping[str, Any]) -> bool:
    """OpenAI's ``positional_embedding`` without a prefix belongs to the text tower if there is an image tower."""
    return name == "positional_embedding" and any(n.startswith("visual.") for n in shapes)


def follows_geometry(name: str) -> bool:
    """Whether a tensor of this name is a patch projection or a table of positions of an image tower."""
    if NOT_IMAGE.search(name):
        return False
    return bool(
        POSITIONS.search(name)
        or re.search(r"(^|\.)(relative_position_bias_table|rel_pos_[hw])$", name)
        or any(re.search(pattern, name) for pattern, _ in KERNELS)
    )


def square_grid(tokens: int) -> int | None:
    """The side of a square grid after the fewest prefix tokens, or ``None``."""
    for prefix in range(MAX_PREFIX):
        side = math.isqrt(max(tokens - prefix, 0))
        if side and side * side == tokens - prefix:
            return side
    return None


def advice(tensors: Mapping[str, Any], name: str, stored: Size, taken: Size) -> str:
    """What to say where a table of positions is not as long as a square image makes it: the rectangles that do.

    Args:
        tensors: of the file.
        name: of the table in the model.
        stored, taken: its shapes in the file, and in a model built for the square image that the file was read as.
    """
    if not POSITIONS.search(name) or len(stored) != len(taken):
        return ""
    hint = "; where the image is not square, pass img_size=(height, width)"
    found = native(tensors)
    sides = [axis for axis, (have, want) in enumerate(zip(stored, taken, strict=False)) if have != want]
    if len(sides) != 1 or not found.patch:
        return hint
    # what the model puts before its grid, which may be more than the fewest tokens that leave a square
    grid = math.prod(found.grid) if found.grid else (square_grid(taken[sides[0]]) or 0) ** 2
    before = taken[sides[0]] - grid
    patches = stored[sides[0]] - before
    if not 0 <= before < MAX_PREFIX or patches < 1:
        return hint
    # nearest to a square first; beyond 1:4, no images that models are trained on
    rows = [r for r in range(math.isqrt(patches), 0, -1) if patches % r == 0 and patches <= 4 * r * r]
    images = [(r * found.patch[0], patches // r * found.patch[1]) for r in rows]
    shown = " or ".join(f"img_size=({a}, {b})" for h, w in images for a, b in dict.fromkeys(((h, w), (w, h))))
    return f"{hint}: {patches} patches after {before} other tokens may be {shown}" if shown else hint


def doubt(tensors: Mapping[str, Any]) -> str:
    """What to add to a message about a file whose number of positions is no square with the usual tokens before it.

    One or two tokens, of class and distillation, stand before the grid of most models; a count that is a square only
    after more, 129 being 8 and 121, may as well be a rectangle's, 1 and 8 times 16.
    """
    table = next(
        (n for n in tensors if POSITIONS.search(n) and not NOT_IMAGE.search(n) and not _is_text(n, tensors)), None
    )
    if table is None:
        return ""
    sides = tuple(tensors[table].shape)
    tokens = sides[0] if len(sides) == 2 else sides[1] if len(sides) == 3 else 0
    if tokens < 2 or any(math.isqrt(tokens - before) ** 2 == tokens - before for before in (0, 1, 2)):
        return ""
    return f", {tokens} positions, which a rectangle may have: img_size=(height, width) beside arch= says which"


def origin(names: Mapping[str, Any]) -> str:
    """The library in whose terms tensors are named: ``npz``, ``open_clip``, ``transformers``, ``torchvision`` or
    ``timm`` (which converts many others)."""
    if any(n.endswith("embedding/kernel") for n in names):
        return "npz"
    image = any(n.startswith("visual.") for n in names)
    if image and any(n.startswith(("transformer.resblocks.", "text.")) for n in names):
        return "open_clip"
    if "conv_proj.weight" in names or any(n.startswith("encoder.layers.encoder_layer_0.") for n in names):
        return "torchvision"
    if any(re.search(r"embeddings\.patch_embeddings?\.(projection\.)?weight$", n) for n in names):
        return "transformers"
    return "timm"


def first_block_only(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out every block but the first of each stack: enough to tell architectures apart."""
    later = re.compile(r"(^|\.)(blocks|resblocks|layers)\.[1-9]\d*\.")
    return {name: tensor for name, tensor in tensors.items() if not later.search(name)}


def depth(names: Mapping[str, Any]) -> int | None:
    """Number of blocks in the image tower's longest stack."""
    found = [
        int(match[2])
        for name in names
        if not NOT_IMAGE.search(name) and not name.startswith("transformer.")
        if (match := re.search(r"(blocks|resblocks|layers|encoderblock)[._](\d+)[./]", name))
    ]
    return max(found) + 1 if found else None
