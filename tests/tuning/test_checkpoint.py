"""Where a run stands, changed by somebody: the run, or one error of ours."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from anypatch.errors import CheckpointError
from anypatch.tuning.checkpoint import FILE, Checkpoint, State
from anypatch.tuning.weights import kept
from tests.files.fuzzing import mutate


def _state(folder: Path) -> tuple[Checkpoint, nn.Module]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint = Checkpoint(folder, {"seed": 0, "lora": None})
    state = State(10, 1e-3, kept(model), 1, [(0, {"16": 0.5})])
    checkpoint.write(state, model, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    return checkpoint, model


def test_a_changed_state_is_read_or_refused(tmp_path: Path) -> None:
    checkpoint, model = _state(tmp_path)
    good = (tmp_path / FILE).read_bytes()
    assert checkpoint.read(model) is not None
    chance, refused = random.Random(0), 0
    for _ in range(300):
        (tmp_path / FILE).write_bytes(mutate(good, [good], chance))
        try:
            state = checkpoint.read(model)
            assert state is not None
            assert all(state.average[n].shape == p.shape for n, p in model.named_parameters())
        except CheckpointError:
            refused += 1
    assert 100 < refused < 300


@pytest.mark.parametrize("steps", ["1e999", "NaN", '"x"', "[]", "[" * 100_000])
def test_odd_numbers(tmp_path: Path, steps: str) -> None:
    checkpoint, model = _state(tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / FILE)
    said = (
        f'{{"key": {{"seed": 0, "lora": null}}, "step": 1, "steps": {steps}, "peak": 1, "curve": [], "scaler": {{}}}}'
    )
    save_file(tensors, tmp_path / FILE, {"run": said})
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.read(model)


def test_moments_of_another_shape(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    checkpoint, model = _state(tmp_path)
    tensors = load_file(tmp_path / FILE)
    with safe_open(tmp_path / FILE, "pt") as file:
        said = file.metadata()
    for name in ("exp_avg/weight", "average/bias"):
        save_file({**tensors, name: torch.zeros(7)}, tmp_path / FILE, said)
        with pytest.raises(CheckpointError, match="another run"):
            checkpoint.read(model)
