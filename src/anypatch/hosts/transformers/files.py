"""transformers' own formats: loading by its loaders, and writing what ``from_pretrained`` reads."""

from __future__ import annotations

import contextlib
import copy
import weakref
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from anypatch.core.empty import empty
from anypatch.core.geometry import Geometry
from anypatch.errors import CheckpointError, UnsupportedModelError
from anypatch.files.configs import read_json
from anypatch.files.shards import read_shards
from anypatch.files.snapshot import copy_within
from anypatch.files.tensors import Shapes, shapes_of
from anypatch.hosts.folders import FORMATS, is_format, travelling
from anypatch.hosts.rebuilding import plain_state, require_rebuilds
from anypatch.hosts.transformers import processors
from anypatch.hosts.transformers.fitting import candidates, class_of, fit, named_class
from anypatch.hosts.transformers.model import NAME, make, subject
from anypatch.hosts.transformers.names import in_files, optional, placed, require_shapes, tell
from anypatch.hosts.transformers.opening import open_folder
from anypatch.hosts.transformers.quantised import packed_layers
from anypatch.hosts.transformers.safety import is_adapter, require_model, require_no_adapter, require_safe_source
from anypatch.hosts.vetting import WHERE

__all__ = ["build", "candidates", "fetches", "fit", "load", "names_folder", "open_folder", "repository", "save"]

# Arguments of `from_pretrained` that say where a model is, not what it is.
HUB = (*WHERE, "trust_remote_code", "subfolder", "force_download")
# What configurations call the number of layers of their one stack.
DEPTHS = ("num_hidden_layers", "num_layers", "depth")

# What `load` read, so that `save` can write what lay beside it: source, geometry at that time, and where to look.
_SOURCES: weakref.WeakKeyDictionary[nn.Module, tuple[str, Geometry, dict[str, Any]]] = weakref.WeakKeyDictionary()


def names_folder(path: Path) -> str | None:
    """A directory in transformers' format, or one of an adapter, whose error says what to do with it."""
    return str(path) if is_format(path, NAME) or is_adapter(path) else None


def load(name: str, **host_kwargs: Any) -> nn.Module:
    """Load by transformers' own loader, as the class that the checkpoint was saved from.

    Args:
        name: an identifier on the hub, or a directory.
        **host_kwargs: ``model_class`` chooses another class; the rest is ``from_pretrained``'s.
    """
    import transformers

    if host_kwargs.get("pretrained") is True:
        del host_kwargs["pretrained"]
    _require_safe(name, host_kwargs)
    kind = chosen = _given_class(host_kwargs)
    if kind is None:  # a class of the caller's follows an adapter to its model
        require_model(name, host_kwargs)
        about = {k: v for k, v in host_kwargs.items() if k in HUB}
        kind = named_class(host_kwargs.get("config") or transformers.AutoConfig.from_pretrained(name, **about))
    loader = kind or transformers.AutoModel
    # its report of the weights is a line of its log, which not everyone sees
    tells = loader is transformers.AutoModel or issubclass(loader, transformers.PreTrainedModel)
    try:
        model = loader.from_pretrained(name, **host_kwargs, **({"output_loading_info": True} if tells else {}))
    except RuntimeError as error:
        if "ignore_mismatched_sizes" in str(error):  # says only that something does not fit
            _require_shapes(name, host_kwargs)
        raise
    if tells:
        model, report = model
        tell(name, type(model).__name__, report["missing_keys"], () if chosen else report["unexpected_keys"])
    with contextlib.suppress(UnsupportedModelError, ReferenceError):
        _SOURCES[model] = (name, subject(model).geometry, {k: v for k, v in host_kwargs.items() if k in HUB})
    return model


def _require_shapes(name: str, host_kwargs: dict[str, Any]) -> None:
    """Name the tensor of a directory that is of another shape than its configuration says.

    Raises:
        CheckpointError: there is one.
    """
    folder = Path(name, host_kwargs.get("subfolder") or "")
    if not folder.is_dir():
        return
    kind, config = class_of(str(folder), host_kwargs.get("config"))
    built: Any = empty(lambda: kind(config))
    try:
        shards = read_shards(folder, getattr(config, "transformers_weights", None))
    except CheckpointError:  # weights in another format, of which the library's words have to do
        return
    require_shapes(folder, placed(built, shards.entries), shards.entries)


def _require_safe(name: str, host_kwargs: dict[str, Any]) -> None:
    """Run no code of a directory or a repository unless the caller says so; without a word, transformers asks for it.

    Raises:
        CheckpointError: a configuration says what to open or run besides the model it describes.
    """
    host_kwargs.setdefault("trust_remote_code", False)
    require_safe_source(name, host_kwargs)


