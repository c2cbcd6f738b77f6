"""The host contract: what a folder with the Model part alone gives, and that everything else refuses by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import anypatch
from anypatch import CheckpointError, UnsupportedModelError, hosts
from anypatch.hosts.base import Host
from anypatch.inspection import inspect
from anypatch.measure.features import Reader
from anypatch.measure.preprocess import preprocess_of
from anypatch.measure.view import view
from builders import write
from dummy_host.model import Tiny

DUMMY = Host("dummy", package="dummy_host")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(hosts, "HOSTS", (DUMMY, *hosts.HOSTS))
    return DUMMY


@pytest.mark.usefixtures("registered")
def test_the_model_part_alone_adapts_checks_and_inspects() -> None:
    torch.manual_seed(0)
    model = Tiny()
    assert anypatch.geometry(model).library == "dummy"
    assert anypatch.check(model, 8).passed
    found = inspect(model)
    assert (found.class_name, found.embedding) == ("Tiny", "patch projection (h w c)")
    assert found.positions.startswith("absolute positions")
    pixels = torch.randn(1, 3, 16, 16)
    wanted = model(pixels)
    anypatch.adapt(model, 8, keep="grid", kernel=anypatch.Pi("nearest"))
    assert (model.side, model.image) == (8, 32)
    torch.testing.assert_close(model(pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)), wanted)


@pytest.mark.usefixtures("registered")
def test_the_model_part_alone_gives_views() -> None:
    """``at`` and ``flexible`` share the host's weights, and say what an adapted copy says."""
    model = Tiny().eval()
    with torch.no_grad():
        model.where.normal_()
    pixels = torch.randn(1, 3, 16, 16)
    coarse, fine = anypatch.at(model, 8), model(pixels)
    flexible = anypatch.flexible(model, (4, 8))
    torch.testing.assert_close(coarse(pixels), anypatch.adapt(copy.deepcopy(model), 8)(pixels))
    torch.testing.assert_close(flexible(pixels, patch_size=8), coarse(pixels))
    assert torch.equal(model(pixels), fine)
    coarse(pixels).square().mean().backward()
    assert model.embed.weight.grad is not None
    assert model.embed.weight.grad.shape == (8, 3 * 4 * 4)


@pytest.mark.usefixtures("registered")
def test_a_model_that_holds_the_hosts_is_adapted_too() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Tiny()

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.backbone(pixels).mean(1)

    model = Holder()
    assert anypatch.check(model, 8).passed
    anypatch.adapt(model, 8)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 8)


def test_every_other_verb_refuses_by_host_and_verb(registered: Host, tmp_path: Path) -> None:
    subject = registered.subject(Tiny())
    calls: dict[str, Any] = {
        "load": lambda: registered.load("x"),
        "build": lambda: registered.build("x"),
        "save": lambda: registered.save(Tiny(), tmp_path, tmp_path),
        "candidates": lambda: registered.candidates(None),
        "fit": lambda: registered.fit("x", None),
        "open_folder": lambda: registered.open_folder(tmp_path),
        "preprocess": lambda: registered.preprocess(subject),
        "features": lambda: registered.features(subject, torch.zeros(1, 3, 16, 16)),
        "classes": lambda: registered.classes(subject),
        "tokenize": lambda: registered.tokenize(subject, ["a"]),
    }
    for verb, call in calls.items():
        with pytest.raises(UnsupportedModelError, match=rf"\bdummy\b.*\b{verb}\b"):
            call()
    assert (registered.names(), registered.names_folder(tmp_path), registered.repository("x")) == ([], None, None)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("lacking", "call"),
    [
        ("load", lambda place: anypatch.load("dummy:x")),
        ("build", lambda place: anypatch.load("dummy:x", pretrained=False)),
        ("save", lambda place: anypatch.save(Tiny(), place / "out")),
        ("save", lambda place: anypatch.push_to_hub(Tiny(), "me/out", endpoint="http://localhost:9")),
        ("preprocess", lambda place: anypatch.sweep(Tiny(), [8], cache=False)),
        ("preprocess", lambda place: view(Tiny(), write(place / "a.png", (200, 30, 30), 0), [8])),
        ("preprocess", lambda place: anypatch.tune(Tiny(), images=place, patch_size=8, steps=1, output=place / "out")),
    ],
    ids=["load", "load without weights", "save", "push_to_hub", "sweep", "view", "tune"],
)
def test_the_public_verbs_refuse_by_name(lacking: str, call: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"\bdummy\b.*\b{lacking}\b"):
        call(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("registered")
def test_convert_names_the_hosts_that_can(tmp_path: Path) -> None:
    save_file(Tiny().state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"dummy:x.*timm:NAME"):
        anypatch.convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", 8, arch="dummy:x")
    assert not (tmp_path / "y.safetensors").exists()


def test_a_module_that_holds_a_known_model_is_read_through_it() -> None:
    """Features and preprocessing of a user's module are those of the library's model inside it."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = timm.create_model(
                "vit_base_patch16_clip_224", img_size=32, depth=1, embed_dim=32, num_heads=2
            )

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.backbone(pixels)

    model, pixels = Holder(), torch.randn(2, 3, 32, 32)
    tokens = model.backbone.forward_features(pixels)
    assert preprocess_of(model).mean == tuple(model.backbone.pretrained_cfg["mean"])
    torch.testing.assert_close(Reader(model)(pixels).patches, tokens[:, 1:].unflatten(1, (2, 2)))


def test_a_room_that_needs_something_missing_is_not_taken_for_absent(tmp_path: Path, monkeypatch: Any) -> None:
    package = tmp_path / "broken_host"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "files.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        Host("broken", package="broken_host").load("x")


@pytest.mark.parametrize("name", ["timm", "transformers", "open_clip", "torchvision", "diffusers", "generic"])
def test_every_host_has_the_model_part(name: str) -> None:
    assert all(hosts.library(name).has(verb) for verb in ("recognises", "subject", "example", "load", "save"))


def test_prefixes() -> None:
    names = {prefix: host.name for prefix in ("timm", "hub", "generic", "x") if (host := hosts.by_prefix(prefix))}
    assert names == {"timm": "timm", "hub": "generic"}
