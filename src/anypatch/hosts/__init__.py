"""Host libraries: which one a model, a directory or a prefix belongs to.

Each folder is one library and fulfils the contract of :mod:`anypatch.hosts.base`; adding one is a folder and one line
in ``HOSTS``. A library is imported only when a model of its is in hand.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from anypatch.errors import UnsupportedModelError
from anypatch.hosts.base import Host

# In the order in which they are asked whether a model is theirs: towers of timm inside open_clip's and transformers'
# models are their owners', and whatever nobody knows is for the structural rule.
HOSTS = (
    Host("open_clip"),
    Host("timm"),
    Host("transformers"),
    Host("diffusers"),
    Host("torchvision"),
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
        raise UnsupportedModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for host in HOSTS:
        if host.recognises(model):
            return host
    raise UnsupportedModelError(f"{type(model).__name__} has no patch embedding that anypatch can find")


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
