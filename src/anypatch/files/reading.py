"""Read checkpoint files without trusting them: nothing in a file is executed, and every size is verified."""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from anypatch.errors import CheckpointError

MAX_HEADER = 100 << 20  # bytes of a safetensors header; the format's own limit
MAX_INFLATION = 64  # a compressed archive may not unpack to more than this many times its size (plus a little)
MAX_DIMENSIONS = 64
LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

# Bits per element of every type that safetensors names, and torch's type where torch has one.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16", "U32": "uint32", "I32": "int32",
    "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, ours) for name, ours in _TORCH_NAMES.items() if hasattr(torch, ours)
}
TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: where its bytes are, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The verified header of a safetensors file; ``entries`` are in the order of their bytes."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int
    file_size: int


@dataclass
class Checkpoint:
    """What a file holds.

    Attributes:
        path: the file.
        tensors: by name, wrappers around the state dict taken off.
        metadata: of a safetensors file.
        kind: ``"safetensors"``, ``"torch"``, ``"torchscript"`` or ``"npz"``.
        dropped: names that unwrapping left behind, such as a DINO projection head.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    kind: str = "torch"
    dropped: list[str] = field(default_factory=list)


def read(path: str | Path) -> Checkpoint:
    """Read a checkpoint of any of the formats, recognised by its content.

    Raises:
        CheckpointError: the file is missing, damaged, of no known format, or would have to run code.
    """
    path = Path(path)
    try:
        kind = sniff(path)
        if kind == "safetensors":
            header = read_header(path)
            return Checkpoint(path, map_tensors(header), header.metadata, kind)
        if kind == "npz":
            return Checkpoint(path, _read_npz(path), kind=kind)
        raw = _read_torchscript(path) if kind == "torchscript" else _read_torch(path, kind)
        tensors, dropped = unwrap(raw, path)
        return Checkpoint(path, tensors, kind="torch" if kind == "legacy" else kind, dropped=dropped)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except MemoryError as error:
        raise CheckpointError(f"{path} asks for more memory than there is: it is damaged") from error
    except RecursionError as error:
        raise CheckpointError(f"{path} is damaged: nested too deeply") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}") from error


def sniff(path: Path) -> str:
    """The format of a file: ``safetensors``, ``npz``, ``torch``, ``torchscript`` or ``legacy``."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory, not a checkpoint file")
    with path.open("rb") as file:
        start = file.read(32)
    if start[:4] == b"PK\x03\x04":
        return _sniff_zip(path)
    if start[:1] == b"\x80" and start[2 : 2 + len(LEGACY_MAGIC)] == LEGACY_MAGIC:
        return "legacy"
    if len(start) > 8 and start[8:9] == b"{":
        return "safetensors"
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights themselves: fetch them with git lfs pull")
    raise CheckpointError(f"{path} is no checkpoint: neither safetensors, nor torch.save, nor .npz")


def _sniff_zip(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(n.endswith("/data.pkl") or n == "data.pkl" for n in names):
        return "torchscript" if any(n.endswith("constants.pkl") for n in names) else "torch"
    if names and all(n.endswith(".npy") for n in names):
        return "npz"
    raise CheckpointError(f"{path} is a zip archive, but holds neither a torch checkpoint nor NumPy arrays")


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


# -- safetensors -------------------------------------------------------------------------------------------


def read_header(path: Path) -> Header:
    """Read and verify the header of a safetensors file.

    Every tensor's bytes must be as many as its shape and type say, lie inside the file, and follow one another
    without a gap or an overlap.

    Raises:
        CheckpointError: anything else, naming the tensor.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path} is cut off: {size} bytes hold no header")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER or length > size - 8:
                raise CheckpointError(f"{path} claims a header of {length} bytes in a file of {size}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} has a damaged header: it is no table of tensors")
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path} has a damaged header: __metadata__ must map names to text")
    entries = {name: _entry(path, name, value) for name, value in content.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    _require_seamless(path, ordered, size - 8 - length)
    return Header(path, ordered, metadata, 8 + length, size)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _entry(path: Path, name: str, value: Any) -> Entry:
    def bad(why: str) -> NoReturn:
        raise CheckpointError(f"{path}: tensor {name[:200]!r} {why}")

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        bad("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        bad(f"has an unknown type {str(dtype)[:50]!r}")
    if not isinstance(shape, list) or not all(type(s) is int and 0 <= s < 1 << 48 for s in shape):
        bad(f"has an impossible shape {str(shape)[:100]}")
    if len(shape) > MAX_DIMENSIONS:
        bad(f"has {len(shape)} dimensions")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int and o >= 0 for o in offsets):
        bad("has impossible offsets")
    start, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or end - start != bits // 8:
        bad(f"has {end - start} bytes, but {dtype} of shape {tuple(shape)} takes {bits / 8:g}")
    return Entry(dtype, tuple(shape), start, end)


def _require_seamless(path: Path, entries: Mapping[str, Entry], available: int) -> None:
    position = 0
    for name, entry in entries.items():
        if entry.end > available:
            raise CheckpointError(f"{path} is cut off: tensor {name[:200]!r} ends at byte {entry.end} of {available}")
        if entry.start != position:
            what = "overlaps the one before it" if entry.start < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {name[:200]!r} {what}")
        position = entry.end
    if position != available:
        raise CheckpointError(f"{path} has {available - position} bytes that belong to no tensor")


def map_tensors(header: Header) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory: bytes are read when they are first used.

    Writing to a tensor never changes the file.
    """
    if header.file_size == header.data_start:
        whole, base = torch.UntypedStorage(0), 0
    else:
        whole = torch.UntypedStorage.from_file(str(header.path), False, header.file_size)  # type: ignore[assignment]
        base = header.data_start
    return {name: _view(header.path, name, entry, whole, base) for name, entry in header.entries.items()}


def _view(path: Path, name: str, entry: Entry, whole: torch.UntypedStorage, base: int) -> Tensor:
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name!r} is of type {entry.dtype}, which this torch does not have")
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    part = whole[base + entry.start : base + entry.end]
    if (base + entry.start) % dtype.itemsize:
        part = part.clone()
    flat = torch.empty(0, dtype=dtype)
    return flat.set_(part, 0, entry.shape, _strides(entry.shape))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for side in reversed(shape):
        strides.append(step)
        step *= max(side, 1)
    return tuple(reversed(strides))


