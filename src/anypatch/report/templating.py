"""Pages from templates: everything that is put into one is escaped."""

from __future__ import annotations

import base64
import functools
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

if TYPE_CHECKING:
    from jinja2 import Environment


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("anypatch.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> Markup:
    """A template with values put in, each escaped unless it is a rendered template itself."""
    return Markup(_environment().get_template(template).render(**values))


def picture_data(pixels: NDArray[np.uint8], largest: int | None = None, photo: bool = False) -> str:
    """A picture as a data URI: PNG, or JPEG for photographs, at most ``largest`` pixels wide or high."""
    from PIL import Image as Pillow

    image = Pillow.fromarray(pixels).convert("RGB")
    if largest is not None:
        image.thumbnail((largest, largest), Pillow.Resampling.LANCZOS)
    buffer = io.BytesIO()
    kind = "jpeg" if photo else "png"
    image.save(
        buffer, kind, **({"quality": 84} if photo else {"optimize": True})
    )  # 84: no blocks to be seen at this size
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
