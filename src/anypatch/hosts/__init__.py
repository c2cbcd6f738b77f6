"""Host libraries: which one a model, a directory or a prefix belongs to.

Each folder is one library and fulfils the contract of :mod:`anypatch.hosts.base`; adding one is a folder and one line
in ``HOSTS``. A library is imported only when a model of its is in hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from anypatch.core.recorded import RECORDED, programs, refusal
from anypatch.errors import UnsupportedModelError
from anypatch.hosts.base import Host

# In the order in which they are asked whether a model is theirs: towers of timm inside open_clip's and transformers'
# models are their owners', and whatever nobody knows is for the structural rule.
HOSTS = (
    Host("open_clip"),
    Host("torchvision"),
    Host("timm"),
    Host("transformers"),
    Host("diffusers"),
    Host("generic", prefix="hub", package="anypatch.hosts.structural"),
)


def library(name: str) -> Host:
    """One host library, by the name that :attr:`anypatch.Geometry.library` says.

    Raises:
        UnsupportedModelError: no such library.
    """
    for host in HOSTS:
        if host.name == name:
            return host
    raise UnsupportedModelError(f"unknown library {name!r}: known are {', '.join(host.name for host in HOSTS)}")


def recognise(model: nn.Module) -> Host:
    """The host library of a live model.

    Raises:
        UnsupportedModelError: not a module, or no library knows it.
    """
    if not isinstance(model, nn.Module):
        traced = hasattr(model, "graph_module")  # torch.export's program
        advice = ": adapt the model before it is exported" if traced else ""
        raise UnsupportedModelError(f"expected a torch.nn.Module, got {type(model).__name__}{advice}")
    _require_eager(model)
    for host in HOSTS:
        if host.recognises(model):
            return host
    raise UnsupportedModelError(f"{type(model).__name__} has no patch embedding that anypatch can find")


def _require_eager(model: nn.Module) -> None:
    """A recorded program has the sizes of its example baked in.

    Raises:
        UnsupportedModelError: the model is one, or all of its convolutions and linear layers are in one.
    """
    if isinstance(model, RECORDED):
        raise refusal(type(model).__name__, model)
    found = list(programs(model))
    if not found or any(True for _ in _layers_outside(model, [path for path, _ in found])):
        return
    path, module = found[0]
    raise refusal(f"{path} of {type(model).__name__}", module)


def _layers_outside(model: nn.Module, recorded: list[str]) -> Iterator[nn.Module]:
    for path, module in model.named_modules():
        inside = any(path == outer or path.startswith(f"{outer}.") for outer in recorded)
        if not inside and isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear)):
            yield module


def by_prefix(prefix: str) -> Host | None:
    """The host library of a source ``prefix:NAME``."""
    return next((host for host in HOSTS if prefix == (host.prefix or host.name)), None)


def by_folder(path: Path) -> tuple[Host, str] | None:
    """The host library in whose format a directory is, and the name that its loader takes."""
    for host in HOSTS:
        name = host.names_folder(path)
        if name is not None:
            return host, name
    return None
