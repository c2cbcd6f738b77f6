"""Numbers of the geometry in people's own modules, in whatever they are kept and whatever they are called."""

from __future__ import annotations

import collections.abc
import copy
import dataclasses
import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anypatch
from anypatch import GeometryError, UnsupportedModelError
from anypatch.core.geometry import Geometry
from anypatch.hosts.structural.values import Values

OLD, NEW = Geometry((16, 16), (224, 224), 1), Geometry((16, 16), (320, 480), 1)
COARSE = Geometry((32, 32), (224, 224), 1)


@dataclasses.dataclass
class Settings:
    grid_size: Any
    lr: float = 0.1


@dataclasses.dataclass(frozen=True)
class Frozen:
    grid_size: Any


@dataclasses.dataclass(slots=True)
class Slots:
    grid_size: Any


class Named(NamedTuple):
    grid: Any
    name: str


class Helper:
    def __init__(self, h: int, w: int) -> None:
        self.h, self.w = h, w

    def __call__(self, tokens: Tensor) -> Tensor:
        return tokens.reshape(len(tokens), self.h, self.w, -1)


# -- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "after"),
    [
        # a pair that is the grid or the image, whatever it is called
        ("v", (14, 14), (20, 30)), ("fmap", [14, 14], [20, 30]), ("latent_hw", torch.Size((14, 14)), (20, 30)),
        ("shape", (768, 14, 14), (768, 20, 30)), ("nhwc", (14, 14, 768), (20, 30, 768)), ("v", (224, 224), (320, 480)),
        ("v", ((14, 14), "x"), ((20, 30), "x")), ("v", [(14, 14)], [(20, 30)]),
        ("v", {"hw": (14, 14)}, {"hw": (20, 30)}),
        ("v", OrderedDict(a={"b": [(14, 14)]}), OrderedDict(a={"b": [(20, 30)]})),
        ("v", Settings((14, 14)), Settings((20, 30))), ("v", Frozen((14, 14)), Frozen((20, 30))),
        ("v", Slots((14, 14)), Slots((20, 30))), ("v", Named((14, 14), "x"), Named((20, 30), "x")),
        ("v", types.SimpleNamespace(grid=(14, 14)), types.SimpleNamespace(grid=(20, 30))),
        # but not where it is called something else
        ("window", (14, 14), None), ("depths", (14, 14), None), ("pool_kernel", (14, 14), None),
        ("dims", [14, 14], None),
        ("v", (14, 14, 14), None), ("v", (13, 14), None), ("betas", (14, 14), None),
        # counts and sides by the words of their names
        ("token_count", 196, 600), ("n_tok", 197, 601), ("numPatches", 196, 600), ("patches", 196, 600),
        ("num_image_tokens", 196, 600), ("h_patches", 14, 20), ("num_patches_w", 14, 30),
        ("area", 224 * 224, 320 * 480),
        ("num_classes", 196, None), ("image_token_id", 196, None), ("token_dim", 196, None), ("batch", 224, None),
        ("epochs", 14, None), ("tokens_kept", 14, None), ("milestones", [14, 224], None),
        ("img_sizes", [224, 384], None),
    ],
)  # fmt: skip
def test_what_follows(name: str, value: Any, after: Any) -> None:
    given = copy.deepcopy(value)
    assert Values(OLD, NEW).followed(name, value, name, {}) == after
    assert value == given


@pytest.mark.parametrize(
    ("name", "value", "after"),
    [
        ("cell", 16, 32), ("_p", 16, 32), ("token_stride", 16, 32), ("n_pix", 256, 1024), ("patch_pixels", 256, 1024),
        ("vit_patch", (16, 16), (32, 32)), ("num_token", 16, None), ("queue", 256, None), ("patch_index", 16, None),
    ],
)  # fmt: skip
def test_what_follows_the_patch(name: str, value: Any, after: Any) -> None:
    assert Values(OLD, COARSE).followed(name, value, name, {}) == after


def test_arrays_follow_in_their_own_kind() -> None:
    values = Values(OLD, NEW)
    for kind in (np.int64, np.int32):
        after = values.followed("v", np.array([14, 14], dtype=kind), "v", {})
        assert after.dtype == kind
        assert after.tolist() == [20, 30]
    number = values.followed("num_tokens", np.int64(197), "v", {})
    assert (type(number), number) == (np.int64, 601)
    tensor = values.number("v", torch.tensor([14, 14]), "v")
    assert torch.equal(tensor, torch.tensor([20, 30]))
    assert values.number("v", torch.tensor([14.0, 14.0]), "v") is None


