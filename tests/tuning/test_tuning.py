"""Tuning: features won back without labels, never at the price of the model."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import anypatch
import builders
from anypatch import AnypatchError, CheckpointError, DataError, GeometryError, UnsupportedModelError
from anypatch.errors import AnypatchWarning
from anypatch.hosts.blocks import Tokens
from anypatch.hosts.images import Features, Preprocess
from anypatch.proof import randomise
from anypatch.report.colours import shared_colours
from anypatch.tuning import learning_rate, schedule
from anypatch.tuning.batches import Batches
from anypatch.tuning.checkpoint import FILE
from anypatch.tuning.crops import drawn_image
from anypatch.tuning.data import Feed, split
from anypatch.tuning.distance import Fidelity, distances
from anypatch.tuning.mixing import random_box
from anypatch.tuning.said import Said
from anypatch.tuning.training import Pair, Trainer, digest

OPTIONS: dict[str, Any] = {"batch_size": 8, "num_workers": 0, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth blots of colour, which have the spectrum of photographs more than noise has."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(24):
        blots = random.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(blots).resize((80, 64), Image.Resampling.BICUBIC).save(folder / f"{number:02}.png")
    return folder


def randomised(model: nn.Module) -> Any:
    with torch.no_grad():
        randomise(model, torch.Generator().manual_seed(1))
    return model.eval()


def vit() -> Any:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, embed_dim=32, num_heads=2, num_classes=5
    )
    return randomised(model)


def dinov2() -> Any:
    return randomised(builders.transformers_model("Dinov2", num_hidden_layers=2, patch_size=4))


def clip() -> Any:
    import transformers

    small = {**builders.SMALL, "num_hidden_layers": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 9}, vision_config={**small, "image_size": 32, "patch_size": 4},
        projection_dim=16,
    )  # fmt: skip
    return randomised(transformers.CLIPModel(config))


def llava() -> Any:
    import transformers

    small = {**builders.SMALL, "num_hidden_layers": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**small, image_size=32, patch_size=4),
        text_config=transformers.LlamaConfig(**small, num_key_value_heads=2, vocab_size=99),
        image_token_index=98,
    )
    return randomised(transformers.LlavaForConditionalGeneration(config))


def open_clip_model() -> Any:
    import open_clip

    return randomised(
        open_clip.model.CLIP(
            16,
            open_clip.CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=4, image_size=32),
            open_clip.CLIPTextCfg(context_length=8, vocab_size=16, width=16, heads=1, layers=1),
        )
    )


def torchvision_vit() -> Any:
    import torchvision

    return randomised(
        torchvision.models.VisionTransformer(
            image_size=32, patch_size=4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=32, num_classes=5
        )
    )


class HandMade(nn.Module):
    """A ViT of one's own, with ``forward_features``."""

    def __init__(self) -> None:
        super().__init__()
        self.img_size, self.patch_size = 32, 4
        self.patch_embed = nn.Conv2d(3, 32, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 32))
        self.pos_embed = nn.Parameter(torch.zeros(1, 65, 32))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, 48, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.norm = nn.LayerNorm(32)

    def forward_features(self, pixels: Tensor) -> Tensor:
        tokens = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.forward_features(pixels)[:, 0]


def hand_made() -> Any:
    return randomised(HandMade())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# -- every host gains --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [vit, dinov2, clip, llava, open_clip_model, torchvision_vit, hand_made])
def test_every_host_gains_on_held_out_images(build: Callable[[], Any], photos: Path) -> None:
    model = build()
    before = weights(model)
    random = torch.get_rng_state()
    result = anypatch.tune(model, images=photos, patch_size=8, steps=12, learning_rate=1e-3, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), random)
    (row,) = result.rows
    assert result.model is model
    assert result.gained
    assert anypatch.geometry(model).patch_size == (8, 8)
    gain = [row[f"{name}_after"] - row[f"{name}_before"] for name in ("fidelity", "patch_fidelity")]
    assert sum(gain) > 0.005
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    words = ("text", "language", "lm_head", "token_embedding")
    assert not any(name.startswith("transformer") or any(word in name for word in words) for name in changed)


def test_the_fidelity_that_is_reported_is_there(photos: Path) -> None:
    """Computed anew from the saved model, by the library itself and another cosine."""
    model = vit()
    native = copy.deepcopy(model)
    result = anypatch.tune(model, images=photos, patch_size=8, steps=12, learning_rate=1e-3, **OPTIONS)
    from anypatch.measure.preprocess import preprocess_of
    from anypatch.tuning.data import split

    held = split(photos, 0).held_out
    used = preprocess_of(native)
    pixels = torch.stack(
        [
            used.normalise(torch.from_numpy(np.array(used.view(held.load(i), (32, 32)))).permute(2, 0, 1)[None])[0]
            for i in range(len(held))
        ]
    )
    with torch.no_grad():
        one, two = (m.forward_head(m.forward_features(pixels), pre_logits=True) for m in (native, model))
    cosine = ((one * two).sum(1) / one.norm(dim=1) / two.norm(dim=1)).mean().item()
    assert result.rows[0]["fidelity_after"] == pytest.approx(cosine, abs=1e-5)
    models = ((native, 8), (anypatch.adapt(copy.deepcopy(native), 8), 4), (model, 4))
    with torch.no_grad():
        tokens = [(m.forward_features(pixels[:4])[:, 1:], side) for m, side in models]
    wanted = shared_colours([list(found.unflatten(1, (side, side))) for found, side in tokens])
    for number, sample in enumerate(result.samples):  # the report's pictures: native, before, after
        for shown, colours in zip(sample.maps, wanted, strict=True):
            assert np.abs(shown.astype(int) - colours[number]).max() <= 2
    assert not np.array_equal(wanted[1], wanted[2])


