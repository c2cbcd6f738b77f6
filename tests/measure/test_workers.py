"""Worker processes and signals: an interruption is heard once, whenever it comes, and leaves nobody behind."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,  # each starts a process that imports torch
    pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="workers are forked elsewhere only"),
]

# Sixteen images of one colour each, decoded by two processes.
SETUP = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from anypatch.measure.decoding import decode

images = SimpleNamespace(load=lambda index: np.full((8, 8, 3), index, dtype=np.uint8))
preprocess = SimpleNamespace(view=lambda image, size: image, channels=3)
batches = [[i, i + 1] for i in range(0, 16, 2)]

def children():
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]

def interrupted(number=signal.SIGINT):
    done = []
    def once():
        if not done:
            done.append(True)
            signal.raise_signal(number)
    return once
"""


def _said(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", SETUP + code], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.split()


def test_ctrl_c_while_a_worker_is_forked_is_heard() -> None:
    """Python swallows what is raised in the callbacks of a fork: the sweep ran on."""
    code = """
os.register_at_fork(after_in_parent=interrupted())
try:
    print(sum(len(batch.indices) for batch in decode(images, preprocess, (8, 8), batches, 2)))
except KeyboardInterrupt:
    print("heard")
print(len(children()))
"""
    assert _said(code) == ["heard", "0"]


@pytest.mark.parametrize("moment", ["before", "after_in_parent"])
def test_what_another_signal_raises_is_heard_as_well(moment: str) -> None:
    code = f"""
def ended(number, frame):
    raise SystemExit(128 + number)
signal.signal(signal.SIGTERM, ended)
os.register_at_fork({moment}=interrupted(signal.SIGTERM))
try:
    print(sum(len(batch.indices) for batch in decode(images, preprocess, (8, 8), batches, 2)))
except SystemExit as error:
    print(error.code)
print(len(children()), signal.getsignal(signal.SIGTERM) is ended)
"""
    assert _said(code) == ["143", "0", "True"]


def test_workers_leave_ctrl_c_to_their_parent() -> None:
    """A terminal sends it to all of them."""
    code = """
count = 0
for batch in decode(images, preprocess, (8, 8), batches, 2):
    for pid in children() if not count else ():
        os.kill(pid, signal.SIGINT)
    count += len(batch.indices)
print(count)
"""
    assert _said(code) == ["16"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_what_ends_all_processes_at_once_is_said_by_the_parent(name: str) -> None:
    """Workers heard it first, and torch told of their death with a traceback."""
    code = f"""
number = signal.{name}
def ended(number, frame):
    raise SystemExit(128 + number)
signal.signal(number, ended)
import time
def slow(index):
    time.sleep(0.1)
    return np.full((8, 8, 3), index, dtype=np.uint8)
images.load = slow
try:
    for batch in decode(images, preprocess, (8, 8), batches, 2):
        for pid in children():
            os.kill(pid, number)
        time.sleep(0.5)
        os.kill(os.getpid(), number)
except SystemExit as error:
    print(error.code - number)
import gc
gc.collect()
print(len(children()))
"""
    assert _said(code) == ["128", "0"]


def test_a_thread_of_the_callers_decodes_as_well() -> None:
    """No signals are handled there."""
    code = """
import threading
def work():
    print(sum(len(batch.indices) for batch in decode(images, preprocess, (8, 8), batches, 2)))
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    assert _said(code) == ["16"]
