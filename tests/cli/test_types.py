"""What a type checker makes of the public names, from the installed package's own hints (`py.typed`)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import anypatch

SNIPPET = """
import torch
from torch import nn
import anypatch
from anypatch.adaptation import adapt
from anypatch.sources import load

class Net(nn.Module):
    extra: int = 1

reveal_type(adapt(Net(), 16))
reveal_type(load("timm:vit"))
reveal_type(load("transformers:x", 16, image_size="nearest", model_class=Net))
adapt(Net(), 16, "near")
"""


@pytest.mark.slow
def test_adapt_and_load_keep_the_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mypy import api

    assert (Path(anypatch.__file__).parent / "py.typed").is_file()
    (tmp_path / "snippet.py").write_text(SNIPPET)
    options = ["--python-executable", sys.executable, "--ignore-missing-imports", "--follow-imports=silent"]
    monkeypatch.setenv("MYPYPATH", str(Path(anypatch.__file__).parents[1]))
    said, _, _ = api.run([*options, str(tmp_path / "snippet.py")])
    revealed = [line.split('"')[1] for line in said.splitlines() if "Revealed type" in line]
    assert revealed == ["snippet.Net", "torch.nn.modules.module.Module", "snippet.Net"], said
    assert 'Argument 3 to "adapt"' in said, said
