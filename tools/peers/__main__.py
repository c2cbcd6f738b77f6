"""Runs the host libraries' own tests on adapted models, and writes what fails only because of it: `make peers`.

The source archives of the installed versions come from the package registry into `.cache/peers`; nothing of them is
kept in the repository. Every test runs once as it is and once in each mode (`peers.adapting.MODES`). A test that passes
as it is and fails on adapted models is either explained by a literal size of the test (`explained.py`, with the reason)
or a fault, which makes the exit status 1.

    python tools/peers/__main__.py                              # everything, hours on 2 cores; writes docs/peers.md
    python tools/peers/__main__.py --host timm --mode back      # a part; prints, writes nothing
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOOLS))

from peers.adapting import MODES
from peers.explained import explanation

ROOT = TOOLS.parent
CACHE = ROOT / ".cache" / "peers"
SAID = {
    "back": "grid kept at twice the patch, and back",
    "grid": "grid kept at twice the patch",
    "image": "image kept at twice the patch",
    "size": "two more patches on each side, image size alone",
}


@dataclass(frozen=True)
class Peer:
    """A host library whose tests run.

    Attributes:
        name: as it is imported.
        package: as it is installed.
        tests: what pytest is given, below the unpacked archive; of this repository where it starts with ``tools``.
        select: pytest's ``-k``: the tests that build models.
    """

    name: str
    package: str
    tests: tuple[str, ...]
    select: str = ""


PEERS = (
    Peer("timm", "timm", ("tests/test_models.py", "tests/test_model_input.py"), "not test_model_default_cfgs_non_std"),
    Peer("transformers", "transformers", ("tools/peers/transformers_models.py",)),
    Peer("open_clip", "open_clip_torch", ("tests/test_hf_model.py", "tests/test_inference_simple.py")),
)


@dataclass
class Run:
    """One run of one host's tests in one mode."""

    outcomes: dict[str, list[str]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)


def archive(peer: Peer) -> Path:
    """The unpacked source archive of the installed version."""
    version = metadata.version(peer.package)
    target = CACHE / f"{peer.package}-{version}"
    if not target.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:"]
        subprocess.run([*command, f"{peer.package}=={version}"], cwd=CACHE, check=True)
        with tarfile.open(CACHE / f"{peer.package}-{version}.tar.gz") as file:
            file.extractall(CACHE, filter="data")
    return target


def run(peer: Peer, mode: str, select: str, timeout: int) -> Run:
    """The outcome of every test of a peer in one mode."""
    source = archive(peer)
    result = CACHE / f"{peer.name}-{mode}.json"
    result.unlink(missing_ok=True)
    tests = [str(ROOT / test if test.startswith("tools") else source / test) for test in peer.tests]
    chosen = " and ".join(f"({part})" for part in (peer.select, select) if part)
    # Only the tests of the archive are taken: the library that they import is the one that is installed.
    environment = {
        **os.environ,
        "ANYPATCH_PEERS": mode,
        "ANYPATCH_PEERS_RESULT": str(result),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(TOOLS), str(source)] if peer.name == "transformers"
                                      else [str(ROOT / "src"), str(TOOLS)]),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--maxfail=100000", "-p", "peers.adapting"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull, "--rootdir", str(source), *tests]
    command += ["-k", chosen] if chosen else []
    subprocess.run(command, cwd=CACHE, env=environment, timeout=timeout, check=False, stdout=subprocess.DEVNULL)
    if not result.is_file():
        raise SystemExit(f"{peer.name} ({mode}) came to no end: {' '.join(command)}")
    return Run(**json.loads(result.read_text()))


def differences(plain: Run, adapted: Run) -> dict[str, str]:
    """Tests that pass on models as they are and fail on adapted ones: their last line."""
    return {
        test: message
        for test, (outcome, message) in adapted.outcomes.items()
        if outcome == "failed" and plain.outcomes.get(test, ["missing"])[0] == "passed"
    }


def document(runs: dict[tuple[str, str], Run]) -> tuple[str, int]:
    """The page, and how many failures nothing explains."""
    lines = [
        "# The host libraries' own tests",
        "",
        "Made by `make peers`. Each library's own tests run on its models as they are, and again with every model that "
        "anypatch can adapt adapted as it is built. A test counts if it passes on models as they are. What fails on "
        "adapted ones only is explained by a size that the test writes out, or is a fault of anypatch.",
        "",
        "| library | models adapted | tests that pass as they are | pass adapted | explained | faults |",
        "|---|---|---:|---:|---:|---:|",
    ]
    rest: list[str] = []
    faults = 0
    for (name, mode), found in runs.items():
        if mode == "none":
            continue
        plain = runs[name, "none"]
        passed = {test for test, (outcome, _) in plain.outcomes.items() if outcome == "passed"}
        failing = differences(plain, found)
        reasons = {test: explanation(name, mode, test, message) for test, message in failing.items()}
        unexplained = [test for test, reason in reasons.items() if reason is None]
        faults += len(unexplained)
        lines.append(
            f"| {name} | {SAID[mode]} ({found.counts['adapted']} adapted, {found.counts['refused']} refused) | "
            f"{len(passed)} | {len(passed) - len(failing)} | {len(failing) - len(unexplained)} | {len(unexplained)} |"
        )
        for reason, count in Counter(r for r in reasons.values() if r is not None).most_common():
            rest.append(f"- {name}, {SAID[mode]}: {count} tests: {reason}")
        rest += [f"- **fault**: {name}, {SAID[mode]}: `{test}`: {failing[test]}" for test in unexplained]
    versions = ", ".join(f"{peer.package} {metadata.version(peer.package)}" for peer in PEERS)
    return "\n".join([*lines, "", "## What fails, and why", "", *rest, "", f"Versions: {versions}.", ""]), faults


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="peers", description=__doc__.splitlines()[0])
    parser.add_argument("--host", action="append", choices=[peer.name for peer in PEERS], help="only this library")
    parser.add_argument("--mode", action="append", choices=MODES[1:], help="only this way of adapting")
    parser.add_argument("-k", dest="select", default="", help="only tests that match, as pytest's -k")
    parser.add_argument("--output", type=Path, help="default: docs/peers.md, unless the run is a part only")
    parser.add_argument("--timeout", type=int, default=4 * 3600, help="seconds for one library in one mode")
    options = parser.parse_args(arguments)
    runs: dict[tuple[str, str], Run] = {}
    for peer in PEERS:
        if options.host and peer.name not in options.host:
            continue
        for mode in ("none", *(options.mode or MODES[1:])):
            runs[peer.name, mode] = found = run(peer, mode, options.select, options.timeout)
            print(peer.name, mode, dict(Counter(outcome for outcome, _ in found.outcomes.values())), flush=True)
    text, faults = document(runs)
    part = options.host or options.mode or options.select
    output = options.output or (None if part else ROOT / "docs" / "peers.md")
    if output is not None:
        output.write_text(text, encoding="utf-8")
    print(text)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
