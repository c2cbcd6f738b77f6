"""File to file: identical to load and save, byte for byte where nothing changes, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file as read_tensors
from safetensors.torch import save_file
from torch import Tensor

import anypatch
from anypatch import CheckpointError, GeometryError
from anypatch.errors import AnypatchWarning
from anypatch.files import atomic
from anypatch.files import shards as streaming
from anypatch.files.header import read_header
from builders import SMALL

VIT: dict[str, Any] = {"img_size": 64, "num_classes": 7, "depth": 12}
TINY = "timm:vit_tiny_patch16_224"


def _state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    return {k: torch.randn(v.shape).mul(0.1).to(dtype) for k, v in model.state_dict().items()}


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    path = tmp_path / "vit.safetensors"
    save_file(_state(), path, metadata={"format": "pt", "note": "kept"})
    return path


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)), name


# -- files -------------------------------------------------------------------------------------------------


@pytest.mark.siblings(fast=5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("sizes", [{"patch_size": 32}, {"patch_size": 8, "image_size": 96}, {"image_size": 128}])
def test_file_equals_load_and_save(tmp_path: Path, dtype: torch.dtype, sizes: dict[str, Any]) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(_state(dtype), source, metadata={"format": "pt", "note": "kept"})
    anypatch.convert(source, target, **sizes, arch=TINY)
    with pytest.warns(UserWarning, match="7 classes"):
        model = anypatch.load(source, **sizes, arch=TINY)
    _equal(read_tensors(target), dict(model.state_dict()))
    with safe_open(target, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "kept"}


def test_untouched_bytes_are_copied_and_only_two_tensors_change(vit: Path, tmp_path: Path) -> None:
    target = tmp_path / "b.safetensors"
    anypatch.convert(vit, target, patch_size=32)
    before, after = read_tensors(vit), read_tensors(target)
    changed = {k for k in before if before[k].shape != after[k].shape or not torch.equal(before[k], after[k])}
    assert changed == {"patch_embed.proj.weight", "pos_embed"}
    assert list(read_header(vit).entries) == list(read_header(target).entries)


def test_nothing_to_change_copies_the_file_and_says_so(vit: Path, clip: Path, tmp_path: Path) -> None:
    target = tmp_path / "b.safetensors"
    with pytest.warns(AnypatchWarning, match="has these sizes already: it is written as it is"):
        anypatch.convert(vit, target, patch_size=16)
    _equal(read_tensors(vit), read_tensors(target))
    with pytest.warns(AnypatchWarning, match="has these sizes already: it is written as it is"):
        anypatch.convert(clip, tmp_path / "out", patch_size=16)
    for shard in clip.glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()


def test_in_place(vit: Path, tmp_path: Path) -> None:
    anypatch.convert(vit, tmp_path / "b.safetensors", patch_size=32)
    anypatch.convert(vit, vit, patch_size=32)
    assert vit.read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.safetensors", "vit.safetensors"]


def test_other_layouts_keep_their_names(tmp_path: Path) -> None:
    """DINOv2 with registers: timm splits the table of positions, and the file keeps it whole."""
    model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, num_classes=0)
    state = {k: torch.randn(v.shape) for k, v in model.state_dict().items()}
    width = state["cls_token"].shape[-1]
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([torch.randn(1, 1, width), state["pos_embed"]], dim=1)
    state["mask_token"] = torch.zeros(1, width)
    source, target = tmp_path / "a.pth", tmp_path / "b.safetensors"
    torch.save(state, source)
    anypatch.convert(source, target, patch_size=28)
    converted = read_tensors(target)
    assert converted.keys() == state.keys()
    assert converted["pos_embed"].shape == (1, 1 + 4, width)
    assert torch.equal(converted["pos_embed"][:, :1], state["pos_embed"][:, :1])
    a = anypatch.load(target, arch="timm:vit_small_patch14_reg4_dinov2", num_classes=0)
    b = anypatch.load(source, patch_size=28, arch="timm:vit_small_patch14_reg4_dinov2", num_classes=0)
    _equal(dict(a.state_dict()), dict(b.state_dict()))


def test_openai_names(tmp_path: Path) -> None:
    """A table without a batch axis in the file, with one in timm."""
    tower = timm.create_model("vit_xsmall_patch16_clip_224", img_size=64, num_classes=8)
    from builders import openai as _openai

    state = {k: v.contiguous() for k, v in _openai({k: v.half() for k, v in tower.state_dict().items()}).items()}
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(state, source)
    anypatch.convert(source, target, patch_size=32, arch="timm:vit_xsmall_patch16_clip_224")
    converted = read_tensors(target)
    assert converted.keys() == state.keys()
    assert converted["visual.positional_embedding"].shape == (5, 256)
    assert converted["visual.conv1.weight"].shape == (256, 3, 32, 32)


# -- directories -------------------------------------------------------------------------------------------


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    small = {**SMALL, "num_hidden_layers": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 99, "eos_token_id": 1, "bos_token_id": 2},
        vision_config={**small, "image_size": 64, "patch_size": 16},
    )
    path = tmp_path / "clip"
    transformers.CLIPModel(config).save_pretrained(path, max_shard_size="40KB")
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    processor.save_pretrained(path)
    (path / "README.md").write_text("a card")
    (path / "extra").mkdir()
    (path / "extra" / "words.txt").write_text("words")
    (path / "pytorch_model.bin").write_bytes(b"stale")
    assert (path / "model.safetensors.index.json").is_file()
    return path


def test_directory_equals_load_and_save(clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    target = tmp_path / "out"
    anypatch.convert(clip, target, patch_size=8, image_size=96)
    converted = CLIPModel.from_pretrained(target)
    reference = anypatch.load(clip, patch_size=8, image_size=96)
    _equal(dict(converted.state_dict()), dict(reference.state_dict()))
    assert converted.config.to_diff_dict() == reference.config.to_diff_dict()
    processor = json.loads((target / "preprocessor_config.json").read_text())
    assert processor["crop_size"] == {"height": 96, "width": 96}
    assert processor["size"] == {"shortest_edge": 96}
    assert (target / "README.md").read_text() == "a card"
    assert (target / "extra" / "words.txt").read_text() == "words"
    assert not (target / "pytorch_model.bin").exists()
    index = json.loads((target / "model.safetensors.index.json").read_text())
    sizes = [sum(e.end - e.start for e in read_header(p).entries.values()) for p in target.glob("*.safetensors")]
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_directories_keep_the_dtype_of_each_tensor(clip: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    kernel, table = (
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.embeddings.position_embedding.weight",
    )
    exact = {}
    for shard in clip.glob("*.safetensors"):
        tensors = read_tensors(shard)
        for name in {kernel, table} & set(tensors):
            tensors[name] = tensors[name].to(dtype)
            exact[name] = tensors[name].float()
        save_file(tensors, shard, metadata={"format": "pt"})
    anypatch.convert(clip, tmp_path / "out", patch_size=8, kernel="pi")
    found = {k: v for p in (tmp_path / "out").glob("*.safetensors") for k, v in read_tensors(p).items()}
    assert {v.dtype for k, v in found.items() if v.is_floating_point() and k not in exact} == {torch.float32}
    assert found[kernel].dtype == found[table].dtype == dtype
    wanted = timm.layers.resample_patch_embed(exact[kernel], [8, 8])
    torch.testing.assert_close(found[kernel].float(), wanted.to(dtype).float(), rtol=0.13, atol=1e-3)
    assert (found[kernel].float() - wanted).abs().mean() < 0.03 * wanted.abs().mean()
    assert torch.equal(found[table][0].float(), exact[table][0])


def test_only_shards_that_change_are_rewritten(clip: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    anypatch.convert(clip, target, patch_size=8, link=True)
    linked = [p.name for p in clip.glob("*.safetensors") if (target / p.name).samefile(p)]
    rewritten = [p.name for p in clip.glob("*.safetensors") if not (target / p.name).samefile(p)]
    changing = {"vision_model.embeddings.patch_embedding.weight", "vision_model.embeddings.position_embedding.weight",
                "vision_model.embeddings.position_ids"}  # fmt: skip
    holding = {p.name for p in clip.glob("*.safetensors") if changing & set(read_header(p).entries)}
    assert set(rewritten) == holding
    assert len(linked) > len(rewritten)


def test_directory_is_replaced_and_foreign_files_are_not(clip: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    anypatch.convert(clip, target, patch_size=8)
    first = {p.name: p.read_bytes() for p in target.iterdir() if p.is_file()}
    anypatch.convert(clip, target, patch_size=32)
    assert {p.name for p in target.iterdir() if p.is_file()} == set(first)
    assert (target / "config.json").read_bytes() != first["config.json"]
    (target / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        anypatch.convert(clip, target, patch_size=8)
    assert (target / "thesis.tex").read_text() == "mine"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_directory_in_place(clip: Path, tmp_path: Path) -> None:
    (clip / "pytorch_model.bin").unlink()
    anypatch.convert(clip, tmp_path / "out", patch_size=8)
    anypatch.convert(clip, clip, patch_size=8)
    ours = {p.name: p.read_bytes() for p in clip.iterdir() if p.is_file()}
    theirs = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.is_file()}
    assert ours == theirs


@pytest.mark.parametrize("recorded", [True, False])
def test_timm_directory(tmp_path: Path, recorded: bool) -> None:
    """With and without the constructor's arguments in the configuration, as older versions of timm wrote it."""
    from timm.models import save_for_hf

    model = timm.create_model("vit_tiny_patch16_224", **{**VIT, "img_size": 64 if recorded else 224})
    save_for_hf(model, str(tmp_path / "a"), safe_serialization=True)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    if not recorded:
        config.pop("model_args", None)
        (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    anypatch.convert(tmp_path / "a", tmp_path / "b", patch_size=8, image_size=64)
    written = json.loads((tmp_path / "b" / "config.json").read_text())["model_args"]
    assert (written["patch_size"], written["img_size"]) == (8, 64)
    reference = anypatch.adapt(model, patch_size=8, image_size=64).eval()
    loaded = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval()
    pixels = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(pixels), reference(pixels), rtol=1e-5, atol=1e-5)


