"""What each library's format is made of: which files in a directory belong to a model, and go when it is replaced."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from anypatch.errors import CheckpointError
from anypatch.files.configs import read_json

WEIGHTS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "pytorch_model.bin.index.json",
)
# What looks like weights and is none, without which the library does not load a model: voices of Qwen2.5-Omni.
TABLES = ("spk_dict.pt",)


@dataclass(frozen=True)
class Format:
    """The files of one library's format, as patterns of names.

    Attributes:
        config: the file that makes a directory one of this format.
        keys: of which that file holds at least one.
        model: configuration and weights: replaced by every save.
        beside: what else belongs to the library: goes when another library's model takes the place.
        never: of which that file holds none.
    """

    config: str
    keys: tuple[str, ...]
    model: tuple[str, ...]
    beside: tuple[str, ...] = ()
    never: tuple[str, ...] = ()


FORMATS = {
    "open_clip": Format(
        "open_clip_config.json",
        (),
        ("open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "tower"),
    ),
    "torchvision": Format("torchvision.json", (), ("torchvision.json", *WEIGHTS)),
    # transformers' wrapper of timm's models says their architecture, too
    "timm": Format("config.json", ("architecture",), ("config.json", *WEIGHTS), never=("model_type",)),
    "transformers": Format(
        "config.json",
        ("model_type", "architectures"),
        ("config.json", "generation_config.json", "tf_model.h5", "flax_model.msgpack", *WEIGHTS),
        (
            "*processor_config.json",
            "chat_template.*",
            "additional_chat_templates",
            "tokenizer*",
            "*_tokenizer",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab*",
            "merges.txt",
            "bpe.codes",
            "*.spm",
            "*.model",
            "*.tiktoken",
            *TABLES,
        ),
    ),
    "diffusers": Format(
        "config.json",
        ("_class_name",),
        ("config.json", "diffusion_pytorch_model*.safetensors*", "diffusion_pytorch_model*.bin*"),
    ),
    "generic": Format("geometry.json", ("prefix_tokens",), ("geometry.json", "model.safetensors")),
}


def formats(folder: Path) -> set[str]:
    """The libraries in whose format a directory is; a damaged configuration is nobody's."""
    found = set()
    for library in FORMATS:
        with contextlib.suppress(OSError, CheckpointError):
            if is_format(folder, library):
                found.add(library)
    return found


def without_formats(libraries: Iterable[str]) -> str:
    """What a directory has not that is in none of these libraries' formats.

    >>> without_formats(["torchvision", "timm", "transformers"])
    'no torchvision.json, no config.json with architecture (timm), or with model_type or architectures (transformers)'
    """
    wanted: dict[str, list[str]] = {}
    for library in libraries:
        form = FORMATS.get(library)
        if form is not None:
            keys = wanted.setdefault(form.config, [])
            keys += [f"{' or '.join(form.keys)} ({library})"] if form.keys else []
    said = {file: f" with {', or with '.join(keys)}" if keys else "" for file, keys in wanted.items()}
    return ", ".join(f"no {file}{which}" for file, which in said.items())


def is_format(folder: Path, library: str) -> bool:
    """Whether a directory is in a library's format.

    Raises:
        CheckpointError: its configuration is damaged.
    """
    form = FORMATS[library]
    path = folder / form.config
    if not path.is_file():
        return False
    config = read_json(path) if form.keys else {}
    return not form.keys or (any(k in config for k in form.keys) and not any(k in config for k in form.never))


def replaced_names(folder: Path, library: str) -> Callable[[str], bool]:
    """Which files of a directory go when ``library``'s model is saved into it: the models', and what belongs to a
    model of another library. A processor or tokenizer of the same library stays, and so does every other file."""
    patterns = [*FORMATS[library].model] if library in FORMATS else []
    for other in formats(folder):
        patterns += FORMATS[other].model
        if other != library:
            patterns += FORMATS[other].beside
    return lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def travelling(folder: Path, library: str) -> list[Path]:
    """What lies beside a model in its library's format and belongs to it: processors, tokenizers."""
    form = FORMATS[library]
    return [e for e in sorted(folder.iterdir()) if any(fnmatch.fnmatchcase(e.name, pattern) for pattern in form.beside)]
