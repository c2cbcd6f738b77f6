"""Where a run stands, on disk: written whole or not at all, read without running anything."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.errors import CheckpointError
from anypatch.files.atomic import replacing_file
from anypatch.files.paths import require_folder
from anypatch.tuning.weights import Weights, kept, put_back, trained

FILE = "tuning.safetensors"
RESULT = "tune.json"  # of a run that came to its end
PROBE = ".anypatch-tune"  # written and removed at once, to see that a folder can be written
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW remembers of a parameter
Curve = list[tuple[int, dict[str, float]]]  # step, held-out fidelity by patch size


@dataclass
class State:
    """Where a run stands.

    Attributes:
        step, steps: done, and in all.
        peak: the learning rate at its highest.
        average: the moving average of the weights.
        curve: the held-out fidelity so far.
        tensors: weights and optimizer's moments that a resumed run begins with.
        scaler: the gradient scaler's, for fp16.
    """

    steps: int
    peak: float
    average: Weights
    step: int = 0
    curve: Curve = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
        """Put the weights and the moments back, if this state is one that was resumed."""
        if not self.tensors:
            return
        put_back(model, {name: self.tensors[f"weights/{name}"] for name in trained(model)})
        for name, parameter in trained(model).items():
            moments = {m: self.tensors[f"{m}/{name}"] for m in MOMENTS if f"{m}/{name}" in self.tensors}
            if moments:
                optimizer.state[parameter] = {
                    m: t.clone() if m == "step" else t.to(parameter, copy=True) for m, t in moments.items()
                }
        if self.scaler:
            scaler.load_state_dict(self.scaler)
        self.tensors = {}


@dataclass(frozen=True)
class Checkpoint:
    """The file of a run, in the folder of its output; nothing is written where there is none.

    Args:
        folder: where.
        key: what a resumed run has to agree on.
    """

    folder: Path | None
    key: Mapping[str, Any]

    def write(self, state: State, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
        if self.folder is None:
            return
        from safetensors.torch import save

        tensors = {f"weights/{name}": value for name, value in kept(model).items()}
        tensors |= {f"average/{name}": value for name, value in state.average.items()}
        for name, parameter in trained(model).items():
            held = optimizer.state.get(parameter, {})
            tensors |= {f"{m}/{name}": held[m] for m in MOMENTS if m in held}
        said = {
            "key": dict(self.key), "step": state.step, "steps": state.steps, "peak": state.peak, "curve": state.curve,
            "scaler": scaler.state_dict(),
        }  # fmt: skip
        content = save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, {"run": json.dumps(said)})
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing_file(self.folder / FILE) as file:
            file.write(content)

    def read(self, model: nn.Module) -> State | None:
        """The state to go on from; ``None`` where there is none.

        Raises:
            CheckpointError: it is another run's, or damaged.
        """
        if self.folder is None or not (self.folder / FILE).is_file():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / FILE, "pt") as file:
                said = json.loads((file.metadata() or {})["run"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            average = {name: tensors.pop(f"average/{name}") for name in trained(model)}
            state = State(
                int(said["steps"]),
                float(said["peak"]),
                {
                    name: value.to(p.device)
                    for (name, value), p in zip(average.items(), trained(model).values(), strict=True)
                },
                int(said["step"]),
                [(int(step), {str(k): float(v) for k, v in looked.items()}) for step, looked in said["curve"]],
                tensors,
                dict(said["scaler"]),
            )
            same = all(_fits(n, p, tensors, average) for n, p in trained(model).items())
            differs = [name for name, value in self.key.items() if said["key"].get(name) != value]
        except (
            *(SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError),
            *(OverflowError, RecursionError, RuntimeError),
        ) as error:
            raise CheckpointError(f"{self.folder / FILE} is damaged: {type(error).__name__}: {error}") from error
        if differs or not same:
            raise CheckpointError(
                f"{self.folder / FILE} is of another run ({', '.join(differs) or 'weights'}): start without resume"
            )
        return state

    def remove(self) -> None:
        """The run is over."""
        if self.folder is not None:
            (self.folder / FILE).unlink(missing_ok=True)


def _fits(name: str, parameter: nn.Parameter, tensors: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> bool:
    """Whether all that is said of a parameter has its shape: its values, their average, the optimizer's moments."""
    held = [tensors[f"weights/{name}"], average[name]]
    held += [tensors[f"{m}/{name}"] for m in MOMENTS if m != "step" and f"{m}/{name}" in tensors]
    return all(tensor.shape == parameter.shape for tensor in held)


def require_output(output: Path, resume: bool, overwrite: bool) -> None:
    """Found out before the work; nothing is left where nothing was.

    Raises:
        CheckpointError: it is a file, cannot be written, or holds a tuned model that was not to be replaced.
    """
    require_folder(output)
    if (output / RESULT).exists() and not overwrite and not (resume and (output / FILE).exists()):
        raise CheckpointError(
            f"{output} holds a tuned model already: name another place, or pass overwrite to replace it"
        )
    made = [above for above in (output, *output.parents) if not above.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        with replacing_file(output / PROBE) as file:
            file.write(b"")
        (output / PROBE).unlink()
    except OSError as error:
        raise CheckpointError(f"cannot write to {output}: {error.strerror or error}") from error
    finally:
        for above in made:
            with contextlib.suppress(OSError):
                above.rmdir()