def test_open_clip_directory(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    from builders import CLIP

    model = open_clip.CLIP(**CLIP)
    source = tmp_path / "a"
    source.mkdir()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, source / "open_clip_model.safetensors")
    config = {"model_cfg": CLIP, "preprocess_cfg": {"size": 32, "mean": [0, 0, 0]}}
    (source / "open_clip_config.json").write_text(json.dumps(config))
    anypatch.convert(source, tmp_path / "b", patch_size=16, image_size=64)
    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'b'}").eval()
    reference = anypatch.adapt(model, patch_size=16, image_size=64).eval()
    pixels = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded.encode_image(pixels), reference.encode_image(pixels), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "b" / "open_clip_config.json").read_text())["preprocess_cfg"]["size"] == 64


def _edit_index(path: Path, edit: Any) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    edit(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("damage", ["shard", "escape", "lie", "silent", "index", "config", "cut", "nan"])
def test_damaged_directories(clip: Path, tmp_path: Path, damage: str) -> None:
    weight = "vision_model.embeddings.patch_embedding.weight"
    shard = next(p for p in clip.glob("*.safetensors") if weight in read_header(p).entries)
    if damage == "shard":
        shard.unlink()
        expected = shard.name
    elif damage == "escape":
        _edit_index(clip, lambda table: table.update({weight: "../" + shard.name}))
        expected = "outside the directory"
    elif damage == "lie":
        other = next(p.name for p in clip.glob("*.safetensors") if p != shard)
        _edit_index(clip, lambda table: table.update({weight: other}))
        expected = f"says that '{weight}' is in {other}"
    elif damage == "silent":
        unchanging = next(
            n for p in clip.glob("*.safetensors") for n in read_header(p).entries if len(read_header(p).entries) > 1
        )
        _edit_index(clip, lambda table: table.pop(unchanging))
        expected = f"does not say that '{unchanging}'"
    elif damage == "index":
        (clip / "model.safetensors.index.json").write_text('{"weight_map": 3')
        expected = r"index\.json is damaged"
    elif damage == "config":
        (clip / "config.json").write_text("[1]")
        expected = r"config\.json"
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-8])
        expected = "cut off"
    else:
        tensors = read_tensors(shard)
        tensors[weight][0, 0, 0, 0] = torch.nan
        save_file(tensors, shard)
        expected = f"{shard.name}: tensor '{weight}'"
    with pytest.raises(CheckpointError, match=expected):
        anypatch.convert(clip, tmp_path / "out", patch_size=8)
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


