"""A pytest plugin for open_clip's regression test, which compares a model with what was recorded of it before.

The library records it with a script of its own beside the test (`tests/util_test.py`). It is run here before each
test, in the same mode: the records are of adapted models where the test's models are adapted.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import util_test

if "ANYPATCH_PEERS_NAMES" in os.environ:  # the library's own way to say which models its tests run on
    os.environ["OPEN_CLIP_TEST_REG_MODELS"] = os.environ["ANYPATCH_PEERS_NAMES"]

_folder = Path(os.environ["ANYPATCH_PEERS_RESULT"]).with_suffix(".data")


def _data_dirs(make_dir: bool = True) -> tuple[str, str]:
    folders = _folder / "input", _folder / "output"
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    return str(folders[0]), str(folders[1])


util_test.get_data_dirs = _data_dirs


@pytest.fixture(autouse=True)
def _recorded(request: pytest.FixtureRequest) -> None:
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if "model_name" in parameters:
        util_test.create_test_data_for_model(parameters["model_name"], jit=parameters["jit"], overwrite=True)
