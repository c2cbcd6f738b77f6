"""A forward pass without memory or arithmetic, before anything is changed: which shapes a model returns.

The stage is a tree of shells (as for views) with stores of their own, on which a plan's steps are carried out; it runs
on the meta device, where tensors have shapes and no values. Neither the model nor its buffers, caches and hooks take
part, so nothing of them changes.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from anypatch.core.geometry import Size
from anypatch.core.modes import about, mapped, tensors_in
from anypatch.core.outputs import named_tensors
from anypatch.core.plan import Plan
from anypatch.core.shells import SHARED, Shells
from anypatch.core.steps import SetAttribute, SetBuffer, SetModule, SetParameter
from anypatch.core.traces import Trace

IMAGES = re.compile("pixel|image|img")  # begins the name of what a forward pass takes an image by
META = torch.device("meta")
RUN = ("_forward_hooks", "_forward_pre_hooks")
HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_kwargs", "_called")))


class NoStageError(Exception):
    """A model that cannot be rehearsed: it runs something that was compiled from itself."""


def staged(root: nn.Module, plan: Plan | None = None, keep: Callable[[Any], bool] = lambda hook: False) -> nn.Module:
    """A model that shares the tensors of ``root`` and nothing else, as it would be after ``plan``.

    Of its hooks it has those that ``keep`` names: others may leave something behind.

    Recorded programs, which are no Python that could run on other tensors, are copied.

    Raises:
        NoStageError: part of it is no Python that could run on other tensors.
    """
    shells = Shells()
    made = {}
    programs: set[int] = set()
    for source in root.modules():
        if "_orig_mod" in source._modules:
            raise NoStageError(type(source).__name__)
        if isinstance(source, torch.jit.ScriptModule) and id(source) not in programs:
            shells.remember(source, copy.deepcopy(source).eval())
            programs |= {id(module) for module in source.modules()}
    sources = [source for source in root.modules() if id(source) not in programs]
    for source in sources:
        made[id(source)] = shells.shell(source)
    for source in sources:
        fields = vars(made[id(source)])
        for store in SHARED:
            fields[store] = dict(vars(source)[store])
        fields["_parameters"] = {name: without_memory(p) for name, p in source._parameters.items()}
        for name in HOOKS:
            fields[name] = type(fields[name])()
        for name in RUN:
            kept = {key: hook for key, hook in getattr(source, name).items() if keep(hook)}
            fields[name].update({key: shells.rebound(hook) for key, hook in kept.items()})
            told = vars(source)[f"{name}_with_kwargs"]
            fields[f"{name}_with_kwargs"].update({key: told[key] for key in kept if key in told})
        fields["training"] = False  # not eval(), which exported programs refuse
    for step in [] if plan is None else plan.steps:
        if isinstance(step, SetParameter):
            for source in sources:
                for name, parameter in source._parameters.items():
                    if parameter is step.parameter:
                        made[id(source)]._parameters[name] = without_memory(step.data)
        elif isinstance(step, SetBuffer):
            replace(step, module=made[id(step.module)]).apply()
        elif isinstance(step, SetModule):
            replace(step, parent=made[id(step.parent)]).apply()
        elif isinstance(step, SetAttribute) and id(step.module) in made:
            replace(step, module=made[id(step.module)], value=shells.rebound(step.value)).apply()
    return made[id(root)]


def shapes(
    stage: nn.Module,
    call: Callable[[nn.Module, Any], Any],
    size: Sequence[int],
    dtype: torch.dtype,
    trace: Trace | None = None,
) -> dict[str, tuple[int, ...]]:
    """What ``call(stage, pixels)`` returns for pixels of a size; ``trace`` is filled on the way.

    Raises:
        Exception: whatever the model raises; also where it asks for values that are not there.
    """
    trace = Trace() if trace is None else trace
    with Shapes(trace), Indices(trace), torch.no_grad():
        pixels = torch.zeros(tuple(size), dtype=dtype, device=META)
        trace.starts(pixels)
        return {name: tuple(tensor.shape) for name, tensor in named_tensors(call(stage, pixels))}


class Door:
    """How a model is fed: through its forward pass, or through a part of it (a tower of two), before which what the
    model's own hooks make of its images is made of them as well.

    Args:
        call: what feeds it.
    """

    def __init__(self, call: Callable[[nn.Module, Any], Any]) -> None:
        self.call = call
        self._ways: list[Callable[[nn.Module, Any], Any]] | None = None

    def __call__(self, stage: nn.Module, pixels: Any) -> Any:
        if not stage._forward_pre_hooks:
            return self.call(stage, pixels)
        entered = []
        handle = stage.register_forward_pre_hook(lambda *_: entered.append(True), prepend=True)
        try:
            result = self.call(stage, pixels)
        finally:
            handle.remove()
        if entered:
            return result
        if self._ways is None:  # the first time, at the present geometry, at which they run
            ways: list[Callable[[nn.Module, Any], Any]] = [_by_name, _in_order]
            self._ways = [way for way in ways if not _fails(way, stage, pixels)][:1]
        return self.call(stage, self._ways[0](stage, pixels)) if self._ways else result


def _by_name(stage: nn.Module, pixels: Any) -> Any:
    """What a model's hooks make of an image that is given by its name."""
    name = _of_images(stage)
    return _hooked(stage, (), {name: pixels})[1][name]


