"""What is active around a call: switched off inside it, for the calling thread alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import overrides
from torch.utils._python_dispatch import _disable_current_modes

# Kinds of devices whose autocast torch can be asked about; others have none in a release that we support.
AUTOCAST = ("cpu", "cuda", "mps", "xpu")


@contextlib.contextmanager
def _without_modes() -> Iterator[None]:
    """Lay the calling thread's TorchFunctionModes and TorchDispatchModes aside: whoever watches or changes what torch
    computes (FakeTensorMode, a profiler's, a user's) means the model, not the arithmetic in here."""
    laid = []
    while overrides._len_torch_function_stack():
        laid.append(overrides._pop_mode())
    try:
        with _disable_current_modes():
            yield
    finally:
        for mode in reversed(laid):
            overrides._push_mode(mode)


@contextlib.contextmanager
def _without_transforms() -> Iterator[None]:
    """Lay torch.func's transforms (``grad``, ``vmap``, ``functionalize``) aside, which wrap each tensor that is made
    while they run: a model that keeps one would not outlive them."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        yield


@contextlib.contextmanager
def _without_compiling() -> Iterator[None]:
    """Keep torch.compile away from what a compiled function calls in here: it would trace modes that it does not know,
    and the model is changed once, not each time that the trace runs. As ``torch.compiler.disable``, which imports the
    compiler, a second, for who does not compile."""
    from torch._C._dynamo.eval_frame import set_eval_frame

    compiling = set_eval_frame(None)
    try:
        yield
    finally:
        set_eval_frame(compiling)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Run a block as if neither autocast nor inference mode nor a default device nor any mode, transform or compiler of
    torch were active.

    Only switches that belong to the calling thread are turned. The default dtype is the process's, so it stays as it
    is, and whoever creates a tensor says in which dtype. Gradients are recorded again where the block does not turn
    them off, as leaving inference mode does.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_compiling())
        stack.enter_context(_without_transforms())
        stack.enter_context(_without_modes())
        grad = torch.is_grad_enabled() or torch.is_inference_mode_enabled()
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        for kind in AUTOCAST:
            with contextlib.suppress(RuntimeError):  # a kind that this build of torch does not have
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        yield
