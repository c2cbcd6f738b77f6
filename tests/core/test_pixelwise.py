"""What a user puts around a patch projection: colours may change there, places may not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

import anypatch
from anypatch.errors import UnsupportedModelError

SCALE = torch.tensor([0.2, 0.5, 1.5]).view(3, 1, 1)
ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda x: (x - 0.5) * SCALE,
    "BGR": lambda x: x.flip(1),
    "as it is": lambda x: x.contiguous(),
}
MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted": lambda x: functional.pad(x, (1, 0, 1, 0))[..., :-1, :-1],
    "padded": lambda x: functional.pad(x, (2, 2, 2, 2)),
    "pooled": lambda x: functional.avg_pool2d(x, 3, 1, 1),
    "mirrored": lambda x: x.flip(-1),
    "rolled": lambda x: x.roll(1, -1),
}


class Around(nn.Module):
    def __init__(self, before: Callable[[Tensor], Tensor], conv: nn.Module) -> None:
        super().__init__()
        self.before, self.conv, self.calls = before, conv, 0

    def forward(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(self.before(pixels))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_size, self.img_size = 4, 16
        self.proj = nn.Conv2d(3, 8, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.proj(pixels).flatten(2).transpose(1, 2)
        return self.norm(torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1) + self.pos_embed)


def wrapped(host: str, before: Callable[[Tensor], Tensor]) -> tuple[nn.Module, Around]:
    """A model whose projection stands in a module of the user's."""
    model = timm.create_model("test_vit") if host == "timm" else Own()
    holder = model.get_submodule("patch_embed") if host == "timm" else model
    holder.proj = Around(before, holder.proj)
    return model, holder.proj


def _must_not_run(*_: object) -> None:
    raise AssertionError("the live model runs")


@pytest.mark.parametrize("host", ["timm", "own"])
@pytest.mark.parametrize("what", ALONE)
def test_colours_may_change_around_a_projection(host: str, what: str) -> None:
    model, around = wrapped(host, ALONE[what])
    assert anypatch.check(model, 32 if host == "timm" else 8).passed
    around.conv.register_forward_pre_hook(_must_not_run)
    anypatch.adapt(model, 8)
    assert around.calls == 0


@pytest.mark.parametrize("host", ["timm", "own"])
@pytest.mark.parametrize("what", MOVED)
def test_places_may_not(host: str, what: str) -> None:
    """Adapted, each answers differently where the patch grows: `check` failed for all of them."""
    model, _ = wrapped(host, MOVED[what])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=r"proj \(Around\) pads, pools or moves pixels before"):
        anypatch.adapt(model, 8, keep="grid")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
