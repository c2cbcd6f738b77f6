"""open_clip: CLIP, CustomTextCLIP and CoCa models, or a bare image tower of one; its own towers and timm's.

Only the image tower is rebuilt and diffed; the text tower is never touched. What open_clip's transforms read
(``visual.preprocess_cfg``) follows the image size.

``save`` writes ``open_clip_config.json`` and ``open_clip_model.safetensors``, for
``open_clip.create_model("local-dir:DIRECTORY")``. The configuration is read off the live model; what no module
tells (the tokenizer) comes from the configuration that ``load`` remembers, or from ``save(..., name="ViT-B-32")``.

Limits of ``save`` for timm towers: open_clip passes neither a patch size nor an image size on to timm. So where the
geometry is not the one that the timm name stands for, the tower's configuration is written next to the weights, as
``DIRECTORY/tower/config.json``, and open_clip's configuration names it by its absolute path
(``"timm_model_name": "local-dir:DIRECTORY/tower"``). After moving the directory, load it with ``anypatch.load``, edit
that line, or pass the place on: ``cfg = open_clip.get_model_config("local-dir:NEW")``, then
``cfg["vision_cfg"]["timm_model_name"] = "local-dir:NEW/tower"`` and
``open_clip.create_model("local-dir:NEW", vision_cfg=cfg["vision_cfg"])``.
"""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anypatch.core.empty import empty
from anypatch.core.geometry import Geometry, Size, show
from anypatch.core.twins import Subject
from anypatch.errors import CheckpointError, GeometryError, UnsupportedModelError
from anypatch.hosts.base import Example, pair, plain, unknown
from anypatch.hosts.open_clip.files import require_safe, require_weights
from anypatch.hosts.rebuilding import contiguous, require_rebuilds
from anypatch.hosts.timm import model as trunks

NAME = "open_clip"
LOCAL, HUB = "local-dir:", "hf-hub:"
CONFIG, WEIGHTS, TOWER = "open_clip_config.json", "open_clip_model.safetensors", "tower"
REMEMBERED = "_open_clip_model_cfg"  # what a model that `load` made was built from


def recognises(model: nn.Module) -> bool:
    return any(cls.__module__.split(".")[0] == "open_clip" for cls in type(model).__mro__)


def _is(module: nn.Module | None, name: str) -> bool:
    """Whether a module is, or derives from, open_clip's class of that name."""
    return any(cls.__name__ == name and cls.__module__.split(".")[0] == "open_clip" for cls in type(module).__mro__)


def _tower(model: nn.Module) -> tuple[str, nn.Module]:
    """The image tower and where in the model it is."""
    visual = model._modules.get("visual")
    return ("", model) if visual is None else ("visual", visual)


def subject(model: nn.Module) -> Subject:
    path, tower = _tower(model)
    if _is(tower, "VisionTransformer"):
        return Subject(
            model,
            _geometry(tower),
            build=lambda g: _build(tower, g),
            path=path,
            finish=lambda g: _preprocessing(tower, g),
        )
    if _is(tower, "TimmModel"):
        return _timm_subject(model, path, tower)
    if _is(tower, "ModifiedResNet"):
        raise UnsupportedModelError(
            "the image tower is a ModifiedResNet: its stem is three convolutions with activations between them, not "
            "one linear map per patch"
        )
    raise UnsupportedModelError(f"{type(tower).__name__} is no image tower that anypatch knows in open_clip")


# -- open_clip's own towers ------------------------------------------------------------------------------------


def _geometry(tower: nn.Module) -> Geometry:
    conv = _layer(tower.get_submodule("conv1"))
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != conv.stride:
        raise UnsupportedModelError(f"conv1 of the image tower ({conv}) is not one linear map per patch")
    image: Any = tower.image_size
    return Geometry(tuple(conv.stride), pair(image), 1, NAME)


def _layer(module: nn.Module) -> nn.Module:
    """What an adapter's wrapper wraps."""
    inner = module._modules.get("base_layer")
    return module if inner is None else _layer(inner)


