"""A model as its library builds it: adapters merged, reparametrised weights computed, wrappers inside taken off."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from anypatch.core.adapters import is_peft, unwrap, wrapped
from anypatch.core.merging_proof import Answers
from anypatch.errors import UnsupportedModelError

# Forward pre-hooks of torch that compute a weight from others: class, and where the name of the weight is kept.
COMPUTING = {"WeightNorm": "name", "SpectralNorm": "name"}


def merged(model: nn.Module) -> nn.Module:
    """``model`` without wrappers and anything else that its library would not build, computing the same function.

    PEFT's adapters are merged, weights under torch's parametrisations (weight norm, pruning and their like) are
    computed, layers that ``torch.compile`` or DataParallel wrap are unwrapped.

    Returns:
        the model itself if there is nothing to do; else a copy, which shares the memory of all tensors that stay.

    Raises:
        UnsupportedModelError: adapters that cannot be merged.
    """
    for wrapper in model.modules():
        prompts = wrapper._modules.get("prompt_encoder") if is_peft(wrapper) else None
        if prompts is not None and any(True for _ in prompts.children()):
            raise UnsupportedModelError(
                "the model has trained prompts of PEFT, which are no part of its library's format: save them with "
                "their own save_pretrained, beside the model without them"
            )
    model = unwrap(model)
    special = [module for module in model.modules() if _is_special(module)]
    if not special:
        return model
    memo: dict[int, Any] = {id(t): t for t in _kept(model, special)}
    memo |= {id(v): v.detach() for m in special for v in vars(m).values() if isinstance(v, torch.Tensor)}
    try:
        for module in special:
            if (inner := _wrapped(module)) is not None:
                memo[id(module)] = copy.deepcopy(inner, memo)
        result = copy.deepcopy(model, memo)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} has adapters or reparametrised weights, and no copy of it to merge them in can be "
            f"made: {error}"
        ) from error
    with torch.no_grad():
        for module in list(result.modules()):
            _compute(module)
        parted = _part(result)
        answers = Answers(result)
        _merge_adapters(result)
        answers.require_same(result)
        _join(parted)
    for name in ("peft_config", "_hf_peft_config_loaded"):  # what PEFT and transformers leave on a model with adapters
        vars(result).pop(name, None)
    return result


def _is_special(module: nn.Module) -> bool:
    return (
        is_peft(module)
        or _wrapped(module) is not None
        or parametrize.is_parametrized(module)
        or any(_computing(module))
    )


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What ``torch.compile`` or DataParallel wraps."""
    if type(module).__name__ == "OptimizedModule":
        return module._modules.get("_orig_mod")
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return cast(nn.Module, module.module)
    return None


def _computing(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Hooks that compute a weight before each forward pass, and the name of the weight."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            yield hook, hook._tensor_name
        elif type(hook).__name__ in COMPUTING and type(hook).__module__.startswith("torch.nn.utils"):
            yield hook, getattr(hook, COMPUTING[type(hook).__name__])


def _kept(model: nn.Module, special: list[nn.Module]) -> Iterator[torch.Tensor]:
    """Tensors that no merging writes to."""
    touched = {id(t) for m in special if _wrapped(m) is None for t in (*m.parameters(), *m.buffers())}
    if is_peft(model):
        touched = {id(t) for t in (*model.parameters(), *model.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in touched:
            yield tensor


def _compute(module: nn.Module) -> None:
    """Make plain parameters of what is computed from others."""
    for hook, name in list(_computing(module)):
        value = _value(hook, module).detach().clone()
        key = next(k for k, v in module._forward_pre_hooks.items() if v is hook)
        del module._forward_pre_hooks[key]
        for suffix in ("_orig", "_mask", "_g", "_v", "_u"):
            module._parameters.pop(name + suffix, None)
            module._buffers.pop(name + suffix, None)
        vars(module).pop(name, None)
        module.register_parameter(name, nn.Parameter(value))
    if parametrize.is_parametrized(module):
        # not remove_parametrizations: it edits the class, which the live module shares
        lists = cast(nn.ModuleDict, module.parametrizations)
        values = {name: getattr(module, name).detach().clone() for name in lists}
        buffers = {name for name, each in lists.items() if {"original", "original0"} & each._buffers.keys()}
        module.__class__ = type(module).__bases__[0]
        del module._modules["parametrizations"]
        for name, value in values.items():
            if name in buffers:
                module.register_buffer(name, value)
            else:
                module.register_parameter(name, nn.Parameter(value))


def _value(hook: Any, module: nn.Module) -> torch.Tensor:
    """A computed weight as the next forward pass would have it, not as the last one had."""
    if isinstance(hook, prune.BasePruningMethod):
        return hook.apply_mask(module)
    arguments = {"do_power_iteration": False} if type(hook).__name__ == "SpectralNorm" else {}
    return cast(torch.Tensor, hook.compute_weight(module, **arguments))


def _part(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Give layers under adapters weights of their own where others have the same: only theirs will change.

    Returns:
        those that were one parameter, as modules and names.
    """
    adapters = [module for module in model.modules() if is_peft(module)]
    held = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for adapter in adapters:
        inner = adapter._modules.get("base_layer")
        if inner is not None and held[id(inner)] > 1:
            held[id(inner)] -= 1
            adapter._modules["base_layer"] = copy.deepcopy(inner)
    users: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((module, name))
    layers = {id(layer) for adapter in adapters for layer in wrapped(adapter)}
    parted = [group for group in users.values() if len(group) > 1 and any(id(module) in layers for module, _ in group)]
    for module, name in (user for group in parted for user in group[1:]):
        shared = cast(nn.Parameter, module._parameters[name])
        module._parameters[name] = nn.Parameter(shared.detach().clone(), shared.requires_grad)
    return parted


def _join(parted: list[list[tuple[nn.Module, str]]]) -> None:
    """Make one parameter again of those that came out equal: adapters that are tied themselves keep the tie."""
    for (first, own), *others in parted:
        for module, name in others:
            kept, found = first._parameters[own], module._parameters[name]
            if kept is not None and found is not None and torch.equal(kept, found):
                module._parameters[name] = kept


def _merge_adapters(module: nn.Module) -> None:
    for name, child in list(module._modules.items()):
        if child is not None and is_peft(child):
            module._modules[name] = child = _unwrapped(child, name)
        if child is not None:
            _merge_adapters(child)


def _unwrapped(layer: Any, name: str) -> nn.Module:
    """The layer that an adapter wraps, with what the adapter adds to it."""
    disabled = getattr(layer, "disable_adapters", False)
    below = layer._modules.get("base_layer")
    if below is not None and is_peft(below):  # one kind of adapter over another
        layer._modules["base_layer"] = _unwrapped(below, name)
    try:
        if disabled:
            if getattr(layer, "merged", False):
                layer.unmerge()
            inner = layer.original_module if hasattr(layer, "original_module") else layer.get_base_layer()
        elif hasattr(layer, "unload_and_optionally_merge_module"):
            inner = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            layer.merge(safe_merge=True)
            inner = layer.get_base_layer()
    except Exception as error:
        raise UnsupportedModelError(
            f"the adapter over {name} ({type(layer).__name__}) cannot be merged, so the model cannot be saved as its "
            f"library builds it: {error}"
        ) from error
    return cast(nn.Module, inner)
