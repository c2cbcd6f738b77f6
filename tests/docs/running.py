"""Runs a document: its Python blocks one after the other in one namespace, its command lines as they are written.

    python tests/docs/running.py README.md           # in a temporary folder, with stand-ins for weights and files

`anypatch ...` runs in this process, as its entry point does. Of other commands only what can go stale is looked at:
`make TARGET` has to be in the Makefile, `python FILE` in the repository, an extra of `pip install` in the package.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from blocks import Block, blocks, commands  # noqa: E402


def run(path: Path, folder: Path, slow: bool = True) -> list[str]:
    """What failed, each with the document's line; nothing if all is well."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    failures = []
    os.chdir(folder)
    for block in blocks(path):
        if block.skip or (block.slow and not slow):
            continue
        if block.language == "python":
            failure = _python(path, block, namespace)
        elif block.language == "shell":
            failure = next(filter(None, map(_command, commands(block.text))), "")
        else:
            continue
        if failure:
            failures.append(f"{path.name}:{block.line}: {failure}")
    return failures


def _python(path: Path, block: Block, namespace: dict[str, object]) -> str:
    code = "\n" * (block.line - 1) + block.text  # tracebacks show the document's lines
    try:
        exec(compile(code, str(path), "exec"), namespace)
    except BaseException:
        return traceback.format_exc()
    return ""


def _command(words: list[str]) -> str:
    line = " ".join(words)
    if words[0] == "anypatch":
        return _anypatch(words[1:])
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        missing = [w for w in words[1:] if "=" not in w and w not in targets]
        return f"{line}: no such target" if missing else ""
    if words[0] in ("python", "python3"):
        return "" if (ROOT / words[1]).is_file() or words[1] == "-m" else f"{line}: no such file"
    if words[0] == "pip":
        known = set(re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
        asked = {e for extras in re.findall(r"anypatch\[([\w,-]+)\]", line) for e in extras.split(",")}
        return f"{line}: no such extra" if asked - known else ""
    if words[0] in ("git", "cd", "accelerate"):
        return ""
    return f"{line}: a command that the test of the documents does not know"


def _anypatch(arguments: list[str]) -> str:
    from anypatch import cli

    said = io.StringIO()
    with mock.patch.object(sys, "argv", ["anypatch", *arguments]), contextlib.redirect_stderr(said):
        try:
            cli.main()
        except SystemExit as ended:
            if ended.code:
                return f"anypatch {' '.join(arguments)}: exit status {ended.code}: {said.getvalue()}"
    return ""


def main() -> int:
    path = Path(sys.argv[1]).resolve()
    slow = "--fast" not in sys.argv
    with tempfile.TemporaryDirectory() as place:
        cache, folder = Path(place, "hub"), Path(place, "work")
        cache.mkdir()
        folder.mkdir()
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "ANYPATCH_CACHE": str(Path(place, "cache"))}
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
        from standins import provide

        wanted = "\n".join(b.text for b in blocks(path) if not b.skip and (slow or not b.slow))
        provide(wanted, cache, folder)
        failures = run(path, folder, slow)
    print("\n".join(failures))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