def _build(tower: nn.Module, geometry: Geometry) -> nn.Module:
    """The tower anew: as deep and as wide, so that whatever it is not built with is seen to be the user's."""
    from open_clip.transformer import VisionTransformer

    assert geometry.image_size is not None
    live: Any = tower
    width = tower.get_parameter("class_embedding").shape[-1]
    blocks = list(live.transformer.resblocks)
    pool: Any = live.attn_pool
    projection = getattr(live, "proj", None)
    return VisionTransformer(
        image_size=geometry.image_size,
        patch_size=geometry.patch_size,
        width=width,
        layers=len(blocks),
        heads=1,
        mlp_ratio=_ratio(_layer(blocks[0].mlp.c_fc).out_features, width) if blocks else 1.0,
        ls_init_value=1.0 if blocks and not isinstance(blocks[0].ls_1, nn.Identity) else None,
        attentional_pool=False if pool is None else getattr(live, "attn_pool_type", "") or True,
        attn_pooler_queries=256 if pool is None else pool.query.shape[0],
        attn_pooler_heads=1,
        output_dim=width if projection is None else projection.shape[-1],
        no_ln_pre=isinstance(live.ln_pre, nn.Identity),
        pool_type=live.pool_type,
        final_ln_after_pool=bool(live.final_ln_after_pool),
        block_type="custom" if blocks and _is(blocks[0], "CustomResidualAttentionBlock") else None,
    )


def _ratio(hidden: int, width: int) -> float:
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
        changes = inner.finish(replace(target, library=trunks.NAME)) if inner.finish else []
        pool = _absolute_pool(tower)
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
    twin.trunk = inner.build(replace(geometry, library=trunks.NAME))
    twin.head = nn.Sequential()
    pool = _absolute_pool(tower)
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


def _absolute_pool(tower: nn.Module) -> nn.Module | None:
    """The head's attention pool with a position table of its own, if there is one."""
    pool = tower.get_submodule("head")._modules.get("pool")
    return pool if pool is not None and hasattr(pool, "feat_size") and hasattr(pool, "pos_embed") else None


def _pool_size(pool: nn.Module, current: Geometry, target: Geometry) -> Size:
    assert current.grid is not None
    assert target.grid is not None
    old = tuple(pool.feat_size)  # type: ignore[arg-type]
    if any(f * n % o for f, n, o in zip(old, target.grid, current.grid, strict=True)):
        raise GeometryError(
            f"the head pools {show(old)} features of a {show(current.grid)} grid, and a {show(target.grid)} grid has "
            f'no whole number of them: use keep="grid" or a grid in proportion'
        )
    return tuple(f * n // o for f, n, o in zip(old, target.grid, current.grid, strict=True))


# -- examples, loading -----------------------------------------------------------------------------------------


def example(subject: Subject) -> Example:
    model, geometry = subject.model, subject.geometry
    _, tower = _tower(model)
    if _is(tower, "TimmModel"):
        inner = trunks.example_at(tower.get_submodule("trunk"), geometry)
        if any(unit > 1 for unit in inner.unit):  # behind a backbone
            return Example(inner.shape, lambda m, x: inner.call(_tower(m)[1].get_submodule("trunk"), x), inner.unit)
        return Example(inner.shape, _encode)
    channels: Any = _layer(tower.get_submodule("conv1")).in_channels
    assert geometry.image_size is not None
    return Example((2, channels, *geometry.image_size), _encode)


def _encode(model: nn.Module, pixels: Any) -> Any:
    encode: Any = getattr(model, "encode_image", model)
    return encode(pixels)


def load(name: str, **host_kwargs: Any) -> nn.Module:
    """``NAME/PRETRAINED``, ``local-dir:PATH``, ``hf-hub:ORG/REPO``, or a directory.

    The tag may also be given as ``pretrained=``.

    Raises:
        UnsupportedModelError: open_clip has no such model.
        CheckpointError: no tag says which weights, or they cannot be had.
    """
    import open_clip

    given = host_kwargs.pop("pretrained", None)
    identifier, pretrained, cfg = _named(name, host_kwargs)
    if isinstance(given, str):
        pretrained = given
    if identifier.startswith(LOCAL):
        require_weights(Path(identifier[len(LOCAL) :]))
    elif pretrained is None and not identifier.startswith(HUB):
        tags = open_clip.list_pretrained_tags_by_model(identifier)
        which = f"say which with open_clip:{identifier}/TAG: {', '.join(tags)}" if tags else "it has none"
        raise CheckpointError(
            f"open_clip:{identifier} does not say which pretrained weights: {which}; pretrained=False makes random ones"
        )
    try:
        model = open_clip.create_model(identifier, pretrained, **{"require_pretrained": True, **host_kwargs})
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"open_clip cannot load {name}: {error}") from error
    vars(model)[REMEMBERED] = cfg
    return model


