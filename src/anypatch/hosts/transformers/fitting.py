"""A transformers model with the tensors of a file."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from anypatch.core.empty import empty
from anypatch.errors import CheckpointError, listed
from anypatch.files.reading import Checkpoint
from anypatch.files.wrappers import rooted
from anypatch.hosts.loading import said
from anypatch.hosts.transformers.safety import require_safe_source


def fit(name: str, checkpoint: Checkpoint, **host_kwargs: Any) -> nn.Module:
    """A transformers model of the configuration ``name`` (a directory or a hub name) with a file's weights.

    Raises:
        CheckpointError: the file does not fit the configuration.
    """
    kind, config = class_of(name, host_kwargs.pop("config", None))
    host_kwargs.setdefault("dtype", "auto")
    tensors = _renamed(kind, config, checkpoint)
    try:
        model, report = kind.from_pretrained(
            None, config=config, state_dict=tensors, output_loading_info=True, **host_kwargs
        )
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint.path} does not fit transformers:{name}: {type(error).__name__}: {str(error)[:500]}"
        ) from error
    missing, surplus = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or surplus:
        parts = [f"it lacks {listed(missing)}"] if missing else []
        parts += [f"{kind.__name__} has no {listed(surplus)}"] if surplus else []
        raise CheckpointError(f"{checkpoint.path} does not fit transformers:{name}: {'; '.join(parts)}")
    return model


def _renamed(kind: Any, config: Any, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The file's tensors without a prefix that training code put before all of transformers' own names."""
    table = dict(checkpoint.whole or checkpoint.tensors)
    try:
        model: Any = empty(lambda: kind(config))
    except Exception:
        return table  # from_pretrained says why
    own = [name for name, _ in model.named_parameters()]
    base = f"{getattr(model, 'base_model_prefix', '')}."
    inner = [name.removeprefix(base) for name in own if name.startswith(base)]
    known = {*own, *inner, *(base + name for name in own)}  # with or without the base model's name, as it takes them
    if any(name in known for name in table):
        return table
    for names in (own, inner):
        found = rooted(table, names, checkpoint.path)
        if found is not table:
            return found
    return dict(checkpoint.tensors)


def class_of(name: str, config: Any = None) -> tuple[Any, Any]:
    """The class that a configuration names, and the configuration.

    Raises:
        CheckpointError: no configuration, or one that names no class.
    """
    import transformers

    if config is None:
        try:
            require_safe_source(name, {})
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"transformers takes no configuration from {name}: {said(error)}") from error
    names = getattr(config, "architectures", None) or []
    kind = named_class(config)
    if kind is None:
        try:
            kind = type(transformers.AutoModel.from_config(config)) if not names else None
        except Exception:
            kind = None
    if kind is None:
        raise CheckpointError(f"{name}: its configuration names no class of transformers ({names})")
    return kind, config


def named_class(config: Any) -> Any:
    """The class of a model of transformers' own that a configuration names; any other attribute of the library that a
    file might name is not looked at, let alone called."""
    import transformers

    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, str(names[0]), None) if names else None
    module = type(config).__module__
    if names and kind is None and module.startswith("transformers.models."):  # classes that it keeps to their module
        with contextlib.suppress(ImportError):
            models = importlib.import_module(module.replace(".configuration_", ".modeling_"))
            kind = getattr(models, str(names[0]), None)
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None


def candidates(checkpoint: Checkpoint) -> Iterator[str]:
    """The configuration beside the file: tensors alone do not tell transformers' models apart.

    Raises:
        CheckpointError: there is none.
    """
    if (checkpoint.path.parent / "config.json").is_file():
        yield str(checkpoint.path.parent)
        return
    raise CheckpointError(
        f"{checkpoint.path} has transformers' names, and its configuration is not beside it: put config.json there, or "
        f'say where it is with arch="transformers:DIRECTORY"'
    )