# -- torch.save --------------------------------------------------------------------------------------------


class _Plain:
    """A file without a descriptor, so that ``torch.load`` takes no path that unpacks archives to disk."""

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read
        self.readline = file.readline
        self.readinto = getattr(file, "readinto")  # noqa: B009
        self.seek = file.seek
        self.tell = file.tell


def _read_torch(path: Path, kind: str) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            if kind == "legacy":
                with path.open("rb") as file:
                    return torch.load(_Plain(file), map_location="cpu", weights_only=True)  # type: ignore[arg-type]
            _require_stored(path)
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        unsafe = _unsafe_names(path)
        if unsafe:
            raise CheckpointError(
                f"{path} holds Python objects besides tensors ({', '.join(unsafe)}); loading them could run code, "
                f"so it is refused: save the model's state_dict alone, best as .safetensors"
            ) from error
        raise


def _unsafe_names(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))[:5]
    except Exception:
        return []


def _require_stored(path: Path) -> None:
    """torch stores its records as they are; a compressed one would be a way to fill the memory.

    A script's code may be compressed, and is not read.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if "/code/" in info.filename:
                continue
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > size or info.header_offset > size:
                raise CheckpointError(f"{path}: record {info.filename[:200]!r} is not stored as torch stores records")


# -- OpenAI's TorchScript archives -------------------------------------------------------------------------


class _Inert:
    """Stands for a scripted class: keeps its attributes, runs nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({k: v for k, v in state.items() if isinstance(k, str)})