def build(name: str, **host_kwargs: Any) -> nn.Module:
    import open_clip

    identifier, _, cfg = _named(name, host_kwargs)
    # the towers' own pretrained weights are weights, too; which of these names there are depends on the version
    parameters = inspect.signature(open_clip.create_model).parameters
    without = {k: False for k in ("load_weights", "pretrained_text", "pretrained_hf") if k in parameters}
    model = open_clip.create_model(identifier, None, **{**without, **host_kwargs})
    vars(model)[REMEMBERED] = cfg
    return model


def names() -> list[str]:
    import open_clip

    return open_clip.list_models()


def _named(name: str, host_kwargs: dict[str, Any]) -> tuple[str, str | None, dict[str, Any]]:
    """open_clip's own name for a model, its tag, and its configuration; a timm tower in a directory is found there."""
    import open_clip

    if Path(name, CONFIG).is_file():
        name = LOCAL + name
    if name.startswith(LOCAL):
        require_safe(Path(name[len(LOCAL) :]))
    identifier, pretrained = name, None
    if not name.startswith((LOCAL, HUB)):
        identifier, _, tag = name.partition("/")
        pretrained = tag or None
    try:
        cfg = open_clip.get_model_config(identifier)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{identifier} holds no open_clip configuration: {error}") from error
    if cfg is None:
        raise unknown(NAME, identifier, open_clip.list_models())
    if name.startswith(LOCAL):
        tower = Path(name[len(LOCAL) :], TOWER)
        if (tower / "config.json").is_file():  # where the directory is now
            cfg["vision_cfg"]["timm_model_name"] = f"{LOCAL}{tower.resolve()}"
            host_kwargs.setdefault("vision_cfg", cfg["vision_cfg"])
    return identifier, pretrained, cfg


# -- saving ----------------------------------------------------------------------------------------------------


def save(model: nn.Module, directory: Path, final: Path, name: str | None = None, **extras: Any) -> None:
    """Write what ``open_clip.create_model("local-dir:DIRECTORY")`` loads (see this module's docstring).

    Args:
        model: a whole model.
        directory: where to.
        final: the place that the directory will have.
        name: the open_clip model whose tokenizer the configuration should name, if ``load`` did not make the model.
        **extras: further entries of the configuration file.
    """
    from safetensors.torch import save_file

    path, tower = _tower(model)
    if not path:
        raise UnsupportedModelError("a bare image tower has no format in open_clip: save the whole model")
    cfg = model_config(model, directory, name)
    save_file(contiguous(model, "open_clip's model"), directory / WEIGHTS)
    require_rebuilds(directory, model, lambda: _construct(model, cfg), "open_clip's model")
    staged, named = f"{LOCAL}{directory / TOWER}", cfg["vision_cfg"]
    if named.get("timm_model_name") == staged:
        cfg["vision_cfg"] = {**named, "timm_model_name": f"{LOCAL}{final.resolve() / TOWER}"}
    preprocessing = {k: v for k, v in getattr(tower, "preprocess_cfg", {}).items() if v is not None}
    text = json.dumps({"model_cfg": cfg, "preprocess_cfg": preprocessing, **extras}, indent=2)
    (directory / CONFIG).write_text(text + "\n")


def model_config(model: nn.Module, directory: Path, name: str | None = None) -> dict[str, Any]:
    """open_clip's configuration of a live model.

    Raises:
        UnsupportedModelError: something that the configuration cannot say; the message names it.
    """
    import open_clip

    cfg = vars(model).get(REMEMBERED) if name is None else open_clip.get_model_config(name)
    if name is not None and cfg is None:
        raise UnsupportedModelError(f"open_clip knows no model {name!r}")
    cfg = copy.deepcopy(cfg) or {}
    _, tower = _tower(model)
    live: Any = model
    activations: list[nn.Module] = []
    if _is(tower, "VisionTransformer"):
        vision = _vision_config(tower, activations)
    elif _is(tower, "TimmModel"):
        vision = {"timm_drop": 0.0, **{k: v for k, v in cfg.get("vision_cfg", {}).items() if k.startswith("timm_")}}
        vision |= _timm_config(tower)
    else:
        raise UnsupportedModelError(f"{type(tower).__name__} is no image tower that anypatch can save")
    text = dict(cfg.get("text_cfg", {}))
    own = model if _is(model, "CLIP") else live.text
    if own is model or _is(own, "TextTransformer"):
        text |= _text_config(own, activations)
    elif not text:
        raise UnsupportedModelError(
            f"the text tower is a {type(own).__name__}: pass name=, the open_clip model it belongs to, to save()"
        )
    projection = live.text_projection if own is model else getattr(own, "text_projection", None)
    width = projection.shape[-1] if isinstance(projection, torch.Tensor) else getattr(projection, "out_features", None)
    result: dict[str, Any] = {
        "embed_dim": cfg.get("embed_dim") or getattr(tower, "output_dim", None) or width or _width(tower),
        "vision_cfg": vision,
        "text_cfg": text,
    }
    if own is not model:
        result["custom_text"] = True
    if _is(model, "CoCa"):
        result["multimodal_cfg"] = {**cfg.get("multimodal_cfg", {}), **_decoder_config(live.text_decoder, activations)}
    if live.logit_bias is not None:
        result["init_logit_bias"] = float(live.logit_bias.detach().flatten()[0])
    if live.logit_scale.ndim:
        result["nonscalar_logit_scale"] = True
    quick = {type(a).__name__ == "QuickGELU" for a in activations}
    if len(quick) > 1:
        raise UnsupportedModelError(
            "one tower uses QuickGELU and another does not: open_clip's configuration has one flag"
        )
    if quick == {True}:
        result["quick_gelu"] = True
    if _is(tower, "TimmModel"):
        _name_timm_tower(model, result, directory)
    return result


