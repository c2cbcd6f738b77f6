"""Empty models: parameters without memory, buffers with their real values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

RANDOM_FILLS = frozenset(("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_", "erfinv_"))
FILLS = RANDOM_FILLS | {"clamp_", "mul_", "add_", "sub_", "div_", "zero_", "fill_", "ones_", "zeros_", "constant_"}


def empty(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model with parameters on the meta device and real buffers, leaving the random state alone.

    A few constructors read their parameters' values, or compute buffers on their parameters' device; those are
    built for real, without random initialisation.
    """
    from accelerate import init_empty_weights

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            with init_empty_weights(include_buffers=False), _Skip(FILLS, only_meta=True):
                model = build()
            if not any(buffer.is_meta for buffer in model.buffers()):
                return model
        except (NotImplementedError, RuntimeError):
            pass
        with _Skip(RANDOM_FILLS):
            return build()


class _Skip(TorchFunctionMode):
    """Skips in-place fills, which are most of a constructor's time and change nothing that is used."""

    def __init__(self, names: frozenset[str], only_meta: bool = False) -> None:
        super().__init__()
        self.names, self.only_meta = names, only_meta

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in self.names:
            target = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(target, Tensor) and (target.is_meta or not self.only_meta):
                return target
        return func(*args, **(kwargs or {}))
