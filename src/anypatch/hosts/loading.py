"""Loading through the host libraries: what they raise becomes one of anypatch's errors, its cause chained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from anypatch.errors import AnypatchError, CheckpointError, UnsupportedModelError
from anypatch.hosts.base import Host
from anypatch.hosts.plausible import held_against, weights_size
from anypatch.hosts.vetting import folder_of, require_readable

# Words in the messages of huggingface_hub, transformers, urllib and torch.hub when nothing answered. Only they choose
# the advice; the error is the same without it.
OFFLINE = (
    "connection",
    "connect to",
    "locate the file on the hub",
    "name or service not known",
    "name resolution",
    "urlopen error",
    "offline",
    "timed out",
    "max retries",
)
WITHOUT = "without a network"
OF_A_NAME = (
    f"; {WITHOUT}, only what was downloaded before loads by name: give a directory or a file, or build the model "
    f"without its weights (pretrained=False)"
)
DEVICE = ("invalid device", "device string", "not compiled with", "no nvidia driver", "invalid device ordinal")
LONGEST = 400  # characters of a library's message: some quote whole configurations


@contextlib.contextmanager
def speaking_for(library: str, what: str, package: str | None = None, offline: str = OF_A_NAME) -> Iterator[None]:
    """Turn whatever a host library raises inside into one of our errors, the library's own as its cause.

    >>> with speaking_for("timm", "vit_tiny_patch16_224"):
    ...     raise TypeError("__init__() got an unexpected keyword argument 'depht'")
    Traceback (most recent call last):
    anypatch.errors.UnsupportedModelError: timm cannot make vit_tiny_patch16_224 with these options: ...

    Args:
        library: the library's name.
        what: what it was asked for, as the user wrote it.
        package: the extra of anypatch that installs the library.
        offline: what to do where nothing answers, as the end of a sentence.

    Raises:
        UnsupportedModelError: the library is not installed, or takes no such option.
        CheckpointError: everything else: no network, no such model or file, no such device, weights that do not fit.
    """
    try:
        yield
    except CheckpointError as error:
        cause = error.__cause__
        if cause is None or WITHOUT in str(error) or not _unanswered(cause):
            raise
        raise CheckpointError(f"{str(error).rstrip('.')}{offline}") from cause
    except (AnypatchError, MemoryError):
        raise
    except ImportError as error:
        advice = f"pip install 'anypatch[{package or library.replace('_', '-')}]' ({error})"
        if "pip install" in str(error):  # the library says itself what else this one needs
            advice = said(error)
        raise UnsupportedModelError(
            f"loading {what} from {library} needs a package that is not installed: {advice}"
        ) from error
    except TypeError as error:
        raise UnsupportedModelError(f"{library} cannot make {what} with these options: {said(error)}") from error
    except Exception as error:
        advice = _advice(error, offline)  # goes on with the library's sentence
        words = said(error).rstrip(".") if advice else said(error)
        raise CheckpointError(f"{library} cannot load {what}: {words}{advice}") from error


@contextlib.contextmanager
def describing(what: str) -> Iterator[None]:
    """Turn whatever an odd configuration leads to, while a model of its is changed, into one of our errors.

    Args:
        what: the directory or file that describes the model.

    Raises:
        CheckpointError: anything that is not ours already.
    """
    try:
        yield
    except (AnypatchError, OSError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{what} describes a model that cannot be changed: {type(error).__name__}: {said(error)}"
        ) from error


def said(error: BaseException) -> str:
    """What an error says, on one line; its class where the words alone would not do."""
    words = " ".join(str(error).split())
    if isinstance(error, KeyError) or not words:
        words = f"{type(error).__name__} {words}".strip()
    return words if len(words) <= LONGEST else words[:LONGEST] + " ..."


def _advice(error: BaseException, offline: str) -> str:
    words = said(error).lower()
    if any(word in words for word in DEVICE):
        return "; name a device that this machine has, such as cpu"
    return offline if _unanswered(error) else ""


def _unanswered(error: BaseException | None) -> bool:
    """Whether an error, or one that it was made of, says that nothing answered."""
    while error is not None:
        words = said(error).lower()
        if isinstance(error, (ConnectionError, TimeoutError)) or any(word in words for word in OFFLINE):
            return True
        error = error.__cause__ or error.__context__
    return False


def _offline(host: Host, name: str) -> str:
    """What loads a model where nothing answers: one that the library itself describes can be had without weights."""
    found = host.repository(name)
    if found is None:
        return OF_A_NAME
    return (
        f"; {WITHOUT}, only what was downloaded before loads by name (with HF_HUB_OFFLINE=1 at once), and what the "
        f"model is stands beside its weights: give a directory that holds both, as hf download {found[0]} --local-dir "
        f"DIRECTORY makes it elsewhere"
    )


def load(host: Host, name: str, **host_kwargs: Any) -> nn.Module:
    """A host library's model by name: pretrained, or with random weights where ``pretrained=False`` asks for them.

    Raises:
        UnsupportedModelError: the library is not installed, does not know the name, or takes no such option.
        CheckpointError: the weights cannot be had.
    """
    source = f"{host.prefix or host.name}:{name}"
    for argument in ("arch", "prefix"):
        if argument in host_kwargs:
            raise UnsupportedModelError(f"{argument} is for checkpoint files: {source} says itself what it is")
    folder = folder_of(name, host_kwargs)
    if folder is not None:
        require_readable(folder)
    offline = _offline(host, name)
    with speaking_for(host.name, name, offline=offline), held_against(weights_size(host, name, host_kwargs), name):
        pretrained = host_kwargs.get("pretrained", True)
        if pretrained is False or pretrained is None:
            return host.build(name, **{k: v for k, v in host_kwargs.items() if k != "pretrained"})
        return host.load(name, **host_kwargs)
