"""Empty models: nothing but buffers has memory, buffers are real, nothing global is touched."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anypatch.core import empty as module
from anypatch.core.empty import empty


class Experts(nn.Module):
    """A terabyte of parameters, made before they are registered, in every way that libraries do."""

    def __init__(self) -> None:
        super().__init__()
        side = 2**18
        self.zeros = nn.Parameter(torch.zeros(side, side))
        self.empty = nn.Parameter(torch.empty((side, side), dtype=torch.bfloat16))
        self.scaled = nn.Parameter(side**-0.5 * torch.randn(side, side).mul_(2))
        self.copied = nn.Parameter(torch.ones(side, side).clone().t())
        self.linear = nn.Linear(side, side)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.orthogonal_(self.scaled)
        with torch.no_grad():
            self.linear.bias.fill_(3.0)
            self.zeros[0] = 7.0
        self.three = float(self.linear.bias[5])
        self.register_buffer("table", torch.outer(torch.arange(4.0), torch.ones(3)))


def test_parameters_take_no_memory_however_they_are_made() -> None:
    model = empty(Experts)
    assert all(p.is_meta and isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())
    assert [tuple(p.shape) for p in model.parameters()] == [(2**18, 2**18)] * 5 + [(2**18,)]
    assert model.empty.dtype == torch.bfloat16
    assert model.three == 3.0
    assert torch.equal(model.table, torch.arange(4.0)[:, None].expand(4, 3))


class Tables(nn.Module):
    """Buffers that start like parameters do, larger than what is made at once."""

    def __init__(self) -> None:
        super().__init__()
        size = 2 * module.SMALL
        self.weight = nn.Parameter(torch.randn(size))
        grown = torch.zeros(2, size)
        row = grown[1]
        row.copy_(torch.arange(size))
        before = grown * 2
        grown.add_(1)
        self.register_buffer("grown", grown)
        self.register_buffer("before", before)
        self.register_buffer("mask", torch.ones(200, 200).tril().bool())
        self.register_buffer("on_device", torch.full((size,), 2.0, device=self.weight.device) / 3)
        self.register_buffer("noise", torch.randn(size))
        self.plain = [torch.zeros(size).sub(4), (torch.ones(size), 1)]
        self.numbers = torch.ones(size).mul(5).numpy()
        self.total = torch.ones(size).sum().item()
        self.meta = self.weight.is_meta
        self.shared = self.grown


def test_buffers_are_what_the_constructor_computes() -> None:
    model, real = empty(Tables), Tables()
    for name, buffer in real.named_buffers():
        found = model.get_buffer(name)
        assert not found.is_meta
        assert (found.dtype, found.stride()) == (buffer.dtype, buffer.stride())
        assert name == "noise" or torch.equal(found, buffer), name
    assert torch.equal(model.plain[0], real.plain[0])
    assert torch.equal(model.plain[1][0], real.plain[1][0])
    assert (model.numbers == 5).all()
    assert model.total == real.total
    assert model.meta is False
    assert model.shared is model.grown
    assert model.noise.std() > 0.9


def test_random_buffers_are_the_same_each_time_and_nobody_elses() -> None:
    before = torch.get_rng_state()
    assert torch.equal(empty(Tables).noise, empty(Tables).noise)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_default_dtype_of_the_process_does_not_matter() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("fractions", torch.arange(5) / 3)
            self.register_buffer("given", torch.tensor([1.0, 2.5]))
            self.register_buffer("steps", torch.linspace(0, 1, 7))
            self.register_buffer("whole", torch.arange(5))
            self.register_buffer("exact", torch.ones(2, dtype=torch.float64))
            self.register_buffer("power", 10000 ** (torch.arange(3) * 0.25))

    real = Model()
    torch.set_default_dtype(torch.float64)
    try:
        found = empty(Model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.linear.weight.dtype == torch.float32
    for name, buffer in real.named_buffers():
        assert found.get_buffer(name).dtype == buffer.dtype, name
        assert torch.equal(found.get_buffer(name), buffer), name


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(2, 2), nn.Linear(300, 300)
            self.again = nn.ModuleList([nn.Linear(2, 2), nn.Linear(300, 300)])
            self.again[0].weight, self.again[1].weight = self.small.weight, self.large.weight

    model = empty(Tied)
    assert model.again[0].weight is model.small.weight
    assert model.again[1].weight is model.large.weight


def test_a_constructor_that_needs_memory_is_run_for_real_without_the_global_generator() -> None:
    class Pointer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(300, 300)
            if self.linear.weight.untyped_storage().data_ptr() == 0:
                raise RuntimeError("needs memory")
            self.register_buffer("noise", torch.rand(3))

    before = torch.get_rng_state()
    model = empty(Pointer)
    assert isinstance(model.noise, Tensor)
    assert torch.equal(torch.get_rng_state(), before)
