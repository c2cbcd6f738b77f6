"""What a library would build from what was written, held against the model that was written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from anypatch.core.empty import empty
from anypatch.errors import UnsupportedModelError
from anypatch.files.tensors import Shapes, difference, shapes_of, stored_shapes

ADVICE = "save its state_dict instead, and adapt a fresh model before loading it"
# Plain values of attention and windows, beside what torch itself calls a layer's constants; those that do nothing to
# values at inference, or that a library sets by what the machine has.
CONSTANTS = ("eps", "num_heads", "num_attention_heads", "head_dim", "scale", "scaling", "window_size", "shift_size")
IDLE_CONSTANTS = frozenset(("inplace", "p", "prob", "drop_prob", "training", "fused_attn", "scale_by_keep"))
PLAIN = (int, float, str, bool, list, tuple)
# Layers that do nothing at inference: one may stand for another.
IDLE = ("Identity", "Dropout", "DropPath", "PatchDropout", "StochasticDepth")


def require_rebuilds(
    folder: Path,
    live: nn.Module,
    build: Callable[[], nn.Module],
    title: str,
    names: Callable[[nn.Module], Shapes] = shapes_of,
    optional: Callable[[nn.Module], Callable[[str], bool]] = lambda built: lambda name: False,
    packed: Callable[[nn.Module], Sequence[str]] = lambda built: (),
) -> None:
    """What the library builds from the files in ``folder`` has to take their tensors and compute what ``live`` does.

    Args:
        folder: what was written.
        live: the model that was written.
        build: builds a model from the written configuration, as the library does on loading.
        title: of the model, with its library, for the error.
        names: what the built model's tensors are called in files, with their shapes.
        optional: of the built model: which of its tensors need not be in the files.
        packed: of the built model: layers, by their names in files, whose tensors a quantiser writes as it likes.

    Raises:
        UnsupportedModelError: it cannot be built, or differs; the message names the tensor or layer.
    """
    try:
        built = empty(build)
    except Exception as error:
        raise UnsupportedModelError(f"{title} cannot be rebuilt from its configuration ({error}): {ADVICE}") from error
    stored, taken, layers = stored_shapes(folder), names(built), packed(built)
    found = next((f"{layer}, of which nothing was written" for layer in layers if not _below(layer, stored)), None)
    if found is None:
        found = difference(_without(layers, stored), _without(layers, taken), optional(built))
    if found is None:
        found = _other_layer(live, built) or _other_constant(live, built)
    if found is not None:
        raise UnsupportedModelError(f"{title} would be rebuilt otherwise, with {found}: {ADVICE}")


def _below(layer: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{layer}.")]


def _without(layers: Sequence[str], shapes: Shapes) -> Shapes:
    hidden = {name for layer in layers for name in _below(layer, shapes)}
    return {name: shape for name, shape in shapes.items() if name not in hidden}


def _other_layer(live: nn.Module, built: nn.Module) -> str | None:
    """A layer without tensors of its own, an activation or a pooling, that is another one in the built model."""
    own = dict(live.named_modules(remove_duplicate=False))
    for path, layer in built.named_modules():
        if not path or any(True for _ in layer.children()) or layer._parameters or layer._buffers:
            continue
        mine = own.get(path)
        if isinstance(mine, type(layer)) or all(m is None or _nothing(m) for m in (layer, mine)):
            continue
        instead = "nothing" if mine is None else f"a {type(mine).__name__}"
        return f"a {type(layer).__name__} as {path}, where the model has {instead}"
    return None


def _other_constant(live: nn.Module, built: nn.Module) -> str | None:
    """A plain value that a layer computes with and no tensor shows, which is another one in the built model."""
    own = dict(live.named_modules(remove_duplicate=False))
    for path, layer in built.named_modules():
        mine = own.get(path)
        if mine is None or type(mine) is not type(layer) or _nothing(layer):
            continue
        for name in sorted({*CONSTANTS, *getattr(type(layer), "__constants__", ())} - IDLE_CONSTANTS):
            before, after = getattr(mine, name, None), getattr(layer, name, None)
            if isinstance(before, PLAIN) and isinstance(after, PLAIN) and not _alike(before, after):
                return f"{name} {after} at {path}, where the model has {before}"
    return None


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-9)  # one root or another of the same number
    return bool(a == b)


def _nothing(layer: nn.Module) -> bool:
    return any(base.__name__.startswith(IDLE) for base in type(layer).__mro__)


def plain_state(model: nn.Module, title: str) -> dict[str, Tensor]:
    """A model's state dict, of tensors alone.

    Raises:
        UnsupportedModelError: torch's own quantised layers, whose packed weights no library builds; the message names
            one.
    """
    state: dict[str, Any] = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.is_quantized:
            raise UnsupportedModelError(
                f"{name} of {title} is quantised by torch, which its library does not build: save the model before it "
                f"is quantised"
            )
    return state


def contiguous(model: nn.Module, title: str) -> dict[str, Tensor]:
    """A model's state dict for a ``.safetensors`` file: no two tensors share memory, all lie in order."""
    return dict(_apart(plain_state(model, title)))


def _apart(tensors: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach()
        storage = value.untyped_storage()
        whole = value.is_contiguous() and storage.nbytes() == value.numel() * value.element_size()
        if not whole or storage.data_ptr() in seen:
            value = value.clone().contiguous()
        elif value.numel():
            seen.add(storage.data_ptr())
        yield name, value