def _width(tower: nn.Module) -> int:
    head = [m for m in tower.modules() if isinstance(m, nn.Linear)][-1]
    return head.out_features


def _vision_config(tower: nn.Module, activations: list[nn.Module]) -> dict[str, Any]:
    t: Any = tower
    cfg = {
        "image_size": plain(tuple(t.image_size)),
        "patch_size": plain(tuple(t.patch_size)),
        "width": t.class_embedding.shape[-1],
        "layers": len(t.transformer.resblocks),
        "no_ln_pre": isinstance(t.ln_pre, nn.Identity),
        "final_ln_after_pool": bool(t.final_ln_after_pool),
        "pool_type": t.pool_type,
        "output_tokens": bool(t.output_tokens),
        "patch_dropout": float(getattr(t.patch_dropout, "prob", 0.0)),
        **_norm(t.ln_post),
        **_blocks(t.transformer, activations),
    }
    cfg["head_width"] = cfg["width"] // cfg.pop("heads")
    if t.attn_pool is not None:
        cfg["attentional_pool"] = getattr(t, "attn_pool_type", "") or True
        cfg["attn_pooler_queries"] = t.attn_pool.query.shape[0]
        cfg["attn_pooler_heads"] = t.attn_pool.attn.num_heads
        if cfg["attentional_pool"] is not True:
            del cfg["pool_type"]
    return {k: list(v) if isinstance(v, tuple) else v for k, v in cfg.items()}


def _norm(norm: nn.Module) -> dict[str, Any]:
    eps = getattr(norm, "eps", 1e-5)
    return {} if eps == 1e-5 else {"norm_kwargs": {"eps": eps}}


def _blocks(transformer: nn.Module, activations: list[nn.Module]) -> dict[str, Any]:
    """What a stack of attention blocks was built from, in the configuration's words."""
    stack: Any = transformer
    block = stack.resblocks[0]
    activation = block.mlp.gelu
    cfg: dict[str, Any] = {
        "heads": block.attn.num_heads,
        "mlp_ratio": _ratio(block.mlp.c_fc.out_features, stack.width),
    }
    if not isinstance(block.ls_1, nn.Identity):
        cfg["ls_init_value"] = float(block.ls_1.gamma.detach().flatten()[0])
    if type(activation).__name__ not in ("GELU", "QuickGELU"):
        raise UnsupportedModelError(f"open_clip's configuration knows no activation {type(activation).__name__}")
    activations.append(activation)
    if getattr(activation, "approximate", "none") != "none":
        cfg["act_kwargs"] = {"approximate": activation.approximate}
    if _is(block, "CustomResidualAttentionBlock"):
        attention = block.attn
        cfg["block_type"] = "custom"
        cfg["qk_norm"] = not isinstance(attention.ln_q, nn.Identity)
        cfg["scaled_cosine_attn"] = bool(attention.scaled_cosine)
        cfg["scale_heads"] = bool(attention.scale_heads)
        cfg["scale_attn_inner"] = not isinstance(attention.ln_inner, nn.Identity)
        cfg["scale_attn"] = not isinstance(block.ln_attn, nn.Identity)
        cfg["scale_fc"] = not isinstance(block.mlp.ln, nn.Identity)
    return cfg