def test_several_patch_sizes_share_the_native_weights(photos: Path, tmp_path: Path) -> None:
    model = vit()
    result = anypatch.tune(
        model, images=photos, patch_size=(2, 4, 8), steps=16, learning_rate=5e-4, output=tmp_path / "out", **OPTIONS
    )
    assert anypatch.geometry(model).patch_size == (4, 4)
    assert [row["patch_size"] for row in result.rows] == ["2x2", "4x4", "8x8"]
    for row in result.rows:
        if row["patch_size"] == "4x4":
            assert row["fidelity_before"] == pytest.approx(1, abs=1e-6)
        else:
            after = row["fidelity_after"] + row["patch_fidelity_after"]
            assert after >= row["fidelity_before"] + row["patch_fidelity_before"]
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(pixels), model(pixels), rtol=0, atol=0)
    torch.testing.assert_close(
        anypatch.load(str(tmp_path / "out"), patch_size=8).eval()(pixels), anypatch.at(model, 8)(pixels), rtol=0, atol=0
    )


def test_other_image_sizes(photos: Path) -> None:
    for options in ({"image_size": 48}, {"keep": "grid"}):
        model = vit()
        result = anypatch.tune(model, images=photos, patch_size=8, steps=2, learning_rate=1e-4, **options, **OPTIONS)
        wanted = (48, 48) if "image_size" in options else (64, 64)
        assert anypatch.geometry(model).image_size == wanted
        assert result.rows[0]["image_size"] == f"{wanted[0]}x{wanted[0]}"


# -- it does not harm --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.5, 1e-12])
def test_a_rate_that_gains_nothing_leaves_the_adapted_model(rate: float, photos: Path) -> None:
    model, adapted = vit(), anypatch.adapt(vit(), 8)
    result = anypatch.tune(model, images=photos, patch_size=8, steps=4, learning_rate=rate, **OPTIONS)
    (row,) = result.rows
    after, before = (row[f"fidelity_{w}"] + row[f"patch_fidelity_{w}"] for w in ("after", "before"))
    assert after >= before
    if not result.gained:
        assert same(weights(model), weights(adapted))
        assert any("nothing was gained" in note for note in result.notes)
    assert rate != 0.5 or not result.gained


def test_a_loss_that_is_no_number_stops_the_run(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "CLIP", math.nan)
    model, adapted = vit(), anypatch.adapt(vit(), 8)
    result = anypatch.tune(model, images=photos, patch_size=8, steps=4, learning_rate=1e-4, **OPTIONS)
    assert any("diverges" in note for note in result.notes)
    assert same(weights(model), weights(adapted))


@pytest.mark.parametrize(
    ("says", "chosen", "weight"),
    [
        # (pooled, patches) of each patch size as the one weight goes from 0, the start, over 1, the average of the run,
        # to 2, its end; the share of the way that is taken, and the weight that is kept.
        (lambda w: {8: (0.5 + w / 9, 0.5 + w / 9)}, 1.0, 2.0),
        (lambda w: {8: (0.5 + w / 9, 0.5 + w / 9 if w <= 1 else 0.0)}, 0.5, 1.0),
        (lambda w: {8: (0.5 + w / 9, 0.5 - w / 99)}, 0.0, 0.0),  # one of the two loses, whatever the other gains
        (lambda w: {8: (0.5 - w / 99, 0.5 + w / 9)}, 0.0, 0.0),
        (lambda w: {8: (0.9, 0.9), 2: (0.5 + w / 9, 0.5)}, 1.0, 2.0),
        (lambda w: {8: (0.9, 0.9 - w / 999), 2: (0.5 + w / 9, 0.5)}, 0.0, 0.0),  # another patch size loses
        (lambda w: {4: (1 - w / 99, 1 - w / 99), 2: (0.5 + w / 9, 0.5)}, 1.0, 2.0),  # only the native one may
        (lambda w: {8: (math.nan if w > 0.7 else 0.5 + w / 9, 0.5)}, 0.25, 0.5),
        (lambda w: {8: (0.5 - abs(w - 0.75), 0.5)}, 0.75, 0.75),
        (lambda w: {8: (0.5, 0.5)}, 0.0, 0.0),  # nothing is gained by chance
    ],
)
def test_the_choice_is_never_worse(says: Callable[[float], Any], chosen: float, weight: float) -> None:
    model = nn.Linear(1, 1, bias=False)
    trainer: Any = Trainer.__new__(Trainer)
    trainer.begun = trainer.ended = None
    trainer.progress = lambda *_: None

    def look() -> dict[tuple[int, int], Fidelity]:
        return {(p, p): Fidelity(*values, 0.0) for p, values in says(model.weight.item()).items()}

    native = SimpleNamespace(geometry=SimpleNamespace(patch_size=(4, 4)))
    trainer.pair = SimpleNamespace(student=model, teacher=native, look=look)
    model.weight.data.fill_(2.0)
    start, average = ({"weight": torch.full((1, 1), value)} for value in (0.0, 1.0))
    before, after, share = trainer.choose(start, average)
    assert (share, model.weight.item()) == (chosen, weight)
    assert {p[0]: (f.pooled, f.patches) for p, f in before.items()} == says(0.0)
    assert {p[0]: (f.pooled, f.patches) for p, f in after.items()} == says(weight)


