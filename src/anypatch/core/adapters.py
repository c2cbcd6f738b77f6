"""Looking through what stands between the user's model and the layers that its library builds.

``torch.compile``, DataParallel and PEFT wrap whole models; PEFT's adapters wrap single layers, and their own first
layers read what the wrapped layer reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

HELD = "_anypatch_model"  # in the attributes of a module that holds a model's parameters and names the model
MARK = "_anypatch_view"  # in the attributes of every module of a view: its tensors that follow the geometry, by name


def unwrap(model: nn.Module) -> nn.Module:
    """Take off ``torch.compile``, DataParallel and PEFT wrappers, and what names the model it stands for."""
    while isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule):
        if HELD in vars(model):
            model = vars(model)[HELD]
        inner = model._modules.get("_orig_mod")
        if inner is None and type(model).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = model._modules.get("module")
        if inner is None and is_peft(model) and not wrapped(model):
            inner = _based(model)
        if inner is None or inner is model:
            return model
        model = inner
    return model


def is_peft(module: nn.Module) -> bool:
    """Whether a module is PEFT's: a whole model's wrapper, or an adapter over a layer."""
    return type(module).__module__.split(".")[0] == "peft"


def _based(model: nn.Module) -> nn.Module | None:
    """The model that one of PEFT's wrappers is around; a mixed one has no function that says so."""
    if hasattr(model, "get_base_model"):
        return cast(nn.Module, cast(Any, model).get_base_model())
    tuner = model._modules.get("base_model")
    return None if tuner is None else tuner._modules.get("model")


@dataclass(frozen=True)
class Place:
    """The live modules that stand where a module of a twin is.

    Attributes:
        outer: as the live model has them there, adapters and wrappers included.
        layers: those that do the work: what is wrapped, and the adapter's own layers that read the same input (LoRA's
            first factor over a patch projection is itself a patch projection).
    """

    outer: tuple[nn.Module, ...]
    layers: tuple[nn.Module, ...]


def match(part: nn.Module, twin: nn.Module) -> dict[str, Place]:
    """For every module path of ``twin``, the live modules below ``part`` that stand there.

    Looks through PEFT's adapters, and through modules of the user's own that hold what the twin has in their place.
    """
    found: dict[str, Place] = {}

    def walk(path: str, outer: list[nn.Module], twin: nn.Module) -> None:
        inner = [seen for module in outer for seen in _look_through(module, twin)]
        layers = [layer for module in inner for layer in _layers(module, twin)]
        found[path] = Place(tuple(outer), tuple(layers))
        for name, child in twin._modules.items():
            if child is not None:
                below = [live for module in inner for live in _children(module, name)]
                walk(f"{path}.{name}" if path else name, below, child)

    walk("", [part], twin)
    return found


def _look_through(module: nn.Module, twin: nn.Module) -> list[nn.Module]:
    """The modules of the twin's class inside one of another class that does not itself hold what the twin holds."""
    kind = type(twin)
    if (
        isinstance(module, (kind, torch.jit.ScriptModule))
        or wrapped(module)
        or kind in (nn.Identity, nn.ModuleList, nn.Sequential)
    ):
        return [module]
    held = [*twin._parameters, *twin._buffers, *twin._modules]
    own = {*module._parameters, *module._buffers, *module._modules}
    if held and all(name in own for name in held):
        return [module]
    inside: list[nn.Module] = []
    for child in module.children():
        inside += [child] if type(child) is kind else [m for m in _look_through(child, twin) if type(m) is kind]
    return inside or [module]


def wrapped(module: nn.Module) -> list[nn.Module]:
    """What an adapter wraps: PEFT's ``base_layer``, and ``original_module`` with its trained copies."""
    if isinstance(module, torch.jit.ScriptModule):
        return []
    found = [module._modules[n] for n in ("base_layer", "original_module") if module._modules.get(n) is not None]
    copies = module._modules.get("modules_to_save")
    if copies is not None and found:
        found += list(copies.children())
    return [m for m in found if m is not None]


def beneath(layer: nn.Module) -> nn.Module:
    """The layer that PEFT's adapters wrap, one in another where there are several."""
    while "base_layer" in layer._modules:
        layer = layer.get_submodule("base_layer")
    return layer


def innermost(layer: nn.Module) -> nn.Module:
    """The layer that an adapter, or a module of the user's around one linear layer or convolution, wraps."""
    layer = beneath(layer)
    if isinstance(layer, (_ConvNd, nn.Linear)):
        return layer
    inside = [m for m in layer.modules() if isinstance(m, (_ConvNd, nn.Linear))]
    return inside[0] if len(inside) == 1 else layer


def _children(module: nn.Module, name: str) -> Iterator[nn.Module]:
    """Children called ``name``, looking through adapters; a recorded program stands for all that was in it.

    A wrapper of PEFT's may have such a child of its own beside those of what it wraps: where a name to be saved fits a
    module and one inside it (``embeddings``, ``patch_embeddings``), it puts the wrapper of the inner one there.
    """
    if isinstance(module, torch.jit.ScriptModule):
        yield module
        return
    child = module._modules.get(name)
    if child is not None:
        yield child
    for inner in wrapped(module):
        yield from _children(inner, name)


def _layers(module: nn.Module, twin: nn.Module) -> list[nn.Module]:
    inner = wrapped(module)
    if not inner or type(module) is type(twin):
        return [module]
    found = [layer for m in inner for layer in _layers(m, twin)]
    for name, child in module._modules.items():
        if child is None or child in inner or name == "modules_to_save":
            continue
        found += [layer for layer in child.modules() if reads_same_input(layer, twin)]
    return found


def reads_same_input(layer: nn.Module, twin: nn.Module) -> bool:
    if isinstance(twin, _ConvNd) and isinstance(layer, _ConvNd):
        return set(twin.kernel_size) != {1} and (layer.kernel_size, layer.stride) == (twin.kernel_size, twin.stride)
    if isinstance(twin, nn.Linear) and isinstance(layer, nn.Linear):
        return layer.in_features == twin.in_features
    return False
