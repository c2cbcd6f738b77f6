"""One process or many: who does what, and how results come together. Uses accelerate only when there are many."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from anypatch.errors import AnypatchError

T = TypeVar("T")


class Team:
    """The processes that share a sweep.

    Attributes:
        rank, size: this process's number, and how many there are.
        device: where this process computes.
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank, self.size = 0, 1
        if launched or running:
            from accelerate import PartialState

            # Without being told, accelerate does not join processes that have no accelerator.
            chosen = best_device() if device is None else usable(device)
            state = PartialState(cpu=True) if chosen.type == "cpu" else PartialState()
            if not running:
                atexit.register(leave_gloo)
            self.rank, self.size = state.process_index, state.num_processes
            self.device = usable(device) if device is not None else state.device
        elif device is not None:
            self.device = usable(device)
        else:
            self.device = best_device()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, on everyone."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def lead(self, work: Callable[[], T]) -> T:
        """Work that the leader does alone; everyone gets its value, or raises its error."""
        if self.size == 1:
            return work()
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.leads:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        value, failure = broadcast_object_list(outcome, from_process=0)
        if failure is not None:
            raise failure
        return value


def leave_gloo() -> None:
    """Ends the processes' group while Python is still whole.

    Gloo's threads abort a process ("terminate called without an active exception", one of three in 12 runs) whose
    interpreter is taken down around them. NCCL's do not, and to end its group may wait for a process that failed.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def usable(device: str | torch.device) -> torch.device:
    """A device that this machine has.

    Raises:
        AnypatchError: there is no such device; the message names those that are there.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise AnypatchError(f"there is no device {str(device)!r} here: use {' or '.join(here)}") from error
    return found


def best_device() -> torch.device:
    """An accelerator if there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def decoding_workers(asked: int | None, processes: int) -> int:
    """Processes that decode images: one core is left for the model; more than eight are rarely fed by one disk."""
    if asked is not None:
        require_number(asked, "num_workers", 0)
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, (cores - 1) // processes))


def require_number(value: Any, name: str, least: int = 1) -> None:
    """Raises AnypatchError: no whole number, or too small a one."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise AnypatchError(f"{name} must be an int of at least {least}, got {value!r}")