# -- whole or not at all -----------------------------------------------------------------------------------


def test_what_a_user_gets_wrong(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        anypatch.convert(tmp_path / "none", tmp_path / "b.safetensors", patch_size=32)
    with pytest.raises(CheckpointError, match="no directory"):
        anypatch.convert(vit, tmp_path / "none" / "b.safetensors", patch_size=32)
    with pytest.raises(CheckpointError, match=r"writes \.safetensors"):
        anypatch.convert(vit, tmp_path / "b.pth", patch_size=32)
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is a directory"):
        anypatch.convert(vit, tmp_path / "d.safetensors", patch_size=32)
    with pytest.raises(GeometryError, match="does not divide"):
        anypatch.convert(vit, tmp_path / "b.safetensors", patch_size=7)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="in no format"):
        anypatch.convert(tmp_path / "empty", tmp_path / "x", patch_size=7)
    with pytest.raises(CheckpointError, match="within one another"):
        anypatch.convert(tmp_path, tmp_path / "x" / "y", patch_size=7)
    assert not (tmp_path / "b.safetensors").exists()


def test_nan_in_what_is_resampled(tmp_path: Path) -> None:
    state = _state()
    state["head.weight"][0, 0] = torch.nan  # copied as it is
    source = tmp_path / "a.safetensors"
    save_file(state, source)
    anypatch.convert(source, tmp_path / "b.safetensors", patch_size=32)
    state["patch_embed.proj.weight"][0, 0, 0, 0] = torch.inf
    save_file(state, source)
    before = (tmp_path / "b.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"a\.safetensors: tensor 'patch_embed\.proj\.weight'"):
        anypatch.convert(source, tmp_path / "b.safetensors", patch_size=8)
    assert (tmp_path / "b.safetensors").read_bytes() == before


def _fork(work: Callable[[], None]) -> int:
    """Run ``work`` in a process of its own, that can be killed."""
    process = os.fork()
    if process:
        return process
    try:
        work()
    except CheckpointError as error:
        os._exit(3 if "cannot write" in str(error) else 4)
    except BaseException:
        os._exit(5)
    os._exit(0)


def _convert_quickly(source: Path, target: Path, patch: int) -> None:
    arch = None if source.is_dir() else TINY
    anypatch.convert(source, target, patch_size=patch, arch=arch)


@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_full_disk_leaves_what_was_there(vit: Path, clip: Path, tmp_path: Path, what: str) -> None:
    source, name = (vit, "b.safetensors") if what == "file" else (clip, "out")
    room = tmp_path / "room"
    room.mkdir()
    target = room / name
    _convert_quickly(source, target, 32)
    before = _contents(target)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30 << 10,) * 2)
        _convert_quickly(source, target, 8)

    _, status = os.waitpid(_fork(limited), 0)
    assert os.waitstatus_to_exitcode(status) == 3
    assert _contents(target) == before
    assert [p.name for p in room.iterdir()] == [name]


