"""Which architecture a file's tensors are of, where they tell."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from anypatch.core.attributes import same
from anypatch.errors import AnypatchError, CheckpointError
from anypatch.files import layouts
from anypatch.files.reading import Checkpoint
from anypatch.hosts.fitting import (
    build_open_clip,
    build_timm,
    build_torchvision,
    converted,
    head_names,
    open_clip_names,
)
from anypatch.hosts.timm.private import construction

# timm's modules whose models have one width and one depth, which tensors tell.
PLAIN = re.compile(r"timm\.models\.(vision_transformer(_relpos|_sam)?|deit|beit|eva)$")
BOOKKEEPING = frozenset(
    (
        "pretrained_cfg",
        "default_cfg",
        "pretrained_model_args",
        "_model_args",
        "_traits",
        "feature_info",
        "training",
        "init_values",
    )  # of LayerScale: what it starts from
)
SHOWN = 8


def infer(checkpoint: Checkpoint) -> list[str]:
    """Architectures, as ``library:name``, that hold exactly the file's tensors; the likeliest first.

    Those that compute the same function are one, under the name whose own geometry is nearest. More than one means
    that tensors do not tell (the number of heads, the activation, the width of a norm's epsilon).

    Raises:
        CheckpointError: none was found.
    """
    origin = layouts.origin(checkpoint.tensors)
    finders = {"open_clip": _open_clip, "torchvision": _torchvision, "transformers": _transformers}
    found = list(finders.get(origin, _timm)(checkpoint))
    if not found:
        width = layouts.native(checkpoint.tensors)
        raise CheckpointError(
            f"cannot tell the architecture of {checkpoint.path}: no model of {_library(origin)} has exactly its "
            f"{len(checkpoint.tensors)} tensors (patch projection {width.kernel}); say which with "
            f'arch="{_library(origin)}:NAME"'
        )
    return found


def choose(checkpoint: Checkpoint) -> str:
    """The one architecture of a file.

    Raises:
        CheckpointError: none fits, or several, which the message lists.
    """
    found = infer(checkpoint)
    if len(found) > 1:
        shown = ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
        raise CheckpointError(
            f"the tensors of {checkpoint.path} fit several architectures that compute different things: {shown}; "
            f'say which with arch="{found[0]}"'
        )
    return found[0]


def _library(origin: str) -> str:
    return "timm" if origin == "npz" else origin


# -- timm --------------------------------------------------------------------------------------------------


def _timm(checkpoint: Checkpoint) -> Iterator[str]:
    native = layouts.native(checkpoint.tensors)
    width, depth = _width_and_depth(checkpoint, native)
    if native.patch is None or width is None or depth is None:
        return
    small = Checkpoint(checkpoint.path, layouts.first_block_only(checkpoint.tensors))
    npz = layouts.origin(checkpoint.tensors) == "npz"
    kept: list[tuple[str, nn.Module]] = []
    for name in _named(width, depth, native):
        try:
            model, convert = build_timm(name, native, {"depth": 1})
            fits = _fits_npz(model, checkpoint, native) if npz else _fits(model, converted(model, convert, small, name))
        except AnypatchError:
            continue
        if fits and not any(same_function(model, other) for _, other in kept):
            kept.append((name, model))
    yield from (f"timm:{name}" for name, _ in kept)


def _width_and_depth(checkpoint: Checkpoint, native: layouts.Native) -> tuple[int | None, int | None]:
    if native.kernel is None:
        return None, None
    shape = checkpoint.tensors[native.kernel].shape
    width = shape[-1] if native.kernel.endswith("kernel") else shape[0]
    for name, tensor in checkpoint.tensors.items():
        if name.endswith("Transformer/encoderblock/LayerNorm_0/scale"):  # all blocks stacked
            return width, tensor.shape[0]
    return width, layouts.depth(checkpoint.tensors)


def _named(width: int, depth: int, native: layouts.Native) -> list[str]:
    """timm's models of this width and depth; those of the file's own patch and image size first."""
    import timm

    found = []
    for name in timm.list_models():
        entry = timm.models.model_entrypoint(name)
        if not PLAIN.search(entry.__module__):
            continue
        arguments = _constructor_arguments(name)
        if arguments.get("embed_dim") != width or arguments.get("depth") != depth:
            continue
        own = arguments.get("patch_size")
        patch = own == (native.patch or (None,))[0]
        image = native.image is not None and arguments.get("img_size") == native.image[0]
        found.append((not patch, not image, len(name), name))
    found.sort()
    if any(not other_patch for other_patch, *_ in found):
        found = [item for item in found if not item[0]]
    return [item[-1] for item in found]


def _constructor_arguments(name: str) -> dict[str, Any]:
    """What timm would construct a model with, without constructing it."""
    made = construction(name)
    if made is None:
        return {}
    parameters = inspect.signature(made.kind).parameters.values()
    return {**{p.name: p.default for p in parameters if p.default is not p.empty}, **made.arguments}


def _fits(model: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Whether names and shapes agree, classification heads aside."""
    heads = tuple(head + "." for head in head_names(model))
    own = {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if value.is_floating_point() and not (heads and name.startswith(heads))
    }
    have = {
        name: tuple(value.shape)
        for name, value in tensors.items()
        if value.is_floating_point() and not (heads and name.startswith(heads))
    }
    return own == have


def _fits_npz(model: Any, checkpoint: Checkpoint, native: layouts.Native) -> bool:
    prefix = str(native.kernel).removesuffix("embedding/kernel")
    stored = {n[len(prefix) :]: t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}
    query = next((t for n, t in stored.items() if re.match(r"Transformer/enc\w+/MultiHead\w+/query/kernel", n)), None)
    table = next((t for n, t in stored.items() if n.endswith("pos_embedding")), None)
    if query is None or table is None or getattr(model, "pos_embed", None) is None:
        return False
    block = model.blocks[0]
    hidden = next((t for n, t in stored.items() if re.match(r"Transformer/enc\w+/MlpBlock\w+/Dense_0/kernel", n)), None)
    expected = {n for n, _ in model.named_parameters() if n.endswith(("norm_pre.weight", "reg_token", "ls1.gamma"))}
    return (
        not expected
        and query.shape[-2] == block.attn.num_heads
        and hidden is not None
        and hidden.shape[-1] == block.mlp.fc1.out_features
        and block.attn.qkv.bias is not None
        and table.numel() == model.pos_embed.numel()
        and ("cls" in stored) == (getattr(model, "cls_token", None) is not None)
        and any(n.startswith("MAPHead_0") for n in stored) == (getattr(model, "attn_pool", None) is not None)
    )


def same_function(a: nn.Module, b: nn.Module) -> bool:
    """Whether two empty models differ in nothing that ``forward`` could read, head and image statistics aside."""
    heads = tuple(head_names(a)) + tuple(head_names(b))
    ours, theirs = dict(a.named_modules()), dict(b.named_modules())
    ours = {n: m for n, m in ours.items() if n not in heads}
    theirs = {n: m for n, m in theirs.items() if n not in heads}
    if ours.keys() != theirs.keys():
        return False
    for name, module in ours.items():
        other = theirs[name]
        if type(module) is not type(other):
            return False
        x = {k: v for k, v in vars(module).items() if k not in BOOKKEEPING and not k.startswith("_")}
        y = {k: v for k, v in vars(other).items() if k not in BOOKKEEPING and not k.startswith("_")}
        x.pop("num_classes", None)
        y.pop("num_classes", None)
        if not same(x, y) or not same(dict(module._buffers), dict(other._buffers)):
            return False
    return True


# -- others ------------------------------------------------------------------------------------------------


def _open_clip(checkpoint: Checkpoint) -> Iterator[str]:
    import open_clip

    tensors = checkpoint.tensors
    native = layouts.native(tensors)
    facts = _clip_facts(tensors)
    for name in sorted(open_clip.list_models(), key=len):
        cfg = open_clip.get_model_config(name)
        if cfg is None or not _matches_clip(cfg, facts, native):
            continue
        if checkpoint.kind == "torchscript" and not cfg.get("quick_gelu"):
            continue  # OpenAI's archives: all of its models use that activation
        try:
            model = build_open_clip(name, native, {})
            stored = open_clip_names(model, checkpoint, name)
        except Exception:
            continue
        own = {n: tuple(t.shape) for n, t in model.state_dict().items() if t.is_floating_point()}
        if own == {n: tuple(t.shape) for n, t in stored.items() if t.is_floating_point()}:
            yield f"open_clip:{name}"


def _clip_facts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    kernel = tensors.get("visual.conv1.weight")
    text = next((t for n, t in tensors.items() if n in ("ln_final.weight", "text.ln_final.weight")), None)
    words = next(
        (t for n, t in tensors.items() if n in ("token_embedding.weight", "text.token_embedding.weight")), None
    )
    resblock = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.")
    blocks = [int(m[1]) for n in tensors if (m := resblock.match(n))]
    return {
        "width": None if kernel is None else kernel.shape[0],
        "layers": max(blocks) + 1 if blocks else None,
        "text_width": None if text is None else text.shape[0],
        "vocabulary": None if words is None else words.shape[0],
        "trunk": any(n.startswith("visual.trunk.") for n in tensors),
    }


def _matches_clip(cfg: dict[str, Any], facts: dict[str, Any], native: layouts.Native) -> bool:
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    if ("timm_model_name" in vision) != facts["trunk"]:
        return False
    if facts["text_width"] is not None and "hf_model_name" not in text:
        if text.get("width", 512) != facts["text_width"]:
            return False
    elif "hf_model_name" in text and facts["text_width"] is not None:
        return False
    if facts["vocabulary"] is not None and text.get("vocab_size", 49408) != facts["vocabulary"]:
        return False
    if facts["trunk"]:
        return True
    return (
        vision.get("width", 768) == facts["width"]
        and vision.get("layers", 12) == facts["layers"]
        and native.patch is not None
        and vision.get("patch_size") == native.patch[0]
    )


def _torchvision(checkpoint: Checkpoint) -> Iterator[str]:
    from torchvision.models import list_models

    for name in list_models():
        if not name.startswith(("vit_", "swin_")):
            continue
        try:
            model = build_torchvision(name, checkpoint.tensors, {})
        except AnypatchError:
            continue
        own = {n: tuple(t.shape) for n, t in model.state_dict().items()}
        if own == {n: tuple(t.shape) for n, t in checkpoint.tensors.items()}:
            yield f"torchvision:{name}"


def _transformers(checkpoint: Checkpoint) -> Iterator[str]:
    if (checkpoint.path.parent / "config.json").is_file():
        yield f"transformers:{checkpoint.path.parent}"
        return
    raise CheckpointError(
        f"{checkpoint.path} has transformers' names, and its configuration is not beside it: put config.json there, or "
        f'say where it is with arch="transformers:DIRECTORY"'
    )
