"""Builds the wheel and the source archive, checks them, and tries them in fresh environments: `make dist`.

    python tools/check_dist.py             # what the distributions need is linked from this environment
    python tools/check_dist.py --real      # what they need is installed by pip, as a user's machine would

Torch alone has gigabytes, so that a fresh environment gets links to the packages of this one: exactly those that the
wheel's own metadata requires, followed from requirement to requirement, without extras in one environment and with
`[all]` in another. An import that is promised to nobody fails there as it would for a user.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

# Needs torch alone, as a user who has only that may have it.
WITHOUT = """
import sys, torch, anypatch
from torch import nn

class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_size, self.img_size = 4, 16
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, 8))
        self.norm = nn.LayerNorm(8)
    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.norm(x)

assert "site-packages" in anypatch.__file__, anypatch.__file__
model = anypatch.adapt(ViT(), 8, keep="grid")
assert anypatch.geometry(model).patch_size == (8, 8)
assert anypatch.check(ViT(), 8).passed
try:
    anypatch.load("timm:vit_tiny_patch16_224")
except anypatch.UnsupportedModelError as error:
    assert "pip install 'anypatch[timm]'" in str(error), error
else:
    raise SystemExit("timm was found where nobody installed it")
"""
WITH = """
import anypatch, timm
model = anypatch.load("timm:test_vit", 8, pretrained=False)
assert anypatch.check(timm.create_model("test_vit"), 32).passed
"""


def run(*command: str | Path, **options: object) -> None:
    """A command that has to succeed, outside of the repository."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    print("+", " ".join(map(str, command)), flush=True)
    subprocess.run([str(c) for c in command], check=True, env={**environment, "HF_HUB_OFFLINE": "1"}, **options)  # type: ignore[call-overload]


def build(place: Path) -> tuple[Path, Path]:
    """The wheel and the source archive."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", place, ROOT)
    (wheel,), (archive,) = place.glob("*.whl"), place.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, archive)
    return wheel, archive


def required(wheel: Path, extras: set[str]) -> set[str]:
    """Names of the installed distributions that the wheel requires, and those they require."""
    with zipfile.ZipFile(wheel) as file:
        name = next(n for n in file.namelist() if n.endswith(".dist-info/METADATA"))
        text = file.read(name).decode()
    first = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("Requires-Dist: ")]
    found: set[str] = set()
    waiting = [(r, extras) for r in first]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement, asked = waiting.pop()
        parsed = Requirement(requirement)
        if parsed.marker and not any(parsed.marker.evaluate({"extra": e}) for e in asked or {""}):
            continue
        name, more = canonicalize_name(parsed.name), frozenset(parsed.extras)
        if (name, more) in seen:
            continue
        seen.add((name, more))
        if name == "anypatch":
            waiting += [(r, set(more)) for r in first]
            continue
        found.add(name)
        waiting += [(r, set(more)) for r in metadata.distribution(name).requires or ()]
    return found


def link(names: set[str], site: Path) -> None:
    """Links to what distributions of this environment installed; folders that several share are linked once."""
    for name in names:
        distribution = metadata.distribution(name)
        base = Path(str(distribution.locate_file("")))
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if (base / top).exists() and not (site / top).exists():
                (site / top).symlink_to(base / top)


def environment(place: Path, wheel: Path, extra: str, real: bool) -> Path:
    """The Python of a fresh environment with the wheel in it."""
    venv.create(place, with_pip=True, clear=True)
    python = place / ("Scripts" if os.name == "nt" else "bin") / "python"
    if real:
        run(python, "-m", "pip", "install", "-q", f"{wheel}[{extra}]" if extra else wheel)
        return python
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
    link(required(wheel, {extra} if extra else set()), next(place.glob("lib/python*/site-packages")))
    return python


def try_out(python: Path, extra: str, place: Path) -> None:
    """What a user does first."""
    program = python.with_name("anypatch")
    run(program, "--version", cwd=place)
    run(python, "-c", WITH if extra else WITHOUT, cwd=place)
    if extra:
        run(program, "check", "timm:test_vit", "--patch-size", "32", cwd=place)
        run(
            program,
            "adapt",
            "timm:test_vit",
            "-o",
            "pretrained=False",
            "--patch-size",
            "32",
            "--output",
            "new",
            cwd=place,
        )


def test_archive(archive: Path, place: Path) -> None:
    """The tests are in the archive and run from it: all are collected, those of the command line run."""
    with tarfile.open(archive) as file:
        file.extractall(place, filter="data")
    (folder,) = place.iterdir()
    source = {**os.environ, "PYTHONPATH": str(folder / "src"), "HF_HUB_OFFLINE": "1"}
    pytest = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-m", ""]
    for arguments in (["--collect-only", "-qq"], ["tests/cli/test_nearest.py", "tests/core/test_geometry.py"]):
        print("+ pytest", *arguments, flush=True)
        quiet = {"stdout": subprocess.DEVNULL} if "--collect-only" in arguments else {}
        subprocess.run([*pytest, *arguments], check=True, cwd=folder, env=source, **quiet)  # type: ignore[call-overload]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", action="store_true", help="install what is needed by pip")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)
    wheel, archive = build(options.output)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for extra in ("", "all"):
            python = environment(place / f"env-{extra}", wheel, extra, options.real)
            try_out(python, extra, place)
        (place / "archive").mkdir()
        test_archive(archive, place / "archive")
    print(f"{wheel.name} and {archive.name} are in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
