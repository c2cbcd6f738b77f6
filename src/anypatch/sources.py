"""Load by name with the host library's own loader, adapt, and save in the host library's own format."""

from __future__ import annotations

import contextlib
import difflib
import os
import tempfile
import threading
from pathlib import Path
from typing import Any, TypeVar, overload

from torch import nn

from anypatch import hosts
from anypatch.adaptation import adapt, host
from anypatch.core import history
from anypatch.core.adapters import unwrap
from anypatch.core.ambient import undisturbed
from anypatch.core.geometry import ImageSizeLike, Keep, SizeLike
from anypatch.core.merging import merged
from anypatch.core.modes import with_own_dtype
from anypatch.core.placement import require_gathered, require_here
from anypatch.core.tables import PositionsLike
from anypatch.core.views import standing
from anypatch.errors import AnypatchError, CheckpointError, UnsupportedModelError
from anypatch.files import atomic
from anypatch.files.paths import at_home, given, require_possible
from anypatch.files.snapshot import copy_within, require_inside
from anypatch.hosts import cards, loading
from anypatch.hosts.folders import replaced_names, without_formats
from anypatch.hosts.rebuilding import ADVICE

M = TypeVar("M", bound=nn.Module)

# While transformers and diffusers load, the process has another default dtype and other initialisers, which each of
# them puts back as it found them: one at a time, else what a thread finds is what another has put there for itself.
LOADING = threading.RLock()
CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz")
FORMS = (
    "timm:NAME, transformers:NAME_OR_DIR, open_clip:NAME/PRETRAINED, torchvision:NAME/WEIGHTS, hub:REPO:NAME, "
    "a directory one of them saved, or a checkpoint file (" + ", ".join(CHECKPOINT_SUFFIXES) + ")"
)


@overload
def load(
    source: str | Path,
    patch_size: SizeLike | None = None,
    image_size: ImageSizeLike | None = None,
    *,
    keep: Keep = "image",
    kernel: Any = "wiener",
    positions: PositionsLike = "antialias",
    model_class: type[M],
    **host_kwargs: Any,
) -> M: ...


@overload
def load(
    source: str | Path,
    patch_size: SizeLike | None = None,
    image_size: ImageSizeLike | None = None,
    *,
    keep: Keep = "image",
    kernel: Any = "wiener",
    positions: PositionsLike = "antialias",
    **host_kwargs: Any,
) -> nn.Module: ...


def load(
    source: str | Path,
    patch_size: SizeLike | None = None,
    image_size: ImageSizeLike | None = None,
    *,
    keep: Keep = "image",
    kernel: Any = "wiener",
    positions: PositionsLike = "antialias",
    **host_kwargs: Any,
) -> nn.Module:
    """Load a pretrained model with the library that made it, then adapt it.

    >>> model = load("timm:test_vit", patch_size=8, pretrained=False)
    >>> type(model).__name__, model.patch_embed.patch_size
    ('VisionTransformer', (8, 8))

    Args:
        source: ``timm:NAME``, ``transformers:NAME_OR_DIR``, ``open_clip:NAME/PRETRAINED``,
            ``torchvision:NAME/WEIGHTS``, ``hub:REPO:NAME``, a directory in a host library's format, or a
            checkpoint file, with ``arch="timm:NAME"`` where the file does not tell.
        patch_size, image_size, keep, kernel, positions: as in :func:`anypatch.adapt`.
        **host_kwargs: passed on to the host library's loader. For every library, ``pretrained=False`` builds the named
            model with random weights, without downloading or reading any; for transformers and diffusers,
            ``model_class=`` chooses the class.

    Returns:
        The host library's own model: in memory, or where ``host_kwargs`` say, in the dtype that it has without a word,
        whatever default dtype, default device, autocast or inference mode is active around the call. Threads load one
        after another.

    Raises:
        UnsupportedModelError: a source of no known form, a model that cannot be adapted, a library that is not
            installed, or an option that it does not take.
        CheckpointError: the source does not exist, cannot be had, cannot be read or is damaged.
        GeometryError: sizes that do not fit.
    """
    if not isinstance(source, (str, os.PathLike)):
        instead = "; adapt takes a model that is there already" if isinstance(source, nn.Module) else ""
        raise UnsupportedModelError(f"a source is a string or a path, not a {type(source).__name__}{instead}")
    source = at_home(str(source))
    require_possible(source, "source")
    with LOADING, undisturbed(), with_own_dtype():
        model = _load(source, host_kwargs)
    history.note_origin(unwrap(model), source)
    if patch_size is not None or image_size is not None:
        # what a name stands for is the library's own, and an error there ours; a directory may say anything
        local = Path(source.partition(":")[2] or source).exists() or Path(source).exists()
        with loading.describing(source) if local else contextlib.nullcontext():
            adapt(model, patch_size, image_size, keep=keep, kernel=kernel, positions=positions)
    return model


