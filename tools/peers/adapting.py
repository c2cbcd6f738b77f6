"""A pytest plugin: while a host library's own tests run, every model that can be adapted is adapted as it is built.

The environment says how, what runs and where it is written:

- `ANYPATCH_PEERS`: one of `MODES`; models are left as they are without it, or with `none`.
- `ANYPATCH_PEERS_RESULT`: the file of results, a line for each thing that happened. A test that it knows is not run
  again.
- `ANYPATCH_PEERS_BARE`: the results on models as they are. Only what passed there, and built a model whose patch size
  anypatch knows, can say anything about adapted models.
- `ANYPATCH_PEERS_FAILED`: the results on adapted models. What failed there runs once more, on models that the library
  itself builds at the sizes that the adapted ones have: what fails at the same line there is the test's own size.
- `ANYPATCH_PEERS_NAMES`: a file of the models' names that tests of every model of the library are run on.
- `ANYPATCH_PEERS_CHUNK`: how many tests to run before the process is left for a fresh one.

This changes the host libraries inside the test process, which is the point of it, and is why it is no part of anypatch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Each mode takes a model from its own geometry to another. "back" returns it, so that the sizes written out in a test
# stay right; the others leave it there, and a test with literal sizes has to fail.
MODES = ("none", "back", "grid", "image", "size")
# A test over more models than this is one over all the library's models: the chosen ones stand for them.
MANY = 60
FAILED = "ANYPATCH_PEERS_FAILED"
# Why none of a family's tests run: the proof feeds a picture to a layer of it; what else the model takes is unknown.
UNFED = "the proof feeds this family through an inner layer"
_state = threading.local()


def mode() -> str:
    return os.environ.get("ANYPATCH_PEERS", "none")


def adapted(model: Any, record: bool = True) -> Any:
    """The model, adapted as the mode says where it can be; twins and models inside models are left alone.

    Args:
        model: what a test has built.
        record: whether that is told of the test; it is not of a model that only stands by.

    Raises:
        AnypatchError: it cannot be taken back, although it could be taken away.
    """
    import anypatch

    if getattr(_state, "busy", False):
        return model
    _state.busy = True
    say = _record if record else lambda line: None
    try:
        before = anypatch.geometry(model)
        if mode() == "none":
            say({"known": type(model).__name__})
            return model
        _first_that_fits(model, _ways(before))
        say({"adapted": type(model).__name__})
    except anypatch.AnypatchError as error:
        say({"refused": type(model).__name__, "why": str(error)})
        return model
    finally:
        _state.busy = False
    if mode() == "back":
        with as_it_is():
            anypatch.adapt(model, before.patch_size, before.image_size)
    return model


def _ways(before: Any) -> list[dict[str, Any]]:
    """What the mode asks `adapt` for, the second where the first does not fit the family's windows or the image."""
    time, patch = before.patch_size[:-2], before.patch_size[-2:]
    twice = (*time, *(2 * side for side in patch))
    half = (*time, *(side // 2 for side in patch))
    # Half the patch with the same grid is a quarter of the image: as telling as twice, and quick.
    halves = all(side % 2 == 0 and side >= 8 for side in patch)
    if mode() == "size":
        image = before.image_size
        if image is None:
            return [{"patch_size": before.patch_size}]
        grown = [(*image[:-2], *(i + n * p for i, p in zip(image[-2:], patch, strict=True))) for n in (2, 4)]
        return [{"image_size": size} for size in (*grown, (*image[:-2], *(2 * side for side in image[-2:])))]
    if mode() == "image":
        return [{"patch_size": size, "keep": "image"} for size in (twice, half)]
    if mode() == "grid" and halves:
        return [{"patch_size": size, "keep": "grid"} for size in (half, twice)]
    return [{"patch_size": twice, "keep": "grid"}]


def _first_that_fits(model: Any, ways: list[dict[str, Any]]) -> None:
    import anypatch

    for way in ways[:-1]:
        with contextlib.suppress(anypatch.GeometryError):  # raised before anything is changed
            anypatch.adapt(model, **way)
            return
    anypatch.adapt(model, **ways[-1])


@contextlib.contextmanager
def as_it_is() -> Iterator[None]:
    """Models built meanwhile are not adapted."""
    busy, _state.busy = getattr(_state, "busy", False), True
    try:
        yield
    finally:
        _state.busy = busy


@contextlib.contextmanager
def building() -> Iterator[bool]:
    """A model is being built: whether it is none inside another."""
    inside, _state.inside = getattr(_state, "inside", False), True
    try:
        yield not inside
    finally:
        _state.inside = inside


def adapting(build: Callable[..., Any]) -> Callable[..., Any]:
    """A constructor or factory whose models are adapted, the outermost one only.

    One that loads weights is left as it is: in these tests the file is of a model that was adapted already.
    """
    signature = inspect.signature(build)

    @functools.wraps(build)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with building() as outermost:
            made = build(*args, **kwargs)
        given = signature.bind_partial(*args, **kwargs).arguments
        loaded = given.get("pretrained") or given.get("checkpoint_path")
        if loaded or not outermost:
            return made
        return built_by_the_library(adapted(made)) if FAILED in os.environ else adapted(made)

    return wrapper


def adapt_on_construction(model_class: Any) -> None:
    """Wrap the constructor of a model class: a model of that very class is adapted, unless it is inside another.

    As a control it is then built once more by the library, from the configuration that the adapted one has.
    """
    if getattr(model_class, "_anypatch_peers", False):
        return
    construct = model_class.__init__

    @functools.wraps(construct)
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        with building() as outermost:
            construct(self, config, *args, **kwargs)
        if outermost and type(self) is model_class and not getattr(config, "_anypatch_adapted", False):
            adapted(self)
            if self.config is not config:  # a saved and loaded configuration is at the new geometry already
                self.config._anypatch_adapted = True
                if FAILED in os.environ:
                    with building():
                        construct(self, self.config, *args, **kwargs)

    model_class.__init__ = init
    model_class._anypatch_peers = True


def built_by_the_library(model: Any) -> Any:
    """A model of the same configuration that the host library itself builds at the model's geometry."""
    import anypatch
    from anypatch.adaptation import describe

    if getattr(_state, "busy", False):  # this is the model that is being built
        return model
    with as_it_is():
        try:
            subject = describe(model)
        except anypatch.AnypatchError:
            return model
        return subject.build(subject.geometry).train(model.training)


def exchange(old: Callable[..., Any], packages: tuple[str, ...]) -> None:
    """Put the adapting version of a factory wherever a package's modules have imported it."""
    wrapped = adapting(old)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in packages:
            for key, value in list(vars(module).items()):
                if value is old:
                    setattr(module, key, wrapped)


def pytest_configure(config: pytest.Config) -> None:
    for host in os.environ.get("ANYPATCH_PEERS_HOST", "timm,open_clip").split(","):
        if host == "timm":
            import timm.models._builder as builder
            import timm.models._factory as factory

            exchange(factory.create_model, ("timm",))
            exchange(builder.build_model_with_cfg, ("timm",))
        elif host == "open_clip":
            import open_clip.factory

            with contextlib.suppress(ImportError):  # what training needs is not installed: its tests say so
                import open_clip_train.main  # noqa: F401  it imports the factory by name
            exchange(open_clip.factory.create_model, ("open_clip", "open_clip_train"))


# -- which tests run ---------------------------------------------------------------------------------------------


@pytest.hookimpl(trylast=True)  # after `-k`, so that a chunk is one of what is asked for
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of every model run for the chosen ones; what has an outcome already does not run again."""
    result = results(Path(os.environ["ANYPATCH_PEERS_RESULT"]))
    started = {line["started"] for line in result if "started" in line}
    telling = None
    earlier = [results(Path(os.environ[name])) for name in ("ANYPATCH_PEERS_BARE", FAILED) if name in os.environ]
    if earlier:
        telling = _telling(earlier[0])
    if len(earlier) > 1:
        telling = _telling(earlier[0]) & {line["test"] for line in earlier[1] if line.get("outcome") == "failed"}
    names = os.environ.get("ANYPATCH_PEERS_NAMES")
    chosen = set(Path(names).read_text().split()) if names else None
    counts = Counter(getattr(item, "originalname", item.name) for item in items)
    kept = []
    for item in items:
        model = getattr(getattr(item, "callspec", None), "params", {}).get("model_name")
        of_all = isinstance(model, str) and counts[getattr(item, "originalname", item.name)] > MANY
        if chosen is not None and of_all and str(model).partition(".")[0] not in chosen:
            continue
        if item.nodeid not in started and (telling is None or item.nodeid in telling):
            kept.append(item)
    # Of a run that is cut short, what ran is a sample of every family.
    kept.sort(key=lambda item: hashlib.sha256(item.nodeid.encode()).digest())
    chunk = int(os.environ.get("ANYPATCH_PEERS_CHUNK", "0")) or len(kept)
    # What is run on is not all there yet where an earlier run was cut short.
    complete = all(any("finished" in line for line in lines) for lines in earlier)
    _state.whole = complete and chunk >= len(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept[:chunk])])
    items[:] = kept[:chunk]


def _telling(lines: list[dict[str, Any]]) -> set[str]:
    """Tests that passed on models as they are and built one whose patch size is known."""
    known, passed, failed, running = set(), set(), set(), ""
    for line in lines:
        running = line.get("started", running)
        if "known" in line:
            known.add(running)
        if "outcome" in line:  # of a subtest as well
            (passed if line["outcome"] == "passed" else failed).add(line["test"])
    return known & passed - failed


def unfed(lines: list[dict[str, Any]]) -> set[str]:
    """Families, by the name of their class of tests, one of whose tests has shown that none can run."""
    return {line["test"].split("::")[-2] for line in lines if line.get("last", "").endswith(UNFED)}


# -- what came of each test --------------------------------------------------------------------------------------


def results(target: Path) -> list[dict[str, Any]]:
    """The lines of a file of results; one that was being written when the process ended is left out."""
    lines = []
    for text in target.read_text().splitlines() if target.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def _record(line: dict[str, Any]) -> None:
    """One line more in the file of results, so that a run that is cut short has what came before."""
    with open(os.environ["ANYPATCH_PEERS_RESULT"], "a") as file:
        file.write(json.dumps(line) + "\n")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _record({"uncollected": report.nodeid, "last": _last_line(report)})


def pytest_runtest_logstart(nodeid: str) -> None:
    _record({"started": nodeid})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _record({"test": report.nodeid, "outcome": report.outcome, "last": "" if report.passed else _last_line(report)})


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    ended = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
    if exitstatus in ended and getattr(_state, "whole", False):
        _record({"finished": True})


def _last_line(report: Any) -> str:
    """The error, and the last place in a file that raised it: of the test or the library, where many tests fail in one
    line of torch or unittest."""
    crash = getattr(report.longrepr, "reprcrash", None)
    entries = getattr(getattr(report.longrepr, "reprtraceback", None), "reprentries", [])
    places = [entry.reprfileloc for entry in entries if getattr(entry, "reprfileloc", None) is not None]
    text = crash.message if crash is not None else str(report.longrepr)
    if isinstance(report.longrepr, tuple):  # a skip: file, line, reason
        text = str(report.longrepr[2])
    found = next((at for at in reversed(places) if not {"torch", "unittest"} & set(Path(at.path).parts)), crash)
    place = f" [{Path(found.path).name}:{found.lineno}]" if found is not None else ""
    text = " ".join(text.split())
    if "ImportError while importing test module" in text:
        return text.rpartition(" E ")[2]
    return (text if len(text) < 400 else f"{text[:200]} ... {text[-200:]}") + place
