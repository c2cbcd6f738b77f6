"""Numbers written in people's code, and what has the number of tokens by chance: told by running at two geometries."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import anypatch
from anypatch import AnypatchError, UnsupportedModelError

Use = Callable[[Any, Tensor, Tensor], Any]


def vit(image: int = 64, patch: int = 16) -> Any:
    sizes = {"img_size": image, "patch_size": patch, "depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


class HandMade(nn.Module):
    """Nothing but patches, a class token and positions: 16 tokens and one of 48 channels."""

    def __init__(self, image: int = 64, patch: int = 16) -> None:
        super().__init__()
        self.patch_embed, self.norm = nn.Conv2d(3, 48, patch, patch), nn.LayerNorm(48)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 48))
        self.pos_embed = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, 48))

    def forward_features(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x).flatten(2).mT
        return self.norm(torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1) + self.pos_embed)


class Around(nn.Module):
    """A module of the user's: ``use`` makes something of the image and the tokens, with what it holds."""

    def __init__(self, model: nn.Module, use: Use, **held: Any) -> None:
        super().__init__()
        self.model, self.use = model, use
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x, self.model.forward_features(x))


class Hand(HandMade):
    """The same in the model itself."""

    def __init__(self, use: Use, **held: Any) -> None:
        super().__init__()
        self.use = use
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x, self.forward_features(x))


KINDS: dict[str, Callable[..., nn.Module]] = {
    "around timm's": lambda use, **held: Around(vit(), use, **held),
    "by hand": Hand,
}


