"""Host libraries: which one a model comes from. Each is imported only when a model of its is in hand."""

from __future__ import annotations

import importlib
from typing import cast

from torch import nn

from anypatch.errors import UnsupportedModelError
from anypatch.hosts.base import HostLibrary

FOLDERS = {"generic": "structural"}
NAMES = ("open_clip", "timm", "transformers", "diffusers", "torchvision", "generic")


def library(name: str) -> HostLibrary:
    """The file of one host library.

    Raises:
        UnsupportedModelError: no such library.
    """
    if name not in NAMES:
        raise UnsupportedModelError(f"unknown library {name!r}: known are {', '.join(NAMES)}")
    return cast(HostLibrary, importlib.import_module(f"anypatch.hosts.{FOLDERS.get(name, name)}.model"))


def recognise(model: nn.Module) -> HostLibrary:
    """The host library of a live model.

    Raises:
        UnsupportedModelError: not a module, or no library's file knows it.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for name in NAMES:
        host = library(name)
        if host.recognises(model):
            return host
    raise UnsupportedModelError(f"{type(model).__name__} has no patch embedding that anypatch can find")