class _Storage:
    """A named type of storage; only its element type matters."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def _rebuild(record: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A tensor over a record, with every bound verified."""
    if not isinstance(record, Tensor):
        raise pickle.UnpicklingError("a tensor without storage")
    numbers = (offset, *size, *stride)
    if not all(type(n) is int and n >= 0 for n in numbers) or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor of impossible shape")
    last = offset + sum((s - 1) * step for s, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= record.numel():
        raise pickle.UnpicklingError("a tensor that reaches beyond its storage")
    return record.as_strided(size, stride, offset) if math.prod(size) else record.new_empty(size)


class _WeightsOnly(pickle._Unpickler):
    """Unpickles tensors, containers and inert stand-ins for scripted classes, nothing else."""

    def __init__(self, file: BinaryIO, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self._archive, self._root = archive, root
        self._records: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Inert
        if module == "torch" and name.endswith("Storage"):
            kind = {"HalfStorage": torch.float16, "FloatStorage": torch.float32, "DoubleStorage": torch.float64,
                    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
                    "ByteStorage": torch.uint8, "BoolStorage": torch.bool}.get(name)  # fmt: skip
            if kind is not None:
                return _Storage(kind)
        allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_doublelist"): list,
            ("torch.jit._pickle", "build_boollist"): list,
            ("torch.jit._pickle", "build_tensorlist"): list,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _tag: value,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 3 or pid[0] != "storage" or not isinstance(pid[1], _Storage):
            raise pickle.UnpicklingError("an unknown reference")
        key = str(pid[2])
        if key not in self._records:
            data = bytearray(self._archive.read(f"{self._root}data/{key}"))
            dtype = pid[1].dtype
            if len(data) % dtype.itemsize:
                raise pickle.UnpicklingError(f"record {key[:50]} is cut off")
            empty = torch.empty(0, dtype=dtype)
            self._records[key] = torch.frombuffer(data, dtype=dtype) if data else empty
        return self._records[key]


def _read_torchscript(path: Path) -> Any:
    """The parameters and buffers of a TorchScript archive; its code is not looked at."""
    _require_stored(path)
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        with archive.open(name) as file:
            root = _WeightsOnly(file, archive, name[: -len("data.pkl")]).load()  # type: ignore[arg-type]
    tensors: dict[str, Tensor] = {}
    stack: list[tuple[str, Any]] = [("", root)]
    seen: set[int] = set()
    while stack:
        prefix, value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        fields = vars(value) if isinstance(value, _Inert) else value if isinstance(value, dict) else {}
        for key, item in fields.items():
            if isinstance(item, Tensor):
                tensors[prefix + key] = item
            elif isinstance(item, (_Inert, dict)):
                stack.append((f"{prefix}{key}.", item))
    return tensors


# -- NumPy -------------------------------------------------------------------------------------------------


def _read_npz(path: Path) -> dict[str, Tensor]:
    import numpy as np

    size = path.stat().st_size
    tensors = {}
    with zipfile.ZipFile(path) as archive:
        total = sum(info.file_size for info in archive.infolist())
        if total > MAX_INFLATION * size + (16 << 20):
            raise CheckpointError(f"{path} would unpack to {total} bytes from {size}: it is damaged or malicious")
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            with archive.open(info) as file:
                try:
                    array = _read_npy(file, info.file_size)
                except (ValueError, EOFError, zlib.error, zipfile.BadZipFile, KeyError, TypeError) as error:
                    raise CheckpointError(f"{path}: array {name[:200]!r} is damaged: {_first_line(error)}") from error
            if array.dtype.kind == "V" and array.dtype.itemsize == 2:
                tensors[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            elif array.dtype.kind in "fiub":
                native = array.astype(array.dtype.newbyteorder("="), copy=False)
                tensors[name] = torch.from_numpy(native)
    return tensors


def _read_npy(file: Any, size: int) -> Any:
    """One array, after its header was held against the bytes there are."""
    import numpy as np

    formats = np.lib.format
    version = formats.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"unknown version {version}")
    reader = formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
    shape, fortran, dtype = reader(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, and loading them could run code")
    count = math.prod(shape)
    if not all(type(s) is int and s >= 0 for s in shape) or count * dtype.itemsize > size:
        raise ValueError(f"shape {shape} of {dtype} takes more than its {size} bytes")
    data = file.read()
    if len(data) != count * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for shape {shape} of {dtype}")
    array = np.frombuffer(bytearray(data), dtype=dtype)
    return array.reshape(shape[::-1]).transpose() if fortran else array.reshape(shape)


# -- wrappers around a state dict --------------------------------------------------------------------------

# Keys under which training scripts keep the weights, most wanted first: averaged weights before raw ones, a
# teacher before its student.
WRAPPERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "teacher", "target_encoder", "model_state_dict", "state_dict",
    "model", "module", "net", "network", "params_ema", "params", "encoder", "backbone", "vision_encoder", "student",
    "weights",
)  # fmt: skip
# Put before every name by DataParallel, torch.compile and the like.
_PLAIN_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_forward_module.")
# Names under which training code keeps the transformer beside its projection heads and losses.
_SUBTREES = ("teacher.backbone.", "student_ema.backbone.", "backbone.")


def unwrap(raw: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict inside what a training script saved, and the names left out.

    Raises:
        CheckpointError: no tensors were found.
    """
    for _ in range(8):
        if not isinstance(raw, Mapping):
            break
        if any(isinstance(v, Tensor) for v in raw.values()):
            break
        inner = next((raw[key] for key in WRAPPERS if isinstance(raw.get(key), Mapping)), None)
        if inner is None:
            break
        raw = inner
    if isinstance(raw, Tensor) or not isinstance(raw, Mapping):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, not a table of tensors")
    tensors = {k: _plain(k, v, path) for k, v in raw.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        keys = ", ".join(str(k)[:40] for k in list(raw)[:8])
        raise CheckpointError(f"{path} holds no tensors" + (f": its keys are {keys}" if keys else ""))
    return clean(tensors)


def _plain(name: str, tensor: Tensor, path: Path) -> Tensor:
    """An ordinary tensor in memory; not a sparse, nested, quantized or empty (meta) one."""
    ordinary = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    if not ordinary or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise CheckpointError(f"{path}: {name[:200]!r} is no plain tensor")
    return tensor.detach()


def clean(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Take off prefixes of wrappers, and pick the backbone out of self-supervised training states."""
    changed = True
    while changed:
        changed = False
        for prefix in _PLAIN_PREFIXES:
            if all(name.startswith(prefix) for name in tensors):
                tensors = {name[len(prefix) :]: t for name, t in tensors.items()}
                changed = True
    for prefix in _SUBTREES:
        if any(name.startswith(prefix) and "patch_embed" in name for name in tensors):
            chosen = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
            return chosen, [name for name in tensors if not name.startswith(prefix)]
    return tensors, []


def require_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse to resample NaN and infinite values, which would spread."""
    values = tensor.detach()
    if values.is_floating_point() and values.dtype.itemsize == 1:
        values = values.float()
    if values.is_floating_point() and not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise CheckpointError(f"{path}: tensor {name!r} has {bad} NaN or infinite values and has to be resampled")


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's values in memory order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
