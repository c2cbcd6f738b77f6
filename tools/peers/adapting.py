"""A pytest plugin: while a host library's own tests run, every model that can be adapted is adapted as it is built.

The environment variable `ANYPATCH_PEERS` says how (`MODES`); without it models are left as they are. This changes the
host libraries inside the test process, which is the point of it, and is why it is no part of anypatch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Each mode takes a model from its own geometry to another. "back" returns it, so that the sizes written out in a test
# stay right; the others leave it there, and a test with literal sizes has to fail.
MODES = ("none", "back", "grid", "image", "size")
_state = threading.local()
counts = {"adapted": 0, "refused": 0}
refusals: dict[str, str] = {}


def mode() -> str:
    return os.environ.get("ANYPATCH_PEERS", "none")


def adapted(model: Any) -> Any:
    """The model, adapted as the mode says where it can be; twins and models inside models are left alone."""
    import anypatch

    if mode() == "none" or getattr(_state, "busy", False):
        return model
    _state.busy = True
    try:
        before = anypatch.geometry(model)
        larger = tuple(2 * side for side in before.patch_size)
        if len(larger) == 3:
            larger = (before.patch_size[0], *larger[1:])
        if mode() == "back":
            anypatch.adapt(model, larger, keep="grid")
            anypatch.adapt(model, before.patch_size, before.image_size)
        elif mode() == "grid":
            anypatch.adapt(model, larger, keep="grid")
        elif mode() == "image":
            anypatch.adapt(model, larger, keep="image")
        elif before.image_size is not None:
            grown = tuple(i + 2 * p for i, p in zip(before.image_size, before.patch_size, strict=True))
            anypatch.adapt(model, image_size=(*before.image_size[:-2], *grown[-2:]))
        counts["adapted"] += 1
    except anypatch.AnypatchError as error:
        counts["refused"] += 1
        refusals[type(model).__name__] = str(error)
    finally:
        _state.busy = False
    return model


@contextlib.contextmanager
def as_it_is() -> Iterator[None]:
    """Models built meanwhile are not adapted."""
    busy, _state.busy = getattr(_state, "busy", False), True
    try:
        yield
    finally:
        _state.busy = busy


def adapting(build: Callable[..., Any]) -> Callable[..., Any]:
    """A constructor or factory whose models are adapted, the outermost one only."""

    @functools.wraps(build)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        inside, _state.inside = getattr(_state, "inside", False), True
        try:
            made = build(*args, **kwargs)
        finally:
            _state.inside = inside
        return made if inside else adapted(made)

    return wrapper


def pytest_configure(config: pytest.Config) -> None:
    if mode() == "none":
        return
    wrap_timm()
    wrap_open_clip()


def wrap_timm() -> None:
    try:
        import timm
        from timm.models import _factory
    except ImportError:
        return
    wrapped = adapting(_factory.create_model)
    for module in (timm, timm.models, _factory):
        module.create_model = wrapped


def wrap_open_clip() -> None:
    try:
        import open_clip
        from open_clip import factory
    except ImportError:
        return
    wrapped = adapting(factory.create_model)
    for module in (open_clip, factory):
        module.create_model = wrapped


# -- what came of each test ------------------------------------------------------------------------------------

_outcomes: dict[str, tuple[str, str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        last = "" if report.passed else _last_line(report)
        if _outcomes.get(report.nodeid, ("passed", ""))[0] != "failed":
            _outcomes[report.nodeid] = (report.outcome, last)


def _last_line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    return " ".join(text.split())[:300]


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = os.environ.get("ANYPATCH_PEERS_RESULT")
    if target:
        Path(target).write_text(json.dumps({"outcomes": _outcomes, "counts": counts, "refusals": refusals}))
