"""The house: which room may know which, how large a room may be, and where facts about a host may stand."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "anypatch"
SOURCES = sorted(ROOT.rglob("*.py"))
HOSTS = ("timm", "transformers", "open_clip", "torchvision", "diffusers", "structural")

# Each room, and the rooms that it may import. Within a room everything may import everything that is not above it.
MAY_IMPORT = {
    "version": set(),
    "errors": set(),
    "core": {"errors"},
    "files": {"errors", "core"},
    "report": {"errors", "core", "version"},
    "hosts": {"errors", "core", "files", "version"},
    "adaptation": {"errors", "core", "hosts"},
    "proof": {"errors", "core", "hosts", "adaptation"},
    "inspection": {"errors", "core", "hosts", "adaptation"},
    "sources": {"errors", "core", "files", "hosts", "adaptation", "version"},
    "conversion": {"errors", "core", "files", "hosts", "adaptation", "sources", "report", "version"},
    "measure": {"errors", "core", "files", "hosts", "adaptation", "sources", "report", "version"},
    "tuning": {"errors", "core", "files", "hosts", "adaptation", "sources", "report", "measure", "version"},
    "flexibility": {"errors", "core", "hosts", "adaptation"},
    "demo": {"errors", "core", "hosts", "adaptation", "measure", "report", "proof", "version"},
}
# Hosts that hold another's towers.
HOLDS = {"open_clip": {"timm"}, "transformers": {"timm"}}
MAX_FILE, MAX_FUNCTION, MAX_POSITIONAL = 400, 45, 8
PUBLIC_VERBS = {"adapt", "at", "check", "convert", "load", "save", "sweep", "tune", "flexible"}
# What is longer than the limits, each with its reason.
LONGER_FILES: dict[str, str] = {}
LONGER_FUNCTIONS: dict[str, str] = {}


def room(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, for types only left out."""
    for node in _running(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "anypatch":
            if node.module == "anypatch":
                yield from (f"anypatch.{alias.name}" for alias in node.names)
            else:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "anypatch")


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _running(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_go_one_way(path: Path) -> None:
    here = room(path)
    if here in ("__init__", "__main__", "cli"):
        return  # the face and the command line may know everyone
    for name in imports(path):
        there = name.split(".")[1]
        allowed = MAY_IMPORT[here] | {here}
        if there == "__version__":
            there = "version"
        assert there in allowed, f"{here} imports {name}"
        if here == there == "hosts" and len(path.relative_to(ROOT).parts) > 2:
            own, other = path.relative_to(ROOT).parts[1], name.split(".")[2]
            if own in HOSTS and other in HOSTS and other != own:
                assert other in HOLDS.get(own, set()), f"hosts/{own} imports {name}"


def test_core_knows_torch_alone() -> None:
    allowed = {"torch", "numpy", "accelerate", "anypatch", *sys.stdlib_module_names}
    for path in (ROOT / "core").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_host_libraries_are_imported_inside_functions(path: Path) -> None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module]
        for name in names:
            assert name.split(".")[0] not in {
                "timm",
                "transformers",
                "open_clip",
                "torchvision",
                "diffusers",
                "peft",
            }, name


def test_no_module_shadows_the_standard_library() -> None:
    for path in SOURCES:
        assert path.stem not in sys.stdlib_module_names or path.stem in {"__init__", "__main__"}, path


def test_no_function_hides_its_module() -> None:
    import anypatch

    for path in ROOT.iterdir():
        name = path.stem
        if path.suffix == ".py" or path.is_dir():
            assert name not in anypatch.__all__, name


def test_files_and_functions_keep_their_size() -> None:
    found = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        shown = str(path.relative_to(ROOT))
        lines = len(text.splitlines())
        if lines > MAX_FILE and shown not in LONGER_FILES:
            found.append(f"{shown}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            size = _lines_of_code(node, text)
            if size > MAX_FUNCTION and f"{shown}:{node.name}" not in LONGER_FUNCTIONS:
                found.append(f"{shown}:{node.name}: {size} lines of code")
            arguments = len(node.args.posonlyargs) + len(node.args.args)
            if arguments > MAX_POSITIONAL and node.name not in PUBLIC_VERBS:
                found.append(f"{shown}:{node.name}: {arguments} positional parameters")
    assert not found, "\n".join(found)


def _lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef, text: str) -> int:
    """Of a function's body: no blank lines, comments or docstring."""
    lines = text.splitlines()
    docstring = set()
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        docstring = set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    body = range(function.body[0].lineno, (function.end_lineno or 0) + 1)
    return sum(
        1 for i in body if i not in docstring and lines[i - 1].strip() and not lines[i - 1].strip().startswith("#")
    )


def test_no_host_is_named_in_a_comparison_outside_its_folder() -> None:
    found = []
    for path in SOURCES:
        if room(path) == "hosts":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Compare):
                continue
            texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            if any(text in {*HOSTS, "generic"} for text in texts):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found, found


def test_no_pattern_over_model_types_outside_facts() -> None:
    for path in (ROOT / "hosts").rglob("*.py"):
        if path.stem == "facts":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not re.search(r"re\.\w+\([^)]*model_type", line), f"{path.relative_to(ROOT)}:{number}"


def test_numbers_that_decide_have_their_reason() -> None:
    """A constant that holds a number says beside it, or above, why it is this one."""
    bare = []
    for path in SOURCES:
        lines = path.read_text(encoding="utf-8").splitlines()
        tree = ast.parse("\n".join(lines))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for node in [*tree.body, *(inner for holder in classes for inner in holder.body)]:
            if not isinstance(node, (ast.Assign, ast.AnnAssign)) or not _decides(node) or path.stem == "facts":
                continue
            said = (
                "#" in "".join(lines[node.lineno - 1 : node.end_lineno]) or lines[node.lineno - 2].lstrip()[:1] == "#"
            )
            if not said:
                bare.append(f"{path.relative_to(ROOT)}:{node.lineno}: {lines[node.lineno - 1].strip()}")
    assert not bare, bare


def _decides(node: ast.Assign | ast.AnnAssign) -> bool:
    """Whether a constant by its name holds a number."""
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    if not isinstance(target, ast.Name) or not target.id.isupper() or node.value is None:
        return False
    constants = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
    return any(isinstance(value, (int, float)) and not isinstance(value, bool) for value in constants)


def test_no_constructor_is_exchanged() -> None:
    """Other threads build their models meanwhile."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign):
                names = [target.attr for target in node.targets if isinstance(target, ast.Attribute)]
                assert "__init__" not in names, f"{path.relative_to(ROOT)}:{node.lineno}"
