"""Running one host library's own tests in one mode, so that a run that was cut short goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from peers import adapting, choice

TOOLS = Path(__file__).resolve().parents[1]
ROOT = TOOLS.parent
CACHE = ROOT / ".cache" / "peers"
# Seconds for one test, where the library's own mark says nothing. The slowest of those that pass takes 90 on one core.
PER_TEST = 600
CRASHED = ("failed", "the process ended")


@dataclass(frozen=True)
class Peer:
    """A host library whose tests run.

    Attributes:
        name: as it is imported.
        package: as it is installed.
        tests: what pytest is given, below the unpacked archive; of this repository those in `OURS`.
        select: pytest's ``-k``: the tests that build models.
        paths: folders of the archive that the tests import from. None holds the library: what is tested is installed.
        mentions: of a folder of tests, the files that say this are taken: what they build models with.
        plugins: further pytest plugins.
        chunk: after so many tests a fresh process: one that has built hundreds of models keeps some of their memory.
        all_models: whether tests run on every model of the library, of which `choice` takes a few.
        fails: why tests fail on models as they are.
    """

    name: str
    package: str
    tests: tuple[str, ...]
    select: str = ""
    paths: tuple[str, ...] = ()
    mentions: str = ""
    plugins: tuple[str, ...] = ()
    chunk: int = 250
    all_models: bool = False
    fails: str = "most ask for a download, a device or a package that is not there"

    @property
    def version(self) -> str:
        return f"{self.package} {metadata.version(self.package)}"


PEERS = (
    # Pretrained weights, and what they compute, lie on the hub.
    Peer("timm", "timm", ("tests",), "not _pretrained[ and not test_model_inference", mentions="create_model",
         all_models=True),
    Peer("transformers", "transformers", ("tools/peers/transformers_models.py",), paths=(".",),
         chunk=4000, fails="most ask for what the file of the single model would say: words beside the picture, how "
         "many layers there are, which tests of text do not apply"),
    Peer("open_clip", "open_clip_torch", ("tests/test_inference.py", "tests/test_training_simple.py"),
         paths=("tests",), plugins=("peers.open_clip_data",), all_models=True),
)  # fmt: skip


OURS = ("tools/peers/transformers_models.py",)  # tests of this repository, over the classes of the archive


@dataclass
class Run:
    """One run of one host's tests in one mode.

    Attributes:
        outcomes: outcome and last line by test.
        known: tests that built a model whose patch size is known.
        changed: tests in which a model was adapted.
        adapted: how many models were adapted, by class.
        refused: how many were refused, by class.
        whys: the last refusal, by class.
        unfed: families of which none of the tests can run.
        uncollected: files whose tests could not be collected, with the error.
        finished: whether the run came to its end.
        code: the state of anypatch's code that it is of, as `code` says it.
    """

    outcomes: dict[str, tuple[str, str]] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    adapted: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    whys: dict[str, str] = field(default_factory=dict)
    unfed: set[str] = field(default_factory=set)
    uncollected: dict[str, str] = field(default_factory=dict)
    finished: bool = False
    code: str = ""

    def of(self, outcome: str) -> set[str]:
        return {test for test, (found, _) in self.outcomes.items() if found == outcome}

    @property
    def telling(self) -> set[str]:
        """Of a run on models as they are: the tests that can say something about adapted ones."""
        return self.of("passed") & self.known


def archive(peer: Peer, cache: Path = CACHE) -> Path:
    """The unpacked source archive of the installed version."""
    version = metadata.version(peer.package)
    target = cache / f"{peer.package}-{version}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:"]
        subprocess.run([*command, f"{peer.package}=={version}"], cwd=cache, check=True)
        with tarfile.open(cache / f"{peer.package}-{version}.tar.gz") as file:
            file.extractall(cache, filter="data")
    return target


def _say(text: str) -> None:
    print(text, flush=True)


def run(
    peer: Peer,
    mode: str,
    select: str = "",
    chunks: int | None = None,
    say: Callable[[str], None] = _say,
    control: bool = False,
) -> Run:
    """The outcome of every test of a peer in one mode, those of an earlier run of the same code among them.

    A test that ends the process has failed, and the others go on without it. Of `chunks` at most so many are run. As a
    control, what failed runs on models that the library itself builds at the same sizes.
    """
    source = archive(peer)
    result = result_file(peer, mode, select, control)
    command, environment = _call(peer, source, mode, select, result)
    if control:
        environment[adapting.FAILED] = str(result_file(peer, mode, select))
    work, log = CACHE / "work", result.with_suffix(".log")
    work.mkdir(exist_ok=True)
    while not read(result).finished and chunks != 0:
        before = len(read(result).outcomes)
        with log.open("a") as said:
            subprocess.run(command, cwd=work, env=environment, check=False, stdout=said, stderr=said)
        found = read(result)
        say(f"{peer.name}, {mode}{', built' * control}: {len(found.outcomes)} tests, {len(found.of('failed'))} failed")
        if not found.finished and len(found.outcomes) == before:
            if control or (mode != "none" and not read(result_file(peer, "none", select)).finished):
                break  # as far as the run went whose tests these are
            raise SystemExit(f"{peer.name} ({mode}) came to no end, see {log}: {' '.join(command)}")
        chunks = chunks and chunks - 1
    return read(result)


def _call(peer: Peer, source: Path, mode: str, select: str, result: Path) -> tuple[list[str], dict[str, str]]:
    """What runs the tests, and its environment."""
    tests = [str(path) for test in peer.tests for path in _files(peer, ROOT if test in OURS else source, test)]
    chosen = " and ".join(f"({part})" for part in (peer.select, select) if part)
    paths = [ROOT / "src", TOOLS, *(source / path for path in peer.paths)]
    environment = {
        **os.environ,
        "ANYPATCH_PEERS": mode,
        "ANYPATCH_PEERS_HOST": peer.name,
        "ANYPATCH_PEERS_RESULT": str(result),
        "ANYPATCH_PEERS_CHUNK": str(peer.chunk),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    if mode != "none":
        environment["ANYPATCH_PEERS_BARE"] = str(result_file(peer, "none", select))
    if peer.all_models:
        environment["ANYPATCH_PEERS_NAMES"] = str(_names_file(peer))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peers.adapting", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [part for plugin in peer.plugins for part in ("-p", plugin)]
    command += ["--timeout", str(PER_TEST), "--continue-on-collection-errors", "-W", "ignore"]
    command += ["-c", os.devnull, "--rootdir", str(source), *tests, *(["-k", chosen] if chosen else [])]
    return command, environment


def _files(peer: Peer, folder: Path, test: str) -> list[Path]:
    path = folder / test
    if not path.is_dir():
        return [path]
    return [file for file in sorted(path.glob("test_*.py")) if peer.mentions in file.read_text(encoding="utf-8")]


def _names_file(peer: Peer) -> Path:
    """The names of the models that tests of every model run on."""
    target = CACHE / f"{peer.name}-models.txt"
    target.write_text("\n".join(choice.CHOICE[peer.name]()) + "\n")
    return target


def result_file(peer: Peer, mode: str, select: str = "", control: bool = False) -> Path:
    """The file of results, empty but for what it is of, unless it is of the same code already."""
    name = f"{peer.name}-{mode}" + (f"-{hashlib.sha256(select.encode()).hexdigest()[:8]}" if select else "")
    target = CACHE / f"{name}{'-built' * control}.jsonl"
    head = {"of": [peer.version, "" if mode == "none" else code()]}
    keep = os.environ.get("ANYPATCH_PEERS_KEEP") == "1"
    text = target.read_text() if target.is_file() else ""
    if not text or (json.loads(text.partition("\n")[0]) != head and not keep):
        target.write_text(json.dumps(head) + "\n")
    elif not text.endswith("\n"):  # the process ended in the middle of a line
        target.write_text(text + "\n")
    return target


def code() -> str:
    """A digest of anypatch's own code: its outcomes are of no other."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "src" / "anypatch").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read(result: Path) -> Run:
    """What a file of results says."""
    lines, running = adapting.results(result), ""
    found = Run(unfed=adapting.unfed(lines))
    for line in lines:
        if "started" in line:
            running = line["started"]
            found.outcomes[running] = CRASHED
        elif "test" in line:
            before = found.outcomes.get(line["test"], CRASHED)
            if before == CRASHED or before[0] == "passed":  # a failing teardown after a passing call
                found.outcomes[line["test"]] = (line["outcome"], line["last"])
        elif "of" in line:
            found.code = line["of"][1]
        elif "uncollected" in line:
            found.uncollected[line["uncollected"]] = line["last"]
        elif "known" in line:
            found.known.add(running)
        elif "adapted" in line:
            found.adapted[line["adapted"]] += 1
            found.changed.add(running)
        elif "refused" in line:
            found.refused[line["refused"]] += 1
            found.whys[line["refused"]] = line["why"]
        found.finished = found.finished or "finished" in line
    return found
