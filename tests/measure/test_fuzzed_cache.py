"""Cache entries that somebody changed count as absent, or are what was stored."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import torch

from anypatch.measure.cache import Cache, Expected
from tests.files.fuzzing import PEAK, forget_peak, mutate, peak


def test_changed_entries_are_absent(tmp_path: Path) -> None:
    cache, key = Cache(tmp_path), "0" * 32
    stored = {"pooled": torch.randn(4, 3), "sizes": torch.arange(4)}
    expected = Expected({"pooled": (torch.float32, (4, 3)), "sizes": (torch.int64, (4,))}, images=4)
    cache.store(key, "x", stored, {"note": "fine"})
    (path,) = tmp_path.rglob("*.safetensors")
    good, chance, absent = path.read_bytes(), random.Random(0), 0
    assert cache.load(key, "x", expected) is not None
    before = forget_peak()
    for _ in range(500):
        path.write_bytes(mutate(good, [good], chance))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = cache.load(key, "x", expected)
        absent += found is None
        if found is not None:
            tensors, text = found
            assert text == {"note": "fine"}
            assert all(torch.equal(tensors[name], tensor) for name, tensor in stored.items())
    assert 300 < absent < 500
    assert peak() - before < PEAK
