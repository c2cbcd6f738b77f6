"""Which of timm's architectures a file's tensors are of, where they tell."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from anypatch.core.attributes import same
from anypatch.errors import AnypatchError
from anypatch.files import layouts
from anypatch.files.reading import Checkpoint
from anypatch.files.tensors import compared, shapes
from anypatch.hosts.timm.classifier import head_names
from anypatch.hosts.timm.fitting import build_for, converted
from anypatch.hosts.timm.npz import fits_npz
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


def candidates(checkpoint: Checkpoint) -> Iterator[str]:
    """timm's architectures that hold exactly the file's tensors, those of the same function once."""
    native = layouts.native(checkpoint.tensors)
    width, depth = _width_and_depth(checkpoint, native)
    if native.patch is None or width is None or depth is None:
        return
    small = Checkpoint(checkpoint.path, layouts.first_block_only(checkpoint.tensors))
    npz = layouts.origin(checkpoint.tensors) == "npz"
    kept: list[tuple[str, nn.Module]] = []
    for name in _named(width, depth, native):
        try:
            model, convert = build_for(name, native, {"depth": 1})
            fits = fits_npz(model, checkpoint, native) if npz else _fits(model, converted(model, convert, small, name))
        except AnypatchError:
            continue
        if fits and not any(same_function(model, other) for _, other in kept):
            kept.append((name, model))
    yield from (name for name, _ in kept)


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

    def body(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {n: s for n, s in shapes(tensors, floating=True).items() if not (heads and n.startswith(heads))}

    return compared(body(tensors), body(model.state_dict())).agree


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