def _text_config(text: nn.Module, activations: list[nn.Module]) -> dict[str, Any]:
    """Of a ``TextTransformer``, or of a ``CLIP`` that holds the parts of one."""
    t: Any = text
    flat = _is(text, "CLIP")
    projection = t.text_projection
    cfg: dict[str, Any] = {
        "context_length": t.context_length,
        "vocab_size": t.token_embedding.num_embeddings,
        "width": t.token_embedding.embedding_dim,
        "layers": len(t.transformer.resblocks),
        "no_causal_mask": t.attn_mask is None,
        "pool_type": t.text_pool_type if flat else t.pool_type,
        "eos_id": t.text_eos_id if flat else t.eos_id,
        **_norm(t.ln_final),
        **_blocks(t.transformer, activations),
    }
    if not flat:
        cfg |= {"pad_id": t.pad_id, "embed_cls": t.cls_emb is not None, "output_tokens": bool(t.output_tokens)}
    if projection is None:
        cfg["proj_type"] = "none"
    elif isinstance(projection, nn.Linear):
        cfg["proj_bias"] = True
    return cfg


def _decoder_config(decoder: nn.Module, activations: list[nn.Module]) -> dict[str, Any]:
    d: Any = decoder
    cfg = _blocks(d, activations)
    cfg |= {"context_length": d.context_length, "width": d.width, "layers": len(d.resblocks)}
    return {k: v for k, v in cfg.items() if k not in ("mlp_ratio", "act_kwargs")}


def _timm_config(tower: nn.Module) -> dict[str, Any]:
    t: Any = tower
    head = dict(t.head.named_children())
    pool = getattr(t.trunk, "global_pool", None)
    if "pool" in head:
        pool = "abs_attn" if _absolute_pool(tower) is not None else "rot_attn"
    cfg: dict[str, Any] = {"image_size": plain(tuple(pair(t.image_size))), "timm_model_pretrained": False}
    if isinstance(cfg["image_size"], tuple):
        cfg["image_size"] = list(cfg["image_size"])
    if isinstance(pool, str):
        cfg["timm_pool"] = pool
    if "proj" in head:
        cfg |= {"timm_proj": "linear", "timm_proj_bias": head["proj"].bias is not None}
    elif "mlp" in head:
        cfg |= {"timm_proj": "mlp", "timm_proj_bias": head["mlp"].fc2.bias is not None}
    elif "pool" in head:
        cfg["timm_proj"] = None
    else:
        cfg["timm_proj"] = None if t.trunk.num_classes else "none"
    return cfg


def _name_timm_tower(model: nn.Module, cfg: dict[str, Any], directory: Path) -> None:
    """Name a timm model that has the tower's geometry: by its own name, or by a directory written for it."""
    trunk: Any = _tower(model)[1].get_submodule("trunk")
    architecture = trunk.pretrained_cfg["architecture"]
    cfg["vision_cfg"]["timm_model_name"] = architecture
    try:
        twin = empty(lambda: _construct(model, cfg))
        same = trunks.subject(twin.get_submodule("visual.trunk")).geometry == trunks.subject(trunk).geometry
    except Exception:
        same = False
    if same and _mismatch(model, twin) is None:
        return
    from timm.models._hub import save_config_for_hf

    tower = directory / TOWER
    tower.mkdir()
    geometry = trunks.subject(trunk).geometry
    arguments = {k: v for k, v in getattr(trunk, "_model_args", {}).items() if k != "pretrained_model_args"}
    if not {"img_size", "patch_size"} & arguments.keys():  # a timm that keeps no record of its arguments
        arguments["patch_size"] = plain(geometry.patch_size)
        if geometry.image_size is not None:
            arguments["img_size"] = plain(geometry.image_size)
    save_config_for_hf(trunk, str(tower / "config.json"), model_args=arguments)
    cfg["vision_cfg"]["timm_model_name"] = f"{LOCAL}{tower}"


def _construct(model: nn.Module, cfg: dict[str, Any]) -> nn.Module:
    import open_clip

    arguments = {k: copy.deepcopy(v) for k, v in cfg.items() if k != "custom_text"}
    if "hf_model_name" in arguments["text_cfg"]:
        arguments["text_cfg"]["hf_model_pretrained"] = False
    name = next(n for n in ("CoCa", "CustomTextCLIP", "CLIP") if _is(model, n))
    return getattr(open_clip, name)(**arguments)


def _mismatch(model: nn.Module, twin: nn.Module) -> str | None:
    """The first tensor in which two models differ by name or shape."""
    a, b = model.state_dict(), twin.state_dict()
    return next((k for k in {**a, **b} if k not in a or k not in b or a[k].shape != b[k].shape), None)
