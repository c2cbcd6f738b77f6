"""Nothing in a file is executed, and every damaged file is one clear CheckpointError."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import json
import lzma
import os
import pickle
import random
import signal
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes

from anypatch import CheckpointError
from anypatch.files import header as headers
from anypatch.files.header import read_header
from anypatch.files.pickles import rebuild
from anypatch.files.reading import read
from anypatch.files.tensors import tensor_bytes
from tests.files.fuzzing import PEAK, forget_peak, in_a_process, mutate, peak, watch

TENSORS = {
    "patch_embed.proj.weight": torch.arange(48.0).reshape(4, 3, 2, 2),
    "b": torch.ones(5, dtype=torch.float16),
    "n": torch.tensor(3),
}
PAYLOAD = "touched"  # what malicious files try to create


class _Evil:
    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.args


def _evil(place: Path) -> list[_Evil]:
    mark = place / PAYLOAD
    return [
        _Evil(os.system, f"touch {mark}"),
        _Evil(exec, f"open({str(mark)!r}, 'w')"),
        _Evil(eval, f"open({str(mark)!r}, 'w')"),
        _Evil(open, str(mark), "w"),
        _Evil(getattr, "text", "upper"),
    ]


def _torch(value: Any, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _script() -> bytes:
    buffer = io.BytesIO()
    module = torch.nn.Linear(3, 2).half()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


def _npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _replaced(archive: bytes, record: str, data: bytes) -> bytes:
    """A zip archive with one record exchanged, others stored as they were."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, data if info.filename.endswith(record) else old.read(info))
    return buffer.getvalue()


def _seeds(place: Path) -> list[bytes]:
    """Small good files of every format, and malicious ones."""
    arrays = {"embedding/kernel": np.ones((2, 2, 3, 4), "f4"), "x": np.asfortranarray(np.ones((2, 3)))}
    good = [
        safetensors_bytes(TENSORS, metadata={"format": "pt"}),
        _torch(TENSORS),
        _torch({"model": {f"module.{k}": v for k, v in TENSORS.items()}, "epoch": 1}),
        _torch(TENSORS, zipped=False),
        _script(),
        _npz(**arrays),
    ]
    bad = []
    for evil in _evil(place):
        bad += [_torch({"state_dict": TENSORS, "x": evil}), _torch({"x": evil, **TENSORS}, zipped=False)]
        bad.append(_replaced(_script(), "data.pkl", pickle.dumps(evil, protocol=2)))
        bad.append(_npz(x=np.array([evil], dtype=object)))
    return good + bad


# -- malicious files ---------------------------------------------------------------------------------------


def test_good_seeds_are_good(tmp_path: Path) -> None:
    kinds = []
    for data in _seeds(tmp_path)[:6]:
        path = tmp_path / "x"
        path.write_bytes(data)
        checkpoint = read(path)
        kinds.append(checkpoint.kind)
        if checkpoint.kind in ("safetensors", "torch"):
            assert all(torch.equal(checkpoint.tensors[k], v) for k, v in TENSORS.items())
        assert checkpoint.tensors
    assert kinds == ["safetensors", "torch", "torch", "torch", "torchscript", "npz"]


def test_malicious_files_run_nothing(tmp_path: Path) -> None:
    for i, data in enumerate(_seeds(tmp_path)[6:]):
        path = tmp_path / f"{i}.pt"
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"{i}\.pt"):
            read(path)
        assert not (tmp_path / PAYLOAD).exists()
    good, evil = tmp_path / "good.pt", _evil(tmp_path)[0]
    pickle.loads(pickle.dumps(evil))  # the payload does work
    assert (tmp_path / PAYLOAD).exists()
    good.write_bytes(_torch({"state_dict": TENSORS, "x": evil}))
    with pytest.raises(CheckpointError, match=r"posix\.system|nt\.system"):  # the message says what it found
        read(good)


