"""The steps of the layer that sees pixels, in coordinates in which pixels are alike."""

from __future__ import annotations

import pytest
import torch
from scipy.fft import dct
from torch import nn

from anypatch.tuning import schedule
from anypatch.tuning.whitening import Optimizer, Whitening, cosines, whitenings


def photographs(count: int = 48, side: int = 24) -> torch.Tensor:
    """Noise with a natural image's spectrum, channels that mostly agree (n, 3, h, w)."""
    noise = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    across, down = torch.fft.fftfreq(side)[None], torch.fft.fftfreq(side)[:, None]
    shaped = torch.fft.ifft2(torch.fft.fft2(noise) / (across.square() + down.square()).sqrt().clamp(min=1 / side)).real
    return shaped + 3 * shaped.mean(1, keepdim=True)


def test_cosines_are_scipy_s() -> None:
    assert torch.allclose(cosines(7), torch.from_numpy(dct(torch.eye(7).numpy(), norm="ortho", axis=0)), atol=1e-6)


def test_pixels_come_out_alike() -> None:
    images, conv = photographs(), nn.Conv2d(3, 1, 6, 6)
    patches = torch.nn.functional.unfold(images, 6, stride=6).transpose(1, 2).reshape(-1, 3, 6, 6)
    found = Whitening.of(conv, [images[:20], images[20:]])(patches)

    def spread(pixels: torch.Tensor) -> float:
        rows = pixels.flatten(1)
        powers = torch.linalg.eigvalsh(rows.T @ rows / len(rows))
        return (powers.max() / powers.median()).item()

    assert spread(patches) > 200
    assert spread(found) < 8


def test_the_map_is_symmetric() -> None:
    whitening = Whitening.of(nn.Conv2d(3, 1, (4, 6), (4, 6)), [photographs(8)])
    one, two = torch.rand(2, 5, 3, 4, 6)
    assert (whitening(one) * two).sum().item() == pytest.approx((one * whitening(two)).sum().item(), rel=1e-5)


def test_a_step_is_adam_s_in_those_coordinates_and_all_others_are_adam_s() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 6, 6), nn.Flatten(), nn.Linear(64, 2))
    images = photographs(4)
    (whitened,) = whitenings(model, [images]).items()
    parameter, whitening = whitened
    assert parameter is model[0].weight
    optimizer = Optimizer(model.parameters(), dict([whitened]))
    model(images).square().sum().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step()
    for name, new in model.named_parameters():
        gradient = gradients[name]
        step = -1e-3 * (whitening(gradient) if name == "0.weight" else gradient).sign()  # Adam's first
        wanted = schedule.PIXELS * whitening(step) if name == "0.weight" else step
        assert torch.allclose(new - before[name], wanted, atol=2e-6), name


def test_layers_that_are_none_or_frozen_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 6, 6))
    assert not whitenings(nn.Linear(3, 3), [photographs(2)])
    assert whitenings(model, [photographs(2)])
    model.requires_grad_(False)
    assert not whitenings(model, [photographs(2)])
