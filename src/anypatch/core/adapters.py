"""Looking through what stands between the user's model and the layers that its library builds.

``torch.compile``, DataParallel and PEFT wrap whole models; PEFT's adapters wrap single layers, and their own first
layers read what the wrapped layer reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from torch.nn.modules.conv import _ConvNd

HELD = "_anypatch_model"  # in the attributes of a module that holds a model's parameters and names the model


def unwrap(model: nn.Module) -> nn.Module:
    """Take off ``torch.compile``, DataParallel and PEFT wrappers, and what names the model it stands for."""
    while isinstance(model, nn.Module):
        if HELD in vars(model):
            model = vars(model)[HELD]
        inner = model._modules.get("_orig_mod")
        if inner is None and type(model).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = model._modules.get("module")
        if inner is None and type(model).__module__.split(".")[0] == "peft" and hasattr(model, "get_base_model"):
            inner = cast(Any, model).get_base_model()
        if inner is None or inner is model:
            return model
        model = inner
    return model


def resolve(part: nn.Module, path: str, twin: nn.Module | None = None) -> list[nn.Module]:
    """The live modules below ``part`` that stand where ``path`` is in a twin.

    One, unless an adapter wraps it: then, for the layer ``twin``, the wrapped layer and the adapter's own layers that
    read the same input (LoRA's first factor over a patch projection is itself a patch projection).
    """
    modules: list[nn.Module] = [part]
    for name in path.split(".") if path else []:
        modules = [child for m in modules for child in _children(m, name)]
    if twin is None:
        return modules
    return [layer for module in modules for layer in _layers(module, twin)]


def wrapped(module: nn.Module) -> list[nn.Module]:
    """What an adapter wraps: PEFT's ``base_layer``, and ``original_module`` with its trained copies."""
    found = [module._modules[n] for n in ("base_layer", "original_module") if module._modules.get(n) is not None]
    copies = module._modules.get("modules_to_save")
    if copies is not None and found:
        found += list(copies.children())
    return [m for m in found if m is not None]


def _children(module: nn.Module, name: str) -> Iterator[nn.Module]:
    """Children called ``name``, looking through adapters."""
    child = module._modules.get(name)
    if child is not None:
        yield child
        return
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
        found += [layer for layer in child.modules() if _reads_same_input(layer, twin)]
    return found


def _reads_same_input(layer: nn.Module, twin: nn.Module) -> bool:
    if isinstance(twin, _ConvNd) and isinstance(layer, _ConvNd):
        return set(twin.kernel_size) != {1} and (layer.kernel_size, layer.stride) == (twin.kernel_size, twin.stride)
    if isinstance(twin, nn.Linear) and isinstance(layer, nn.Linear):
        return layer.in_features == twin.in_features
    return False