def _load(source: str, host_kwargs: dict[str, Any]) -> nn.Module:
    prefix, _, name = source.partition(":")
    library = hosts.by_prefix(prefix)
    if library is not None and name:
        return loading.load(library, name, **host_kwargs)
    path = given(source, "source")
    if path.is_dir():
        folder, name = recognise_directory(path)
        try:
            return loading.load(hosts.library(folder), name, **host_kwargs)
        except UnsupportedModelError as error:
            if host_kwargs or not isinstance(error.__cause__, TypeError):
                raise  # a library that is not there, or an option of the caller's
            raise CheckpointError(f"{path}: {error}") from error.__cause__
    if path.exists() or source.endswith(CHECKPOINT_SUFFIXES):
        from anypatch.hosts.checkpoints import load_file

        if host_kwargs.get("pretrained", True) is not True and path.exists():
            raise CheckpointError(
                f"{path} is a file of weights: leave out pretrained (on the command line give --weights)"
            )
        with loading.speaking_for(str(host_kwargs.get("arch", "the host library")).partition(":")[0], str(path)):
            return load_file(path, **{k: v for k, v in host_kwargs.items() if k != "pretrained"})
    raise _no_source(source)


def _no_source(source: str) -> AnypatchError:
    """The error for a source that is nothing: what it looks like, and what was probably meant."""
    prefix, colon, name = source.partition(":")
    prefixes = [library.prefix or library.name for library in hosts.HOSTS]
    if colon and "/" not in prefix and "\\" not in prefix and len(prefix) > 1:  # one letter is a drive
        if prefix in prefixes:
            return UnsupportedModelError(f"{source!r} names no model: use {FORMS}")
        near = difflib.get_close_matches(prefix.lower().replace("-", "_"), prefixes, n=1)
        meant = f"did you mean {near[0]}:{name}? Sources are" if near else "use"
        return UnsupportedModelError(f"{source!r} has an unknown prefix {prefix!r}: {meant} {FORMS}")
    if source.startswith((".", "~", os.sep)) or source.endswith(os.sep) or source.count("/") > 1:
        return CheckpointError(f"{source} does not exist: no such file or directory")
    meant = _meant(source)
    if meant:
        return UnsupportedModelError(f"{source!r} does not exist as a file or directory; did you mean {meant}?")
    return UnsupportedModelError(f"{source!r} does not exist as a file or directory; a source is {FORMS}")


def _meant(name: str) -> str:
    """Sources that a bare name may stand for, the libraries' own names first, then those that are like it."""
    if name.count("/") == 1:
        owner, _, rest = name.partition("/")
        known = [s for library in hosts.HOSTS for s in _names(library) if s.endswith(f":{owner}")]
        return " or ".join(f"{s}/{rest}" for s in known) or f"transformers:{name}"
    sources = [s for library in hosts.HOSTS for s in _names(library)]
    bare = name.partition(".")[0]
    exact = [s + name[len(bare) :] for s in sources if s.partition(":")[2] == bare]
    if exact:
        return " or ".join(exact[:3])
    names = {s.partition(":")[2]: s for s in reversed(sources)}
    # 0.75: a letter or two of a name mistyped; below that, names of another family begin to appear
    return " or ".join(names[n] for n in difflib.get_close_matches(bare, names, n=3, cutoff=0.75))


def _names(library: hosts.Host) -> list[str]:
    try:
        return [f"{library.prefix or library.name}:{name}" for name in library.names()]
    except ImportError:  # not installed
        return []


def recognise_directory(path: Path) -> tuple[str, str]:
    """The host library whose format a directory is in, and the name its loader takes.

    Raises:
        CheckpointError: no known format; the message lists what was looked for.
    """
    found = hosts.by_folder(path)
    if found is not None:
        return found[0].name, found[1]
    raise CheckpointError(
        f"{path} is in no host library's format: {without_formats(library.name for library in hosts.HOSTS)}"
    )