def build(name: str, **host_kwargs: Any) -> nn.Module:
    """By the configuration alone; further arguments are fields of it."""
    import transformers

    _require_safe(name, host_kwargs)
    require_model(name, host_kwargs)
    kind = _given_class(host_kwargs)
    making: dict[str, Any] = {
        k: host_kwargs.pop(k) for k in ("dtype", "torch_dtype", "attn_implementation") if k in host_kwargs
    }
    config = host_kwargs.pop("config", None)
    unknown: dict[str, Any] = {}
    if config is None:
        config, unknown = transformers.AutoConfig.from_pretrained(name, return_unused_kwargs=True, **host_kwargs)
    unknown = {k: v for k, v in unknown.items() if k not in HUB}
    if unknown:
        raise UnsupportedModelError(f"the configuration of {name} has no {', '.join(unknown)}")
    kind = kind or named_class(config)
    if kind is not None:
        return kind._from_config(config, **making).eval()
    if "trust_remote_code" in host_kwargs:
        making["trust_remote_code"] = host_kwargs["trust_remote_code"]
    return transformers.AutoModel.from_config(config, **making).eval()


def _given_class(host_kwargs: dict[str, Any]) -> Any:
    """The class that ``model_class=`` chooses, as a class or by its name."""
    import transformers

    kind = host_kwargs.pop("model_class", None)
    if not isinstance(kind, str):
        return kind
    found = getattr(transformers, kind, None)
    if found is None:
        raise UnsupportedModelError(f"transformers has no class {kind!r}")
    return found


def repository(name: str) -> tuple[str, str] | None:
    """Every name is one on the hub."""
    return name, "config.json"


def save(model: nn.Module, directory: Path, final: Path, **extras: Any) -> None:
    """Write what ``from_pretrained`` reads.

    Args:
        model: the model.
        directory: where to.
        **extras: ``processor``, an image, video or feature processor, or one that holds some, which is saved beside
            the model with sizes that fit it. Processors and tokenizers beside the checkpoint that the model was
            loaded from come along, the processors with sizes that fit. The rest is ``save_pretrained``'s.
    """
    require_no_adapter(
        final, "name another directory, or move the adapter away, for adapters are merged in what is saved"
    )
    processor = extras.pop("processor", None)
    live, model = model, _as_written(model)
    model.save_pretrained(str(directory), **{"state_dict": _untied(model), **extras})  # type: ignore[operator]
    _require_loads(model, directory)
    source, old = _source(live)
    new = subject(live).geometry
    if source is not None:
        if old is None:
            old = _saved_geometry(str(source))
        whole = processor is not None and hasattr(processor, "attributes")  # holds what the source's files say
        beside = [p for p in travelling(source, NAME) if not (whole and p.name in processors.FILES)]
        for path in beside:
            copy_within(path, source, directory / path.name)
        for file, text in processors.texts(source, old, new).items():
            if (directory / file).is_file() and not (directory / file).is_symlink():
                (directory / file).write_text(text, encoding="utf-8")
    if processor is not None:
        processors.follow(processor, old, new).save_pretrained(str(directory))
    if source is not None and _names_code(directory):
        for path in sorted(source.glob("*.py")):
            if path.is_file() and not (directory / path.name).exists():
                copy_within(path, source, directory / path.name)


def fetches(model: Any) -> bool:
    """Of a model that was loaded with a map of devices, ``save_pretrained`` brings the values back, file by file."""
    return bool({"cpu", "disk"} & set(map(str, (getattr(model, "hf_device_map", None) or {}).values())))


def _names_code(folder: Path) -> bool:
    """Whether a configuration in a directory names classes in modules beside it. Nothing of them is run here: whoever
    loads the directory asks for it with ``trust_remote_code``."""
    for path in folder.glob("*.json"):
        with contextlib.suppress(CheckpointError):
            named = read_json(path).get("auto_map")
            values = list(named.values()) if isinstance(named, dict) else []
            classes = [c for value in values for c in (value if isinstance(value, list) else [value])]
            if any(isinstance(c, str) and "--" not in c for c in classes):
                return True
    return False


def _as_written(model: nn.Module) -> nn.Module:
    """The model as what is written has to describe it: under names that transformers takes, with as many layers, and
    as many classes."""
    return _with_classes(_with_depth(_under_own_names(model)))


def _with_depth(model: Any) -> Any:
    """A second name for a model from which layers were taken, whose configuration says how many there are."""
    said = {name: value for name, value in model.config.to_dict().items() if name in DEPTHS and type(value) is int}
    stacks = {len(stack) for path, stack in model.named_modules() if isinstance(stack, nn.ModuleList) and _deep(path)}
    if len(said) != 1 or len(stacks) != 1 or set(said.values()) == stacks:
        return model
    result = copy.copy(model)
    result.config = copy.deepcopy(model.config)
    setattr(result.config, *said, *stacks)
    return result


def _deep(path: str) -> bool:
    """Whether a list of modules at a path is the model's stack, and none within a layer of it."""
    return path.rpartition(".")[2] in ("layer", "layers", "blocks") and not any(p.isdigit() for p in path.split("."))


