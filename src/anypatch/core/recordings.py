"""What a forward pass leaves behind in a module or a hook: results that the next pass writes anew.

They have the present number of tokens, and nothing depends on them. What is written before it is read is told from a
table or a cache (``if self.cache is None``) by the order of the instructions in the code.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import dis
import functools
import itertools
import re
import types
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

# Methods that run in a forward pass; what others write (``__init__`` and what it calls) may be a table.
RUNNING = re.compile(r"forward|__call__|(^|_)(save|record|store|hook)")
FILLING = ("append", "appendleft", "add", "extend", "insert", "setdefault", "update", "__setitem__")
KEYS = ("LOAD_", "FORMAT_", "BUILD_STRING", "CONVERT_VALUE")
NOISE = ("CACHE", "RESUME", "PUSH_NULL", "EXTENDED_ARG", "COPY_FREE_VARS", "MAKE_CELL")
CONTAINERS = (dict, list, tuple, set, deque)
DEPTH = 3  # of containers in what is recorded: a list for each layer in a dictionary by name
HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
CALLED = (
    *(len, int, float, range, tuple, list, isinstance, min, max, sum, round, abs, zip, enumerate, type, dict, bool),
    *(getattr, hasattr, sorted, reversed, slice, any, all, str, AssertionError, ValueError, RuntimeError),
)
MAKING = ("CALL", "BUILD_", "DICT_", "LIST_")  # instructions whose result a function has made
SET, FILLED = "set", "filled"
ENDS = ("POP_JUMP", "JUMP", "STORE_", "POP_TOP", "RETURN")  # of a statement
_SIZED: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()
_KNOWN: weakref.WeakKeyDictionary[type, dict[str, str]] = weakref.WeakKeyDictionary()


def recorded(kind: type) -> dict[str, str]:
    """Attributes that a class's forward pass sets before it reads them, or that it first puts something into.

    Examples:
        >>> class Attention(nn.Module):
        ...     def forward(self, x):
        ...         self.weights = x.softmax(-1)
        ...         return self.weights @ x
        >>> recorded(Attention)
        {'weights': 'set'}
    """
    if kind not in _KNOWN:
        found: dict[str, str] = {}
        for base in kind.__mro__:
            for name, value in vars(base).items():
                if base not in nn.Module.__mro__ and RUNNING.search(name):
                    found.update(pair for code in _codes(value) for pair in _written(code))
        _KNOWN[kind] = found
    return _KNOWN[kind]


def sized(kind: type) -> frozenset[str]:
    """Attributes that a class's forward pass, or a method that it calls, sets to something else than it had made of it.

    What it makes of them (a counter) it reads in the assignment.

    Examples:
        >>> class Window(nn.Module):
        ...     def forward(self, x):
        ...         self.calls = self.calls + 1
        ...         self.shrink(x.shape[1])
        ...     def shrink(self, tokens):
        ...         if tokens <= self.window_size:
        ...             self.window_size = tokens
        >>> sized(Window)
        frozenset({'window_size'})
    """
    if kind not in _SIZED:
        found = set()
        for code in codes_from(kind, "forward"):
            steps = [step for step in dis.get_instructions(code) if step.opname not in NOISE]
            for i, step in enumerate(steps):
                assigned = itertools.takewhile(lambda other: not other.opname.startswith(ENDS), reversed(steps[:i]))
                if step.opname == "STORE_ATTR" and not any(other.argval == step.argval for other in assigned):
                    found.add(step.argval)
        _SIZED[kind] = frozenset(found)
    return _SIZED[kind]


def codes_from(kind: type, entry: str) -> Iterator[types.CodeType]:
    """The code of a class's method, and of the methods that it calls."""
    own = {name: value for base in reversed(_own(kind)) for name, value in vars(base).items()}
    names = deque([entry])
    while names:
        for code in _codes(own.pop(names.popleft(), None)):
            yield code
            names.extend(code.co_names)


def _codes(function: Any, depth: int = 0) -> Iterator[types.CodeType]:
    """A function's code, and that of the function that it decorates."""
    if not isinstance(function, types.FunctionType) or depth > DEPTH:
        return
    yield function.__code__
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not filled yet
            yield from _codes(cell.cell_contents, depth + 1)


def _own(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if base not in nn.Module.__mro__]


def written_by(hook: Any) -> dict[str, str]:
    """The same of a hook: variables that it closes over, and attributes of the object that it belongs to."""
    hook = hook.func if isinstance(hook, functools.partial) else hook
    called = next((vars(kind)["__call__"] for kind in type(hook).__mro__ if "__call__" in vars(kind)), None)
    code = getattr(hook, "__code__", getattr(called, "__code__", None))
    return {} if code is None else dict(_written(code))


def is_pure(hook: Any) -> bool:
    """Whether a hook is a function that leaves nothing behind: it writes into nothing but what it is given or makes,
    and calls nothing but torch, records of results and functions like itself.

    Examples:
        >>> is_pure(lambda module, inputs: (inputs[0] * 2,)), is_pure(lambda *inputs: print(inputs))
        (True, False)
    """
    hook = hook.__func__ if isinstance(hook, types.MethodType) and isinstance(hook.__self__, nn.Module) else hook
    if not isinstance(hook, types.FunctionType):
        return False
    defaults = len(hook.__defaults__ or ()) + len(hook.__kwdefaults__ or ())
    return _is_pure(hook.__code__, hook.__globals__, () if defaults else _arguments(hook.__code__))


