"""Builds the documentation: executes the notebooks, then `mkdocs build`: `make site`.

    python tools/build_site.py                # site/; fails on a notebook that fails, a dead link, or a missing anchor
    python tools/build_site.py --serve        # the same, served on loopback

Notebooks are executed where they stand, so that their outputs are those of the code that the repository holds; they
are kept as long as they are small.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "docs" / "notebooks"
LARGEST_OUTPUT = 64_000  # characters of one notebook with its outputs: a table and a line or two each


def execute(path: Path) -> None:
    """Run a notebook in a fresh kernel and keep its outputs.

    Raises:
        SystemExit: its outputs are too large to keep.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of execution, which would change at every build
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                output["text"] = ""
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    text = nbformat.writes(notebook)
    if len(text) > LARGEST_OUTPUT:
        raise SystemExit(f"{path.name} would be {len(text)} characters with its outputs; at most {LARGEST_OUTPUT}")
    path.write_text(text + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--no-notebooks", action="store_true", help="leave the notebooks as they were executed last")
    options = parser.parse_args()
    if not options.no_notebooks:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        for path in sorted(NOTEBOOKS.glob("*.ipynb")):
            print(f"executing {path.name}", flush=True)
            execute(path)
    command = [sys.executable, "-m", "mkdocs", "serve" if options.serve else "build"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
