"""Shared set-up: offline, one thread per worker, quiet host libraries."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
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


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of siblings that prove one thing again and again, the first few are fast tests and the others slow ones."""
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("siblings")
        if mark is not None:
            name = item.nodeid.partition("[")[0]
            seen[name] += 1
            if seen[name] > mark.kwargs["fast"]:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _quiet_and_repeatable() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
