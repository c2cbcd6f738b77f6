"""Directories that somebody else made: nothing in them is run, opened or allocated on their word."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import anypatch
from anypatch import CheckpointError
from anypatch.files.configs import MAX_NESTING, read_config
from anypatch.files.reading import read
from builders import transformers_model
from tests.files.fuzzing import forget_peak, peak

MARK = "opened"


class _Evil:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (self.mark, "w")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a file that must not be opened; afterwards it was not, and nobody was asked anything."""
    evil = tmp_path / "evil.pth"
    evil.write_bytes(pickle.dumps(_Evil(str(tmp_path / MARK))))
    opened: list[str] = []
    real = builtins.open

    def watched(file: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(str(file))
        return real(file, *args, **kwargs)

    def asked(*_: Any) -> str:
        opened.append("standard input")
        return "y"

    monkeypatch.setattr(builtins, "open", watched)
    monkeypatch.setattr(builtins, "input", asked)
    yield tmp_path
    assert not [n for n in opened if Path(n).name.startswith("evil") or n == "standard input"]
    assert not (tmp_path / MARK).exists()


def _refused(folder: Path, match: str) -> None:
    for call in (
        lambda: anypatch.load(folder),
        lambda: anypatch.convert(folder, folder.parent / "out", patch_size=8),
        lambda: anypatch.load(next(folder.glob("*.safetensors"))) if (folder / "model.safetensors").exists() else None,
    ):
        try:
            result = call()
        except anypatch.AnypatchError as error:
            assert isinstance(error, CheckpointError), error  # noqa: PT017
            assert __import__("re").search(match, str(error)), error  # noqa: PT017
        else:
            assert result is None
    with pytest.raises(CheckpointError, match=match):
        anypatch.load(folder)
    assert not (folder.parent / "out").exists()


def _timm(place: Path, config: dict[str, Any]) -> Path:
    folder = place / "timm"
    folder.mkdir()
    model = timm.create_model("test_vit", img_size=32, patch_size=8)
    save_file(model.state_dict(), folder / "model.safetensors")
    base = {"pretrained_cfg": {}, "architecture": "test_vit", "model_args": {"img_size": 32, "patch_size": 8}}
    (folder / "config.json").write_text(json.dumps({**base, **config}))
    return folder


def test_what_timm_itself_does_not_take(place: Path) -> None:
    """A config that is no description of a model is one error of ours, whatever the library raises."""
    folder = _timm(place, {})
    config = json.loads((folder / "config.json").read_text())
    for odd in ({"nonsense": 1}, [], {"input_size": "x"}, {"num_classes": "many"}, "text"):
        (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": odd, "num_features": "x"}))
        with pytest.raises(CheckpointError, match="timm") as caught:
            anypatch.load(folder)
        assert caught.value.__cause__ is not None


def test_a_good_directory_of_timm_loads(place: Path) -> None:
    assert anypatch.geometry(anypatch.load(_timm(place, {}))).patch_size == (8, 8)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"model_args": {"checkpoint_path": "evil.pth"}}, "checkpoint_path"),
        ({"model_args": {"pretrained_cfg_overlay": {"file": "evil.pth"}}}, "pretrained_cfg_overlay"),
        ({"model_args": {"pretrained_cfg": {"file": "evil.pth", "custom_load": True}}}, "pretrained_cfg"),
        ({"model_args": {"pretrained": True}}, "pretrained"),
        ({"model_args": {"cache_dir": "evil"}}, "cache_dir"),
        ({"model_args": {"act_layer": "/evil"}}, "which is no name"),
        ({"model_args": [1]}, "no table of arguments"),
        ({"architecture": "local-dir:evil"}, "no architecture"),
        ({"architecture": "hf-hub:evil/evil"}, "no architecture"),
        ({"architecture": "../evil"}, "no architecture"),
        ({"architecture": "no_such_model"}, "does not have"),
        ({"global_pool": "evil/x"}, "which is no name"),
        ({"model_args": {"depth": 10**8}}, "depth is 100000000"),
        ({"num_classes": 10**15}, "no size of a model"),
    ],
)
def test_timm(place: Path, config: dict[str, Any], match: str) -> None:
    text = json.loads(json.dumps(config).replace('"evil', f'"{place}/evil'))
    _refused(_timm(place, text), match)