def called_by(hook: types.FunctionType, depth: int = 0) -> Iterator[types.CodeType]:
    """The code of a function that is pure, and of those of the user's that it calls."""
    yield hook.__code__
    for name in hook.__code__.co_names:
        found = hook.__globals__.get(name)
        if isinstance(found, types.FunctionType) and depth < DEPTH and not _is_of_torch(found):
            yield from called_by(found, depth + 1)


def _arguments(code: types.CodeType) -> tuple[str, ...]:
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _is_pure(code: types.CodeType, names: dict[str, Any], given: tuple[str, ...] = (), depth: int = 0) -> bool:
    steps = [step for step in dis.get_instructions(code) if step.opname not in NOISE]
    own = _own_values(steps, given)
    for i, step in enumerate(steps):
        if step.opname.startswith(("STORE_ATTR", "STORE_DEREF", "STORE_GLOBAL", "DELETE_GLOBAL", "DELETE_ATTR")):
            return False
        if step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR") and not (
            i > 1 and steps[i - 1].opname.startswith(("LOAD_CONST", "LOAD_SMALL")) and _loaded(steps[i - 2]) in own
        ):
            return False
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval in FILLING and _loaded(steps[i - 1]) not in own:
            return False
        if step.opname == "LOAD_GLOBAL" and not _is_harmless(
            names.get(step.argval, getattr(builtins, step.argval, None)), depth
        ):
            return False
    return all(
        _is_pure(constant, names, (), depth) for constant in code.co_consts if isinstance(constant, types.CodeType)
    )


def _own_values(steps: list[dis.Instruction], given: tuple[str, ...]) -> set[str]:
    """Variables that hold what a function was given, or has made itself."""
    stored: dict[str, list[bool]] = {}
    for before, step in itertools.pairwise(steps):
        if step.opname == "STORE_FAST":
            stored.setdefault(step.argval, []).append(before.opname.startswith(MAKING))
    return {name for name in {*given, *stored} if all(stored.get(name, ()))}


def _loaded(step: dis.Instruction) -> str:
    """The variable that an instruction loads last."""
    if not step.opname.startswith("LOAD_FAST"):
        return ""
    return str(step.argval[-1] if isinstance(step.argval, tuple) else step.argval)


def _is_of_torch(found: Any) -> bool:
    module = getattr(found, "__module__", None) if not isinstance(found, types.ModuleType) else found.__name__
    return str(module).partition(".")[0] in ("torch", "math", "einops")


def _is_harmless(found: Any, depth: int) -> bool:
    """Whether a global may be called: of torch, a record, or a function that leaves nothing behind either."""
    if found in CALLED or _is_of_torch(found):
        return True
    if isinstance(found, type):
        return dataclasses.is_dataclass(found) or issubclass(found, (dict, tuple))
    return (
        isinstance(found, types.FunctionType)
        and depth < DEPTH
        and _is_pure(found.__code__, found.__globals__, (), depth + 1)
    )


def left_behind(module: nn.Module) -> set[str]:
    """Names of a module's attributes that hold nothing but what its last forward pass recorded."""
    how = recorded(type(module))
    found = set()
    for name in how.keys() & vars(module).keys():
        value = vars(module)[name]
        if how[name] == SET if isinstance(value, Tensor) else any(True for _ in _tensors(value)):
            found.add(name)
    return found


def results(root: nn.Module) -> Iterator[Tensor]:
    """Tensors in attributes and hooks that were computed with gradients: they cannot be copied as they are."""
    for module in root.modules():
        held: list[Any] = [value for name, value in vars(module).items() if name not in ("_parameters", "_modules")]
        hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
        held += [vars(owner) for hook in hooks if hasattr(owner := getattr(hook, "__self__", hook), "__dict__")]
        yield from (tensor for value in held for tensor in _tensors(value) if tensor.grad_fn is not None)


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, CONTAINERS) and depth <= DEPTH:
        for item in list(value.values() if isinstance(value, dict) else value):
            yield from _tensors(item, depth + 1)


def _written(code: types.CodeType) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    steps = [step for step in dis.get_instructions(code) if step.opname not in NOISE]
    for i, step in enumerate(steps):
        name = step.argval
        if not isinstance(name, str) or not step.opname.endswith(("_ATTR", "_DEREF", "_METHOD")) or name in seen:
            continue
        seen.add(name)
        if step.opname in ("STORE_ATTR", "STORE_DEREF"):
            yield name, SET
        elif step.opname.startswith("LOAD") and _fills(steps[i + 1 :]):
            yield name, FILLED
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _written(constant)


def _fills(steps: list[dis.Instruction]) -> bool:
    """Whether what was just loaded is put something into: ``x[key] = ...``, ``x.append(...)``."""
    if steps and steps[0].opname in ("LOAD_ATTR", "LOAD_METHOD"):
        return steps[0].argval in FILLING
    key = next((i for i, step in enumerate(steps) if not step.opname.startswith(KEYS)), len(steps))
    return 0 < key < len(steps) and steps[key].opname == "STORE_SUBSCR"
