"""Where a live model's tensors lie and who else holds them: what cannot be exchanged there is refused by name."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from anypatch.errors import UnsupportedModelError

# Classes that took addresses or shapes of the parameters when they were made, and what to do instead. torch makes
# subclasses of a module's own class of some of them, when the module is wrapped in place.
WRAPPERS = {
    "DistributedDataParallel": "its gradient buckets keep the old shapes: adapt the model inside it, then wrap it",
    "DDP": "its gradient buckets keep the old shapes: adapt the model, then replicate it",
    "ReplicateModule": "its shards keep the old shapes: adapt the model, then replicate it",
    "FullyShardedDataParallel": "its flat parameters keep the old shapes: adapt the model inside it, then wrap it",
    "FSDPModule": "its shards keep the old shapes: adapt the model, then shard it",
}
SHARDED = "adapt the model, then shard it"
# What writing a model needs, where its values are not here or not its own.
GATHER = (
    "gather its values (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True), load "
    "them into a model that is not sharded, and save that"
)
FETCH = "bring the model into memory before saving it"
# What to do about a tensor that is no plain one, by what it is.
ADAPTING = {
    "shard": f": {SHARDED}",
    "fake": ": adapt the model itself, outside of FakeTensorMode",
    "layout": ": adapt the model with a dense tensor (tensor.to_dense()) in its place",
    "lazy": ": run the model once before adapting it",
}
SAVING = {
    "shard": f": {GATHER}",
    "fake": ": save the model itself, outside of FakeTensorMode",
    "layout": ", which no library's format holds: put a dense tensor (tensor.to_dense()) in its place before saving",
    "lazy": ": run the model once before saving it",
}


@dataclass(frozen=True)
class Touched:
    """A parameter or buffer that will change, and where it is."""

    name: str
    module: nn.Module
    tensor: Tensor


def require_unsharded(model: nn.Module) -> None:
    """A model that was sharded as a whole is no longer its own class, and cannot be copied: said before all else.

    Raises:
        UnsupportedModelError: names how it is sharded and in which order things work.
    """
    for kind in type(model).__mro__:
        if kind.__name__ in ("FSDPModule", "FullyShardedDataParallel") and kind.__module__.startswith("torch."):
            raise UnsupportedModelError(f"the model is sharded ({type(model).__name__}): {SHARDED}")


def require_fed(model: nn.Module) -> None:
    """No layer waits for its first input to tell its shapes: nothing could be said of them.

    Raises:
        UnsupportedModelError: one does; the message names it.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            _require_plain(name, tensor, ADAPTING)


def require_gathered(model: nn.Module) -> None:
    """What is to be written is of its own class, and no part of it is a shard's.

    Raises:
        UnsupportedModelError: names the layer and what to do first.
    """
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        kinds = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch.")}
        if kinds & {"FSDPModule", "FullyShardedDataParallel"}:
            raise UnsupportedModelError(f"{path or 'the model'} is sharded ({type(module).__name__}): {GATHER}")
        if not path and kinds & WRAPPERS.keys():
            raise UnsupportedModelError(
                f"the model is a {type(module).__name__}, which its library does not build: load its state_dict into a "
                f"model that is not replicated, and save that"
            )


def require_here(model: nn.Module, lent: bool = False) -> None:
    """All values that are to be written are in memory, whole.

    Args:
        model: what will be written, without wrappers around it.
        lent: whether whoever writes it fetches offloaded values itself.

    Raises:
        UnsupportedModelError: names the tensor and what to do first.
    """
    offloaded = {module for above, kind in _hooked(model) if kind == "loads" for module in above}
    for path, module in model.named_modules():
        buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **buffers}.items():
            title = f"{path}.{name}" if path else name
            if tensor is None or (lent and tensor.is_meta):
                continue
            if tensor.is_meta and module in offloaded:
                raise UnsupportedModelError(f"{title} is offloaded, a hook of accelerate keeps its values: {UNHOOK}")
            _require_written(title, tensor)


UNHOOK = f"{FETCH} (accelerate.hooks.remove_hook_from_module(model, recurse=True), or load it without device_map)"


def _require_written(name: str, tensor: Tensor) -> None:
    """A tensor has values, all of them: what a quantiser keeps in other tensors, its library writes."""
    _require_plain(name, tensor, SAVING)
    if tensor.is_meta:
        raise UnsupportedModelError(f"{name} is on the meta device, which holds no values: {FETCH}")


def _require_plain(name: str, tensor: Tensor, advice: dict[str, str]) -> None:
    """A tensor is not a part of others, and holds numbers one after the other.

    Args:
        advice: what to do about each kind (``SAVING``, ``ADAPTING``).
    """
    if hasattr(tensor, "device_mesh") and hasattr(tensor, "placements"):
        kind, what = "shard", f"sharded over a device mesh ({type(tensor).__name__})"
    elif getattr(tensor, "_is_flat_param", False):
        kind, what = "shard", "a flat parameter of several layers"
    elif any(base.__name__ == "FakeTensor" for base in type(tensor).__mro__):
        kind, what = "fake", "a FakeTensor, which has no values"
    elif is_lazy(tensor):
        kind, what = "lazy", "of a layer that has not been fed yet, and takes its shape from its first input"
    elif tensor.layout != torch.strided:
        kind, what = "layout", f"stored as {tensor.layout}"
    else:
        return
    raise UnsupportedModelError(f"{name} is {what}{advice[kind]}")