@pytest.mark.parametrize(
    "value",
    [
        Helper(14, 14), Helper(14, 14).__call__, [Helper(14, 14)], functools.partial(max, (14, 14)),
        functools.partial(F.interpolate, size=(224, 224)), {"post": functools.partial(F.interpolate, size=(224, 224))},
        (lambda hw: lambda t: t.reshape(len(t), *hw, -1))((14, 14)), [lambda t, hw=(14, 14): t.reshape(*hw)],
        (lambda grid: [lambda t: t.reshape(*grid)])((14, 14))[0],
    ],
)  # fmt: skip
def test_what_cannot_be_made_anew_is_refused_by_name(value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"(closes over|holds) .* = .*, .*take it off before"):
        Values(OLD, NEW).followed("v", value, "v", {})


# -- whole models ------------------------------------------------------------------------------------------------


def vit(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    arguments = {"img_size": 64, "depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 0, **kwargs}
    return timm.create_model("vit_tiny_patch16_224", **arguments).eval()


class HandMade(nn.Module):
    def __init__(self, patch_size: int = 16, img_size: int = 64) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 48, patch_size, patch_size)
        self.pos_embed = nn.Parameter(torch.randn(1, (img_size // patch_size) ** 2, 48))
        self.attn = nn.TransformerEncoderLayer(48, 3, 64, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(self.patch_embed(x).flatten(2).mT + self.pos_embed)


class Around(nn.Module):
    """A module of the user's: what it makes of the tokens is given, and what it holds."""

    def __init__(self, model: nn.Module, use: Callable[[Any, Tensor], Tensor], **held: Any) -> None:
        super().__init__()
        self.model, self.use = model, use
        for name, value in held.items():
            if isinstance(value, Tensor) and not name.startswith("plain"):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.model(x) if isinstance(self.model, HandMade) else self.model.forward_features(x)[:, 1:]
        return self.use(self, tokens)


def as_grid(self: Any, tokens: Tensor) -> Tensor:
    return tokens.reshape(len(tokens), 4, 4, -1)


def rooted(self: Any, tokens: Tensor) -> Tensor:
    side = int(tokens.shape[1] ** 0.5)
    return tokens.reshape(len(tokens), side, side, -1)


def enlarged(self: Any, tokens: Tensor) -> Tensor:
    return F.interpolate(tokens.mean(-1)[:, None, None], size=(64, 64))


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "number in the code": (as_grid, {}, r"keeps the grid \(4x4\): it holds use = 4"),
    "a square root": (rooted, {}, "square grid"),
    "image in the code": (enlarged, {}, "keeps the size of the image"),
    "list": (lambda s, t: t * torch.tensor(s.v)[:, None], {"v": [1.0] * 16}, "v = 16 values"),
    "array": (lambda s, t: t * torch.from_numpy(s.v)[:, None], {"v": np.ones(16, np.float32)}, r"v = of shape \(16,\)"),
    "odd name": (lambda s, t: t.reshape(len(t), s.v, -1), {"v": 16}, "v = 16"),
    "an order": (lambda s, t: t[:, s.v], {"v": list(range(16))[::-1]}, "v is an order of the tokens"),
    "tensor in a dictionary": (lambda s, t: t * s.v["m"][:, None], {"v": {"m": torch.ones(16)}}, r"v\['m'\] has the"),
    "rows": (lambda s, t: t + s.ys.sum(), {"ys": torch.linspace(0, 1, 4)}, "one value for each row"),
    "levels": (lambda s, t: t, {"shapes": torch.tensor([[4, 4], [2, 2]])}, "holds the size of the grid"),
    "mask": (lambda s, t: t * s.mask[:, None], {"mask": torch.ones(16)}, "mask has the number of tokens"),
}  # fmt: skip


def refused(model: nn.Module, match: str, **sizes: Any) -> None:
    before = copy.deepcopy(model.state_dict())
    values = {k: repr(v) for m in model.modules() for k, v in vars(m).items() if k not in vars(nn.Module())}
    with pytest.raises((UnsupportedModelError, GeometryError), match=match):
        anypatch.adapt(model, **sizes)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert values == {k: repr(v) for m in model.modules() for k, v in vars(m).items() if k not in vars(nn.Module())}


@pytest.mark.parametrize("made", [vit, pytest.param(HandMade, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_go_stale_is_refused(kind: str, made: Callable[[], nn.Module]) -> None:
    use, held, match = REFUSED[kind]
    refused(Around(made(), use, **held), match, image_size=(64, 256) if kind == "a square root" else 96)


FOLLOWED: dict[str, tuple[Any, dict[str, Any]]] = {
    "pair": (lambda s, t: t.reshape(len(t), *s.v, -1), {"v": (4, 4)}),
    "array": (lambda s, t: t.reshape(len(t), *s.v.tolist(), -1), {"v": np.array([4, 4])}),
    "tensor": (lambda s, t: t.reshape(len(t), *s.v.tolist(), -1), {"v": torch.tensor([4, 4])}),
    "record": (lambda s, t: t.reshape(len(t), *s.v.grid_size, -1), {"v": Frozen((4, 4))}),
    "count": (lambda s, t: t.reshape(len(t), s.n_tok, -1), {"n_tok": 16}),
}


def times_four_twice(self: Any, tokens: Tensor) -> Tensor:
    """Tokens at patch 16 to pixels, with no number that is one of the geometry."""
    side = int(tokens.shape[1] ** 0.5)
    tokens = tokens.mT.reshape(len(tokens), -1, side, side)
    return F.interpolate(F.interpolate(tokens, scale_factor=2**2), scale_factor=2**2)


def doubled(self: Any, tokens: Tensor) -> Tensor:
    side = int(tokens.shape[1] ** 0.5)
    tokens = tokens.mT.reshape(len(tokens), -1, side, side)
    while tokens.shape[-1] < self.coarsest * side:
        tokens = F.interpolate(tokens, scale_factor=2)
    return tokens


def reduced(self: Any, tokens: Tensor) -> Tensor:
    side = int(tokens.shape[1] ** 0.5)
    return F.interpolate(tokens.mT.reshape(len(tokens), -1, side, side), scale_factor=self.red)


ENLARGING: dict[str, tuple[Any, dict[str, Any]]] = {
    "in steps": (times_four_twice, {}),
    "in a loop": (doubled, {"coarsest": 9}),
    "by an odd name": (reduced, {"red": 16}),
}


@pytest.mark.parametrize("kind", ENLARGING)
def test_a_map_as_large_as_the_image_that_would_not_grow_with_it_is_refused(kind: str) -> None:
    use, held = ENLARGING[kind]
    for sizes in ({"patch_size": 32, "keep": "grid"}, {"patch_size": 32}):
        refused(
            Around(vit(), use, **held), "as large as the image, and would become|keeps the size of the image", **sizes
        )
    model = Around(vit(), use, **held)
    anypatch.adapt(model, image_size=96)
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 48, 96, 96)


def test_a_map_that_is_enlarged_to_the_image_follows_it() -> None:
    def resized(self: Any, tokens: Tensor) -> Tensor:
        side = int(tokens.shape[1] ** 0.5)
        patch = self.model.patch_embed.patch_size[0]
        return F.interpolate(tokens.mT.reshape(len(tokens), -1, side, side), scale_factor=patch)

    model = Around(vit(), resized)
    anypatch.adapt(model, 32, keep="grid")
    assert model(torch.randn(1, 3, 128, 128)).shape == (1, 48, 128, 128)


class Before(nn.Module):
    """A module of the user's that does something to the image before a model that takes any size."""

    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.use = vit(dynamic_img_size=True), use

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.use(x))


def hooked() -> nn.Module:
    model = vit(dynamic_img_size=True)
    model.register_forward_pre_hook(lambda module, inputs: (F.interpolate(inputs[0], (64, 64)),))
    return model


SCALING: dict[str, Callable[[], nn.Module]] = {
    "scaled": lambda: Before(lambda x: F.interpolate(x, (64, 64))),
    "cropped": lambda: Before(lambda x: x[..., :64, :64]),
    "pooled": lambda: Before(lambda x: F.adaptive_avg_pool2d(x, 64)),
    "scaled in a hook": hooked,
}


@pytest.mark.parametrize("kind", SCALING)
def test_what_brings_the_image_to_the_present_size_is_refused(kind: str) -> None:
    for sizes in ({"image_size": 96}, {"patch_size": 32, "keep": "grid"}):
        refused(
            SCALING[kind](),
            r"into 4x4 patches, and would cut one of .* it holds (use = 64|the number 64)",
            **sizes,
        )
    anypatch.adapt(SCALING[kind](), 32)


@pytest.mark.parametrize("layer", [nn.Upsample(64), nn.Upsample((64, 64)), nn.AdaptiveAvgPool2d(64)])
def test_layers_that_bring_the_image_to_the_models_size_follow(layer: nn.Module) -> None:
    model = nn.Sequential(copy.deepcopy(layer), vit(dynamic_img_size=True)).eval()
    alone = anypatch.adapt(copy.deepcopy(model[1]), image_size=96)
    anypatch.adapt(model, image_size=96)
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(model(x), alone(x))


@pytest.mark.parametrize("made", [vit, pytest.param(HandMade, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", FOLLOWED)
def test_what_follows_gives_what_a_wrapper_around_an_adapted_model_gives(kind: str, made: Callable[[], Any]) -> None:
    use, held = FOLLOWED[kind]
    model = Around(made(), use, **copy.deepcopy(held)).eval()
    inner = anypatch.adapt(copy.deepcopy(model.model), image_size=96)
    anypatch.adapt(model, image_size=96)
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        tokens = inner(x) if isinstance(inner, HandMade) else inner.forward_features(x)[:, 1:]
        shape = (1, 36, 48) if kind == "count" else (1, 6, 6, 48)
        assert torch.equal(model(x), tokens.reshape(shape))


def test_a_rehearsal_leaves_no_trace() -> None:
    """Counters, caches, hooks and buffers of the model's are what they were; what it appended is not there."""
    seen: list[Any] = []

    class Traced(Around):
        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.outputs.append(x)
            self.cache["x"] = x
            self.total += x.sum()
            return super().forward(x)

    model = Traced(vit(), lambda s, t: t.mean(1), calls=0, outputs=[], cache={}, total=torch.zeros(()), odd=16)
    model.model.blocks[0].register_forward_hook(lambda *args: seen.append(args))
    anypatch.adapt(model, image_size=96)
    assert (model.calls, model.outputs, model.cache, model.total.item(), seen) == (0, [], {}, 0.0, [])
    model(torch.randn(1, 3, 96, 96))
    assert model.calls == 1


@pytest.mark.parametrize(
    "use",
    [lambda s, t: t.mean(1), lambda s, t: t[:, : s.odd // 2], lambda s, t: t.sum() if t.sum() > s.odd else t.mean()],
)
def test_numbers_that_happen_to_be_sizes_are_no_obstacle(use: Any) -> None:
    model = Around(vit(), use, odd=16, layers=4, queue=torch.zeros(50, 48), names=["a"] * 16, lut=list(range(16)))
    anypatch.adapt(model, image_size=96)
    assert (model.odd, model.layers) == (16, 4)


@pytest.mark.parametrize("length", [20, 77])
def test_positions_of_words_stay(length: int) -> None:
    """Also where there are about as many of them as tokens: in a wrapper with a text encoder beside the model."""
    model = Around(vit(), lambda s, t: t.mean(1))
    model.token_embedding = nn.Embedding(50, 32)
    model.positional_embedding = nn.Parameter(torch.randn(length, 32))
    before = model.positional_embedding.detach().clone()
    anypatch.adapt(model, image_size=96)
    assert torch.equal(model.positional_embedding, before)


def test_a_mapping_that_loads_when_it_is_asked_is_not_asked() -> None:
    class Lazy(collections.abc.Mapping):
        def __getitem__(self, key: Any) -> Any:
            raise AssertionError("asked")

        def __iter__(self) -> Any:
            raise AssertionError("asked")

        def __len__(self) -> int:
            return 16

    anypatch.adapt(Around(vit(), lambda s, t: t.mean(1), lazy=Lazy()), image_size=96)


def test_tokens_as_many_and_as_wide_as_the_image_are_no_map_of_it() -> None:
    model = Around(vit(patch_size=8, embed_dim=64, num_heads=4), lambda s, t: t, n_tok=64)
    anypatch.adapt(model, 16, keep="grid")
    assert model(torch.randn(1, 3, 128, 128)).shape == (1, 64, 64)
