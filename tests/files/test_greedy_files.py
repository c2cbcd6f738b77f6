"""Some hundred bytes that ask for gigabytes or for years: refused before either is taken."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import anypatch
from anypatch import CheckpointError
from anypatch.files.reading import read
from tests.files.fuzzing import forget_peak, peak

COUNT = 1 << 20  # of bytes in the one storage of each file
ROOM = 64 << 20  # bytes that reading a file of one megabyte may take
START, MARK = b"\x80\x02", b"("


def _plain(value: Any) -> bytes:
    """The opcodes that make a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def _named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _storage(key: bytes, kind: str = "ByteStorage", count: int = COUNT) -> bytes:
    return MARK + _plain("storage") + _named("torch", kind) + key + _plain("cpu") + _plain(count) + b"tQ"


def _tensor(size: bytes, stride: bytes, storage: bytes | None = None) -> bytes:
    rebuilt = _named("torch._utils", "_rebuild_tensor_v2") + MARK + (storage or _storage(_plain("0"))) + b"K\x00"
    return rebuilt + size + stride + b"\x89}tR"


def _doubled(depth: int) -> bytes:
    """A tuple of twice the same tuple of twice the same tuple."""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))


LONG = _tensor(_plain((COUNT * 16,)), _plain((0,)))  # of one byte, sixteen million times
PAIRS = _tensor(_plain((COUNT * 4, 2)), _plain((0, 1)))
ONE = _plain((1,))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"}" + _doubled(60) + b"K\x01s", "key of more than"),
        (b"}" + MARK + _doubled(60) + b"K\x01u", "key of more than"),
        (MARK + _doubled(60) + b"K\x01d", "key of more than"),
        (_named("collections", "OrderedDict") + b"]]" + _doubled(60) + b"aK\x01aa\x85R", "key of more than"),
        (b"\x8f" + MARK + _doubled(60) + b"\x90", "key of more than"),
        (MARK + _doubled(60) + b"\x91", "key of more than"),
        (_tensor(ONE, ONE, _storage(_doubled(60))), "without a name"),
        (_named("torch", "Size") + LONG + b"\x85R", "no short list"),
        (_named("torch", "Size") + LONG + b"R", "no tuple"),
        (_named("collections", "OrderedDict") + LONG + b"\x81", "no tuple"),
        (MARK + LONG + _named("torch", "Size") + b"R", "damaged"),
        (_named("collections", "OrderedDict") + PAIRS + b"\x85R", "no pairs"),
        (_tensor(LONG, ONE), "no short list"),
        (_tensor(ONE, LONG), "no short list"),
        (MARK + LONG + b"l", "holds a list"),
        (LONG + b"K\x00K\x01s", "items for a Tensor"),
        (
            _named("collections", "OrderedDict") + b"q\x000" + b"]q\x01" + MARK + b"]q\x02K\x01aK\x01a"
            + b"h\x02" * 9999 + b"e0" + b"h\x00h\x01\x85R0" * 200 + b"N",
            "more than 1000000",
        ),
    ],
)  # fmt: skip
def test_pickles(tmp_path: Path, content: bytes, match: str, zipped: bool) -> None:
    path = tmp_path / "x.pt"
    data = START + content + b"."
    path.write_bytes(_archive({"data.pkl": data, "data/0": bytes(COUNT)}) if zipped else _legacy(data))
    before = forget_peak()
    with pytest.raises(CheckpointError, match=match):
        read(path)
    assert peak() - before < ROOM


def _archive(records: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in records.items():
            archive.writestr(f"x/{name}", data)
    return buffer.getvalue()


def _legacy(data: bytes) -> bytes:
    """As ``torch.save`` wrote before its archives: three pickles, the objects, the keys of storages, the storages."""
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(COUNT, dtype=torch.uint8)}, buffer, _use_new_zipfile_serialization=False)
    whole = buffer.getvalue()
    start = io.BytesIO(whole)
    for _ in range(3):
        pickle.load(start)
    return whole[: start.tell()] + data + pickle.dumps(["0"], 2) + struct.pack("<Q", COUNT) + bytes(COUNT)


def test_what_training_scripts_do_write_is_read(tmp_path: Path) -> None:
    """Keys that are no text, sets, ordered tables of pairs: not wanted, and not in the way."""
    state = {"patch_embed.proj.weight": torch.ones(4, 3, 2, 2)}
    ordered = OrderedDict([("a", 1)])
    torch.save(
        {"model": state, "seen": {("a", (1, 2.5)), 3}, "more": {(1, 2): "x", 4: ordered, None: 1}}, tmp_path / "x"
    )
    assert torch.equal(read(tmp_path / "x").tensors["patch_embed.proj.weight"], state["patch_embed.proj.weight"])
    pairs = _named("collections", "OrderedDict") + b"]]" + _plain("x") + b"a" + _tensor(ONE, ONE) + b"aa\x85R."
    (tmp_path / "two").write_bytes(_archive({"data.pkl": START + pairs, "data/0": bytes(COUNT)}))
    assert read(tmp_path / "two").tensors["x"].tolist() == [0]


