"""What departs from the default, one row per class of timm; everything else is read off the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

# Flattening order of a patch for linear patch embeddings: NaFlexViT's puts channels last, Gemma 4's first.
ORDERS = {r"embeds\.proj\.": "h w c", r"patch_embed\.input_proj\.": "c h w"}


@dataclass(frozen=True)
class Row:
    """One class.

    Attributes:
        convolutions: whether the stem is several convolutions, so that only the image size can change; the positions
            are ordinary tables, or none.
        fixed_patch: why the patch cannot change, where it cannot.
        before: the convolutions inside the patch embedding that come before its projection.
        pixels: the module inside that says the patch, where the first layer embeds pixels and no patches.
        pixel_kernel: the kernel of that layer at the patch that timm's class has.
        branches: whether branches of other patches read the same image, which scale in proportion.
        overlapping: whether the constructor takes kernel and stride apart.
        in_pixels: whether the constructor's patch is in pixels, although a backbone comes before the projection.
        patches: the only patches that the constructor takes.
        per_stage: whether the constructor takes the patch of every stage.
        one_side: what the constructor takes where it takes one number for both sides of a patch.
        square_grid: whether the forward pass computes for square grids only.
        whole: whether exactness needs whole multiples of the patch (padding, cropping).
    """

    convolutions: bool = False
    fixed_patch: str = ""
    before: str = "backbone"
    pixels: str = ""
    pixel_kernel: int = 0
    branches: bool = False
    overlapping: bool = False
    in_pixels: bool = False
    patches: tuple[int, ...] = ()
    per_stage: bool = False
    one_side: str = ""
    square_grid: bool = False
    whole: bool = False


ROWS: dict[str, Row] = {
    "Xcit": Row(convolutions=True),
    "CoaT": Row(fixed_patch="builds patch_embed2 for a quarter of the image whatever the patch is"),
    "VOLO": Row(before="conv", in_pixels=True, patches=(4, 8, 16)),
    "TNT": Row(pixels="pixel_embed", pixel_kernel=7, whole=True),
    "CrossVit": Row(branches=True, whole=True),
    "PoolingVisionTransformer": Row(overlapping=True, one_side="one stride for both axes"),
    "Sequencer2d": Row(per_stage=True, one_side="square patches only"),
    "ConVit": Row(square_grid=True),
}
_DEFAULT = Row()


def row(core: nn.Module) -> Row:
    """What is known of a model's class."""
    return ROWS.get(type(core).__name__, _DEFAULT)


# What says that so many tokens a side become one, and what else the layer has to say for it to do so.
MERGES: dict[str, dict[str, str]] = {"merge_size": {}, "pooling_kernel_size": {"global_pool": "soft"}}


def merged_tokens(module: nn.Module) -> int | None:
    """How many tokens a side a layer makes one of, if it does: it needs a grid of whole multiples."""
    said = vars(module)
    for name, others in MERGES.items():
        if type(said.get(name)) is int and all(said.get(other) == value for other, value in others.items()):
            return int(said[name])
    return None
