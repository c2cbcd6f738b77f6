"""Processes that share the work, from their start to their end."""

from __future__ import annotations

import os
import subprocess
import sys

from builders import free_port

SCRIPT = """
import atexit, sys
import torch

def told():  # registered first, so run last
    print("a group is left" if torch.distributed.is_initialized() else "no group is left")

atexit.register(told)
if sys.argv[1] == "theirs":
    torch.distributed.init_process_group("gloo")
from anypatch.measure.processes import Team
team = Team("cpu")
team = Team("cpu")
print(team.gather(team.rank), team.lead(lambda: team.size))
"""


def ran(whose: str) -> list[str]:
    around = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    around |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, whose],
            env={**around, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    return [process.communicate(timeout=200)[0] for process in started]


def test_the_group_that_a_team_began_ends_with_its_process() -> None:
    """Gloo's threads abort a process that ends while they wait, one time in three; a launcher calls that a failure."""
    assert ran("ours") == ["[0, 1] 2\nno group is left\n"] * 2


def test_a_group_that_was_there_is_its_owners() -> None:
    assert ran("theirs") == ["[0, 1] 2\na group is left\n"] * 2
