"""Which of a library's models its own tests run on, where they run on all: those that the coverage run proves.

timm's tests run on 1,371 models, convolutional networks and those of gigabytes among them, open_clip's on 150. The
coverage run has one entry for every kind of patch embedding and of positions; the tests run on the model behind each
entry that is not refused, in open_clip, where an entry stands for many, on the smallest behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from families import families

# The width of ViT-B's joint space is 512 or 768. Larger towers have more than 10^9 parameters with their words', and
# the library's tests of one take minutes.
WIDEST = 768


def timm() -> list[str]:
    proved = [family.build for family in families("timm") if not family.refused]
    return sorted({build.args[0] for build in proved if isinstance(build, partial)})


def open_clip() -> list[str]:
    import open_clip as library

    from families.open_clip import kinds

    def size(name: str) -> tuple[int, int, str]:
        config = library.get_model_config(name)
        return config["embed_dim"], config["vision_cfg"].get("image_size", 224), name

    smallest = [min(names, key=size) for names, refused in kinds() if not refused]
    return sorted(name for name in smallest if size(name)[0] <= WIDEST)


CHOICE: dict[str, Callable[[], list[str]]] = {"timm": timm, "open_clip": open_clip}