def _with_classes(model: Any) -> Any:
    """A second name for a model whose head was replaced, whose configuration says how many classes that has.

    What the head is called, and whether it has one class more than it tells, is seen where the configuration's own
    number of classes makes other shapes: that number is taken with which none is left.
    """

    def others(config: Any) -> set[tuple[str, int]]:
        """Tensors of another shape, and how many rows the model's have more."""
        built = shapes_of(empty(lambda: make(type(model), config)))
        common = {name for name in live if name in built and live[name] != built[name]}
        return {(name, _rows(live, name) - _rows(built, name)) for name in common | (built.keys() ^ live.keys())}

    with contextlib.suppress(Exception):  # not to be built, of which `_require_loads` has to do
        live = shapes_of(model)
        more = {rows for _, rows in others(copy.deepcopy(model.config))}
        told = model.config.num_labels
        for classes in {told + rows for rows in more} if len(more) == 1 else ():
            config = copy.deepcopy(model.config)
            config.num_labels = classes  # and their names: those that it has are of other classes
            if classes >= 0 and not others(copy.deepcopy(config)):
                result = copy.copy(model)
                result.config = config
                return result
    return model


def _rows(shapes: Shapes, name: str) -> int:
    return (shapes.get(name) or (0,))[0]


def _untied(model: nn.Module) -> dict[str, Tensor] | None:
    """A state dict with copies where a user tied what transformers does not tie itself, which it would not write;
    ``None`` where there is nothing of the kind."""
    own = set(getattr(model, "all_tied_weights_keys", None) or ()) | set(
        getattr(model, "_tied_weights_keys", None) or ()
    )
    state = plain_state(model, f"transformers' {type(model).__name__}")
    seen: dict[tuple[Any, ...], str] = {}
    shared = set()
    for name, tensor in state.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)
        if name not in own and tensor.numel() and not tensor.is_meta and seen.setdefault(place, name) != name:
            shared.add(name)
    if not shared:
        return None
    return {name: tensor.clone() if name in shared else tensor for name, tensor in state.items()}


def _under_own_names(model: nn.Module) -> nn.Module:
    """The model as something that is written under names that transformers takes by itself.

    It writes the names that a checkpoint had when it was loaded, also where a caller's ``key_mapping`` or the loader of
    adapters had translated them, whom nobody asks the next time.
    """
    used = getattr(model, "_weight_conversions", None)
    if not used:
        return model
    from transformers.conversion_mapping import get_model_conversion_mapping

    live: Any = model
    known = [_translates(conversion) for conversion in get_model_conversion_mapping(live)]
    if all(_translates(conversion) in known for conversion in used):
        return model
    result = copy.copy(model)  # of the module alone: the live one keeps what it remembers
    del vars(result)["_weight_conversions"]
    return result


def _translates(conversion: Any) -> tuple[Any, ...]:
    """From which names to which."""
    return type(conversion), conversion.source_patterns, conversion.target_patterns


def _source(model: nn.Module) -> tuple[Path | None, Geometry | None]:
    """The directory that a model was loaded from, and its geometry then, as far as they are known."""
    name, old, about = _SOURCES.get(model, (str(getattr(model.config, "_name_or_path", "") or ""), None, {}))
    if not name:
        return None, old
    folder = Path(name, about.get("subfolder", ""))
    if folder.is_dir():
        return folder, old
    from huggingface_hub import snapshot_download

    about = {k: v for k, v in about.items() if k in WHERE}
    with contextlib.suppress(Exception):  # no such repository, or no network: then what the cache holds is all there is
        return Path(snapshot_download(name, allow_patterns=list(FORMATS[NAME].beside), **about)), old
    with contextlib.suppress(Exception):
        return Path(snapshot_download(name, **{**about, "local_files_only": True})), old
    return None, old


def _require_loads(model: Any, directory: Path) -> None:
    """What transformers builds from the written configuration has to take the written tensors."""

    def build() -> nn.Module:
        return make(type(model), type(model.config).from_pretrained(str(directory)))

    def names(built: Any) -> dict[str, tuple[int, ...]]:
        tied = getattr(built, "all_tied_weights_keys", None) or {}  # not written, where they are one with another
        state = {name: tensor for name, tensor in built.state_dict().items() if name not in tied}
        return {name: tuple(tensor.shape) for name, tensor in in_files(built, model, state).items()}

    def packed(built: Any) -> list[str]:
        layers = packed_layers(model, built)
        state = {name: tensor for name, tensor in built.state_dict().items() if name.rpartition(".")[0] in layers}
        return sorted({name.rpartition(".")[0] for name in in_files(built, model, state)})

    require_rebuilds(directory, model, build, f"transformers' {type(model).__name__}", names, optional, packed)


def _saved_geometry(name: str) -> Geometry | None:
    """The geometry of the checkpoint in a directory, without its weights."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        kind: Any = named_class(config) or transformers.AutoModel
        return subject(empty(lambda: make(kind, config))).geometry
    except (OSError, ValueError, AttributeError, UnsupportedModelError):
        return None
