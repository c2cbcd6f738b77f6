"""transformers' common model tests (its `ModelTesterMixin`) over the families of the coverage table.

transformers' source archive holds the common tests, not the per-model testers; a tester needs a tiny configuration and
inputs, and both are known here: the coverage run's tiny models and the proof's examples. `ANYPATCH_PEERS` says how each
model is adapted right after its constructor (`peers.adapting`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import os
import re
import sys
import types
import unittest
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

import anypatch
from peers import adapting
from peers.adapting import UNFED

# A test that runs in so many variants of number format, padding and mask, and takes most of the time: each family runs
# one in `EVERY` of them, another family others.
VARIED = re.compile(r"test_eager_matches_sdpa_inference_(\d+)_")
EVERY = 5


def _common() -> Any:
    """The module of common tests; what it imports from folders that the archive leaves out is empty."""
    for name, mixin in (
        ("tests.exporters.test_export", "ExportTesterMixin"),
        ("tests.generation.test_utils", "GenerationTesterMixin"),
    ):
        package = name.rpartition(".")[0]
        if name not in sys.modules:
            folder, module = types.ModuleType(package), types.ModuleType(name)
            folder.__path__ = []
            setattr(module, mixin, type(mixin, (), {}))
            sys.modules[package], sys.modules[name] = folder, module
    import tests.test_modeling_common as common

    return common


class Tester:
    """What the common tests ask of a model's tester: a configuration and inputs that fit the (adapted) model.

    Its own model counts for nothing: a test says something of the models that it builds itself.
    """

    is_training = False

    def __init__(self, build: Any) -> None:
        torch.manual_seed(0)
        with adapting.as_it_is():
            model = build().eval()
        self.model_class = type(model)
        # From its own words, so that what the constructor settles (the attention's implementation) is open again.
        self.config = type(model.config).from_dict(model.config.to_dict())
        self.inputs = _inputs(adapting.adapted(model, record=False))
        self.batch_size = next(iter(self.inputs.values())).shape[0] if self.inputs else 0
        self.seq_length = _tokens(model, self.inputs)
        self.num_masks = self.mask_length = math.prod(anypatch.geometry(model).grid or ())  # one a patch

    def anew(self) -> Tester:
        """Another of the same, for the next test, which may change its configuration."""
        other = copy.copy(self)
        other.config = copy.deepcopy(self.config)
        return other

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        return copy.deepcopy(self.config), {k: v.clone() for k, v in self.inputs.items()}

    def __getattr__(self, name: str) -> Any:
        config = self.__dict__.get("config")
        if config is None or not hasattr(config, name):
            raise AttributeError(name)
        return getattr(config, name)


def _tokens(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Tokens of the last hidden state, for the tests of hidden states and attentions; 0 where there is none."""
    with torch.no_grad(), contextlib.suppress(Exception):
        return int(model(**inputs).last_hidden_state.shape[1])
    return 0


def _inputs(model: nn.Module) -> dict[str, Any]:
    """The keyword arguments with which the proof calls the model."""
    from anypatch.adaptation import describe, host

    subject = describe(model)
    example = host(model).example(subject)
    seen: dict[str, Any] = {}
    forward, signature = model.forward, inspect.signature(model.forward)

    @functools.wraps(forward)
    def remember(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        seen.update(bound.pop("kwargs", {}), **bound)
        return forward(*args, **kwargs)

    model.forward = remember  # the example may call it past the hooks
    try:
        with torch.no_grad():
            example.call(model, torch.randn(example.shape, generator=torch.Generator().manual_seed(0)))
    finally:
        del model.forward
    return {k: v for k, v in seen.items() if isinstance(v, torch.Tensor)}


def _case(family: Any, common: Any) -> type:
    """The common tests of one family; none of its models is built while they are collected."""
    tester = functools.cache(functools.partial(Tester, family.build))

    def setup(self: Any) -> None:
        self.model_tester = tester().anew()
        if not self.model_tester.inputs:
            self.skipTest(UNFED)
        self.all_model_classes = (self.model_tester.model_class,)
        adapting.adapt_on_construction(self.model_tester.model_class)
        torch.manual_seed(0)

    left = zlib.crc32(family.name.encode())
    varied = [found for name in dir(common.ModelTesterMixin) if (found := VARIED.match(name))]
    return type(
        "Test" + re.sub(r"\W+", "_", family.name.title()),
        (common.ModelTesterMixin, unittest.TestCase),
        {
            **{found.string: None for found in varied if (int(found[1]) + left) % EVERY},
            "all_model_classes": (),
            "test_resize_embeddings": False,  # as the library's own tests of vision models have it
            "setUp": setup,
            "__module__": __name__,
        },
    )


def _cases() -> dict[str, type]:
    from families import families

    common = _common()
    made = [_case(family, common) for family in families("transformers") if not family.refused]
    unfed = adapting.unfed(adapting.results(Path(os.environ["ANYPATCH_PEERS_RESULT"])))
    return {case.__name__: case for case in made if case.__name__ not in unfed}


globals().update(_cases())
