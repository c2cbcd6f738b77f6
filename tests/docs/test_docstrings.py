"""Examples in docstrings: every one runs, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import anypatch
from tests.builders import image_folder

PROGRAMS = ("anypatch.__main__",)  # runs the command line when it is imported


def _examples() -> Iterator[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    for found in pkgutil.walk_packages(anypatch.__path__, "anypatch."):
        if found.name not in PROGRAMS:
            yield from finder.find(importlib.import_module(found.name), found.name)


EXAMPLES = [example for example in _examples() if example.examples]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name.removeprefix("anypatch."))
def test_an_example_says_what_comes_out(
    example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that has ``photos``, as the reader's may."""
    image_folder(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANYPATCH_CACHE", str(tmp_path / "cache"))
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    said: list[str] = []
    failed = doctest.DocTestRunner(optionflags=flags, verbose=False).run(example, out=said.append).failed
    assert not failed, "".join(said)


@pytest.mark.parametrize("name", [name for name in anypatch.__all__ if name != "__version__"])
def test_a_public_name_has_an_example(name: str) -> None:
    thing = getattr(anypatch, name)
    assert ">>>" in (thing.__doc__ or ""), f"anypatch.{name} has no example"


@pytest.mark.parametrize("name", [name for name in anypatch.__all__ if inspect.isclass(getattr(anypatch, name))])
def test_what_a_public_class_offers_is_said(name: str) -> None:
    thing = getattr(anypatch, name)
    offered = [
        a
        for a, value in vars(thing).items()
        if not a.startswith("_") and (callable(value) or hasattr(value, "__get__"))
    ]
    assert not [a for a in offered if not inspect.getdoc(getattr(thing, a))]