def _in_order(stage: nn.Module, pixels: Any) -> Any:
    """The same of one that is given in its place."""
    place = list(inspect.signature(stage.forward).parameters).index(_of_images(stage))
    return _hooked(stage, (*[None] * place, pixels), {})[0][place]


def _hooked(stage: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """What a model's hooks make of what its forward pass is given, as ``nn.Module`` calls them."""
    for key, hook in stage._forward_pre_hooks.items():
        if key in stage._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(stage, args, kwargs) or (args, kwargs)
            continue
        result = hook(stage, args)
        if result is not None:
            args = result if isinstance(result, tuple) else (result,)
    return args, kwargs


def _of_images(stage: nn.Module) -> str:
    return next(name for name in inspect.signature(stage.forward).parameters if IMAGES.match(name))


def _fails(way: Callable[[nn.Module, Any], Any], stage: nn.Module, pixels: Any) -> bool:
    try:
        return not isinstance(way(stage, pixels), Tensor)
    except Exception:
        return True


def watch(stage: nn.Module, stride: Size) -> dict[str, Size]:
    """Filled, while the stage runs, with the height and width of what each convolution of a stride returns."""
    seen: dict[str, Size] = {}
    for path, module in stage.named_modules():
        if isinstance(module, _ConvNd) and tuple(module.stride) == stride:

            def note(_: nn.Module, inputs: Any, output: Any, path: str = path) -> None:
                seen[path] = tuple(output.shape[2:])

            module.register_forward_hook(note)
    return seen


class Shapes(TorchDispatchMode):
    """Whatever meets a tensor without memory has none either; other tensors are computed with, and not written to."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        result = self._run(func, args, kwargs)
        self.trace.note(about(func), args, kwargs, result)
        return result

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        inputs = list(tensors_in((args, kwargs)))
        if not about(func).written and not any(tensor.is_meta for tensor in inputs):
            return func(*args, **kwargs)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": META}
        return func(*mapped(_on_meta, args), **mapped(_on_meta, kwargs))


class Unmasked(TorchDispatchMode):
    """Masks without values are taken to be true everywhere: every image is one, every patch is seen.

    For models that are known to be fed like this; of others nothing can be told where they ask for a mask's values.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = about(func).name
        if name == "nonzero" and args[0].is_meta:
            return torch.ones(args[0].shape).nonzero()
        if name == "_local_scalar_dense" and args[0].is_meta and args[0].dtype is torch.bool:
            return True
        if name in ("index", "index_put", "index_put_"):
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        return func(*args, **(kwargs or {}))


def _places(index: Any) -> Sequence[Any]:
    """What a mask picks, an index for each of its axes; another index as it is. They have values: what is picked of
    real numbers are real ones."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.bool, torch.uint8):
        return (index,)
    return (torch.ones(index.shape) if index.is_meta else index).nonzero().unbind(1)


class Indices(TorchFunctionMode):
    """Tells a trace of ``tensor[index]`` as it is written."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        self.trace.indexed(*args)
        self.trace.indexing = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.trace.indexing = False


def _on_meta(value: Any) -> Any:
    """A tensor without its memory."""
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)


def without_memory(tensor: Tensor | None) -> nn.Parameter | None:
    """A parameter of a tensor's shape on the meta device; a whole one, where the tensor is sharded."""
    if tensor is None:
        return None
    if hasattr(tensor, "device_mesh"):
        return nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype, device=META), requires_grad=False)
    return nn.Parameter(torch.empty_like(tensor, device=META), requires_grad=False)