@pytest.mark.parametrize(("name", "value"), [("patch_size", 800), ("img_size", 12_800)])
def test_timm_resamples_no_file_to_sizes_of_a_configuration(place: Path, name: str, value: int) -> None:
    """Half a gigabyte for the patch, and as much for the positions, on the word of a file of one megabyte."""
    folder = _timm(place, {"model_args": {"img_size": 32, "patch_size": 8, name: value}})
    before = forget_peak()
    with pytest.raises(CheckpointError, match=r"more than all \d+ values of the file"):
        anypatch.convert(folder, place / "out", 4)
    assert peak() - before < 64 << 20


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}, "evil|trust"),
        ({"model_type": "vit", "attn_implementation": "evil/kernel"}, "code from elsewhere"),
        ({"model_type": "vit", "_attn_implementation": "evil/kernel"}, "code from elsewhere"),
        ({"model_type": "clip", "vision_config": {"attn_implementation": "evil/kernel:x"}}, "code from elsewhere"),
        ({"model_type": "timm_wrapper", "architecture": "test_vit", "model_args": {"checkpoint_path": "evil.pth"}},
         "checkpoint_path"),
        ({"model_type": "timm_wrapper", "architecture": "local-dir:evil"}, "no architecture|a place"),
        ({"model_type": "dpt", "backbone_config": {"model_type": "timm_backbone", "backbone": "evil"}}, "but a place"),
        ({"model_type": "vit", "num_hidden_layers": 10**8}, "num_hidden_layers is 100000000"),
        ({"model_type": "vit", "num_labels": 10**8}, "num_labels is 100000000"),
    ],
)  # fmt: skip
def test_transformers(place: Path, config: dict[str, Any], match: str) -> None:
    pytest.importorskip("transformers")
    folder = place / "hf"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(place / MARK)!r}, 'w')\n")
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    text = json.dumps({"architectures": ["ViTModel"], **config})
    (folder / "config.json").write_text(text.replace('"evil"', f'"{place}/evil"') if "dpt" in text else text)
    _refused(folder, match)


CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": {"context_length": 8, "vocab_size": 30, "width": 32, "heads": 2, "layers": 1},
}


def _clip(place: Path, vision: dict[str, Any], text: dict[str, Any], weights: bool = True) -> Path:
    folder = place / "clip"
    folder.mkdir()
    _write_clip(folder, vision, text, weights)
    return folder