def refused(model: nn.Module, match: str, **ask: Any) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AnypatchError, match=match):
        anypatch.adapt(model.eval(), **ask)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def _patches(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 16, 16, w // 16, 16).mean((3, 5)).mean((2, 3))


SIXTEEN = "takes 16 of 37, where it takes all now"
# What would go wrong without a word, as nothing that is returned has a size: how it reads the tokens or the image.
WRITTEN: dict[str, tuple[Use, str]] = {
    "the first tokens": (lambda s, x, t: t[:, :17].mean(1), "takes 17 of 37, where"),
    "those after the first": (lambda s, x, t: t[:, 1:17].mean(1), SIXTEEN),
    "the last tokens": (lambda s, x, t: t[:, -16:].mean(1), SIXTEEN),
    "narrow": (lambda s, x, t: t.narrow(1, 1, 16).mean(1), SIXTEEN),
    "a list": (lambda s, x, t: t[:, list(range(1, 17))].mean(1), SIXTEEN),
    "places": (lambda s, x, t: t.index_select(1, torch.arange(1, 17)).mean(1), SIXTEEN),
    "rows": (lambda s, x, t: t[:, 1:].mT.unflatten(2, (-1, 4))[:, :, :4].mean((2, 3)), "takes 4 of 9"),
    "row by row": (lambda s, x, t: sum(t[:, 4 * i + 1 : 4 * i + 5].mean(1) for i in range(4)), SIXTEEN),
    "a few channels": (lambda s, x, t: t[:, 1:, :16].mT.reshape(len(t), -1, 4, 4).mean((1, 2)), "on the grid of 4x4"),
    "the grid": (lambda s, x, t: t[:, 1:].mT.reshape(len(t), -1, 4, 4).mean((1, 2)), r"on the grid of 4x4"),
    "token by token": (lambda s, x, t: sum(t[:, i] for i in range(17)), "takes 17 of 37, where"),
    "the last by its place": (lambda s, x, t: t[:, 16], "takes place 16 of 37, where it takes the last now"),
    "one in the middle": (lambda s, x, t: t[:, 9], "takes place 9 of 37, another patch than of 17"),
    "one in the middle, twice": (lambda s, x, t: t[:, 9] + t[:, 9].tanh(), "takes place 9 of 37, another patch"),
    "a column": (lambda s, x, t: t[:, 1:][:, ::4].mean(1), r"as \(2, 9, 4, 48\), which is no grid"),
    "parts as long as a row": (lambda s, x, t: sum(row.amax(1) for row in t[:, 1:].split(4, 1)), "is no grid of them"),
    "as many parts as rows": (lambda s, x, t: sum(row.amax(1) for row in t[:, 1:].chunk(4, 1)), "is no grid of them"),
    "one side of the grid": (lambda s, x, t: t[:, 1:].unflatten(1, (4, -1)).amax(1).mean(1), "is no grid of them"),
    "a mean": (lambda s, x, t: t.sum(1) / 17, "divides a sum over 37 by 17"),
    "a mean by its factor": (lambda s, x, t: t[:, 1:].sum(1) * (1 / 16), "divides a sum over 36 by 16"),
    "a sum by the root of their number": (lambda s, x, t: t[:, 1:].sum(1) * 16**-0.5, "divides a sum over 36 by 4"),
    "a window over all": (lambda s, x, t: F.avg_pool1d(t[:, 1:].mT, 16).amax(2), "windows of 1x16, which are all"),
    "a crop of the image": (lambda s, x, t: t.mean() + x[..., :64, :64].mean(), "takes 64 of 96, where"),
}  # fmt: skip
WINDOWS: dict[str, Use] = {
    "unfold": lambda s, x, t: t.mean() + F.unfold(x, 16, stride=16).std(1).mean(),
    "unfold of a tensor": lambda s, x, t: t.mean() + x.unfold(2, 16, 16).unfold(3, 16, 16).std((4, 5)).mean(),
    "pool": lambda s, x, t: t.mean() + F.max_pool2d(x, 16).mean(),
    "average": lambda s, x, t: t.mean() + F.avg_pool2d(x, (16, 16)).std(),
    "pixels": lambda s, x, t: t.mean() + F.pixel_unshuffle(x, 16).std(1).mean(),
    "convolution": lambda s, x, t: t.mean() + F.conv2d(x, torch.ones(1, 3, 16, 16), stride=16).std(),
    "axes": lambda s, x, t: t.mean(1)[:, :3] + _patches(x),
}


@pytest.mark.siblings(fast=2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("written", WRITTEN)
def test_a_written_number_of_tokens_is_refused_where_it_is_no_longer_all(written: str, kind: str) -> None:
    use, match = WRITTEN[written]
    refused(KINDS[kind](use), match, image_size=96)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_tokens_are_refused_where_none_is_left_for_some(kind: str) -> None:
    refused(
        KINDS[kind](WRITTEN["row by row"][0]), "takes parts of 17, of which some would be empty of 5", patch_size=32
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_number_of_tokens_is_still_all_of_fewer(kind: str) -> None:
    model = KINDS[kind](lambda s, x, t: t[:, 1:17].mean(1)).eval()
    anypatch.adapt(model, 32)
    x = torch.randn(2, 3, 64, 64)
    inner = model.model if isinstance(model, Around) else model
    assert_close(model(x), inner.forward_features(x)[:, 1:].mean(1))
    refused(model, "takes 16 of 37", patch_size=16, image_size=96)  # there and not back
    refused(KINDS[kind](lambda s, x, t: t[:, -16:].mean(1)), "takes 5 of 5", patch_size=32)  # the class token, too


@pytest.mark.siblings(fast=2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("written", WINDOWS)
def test_a_written_patch_is_refused(written: str, kind: str) -> None:
    for ask in ({"patch_size": 32, "keep": "grid"}, {"patch_size": 8}):
        refused(KINDS[kind](WINDOWS[written]).eval(), "cuts the image into (windows|patches) of 16", **ask)
    anypatch.adapt(KINDS[kind](WINDOWS[written]).eval(), image_size=96)  # the patch stays what it is


def _most(x: Tensor, number: int) -> Tensor:
    places = x.norm(dim=-1).topk(number, 1).indices
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


def _in_rounds(s: Any, x: Tensor, t: Tensor) -> Tensor:
    return torch.stack([t[:, i : i + 16].sum(1) for i in range(0, t.shape[1], 16)]).sum(0)


STAYS: dict[str, Use] = {
    "a mean by hand": lambda s, x, t: t.sum(1) / t.shape[1],
    "a sum that is scaled": lambda s, x, t: t.sum(1) / 100,
    "a mean of as many channels": lambda s, x, t: t[..., :16].sum(2).mean(1, keepdim=True) / 16,
    "token by token": lambda s, x, t: sum(t[:, i] for i in range(t.shape[1])),
    "one in the middle": lambda s, x, t: t[:, t.shape[1] // 2],
    "the first patch": lambda s, x, t: t[:, 1],
    "one of the prompts": lambda s, x, t: torch.cat(
        [t[:, :1], t.new_ones(1, 5, 48).expand(len(t), -1, -1), t[:, 1:]], 1
    )[:, 3],
    "one of the channels": lambda s, x, t: t[..., 9].mean(1) + t[..., :17][..., 9].mean(1),
    "a sum of channels by the root of their number": lambda s, x, t: t[..., :16].sum(2).mean(1) / 4,
    "two by their places": lambda s, x, t: t[:, 0] + t[:, -1],
    "row by row": lambda s, x, t: sum(row.amax(1) for row in t[:, 1:].split(math.isqrt(t.shape[1]), 1)),
    "every other": lambda s, x, t: t[:, 1::2].mean(1),
    "as many as a row": lambda s, x, t: t[:, :4].mean(1) + t[:, torch.arange(4)].mean(1) + t.narrow(1, 1, 4).mean(1),
    "those of most weight": lambda s, x, t: _most(t[:, 1:], 4).mean(1),
    "in rounds": _in_rounds,
    "the class token": lambda s, x, t: t[:, 0],
    "all but the first": lambda s, x, t: t[:, 1:].mean(1),
    "half of them": lambda s, x, t: t[:, :8].mean(1),
    "as many channels": lambda s, x, t: t[..., :16].mean(1),
    "heads": lambda s, x, t: t[..., :16].unflatten(2, (4, 4)).mean((1, 3)),
    "one patch each": lambda s, x, t: t[..., :16].reshape(-1, 4, 4).mean((1, 2)).view(len(t), -1).mean(1),
    "the count": lambda s, x, t: t[:, : t.shape[1]].mean(1),
    "smaller windows": lambda s, x, t: t.mean() + F.avg_pool2d(x, 4).std(),
    "windows of features": lambda s, x, t: F.avg_pool1d(t, 16).mean(1),
}


@pytest.mark.siblings(fast=2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use", STAYS)
def test_what_is_taken_whatever_the_number_is_no_obstacle(use: str, kind: str) -> None:
    for ask in ({"image_size": 96}, {"patch_size": 8}, {"patch_size": 32}):
        model = KINDS[kind](STAYS[use]).eval()
        anypatch.adapt(model, **ask)
        sides = anypatch.geometry(model)
        direct = copy.deepcopy(model)
        inner = direct.model if isinstance(direct, Around) else direct
        fresh = (vit if isinstance(direct, Around) else HandMade)(sides.image_size[0], sides.patch_size[0]).eval()
        fresh.load_state_dict(inner.state_dict())  # a model built at that geometry
        x = torch.randn(2, 3, *sides.image_size)
        assert torch.equal(model(x), STAYS[use](direct, x, fresh.forward_features(x)))


CHANNELS: dict[str, Use] = {
    "of one token": lambda s, x, t: t[:, 0, :16].reshape(-1, 4, 4).softmax(-1).mean(1),
    "of each": lambda s, x, t: t[..., :16].reshape(*t.shape[:2], 4, 4).softmax(-1).mean(1),
}


@pytest.mark.siblings(fast=2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_as_many_channels_as_tokens_are_laid_out_whatever_the_grid(channels: str, kind: str) -> None:
    use = CHANNELS[channels]
    model = KINDS[kind](use).eval()
    anypatch.adapt(model, image_size=(32, 128))
    x = torch.randn(2, 3, 32, 128)
    inner = model.model if isinstance(model, Around) else model
    assert torch.equal(model(x), use(model, x, inner.forward_features(x)))
    tokens_as_square = KINDS[kind](lambda s, x, t: t[:, 1:].mT.reshape(len(t), -1, 4, 4).amax(3).mean((1, 2))).eval()
    refused(tokens_as_square, "square grid|grid of 4x4", image_size=(32, 128))


def test_a_side_of_the_image_that_is_the_number_of_tokens_is_cut_by_the_patch() -> None:
    def patches(self: Any, x: Tensor, tokens: Tensor) -> Tensor:
        (n, c, h, w), p = x.shape, self.model.patch_embed.patch_size[0]
        return tokens.mean(1)[:, :3] + x.reshape(n, c, h // p, p, w // p, p).std((3, 5)).mean((2, 3))

    model = Around(vit(64, 8), patches).eval()
    anypatch.adapt(model, image_size=(64, 128))
    x = torch.randn(2, 3, 64, 128)
    inner: Any = model.model
    assert torch.equal(model(x), patches(model, x, inner.forward_features(x)))


def test_channels_beside_the_rows_are_no_side_of_the_grid() -> None:
    def few(self: Any, x: Tensor, tokens: Tensor) -> Tensor:
        grid = tokens[:, 1:, :8].mT.unflatten(2, self.model.patch_embed.grid_size)  # (n, 8, 8, 16)
        return grid.amax(3).mean(2)

    model = Around(vit(64, 8), few).eval()
    anypatch.adapt(model, image_size=(64, 128))
    x = torch.randn(2, 3, 64, 128)
    inner: Any = model.model
    assert torch.equal(model(x), few(model, x, inner.forward_features(x)))


@pytest.mark.siblings(fast=2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
def test_queries_beside_the_tokens_are_taken_by_their_number(first: bool, kind: str) -> None:
    def use(self: Any, x: Tensor, tokens: Tensor) -> Tensor:
        queries = self.queries.expand(len(x), -1, -1)
        both = torch.cat([queries, tokens] if first else [tokens, queries], 1)
        mixed = (both @ both.mT / 48).softmax(-1) @ both
        return mixed[:, :16] if first else mixed[:, -16:]

    for ask in ({"image_size": 96}, {"patch_size": 32}):
        model = KINDS[kind](use, queries=nn.Parameter(torch.randn(1, 16, 48))).eval()
        anypatch.adapt(model, **ask)
        x = torch.randn(2, 3, *anypatch.geometry(model).image_size)
        inner = model.model if isinstance(model, Around) else model
        assert torch.equal(model(x), use(model, x, inner.forward_features(x)))


# -- what has the number of tokens by chance ---------------------------------------------------------------


def _to_nearest(self: Any, x: Tensor, tokens: Tensor) -> Tensor:
    near = torch.cdist(tokens, self.codebook.weight[None]).argmin(-1)
    return self.codebook(near).mean(1)


def _attended(self: Any, x: Tensor, tokens: Tensor) -> Tensor:
    weights = (self.queries @ tokens.mT).softmax(-1)
    return weights @ tokens


CHANCES: dict[str, tuple[Use, Callable[[int], dict[str, Any]]]] = {
    "prototypes": (lambda s, x, t: t.mean(1) @ s.bank.T, lambda n: {"bank": nn.Parameter(torch.ones(n, 48))}),
    "a queue": (lambda s, x, t: t[:, 0] @ s.queue, lambda n: {"queue": nn.Buffer(torch.randn(48, n))}),
    "a codebook": (_to_nearest, lambda n: {"codebook": nn.Embedding(n, 48)}),
    "queries": (_attended, lambda n: {"queries": nn.Parameter(torch.randn(1, n, 48))}),
    "use of prototypes": (lambda s, x, t: s.out(t.mean(1)) + s.usage,
                          lambda n: {"out": nn.Linear(48, n), "usage": nn.Buffer(torch.zeros(n))}),
    "values beside it": (lambda s, x, t: t.mean(1) + s.read(x.mean((1, 2))[:, :1].expand(-1, s.read.in_features)),
                         lambda n: {"read": nn.Linear(n, 48)}),
    "all of a pooled map": (lambda s, x, t: s.read(F.adaptive_avg_pool1d(t.mT, s.places).flatten(1)),
                            lambda n: {"read": nn.Linear(48 * n, 5), "places": n}),
}  # fmt: skip


@pytest.mark.siblings(fast=2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [16, 17])
@pytest.mark.parametrize("chance", CHANCES)
def test_as_many_as_there_are_tokens_by_chance(chance: str, number: int, kind: str) -> None:
    use, held = CHANCES[chance]
    for ask in ({"image_size": 96}, {"patch_size": 32}, {"image_size": (32, 128)}):  # the last: as many tokens
        model = KINDS[kind](use, **held(number)).eval()
        before = copy.deepcopy(model.state_dict())
        anypatch.adapt(model, **ask)
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        inner = "model." if isinstance(model, Around) else ""
        assert changed <= {f"{inner}pos_embed", f"{inner}patch_embed.weight", f"{inner}patch_embed.proj.weight"}
        assert changed
        x = torch.randn(2, 3, *anypatch.geometry(model).image_size)
        tokens = (model.model if isinstance(model, Around) else model).forward_features(x)
        assert torch.equal(model(x), use(model, x, tokens))


def _first_rows(self: Any, x: Tensor, tokens: Tensor) -> Tensor:
    return torch.cat([tokens, self.rows[None, : tokens.shape[1]].expand(len(x), -1, -1)], 1).mean(1)


def _if_it_fits(self: Any, x: Tensor, tokens: Tensor) -> Tensor:
    return (tokens + self.rows if tokens.shape[1] == len(self.rows) else tokens).mean(1)


def _by_number(self: Any, x: Tensor, tokens: Tensor) -> Tensor:
    return (tokens + self.book(torch.arange(tokens.shape[1]))).mean(1)


def _by_list(self: Any, x: Tensor, tokens: Tensor) -> Tensor:
    return (tokens + self.rows[torch.arange(tokens.shape[1])]).mean(1)


ROWS = {"rows": lambda: nn.Parameter(torch.randn(17, 48))}
TABLES: dict[str, tuple[Use, dict[str, Callable[[], Any]]]] = {
    "added": (lambda s, x, t: (t + s.rows).mean(1), ROWS),
    "its first rows": (_first_rows, ROWS),
    "by a list": (_by_list, ROWS),
    "by its number": (_by_number, {"book": lambda: nn.Embedding(17, 48)}),
    "if it fits": (_if_it_fits, ROWS),
    "not used": (lambda s, x, t: t.mean(1), ROWS),
    "weights": (lambda s, x, t: (t * s.weights[:, None]).sum(1), {"weights": lambda: nn.Buffer(torch.randn(17))}),
    "mixed": (lambda s, x, t: s.mix(t.mT).mean(2), {"mix": lambda: nn.Linear(17, 17)}),
    "all at once": (lambda s, x, t: s.read(t.flatten(1)), {"read": lambda: nn.Linear(17 * 48, 5)}),
    "its first at once": (lambda s, x, t: s.read(t[:, :17].flatten(1)), {"read": lambda: nn.Linear(17 * 48, 5)}),
    "normed": (lambda s, x, t: s.normed(t).mean(1), {"normed": lambda: nn.BatchNorm1d(17)}),
    "an order": (lambda s, x, t: t[:, s.order].mean(1), {"order": lambda: nn.Buffer(torch.arange(17).flip(0))}),
}


@pytest.mark.siblings(fast=2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("table", TABLES)
def test_tables_over_tokens_stay_refused_whatever_they_are_called(table: str, kind: str) -> None:
    use, held = TABLES[table]
    for ask in ({"image_size": 96}, {"patch_size": 32}, {"image_size": (32, 128)}):
        refused(KINDS[kind](use, **{name: make() for name, make in held.items()}), ".", **ask)


def test_what_cannot_be_run_stays_refused() -> None:
    def asking(self: Any, x: Tensor, tokens: Tensor) -> Tensor:
        return tokens.mean(1) @ self.prototypes.T if float(tokens.mean()) > 0 else tokens.mean(1)

    for build in KINDS.values():
        refused(build(asking, prototypes=nn.Parameter(torch.ones(17, 48))), "prototypes", image_size=96)


@pytest.mark.parametrize("kind", KINDS)
def test_what_would_not_run_afterwards_is_refused(kind: str) -> None:
    """Also where nothing that it holds says why."""

    def split(self: Any, x: Tensor, tokens: Tensor) -> Tensor:
        return tokens.split([1, 1 << 4], 1)[1].mean(1)

    with pytest.raises(UnsupportedModelError, match="runs as it is, but would not"):
        anypatch.adapt(KINDS[kind](split).eval(), image_size=96)


@pytest.mark.parametrize("name", ["example_input_array", "_example_input_array"])
def test_the_image_that_lightning_shows_a_model_follows(name: str) -> None:
    model = Around(vit(), lambda s, x, t: t.mean(1), **{name: torch.rand(1, 3, 64, 64)}).eval()
    anypatch.adapt(model, image_size=(96, 32))
    shown = getattr(model, name)
    assert shown.shape == (1, 3, 96, 32)
    assert model(shown).shape == (1, 48)