def test_zip_bomb(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (16 << 20,)})
        archive.writestr("x.npy", header.getvalue() + bytes(64 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="unpack to"):
        read(path)


def test_compressed_torch_archive(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    data = _torch(TENSORS)
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(CheckpointError, match="not stored"):
        read(path)


# -- safetensors headers -----------------------------------------------------------------------------------


def _file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def _entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": _entry(offsets=(0, 4))}, 8, "has 4 bytes, but F32 of shape"),
        ({"a": _entry(offsets=(0, 8))}, 4, "'a' ends at byte 8 of 4"),
        ({"a": _entry(offsets=(4, 12))}, 12, "'a' leaves a gap"),
        ({"a": _entry(), "b": _entry(offsets=(4, 12))}, 12, "'b' overlaps"),
        ({"a": _entry()}, 12, "4 bytes that belong to no tensor"),
        ({"a": _entry(dtype="F31")}, 8, "'a' has an unknown type"),
        ({"a": _entry(shape=(-2,))}, 8, "'a' has an impossible shape"),
        ({"a": _entry(shape=(True, 2))}, 8, "'a' has an impossible shape"),
        ({"a": _entry(shape=(2.0,))}, 8, "'a' has an impossible shape"),
        ({"a": _entry(shape=(1 << 62, 1 << 62))}, 8, "'a' has an impossible shape"),
        ({"a": _entry(shape=(1,) * 65, offsets=(0, 4))}, 4, "65 dimensions"),
        ({"a": _entry(offsets=(8, 0))}, 8, "'a' has -8 bytes"),
        ({"a": _entry(offsets=(-8, 0))}, 8, "'a' has impossible offsets"),
        ({"a": {"dtype": "F32"}}, 0, "'a' is not described"),
        ({"a": 3}, 0, "'a' is not described"),
        ({"__metadata__": {"x": 3}}, 0, "__metadata__"),
        (b'{"a":1,"a":2}', 0, "twice"),
        (b"[1]", 0, "neither safetensors"),
        (b"{", 0, "damaged header"),
        (b'{"a":' + b"[" * 100_000, 0, "damaged header"),
        (b"{\xff}", 0, "damaged header"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: Any, data: int, message: str) -> None:
    path = _file(tmp_path / "x.safetensors", header, bytes(data))
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert message in str(caught.value)
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [1 << 62, headers.MAX_HEADER + 1, 1000])
def test_absurd_header_lengths(tmp_path: Path, length: int) -> None:
    path = _file(tmp_path / "x.safetensors", {"a": _entry()}, bytes(8), length)
    with pytest.raises(CheckpointError, match=f"header of {length} bytes"):
        read(path)


def test_other_files(tmp_path: Path) -> None:
    for content, message in ((b"", "is empty"), (b"hello there, no weights", "no checkpoint"),
                             (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
                             (gzip.compress(b"x"), "by gzip: unpack"), (lzma.compress(b"x"), "by xz"),
                             (bytes(257) + b"ustar", "tar archive"), (b"<!DOCTYPE html>", "web page")):  # fmt: skip
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(_torch([1, 2]))
    with pytest.raises(CheckpointError, match="holds a list"):
        read(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(_torch({"epoch": 3}))
    with pytest.raises(CheckpointError, match="no tensors: its keys are epoch"):
        read(tmp_path / "x.pt")


def test_only_plain_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for odd in (torch.eye(3).to_sparse(), torch.empty(2, device="meta")):
        path.write_bytes(_torch({"odd": odd}))
        with pytest.raises(CheckpointError, match="'odd' is no plain tensor"):
            read(path)


def test_python_objects_in_arrays_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(_npz(a=np.ones(2), x=np.array([{}], dtype=object)))
    with pytest.raises(CheckpointError, match=r"array 'x' is damaged: .*Python objects"):
        read(path)


@pytest.mark.parametrize(
    ("size", "stride", "offset"), [((9,), (1,), 0), ((2,), (8,), 0), ((2,), (1,), 7), ((-1,), (1,), 0)]
)
def test_scripted_tensors_stay_within_their_storage(size: Any, stride: Any, offset: int) -> None:
    record = torch.arange(8.0)
    assert rebuild(record, 1, (2, 2), (4, 1)).tolist() == [[1, 2], [5, 6]]
    with pytest.raises(pickle.UnpicklingError):
        rebuild(record, offset, size, stride)


def test_unaligned_tensors(tmp_path: Path) -> None:
    header = {"a": _entry("U8", (3,), (0, 3)), "b": _entry("F32", (2,), (3, 11))}
    values = np.array([1.5, -2.5], "<f4").tobytes()
    path = _file(tmp_path / "x.safetensors", header, b"abc" + values)
    tensor = read(path).tensors["b"]
    assert tensor.tolist() == [1.5, -2.5]
    assert tensor.data_ptr() % 4 == 0


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4),
    max_leaves=12,
), st.binary(max_size=32))  # fmt: skip
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_header(tmp_path: Path, header: Any, data: bytes) -> None:
    path = _file(tmp_path / "x.safetensors", header, data)
    with contextlib.suppress(CheckpointError):
        for tensor in read(path).tensors.values():
            tensor.clone()


