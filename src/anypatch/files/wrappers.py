"""Find the state dict of one image tower inside what a training script saved.

The rule: the tower's names begin behind some prefix P such that P + the name of its patch projection is there. What a
file is called does not matter, nor what P is; several towers of equal right are listed, and ``prefix=`` picks one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anypatch.errors import CheckpointError, listed
from anypatch.files import layouts
from anypatch.files.pickles import Odd

# Keys under which training scripts keep the weights, most wanted first: averaged weights before raw ones, a
# teacher before its student.
WRAPPERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema", "teacher",
    "target_encoder", "model_state_dict", "state_dict", "model", "module", "net", "network", "params_ema", "params",
    "encoder", "backbone", "vision_encoder", "student", "weights",
)  # fmt: skip
# The same preference among prefixes within one table.
AVERAGED = re.compile(r"(^|[._])(ema|teacher|target)([._]|$)")
RAW = re.compile(r"(^|[._])(student|online)([._]|$)")
# Put before names by DataParallel, and anywhere into them by torch.compile, FSDP and activation checkpointing.
_PLAIN_PREFIXES = ("module.", "_forward_module.")
_INFIXES = re.compile(r"(?:(?<=^)|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
MAX_NESTING = 8  # of tables in tables; trainers write two or three
MAX_TABLES = 10_000  # in one file; an optimizer's state has one for each parameter of the model


@dataclass
class Unwrapped:
    """What was chosen.

    Attributes:
        tensors: by the names that the tower's own library gives them.
        names: what each is called in its table.
        dropped: names of the table that belong to something else, such as a DINO projection head.
        whole: the table, before anything was taken off.
        others: labels of towers of equal right, if there are some; then ``tensors`` is the whole table.
    """

    tensors: dict[str, Tensor]
    names: dict[str, str]
    dropped: list[str] = field(default_factory=list)
    whole: dict[str, Tensor] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def unwrap(raw: Any, path: Path, prefix: str | None = None) -> Unwrapped:
    """The state dict inside what a training script saved.

    Args:
        raw: what the file holds.
        path: the file, for messages.
        prefix: of the tower that is wanted, where there are several: what stands before the name of its patch
            projection, keys of the tables around it included.

    Raises:
        CheckpointError: no tensors were found, or none with this prefix.
    """
    if isinstance(raw, Tensor) or not isinstance(raw, Mapping):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, not a table of tensors")
    found: list[tuple[tuple[int, ...], str, str, dict[str, Any]]] = []
    for keys, table in _tables(raw):
        for behind in _prefixes(table):
            rank = tuple(WRAPPERS.index(k) if k in WRAPPERS else len(WRAPPERS) for k in keys)
            found.append((rank, "".join(f"{k}." for k in keys), behind, table))
    if prefix is not None:
        wanted = prefix if prefix.endswith(".") or not prefix else prefix + "."
        chosen = [f for f in found if wanted in (f[1] + f[2], f[2])]
        if not chosen:
            raise CheckpointError(f"{path} has no patch projection behind {prefix!r}; {_behind(found)}")
        return _taken(path, chosen[0][3], chosen[0][2])
    if not found:
        return _taken(path, _first_table(raw, path), "")
    best = min(f[0] for f in found)
    found = [f for f in found if f[0] == best]
    chosen = _likeliest(found)
    if len(chosen) == 1:
        return _taken(path, chosen[0][3], chosen[0][2])
    result = _taken(path, chosen[0][3], "")
    result.others = [(f[1] + f[2]).rstrip(".") for f in chosen]
    return result


def _behind(found: list[tuple[tuple[int, ...], str, str, dict[str, Any]]]) -> str:
    if len(found) == 1 and not found[0][1] + found[0][2]:
        return "there is one without a prefix"
    names = listed([repr((f[1] + f[2]).rstrip(".")[:200]) for f in found])
    return f"there is one behind {names}" if names else "it has none at all that is known"


def _likeliest(
    found: list[tuple[tuple[int, ...], str, str, dict[str, Any]]],
) -> list[tuple[tuple[int, ...], str, str, dict[str, Any]]]:
    """Of several towers: one that holds the others, else averaged ones, else those that are not raw."""
    for outer in found:
        if all(f[3] is outer[3] and f[2].startswith(outer[2]) for f in found):
            return [outer]
    labels = [f[1] + f[2] for f in found]
    for keep in (
        [f for f, label in zip(found, labels, strict=True) if AVERAGED.search(label)],
        [f for f, label in zip(found, labels, strict=True) if not RAW.search(label)],
    ):
        if keep:
            found = keep
            break
    return found


def _tables(raw: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every table of tensors within ``raw``, with the keys that lead there."""
    stack: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), raw)]
    seen: set[int] = set()
    while stack and len(seen) < MAX_TABLES:
        keys, table = stack.pop()
        if id(table) in seen:
            continue
        seen.add(id(table))
        own = {k: v for k, v in table.items() if isinstance(k, str) and isinstance(v, (Tensor, Odd))}
        if any(isinstance(v, Tensor) for v in own.values()):
            yield keys, own
        if len(keys) < MAX_NESTING:
            inner = [(k, v) for k, v in table.items() if isinstance(k, str) and isinstance(v, Mapping)]
            stack += [((*keys, k), v) for k, v in reversed(inner) if not isinstance(v, Odd)]


