"""What the cache of features takes for the same model, and for an entry of its own."""

from __future__ import annotations

import copy
import io
import os
import shutil
import subprocess
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import anypatch
import builders
from anypatch.measure import cost
from anypatch.measure.cache import Cache, Expected
from anypatch.measure.extraction import Extractor
from anypatch.measure.fingerprint import fingerprint, surroundings
from builders import write


def vit(**options) -> nn.Module:
    model = builders.vit(**options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def fidelities(model: nn.Module, images: Path, cache: Path | bool) -> list[float | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = anypatch.sweep(
            model, [4, 16], images=images, cache=cache, device="cpu", num_workers=0, batch_size=2, progress=False
        )
    return [row["fidelity"] for row in found.rows]


@pytest.fixture(autouse=True)
def _timed_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "ENOUGH", 0.0)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    for index in range(4):
        write(tmp_path / "images" / f"{index}.png", (200, 30, 30), index)
    return tmp_path / "images"


def half_scale(self, x):  # of the user's own, with a name that it reads
    return SCALE * original(self, x)


SCALE = 0.5
original = timm.layers.Mlp.forward


def with_method(model: nn.Module) -> nn.Module:
    mlp = model.blocks[0].mlp
    mlp.forward = types.MethodType(half_scale, mlp)
    return model


def with_hook(model: nn.Module) -> nn.Module:
    model.blocks[0].register_forward_hook(lambda module, inputs, output: output * 0.5)
    return model


def with_drop_in(model: nn.Module) -> nn.Module:
    gain = 0.25
    model.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] * gain,))
    return model


def with_buffer(model: nn.Module) -> nn.Module:
    model.register_buffer("table", torch.ones(3), persistent=False)
    return model


def with_plain_tensor(model: nn.Module) -> nn.Module:
    model.blocks[0].mask = torch.ones(2)
    return model


def attribute(path: str, value: object) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        owner, _, name = path.rpartition(".")
        assert hasattr(model.get_submodule(owner), name)
        setattr(model.get_submodule(owner), name, value)
        return model

    return change


class Scaled(nn.Linear):
    """Computes something else than the layer whose place it takes, with the same weights."""

    def forward(self, x):
        return 2 * super().forward(x)


def with_other_class(model: nn.Module) -> nn.Module:
    model.blocks[0].mlp.fc1.__class__ = Scaled
    return model


CHANGES = {
    "heads": attribute("blocks.0.attn.num_heads", 4),
    "attention's scale": attribute("blocks.0.attn.scale", 0.1),
    "fused attention": attribute("blocks.0.attn.fused_attn", False),
    "epsilon": attribute("norm.eps", 0.1),
    "pooling": attribute("global_pool", "avg"),
    "activation": attribute("blocks.0.mlp.act", nn.ReLU()),
    "approximation of the activation": attribute("blocks.0.mlp.act.approximate", "tanh"),
    "patched method of one layer": with_method,
    "hook": with_hook,
    "hook before, with a value it closes over": with_drop_in,
    "buffer that is not saved": with_buffer,
    "tensor in a plain attribute": with_plain_tensor,
    "class of one layer": with_other_class,
    "dtype": lambda model: model.double(),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_what_computes_something_else_is_another_model(name: str) -> None:
    if name == "fused attention" and not hasattr(vit().blocks[0].attn, "fused_attn"):
        pytest.skip("this timm has none")
    assert fingerprint(CHANGES[name](vit())) != fingerprint(vit())


def test_code_of_the_users_own_is_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(with_method(vit()))
    monkeypatch.setitem(globals(), "SCALE", 0.75)
    assert fingerprint(with_method(vit())) != before
    gains = []
    for gain in (0.25, 0.5):
        model = vit()
        model.register_forward_hook(lambda module, inputs, output, gain=gain: output * gain)
        gains.append(fingerprint(model))
    assert gains[0] != gains[1]


def test_a_patched_library_is_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(vit())
    monkeypatch.setattr(timm.layers.Mlp, "forward", half_scale)
    patched = fingerprint(vit())
    assert patched != before
    monkeypatch.undo()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: v)
    assert fingerprint(vit()) != before
    monkeypatch.undo()
    assert fingerprint(vit()) == before


def test_what_computes_the_same_is_the_same_model() -> None:
    model = vit()
    known = fingerprint(model)
    assert fingerprint(vit()) == known
    assert fingerprint(copy.deepcopy(model)) == known
    assert fingerprint(model.train().requires_grad_(False)) == known
    model(torch.randn(1, 3, 32, 32)).sum()
    assert fingerprint(model) == known


def test_transformers_too() -> None:
    def build(**options):
        torch.manual_seed(0)
        return builders.transformers_model(**options)

    known = fingerprint(build())
    assert fingerprint(build()) == known
    for change in ({"num_attention_heads": 4}, {"hidden_act": "relu"}, {"layer_norm_eps": 0.1}):
        assert fingerprint(build(**change)) != known
    eager = build()
    eager.config._attn_implementation = "eager"
    assert fingerprint(eager) != known


def test_what_cannot_be_read_is_like_nothing_else() -> None:
    import threading

    model = vit()
    model.lock = threading.Lock()
    assert fingerprint(model) != fingerprint(model)


@pytest.mark.slow
def test_a_fingerprint_is_the_same_in_another_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, timm\nfrom anypatch.measure.fingerprint import fingerprint\ntorch.manual_seed(0)\n"
        "print(fingerprint(timm.create_model('vit_tiny_patch16_224', depth=1, embed_dim=24, num_heads=2)))\n"
    )
    found = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
        found.add(ran.stdout.split()[-1])
    assert len(found) == 1