def _write_clip(folder: Path, vision: dict[str, Any], text: dict[str, Any], weights: bool = True) -> None:
    open_clip = pytest.importorskip("open_clip")
    if weights:
        save_file(open_clip.CLIP(**CLIP).state_dict(), folder / "open_clip_model.safetensors")
    cfg = {**CLIP, "vision_cfg": {**CLIP["vision_cfg"], **vision}, "text_cfg": {**CLIP["text_cfg"], **text}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": {}}))


@pytest.mark.parametrize(
    ("vision", "text", "match"),
    [
        ({"timm_model_name": "local-dir:evil"}, {}, "no architecture"),
        ({"timm_model_name": "hf-hub:evil/evil"}, {}, "no architecture"),
        ({}, {"hf_model_name": "/evil"}, "no name on a hub"),
        ({}, {"hf_model_name": "../evil"}, "no name on a hub"),
        ({}, {"hf_model_name": "some/evil"}, "nothing is fetched.*hf download some/evil config.json"),
        ({}, {"hf_model_name": "evil"}, "nothing is fetched"),
        ({"act_kwargs": {"x": "/evil"}}, {}, "but a place"),
        ({"layers": 10**8}, {}, "layers is 100000000"),
    ],
)
def test_open_clip(place: Path, vision: dict[str, Any], text: dict[str, Any], match: str) -> None:
    _refused(_clip(place, vision, text), match)


def test_text_towers_that_are_here_already(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What open_clip's own models name, and what is in the hub's cache; a tokenizer is not asked for at all."""
    from huggingface_hub import constants

    from anypatch.hosts.open_clip.safety import require_safe

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hub"))
    _cached(place / "hub", {"config.json": json.dumps({"model_type": "bert"})})
    for number, name in enumerate(("some/evil", "roberta-base", "google/mt5-base")):
        folder = place / str(number)
        folder.mkdir()
        _write_clip(folder, {}, {"hf_model_name": name, "hf_tokenizer_name": "some/other"})
        assert require_safe(folder)["text_cfg"]["hf_model_name"] == name


def test_open_clip_without_weights(place: Path) -> None:
    folder = _clip(place, {}, {}, weights=False)
    with pytest.raises(CheckpointError, match="no weights"):
        anypatch.load(folder)
    save_file({"x": torch.ones(1)}, folder / "other.safetensors")
    with pytest.raises(CheckpointError):
        anypatch.load(folder)
    good = _clip(place / "good", {}, {}) if (place / "good").mkdir() is None else folder
    assert anypatch.geometry(anypatch.load(good)).patch_size == (8, 8)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"module": "os"}, "no torchvision model"),
        ({"module": ["os"]}, "no torchvision model"),
        ({"arguments": {"norm_layer": "partial"}}, "norm_layer"),
        ({"arguments": {"num_layers": 10**8}}, "num_layers is 100000000"),
        ({"arguments": None}, "no table"),
        ({"classes": {"block": "partial"}}, "not one of"),
        ({"classes": {"attn_layer": "partial"}}, "attn_layer"),
    ],
)
def test_torchvision(place: Path, change: dict[str, Any], match: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)
    anypatch.save(model, place / "tv")
    assert anypatch.load(place / "tv") is not None
    config = json.loads((place / "tv" / "torchvision.json").read_text())
    (place / "tv" / "torchvision.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=match):
        anypatch.load(place / "tv")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 100_000, "nested"),
        (json.dumps({"a": 1})[:-1] + ', "b": ' + '{"c":' * 80 + "1" + "}" * 81, f"more than {MAX_NESTING}"),
        ("[1]", "no table"),
        ("{", "damaged"),
        ("\ud800", "damaged"),
        ('{"num_layers": ' + "9" * 5000 + "}", "damaged|no size|num_layers"),
    ],
)
def test_odd_texts(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=match):
        read_config(tmp_path / "config.json")


# -- configurations that ask for more than their weights ----------------------------------------------------------


def _wide_timm(folder: Path, **arguments: Any) -> None:
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "model_args": arguments, "pretrained_cfg": {}}
    (folder / "config.json").write_text(json.dumps(config))


def _wide_transformers(folder: Path, **fields: Any) -> None:
    pytest.importorskip("transformers")
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"], **fields}))


def _wide_clip(folder: Path, **text: Any) -> None:
    _write_clip(folder, {}, text)


def _wide_torchvision(folder: Path, **arguments: Any) -> None:
    torchvision = pytest.importorskip("torchvision")
    anypatch.save(torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3), folder)
    config = json.loads((folder / "torchvision.json").read_text())
    config["arguments"].update(arguments)
    (folder / "torchvision.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("write", "fields"),
    [
        (_wide_timm, {"embed_dim": 3 * 10**6, "depth": 2}),
        (_wide_timm, {"embed_dim": 402, "depth": 9_000}),  # of tensors below a megabyte each
        (_wide_timm, {"num_classes": 10**8}),
        (_wide_timm, {"img_size": 10**5, "patch_size": 8}),  # a table of positions
        (_wide_timm, {"patch_size": 5 * 10**4, "img_size": 5 * 10**4}),
        (_wide_transformers, {"hidden_size": 120_000, "intermediate_size": 1_000_000, "num_hidden_layers": 1}),
        (_wide_transformers, {"image_size": 10**6}),
        (_wide_transformers, {"intermediate_size": 10**6, "num_hidden_layers": 100}),
        (_wide_clip, {"vocab_size": 1_000_000, "width": 64_000}),
        (_wide_clip, {"context_length": 10**9}),
        (_wide_torchvision, {"num_classes": 10**9}),
        (_wide_torchvision, {"mlp_dim": 10**8}),
    ],
)
@pytest.mark.parametrize("pretrained", [True, False])
def test_a_configuration_far_larger_than_its_weights(
    tmp_path: Path, write: Callable[..., None], fields: dict[str, Any], pretrained: bool
) -> None:
    write(tmp_path, **fields)
    with _peak() as peak, pytest.raises(CheckpointError, match=r"takes [\d.]+ GB or more.* have \d+ bytes"):  # noqa: SIM117
        with anypatch.memory_limit(256 << 20):
            anypatch.load(tmp_path, **({} if pretrained else {"pretrained": False}))
    assert peak() < 1 << 30  # what is allowed and some imports, not what the configuration asks for


@contextlib.contextmanager
def _peak() -> Iterator[Callable[[], int]]:
    """Bytes of memory that a block takes at most, looked at every now and then."""
    import psutil

    process, most = psutil.Process(), [0]
    before = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most.append(process.memory_info().rss - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: max(most)
    finally:
        done.set()
        thread.join()


def test_a_model_may_be_larger_than_the_limit_where_its_weights_are(tmp_path: Path) -> None:
    """Sharded, in half precision and with a head that the file does not have."""
    model = transformers_model(hidden_size=128, num_hidden_layers=2, intermediate_size=3072, num_labels=4)
    model.bfloat16().save_pretrained(tmp_path, max_shard_size="1MB")
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["architectures"] = ["ViTForImageClassification"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with anypatch.memory_limit(0):
        loaded = anypatch.load(tmp_path, dtype=torch.float32)
    assert anypatch.adapt(loaded, 16).config.patch_size == 16
    timm_folder = tmp_path / "timm"
    model = timm.create_model("vit_tiny_patch16_224", depth=2).half()
    anypatch.save(model, timm_folder)
    with anypatch.memory_limit(0):
        loaded = anypatch.load(timm_folder)
    assert anypatch.adapt(loaded, 32).patch_embed.patch_size == (32, 32)
    (timm_folder / "model.safetensors").unlink()
    with anypatch.memory_limit(0), pytest.raises(CheckpointError, match=r"memory_limit\(BYTES\)"):
        anypatch.load(timm_folder, pretrained=False)
    anypatch.load(timm_folder, pretrained=False)


@pytest.mark.parametrize("prefix", ["timm:hf-hub:", "transformers:", "open_clip:hf-hub:"])
def test_a_configuration_in_the_hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prefix: str) -> None:
    """A repository, as a cache holds it: the same bound as for a directory."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    snapshot = cache / "models--some--wide" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (cache / "models--some--wide" / "refs").mkdir()
    (cache / "models--some--wide" / "refs" / "main").write_text("a" * 40)
    write, fields = {
        "timm:hf-hub:": (_wide_timm, {"embed_dim": 3 * 10**5}),
        "transformers:": (_wide_transformers, {"hidden_size": 120_000, "num_hidden_layers": 1}),
        "open_clip:hf-hub:": (_wide_clip, {"vocab_size": 1_000_000, "width": 64_000}),
    }[prefix]
    write(snapshot, **fields)
    (snapshot / "more.bin").write_bytes(bytes(2 << 20))  # of some size
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(cache))
    with pytest.raises(CheckpointError, match=r"takes [\d.]+ GB or more.* have \d+ bytes"):
        anypatch.load(f"{prefix}some/wide")


# -- devices, pipes and threads ----------------------------------------------------------------------------------


def _within(seconds: float, call: Callable[[], Any]) -> BaseException | None:
    """What a call raised; a call that hangs is a failure of its own."""
    raised: list[BaseException | None] = []

    def work() -> None:
        try:
            call()
            raised.append(None)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert raised, "it hangs"
    return raised[0]


@pytest.mark.parametrize("kind", ["zero", "pipe", "link to a pipe", "config", "directory"])
def test_devices_and_pipes_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    if kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    else:
        save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
        os.mkfifo(tmp_path / "config.json")
        path = tmp_path
    for call in (
        lambda: anypatch.load(path),
        lambda: anypatch.load(str(path), **({} if path.is_dir() else {"arch": "timm:test_vit"})),
        lambda: anypatch.convert(path, tmp_path / "out.safetensors", patch_size=8),
    ):
        error = _within(20, call)
        assert isinstance(error, CheckpointError), error
    assert isinstance(_within(20, lambda: anypatch.load("/dev/zero")), CheckpointError)


def test_reading_in_several_threads_is_as_alone(tmp_path: Path) -> None:
    import argparse

    tensors = {"patch_embed.proj.weight": torch.arange(48.0).reshape(4, 3, 2, 2), "b": torch.ones(3)}
    for index, zipped in enumerate((True, False)):
        saved = {"model": tensors, "args": argparse.Namespace(lr=1.0)}
        torch.save(saved, tmp_path / f"{index}.pt", _use_new_zipfile_serialization=zipped)
    save_file(tensors, tmp_path / "2.pt")
    before = list(torch.serialization.get_safe_globals())
    wrong: list[Any] = []

    def work() -> None:
        for _ in range(15):
            for index in range(3):
                try:
                    found = read(tmp_path / f"{index}.pt").tensors
                    if not all(torch.equal(found[k], v) for k, v in tensors.items()):
                        wrong.append(index)
                except Exception as error:
                    wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert torch.serialization.get_safe_globals() == before


def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    from anypatch.files.header import map_tensors, read_header

    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(8)}, path)
    header = read_header(path)
    save_file({"x": torch.zeros(8)}, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        map_tensors(header)


# -- what happens to a directory while it is converted -----------------------------------------------------------


def test_links_that_lead_outside_stay_links(place: Path) -> None:
    secret = place / "secret.txt"
    secret.write_text("secret")
    folder = _timm(place, {})
    (folder / "notes.txt").symlink_to(secret)
    (folder / "relative.txt").symlink_to("../secret.txt")
    (folder / "own.txt").write_text("own")
    (folder / "inside.txt").symlink_to("own.txt")
    anypatch.convert(folder, place / "deep.out", patch_size=4)
    for name in ("notes.txt", "relative.txt"):
        written = place / "deep.out" / name
        assert written.is_symlink()
        assert written.resolve() == secret
    assert not (place / "deep.out" / "inside.txt").is_symlink()
    assert (place / "deep.out" / "inside.txt").read_text() == "own"


def test_the_hub_cache_is_copied(place: Path) -> None:
    folder = _timm(place, {})
    cache = place / "models--x" / "snapshots" / "abc"
    cache.mkdir(parents=True)
    (place / "models--x" / "blobs").mkdir()
    (folder / "README.md").write_text("card")
    for path in folder.iterdir():
        (place / "models--x" / "blobs" / path.name).write_bytes(path.read_bytes())
        (cache / path.name).symlink_to(f"../../blobs/{path.name}")
    anypatch.convert(cache, place / "out", patch_size=4)
    assert not any(path.is_symlink() for path in (place / "out").iterdir())
    assert (place / "out" / "README.md").read_text() == "card"


@pytest.mark.parametrize("what", ["model.safetensors", "config.json", "README.md", "more.txt"])
def test_a_source_that_is_replaced_while_it_is_converted(
    place: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    from anypatch.files import shards

    folder = _timm(place, {})
    (folder / "README.md").write_text("old")
    original = shards.write_safetensors

    def late(*args: Any, **kwargs: Any) -> Any:
        new = place / "new"
        new.write_bytes((folder / what).read_bytes() if (folder / what).exists() else b"x")
        os.replace(new, folder / what)
        return original(*args, **kwargs)

    monkeypatch.setattr(shards, "write_safetensors", late)
    with pytest.raises(CheckpointError, match=r"changed while"):
        anypatch.convert(folder, place / "out", patch_size=4)
    assert not (place / "out").exists()


# -- files that ask for memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_expanded_tensors(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.pt"
    small = torch.zeros(1).as_strided((3, 1 << 10), (0, 0))
    torch.save({"a": small}, path, _use_new_zipfile_serialization=zipped)
    assert read(path).tensors["a"].shape == (3, 1 << 10)
    torch.save({"a": torch.zeros(1).as_strided((1 << 34,), (0,))}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="would take 68719476736 bytes"):
        read(path)


def test_names_nested_without_end() -> None:
    from anypatch.files.pickles import Inert
    from anypatch.files.scripted import scripted_tensors

    root = inner = Inert()
    for _ in range(5000):
        following = Inert()
        inner.__setstate__({"n" * 20: following})
        inner = following
    inner.__setstate__({"weight": torch.ones(1)})
    with pytest.raises(pickle.UnpicklingError, match="nested"):
        scripted_tensors(root)


# -- what lies beside a configuration ------------------------------------------------------------------------------


def _hf(place: Path, **files: Any) -> Path:
    """A good directory of transformers with other files in it, given as JSON by name."""
    folder = place / "hf"
    transformers_model().save_pretrained(folder)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def _index(place: Path, name: str) -> Path:
    folder = _hf(place)
    names = list(read(folder / "model.safetensors").names.values())
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/evil.safetensors", "a/../../evil.safetensors", "..", "", "x" * 1000]
)
def test_an_index_that_names_another_place(place: Path, name: str) -> None:
    folder = _index(place, name)
    (place / "evil.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    _refused(folder, "outside the directory")


def test_an_index_that_names_its_files(place: Path) -> None:
    assert anypatch.load(_index(place, "a.safetensors")) is not None


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"transformers_weights": "../evil.safetensors"}, "outside the directory"),
        ({"transformers_weights": "/evil.safetensors.index.json"}, "outside the directory"),
        ({"model_type": "dpt", "backbone": "evil/evil", "use_pretrained_backbone": True}, "is elsewhere"),
        ({"model_type": "detr", "backbone": "/evil"}, "but a place"),
        ({"model_type": "upernet", "backbone_config": {"model_type": "timm_backbone", "backbone": "a/evil"}},
         "is elsewhere"),
    ],
)  # fmt: skip
def test_fields_that_name_a_file_or_a_repository(place: Path, config: dict[str, Any], match: str) -> None:
    folder = _hf(place)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, **config}))
    _refused(folder, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"base_model_name_or_path": ["evil"]}, "neither a directory"),
        ({"corda_config": {"cache_file": "evil.pth", "covariance_file": "./evil.pth"}}, "but a place"),
        ({"init_lora_weights": "loraga", "lora_ga_config": {"cache_file": "/evil.pth"}}, "but a place"),
        ({"megatron_config": {"x": 1}, "megatron_core": "antigravity"}, "to import 'antigravity'"),
        ({"r": 10**13}, "no size of a model"),
    ],
)
def test_adapters(place: Path, change: dict[str, Any], match: str) -> None:
    peft = pytest.importorskip("peft")
    folder = _hf(place)
    config = peft.LoraConfig(target_modules=r".*\.q_proj", base_model_name_or_path="some/base").to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}, default=str))
    with pytest.raises(CheckpointError, match=match):
        anypatch.load(folder)


