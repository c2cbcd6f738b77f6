"""Models that no other file knows: hand-made ViTs, torch.hub repositories, and models that hold a known one.

There is no constructor to ask for twins here, so a twin is a copy of the live model, parameters on the meta device,
in which a structural rule has set what follows the geometry:

- the projection: the first convolution that sees pixels, whose kernel is its stride;
- position tables: parameters, buffers, embeddings or plain tensors named like one, over prefix tokens and the grid;
- attributes named like a patch size, an image size, a grid or a count, whose value is the present one;
- pixel heads (MAE's ``decoder_pred``), if the model's own ``unpatchify`` or ``patchify`` tells their order.

Whatever else has the size of the grid cannot be explained, and is an error that names it. Where a model holds one
model of a host library (``self.backbone = timm.create_model(...)``), that library's file describes it.
"""

from __future__ import annotations

import re
from dataclasses import replace

from torch import nn

from anypatch.core.roles import Facts
from anypatch.core.tables import Sampling
from anypatch.core.twins import Subject
from anypatch.errors import UnsupportedModelError
from anypatch.hosts.base import Host
from anypatch.hosts.structural.explained import unknown_grid
from anypatch.hosts.structural.layout import NAME, layout_of, note
from anypatch.hosts.structural.tables import CONVOLUTIONS
from anypatch.hosts.structural.twin import build_twin


def recognises(model: nn.Module) -> bool:
    return any(isinstance(m, (*CONVOLUTIONS, nn.Linear)) for m in model.modules())


def subject(model: nn.Module) -> Subject:
    held = held_in(model)
    if held is not None:
        return held
    layout = layout_of(model)
    bound = layout.bound
    orders = {rf"^{re.escape(path)}\.(weight|bias)$": order for path, (_, order) in layout.heads.items() if order}
    facts = Facts(orders=orders, sampling=Sampling(antialias=False))  # as DINO, DINOv2 and MAE
    return Subject(
        model,
        layout.geometry,
        build=lambda g: build_twin(model, layout, g),
        facts=facts,
        finish=lambda g: note(model, layout, g),
        speaks=layout.part or None,
        bound="" if bound is None or bound.grid is not None else unknown_grid(bound, ', or use keep="grid"'),
    )


def held_in(model: nn.Module) -> Subject | None:
    """The one host library's model inside ``model``, described by that library's file."""
    from anypatch.hosts import HOSTS

    hosts = [host for host in HOSTS if host.name != NAME]
    found: list[tuple[str, Host, Subject]] = []
    for path, module in model.named_modules():
        if not path or any(path.startswith(f"{p}.") for p, *_ in found):
            continue
        for host in hosts:
            if host.recognises(module):
                try:
                    found.append((path, host, host.subject(module)))
                except UnsupportedModelError:
                    continue
                break
    if not found:
        return None
    if len(found) > 1:
        paths = ", ".join(path for path, *_ in found)
        _require_untied(model, [path for path, *_ in found])
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {len(found)} models with a patch embedding ({paths}): adapt each on its own"
        )
    ((path, host, inner),) = found
    whole = f"{path}.{inner.path}" if inner.path else path
    return replace(inner, model=model, path=whole, about=(host, inner))


def _require_untied(model: nn.Module, paths: list[str]) -> None:
    """Models that share parameters cannot be adapted one after the other: that is what has to be said of them.

    Raises:
        UnsupportedModelError: two of them share one; the message names it.
    """
    owners: dict[int, tuple[str, str]] = {}
    for path in paths:
        for name, parameter in model.get_submodule(path).named_parameters():
            other, where = owners.setdefault(id(parameter), (path, f"{path}.{name}"))
            if other != path:
                raise UnsupportedModelError(
                    f"{type(model).__name__} holds models with a patch embedding that share parameters ({where} is "
                    f"{path}.{name}): give one of them layers of its own (copy.deepcopy), adapt each, and share the "
                    f"layers again"
                )
