"""Shared set-up: offline, one thread per worker, quiet host libraries."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

for folder in ("benchmarks", "tools", "tests"):
    sys.path.insert(0, str(Path(__file__).parent.parent / folder))
warnings.filterwarnings("ignore", category=UserWarning)
# How fast the machine is says nothing about the code.
settings.register_profile("anypatch", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("anypatch")


@pytest.fixture(autouse=True)
def _quiet_and_repeatable() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