def test_histories_of_numbers_are_no_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million numbers of NumPy's are a long training; a range has another name in torch's protocol."""
    monkeypatch.setattr("anypatch.files.pickles.MAX_CALLS", 100)
    state = {"patch_embed.proj.weight": torch.ones(4, 3, 2, 2)}
    history = [np.float64(i) for i in range(200)]
    torch.save({"losses": history, "levels": range(4), "state_dict": state}, tmp_path / "x")
    assert torch.equal(read(tmp_path / "x").tensors["patch_embed.proj.weight"], state["patch_embed.proj.weight"])


@pytest.mark.parametrize("order", [b"little", b"big"])
def test_one_record_under_many_names(tmp_path: Path, order: bytes) -> None:
    """Where bytes have to be copied, to another order or because they lie crooked, each name would be a copy."""
    names, size = 300, COUNT
    table = b"".join(
        _plain(f"t{i}") + _tensor(_plain((size // 4,)), ONE, _storage(_plain(str(i)), "FloatStorage", size // 4))
        for i in range(names)
    )
    data = io.BytesIO()

    def record(name: bytes, content: bytes) -> tuple[bytes, int, bytes]:
        start = data.tell()
        about = struct.pack("<IIIHH", zlib.crc32(content), len(content), len(content), len(name), 0)
        data.write(b"PK\3\4" + struct.pack("<5H", 20, 0, 0, 0, 33) + about + name + content)
        return about, start, name

    entries = [record(b"x/data.pkl", START + b"}(" + table + b"u."), record(b"x/byteorder", order)]
    about, start, _ = record(b"x/data/0", bytes(size))
    entries += [(struct.pack("<IIIHH", 0, size, size, len(name), 0), start, name) for i in range(names)
                if (name := b"x/data/%d" % i)]  # fmt: skip
    first = data.tell()
    for about, start, name in entries:
        data.write(
            b"PK\1\2" + struct.pack("<6H", 20, 20, 0, 0, 0, 33) + about + struct.pack("<3H2I", 0, 0, 0, 0, start)
        )
        data.write(name)
    data.write(b"PK\5\6" + struct.pack("<4H2IH", 0, 0, len(entries), len(entries), data.tell() - first, first, 0))
    (tmp_path / "x.pt").write_bytes(data.getvalue())
    before = forget_peak()
    with pytest.raises(CheckpointError, match="its records would take"):
        read(tmp_path / "x.pt")
    assert peak() - before < ROOM


@pytest.mark.siblings(fast=1)
@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_arrays_that_unpack_to_more_than_the_archive_says(tmp_path: Path, packing: int) -> None:
    head, said, packed = io.BytesIO(), 100_000, 96 << 20
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (said,)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive, archive.open("x.npy", "w") as file:
        file.write(head.getvalue())
        for _ in range(packed >> 24):
            file.write(bytes(1 << 24))
    raw = bytearray(buffer.getvalue())
    listed = raw.rfind(b"PK\1\2")
    raw[listed + 24 : listed + 28] = struct.pack("<I", len(head.getvalue()) + said)
    (tmp_path / "x.npz").write_bytes(raw)
    before = forget_peak()
    with pytest.raises(CheckpointError, match="array 'x' is"):
        read(tmp_path / "x.npz")
    assert peak() - before < ROOM


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pth", "last.pth.tar"])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_library_would_unpickle_itself(tmp_path: Path, name: str, zipped: bool) -> None:
    """timm takes any file of weights where it finds none by the names it prefers, and its unpickler takes the tuple."""
    model = timm.create_model("test_vit", img_size=32, patch_size=8)
    folder = tmp_path / "vit"
    anypatch.save(model, folder)
    (folder / "model.safetensors").unlink()
    data = START + b"}" + _doubled(60) + b"K\x01s."
    (folder / name).write_bytes(_archive({"data.pkl": data}) if zipped else _legacy(data))
    with pytest.raises(CheckpointError, match=f"{name} asks for more than a file of weights does"):
        anypatch.load(folder)
    (folder / name).unlink()
    torch.save(model.state_dict(), folder / name, _use_new_zipfile_serialization=zipped)
    assert anypatch.geometry(anypatch.load(folder)).patch_size == (8, 8)


@pytest.mark.parametrize("pretrained", [True, False])
def test_an_archive_that_cannot_be_looked_into_is_not_left_to_a_library(tmp_path: Path, pretrained: bool) -> None:
    """A record's name that is no UTF-8, though the archive says so, was a raw error; torch does not read the name."""
    anypatch.save(timm.create_model("test_vit", img_size=32, patch_size=8), tmp_path / "vit")
    (tmp_path / "vit" / "model.safetensors").unlink()
    named = _archive({"data.pkl": START + b"}" + _doubled(60) + b"K\x01s.", "n\u00e9": b""})
    (tmp_path / "vit" / "pytorch_model.bin").write_bytes(named.replace("n\u00e9".encode(), b"n\xe9x"))
    with pytest.raises(CheckpointError, match="bin is damaged: UnicodeDecodeError"):
        anypatch.load(tmp_path / "vit", pretrained=pretrained)


@pytest.mark.parametrize("key", ["num_classes", "num_labels"])
def test_names_for_classes_that_no_weights_have(tmp_path: Path, key: str) -> None:
    """transformers makes a name for each before any weight is looked at: 16 GB for this configuration."""
    transformers = pytest.importorskip("transformers")
    wrapped = transformers.TimmWrapperModel(transformers.TimmWrapperConfig(architecture="test_vit"))
    wrapped.save_pretrained(tmp_path / "vit")
    config = tmp_path / "vit" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: 1 << 31}))
    before = forget_peak()
    for pretrained in (True, False):
        with pytest.raises(CheckpointError, match=f"{key} is 2147483648, and no model has more than"):
            anypatch.load(tmp_path / "vit", pretrained=pretrained)
    assert peak() - before < ROOM