def save(model: nn.Module, directory: str | Path, **extras: Any) -> None:
    """Save a model in its host library's own format; it loads there without anypatch.

    >>> import tempfile, timm
    >>> folder = tempfile.TemporaryDirectory()
    >>> save(load("timm:test_vit", patch_size=8, pretrained=False), folder.name)
    >>> timm.create_model(f"local-dir:{folder.name}").patch_embed.patch_size
    (8, 8)

    The directory is built beside its place, held against what the host library would build from it, and put in place
    whole: whatever happens before leaves what was there. A model that is there is replaced, in whatever library's
    format; all other files stay. Adapters of PEFT are merged, parametrised weights computed, in what is written; the
    live model is left alone. An adapted model gets a card: what it was, what it became, how, with which version; the
    card and the licence of the directory that it was loaded from come along.

    Args:
        model: any model that :func:`anypatch.adapt` takes.
        directory: where to; made if it is not there.
        **extras: what the host library's format also holds, such as ``processor=`` for transformers.

    Raises:
        UnsupportedModelError: no host library knows the model, or it would rebuild it otherwise; the message names
            the layer or tensor. Values that are not here: sharded, offloaded, on the meta device.
        CheckpointError: the directory cannot be written.
    """
    path = given(directory, "directory")
    hub = _for_hub(extras)
    require_gathered(unwrap(model))
    library = host(model)
    require_here(unwrap(model), lent=library.fetches(unwrap(model)))
    source, steps = history.origin(unwrap(model)), history.steps(unwrap(model))
    replaced = replaced_names(path, library.name)
    with undisturbed():
        inner = merged(standing(model))
        with atomic.replacing_directory(path, replaced, parents=True) as place:
            _write(library, inner, place, path, extras)
            for kept in cards.beside(source, path):
                if not (place / kept.name).exists():
                    copy_within(kept, kept.parent, place / kept.name)
            texts = cards.card(library.name, library.version, type(inner).__name__, steps, source, path)
            for name, text in texts.items():
                (place / name).write_text(text, encoding="utf-8")
    if hub is not None:
        _upload(path, str(hub.pop("repo_id", None) or path.name), **hub)


def _write(library: hosts.Host, model: nn.Module, place: Path, final: Path, extras: dict[str, Any]) -> None:
    from safetensors import SafetensorError

    try:
        library.save(model, place, final, **extras)
    except SafetensorError as error:  # a full disk, too
        raise CheckpointError(f"cannot write {final}: {error}") from error
    except (AnypatchError, OSError, MemoryError):
        raise
    except Exception as error:  # what a library's own writer says of a model that it did not make as it is
        raise UnsupportedModelError(
            f"{library.name} cannot write {type(model).__name__}: {type(error).__name__}: {loading.said(error)}; "
            f"{ADVICE}"
        ) from error


def _for_hub(extras: dict[str, Any]) -> dict[str, Any] | None:
    """What ``push_to_hub=True`` asks for: the library itself would name the repository after where it writes."""
    options: dict[str, Any] = {
        name: extras.pop(name) for name in ("repo_id", "private", "commit_message", "token") if name in extras
    }
    if extras.pop("push_to_hub", False):
        return options
    extras.update(options)
    return None


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    **extras: Any,
) -> str:
    """Save a model as :func:`save` does, and upload the directory to the Hugging Face Hub.

    >>> model = load("timm:test_vit", patch_size=8, pretrained=False)
    >>> push_to_hub(model, "me/test-vit-patch8", endpoint="http://localhost:9")  # a hub that is not there
    Traceback (most recent call last):
    ...
    anypatch.errors.CheckpointError: cannot upload to me/test-vit-patch8: ...

    Args:
        model: any model that :func:`save` takes.
        repo_id: ``owner/name``; made if it is not there.
        private: whether a repository that is made is private.
        revision: the branch; the main one if it is not given.
        commit_message: of the upload.
        token: to write with; the one that ``hf auth login`` keeps if it is not given.
        endpoint: of another hub than the usual one.
        **extras: as for :func:`save`.

    Returns:
        The address of the commit.

    Raises:
        UnsupportedModelError: as for :func:`save`, or huggingface_hub is not installed.
        CheckpointError: the hub refuses, or cannot be reached.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        save(model, folder, **extras)
        return _upload(folder, repo_id, private, revision, commit_message, token, endpoint)


def _upload(
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UnsupportedModelError(
            f"uploading needs huggingface_hub installed: pip install huggingface_hub ({error})"
        ) from error
    require_inside(folder)
    api = HfApi(endpoint=endpoint, token=token)
    try:
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        message = commit_message or "Upload a model at another geometry, by anypatch"
        done = api.upload_folder(repo_id=made.repo_id, folder_path=folder, revision=revision, commit_message=message)
    except Exception as error:  # the hub's own errors, and those of the connection below it
        raise CheckpointError(f"cannot upload to {repo_id}: {type(error).__name__}: {error}") from error
    return str(done.commit_url)