@pytest.mark.parametrize("whole", [False, True])
def test_what_replaces_something_is_on_the_disk_first(
    vit: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    source, target = (clip, tmp_path / "out") if whole else (vit, tmp_path / "out.safetensors")
    flushed: set[int] = set()
    real = os.fsync

    def noting(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    def failing(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "the disk is broken")
        real(descriptor)

    anypatch.convert(source, target, patch_size=32)
    monkeypatch.setattr(os, "fsync", noting)
    anypatch.convert(source, target, patch_size=8)
    files = [target] if not whole else [p for p in target.rglob("*") if p.is_file()]
    assert {p.stat().st_ino for p in files} <= flushed
    before = _contents(target)
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(CheckpointError, match="the disk is broken"):
        anypatch.convert(source, target, patch_size=32)
    assert _contents(target) == before
    assert not [p for p in tmp_path.iterdir() if atomic.MARK in p.name]


def _contents(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def _slowly(source: Path, target: Path, patch: int, ready: int) -> None:
    """Convert with a pause at every step, so that a kill can meet any of them."""

    def slow(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.004)
            result = original(*args, **kwargs)
            time.sleep(0.004)
            return result

        setattr(owner, name, call)

    for name in ("copy_range", "write_text", "copy_file"):
        slow(streaming, name)
    for name in ("_lock", "_put", "_exchange", "_settle"):
        slow(atomic, name)
    slow(os, "fsync")
    slow(Path, "replace")
    slow(shutil, "rmtree")
    original = atomic._staged
    atomic._staged = lambda *of: (os.write(ready, b"."), original(*of))[1]
    _convert_quickly(source, target, patch)


def _kill_at_many_moments(source: Path, target: Path, kills: int) -> None:
    states = []
    for patch in (8, 32):
        _convert_quickly(source, target, patch)
        states.append(_contents(target))
    reader, writer = os.pipe()

    def start(patch: int) -> int:
        process = _fork(lambda: _slowly(source, target, patch, writer))
        os.read(reader, 1)  # it is about to write
        return process

    process, began = start(8), time.monotonic()
    os.waitpid(process, 0)
    whole = time.monotonic() - began
    assert _contents(target) == states[0]
    met = 0
    for i in range(kills):
        process = start(8 if i % 2 else 32)
        time.sleep(whole * 1.05 * i / kills)
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
        now = _contents(target)
        assert now in states, f"kill {i}"
        met += os.waitstatus_to_exitcode(status) != 0
        assert len(list(target.parent.iterdir())) <= 2  # each run cleans what the one before left
    assert met  # the first kill at least met it writing
    _convert_quickly(source, target, 8)
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    assert _contents(target) == states[0]
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("kills", [pytest.param(40, marks=pytest.mark.slow), pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_kill_leaves_the_old_or_the_new(vit: Path, clip: Path, tmp_path: Path, what: str, kills: int) -> None:
    (tmp_path / "room").mkdir()
    if what == "file":
        _kill_at_many_moments(vit, tmp_path / "room" / "b.safetensors", kills)
    else:
        _kill_at_many_moments(clip, tmp_path / "room" / "out", kills)


def test_debris_is_cleaned_but_not_what_another_run_writes(vit: Path, tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    target = room / "b.safetensors"

    def stage(name: str, note: str = atomic.SAYS) -> Path:
        place = room / f".{name}{atomic.MARK}{uuid.uuid4().hex}"
        place.mkdir()
        (place / atomic.NEW).write_bytes(b"half")
        (place / atomic.NOTE).write_text(note)
        return place

    stage("b.safetensors")
    (room / f".b.safetensors{atomic.MARK}{uuid.uuid4().hex}").mkdir()  # killed before it had its note
    other, living = stage("c.safetensors"), stage("b.safetensors")
    users = [stage("b.safetensors", note="mine"), room / f".b.safetensors{atomic.MARK}notes"]
    users += [room / f".b.safetensors{atomic.MARK}{uuid.uuid4().hex}"]
    for file in users[1:]:
        file.write_text("a user's, that looks like debris")
    with (living / atomic.NOTE).open("r+b") as file:
        assert atomic._lock(file.fileno())
        anypatch.convert(vit, target, patch_size=32)
        assert {*room.iterdir()} == {target, other, living, *users}
    anypatch.convert(vit, target, patch_size=32)
    assert {*room.iterdir()} == {target, other, *users}


def test_permissions_are_kept(vit: Path, tmp_path: Path) -> None:
    target = tmp_path / "b.safetensors"
    anypatch.convert(vit, target, patch_size=32)
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~mask
    target.chmod(0o640)
    anypatch.convert(vit, target, patch_size=32)
    assert target.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("failing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_copying_without_help_of_the_system(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: bool
) -> None:
    anypatch.convert(vit, tmp_path / "a.safetensors", patch_size=32)
    if failing:

        def refuse(*_: Any, **__: Any) -> int:
            raise OSError(18, "cross-device")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    else:
        monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.setattr(streaming, "CHUNK", 1000)
    anypatch.convert(vit, tmp_path / "b.safetensors", patch_size=32)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_source_that_shrinks_while_it_is_read(vit: Path, tmp_path: Path) -> None:
    with (
        vit.open("rb") as source,
        (tmp_path / "x").open("w+b") as target,
        pytest.raises(CheckpointError, match="cut off"),
    ):
        streaming.copy_range(source, 0, target, vit.stat().st_size + 1)


@pytest.mark.slow
def test_memory_stays_small(tmp_path: Path) -> None:
    """A file of a gigabyte with a small image tower converts in a fraction of its size."""
    transformers = pytest.importorskip("transformers")
    small = {**SMALL, "num_hidden_layers": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 8 << 20, "eos_token_id": 1, "bos_token_id": 2},
        vision_config={**small, "image_size": 64, "patch_size": 16},
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path / "a")
    # VmHWM is this program's own peak; ru_maxrss would start from that of the process it was forked from
    code = (
        "import re, sys, anypatch; anypatch.convert(sys.argv[1], sys.argv[2], patch_size=8);"
        r"print(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1])"
    )
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tmp_path / "a", tmp_path / "b"], capture_output=True, check=True
    )
    assert int(said.stdout) < 900_000  # kilobytes, most of them Python and its libraries
