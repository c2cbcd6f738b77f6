"""The documentation: every public name has its place in the reference, every page its place in the navigation."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import anypatch
from browser import Page, find_browser

ROOT = Path(__file__).parents[2]
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


def test_a_table_ends_with_an_empty_line():
    """What follows without one is drawn as its last row."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")):
        found = re.search(r"^\|.*\n(?![|\n]).+$", page.read_text(), re.M)
        assert found is None, f"{page.name}: {found and found[0]}"


def test_examples_in_the_text_of_a_docstring_are_code():
    pytest.importorskip("griffe")
    from fences import fenced

    text = "Twice.\n\n>>> f(1)\n2\n>>> g\n\nOr so.\n\nExamples:\n    >>> f(2)\n    4\n"
    assert fenced(text) == text.replace(">>> f(1)\n2\n>>> g", "```pycon\n>>> f(1)\n2\n>>> g\n```")


def test_notebooks_were_executed_and_did_not_fail():
    for path in (DOCS / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert cells
        assert len(path.read_text()) <= 64_000, "its outputs are too large to keep"
        assert all(cell["execution_count"] for cell in cells), f"{path.name} was not executed: make site"
        assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_run(path: Path, tmp_path: Path) -> None:
    from build_site import execute

    copied = tmp_path / path.name
    copied.write_bytes(path.read_bytes())
    execute(copied)  # raises where a cell does
    cells = [cell for cell in json.loads(copied.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))


# -- the built site --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly, in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Links(HTMLParser):
    """What a page links to and loads, and the anchors that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.anchors = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found.get("id", ""), found.get("name", "")}
        if tag == "a" and "href" in found:
            self.targets.append(found["href"])
        elif tag in ("script", "img", "source", "iframe") and "src" in found:
            self.loaded.append(found["src"])
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon"):
            self.loaded.append(found["href"])


def _dead(site: Path) -> list[str]:
    pages = {path: Links(path) for path in site.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        for target in page.targets + page.loaded:
            parts = urlsplit(target)
            if parts.scheme or path.name == "404.html":  # what lies outside is not asked for by a test
                continue
            place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = place / "index.html" if place.is_dir() else place
            known = pages.get(place)
            if not place.exists() or (known is not None and unquote(parts.fragment) not in known.anchors):
                dead.append(f"{path.relative_to(site)} -> {target}")
    return dead


@pytest.mark.slow
def test_the_site_is_built_strictly_and_no_link_is_dead(site: Path, tmp_path: Path) -> None:
    reference = (site / "reference.html").read_text(encoding="utf-8")
    assert "<blockquote" not in reference  # examples are code
    assert reference.count('<span class="gp">&gt;&gt;&gt; </span>') > 40
    assert not _dead(site)
    for path in site.rglob("*.html"):  # read offline, too: nothing is loaded from elsewhere
        assert [url for url in Links(path).loaded if urlsplit(url).scheme in ("http", "https")] == []
    (tmp_path / "x.html").write_text("<a href='y.html'></a><a id='a'></a><a href='#b'></a><a href='x.html#a'></a>")
    assert _dead(tmp_path) == ["x.html -> y.html", "x.html -> #b"]


@pytest.fixture
def served(site: Path) -> Iterator[str]:
    """The site's address on loopback, as its readers get it."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="no Chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_and_say_nothing_on_the_console(served: str, width: int, dark: bool) -> None:
    with Page(width, 900, dark) as page:
        for name in ("index", "reference", "guides/tune", "guides/choose", "notebooks/choose", "coverage", "speed"):
            page.open(f"{served}/{name}.html")
            assert page.value("document.documentElement.scrollWidth") <= width, name
            scheme = page.value("document.body.getAttribute('data-md-color-scheme')")
            assert scheme == ("slate" if dark else "default"), name
        assert page.console == []
        assert [url for url in page.requests if not url.startswith((served, "blob:"))] == []
