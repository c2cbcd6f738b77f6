"""What the package says of itself: its versions, its addresses, and that the workflow's jobs run what is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")


def _release(version: str) -> tuple[int, ...]:
    """Without trailing zeros: 13 is 13.0.0."""
    parts = [int(part) for part in version.split(".")]
    while parts and not parts[-1]:
        parts.pop()
    return tuple(parts)


def test_the_lowest_versions_that_are_promised_are_those_that_are_tested() -> None:
    promises = PROJECT.partition("\ndocs = [")[0]  # tools to develop with promise nothing to users
    promised = {name.lower().replace("_", "-"): low for name, low in re.findall(r'"([\w-]+)>=([\d.]+)"', promises)}
    promised.pop("setuptools")
    lines = re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8"), re.M)
    tested = {name.lower().replace("_", "-"): version for name, version in lines}
    assert tested.keys() == promised.keys()
    for name, low in promised.items():
        assert _release(tested[name])[: len(_release(low))] == _release(low), name


def test_the_lowest_versions_are_installed_with_every_extra_of_the_users() -> None:
    table = PROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", table, re.M))
    lowest = WORKFLOW.partition("\n  lowest:\n")[2]
    installed = re.search(r"pip install -c constraints-lowest\.txt -e '\.\[([\w,-]+)\]'", lowest)
    assert installed is not None
    assert set(installed[1].split(",")) == extras - {"demo", "all", "docs", "dev"}  # demo is timm and sweep


def test_every_python_that_is_promised_is_tested() -> None:
    promised = re.findall(r"Python :: (3\.\d+)", PROJECT)
    assert "3.13" in promised
    assert re.findall(r'"(3\.\d+)"', re.search(r"python: \[(.*)\]", WORKFLOW)[1]) == promised  # type: ignore[index]


def test_the_workflow_runs_what_is_there() -> None:
    paths = re.findall(r"\b(tests/[\w/.]+)", WORKFLOW)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"run: make ([\w-]+)", WORKFLOW)) <= targets


def test_the_project_has_its_addresses() -> None:
    table = PROJECT.partition("[project.urls]")[2].partition("\n[")[0]
    found = dict(re.findall(r'^(\w+) = "(https://\S+)"$', table, re.M))
    assert found.keys() >= {"Homepage", "Documentation", "Source", "Issues", "Changelog"}
    for address in found.values():
        path = re.search(r"/(?:blob|tree)/main/(\S+)$", address)
        assert path is None or (ROOT / path[1]).exists(), address
