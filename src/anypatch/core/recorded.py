"""Programs that were recorded from a model: what runs is no longer the Python that stands beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch.fx
from torch import nn

from anypatch.errors import UnsupportedModelError

RECORDED = (torch.fx.GraphModule, torch.jit.ScriptModule)


def programs(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every recorded program in a model; not those within another."""
    found: list[str] = []
    for path, module in root.named_modules():
        if isinstance(module, RECORDED) and not any(path.startswith(f"{outer}.") or not outer for outer in found):
            found.append(path)
            yield path, module


def told(module: nn.Module) -> str:
    """What a message calls a program."""
    kind = "TorchScript" if isinstance(module, torch.jit.ScriptModule) else "torch.fx or torch.export"
    return f"a program recorded by {kind}"


def refusal(name: str, module: nn.Module) -> UnsupportedModelError:
    """A program has the sizes of its example in it."""
    return UnsupportedModelError(
        f"{name} is {told(module)}, with the sizes of its example in it: adapt the model before tracing"
    )


def require_open(full: str, lives: Iterable[nn.Module]) -> None:
    """Nothing can be changed inside of TorchScript's programs, which are no Python.

    Raises:
        UnsupportedModelError: what has to change is in one.
    """
    for live in lives:
        if isinstance(live, torch.jit.ScriptModule):
            raise refusal(f"{full} has to change, and what holds it", live)
