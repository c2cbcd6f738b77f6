"""What a model's tensors are called in files of transformers, and whether a directory's are those of its model."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from anypatch.errors import AnypatchWarning, CheckpointError, listed
from anypatch.files.header import Entry

# Of each of a model's tensors its name in files, itself, and its name in those at hand, if they have it.
Places = list[tuple[str, Tensor, str | None]]


def in_files(built: Any, model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ``built`` by the names that ``model`` was written with."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5 files had the names of the model
        return state
    built._weight_conversions = getattr(model, "_weight_conversions", None)
    if getattr(model, "hf_quantizer", None) is not None:  # whose own conversions unpack
        from transformers.conversion_mapping import get_model_conversion_mapping

        built._weight_conversions = get_model_conversion_mapping(built)
    return dict(revert_weight_conversion(built, state))


def optional(built: Any) -> Callable[[str], bool]:
    """Tensors that transformers does not write: those it ties to others, or computes."""
    tied: dict[int, list[str]] = {}
    for name, tensor in built.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(name)
    shared = {name for names in tied.values() if len(names) > 1 for name in names}
    ignored = [*(getattr(built, "_tied_weights_keys", None) or ())]  # building without memory parts what is tied
    ignored += [*(getattr(built, "_keys_to_ignore_on_save", None) or ())]
    ignored += getattr(built, "_keys_to_ignore_on_load_missing", None) or ()
    return lambda name: name in shared or any(name == key or re.search(key, name) for key in ignored)


def own_name(name: str, entries: Collection[str], model: nn.Module) -> str | None:
    """A tensor's name in the files where it is the model's, with or without what stands before a base model's."""
    base = getattr(model, "base_model_prefix", "")
    names = [name, f"{base}.{name}", name.removeprefix(f"{base}.")] if base else [name]
    return next((candidate for candidate in names if candidate in entries), None)


def placed(model: Any, entries: Collection[str]) -> Places:
    """Where each of a model's tensors is in files.

    Files of several versions of the library have several names, and not every renaming says where it began: those
    names are taken of which most are there.
    """
    best: Places = []
    for table in _named(model):
        places = [(name, tensor, own_name(name, entries, model)) for name, tensor in table.items()]
        if not best or _found(places) > _found(best):
            best = places
        if all(stored is not None for _, _, stored in best):
            break
    return best


def _found(places: Places) -> int:
    return len({stored for _, _, stored in places if stored is not None})


def _named(model: Any) -> Iterator[Mapping[str, Tensor]]:
    """A model's tensors by the names that they have in files by default, in all files that it can read, in itself."""
    state = model.state_dict()
    with contextlib.suppress(ImportError):  # before version 5 files had the names of the model
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import revert_weight_conversion

        renamed = copy.copy(model)  # of the module alone
        renamed._weight_conversions = None
        yield dict(revert_weight_conversion(renamed, state))
        renamed._weight_conversions = get_model_conversion_mapping(model)
        yield dict(revert_weight_conversion(renamed, state))
    yield state


def require_shapes(source: Path, places: Places, entries: Mapping[str, Entry]) -> None:
    """A directory's tensors have the shapes that its configuration gives them.

    Args:
        source: the directory.
        places: of what its configuration builds.
        entries: its tensors; what it does not have, or the model does not, is left alone.

    Raises:
        CheckpointError: one has another shape; the message says both.
    """
    for _, live, stored in places:
        if stored is not None and entries[stored].shape != tuple(live.shape):
            raise other_shape(source, stored, entries, tuple(live.shape))


def unmatched(model: Any, places: Places, entries: Mapping[str, Entry]) -> tuple[list[str], list[str]]:
    """What a model has and its files lack, and what these have and it does not; of neither what the other may have
    under another name, nor what transformers leaves out without a word."""
    taken = {stored for _, _, stored in places}
    missing = {name: tuple(live.shape) for name, live, stored in places if stored is None}
    surplus = {name: entry.shape for name, entry in entries.items() if name not in taken}
    may_lack, may_have = optional(model), getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    lacks = [n for n, shape in missing.items() if shape not in surplus.values() and not may_lack(n)]
    has = [n for n, shape in surplus.items() if shape not in missing.values()]
    return lacks, [n for n in has if not any(re.search(key, n) for key in may_have)]


def tell(source: str, kind: str, lacks: Iterable[str], has: Iterable[str]) -> None:
    """Say what transformers, which loads such a directory, says in its log alone."""
    missing, surplus = sorted(lacks), sorted(has)
    if missing:
        warnings.warn(
            f"{source} lacks {listed(missing, 3)}, which its {kind} has: transformers makes random values of them",
            AnypatchWarning,
            stacklevel=2,
        )
    if surplus:
        warnings.warn(
            f"{source} holds {listed(surplus, 3)}, which its {kind} does not have: transformers leaves them out",
            AnypatchWarning,
            stacklevel=2,
        )


def other_shape(source: Path, stored: str, entries: Mapping[str, Entry], shape: tuple[int, ...]) -> CheckpointError:
    """The error for a tensor of another shape than the configuration says."""
    return CheckpointError(
        f"{source}: tensor {stored!r} has shape {entries[stored].shape}, but config.json says {shape}"
    )