def _adapter(place: Path, base: str) -> Path:
    """A directory with an adapter alone, for a model elsewhere."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = transformers.ViTModel.from_pretrained(_hf(place))
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(place / "adapter")
    path = place / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    return place / "adapter"


def test_the_model_that_an_adapter_is_for_is_looked_at_too(place: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder, base = _adapter(place, str(place / "hf")), place / "hf"

    def load() -> Any:
        return anypatch.load(f"transformers:{folder}", model_class=transformers.ViTForImageClassification)

    assert any("lora_" in name for name, _ in load().named_parameters())
    config = json.loads((base / "config.json").read_text())
    for change, match in (
        ({"attn_implementation": "evil/kernel"}, "code from elsewhere"),
        ({"num_labels": 10**5}, r"takes [\d.]+ GB or more.* have \d+ bytes"),
        ({"num_labels": 10**8}, "num_labels is 100000000"),
    ):
        (base / "config.json").write_text(json.dumps({**config, **change}))
        with anypatch.memory_limit(0), pytest.raises(CheckpointError, match=match):
            load()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(folder)}))
    with pytest.raises(CheckpointError, match="names itself"):
        load()


def test_an_adapter_alone_says_what_it_is_for(place: Path) -> None:
    folder = _adapter(place, "some/base")
    for source in (str(folder), f"transformers:{folder}"):
        with pytest.raises(CheckpointError, match=r"adapter for some/base.*PeftModel"):
            anypatch.load(source)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_a_pipe_in_a_directory(place: Path, name: str) -> None:
    folder = _hf(place)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="no regular file"):
        anypatch.load(folder)


def test_a_packed_archive_in_a_directory(place: Path) -> None:
    """A few kilobytes that torch's own reader unpacks to gigabytes."""
    import zipfile

    folder = _hf(place)
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1 << 20)}, place / "good.bin")
    with (
        zipfile.ZipFile(place / "good.bin") as old,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(CheckpointError, match="not stored as torch stores"):
        anypatch.load(folder)


def _cached(cache: Path, files: dict[str, str]) -> None:
    """A repository ``some/evil`` as a hub cache holds it."""
    snapshot = cache / "models--some--evil" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (cache / "models--some--evil" / "refs").mkdir()
    (cache / "models--some--evil" / "refs" / "main").write_text("a" * 40)
    for name, text in files.items():
        (snapshot / name).write_text(text)


@pytest.mark.parametrize(
    ("source", "file", "config", "match"),
    [
        ("transformers:some/evil", "config.json", {"model_type": "vit", "attn_implementation": "evil/kernel"},
         "code from elsewhere"),
        ("timm:hf-hub:some/evil", "config.json",
         {"architecture": "test_vit", "model_args": {"checkpoint_path": "evil.pth"}, "pretrained_cfg": {}},
         "checkpoint_path"),
        ("open_clip:hf-hub:some/evil", "open_clip_config.json",
         {"model_cfg": {**CLIP, "vision_cfg": {"timm_model_name": "local-dir:evil"}}, "preprocess_cfg": {}},
         "no architecture"),
    ],
)  # fmt: skip
def test_a_repository_is_looked_at_like_a_directory(
    place: Path, monkeypatch: pytest.MonkeyPatch, source: str, file: str, config: dict[str, Any], match: str
) -> None:
    from huggingface_hub import constants

    pytest.importorskip(source.partition(":")[0])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _cached(place / "hub", {file: json.dumps(config)})
    with pytest.raises(CheckpointError, match=match):
        anypatch.load(source, cache_dir=str(place / "hub"))


@pytest.mark.parametrize("size", [{"image_size": -32}, {"patch_size": -8}, {"image_size": [32, -32]}])
def test_sizes_below_nothing(place: Path, size: dict[str, Any]) -> None:
    """The library takes them, and builds a model whose tables fit by chance."""
    folder = _hf(place)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, **size}))
    for call in (
        lambda: anypatch.load(folder, patch_size=16),
        lambda: anypatch.convert(folder, place / "out", patch_size=16),
    ):
        with pytest.raises((CheckpointError, anypatch.UnsupportedModelError)):
            call()
    assert not (place / "out").exists()


