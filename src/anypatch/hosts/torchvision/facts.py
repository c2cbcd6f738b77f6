"""torchvision's Vision Transformers, one row per class; everything else is read off the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Row:
    """One class.

    Attributes:
        module: where torchvision defines it.
        name: of the class.
        projection: the patch projection's path.
        norm: the path of a normalisation that the constructor's ``norm_layer`` makes.
        norm_eps: its epsilon where the constructor is given none.
        windows: whether tokens attend in windows, so that any image size will do and no token stands before the grid.
    """

    module: str
    name: str
    projection: str
    norm: str
    norm_eps: float
    windows: bool = False


ROWS = {
    row.module: row
    for row in (
        Row("torchvision.models.vision_transformer", "VisionTransformer", "conv_proj", "encoder.ln", 1e-6),
        Row("torchvision.models.swin_transformer", "SwinTransformer", "features.0.0", "norm", 1e-5, windows=True),
    )
}


def row(model: nn.Module) -> Row | None:
    """What is known of the class that the model has, or derives from."""
    for cls in type(model).__mro__:
        found = ROWS.get(cls.__module__)
        if found is not None and found.name == cls.__name__:
            return found
    return None