def _first_table(raw: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    """The likeliest table where no patch projection is known by its name."""
    for _ in range(MAX_NESTING):
        if any(isinstance(v, (Tensor, Odd)) for v in raw.values()):
            break
        inner = next((raw[key] for key in WRAPPERS if isinstance(raw.get(key), Mapping)), None)
        if inner is None:
            break
        raw = inner
    table = {k: v for k, v in raw.items() if isinstance(k, str) and isinstance(v, (Tensor, Odd))}
    if not table:
        keys = listed([str(k)[:40] for k in raw])
        raise CheckpointError(f"{path} holds no tensors" + (f": its keys are {keys}" if keys else ""))
    return table


def _prefixes(table: Mapping[str, Any]) -> list[str]:
    """What stands before the name of each patch projection, the shortest first."""
    found = (layouts.wrapper(name) for name, value in table.items() if getattr(value, "ndim", 0) >= 2)
    return sorted({prefix for prefix in found if prefix is not None}, key=lambda p: (len(p), p))


def _taken(path: Path, table: Mapping[str, Any], prefix: str) -> Unwrapped:
    """The tensors behind a prefix, under their plain names."""
    whole = {name: _plain(name, value, path) for name, value in table.items()}
    names = {_INFIXES.sub("", name): name for name in whole}
    if len(names) != len(whole):
        names = {name: name for name in whole}
    bare = _INFIXES.sub("", prefix)
    dropped: list[str] = []
    # a file in a library's own terms is taken whole; behind a prefix, the rest is somebody else's
    if bare:
        dropped = [stored for name, stored in names.items() if not name.startswith(bare)]
        names = {name[len(bare) :]: stored for name, stored in names.items() if name.startswith(bare)}
    for known in _PLAIN_PREFIXES * 2:
        if all(name.startswith(known) for name in names):
            names = {name[len(known) :]: stored for name, stored in names.items()}
    names = layouts.unchunked(names)
    return Unwrapped({name: whole[stored] for name, stored in names.items()}, names, dropped, whole)


def _plain(name: str, tensor: Any, path: Path) -> Tensor:
    """An ordinary tensor in memory; not a sparse, nested, quantized or empty (meta) one."""
    ordinary = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    if not ordinary or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise CheckpointError(f"{path}: {name[:200]!r} is no plain tensor")
    detached: Tensor = tensor.detach()
    return detached


def rooted(tensors: dict[str, Tensor], own: Iterable[str], path: Path) -> dict[str, Tensor]:
    """The tensors under the names that a model gives them, where the file puts the same prefix before all of these.

    Args:
        tensors: of the file.
        own: names of the model's parameters.
        path: the file, for messages.

    Raises:
        CheckpointError: several prefixes do.
    """
    own = list(own)
    if not own or any(name in tensors for name in own):
        return tensors
    longest = max(own, key=len)  # the least likely to end another name by chance
    prefixes = {name[: -len(longest)] for name in tensors if name.endswith("." + longest)}
    # a head may be missing or another; half of the names are no accident
    fitting = sorted(p for p in prefixes if 2 * sum(p + name in tensors for name in own) >= len(own))
    if not fitting:
        return tensors
    if len(fitting) > 1:
        shown = [p.rstrip(".") for p in fitting]
        raise CheckpointError(
            f'{path} holds several models: {listed(list(map(repr, shown)))}; say which with prefix="{shown[0]}"'
        )
    (prefix,) = fitting
    if prefix.endswith(layouts.INNER):
        return tensors  # a library's own terms, which converters look for
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
