"""Runs the host libraries' own tests on adapted models, and writes what fails only because of it: `make peers`.

The source archives of the installed versions come from the package registry into `.cache/peers`; nothing of them is
kept in the repository. Every test runs once as it is and once in each mode (`peers.adapting.MODES`). A test that passes
as it is and fails on adapted models is either explained by a literal size of the test (`explained.py`, with the reason)
or a fault, which makes the exit status 1. Libraries and modes take turns, a chunk of tests each, so that a run that was
cut short is a sample of them all. It goes on where it was; outcomes of other code of anypatch are thrown away first.

    python tools/peers/__main__.py                              # everything, hours on 2 cores; writes docs/peers.md
    python tools/peers/__main__.py --host timm --mode back      # a part; prints, writes nothing
    python tools/peers/__main__.py --host timm -k cait --chunks 1   # a part of it: the first few hundred tests
    python tools/peers/__main__.py --keep --page                # no run: what there is, as docs/peers.md
    python tools/peers/__main__.py --keep --page --host timm    # of one library; of the others it stays as it is
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOOLS))

from peers.adapting import MODES
from peers.page import document, kept
from peers.running import PEERS, ROOT, Peer, read, result_file, run

PAGE = ROOT / "docs" / "peers.md"
Row = tuple[Peer, str, bool]  # a library, how its models are adapted, whether it is the control of that


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.keep:
        os.environ["ANYPATCH_PEERS_KEEP"] = "1"
    os.nice(options.nice)
    rows = list(_rows(options))
    if not options.page:
        _in_turn(rows, options.select, options.chunks)
    found = {row: read(result_file(*row[:2], options.select, row[2])) for row in rows + _plain(rows)}
    runs = {(peer, mode): one for (peer, mode, control), one in found.items() if not control}
    controls = {(peer, mode): one for (peer, mode, control), one in found.items() if control}
    text, faults = document(runs, controls)
    print(text)
    if options.host and options.page and not (options.mode or options.select):
        text = kept(PAGE.read_text(encoding="utf-8"), text, options.host)
    if not (options.mode or options.select) and (options.page or not options.host):
        PAGE.write_text(text, encoding="utf-8")
    return 1 if faults else 0


def _rows(options: argparse.Namespace) -> Iterator[Row]:
    for peer in PEERS:
        if options.host and peer.name not in options.host:
            continue
        if not options.adapted:
            yield peer, "none", False
        for mode in options.mode or MODES[1:]:
            yield peer, mode, False
            if mode != "back":
                yield peer, mode, True


def _plain(rows: Sequence[Row]) -> list[Row]:
    """The runs on models as they are that the others are held against, where they are not run now."""
    return [row for peer in dict.fromkeys(row[0] for row in rows) if (row := (peer, "none", False)) not in rows]


def _in_turn(rows: Sequence[Row], select: str, rounds: int | None) -> None:
    """A chunk of every library and mode, then the next of each: a run that is cut short is a sample of them all."""
    while rounds != 0:
        before = _done(rows, select)
        for peer, mode, control in rows:
            run(peer, mode, select, 1, control=control)
        if _done(rows, select) == before:
            return
        rounds = rounds and rounds - 1


def _done(rows: Sequence[Row], select: str) -> list[tuple[int, bool]]:
    found = [read(result_file(peer, mode, select, control)) for peer, mode, control in rows]
    return [(len(one.outcomes), one.finished) for one in found]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--host", action="append", choices=[peer.name for peer in PEERS], help="only this library")
    parser.add_argument("--mode", action="append", choices=MODES[1:], help="only this way of adapting")
    parser.add_argument("-k", dest="select", default="", help="only tests that match, as pytest's -k")
    parser.add_argument("--chunks", type=int, help="of each mode only so many chunks of tests more")
    parser.add_argument("--adapted", action="store_true", help="of what has run on models as they are, and no more")
    parser.add_argument("--page", action="store_true", help="run nothing: the page of what was run before")
    parser.add_argument("--keep", action="store_true", help="go on although anypatch's code has changed since")
    parser.add_argument("--nice", type=int, default=15, help="how far behind other programs it stands")
    return parser


if __name__ == "__main__":
    sys.exit(main())
