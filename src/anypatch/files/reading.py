"""Read checkpoint files without trusting them: nothing in a file is executed, and every size is verified."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from anypatch.errors import CheckpointError, listed
from anypatch.files import layouts
from anypatch.files.archives import read_archive
from anypatch.files.header import map_tensors, read_header, require_names
from anypatch.files.legacy import LEGACY_MAGIC, read_legacy
from anypatch.files.npz import read_npz
from anypatch.files.opening import first_line, open_regular
from anypatch.files.pickles import GreedyError
from anypatch.files.scripted import scripted_tensors
from anypatch.files.wrappers import unwrap

# What people take for checkpoints, by how it begins.
OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights themselves: fetch them with git lfs pull"),
    (b"\x1f\x8b", "packed by gzip: unpack it first"),
    (b"BZh", "packed by bzip2: unpack it first"),
    (b"\xfd7zXZ", "packed by xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd: unpack it first"),
    (b"\x89HDF", "an HDF5 file, as Keras writes them, which are not read: use weights for PyTorch"),
    (b"GGUF", "a GGUF file, which is not read: use weights for PyTorch"),
    (b"<", "a web page, not weights: the download gave an answer for people"),
)
TAR = (257, b"ustar")  # where a tar archive says what it is


@dataclass
class Checkpoint:
    """What a file holds.

    Attributes:
        path: the file.
        tensors: by name, wrappers around the state dict taken off.
        metadata: of a safetensors file.
        kind: ``"safetensors"``, ``"torch"``, ``"torchscript"`` or ``"npz"``.
        dropped: names that unwrapping left behind, such as a DINO projection head.
        names: what each tensor is called in the file.
        whole: all tensors of the table they are in, by their names in the file.
        others: several image towers of equal right; ``tensors`` is then the whole table.
        notes: what whoever loads it should be told, such as that a head is new.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    kind: str = "torch"
    dropped: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def require_one(self) -> None:
        """Refuse to guess which of several image towers is wanted.

        Raises:
            CheckpointError: there are several; the message lists them.
        """
        if self.others:
            shown = listed(list(map(repr, self.others)))
            raise CheckpointError(
                f'{self.path} holds several models: {shown}; say which with prefix="{self.others[0]}"'
            )


def read(path: str | Path, prefix: str | None = None) -> Checkpoint:
    """Read a checkpoint of any of the formats, recognised by its content.

    Args:
        path: the file.
        prefix: which of several models in it, by what stands before the name of its patch projection.

    Raises:
        CheckpointError: the file is missing, damaged, of no known format, or would have to run code.
    """
    path = Path(path)
    try:
        return _read(path, prefix)
    except CheckpointError:
        raise
    except MemoryError as error:
        raise CheckpointError(f"{path} asks for more memory than there is: it is damaged") from error
    except RecursionError as error:
        raise CheckpointError(f"{path} is damaged: nested too deeply") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from error


def _read(path: Path, prefix: str | None) -> Checkpoint:
    kind = sniff(path)
    metadata: dict[str, str] = {}
    if kind == "npz":
        tensors = read_npz(path)
        require_names(path, tensors)
        return Checkpoint(path, tensors, kind=kind, names={n: n for n in tensors}, whole=tensors)
    if kind == "safetensors":
        header = read_header(path)
        raw, metadata = map_tensors(header), header.metadata
        if not raw:
            raise CheckpointError(f"{path} holds no tensors")
    elif kind == "torchscript":
        raw = scripted_tensors(read_archive(path))
    else:
        raw = read_legacy(path) if kind == "legacy" else read_archive(path)
    found = unwrap(raw, path, prefix)
    require_names(path, (*found.whole, *found.others))
    for name, tensor in found.tensors.items():
        if not tensor.numel() and layouts.follows_geometry(name):
            raise CheckpointError(f"{path}: tensor {name!r} of shape {tuple(tensor.shape)} holds no values")
    kind = "torch" if kind == "legacy" else kind
    return Checkpoint(path, found.tensors, metadata, kind, found.dropped, found.names, found.whole, found.others)


def require_modest(path: Path) -> None:
    """A file that a library itself will unpickle asks for no memory or time without end, as a few bytes of it can.

    Whether it is a good one the library says, except of an archive that cannot be looked into.

    Raises:
        CheckpointError: it does, its records are packed, or its archive is damaged.
    """
    try:
        kind = sniff(path)
    except CheckpointError:
        return  # of no format that is unpickled
    except Exception as error:  # zipfile raises many kinds; torch may open an archive that Python does not
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from error
    try:
        if kind in ("torch", "torchscript"):
            read_archive(path, lenient=True)
        elif kind == "legacy":
            read_legacy(path, lenient=True)
    except GreedyError as error:
        raise CheckpointError(f"{path} asks for more than a file of weights does: {error}") from error
    except (CheckpointError, MemoryError):
        raise
    except Exception:  # damaged: the library that reads it next says how
        return


def sniff(path: Path) -> str:
    """The format of a file: ``safetensors``, ``npz``, ``torch``, ``torchscript`` or ``legacy``."""
    with open_regular(path) as file:
        start = file.read(32)
        if start[:4] == b"PK\x03\x04":
            with zipfile.ZipFile(file) as archive:
                return _sniff_zip(path, archive.namelist())
    if start[:1] == b"\x80" and start[2 : 2 + len(LEGACY_MAGIC)] == LEGACY_MAGIC:
        return "legacy"
    if len(start) > 8 and start[8:9] == b"{":
        return "safetensors"
    what = next((says for mark, says in OTHERS if start.startswith(mark)), None)
    if what is None and _is_tar(path):
        what = "a tar archive: unpack it, and name the file of weights in it"
    if not start:
        what = "empty"
    raise CheckpointError(f"{path} is {what or 'no checkpoint: neither safetensors, nor torch.save, nor .npz'}")


def _is_tar(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(TAR[0] + len(TAR[1]))[TAR[0] :] == TAR[1]


def _sniff_zip(path: Path, names: list[str]) -> str:
    if any(n.endswith("/data.pkl") or n == "data.pkl" for n in names):
        return "torchscript" if any(n.endswith("constants.pkl") for n in names) else "torch"
    if names and all(n.endswith(".npy") for n in names):
        return "npz"
    raise CheckpointError(f"{path} is a zip archive, but holds neither a torch checkpoint nor NumPy arrays")
