"""Hooks on parameters: what they hold of a gradient's shape (the mask of a pruned weight) does not follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from anypatch.core.geometry import Size
from anypatch.core.plan import Plan
from anypatch.core.steps import SetParameter
from anypatch.errors import UnsupportedModelError
from anypatch.hosts.structural.holdings import tensors_of

HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def require_free_gradients(plan: Plan) -> None:
    """No hook on a parameter that changes holds a tensor that meets its gradient today and would not afterwards, and
    none is on the node that accumulates its gradient, which torch makes anew.

    Raises:
        UnsupportedModelError: one does, and the next backward pass would fail, or one would never run again; the
            message names it.
    """
    names = {id(parameter): name for name, parameter in plan.subject.model.named_parameters()}
    steps = [step for step in plan.steps if isinstance(step, SetParameter)]
    changing = [step.parameter for step in steps]
    for step in steps:
        if tuple(step.parameter.shape) != tuple(step.data.shape) and _is_awaited(step.parameter):
            raise UnsupportedModelError(
                f"a hook waits for the gradient of {names.get(id(step.parameter), 'a parameter')} on the node that "
                f"accumulates it (an optimizer that steps within the backward pass), which torch makes anew for a "
                f"parameter of another shape: adapt first, then put it there"
            )
        old, new = tuple(step.parameter.shape), tuple(step.data.shape)
        for hook in _hooks(step.parameter):
            for where, _, item in tensors_of(hook):
                follows = any(item is each for each in changing)
                if not follows and _meets(tuple(item.shape), old) and not _meets(tuple(item.shape), new):
                    raise UnsupportedModelError(
                        f"a hook on {names.get(id(step.parameter), 'a parameter')} holds {where.lstrip('.')}, of shape "
                        f"{tuple(item.shape)}, for gradients of {old}, which will be {new}: take it off before "
                        f"adapting, and put one that fits there afterwards"
                    )


def _hooks(parameter: nn.Parameter) -> Iterator[Any]:
    for name in HOOKS:
        yield from (getattr(parameter, name, None) or {}).values()


def _is_awaited(parameter: nn.Parameter) -> bool:
    """Whether a hook is on the node that accumulates a parameter's gradient; torch lists them to hooks alone."""
    if not parameter.requires_grad:
        return False
    with torch.enable_grad():
        shown: Any = parameter.view_as(parameter).grad_fn
    node = shown.next_functions[0][0]
    count = 0
    for register in (node.register_hook, node.register_prehook):
        handle = register(_meets)  # any function, as it is taken off before anything runs
        count += len(handle.hooks_dict_ref()) - 1
        handle.remove()
    return count > 0


def _meets(shape: Size, other: Size) -> bool:
    """Whether a tensor is combined entry by entry with one of another shape, along all axes that have a length."""
    return len(shape) <= len(other) and all(a in (1, b) for a, b in zip(shape[::-1], other[::-1], strict=False))
