"""Pictures as 8-bit colours, whatever a file holds: scaled or refused, never clipped.

Pillow's own ``convert("RGB")`` clips what has more than 256 levels: a 16-bit scan becomes nearly white, a picture of
floats in 0..1 black. Here white is white:

| what the picture holds | taken as |
|---|---|
| 8 bits, a palette, CMYK, YCbCr, one bit | Pillow's conversion; transparency is dropped, as torchvision's loader does |
| 16 bits (``I;16`` in any byte order; ``I`` from PNG and PGM, which Pillow reads as 0..65535) | 0..65535 |
| 32-bit integers (``I``) | levels 0..255, if none is outside; no white is known for others: refused |
| floats (``F``) | 0..1, or levels 0..255 where some are above 1; others, and NaN: refused |

Pictures stand upright (their EXIF orientation is applied); of an animation or a file of many pages the first counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

WHITE16 = 65535  # the highest level of 16 bits
SIXTEEN_BITS = ("PNG", "PPM")  # formats whose mode I holds 0..65535; a PGM of another maximum is stretched by Pillow
WHITE8 = 255  # and of 8


def as_rgb(image: Image) -> Image:
    """An open picture as 8-bit RGB, upright.

    Args:
        image: a Pillow image of any mode.

    Returns:
        A new RGB image.

    Raises:
        ValueError: levels whose white is not known, or a mode that Pillow cannot convert. Whoever reads many pictures
            counts it among those that cannot be read.

    Examples:
        >>> import numpy as np
        >>> from PIL import Image
        >>> scan = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
        >>> np.asarray(as_rgb(scan))[0, :, 0].tolist()
        [0, 128, 255]
    """
    upright = _upright(image)
    if upright.mode.startswith("I") or upright.mode == "F":
        from PIL import Image as Pillow

        return Pillow.fromarray(_levels(upright, image.format)).convert("RGB")
    if upright.mode == "La":  # premultiplied: Pillow has the one way out
        upright = upright.convert("LA")
    return upright.convert("RGB")


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except (OSError, EOFError, MemoryError):
        raise
    except Exception:  # a broken EXIF block raises many kinds, and says nothing of the pixels
        return image


def _levels(image: Image, file_format: str | None) -> NDArray[np.uint8]:
    """Grey levels 0..255 of a picture of one channel with more of them."""
    values = np.asarray(image)
    if values.dtype.itemsize == 2 or (image.mode == "I" and file_format in SIXTEEN_BITS):
        return _scaled(values, WHITE16)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= WHITE8):  # NaN is neither
        kind = "floats" if image.mode == "F" else "32-bit integers"
        fits = "0..1 or 0..255" if image.mode == "F" else "0..255"
        raise ValueError(
            f"{kind} from {low:g} to {high:g}: which of them is white is not known; scale them to {fits} or to 16 bits"
        )
    return _scaled(values, 1 if image.mode == "F" and high <= 1 else WHITE8)


def _scaled(values: NDArray, white: int) -> NDArray[np.uint8]:
    return np.rint(values.astype(np.float64) * (WHITE8 / white)).astype(np.uint8)
