"""Runs the host libraries' own tests on adapted models, and writes what fails only because of it: `make peers`.

The source archives of the installed versions come from the package registry into `.cache/peers`; nothing of them is
kept in the repository. Every test runs once as it is and once in each mode (`peers.adapting.MODES`). A test that passes
as it is and fails on adapted models is either explained by a literal size of the test (`explained.py`, with the reason)
or a fault, which makes the exit status 1. A run that was cut short goes on where it was; outcomes of other code of
anypatch are thrown away first.

    python tools/peers/__main__.py                              # everything, hours on 2 cores; writes docs/peers.md
    python tools/peers/__main__.py --host timm --mode back      # a part; prints, writes nothing
    python tools/peers/__main__.py --host timm -k cait --chunks 1   # a part of it: the first few hundred tests
    python tools/peers/__main__.py --keep --page                # no run: what there is, as docs/peers.md
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOOLS))

from peers.adapting import MODES
from peers.page import document
from peers.running import PEERS, ROOT, Peer, Run, read, result_file, run

PAGE = ROOT / "docs" / "peers.md"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.keep:
        os.environ["ANYPATCH_PEERS_KEEP"] = "1"
    os.nice(options.nice)
    runs: dict[tuple[Peer, str], Run] = {}
    controls: dict[tuple[Peer, str], Run] = {}
    for peer in PEERS:
        if options.host and peer.name not in options.host:
            continue
        for mode in ("none", *(options.mode or MODES[1:])):
            if options.page or (options.adapted and mode == "none"):
                runs[peer, mode] = read(result_file(peer, mode, options.select))
            else:
                runs[peer, mode] = run(peer, mode, options.select, options.chunks)
            if mode not in ("none", "back") and peer.factory:
                control = result_file(peer, mode, options.select, control=True)
                controls[peer, mode] = (
                    read(control) if options.page else run(peer, mode, options.select, options.chunks, control=True)
                )
    text, faults = document(runs, controls)
    part = options.host or options.mode or options.select
    if not part:
        PAGE.write_text(text, encoding="utf-8")
    print(text)
    return 1 if faults else 0


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
