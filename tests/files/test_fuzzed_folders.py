"""Directories that somebody changed: each is loaded and converted, or is one error of ours, in bounded memory."""

from __future__ import annotations

import importlib
import io
import json
import random
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

import anypatch
from anypatch import AnypatchError
from builders import transformers_model
from tests.files.fuzzing import PEAK, forget_peak, in_a_process, mutate, mutate_json, peak, text_of, watch

Files = dict[str, bytes]
ALLOWED = 128 << 20  # bytes that a configuration may ask for beside its weights


def _read(folder: Path) -> Files:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _saved(folder: Path, model: nn.Module, **extras: Any) -> Files:
    anypatch.save(model, folder, **extras)
    return _read(folder)


def _timm(place: Path) -> dict[str, Files]:
    files = _saved(place / "timm", timm.create_model("test_vit", img_size=32, patch_size=8))
    state = io.BytesIO()
    torch.save(timm.create_model("test_vit", img_size=32, patch_size=8).state_dict(), state)
    return {"timm": files, "timm bin": {"config.json": files["config.json"], "pytorch_model.bin": state.getvalue()}}


def _transformers(place: Path) -> dict[str, Files]:
    transformers = pytest.importorskip("transformers")
    model = transformers_model(num_hidden_layers=2)
    vit = _saved(place / "vit", model, processor=transformers.ViTImageProcessor(size={"height": 32, "width": 32}))
    names = sorted(model.state_dict())
    halves = [{n: model.state_dict()[n] for n in part} for part in (names[::2], names[1::2])]
    shards = {f"-0000{i + 1}-of-00002": half for i, half in enumerate(halves)}
    placed = {n: i for i, half in shards.items() for n in half}
    total = {"total_size": sum(t.nbytes for t in model.state_dict().values())}
    sharded: Files = {"config.json": vit["config.json"]}
    pickled = dict(sharded)
    for i, half in shards.items():
        sharded[f"model{i}.safetensors"] = safetensors_bytes(half, {"format": "pt"})
        state = io.BytesIO()
        torch.save(half, state)
        pickled[f"pytorch_model{i}.bin"] = state.getvalue()
    for files, name, suffix in ((sharded, "model", ".safetensors"), (pickled, "pytorch_model", ".bin")):
        index = {"metadata": total, "weight_map": {n: f"{name}{i}{suffix}" for n, i in placed.items()}}
        files[f"{name}{suffix}.index.json"] = json.dumps(index).encode()
    wrapped = transformers.TimmWrapperModel(transformers.TimmWrapperConfig(architecture="test_vit"))
    wrapped.save_pretrained(place / "wrapped")
    return {"vit": vit, "shards": sharded, "pickled shards": pickled, "timm wrapper": _read(place / "wrapped")}


def _clip(place: Path) -> dict[str, Files]:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2}
    text = {"context_length": 8, "vocab_size": 30, "width": 32, "heads": 2, "layers": 1}
    return {"open_clip": _saved(place / "clip", open_clip.CLIP(16, vision, text))}


def _torchvision(place: Path) -> dict[str, Files]:
    torchvision = pytest.importorskip("torchvision")
    return {"torchvision": _saved(place / "tv", torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32))}


def _peft(place: Path) -> dict[str, Files]:
    """A model and an adapter for it in one directory."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = transformers.ViTModel.from_pretrained(place / "vit")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(place / "peft")
    return {"peft": {**_read(place / "vit"), **_read(place / "peft")}}


def _seeds(place: Path) -> dict[str, Files]:
    """Small good directories of every format."""
    found: dict[str, Files] = {}
    for make in (_timm, _transformers, _clip, _torchvision, _peft):
        found |= make(place)
    return found


def _changed(files: Files, blobs: list[bytes], chance: random.Random) -> Files:
    """A directory with one or two of its files changed, left out, or exchanged for another."""
    result = dict(files)
    for _ in range(chance.choice((1, 1, 1, 2))):
        texts = [name for name in result if name.endswith(".json")]
        name = chance.choice(texts) if texts and chance.random() < 0.75 else chance.choice(sorted(result))
        how = chance.random()
        if how < 0.03 and len(result) > 1:
            del result[name]
        elif how < 0.06:
            result[name] = result[chance.choice(sorted(result))]
        elif name.endswith(".json"):
            try:
                result[name] = text_of(mutate_json(json.loads(result[name]), chance), chance)
            except ValueError:
                result[name] = mutate(result[name], blobs, chance)
        else:
            result[name] = mutate(result[name], blobs, chance)
    return result


def _write(folder: Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _verbs(folder: Path, out: Path) -> list[tuple[str, Callable[[], Any]]]:
    weights = next(iter(sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])), folder / "model.safetensors")
    return [
        ("load", lambda: anypatch.load(folder)),
        ("load at 16", lambda: anypatch.load(folder, patch_size=16)),
        ("build", lambda: anypatch.load(folder, pretrained=False)),
        ("load the file", lambda: anypatch.load(weights)),
        ("convert", lambda: anypatch.convert(folder, out, patch_size=16)),
    ]


def _try(call: Callable[[], Any]) -> str | None:
    try:
        with anypatch.memory_limit(ALLOWED):
            call()
    except AnypatchError as error:
        return None if str(error) else "an error without words"
    except BaseException as error:
        import traceback

        return "".join(traceback.format_exception(error))[-3000:]
    return None


def fuzz(place: Path, count: int, seed: int, only: str = "") -> str | None:
    """Load and convert ``count`` changed directories; what went wrong, if anything did."""
    seeds = {name: files for name, files in _seeds(place).items() if only in name}
    blobs = [data for files in seeds.values() for data in files.values()]
    chance, events = random.Random(seed), list[str]()
    folder, out = place / "x", place / "out"
    tempfile.tempdir = str(place)  # of this process, which ends with the run
    importlib.import_module("torch.nested._internal.ops")
    for files in seeds.values():  # import whatever loading imports
        _write(folder, files)
        for _, call in _verbs(folder, out):
            _try(call)
            shutil.rmtree(out, ignore_errors=True)
    libraries = (str(place), "/proc/", "/sys/", "/dev/", "/etc/", "/usr/")
    watch(events, lambda path: path.startswith(libraries) and not path.endswith("passwd"), may_write=True)

    def late(*_: Any) -> None:
        raise TimeoutError("still busy after 30 seconds")

    signal.signal(signal.SIGALRM, late)
    for i in range(count):
        name = chance.choice(sorted(seeds))
        _write(folder, _changed(seeds[name], blobs, chance))
        (folder / "evil.py").write_text(f"open({str(place / 'ran')!r}, 'w')\n")
        verb, call = chance.choice(_verbs(folder, out))
        del events[:]
        before = forget_peak()
        signal.alarm(30)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = _try(call)
        signal.alarm(0)
        more = peak() - before
        where = f"input {i}, {verb} of {name}"
        if said is not None:
            return f"{where}: {said}"
        if more > PEAK:
            return f"{where}: {more} bytes of memory"
        if events or (place / "ran").exists():
            return f"{where}: {events[:3]}"
        shutil.rmtree(out, ignore_errors=True)
    return None


@pytest.mark.slow
def test_changed_folders(tmp_path: Path) -> None:
    assert in_a_process(lambda: fuzz(tmp_path, 300, seed=0), tmp_path) is None


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(8))
def test_many_changed_folders(tmp_path: Path, part: int) -> None:
    began = time.monotonic()
    assert in_a_process(lambda: fuzz(tmp_path, 2_000, seed=1000 + part), tmp_path) is None
    print(f"2000 directories in {time.monotonic() - began:.0f} s")
