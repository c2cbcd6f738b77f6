"""What is active around ``load`` does not change what it gives, and other threads' loads neither."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import anypatch
from builders import transformers_model


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class _Watching(TorchFunctionMode):
    """A user's own mode, which changes nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


AMBIENT: dict[str, Callable[[], Any]] = {
    "double": lambda: _default(torch.float64),
    "bfloat16": lambda: _default(torch.bfloat16),
    "no device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no gradients": torch.no_grad,
    "deterministic": _deterministic,
    "a user's mode": _Watching,
}


def _timm(place: Path) -> str:
    anypatch.save(timm.create_model("test_vit", img_size=32, patch_size=8), place)
    return str(place)


def _timm_named(place: Path) -> str:
    """With a computed table and a new head, whose values are drawn."""
    return "timm:test_vit3"


def _transformers(place: Path) -> str:
    model = transformers_model()
    model.save_pretrained(place)
    (place / "model.safetensors").unlink()
    torch.save(model.state_dict(), place / "pytorch_model.bin")
    return str(place)


def _wrapped(place: Path) -> str:
    """A model of timm in transformers' wrapper, whose configuration says what each of them looks for."""
    transformers = pytest.importorskip("transformers")
    transformers.TimmWrapperModel(transformers.TimmWrapperConfig(architecture="test_vit")).save_pretrained(place)
    return str(place)


def _open_clip(place: Path) -> str:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 1}
    text = {"context_length": 8, "vocab_size": 30, "width": 32, "heads": 2, "layers": 1}
    anypatch.save(open_clip.CLIP(16, vision, text), place)
    return str(place)


def _torchvision(place: Path) -> str:
    torchvision = pytest.importorskip("torchvision")
    anypatch.save(torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32), place)
    return str(place)


def _diffusers(place: Path) -> str:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8)
    model.save_pretrained(place)
    return str(place)


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _assert_same(found: nn.Module, wanted: nn.Module) -> None:
    ours, theirs = _state(found), _state(wanted)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.device) == (theirs[name].dtype, theirs[name].device), name
        assert (tensor.requires_grad, tensor.is_inference()) == (theirs[name].requires_grad, False), name
        assert torch.equal(tensor, theirs[name]), name


SLOWER = (_open_clip, _torchvision, _wrapped, _diffusers)


@pytest.mark.parametrize(
    "make",
    [
        *(_timm, _timm_named, _transformers),
        *(pytest.param(make, marks=pytest.mark.slow) for make in SLOWER),
    ],
)
def test_what_is_active_around_load(tmp_path: Path, make: Callable[[Path], str]) -> None:
    source = make(tmp_path / "m")
    options: dict[str, Any] = {"pretrained": False} if ":" in source else {}
    torch.manual_seed(0)
    wanted = anypatch.load(source, **options)
    for name, ambient in AMBIENT.items():
        torch.manual_seed(0)
        with ambient():
            found = anypatch.load(source, **options)
        try:
            _assert_same(found, wanted)
        except AssertionError as error:
            raise AssertionError(f"under {name}: {error}") from error
        assert torch.get_default_dtype() == torch.float32


def test_a_dtype_that_is_asked_for_holds(tmp_path: Path) -> None:
    source = _transformers(tmp_path / "m")
    with _default(torch.float64):
        assert anypatch.load(source, dtype=torch.bfloat16).dtype == torch.bfloat16
        assert next(anypatch.load(_timm(tmp_path / "t"), dtype=torch.float16).parameters()).dtype == torch.float16


@pytest.mark.slow
def test_threads_load_each_as_alone(tmp_path: Path) -> None:
    """transformers switches the process's default dtype while it loads."""
    half = Path(_transformers(tmp_path / "half"))
    sources = {half: {"dtype": torch.bfloat16}, Path(_timm(tmp_path / "t")): {}}
    wanted = {source: anypatch.load(source, **options) for source, options in sources.items()}
    errors: list[BaseException] = []

    def run() -> None:
        try:
            for _ in range(10):
                for source, options in sources.items():
                    _assert_same(anypatch.load(source, **options), wanted[source])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (nn.Linear(1, 1), "not a Linear; adapt takes a model that is there already"),
        (None, "not a NoneType"),
        (b"model", "not a bytes"),
    ],
)
def test_what_is_no_source_is_named(source: Any, said: str) -> None:
    with pytest.raises(anypatch.UnsupportedModelError) as error:
        anypatch.load(source)
    assert str(error.value) == f"a source is a string or a path, {said}"