@given(st.dictionaries(st.text(max_size=6), st.tuples(
    st.sampled_from(sorted(headers.DTYPES)), st.lists(st.integers(0, 3), max_size=3)), max_size=5))  # fmt: skip
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_good_file(tmp_path: Path, described: dict[str, tuple[str, list[int]]]) -> None:
    described.pop("__metadata__", None)
    table, position = {}, 0
    for name, (dtype, shape) in described.items():
        size = int(np.prod(shape)) * headers.BITS[dtype] // 8
        table[name] = _entry(dtype, shape, (position, position + size))
        position += size
    data = random.Random(0).randbytes(position)
    path = _file(tmp_path / "x.safetensors", table, data)
    if not table:
        return
    checkpoint = read(path)
    for name, entry in read_header(path).entries.items():
        tensor = checkpoint.tensors[name]
        assert (list(tensor.shape), tensor.dtype) == (described[name][1], headers.DTYPES[described[name][0]])
        assert tensor_bytes(tensor) == data[entry.start : entry.end]


# -- mutation ----------------------------------------------------------------------------------------------


def _fuzz(place: Path, count: int, seed: int) -> str | None:
    """Read ``count`` mutated files; what went wrong, if anything did."""
    seeds = _seeds(place)
    chance = random.Random(seed)
    path = place / "x"
    events: list[str] = []
    importlib.import_module("torch.nested._internal.ops")  # which torch imports when a file names it
    repr(torch.zeros(1))  # torch imports more to show a tensor in an error message
    for data in seeds[:6]:  # import whatever else reading imports
        path.write_bytes(data)
        read(path)
    descriptor = os.open(path, os.O_RDWR)
    watch(events)

    def late(*_: Any) -> None:
        raise TimeoutError("still reading after 20 seconds")

    signal.signal(signal.SIGALRM, late)
    for i in range(count):
        data = mutate(chance.choice(seeds), seeds, chance)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, data, 0)
        signal.alarm(20)
        before = forget_peak()
        try:
            for tensor in read(path).tensors.values():
                if tensor.numel() < 1 << 20:
                    tensor.clone()
        except CheckpointError as error:
            if str(path) not in str(error):
                return f"input {i}: the message does not name the file: {error}"
        except BaseException as error:
            return f"input {i}: {type(error).__name__}: {error}"
        signal.alarm(0)
        if peak() - before > PEAK:
            return f"input {i}: {peak() - before} bytes of memory"
        if events:
            return f"input {i}: executed {events[0]}"
        if (place / PAYLOAD).exists():
            return f"input {i}: a payload ran"
    return None


@pytest.fixture
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("_quiet")
def test_mutated_files(tmp_path: Path) -> None:
    assert in_a_process(lambda: _fuzz(tmp_path, 1500, seed=0), tmp_path) is None


@pytest.mark.fuzz
@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("part", range(8))
def test_a_million_mutated_files(tmp_path: Path, part: int) -> None:
    began = time.monotonic()
    assert in_a_process(lambda: _fuzz(tmp_path, 125_000, seed=1000 + part), tmp_path) is None
    print(f"125000 inputs in {time.monotonic() - began:.0f} s")
