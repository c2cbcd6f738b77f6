"""The documentation: every public name has its place in the reference, every page its place in the navigation."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import anypatch

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Errors are documented as one module; the version is a string.
TOGETHER = {"AnypatchError", "CheckpointError", "DataError", "GeometryError", "UnsupportedModelError", "__version__"}


def _resolve(path: str):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name, None)


def test_the_reference_holds_every_public_name():
    entries = re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(), re.M)
    documented = {id(_resolve(entry)) for entry in entries}
    assert "anypatch.errors" in entries
    missing = [
        name for name in anypatch.__all__ if name not in TOGETHER and id(getattr(anypatch, name)) not in documented
    ]
    assert not missing


def test_every_public_name_says_what_it_is():
    silent = []
    for name in anypatch.__all__:
        value = getattr(anypatch, name)
        if name != "__version__" and not (value.__doc__ or "").strip():
            silent.append(name)
    assert not silent


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page():
    listed = set(re.findall(r": ([\w/.-]+\.(?:md|ipynb))$", (ROOT / "mkdocs.yml").read_text(), re.M))
    pages = {str(path.relative_to(DOCS)) for path in [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]}
    assert listed == pages


def test_links_between_pages_lead_somewhere():
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(DOCS)} links to {target}"


def test_notebooks_were_executed_and_did_not_fail():
    for path in (DOCS / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert cells
        assert all(cell["execution_count"] for cell in cells), f"{path.name} was not executed: make site"
        assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