def test_surroundings_change_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    before = surroundings(device)
    with torch.autocast("cpu", torch.bfloat16):
        assert surroundings(device) != before
    assert surroundings(device) == before


def test_equal_weights_with_other_heads_do_not_share_features(photographs: Path, tmp_path: Path) -> None:
    one, other = vit(num_heads=1), vit(num_heads=4)
    other.load_state_dict(one.state_dict())
    truth = fidelities(other, photographs, False)
    first = fidelities(one, photographs, tmp_path / "cache")
    assert fidelities(other, photographs, tmp_path / "cache") == truth
    assert first != truth
    changed = CHANGES["activation"](copy.deepcopy(one))
    assert fidelities(changed, photographs, tmp_path / "cache") == fidelities(changed, photographs, False)


def test_other_positions_and_kernels_do_not_share_features(photographs: Path, tmp_path: Path) -> None:
    def run(cache: Path | bool, **options) -> list[float | None]:
        found = anypatch.sweep(
            vit(), [4], images=photographs, cache=cache, num_workers=0, device="cpu", progress=False, **options
        )
        return [row["fidelity"] for row in found.rows]

    cache = tmp_path / "cache"
    assert len({run(cache, kernel=k)[0] for k in ("wiener", "pi")}) == 2
    assert len(list(cache.rglob("*.safetensors"))) == 3  # the native model's are shared
    run(cache, positions="host")
    assert len(list(cache.rglob("*.safetensors"))) == 4


# -- entries ---------------------------------------------------------------------------------------------------


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(bytes(content))


def flipped_name(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"pooled", b"poolad"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 8)


def a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_sparse_terabyte(path: Path) -> None:
    os.truncate(path, 1 << 40)


def a_zip_bomb(path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pooled.npy", b"\0" * (1 << 20))
    path.write_bytes(buffer.getvalue())


def other_numbers(path: Path) -> None:
    """A whole entry with another checksum: of another model, say, copied here."""
    from safetensors.torch import load, save

    tensors = load(path.read_bytes())
    tensors["pooled"] = tensors["pooled"] * 2
    path.write_bytes(save(tensors, metadata={"failures": "{}", "checksum": "0" * 64}))


def signed(change: Callable[[dict], dict], failures: str = "{}") -> Callable[[Path], None]:
    """An entry whose checksum agrees, with content that cannot be."""

    def rewrite(path: Path) -> None:
        from safetensors.torch import load

        tensors = change(load(path.read_bytes()))
        folder = path.parents[2]
        Cache(folder).store(path.parent.name, path.stem, tensors, {"failures": failures})

    rewrite.__name__ = f"signed_{change.__name__}"
    return rewrite


def wider(tensors: dict) -> dict:
    return {**tensors, "pooled": torch.zeros(len(tensors["indices"]), 25)}


def shorter(tensors: dict) -> dict:
    return {name: value[:-1] for name, value in tensors.items()}


def twice(tensors: dict) -> dict:
    return {**tensors, "indices": torch.zeros_like(tensors["indices"])}


def more(tensors: dict) -> dict:
    return {**tensors, "more": torch.zeros(3)}


def none(tensors: dict) -> dict:
    return {}


def deep(tensors: dict) -> dict:
    return tensors


DAMAGE = [flipped, flipped_name, cut, grown, a_link, a_device, a_pipe, a_folder, a_sparse_terabyte, a_zip_bomb]
DAMAGE += [other_numbers, *(signed(change) for change in (wider, shorter, twice, more, none))]
DAMAGE += [signed(deep, "[" * 500), signed(deep, '{"x": "y"}'), signed(deep, '{"99": "gone"}')]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[float | None]]:
    """Images, a cache of their features, and what a sweep finds."""
    root = tmp_path_factory.mktemp("filled")
    for index in range(4):
        write(root / "images" / f"{index}.png", (200, 30, 30), index)
    return root / "images", root / "cache", fidelities(vit(), root / "images", root / "cache")


@pytest.mark.parametrize(
    "damage", [DAMAGE[0], *(pytest.param(d, marks=pytest.mark.slow) for d in DAMAGE[1:])], ids=lambda f: f.__name__
)
def test_a_damaged_entry_counts_as_absent(filled, tmp_path: Path, damage, monkeypatch) -> None:
    photographs, before, truth = filled
    cache = tmp_path / "cache"
    shutil.copytree(before, cache)
    entries = sorted(cache.rglob("*.safetensors"))
    assert len(entries) == 3
    for entry in entries:
        damage(entry)
    computed = []
    compute = Extractor._compute
    monkeypatch.setattr(Extractor, "_compute", lambda self, *a: (computed.append(1), compute(self, *a))[1])
    assert fidelities(vit(), photographs, cache) == truth
    assert len(computed) == 3
    if damage is not a_folder:  # which is not removed for somebody
        computed.clear()
        assert fidelities(vit(), photographs, cache) == truth
        assert not computed  # put right


def test_an_entry_larger_than_it_can_be_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    expected = Expected({"x": (torch.float32, (4, 2))}, images=4)
    cache.store("00", "a", {"x": torch.ones(4, 2)}, {})
    found = cache.load("00", "a", expected)
    assert found is not None
    assert np.array_equal(found[0]["x"], np.ones((4, 2)))
    monkeypatch.setattr("anypatch.measure.cache._decoded", lambda *_: pytest.fail("it was read"))
    os.truncate(next(tmp_path.rglob("*.safetensors")), expected.largest + 1)
    with pytest.warns(UserWarning, match="at most"):
        assert cache.load("00", "a", expected) is None