def require_movable(root: nn.Module, touched: list[Touched], part: nn.Module | None, shared: bool) -> None:
    """Nobody but the model itself may hold what changes, and it has to be here whole.

    Args:
        root: the object that the user holds.
        touched: what changes.
        part: what is one model in it, if that is known: a layer strictly inside is that model's alone.
        shared: whether the tensors are only read (by a view), so that others may hold them.

    Raises:
        UnsupportedModelError: names the tensor, who holds it, and in which order things work.
    """
    ids = {id(item.tensor) for item in touched}
    for path, module in [] if shared else root.named_modules():
        why = _wrapping(module)
        if why is not None and any(id(p) in ids for p in module.parameters()):
            raise UnsupportedModelError(f"{path or 'the model'} is a {type(module).__name__}, and {why}")
    hooked = list(_hooked(root))
    for item in touched:
        require_values(item.name, item.tensor)
        if item.tensor.is_meta and any(item.module in above for above, _ in hooked):
            raise UnsupportedModelError(
                f"{item.name} is offloaded, a hook puts it in place when the layer runs: {ADVICE}"
            )
        for above, kind in hooked:
            if kind == "copies" and item.module in above:
                raise UnsupportedModelError(
                    f"{item.name} is offloaded, its group keeps a copy of it elsewhere: {ADVICE}"
                )
    if not shared:
        _require_own(root, touched, part)
        _require_no_flat(root, touched)


ADVICE = "adapt the model before offloading it (before device_map, dispatch_model, cpu_offload or disk_offload)"


def _wrapping(module: nn.Module) -> str | None:
    """Why parameters below a module may not change their shapes."""
    kinds = (kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch."))
    return next((WRAPPERS[name] for name in kinds if name in WRAPPERS), None)


def require_values(name: str, tensor: Tensor) -> None:
    """A tensor that is to be resampled has its own values, all of them, as plain numbers in its memory.

    Raises:
        UnsupportedModelError: it is a shard or a part of others, it is kept in other tensors, or it has no values; the
            message says in which order things work.
    """
    _require_plain(name, tensor, ADAPTING)
    try:
        tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{name} is a {type(tensor).__name__}, which keeps its values in other tensors: adapt the model first, "
            f"then quantize or convert it"
        ) from error


def _hooked(root: nn.Module) -> Iterator[tuple[set[nn.Module], str]]:
    """(modules, kind) for every module with a hook that may exchange its tensors when it runs."""
    for module in root.modules():
        if "_hf_hook" in vars(module):  # accelerate's; the weights of children come from it, too
            yield set(module.modules()), "loads"
        registry = vars(module).get("_diffusers_hook")
        if registry is not None and "group_offloading" in getattr(registry, "hooks", {}):
            yield set(module.modules()), "copies"


def _require_own(root: nn.Module, touched: list[Touched], part: nn.Module | None) -> None:
    """No module outside of ``root`` holds a parameter that changes, and none wraps the root for training.

    Asked of Python's garbage collector, which knows every dictionary that holds an object: one pass over all objects,
    about 50 ms for a million.
    """
    parameters = {id(t.tensor): t for t in touched if isinstance(t.tensor, nn.Parameter)}
    inside = {id(store) for module in root.modules() for store in (module._parameters, module._modules)}
    layers = _layers(root, touched)
    found = _outside(parameters, layers, inside, root, part)
    if found is not None:  # perhaps only by a model that is already gone
        gc.collect()
        found = _outside(parameters, layers, inside, root, part)
    if found is not None:
        raise UnsupportedModelError(found)


def _require_no_flat(root: nn.Module, touched: list[Touched]) -> None:
    """No larger tensor that somebody holds lies under a parameter that changes: a flat buffer of all of them, which an
    optimizer steps or a process group reduces, would go on without it."""
    below = {}
    here = Counter(address for p in root.parameters() if (address := _address(p)))
    for item in touched:
        if isinstance(item.tensor, nn.Parameter) and not item.tensor.is_meta and not item.tensor.is_quantized:
            storage = item.tensor.untyped_storage()
            # of one parameter alone, it is what that was read from: a table of which a model takes a part
            if storage.nbytes() > item.tensor.numel() * item.tensor.itemsize and here[_address(item.tensor)] > 1:
                below[_address(item.tensor)] = item
    if not below:
        return
    own = {id(parameter) for parameter in root.parameters()}
    for held in gc.get_objects():
        if not issubclass(type(held), Tensor) or id(held) in own or held.is_meta or held.layout != torch.strided:
            continue
        beneath = below.get(_address(held))
        if beneath is not None and held.numel() > beneath.tensor.numel():
            raise UnsupportedModelError(
                f"{beneath.name} is a part of a tensor of shape {tuple(held.shape)} that is held besides, as flat "
                f"buffers of parameters are: adapt the model, then flatten its parameters"
            )


