"""What is active around a call: switched off inside it, for the calling thread alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# Kinds of devices whose autocast torch can be asked about; others have none in a release that we support.
AUTOCAST = ("cpu", "cuda", "mps", "xpu")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Run a block as if neither autocast nor inference mode nor a default device were active.

    Only switches that belong to the calling thread are turned. The default dtype is the process's, so it stays as it
    is, and whoever creates a tensor says in which dtype. Gradients are recorded again where the block does not turn
    them off, as leaving inference mode does.
    """
    with contextlib.ExitStack() as stack:
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