ACTS = {
    "load": lambda source, target: anypatch.load(source, 16, 64),
    "save": lambda source, target: anypatch.save(anypatch.load(source, 16, 64), target),
    "convert": lambda source, target: anypatch.convert(source, target, 16, 64),
    "sweep": lambda source, target: anypatch.sweep(str(source), [16], image_size=32),
}


@pytest.mark.parametrize("act", ACTS)
def test_code_of_processors_and_tokenizers_travels_and_is_not_run(place: Path, act: str) -> None:
    """No class that a processor, a tokenizer or a generation configuration names beside itself is imported."""
    folder = place / "folder"
    transformers_model().save_pretrained(folder)
    (folder / "custom.py").write_text(f"open({str(place / MARK)!r}, 'w')\nfrom transformers import *\n")
    kinds = ("ImageProcessor", "FeatureExtractor", "VideoProcessor", "Processor")
    named: dict[str, Any] = {f"Auto{kind}": "custom.ViTImageProcessor" for kind in kinds}
    named |= {"AutoTokenizer": ["custom.BertTokenizer", None]}
    sizes = {"size": {"height": 32, "width": 32}, "image_processor_type": "Evil", "processor_class": "Evil"}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"):
        (folder / name).write_text(json.dumps({"auto_map": named, **sizes}))
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text(
            json.dumps({"auto_map": named, "tokenizer_class": "Evil", "custom_generate": "custom"})
        )
    described = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "custom.ViTConfig", "AutoModel": "custom.ViTModel"}
    (folder / "config.json").write_text(json.dumps({**described, "auto_map": named}))
    ACTS[act](folder, place / "out")
    assert not (place / MARK).exists()
    assert not [name for name in sys.modules if name.rpartition(".")[2] == "custom"]
    if (place / "out").exists():
        assert (place / "out" / "custom.py").read_bytes() == (folder / "custom.py").read_bytes()
        fields = json.loads((place / "out" / "preprocessor_config.json").read_text())
        assert fields["auto_map"]["AutoImageProcessor"] == "custom.ViTImageProcessor"
        assert fields["size"] == {"height": 64, "width": 64}
