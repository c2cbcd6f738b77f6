"""What the runs say, as a page: the counts, what fails only because models were adapted, and what was not run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from peers import choice
from peers.explained import explanation
from peers.running import PEERS, Peer, Run, code

SAID = {
    "back": "grid kept at twice the patch, and back",
    "grid": "grid kept at half the patch, or twice a small or odd one",
    "image": "image kept at twice the patch, or half where that does not divide it",
    "size": "image larger by a few patches, patch kept",
}
COLUMNS = "| library | models adapted | tests | pass | left out by their own bound | explained | faults |"

TITLES = (
    "What fails because of a size that the test writes out",
    "What fails and nothing explains",
    "What was not run",
    "Models that were refused, and left as they were",
)


@dataclass(frozen=True)
class Verdict:
    """One mode of one library against its run on models as they are.

    Attributes:
        tests: those that pass on models as they are, and adapted one here.
        passed: those of them that pass here.
        skipped: those that skip models as large as these became, with their reason.
        explained: those that have to fail, with the reason.
        faults: the others, with their last line.
        unrun: tests that pass as they are and were not run here: the run was a part.
    """

    tests: set[str] = field(default_factory=set)
    passed: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    explained: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    unrun: set[str] = field(default_factory=set)


PART = (
    "**This is a part.** The runs were cut short; what has run is a sample in random order; what has not is counted "
    "[below](#what-was-not-run). `make peers` goes on from here."
)
BUILT = "a model that the library itself builds at these sizes fails it at the same line"


def verdict(name: str, mode: str, plain: Run, found: Run, built: Run | None = None) -> Verdict:
    """What fails on adapted models of what passes on models as they are; `built` is the control."""
    tests = plain.telling & found.changed
    made = Verdict(tests, tests & found.of("passed"), unrun=plain.telling - set(found.outcomes))
    for test in sorted(tests - made.passed):
        outcome, message = found.outcomes[test]
        reason = explanation(name, mode, test, message)
        if built is not None and _place(built.outcomes.get(test, ("", ""))) == _place((outcome, message)) != "":
            reason = BUILT
        if outcome == "skipped":
            made.skipped[test] = message
        elif reason is not None:
            made.explained[test] = reason
        else:
            made.faults[test] = message
    # What fails where nothing could be adapted does so for a reason of its own, or because refusing broke something.
    for test in sorted((plain.telling & found.of("failed")) - found.changed):
        made.faults[test] = f"no model of it was adapted, and yet: {found.outcomes[test][1]}"
    return made


def _place(outcome: tuple[str, str]) -> str:
    """File and line of a failure."""
    return outcome[1].rpartition(" [")[2] if outcome[0] == "failed" else ""


def document(runs: dict[tuple[Peer, str], Run], controls: dict[tuple[Peer, str], Run] | None = None) -> tuple[str, int]:
    """The page, and how many failures nothing explains."""
    controls = controls or {}
    rows, reasons, faults, refusals = [], [], [], []
    for (peer, mode), found in runs.items():
        if mode == "none":
            continue
        one = verdict(peer.name, mode, runs[peer, "none"], found, controls.get((peer, mode)))
        rows.append(
            f"| {peer.name} | {SAID[mode]} | {len(one.tests)} | {len(one.passed)} | {len(one.skipped)} | "
            f"{len(one.explained)} | {len(one.faults)} |"
        )
        for reason, count in Counter(one.explained.values()).most_common():
            reasons.append(f"- {peer.name}, {SAID[mode]}: {_tests(count)}: {reason}")
        faults += [f"- {peer.name}, {SAID[mode]}: `{test}`: {_quoted(last)}" for test, last in one.faults.items()]
        refusals += [(peer.name, mode, kind, found.refused[kind], why) for kind, why in found.whys.items()]
    text = [
        *INTRODUCTION,
        COLUMNS,
        "|---|---|---:|---:|---:|---:|---:|",
        *rows,
        "",
        _versions(_peers(runs)),
        *(() if all(found.finished for found in runs.values()) else ("", PART)),
        *_section(TITLES[0], reasons),
        *_section(TITLES[1], faults or ["Nothing."]),
        *_section(TITLES[2], list(_not_run(runs))),
        *_section(TITLES[3], _refused(refusals)),
    ]
    return "\n".join(text) + "\n", len(faults)


def kept(old: str, new: str, names: Sequence[str]) -> str:
    """The new page, of some libraries, with what the old one says of the others: they were not run this time.

    Args:
        old: the page as it is.
        new: a page of the same libraries' versions.
        names: the libraries that the new page is about.
    """
    before, now = _parts(old), _parts(new)
    others = [peer.name for peer in PEERS if peer.name not in names and peer.version in old]  # not of another version
    made = []
    for title in ("", *TITLES):
        said = {name: now.get(title, []) if name in names else before.get(title, []) for name in (*names, *others)}
        order = [peer.name for peer in PEERS if peer.name in said]
        made.append((title, [line for name in order for line in said[name] if _library(line) == name]))
    text = []
    for title, lines in made:
        frame = [line for line in now.get(title, []) if _library(line) is None]
        if title:
            text += _section(title, lines or [line for line in frame if line])
            continue
        cut = any("not run yet" in line or "cut short" in line for _, listed in made for line in listed)
        frame = [line for line in frame if line != PART and not line.startswith("Versions:")]
        at = next(i for i, line in enumerate(frame) if line.startswith("|---")) + 1
        text += [*frame[:at], *lines, "", _versions([peer for peer in PEERS if peer.name in (*names, *others)])]
        text += ["", PART] if cut else []
    return "\n".join(text) + "\n"


def _parts(text: str) -> dict[str, list[str]]:
    """The lines of a page by their heading; those of the first part, with the table, under no name."""
    parts: dict[str, list[str]] = {"": []}
    title = ""
    for line in text.splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ")
            parts[title] = []
        else:
            parts[title].append(line)
    return parts


def _library(line: str) -> str | None:
    """The library that a line of the page is about."""
    return next((peer.name for peer in PEERS if re.match(rf"(\| |- ){peer.name}\b", line)), None)


INTRODUCTION = (
    "# The host libraries' own tests",
    "",
    "Made by `make peers`: each library's own tests, from the source archive of the installed version, run on its "
    "models as they are, and again with every model that anypatch can adapt adapted as soon as it is built. A test "
    "counts where it passes on models as they are and a model of it was adapted. What fails then runs once more on "
    "models that the library itself builds at the sizes of the adapted ones. Failing at the same line there, it is "
    "explained: the test writes out a size. So it is where a row of `tools/peers/explained.py` says which number the "
    "test expects. Anything else is a fault of anypatch. Some tests leave out models above a size of their own; "
    "enlarged, a model can come to be one.",
    "",
)


def _versions(peers: Sequence[Peer]) -> str:
    return f"Versions: {', '.join(peer.version for peer in peers)}."


def _tests(count: int) -> str:
    return f"{count} test{'s' if count != 1 else ''}"


def _quoted(text: str) -> str:
    return "`" + text.replace("`", "'")[:200] + "`"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *lines] if lines else []


def _peers(runs: dict[tuple[Peer, str], Run]) -> list[Peer]:
    return list(dict.fromkeys(peer for peer, _ in runs))


def _not_run(runs: dict[tuple[Peer, str], Run]) -> Iterator[str]:
    for peer in _peers(runs):
        plain = runs[peer, "none"]
        passed, failed, skipped = (len(plain.of(outcome)) for outcome in ("passed", "failed", "skipped"))
        yield (
            f"- {peer.name}: of {len(plain.outcomes)} tests {passed} pass on models as they are "
            f"({len(plain.telling)} of them build a model whose patch size anypatch knows), {skipped} skip themselves, "
            f"{failed} fail: {peer.fails}."
        )
        if plain.uncollected:
            yield f"- {peer.name}: {len(plain.uncollected)} files need what is not installed: " + "; ".join(
                f"`{name}` ({last})" for name, last in sorted(plain.uncollected.items())
            )
        if not plain.finished:
            yield f"- {peer.name}: the run on models as they are was cut short."
        if peer.all_models:
            names = ", ".join(f"`{name}`" for name in choice.CHOICE[peer.name]())
            yield (
                f"- {peer.name}: tests that run on every model of the library run on those behind the "
                f"[coverage run](coverage.md) only, the smallest where an entry stands for many: {names}."
            )
        if peer.name == "transformers":
            yield TRANSFORMERS.format(unfed=len(plain.unfed))
        for (other, mode), found in runs.items():
            left = verdict(peer.name, mode, plain, found).unrun if other == peer and mode != "none" else set()
            if left:
                yield f"- {peer.name}, {SAID[mode]}: {_tests(len(left))} not run yet."
            if other == peer and mode != "none" and found.code != code():
                yield f"- {peer.name}, {SAID[mode]}: run on an earlier state of anypatch's code."


TRANSFORMERS = (
    "- transformers: its source archive holds the common tests that every model has to pass "
    "(`tests/test_modeling_common.py`), not the files of the single models (`tests/models`), and no other source in a "
    "package registry does. The common tests run here on the tiny models of the [coverage run](coverage.md); {unfed} "
    "of its families, most of them models of pictures and words, take more than a picture: their tests are left out. "
    "`test_eager_matches_sdpa_inference` comes in two dozen variants of number format, padding and mask: each family "
    "runs a fifth of them, another family others."
)


def _refused(refusals: Sequence[tuple[str, str, str, int, str]]) -> list[str]:
    """One line a class and reason, whatever the modes."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for name, mode, kind, _, why in refusals:
        lines.setdefault((name, kind, why), []).append(mode)
    return [
        f"- {name}, `{kind}` ({', '.join(modes)}): {_quoted(why)}" for (name, kind, why), modes in sorted(lines.items())
    ]