def test_the_model_keeps_its_ways(photos: Path) -> None:
    model = vit().half().train()
    model.blocks[0].requires_grad_(False)
    frozen = weights(model.blocks[0])
    seen: list[int] = []
    model.norm.register_forward_hook(lambda *_: seen.append(1))
    anypatch.tune(model, images=photos, patch_size=8, steps=4, learning_rate=1e-3, **OPTIONS)
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert [p.requires_grad for p in model.blocks[0].parameters()] == [False] * len(frozen)
    assert all(p.requires_grad for p in model.blocks[1].parameters())
    assert same(weights(model.blocks[0]), frozen)
    assert all(p.grad is None for p in model.parameters())


def test_adapters_are_merged(photos: Path) -> None:
    pytest.importorskip("peft")
    model = vit()
    before, random = weights(model), torch.get_rng_state()
    result = anypatch.tune(model, images=photos, patch_size=8, steps=10, learning_rate=1e-2, lora=4, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), random)
    assert result.gained
    after = weights(model)
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name].shape == before[name].shape}
    changed = {name for name in changed if not torch.equal(after[name], before[name])}
    assert changed
    assert all(name.endswith("weight") and "norm" not in name for name in changed - {"pos_embed"})
    difference = after["blocks.0.attn.qkv.weight"] - before["blocks.0.attn.qkv.weight"]
    assert torch.linalg.matrix_rank(difference, rtol=1e-4) <= 4


def test_mixed_precision(photos: Path) -> None:
    model = vit()
    result = anypatch.tune(model, images=photos, patch_size=8, steps=8, learning_rate=1e-3, precision="bf16", **OPTIONS)
    assert result.settings["precision"] == "bf16"
    assert result.gained
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# -- rate, time, resuming ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_rate_is_found_and_minutes_become_steps(photos: Path) -> None:
    found = anypatch.tune(vit(), images=photos, patch_size=8, steps=160, **OPTIONS)
    assert learning_rate.FIRST_RATE < found.settings["learning_rate"] < 1e-2  # of a tiny model with random weights
    assert found.gained
    timed = anypatch.tune(vit(), images=photos, patch_size=8, minutes=0.05, **OPTIONS)  # too short to look for one
    assert timed.settings["steps"] >= 1


