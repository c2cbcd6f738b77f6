"""open_clip: CLIP, CustomTextCLIP and CoCa models, or a bare image tower of one; its own towers and timm's.

Only the image tower is rebuilt and diffed; the text tower is never touched. What open_clip's transforms read
(``visual.preprocess_cfg``) follows the image size.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import nn

from anypatch.core.adapters import beneath
from anypatch.core.geometry import Geometry, Size, show
from anypatch.core.twins import Subject
from anypatch.errors import GeometryError, UnsupportedModelError
from anypatch.hosts.base import pair, plain
from anypatch.hosts.timm import model as trunks
from anypatch.hosts.timm.stems import NAME as TIMM

NAME = "open_clip"


def recognises(model: nn.Module) -> bool:
    return any(cls.__module__.split(".")[0] == "open_clip" for cls in type(model).__mro__)


def is_a(module: nn.Module | None, name: str) -> bool:
    """Whether a module is, or derives from, open_clip's class of that name."""
    return any(cls.__name__ == name and cls.__module__.split(".")[0] == "open_clip" for cls in type(module).__mro__)


def image_tower(model: nn.Module) -> tuple[str, nn.Module]:
    """The image tower and where in the model it is."""
    visual = model._modules.get("visual")
    return ("", model) if visual is None else ("visual", visual)


def subject(model: nn.Module) -> Subject:
    path, tower = image_tower(model)
    if is_a(tower, "VisionTransformer"):
        return Subject(
            model,
            _geometry(tower),
            build=lambda g: _build(tower, g),
            path=path,
            finish=lambda g: _preprocessing(tower, g),
        )
    if is_a(tower, "TimmModel"):
        return _timm_subject(model, path, tower)
    if is_a(tower, "ModifiedResNet"):
        raise UnsupportedModelError(
            "the image tower is a ModifiedResNet: its stem is three convolutions with activations between them, not "
            "one linear map per patch"
        )
    raise UnsupportedModelError(f"{type(tower).__name__} is no image tower that anypatch knows in open_clip")


# -- open_clip's own towers ------------------------------------------------------------------------------------


def _geometry(tower: nn.Module) -> Geometry:
    conv = beneath(tower.get_submodule("conv1"))
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != conv.stride:
        raise UnsupportedModelError(f"conv1 of the image tower ({conv}) is not one linear map per patch")
    image: Any = tower.image_size
    return Geometry(tuple(conv.stride), pair(image), 1, NAME)


def _build(tower: nn.Module, geometry: Geometry) -> nn.Module:
    """The tower anew: as deep and as wide, so that whatever it is not built with is seen to be the user's."""
    from open_clip.transformer import VisionTransformer

    assert geometry.image_size is not None
    live: Any = tower
    width = tower.get_parameter("class_embedding").shape[-1]
    blocks = list(live.transformer.resblocks)
    pool: Any = live.attn_pool
    projection = getattr(live, "proj", None)
    hidden: Any = beneath(blocks[0].mlp.c_fc).out_features if blocks else width
    return VisionTransformer(
        image_size=geometry.image_size,
        patch_size=geometry.patch_size,
        width=width,
        layers=len(blocks),
        heads=1,
        mlp_ratio=ratio(hidden, width),
        ls_init_value=1.0 if blocks and not isinstance(blocks[0].ls_1, nn.Identity) else None,
        attentional_pool=False if pool is None else getattr(live, "attn_pool_type", "") or True,
        attn_pooler_queries=256 if pool is None else pool.query.shape[0],
        attn_pooler_heads=1,
        output_dim=width if projection is None else projection.shape[-1],
        no_ln_pre=isinstance(live.ln_pre, nn.Identity),
        pool_type=live.pool_type,
        final_ln_after_pool=bool(live.final_ln_after_pool),
        block_type="custom" if blocks and is_a(blocks[0], "CustomResidualAttentionBlock") else None,
    )


def ratio(hidden: int, width: int) -> float:
    """A ratio that gives exactly ``hidden`` when it is multiplied by ``width`` and cut to a whole number."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def _preprocessing(tower: nn.Module, geometry: Geometry) -> list[tuple[nn.Module, str, Any]]:
    """The configuration that open_clip's transforms are made from."""
    cfg = getattr(tower, "preprocess_cfg", None)
    if not isinstance(cfg, dict):
        return []
    assert geometry.image_size is not None
    size = plain(geometry.image_size) if isinstance(cfg.get("size"), int) else geometry.image_size
    return [(tower, "preprocess_cfg", {**copy.deepcopy(cfg), "size": size})]


# -- timm towers -----------------------------------------------------------------------------------------------


def _timm_subject(model: nn.Module, path: str, tower: nn.Module) -> Subject:
    trunk = tower.get_submodule("trunk")
    if not trunks.recognises(trunk):
        raise UnsupportedModelError(f"the image tower's trunk ({type(trunk).__name__}) was not made by timm")
    inner = trunks.subject(trunk)
    geometry = replace(inner.geometry, library=NAME)

    def finish(target: Geometry) -> list[tuple[nn.Module, str, Any]]:
        changes = inner.finish(replace(target, library=TIMM)) if inner.finish else []
        pool = absolute_pool(tower)
        if pool is not None:  # TimmModel sizes the pool by this
            size = _pool_size(pool, geometry, target)
            changes = [(m, n, {**v, "pool_size": size} if "pool_size" in v else v) for m, n, v in changes]
        return changes + _preprocessing(tower, target)

    return Subject(
        model,
        geometry,
        build=lambda g: _build_timm(tower, inner, geometry, g),
        facts=replace(inner.facts, projections=tuple(f"trunk.{path}" for path in inner.facts.projections)),
        path=path,
        finish=finish,
    )


def _build_timm(tower: nn.Module, inner: Subject, current: Geometry, geometry: Geometry) -> nn.Module:
    twin: Any = type(tower).__new__(type(tower))
    nn.Module.__init__(twin)
    twin.image_size = geometry.image_size
    twin.trunk = inner.build(replace(geometry, library=TIMM))
    twin.head = nn.Sequential()
    pool = absolute_pool(tower)
    if pool is not None:
        old: Any = pool
        twin.head.add_module(
            "pool",
            type(pool)(
                old.in_features,
                feat_size=_pool_size(pool, current, geometry),
                out_features=old.out_features,
                num_heads=old.num_heads,
            ),
        )
    return twin


def absolute_pool(tower: nn.Module) -> nn.Module | None:
    """The head's attention pool with a position table of its own, if there is one."""
    pool = tower.get_submodule("head")._modules.get("pool")
    return pool if pool is not None and hasattr(pool, "feat_size") and hasattr(pool, "pos_embed") else None


def _pool_size(pool: Any, current: Geometry, target: Geometry) -> Size:
    assert current.grid is not None
    assert target.grid is not None
    old = tuple(pool.feat_size)
    if any(f * n % o for f, n, o in zip(old, target.grid, current.grid, strict=True)):
        raise GeometryError(
            f"the head pools {show(old)} features of a {show(current.grid)} grid, and a {show(target.grid)} grid has "
            f'no whole number of them: use keep="grid" or a grid in proportion'
        )
    return tuple(f * n // o for f, n, o in zip(old, target.grid, current.grid, strict=True))
