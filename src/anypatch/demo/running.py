"""The demo's work: adapt to each patch size, measure every copy."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anypatch.demo.data import IMAGE_SIZE, PATCH_SIZE, demo_data, demo_model
from anypatch.demo.rows import BATCH, ROUNDS, DemoResult, Row, Series, View
from anypatch.demo.webpage import page
from anypatch.errors import AnypatchError
from anypatch.report.colours import Colours

if TYPE_CHECKING:
    from torch import nn

Progress = Callable[[int, int], None]
PATCH_SIZES = (2, 3, 4, 5, 6, 8, 12, 16)  # from half to four times its own 4


def run_demo(
    patch_sizes: Sequence[int] = PATCH_SIZES,
    *,
    output: str | Path | None = Path("anypatch-demo.html"),
    images: int | None = None,
    progress: Progress | None = None,
) -> DemoResult:
    """Adapt the demo model to each patch size, measure every copy, write a report.

    Args:
        patch_sizes: pixels; the original's own is always among them.
        output: the HTML report, or ``None`` for none.
        images: measure on the first so many held-out images, instead of all.
        progress: called with (done, total) as the work goes on.
    """
    output = None if output is None else Path(output)
    if output is not None and not output.parent.is_dir():
        raise AnypatchError(f"cannot write {output}: {output.parent} is not a directory")
    if output is not None and output.is_dir():
        raise AnypatchError(f"{output} is a folder: name a file, such as {output / 'anypatch-demo.html'}")
    digit_images, labels = (part[:images] for part in demo_data())
    model = demo_model()
    plan = _plan(patch_sizes)
    examples = {digit: int((labels == digit).nonzero()[0]) for digit in sorted({*labels.tolist()})}
    candidates = [_adapted(model, series, patch_size) for series, patch_size in plan]
    inputs = [_resized(digit_images, candidate.patch_embed.img_size[0]) for candidate in candidates]
    total, done = len(plan) + ROUNDS, 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    rates = _rates(plan, candidates, inputs, step)
    rows: list[Row] = []
    views: dict[int, list[View]] = {digit: [] for digit in examples}
    for i, (series, patch_size) in enumerate(plan):
        run = _forward(candidates[i], inputs[i])
        if i == 0:
            reference, colours = run, Colours([run.tokens.flatten(0, 1)])
        answers = run.logits.argmax(1)
        row = Row(
            series,
            patch_size,
            inputs[i].shape[-1],
            accuracy=_mean(answers == labels),
            same=_mean(answers == reference.logits.argmax(1)),
            cosine=_mean(F.cosine_similarity(run.pooled, reference.pooled)),
            images_per_second=rates.get(i),
        )
        rows.append(row)
        for digit, n in examples.items():
            confidence = run.logits[n].softmax(0).max().item()
            shown = colours(run.tokens[n]).reshape(row.grid, row.grid, 3)
            views[digit].append(View(row, inputs[i][n, 0], shown, int(answers[n]), confidence))
        step()
    result = DemoResult(tuple(rows), len(labels), {digit: tuple(seen) for digit, seen in views.items()})
    if output is not None:
        output.write_text(page(result), encoding="utf-8")
    return result


def _rates(
    plan: Sequence[tuple[Series, int]], candidates: Sequence[Any], inputs: Sequence[Tensor], step: Callable[[], None]
) -> dict[int, float]:
    """Images per second of each adapted model, by its place in the plan."""
    rates: dict[int, float] = {}
    for _ in range(ROUNDS):  # in rounds, so that a busy moment does not fall on one model alone
        for i, (series, _patch_size) in enumerate(plan):
            if series in ("grid", "image"):
                rates[i] = max(rates.get(i, 0.0), _rate(candidates[i], inputs[i][:BATCH]))
        step()
    return rates


def _plan(patch_sizes: Sequence[int]) -> list[tuple[Series, int]]:
    """What to measure, the original first."""
    others = sorted({*patch_sizes} - {PATCH_SIZE})
    plan: list[tuple[Series, int]] = [("grid", PATCH_SIZE)]
    plan += [("grid", p) for p in others]
    plan += [("image", p) for p in others if p > 0 and IMAGE_SIZE % p == 0]
    plan += [("bicubic", p) for p in others]
    plan += [("random", p) for p in others]
    return plan


def _adapted(model: nn.Module, series: Series, patch_size: int) -> Any:
    """A copy of the model at another patch size."""
    from anypatch.adaptation import adapt

    candidate: Any = adapt(
        copy.deepcopy(model),
        patch_size,
        keep="image" if series == "image" else "grid",
        kernel="bicubic" if series == "bicubic" else "wiener",
    )
    if series == "random":
        draws = torch.Generator().manual_seed(0)
        torch.nn.init.normal_(candidate.patch_embed.proj.weight, std=0.02, generator=draws)
        torch.nn.init.zeros_(candidate.patch_embed.proj.bias)
    return candidate


def _resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True)


@dataclass(frozen=True)
class _Run:
    logits: Tensor
    pooled: Tensor
    tokens: Tensor


def _forward(model: Any, images: Tensor) -> _Run:
    """Logits, pooled features and final patch features of all images."""
    outputs = []
    with torch.inference_mode():
        for batch in images.split(BATCH):
            features = model.forward_features(batch)
            pooled = model.forward_head(features, pre_logits=True)
            outputs.append((model.head(pooled), pooled, features[:, model.num_prefix_tokens :]))
    return _Run(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))


def _rate(model: nn.Module, batch: Tensor) -> float:
    """Images per second of one forward pass."""
    with torch.inference_mode():
        start = time.perf_counter()
        model(batch)
        return len(batch) / (time.perf_counter() - start)


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