def stopped_before_training(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[int, str, float, list[str]]:
    """How many steps were taken before the training, of what weights it would have begun with, at what rate; notes."""
    found: list[Any] = []
    taken: list[int] = []
    one = Trainer.step

    def step(self: Trainer, number: int, *rest: Any) -> float:
        taken.append(number)
        return one(self, number, *rest)

    def run(self: Trainer, state: Any, _: Any) -> None:
        found.extend([len(taken), digest(self.pair.student), state.peak, self.notes])
        raise StoppedError

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(Trainer, "run", run)
    with pytest.raises(StoppedError):
        anypatch.tune(vit(), patch_size=8, **options, **OPTIONS)
    monkeypatch.undo()
    return tuple(found)  # type: ignore[return-value]


def test_finding_the_rate_costs_a_tenth_and_leaves_no_trace(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, begun, rate, notes = stopped_before_training(monkeypatch, images=photos, steps=150)
    none, start, *_ = stopped_before_training(monkeypatch, images=photos, steps=150, learning_rate=1e-3)
    assert none == 0
    assert 8 <= taken <= 15
    assert begun == start
    assert notes[0].startswith(f"learning rate {rate:g} by the held-out loss after 4 steps: ")
    short, _, first, notes = stopped_before_training(monkeypatch, images=photos, steps=20)
    assert short == 0
    assert rate == first * learning_rate.FACTOR ** (taken // 4 - 1)  # it wants a higher one
    assert "too few steps to try learning rates" in notes[0]
    lost = 1 - anypatch.tune(vit(), images=photos, patch_size=8, steps=1, **OPTIONS).curve[0][1]["8x8"]
    assert first == pytest.approx(1e-5 * math.sqrt(lost / 0.1), rel=0.06)
    assert stopped_before_training(monkeypatch, images=photos, steps=20, lora=2)[2] == pytest.approx(10 * first)


def rate_found(monkeypatch: pytest.MonkeyPatch, steps: int, loss: Callable[[float], float]) -> float:
    """What the range test finds from 1e-5, where a short run for a rate ends with this loss."""
    trainer: Any = Trainer.__new__(Trainer)
    trainer.pair, trainer.notes, trainer.progress = SimpleNamespace(student=nn.Linear(1, 1)), [], lambda *_: None
    trainer.look_steps = lambda: 3.0
    monkeypatch.setattr(learning_rate, "_loss_after", lambda _, peak, __: loss(peak / learning_rate.TRIAL_TIMES))
    return learning_rate.found_rate(trainer, steps, 1e-5)


@pytest.mark.parametrize(
    ("best", "steps", "tried"),
    [
        (0.0, 900, [0, 1, -1]),
        (3.0, 900, [0, 1, 2, 3, 4]),
        (-2.0, 900, [0, 1, -1, -2, -3]),
        (-3.0, 600, [0, 1, -1, -2]),  # no time for more
        (0.4, 90, []),
        (-4.0, 9000, [0, 1, -1, -2, -3, -4, -5]),  # from where every rate diverges
    ],
)
def test_the_rate_is_sought_both_ways(
    best: float, steps: int, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def loss(rate: float) -> float:
        seen.append(round(math.log(rate / 1e-5, learning_rate.FACTOR)))
        return math.inf if best < -3 and seen[-1] > -3 else abs(seen[-1] - best)

    found = rate_found(monkeypatch, steps, loss)
    assert seen == tried
    assert math.log(found / 1e-5, learning_rate.FACTOR) == pytest.approx(min(tried or [0], key=lambda p: abs(p - best)))


@pytest.mark.parametrize(("lower", "wanted"), [(0.97, 1e-5), (0.9, 5e-6)])
def test_a_lower_rate_has_to_be_better_by_more_than_chance(
    lower: float, wanted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {2e-5: 1.2, 1e-5: 1.0, 5e-6: lower, 2.5e-6: 1.0}
    assert rate_found(monkeypatch, 900, lambda rate: losses[round(rate, 10)]) == pytest.approx(wanted)


class StoppedError(Exception):
    pass


def test_an_interrupted_run_goes_on_to_the_same_numbers(photos: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {**OPTIONS, "images": photos, "patch_size": (2, 8), "steps": 10, "learning_rate": 1e-4}

    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("tuning") and done == 5:
            raise StoppedError

    whole = anypatch.tune(vit(), output=tmp_path / "whole", **arguments)
    model = vit()
    before = weights(model)
    with pytest.raises(StoppedError):
        anypatch.tune(model, output=tmp_path / "part", **{**arguments, "progress": interrupt})
    assert same(weights(model), before)
    assert [path.name for path in (tmp_path / "part").iterdir()] == [FILE]
    with pytest.raises(CheckpointError, match="learning_rate"):
        anypatch.tune(model, output=tmp_path / "part", resume=True, **{**arguments, "learning_rate": 2e-3})
    resumed = anypatch.tune(model, output=tmp_path / "part", resume=True, **arguments)
    assert whole.gained  # or all would end alike
    assert resumed.rows == whole.rows
    assert resumed.curve == whole.curve
    assert same(weights(model), weights(whole.model))
    assert sorted(p.name for p in (tmp_path / "part").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    assert not (tmp_path / "part" / FILE).exists()


def test_a_damaged_state_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="damaged"):
        anypatch.tune(
            vit(), images=photos, patch_size=8, steps=2, learning_rate=1e-4, output=tmp_path, resume=True, **OPTIONS
        )


# -- several processes -------------------------------------------------------------------------------------------


def _work(rank: int, port: int, photos: Path, results: Any) -> None:
    os.environ.update(
        {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
         "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    )  # fmt: skip
    torch.set_num_threads(1)
    model = vit()
    result = anypatch.tune(model, images=photos, patch_size=(2, 8), steps=6, learning_rate=1e-4, **OPTIONS)
    if rank == 0:
        results.put((result.rows, {name: value.numpy() for name, value in model.state_dict().items()}))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(photos: Path) -> None:
    port = builders.free_port()
    context = torch.multiprocessing.get_context("spawn")  # forked where gradients were computed before, none can be
    results = context.Queue()
    workers = [context.Process(target=_work, args=(rank, port, photos, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    model = vit()
    begun = weights(model)
    alone = anypatch.tune(model, images=photos, patch_size=(2, 8), steps=6, learning_rate=1e-4, **OPTIONS)
    assert alone.gained  # or there is nothing to compare
    rows, state = results.get(timeout=240)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    for one, two in zip(alone.rows, rows, strict=True):
        for name, value in one.items():
            assert two[name] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value)
    moved, apart = (
        sum((value - other[name]).abs().sum().item() for name, value in model.state_dict().items())
        for other in (begun, {name: torch.from_numpy(value) for name, value in state.items()})
    )
    assert apart < 0.01 * moved  # Adam turns rounding into steps where a gradient is nearly zero


@pytest.mark.slow
def test_accelerate_launches_it(photos: Path, tmp_path: Path) -> None:
    """``accelerate launch -m anypatch tune`` starts two processes, on the CPU as they are told, against one in here."""
    source = tmp_path / "source"
    anypatch.save(dinov2(), source)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(builders.free_port()),
        "-m", "anypatch", "tune", str(source), "--images", str(photos), "--patch-size", "8", "--steps", "4",
        "--learning-rate", "1e-3", "--batch-size", "8", "--workers", "0", "--device", "cpu", "--quiet",
        "--output", str(tmp_path / "two"),
    ]  # fmt: skip
    around = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=around)
    assert done.returncode == 0, done.stdout + done.stderr
    two = json.loads((tmp_path / "two" / "tune.json").read_text())
    assert two["settings"]["processes"] == 2
    one = anypatch.tune(str(source), images=photos, patch_size=8, steps=4, learning_rate=1e-3, **OPTIONS)
    for name, value in one.rows[0].items():
        assert two["rows"][0][name] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value)
    assert one.rows[0]["fidelity_after"] > one.rows[0]["fidelity_before"]


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"patch_size": 32}, GeometryError, "leaves 1 token of 32x32"),
        ({"patch_size": 7}, GeometryError, "does not divide"),
        ({"patch_size": ()}, GeometryError, "names no size"),
        ({"images": "nowhere"}, DataError, "no such folder"),
        ({"minutes": 1e-6}, DataError, "no time for one step"),
        ({"minutes": -1}, AnypatchError, "minutes must be above 0"),
        ({"minutes": 1, "steps": 1}, AnypatchError, "not both"),
        ({"steps": 0}, AnypatchError, "steps must be an int of at least 1"),
        ({"batch_size": 2.5}, AnypatchError, "batch_size must be an int"),
        ({"learning_rate": "fast"}, AnypatchError, "learning_rate must be"),
        ({"learning_rate": -1.0}, AnypatchError, "learning_rate must be"),
        ({"precision": "int8"}, AnypatchError, "precision must be one of no, bf16, fp16"),
        ({"resume": True}, AnypatchError, "resume needs output"),
        ({"lora": 0}, AnypatchError, "lora must be an int"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], says: str, photos: Path) -> None:
    model = vit()
    before = weights(model)
    with pytest.raises(error, match=says):
        anypatch.tune(model, **{**OPTIONS, "images": photos, "patch_size": 8, **options})
    assert same(weights(model), before)


def test_few_and_unreadable_images(photos: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(photos.iterdir())[:17]):
        (tmp_path / path.name).write_bytes(path.read_bytes() if number > 1 else b"no image")
    with pytest.raises(DataError, match="15 images that can be read, and 16 are the least"):
        anypatch.tune(vit(), images=tmp_path, patch_size=8, steps=1, **OPTIONS)
    (tmp_path / "more.png").write_bytes((photos / "20.png").read_bytes())
    whole = (photos / "21.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])  # opens, and cannot be decoded
    result = anypatch.tune(vit(), images=tmp_path, patch_size=8, steps=3, learning_rate=1e-4, **OPTIONS)
    assert any("00.png" in note and "01.png" in note for note in result.notes)
    assert any("cut.png" in note for note in result.notes)


def test_models_without_features(photos: Path) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.img_size, self.patch_size = 32, 4
            self.patch_embed = nn.Conv2d(3, 32, 4, 4)
            self.pos_embed = nn.Parameter(torch.zeros(1, 64, 32))

        def forward(self, pixels: Tensor) -> Tensor:
            return self.patch_embed(pixels).flatten(2).transpose(1, 2) + self.pos_embed

    with pytest.raises(UnsupportedModelError, match="no forward_features"):
        anypatch.tune(Bare(), images=photos, patch_size=8, steps=1, **OPTIONS)


def test_a_model_that_wants_more_than_pixels_is_refused_by_name(photos: Path) -> None:
    class Packed(HandMade):
        def forward_features(self, pixels: Tensor) -> Tensor:
            return super().forward_features(pixels) @ torch.ones(7)  # as one whose forward wants patches and a mask

    model = randomised(Packed())
    before = weights(model)
    with pytest.raises(UnsupportedModelError, match="features of Packed cannot be read from images alone"):
        anypatch.tune(model, images=photos, patch_size=8, steps=1, **OPTIONS)
    assert same(before, weights(model))


@pytest.mark.parametrize("kind", ["Siglip2Model", "Siglip2VisionModel"])
def test_a_model_of_packed_patches_is_refused_by_name(kind: str, photos: Path) -> None:
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision = transformers.Siglip2VisionConfig(**small, num_patches=64, patch_size=4)
    text = {**small, "vocab_size": 9, "projection_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    both = transformers.Siglip2Config(text_config=text, vision_config=vision.to_dict())
    model: Any = randomised(getattr(transformers, kind)(vision if kind == "Siglip2VisionModel" else both))
    before = weights(model)
    with pytest.raises(GeometryError, match="takes any image size: say which to tune at, image_size="):
        anypatch.tune(model, images=photos, patch_size=8, steps=1, **OPTIONS)
    with pytest.raises(UnsupportedModelError, match=f"features of {kind} cannot be read from images alone"):
        anypatch.tune(model, images=photos, patch_size=8, image_size=32, steps=1, **OPTIONS)
    assert same(before, weights(model))


class AnySize(nn.Module):
    """A ViT without a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_size = 4
        self.patch_embed = nn.Conv2d(3, 32, 4, 4)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, 48, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )

    def forward_features(self, pixels: Tensor) -> Tensor:
        tokens = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def forward(self, pixels: Tensor) -> Tensor:
        return self.forward_features(pixels).mean(1)


@pytest.mark.parametrize(
    ("patches", "image", "seen"), [(8, 32, ["32x32"]), ((8, 16), (32, 48), ["32x48"] * 2), (7, 42, ["42x42"])]
)
def test_a_model_of_any_image_size_is_tuned_at_the_one_that_is_named(
    patches: Any, image: Any, seen: list[str], photos: Path
) -> None:
    model: Any = randomised(AnySize())
    result = anypatch.tune(
        model, images=photos, patch_size=patches, image_size=image, steps=4, learning_rate=1e-3, **OPTIONS
    )
    assert [row["image_size"] for row in result.rows] == seen
    assert result.gained
    assert anypatch.geometry(model).patch_size == ((4, 4) if isinstance(patches, tuple) else (patches, patches))


def test_the_home_directory_as_output(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    result = anypatch.tune(vit(), images=photos, patch_size=8, steps=1, learning_rate=1e-3, output="~/tuned", **OPTIONS)
    result.to_html("~/report.html")
    assert not list((tmp_path / "work").iterdir())
    assert {"tune.json", "report.html", "model.safetensors"} <= {p.name for p in (tmp_path / "home/tuned").iterdir()}
    assert (tmp_path / "home/report.html").is_file()


def test_output_that_cannot_be_written(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError):
        anypatch.tune(vit(), images=photos, patch_size=8, steps=1, output=tmp_path / "file", **OPTIONS)
    assert (tmp_path / "file").read_text() == "mine"


# -- parts -------------------------------------------------------------------------------------------------------


def test_every_image_comes_before_any_comes_twice() -> None:
    drawn = [drawn_image(3, sample, 7) for sample in range(21)]
    assert [sorted(drawn[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert drawn[:7] != drawn[7:14]


def test_images_are_held_out_whole_and_no_more_than_can_be_looked_at(photos: Path, tmp_path: Path) -> None:
    for number in range(16):
        for path in photos.iterdir():
            (tmp_path / f"{number:02}-{path.name}").hardlink_to(path)
    for folder, faces, held in ((photos, 1, 5), (photos, 40, 4), (tmp_path, 1, 64), (tmp_path, 6, 32)):
        found = split(folder, 0, faces)
        assert len(found.held_out) == held
        assert len(found.held_out) + len(found.train) == len(list(folder.iterdir()))
        assert not {*found.held_out.keys} & {*found.train.keys}


def test_crops_lie_inside() -> None:
    random = np.random.default_rng(0)
    for width, height in ((80, 64), (10, 400), (400, 10)):
        for _ in range(50):
            left, top, right, bottom = random_box(width, height, random, 1.0)
            assert 0 <= left < right <= width + 1e-9
            assert 0 <= top < bottom <= height + 1e-9


def test_the_loss_by_hand() -> None:
    student = Features(torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, 2, 1), torch.tensor([[0.0, 0.0]]))
    teacher = Features(torch.tensor([[1.0, 1.0]]), -torch.ones(1, 4, 4, 1), torch.tensor([[math.log(3.0), 0.0]]))
    found = distances(Said(student), Said(teacher))
    assert found.inside.item() == 0
    assert found.pooled.item() == pytest.approx(1 - 1 / math.sqrt(2))
    assert found.patches.item() == pytest.approx(2)
    assert found.classes.item() == pytest.approx(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))


def test_the_loss_between_blocks_by_hand() -> None:
    features = Features(torch.ones(1, 1), torch.ones(1, 1, 1, 1))
    one = Tokens(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[[1.0, 0.0]]]]))
    # Four patches whose mean points to (0, 1): at right angles to the student's one; the prefix is 45 degrees away.
    four = torch.tensor([[[[9.0, 1.0], [-9.0, 1.0]], [[5.0, 2.0], [-5.0, 3.0]]]])
    found = distances(Said(features, [one]), Said(features, [Tokens(torch.tensor([[[1.0, 1.0]]]), four)]))
    assert found.inside.item() == pytest.approx((1 - 1 / math.sqrt(2) + 1) / 2)
    assert found.loss.item() == pytest.approx(schedule.INSIDE_WEIGHT * found.inside.item(), abs=1e-6)


def batches_of(photos: Path, rank: int = 0, size: int = 1) -> tuple[Batches, list[int]]:
    """Batches whose teacher says an image's mean and its red half on a grid of 1x2, and how often it was asked."""
    asked: list[int] = []

    def teach(crops: Tensor) -> Said:
        asked.append(len(crops))
        pixels = crops.float()
        patches = torch.stack([pixels[:, 0, :, :16].mean((1, 2)), pixels[:, 0, :, 16:].mean((1, 2))], 1)[
            :, None, :, None
        ]
        return Said(Features(pixels.mean((1, 2, 3))[:, None], patches), [Tokens(patches[:, 0, :0], patches)])

    feed = Feed(split(photos, 0).train, Preprocess(), 6, 0, 0, rank, size)
    return Batches(feed, [(32, 32), (16, 16)], teach), asked


def test_no_crop_comes_twice_and_the_first_batches_are_made_once(photos: Path) -> None:
    batches, asked = batches_of(photos)
    first = [batches[step] for step in range(20)]
    assert asked == [6] * 20
    for batch in first:
        assert batch is not None
        assert batch.crops[16, 16].shape == (6, 3, 16, 16)
        red = batch.crops[32, 32][:, 0].float()
        halves = torch.stack([red[..., :16].mean((1, 2)), red[..., 16:].mean((1, 2))], 1)
        assert torch.equal(batch.said.features.patches[:, 0, :, 0], halves)
    crops = {crop.numpy().tobytes() for batch in first if batch is not None for crop in batch.crops[32, 32]}
    assert len(crops) == 120
    again = [batches[step] for step in range(12)]
    assert asked == [6] * 20
    assert all(a is b for a, b in zip(again, first, strict=False))


def test_two_processes_share_a_batch_and_one_that_begins_later_makes_the_same(photos: Path) -> None:
    whole, _ = batches_of(photos)
    parts = [batches_of(photos, rank, 2)[0] for rank in (0, 1)]
    for step in range(16):
        assert whole[step] is not None
    for step in (14, 15, 3):  # as a resumed run asks
        every, halves = whole[step], [part[step] for part in parts]
        assert every is not None
        for rank, half in enumerate(halves):
            assert half is not None
            assert torch.equal(every.crops[32, 32][rank::2], half.crops[32, 32])
            assert torch.equal(every.said.features.patches[rank::2], half.said.features.patches)


def test_every_step_asks_all_patch_sizes_each_for_its_share(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost at each counts as a share of it; grids of 64, 16 and 4 tokens are seen by 1, 2 and 4 of 7 images."""
    losses: list[tuple[list[str], list[float], float]] = []
    one, alone = Trainer.step, Pair.losses

    def step(self: Trainer, number: int, batch: Any, *rest: Any) -> float:
        sizes = self.seen_at(number)
        with torch.no_grad():
            plain = [alone(self.pair, patch, batch, [image]).item() for image, patch in enumerate(sizes)]
        found = one(self, number, batch, *rest)
        losses.append(([f"{patch[0]}x{patch[1]}" for patch in sizes], plain, found))
        return found

    monkeypatch.setattr(Trainer, "step", step)
    result = anypatch.tune(vit(), images=photos, patch_size=(4, 8, 16), steps=14, learning_rate=1e-5, **OPTIONS)
    lost = {patch: 1 - found for patch, found in result.curve[0][1].items()}
    mean, times = sum(lost.values()) / 3, {"4x4": 7 / 3, "8x8": 7 / 6, "16x16": 7 / 12}
    weights = {patch: times[patch] * (4.0 if patch == "4x4" else min(mean / lost[patch], 4.0)) for patch in lost}
    for sizes, plain, found in losses:
        expected = sum(weights[patch] * loss for patch, loss in zip(sizes, plain, strict=True)) / 8
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    seen = Counter(patch for sizes, *_ in losses for patch in sizes)
    for patch, images in {"4x4": 16, "8x8": 32, "16x16": 64}.items():
        assert abs(seen[patch] - images) <= 3, seen  # 14 steps of 8 images
    assert all(set(sizes) == set(weights) for sizes, *_ in losses)


def test_a_tuned_model_is_not_replaced_unless_asked(photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"images": photos, "patch_size": 8, "steps": 1, "learning_rate": 1e-4, **OPTIONS}
    anypatch.tune(vit(), output=tmp_path / "out", **options)
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for resume in (False, True):  # a script that resumes may be started once more after its end
        with pytest.raises(CheckpointError, match="holds a tuned model already: name another place, or pass overwrite"):
            anypatch.tune(vit(), output=tmp_path / "out", resume=resume, **options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == written
    again = anypatch.tune(vit(), output=tmp_path / "out", overwrite=True, **{**options, "steps": 2})
    assert json.loads((tmp_path / "out" / "tune.json").read_text())["settings"]["steps"] == 2
    assert str(again) == again.says


def test_result_and_report(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    result = anypatch.tune(vit(), images=photos, patch_size=8, steps=4, learning_rate=1e-3, output=tmp_path, **OPTIONS)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert result.says in (tmp_path / "TUNING.md").read_text()
    assert "[TUNING.md](TUNING.md)" in (tmp_path / "README.anypatch.md").read_text()
    said = json.loads((tmp_path / "tune.json").read_text())
    assert said["rows"] == result.rows
    assert (tmp_path / "tune.csv").read_text().count("\n") == 2
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert page.count('<figure class="tuned">') == 4  # as many held-out images, each natively, before and after
    assert page.count('alt="Patch features of ') == 4 * 3
    assert "accuracy_after" not in said["rows"][0]
    assert len(result.to_pandas()) == 1
    assert repr(result).startswith("TuneResult(VisionTransformer, patch 8x8")  # and no line of the model's
    assert len(repr(result)) < 80
    assert '<th scope="col">fidelity, after</th>' in result._repr_html_()
    assert f"<td>{result.rows[0]['fidelity_after']:.4f}</td>" in result._repr_html_()
    assert result.plot().axes[0].get_xlabel() == "steps"


@pytest.mark.slow
def test_cards_of_a_tuned_model_name_the_one_that_says_how(photos: Path, tmp_path: Path) -> None:
    """For one patch size, for several, and where the tuned model is adapted once more."""
    options: dict[str, Any] = {"images": photos, "steps": 1, "learning_rate": 1e-4, **OPTIONS}
    anypatch.tune(vit(), patch_size=8, output=tmp_path / "one", **options)
    anypatch.tune(vit(), patch_size=(4, 8), output=tmp_path / "two", **options)
    for tuned in ("one", "two"):
        anypatch.save(anypatch.load(tmp_path / tuned, 16), tmp_path / f"{tuned} again")
        for name in (tuned, f"{tuned} again"):
            assert (tmp_path / name / "README.md").read_text().count("[TUNING.md](TUNING.md)") >= 1, name
            assert "held-out" in (tmp_path / name / "TUNING.md").read_text()
    card = (tmp_path / "one" / "README.md").read_text()
    assert card.index("| patch size | 4x4 | 8x8 |") < card.index("TUNING.md")
    assert "tuned for patch 4x4, 8x8" in (tmp_path / "two" / "README.md").read_text()


@pytest.mark.slow
def test_the_own_patch_size_alone_is_said_to_be_pointless(photos: Path) -> None:
    options: dict[str, Any] = {"images": photos, "steps": 1, "learning_rate": 1e-4, **OPTIONS}
    with pytest.warns(AnypatchWarning, match="patch size 4x4 is the model's own: nothing is lost there"):
        result = anypatch.tune(vit(), patch_size=4, **options)
    assert any("is the model's own" in note for note in result.notes)
    assert result.rows[0]["fidelity_before"] == pytest.approx(1, abs=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AnypatchWarning)
        anypatch.tune(vit(), patch_size=(4, 8), **options)


@pytest.mark.slow
def test_class_folders_give_accuracy_before_and_after(tmp_path: Path) -> None:
    """Red and blue images, which any features tell apart; one folder of images of both, where they cannot be told."""
    random = np.random.default_rng(0)
    for number in range(24):
        colour = random.integers(100, 255, (4, 4, 3)) * [[[1, 0, 0]], [[0, 0, 1]]][number % 2]
        for place, owner in (("apart", "red" if number % 2 == 0 else "blue"), ("mixed", f"{number // 12}")):
            folder = tmp_path / place / owner
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(colour.astype(np.uint8)).resize((40, 40)).save(folder / f"{number:02}.png")
    options = {**OPTIONS, "patch_size": 8, "steps": 1, "learning_rate": 1e-5}
    apart = anypatch.tune(vit(), images=tmp_path / "apart", output=tmp_path / "out", **options)
    assert (apart.rows[0]["accuracy_before"], apart.rows[0]["accuracy_after"]) == (1.0, 1.0)
    assert apart.settings["native_accuracy"] == 1.0
    assert (
        "accuracy, after"
        in (tmp_path / "out" / "tune.csv").read_text() + (tmp_path / "out" / "report.html").read_text()
    )
    mixed = anypatch.tune(vit(), images=tmp_path / "mixed", **options)
    assert mixed.rows[0]["accuracy_before"] < 1


def test_command_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from anypatch.cli import run

    native = vit()
    anypatch.save(native, tmp_path / "native")
    command = ["tune", str(tmp_path / "native"), "--images", str(photos), "--patch-size", "8", "--steps", "4"]
    command += ["--output", str(tmp_path / "tuned"), "--learning-rate", "1e-3", "--workers", "0", "--device", "cpu"]
    assert run([*command, "--json", "--quiet"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rows"][0]["patch_size"] == "8x8"
    loaded = timm.create_model(f"local-dir:{tmp_path / 'tuned'}", pretrained=True)
    assert loaded.patch_embed.patch_size == (8, 8)
    assert run([*command[:-2], "--steps", "0"]) == 2