def _address(tensor: Tensor) -> int:
    """Of a tensor's memory; 0 where it has none of its own, as tensors that wrap others."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _layers(root: nn.Module, touched: list[Touched]) -> dict[int, tuple[str, nn.Module, type]]:
    """The modules through which the root reaches what changes: path, module, and the class of what holds it."""
    found: dict[int, tuple[str, nn.Module, type]] = {}
    paths = {id(module): path for path, module in root.named_modules()}
    for item in touched:
        parent = root
        for name in filter(None, paths.get(id(item.module), "").split(".")):
            child = parent.get_submodule(name)
            found[id(child)] = (paths[id(child)], child, type(parent))
            parent = child
    return found


def _outside(
    parameters: dict[int, Touched],
    layers: dict[int, tuple[str, nn.Module, type]],
    inside: set[int],
    root: nn.Module,
    part: nn.Module | None,
) -> str | None:
    """Why something may not change, or None."""
    below = set() if part is None else {id(module) for module in part.modules()} - {id(part)}
    objects = [*(item.tensor for item in parameters.values()), *(module for _, module, _ in layers.values())]
    strangers: dict[int, tuple[dict[Any, Any], Any]] = {}
    for holder in gc.get_referrers(*objects, root):
        if not isinstance(holder, dict) or id(holder) in inside:  # an OrderedDict, before torch 2.5
            continue
        for key, value in list(holder.items()):
            if id(value) in parameters or id(value) in layers or (value is root and key == "module"):
                strangers[id(holder)] = (holder, value)
    if not strangers:
        return None
    for owner in _owners([holder for holder, _ in strangers.values()]):
        if id(owner._parameters) in strangers and not _lists(owner, parameters):
            return _shared(parameters[id(strangers[id(owner._parameters)][1])].name, "a parameter", owner)
        if id(owner._modules) not in strangers:
            continue
        value = strangers[id(owner._modules)][1]
        path, _, kind = layers.get(id(value), ("", None, None))
        # two modules that hold one whole model only use it; one that has tables of its own beside a stem does not, and
        # neither does one that holds a layer from inside of a model (of rotary models, which have no tables)
        other = id(value) in below or any(p is not None for p in owner._parameters.values())
        if kind is type(owner) and other and _same(owner, value):
            return _shared(path, "a layer", owner)
        why = _wrapping(owner)
        if why is not None and value is root:
            return f"the model is inside a {type(owner).__name__}, and {why}"
    return None


def _same(owner: nn.Module, held: nn.Module) -> bool:
    """Whether both are of one library."""
    return type(owner).__module__.partition(".")[0] == type(held).__module__.partition(".")[0]


def _shared(name: str, what: str, owner: nn.Module) -> str:
    return (
        f"{name} is also {what} of a {type(owner).__name__} outside of the model, which would change with it: adapt a "
        f"copy (copy.deepcopy), or the model that holds both"
    )


def _lists(owner: nn.Module, parameters: dict[int, Touched]) -> bool:
    """Whether a module is but a list of the model's parameters, as optimizers and averages keep them."""
    held = {id(parameter) for parameter in owner.parameters(recurse=False)}
    return isinstance(owner, (nn.ParameterList, nn.ParameterDict)) and held >= parameters.keys()


def _owners(holders: Iterable[dict[Any, Any]]) -> list[nn.Module]:
    """The modules whose parameters or children are kept in these dictionaries."""
    holders = list(holders)
    wanted = {id(holder) for holder in holders}
    found: dict[int, nn.Module] = {}
    states = [s for s in gc.get_referrers(*holders) if isinstance(s, (dict, nn.Module))]
    candidates = [s for s in states if isinstance(s, nn.Module)]
    dictionaries = [s for s in states if type(s) is dict and s.keys() >= {"_parameters", "_modules"}]
    if dictionaries:
        candidates += [m for m in gc.get_referrers(*dictionaries) if isinstance(m, nn.Module)]
    for module in candidates:
        if {id(module._parameters), id(module._modules)} & wanted:
            found[id(module)] = module
    return list(found.values())


def kept(new: Tensor, live: Tensor) -> Tensor:
    """``new`` in the memory format that ``live`` has, and in shared memory if it is, and no inference tensor."""
    if live.is_meta or new.is_meta:
        return new
    if new.is_inference() or new.untyped_storage().data_ptr() == live.untyped_storage().data_ptr():
        new = new.clone()
    form = _format(live)
    if form is not None and new.ndim == live.ndim:
        new = new.contiguous(memory_format=form)
    if live.device.type == "cpu" and live.is_shared() and not new.is_shared():
        new = new.contiguous(memory_format=form or torch.contiguous_format).share_memory_()
    return new


def _format(live: Tensor) -> torch.memory_format | None:
    if live.is_contiguous():
        return torch.contiguous_format
    for ndim, form in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if live.ndim == ndim and live.is_contiguous(memory_format=form):
            return form
    return None
