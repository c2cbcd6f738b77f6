"""Every block of code and every command of README and docs runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from blocks import blocks, commands  # noqa: E402
from standins import open_clip_names, timm_names  # noqa: E402

DOCUMENTS = [
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
    if any(b.language in ("python", "shell") for b in blocks(path))
]


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_document_runs(document: Path) -> None:
    _run(document)


def _run(document: Path, *options: str) -> None:
    command = [sys.executable, str(HERE / "running.py"), str(document), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_blocks_are_found_with_their_lines_and_their_words(tmp_path: Path) -> None:
    document = tmp_path / "x.md"
    document.write_text(
        "# x\n```python\na = 1\n```\n<!-- test: skip needs a hundred gigabytes -->\n```\nanypatch y\n```\n"
        "<!-- test: slow -->\n```sh\nanypatch a \\\n  b   # why\n\n$ anypatch c\n```\n```json\n{}\n```\n"
    )
    one, two, three, four = blocks(document)
    assert (one.language, one.text, one.line, one.skip, one.slow) == ("python", "a = 1", 3, "", False)
    assert (two.language, two.skip) == ("shell", "needs a hundred gigabytes")
    assert three.slow
    assert list(commands(three.text)) == [["anypatch", "a", "b"], ["anypatch", "c"]]
    assert four.language == "json"


def test_a_block_is_run_with_other_words(tmp_path: Path) -> None:
    (tmp_path / "x.md").write_text("<!-- test: replace minutes=10 by steps=2 -->\n```python\ntune(minutes=10)\n```\n")
    assert [b.text for b in blocks(tmp_path / "x.md")] == ["tune(steps=2)"]


@pytest.mark.parametrize(
    "text",
    [
        "<!-- test: skip -->\n```\nx\n```\n",
        "<!-- test: replace y by z -->\n```\nx\n```\n",
        "<!-- test: replace x -->\n```\nx\n```\n",
        "```python\nx = 1\n",
    ],
)
def test_what_is_wrong_in_a_document_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.md").write_text(text)
    with pytest.raises(ValueError, match=r"x\.md"):
        blocks(tmp_path / "x.md")


@pytest.mark.slow
def test_a_document_that_fails_is_found(tmp_path: Path) -> None:
    document = tmp_path / "x.md"
    document.write_text(
        "```python\nx = 1\n```\n```python\nassert x == 2\n```\n```\nanypatch inspect missing\nmake nothing\n```\n"
        "```\nfrobnicate\n```\n```\npip install 'anypatch[none]'\n```\n"
    )
    command = [sys.executable, str(HERE / "running.py"), str(document)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    for text in ("x.md:5: ", "line 5, in <module>", "'missing' does not exist", "does not know", "no such extra"):
        assert text in done.stdout, done.stdout


def test_what_a_document_names_is_found() -> None:
    text = 'timm.create_model("vit_a.b", pretrained=True) timm:NAME timm:vit_c open_clip:A-1/x '
    text += 'create_model("B", pretrained="y")'
    assert timm_names(text) == {"vit_a.b", "vit_c"}
    assert open_clip_names(text) == {("A-1", "x"), ("B", "y")}


def test_readme_has_no_relative_links() -> None:
    """They would be broken on a package page."""
    import re

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((?!https://|#)[^)]*\)", text) == []
    for path in re.findall(
        r"\(https://(?:github\.com|raw\.githubusercontent\.com)/anypatch/anypatch/(?:blob/|tree/)?main/([^)#]+)", text
    ):
        assert (ROOT / path).exists(), path


def test_the_errors_that_troubleshooting_quotes_are_those_that_are_said() -> None:
    """The words between the values, which an ellipsis or a number stands for."""
    import ast
    import re

    said = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.add(node.value)
    text = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [row for row in re.findall(r"^\| (.*?) \|", text, re.M) if "from the host" not in row]
    quoted = [words for row in rows for words in re.findall("`([^`]* [^`]*)`", row)]
    assert len(quoted) > 5
    for words in quoted:
        for piece in re.split(r"…|\d\w*", words):
            assert any(piece.strip() in sentence for sentence in said), words


def test_contributing_names_what_exists() -> None:
    """Paths are there, every verb of the host contract stands in its room, every target of make is one."""
    import re

    from anypatch.hosts.base import MODEL, ROOMS, Host

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    source = ROOT / "src" / "anypatch"
    named = {
        re.sub(r"<\w+>", "torchvision", word) for word in re.findall(r"`([\w<>./-]+(?:/|\.py|\.md|\.toml))`", text)
    }
    assert len(named) > 30
    for name in named:
        # made by a command, or a room of a host's folder
        places = [place / name for place in (ROOT, source, source / "core", source / "hosts" / "torchvision")]
        assert any(place.exists() for place in places) or name == "docs/peers.md", name
    said = {}
    for block in re.split(r"\n\n|\n(?=\|)", text):  # rows of tables, and paragraphs
        room = next(iter(re.findall(r"all in `(\w+)\.py`", block)), "")
        for named_room, verb in re.findall(r"`(?:(\w+)\.py: )?(\w+)\(", block):
            room = named_room or room
            if room:
                said[verb] = room
    assert said == {"recognises": MODEL, "subject": MODEL, **ROOMS}
    assert all(callable(getattr(Host, verb)) for verb in said)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"(?m)(?:^|`)make ([\w-]+)", text)) <= targets
