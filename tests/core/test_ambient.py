"""What happens around a call changes nothing in its result, and the call changes nothing around it."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import anypatch
from anypatch.core import modes
from anypatch.errors import UnsupportedModelError
from anypatch.inspection import inspect
from builders import transformers_model
from families import Family, families

timm = pytest.importorskip("timm")


def vit(**kwargs: object) -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, **kwargs)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {**model.state_dict(), **dict(model.named_buffers())}


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = state(a), state(b)
    return x.keys() == y.keys() and all(x[n].dtype == y[n].dtype and torch.equal(x[n], y[n]) for n in x)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AMBIENT: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "meta device": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "deterministic": deterministic,
}


class Doubling(TorchFunctionMode):
    """What a user's mode may do to whatever torch computes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func in (torch.matmul, torch.einsum, F.interpolate, Tensor.__matmul__) else result


class Recording(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.double() if isinstance(result, Tensor) and result.is_floating_point() else result


MODES: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "function mode": Doubling,
    "dispatch mode": Recording,
    "fake tensors": FakeTensorMode,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "absolute": vit,
    "rotary": lambda: timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=1),
    "relative": lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=56, window_size=7, depths=(1, 1)),
    "continuous": lambda: timm.create_model("swinv2_tiny_window8_256", img_size=64, window_size=8, depths=(1, 1)),
}


@pytest.mark.parametrize("around", AMBIENT)
@pytest.mark.parametrize("kind", MODELS)
def test_the_result_is_the_same_under(around: str, kind: str) -> None:
    model = MODELS[kind]()
    other = copy.deepcopy(model)
    ask = {"patch_size": 8 if kind in ("relative", "continuous") else 28, "keep": "grid"}
    anypatch.adapt(model, **ask)
    with AMBIENT[around]():
        anypatch.adapt(other, **ask)
    assert same(model, other)
    assert not any(t.is_inference() for t in state(other).values())
    image = tuple(anypatch.geometry(other).image_size)
    other(torch.randn(2, 3, *image)).sum().backward()


@pytest.mark.parametrize("around", MODES)
def test_modes_of_the_callers_are_laid_aside(around: str) -> None:
    model = vit()
    other = copy.deepcopy(model)
    anypatch.adapt(model, 32, image_size=96)
    with MODES[around]() as mode:
        anypatch.adapt(other, 32, image_size=96)
        assert torch.utils._python_dispatch._len_torch_dispatch_stack() == int(not isinstance(mode, Doubling))
        assert torch.overrides._len_torch_function_stack() == int(isinstance(mode, Doubling))
    assert same(model, other)
    assert all(type(tensor) is nn.Parameter for tensor in other.parameters())


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": torch.func.grad,
    "jacfwd": torch.func.jacfwd,
    "functionalize": torch.func.functionalize,
    "vmap": torch.func.vmap,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_the_callers_are_laid_aside(transform: str) -> None:
    model = vit(embed_dim=48)
    other = copy.deepcopy(model)
    anypatch.adapt(model, 32, image_size=96)

    def inside(x: Tensor) -> Tensor:
        anypatch.adapt(other, 32, image_size=96)
        return (x * x).sum()

    TRANSFORMS[transform](inside)(torch.ones(2, 3) if transform == "vmap" else torch.ones(3))
    assert same(model, other)
    other(torch.randn(2, 3, 96, 96)).sum().backward()


COMPILED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "adapt": lambda model, x: anypatch.adapt(model, 32, image_size=96)(x),
    "at": lambda model, x: anypatch.at(model, 32, image_size=96)(x),
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", COMPILED)
def test_the_compiler_of_the_callers_is_kept_away(verb: str) -> None:
    """It traced the modes in which twins are built, and failed with a TypeError of torch's."""
    model = vit()
    wanted = anypatch.adapt(copy.deepcopy(model), 32, image_size=96)
    kinds = []

    def backend(graph: Any, inputs: Any) -> Any:
        kinds.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    x = torch.randn(1, 3, 96, 96)
    compiled = torch.compile(lambda x: COMPILED[verb](model, x), backend=backend)
    for _ in range(2):
        assert_close(compiled(x), wanted(x), rtol=1e-5, atol=1e-6)
    assert kinds  # what follows is compiled as ever
    assert verb != "adapt" or same(model, wanted)


FAMILIES = [family for family in families() if not family.refused]
CASTS = [torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def _target(model: nn.Module, family: Family) -> Any:
    """Another patch, and another grid where the model has one."""
    return family.patch_size or tuple(2 * side for side in anypatch.geometry(model).patch_size)


def _outcome(model: nn.Module, target: Any, keep: str, around: contextlib.AbstractContextManager) -> str:
    with around:
        try:
            anypatch.adapt(model, target, keep=keep)
        except anypatch.AnypatchError as error:
            return str(error)
    return ""


@pytest.mark.long
@pytest.mark.parametrize("keep", ["image", "grid"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"{f.library}-{f.name}")
def test_every_family_is_the_same_under_everything(family: Family, keep: str) -> None:
    """The same bytes, or the same words of a refusal."""
    torch.manual_seed(0)
    model = family.build()
    target, wanted = _target(model, family), copy.deepcopy(model)
    said = _outcome(wanted, target, keep, contextlib.nullcontext())
    for name, around in {**AMBIENT, **MODES}.items():
        other = copy.deepcopy(model)
        assert _outcome(other, target, keep, around()) == said, name
        assert same(wanted, other), name


@pytest.mark.long
@pytest.mark.parametrize("dtype", CASTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"{f.library}-{f.name}")
def test_every_family_is_the_same_after_a_cast_and_back(family: Family, dtype: torch.dtype) -> None:
    """Tables that the library computes are computed anew: as exact as in a model that was never cast."""
    torch.manual_seed(0)
    model, exact = family.build(), {}
    target = _target(model, family)
    wanted = copy.deepcopy(model)
    computed = {name for name, _ in model.named_buffers()}
    if _outcome(wanted, target, "image", contextlib.nullcontext()):
        pytest.skip("refused, and said so by the proof of sameness")
    rounded = {n: t.detach().to(dtype).to(t.dtype) for n, t in model.named_buffers() if t.is_floating_point()}
    for name, tensor in rounded.items():
        model.get_buffer(name).data = tensor
    anypatch.adapt(model, target)
    exact = dict(wanted.named_buffers())
    for name, buffer in model.named_buffers():
        if name not in computed or not buffer.is_floating_point() or torch.equal(buffer, exact[name]):
            continue
        # what stayed as it was rounded, or a trained table, which is resampled from what it was rounded to
        error = (buffer - exact[name]).norm() / exact[name].norm().clamp_min(1e-6)
        assert error < 4 * torch.finfo(dtype).eps, (name, float(error))


@pytest.mark.parametrize("around", AMBIENT)
def test_check_says_the_same_under(around: str) -> None:
    model = vit()
    expected = anypatch.check(model, 32)
    with AMBIENT[around]():
        found = anypatch.check(model, 32)
    assert found == expected


def test_random_states_are_left_alone() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1,
                                       num_attention_heads=2, intermediate_size=32, decoder_hidden_size=32,
                                       decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                                       decoder_intermediate_size=32)  # fmt: skip
    model = transformers.ViTMAEForPreTraining(config)
    before = torch.get_rng_state()
    assert anypatch.check(model, 16).passed  # masks at random
    anypatch.adapt(model, 16)
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers_drawn_on_its_own_are_the_same_each_time() -> None:
    def draw() -> list[Tensor]:
        with modes.on_its_own():
            a = [torch.rand(3), torch.randn(2), torch.randperm(5), torch.empty(3).uniform_(), torch.randint(9, (3,))]
            return [*a, torch.bernoulli(torch.full((4,), 0.5)), torch.nn.functional.dropout(torch.ones(8))]

    before = torch.get_rng_state()
    first = draw()
    assert all(torch.equal(a, b) for a, b in zip(first, draw(), strict=True))
    assert not torch.equal(first[0], first[3])
    assert torch.equal(torch.get_rng_state(), before)


# -- what the model's tensors went through before ----------------------------------------------------------


@pytest.mark.siblings(fast=6)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("kind", ["rotary", "relative", "continuous"])
def test_computed_tables_are_computed_anew_whatever_they_were_rounded_to(dtype: torch.dtype, kind: str) -> None:
    model = MODELS[kind]()
    cast = copy.deepcopy(model).to(dtype).float()
    ask = {"image_size": 112 if kind != "continuous" else 128}
    anypatch.adapt(model, **ask)
    anypatch.adapt(cast, **ask)
    tables, found = dict(model.named_buffers()), dict(cast.named_buffers())
    assert tables.keys() == found.keys()
    for name, table in tables.items():
        exact = table.to(dtype).float() if table.is_floating_point() else table
        assert torch.equal(found[name], table) or torch.equal(found[name], exact), name


def test_rounded_twice() -> None:
    model = MODELS["rotary"]()
    cast = copy.deepcopy(model).half().bfloat16().float()
    anypatch.adapt(model, image_size=112)
    anypatch.adapt(cast, image_size=112)
    assert torch.equal(model.rope.pos_embed, cast.rope.pos_embed)


def test_a_trained_table_in_a_buffer_is_resampled_still() -> None:
    model = MODELS["rotary"]()
    trained = model.rope.pos_embed * 1.05  # no rounding explains it
    model.rope.pos_embed = trained.clone()
    expected = copy.deepcopy(model)
    anypatch.adapt(expected, image_size=112)
    fresh = MODELS["rotary"]()
    anypatch.adapt(fresh, image_size=112)
    assert not torch.allclose(expected.rope.pos_embed, fresh.rope.pos_embed)


# -- graphs, memory formats, shared memory -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_graph_that_is_still_alive_does_not_matter(dtype: torch.dtype) -> None:
    model = vit().to(dtype)
    loss = model(torch.randn(2, 3, 64, 64, dtype=dtype)).sum()
    loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    anypatch.adapt(model, 32, image_size=192)
    model(torch.randn(2, 3, 192, 192, dtype=dtype)).sum().backward()
    weight = model.patch_embed.proj.weight
    assert weight.grad is not None
    assert weight.grad.shape == weight.shape == (192, 3, 32, 32)
    assert any(p is weight for group in optimizer.param_groups for p in group["params"])
    assert loss.grad_fn is not None


def test_an_error_while_a_graph_is_alive_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from anypatch.core import plan as plans

    model = vit()
    loss = model(torch.randn(2, 3, 64, 64)).sum()

    def fail(self: object) -> None:
        raise OSError("no more")

    before = copy.deepcopy(model.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(plans.SetAttribute, "apply", fail)
        with pytest.raises(OSError, match="no more"):
            anypatch.adapt(model, 32)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert loss.grad_fn is not None


def test_channels_last_is_kept() -> None:
    model = vit().to(memory_format=torch.channels_last)
    plain = vit()
    for m in (model, plain):
        anypatch.adapt(m, 32)
    weight = model.patch_embed.proj.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert torch.equal(weight, plain.patch_embed.proj.weight)


def test_shared_memory_is_kept() -> None:
    model = vit().share_memory()
    anypatch.adapt(model, 32)
    assert all(p.is_shared() for p in model.parameters())
    assert not any(p.is_shared() for p in vit().parameters())


def test_a_flat_buffer_that_is_held_is_said() -> None:
    def flat(model: nn.Module) -> Tensor:
        vector = nn.utils.parameters_to_vector(model.parameters()).detach()
        nn.utils.vector_to_parameters(vector, model.parameters())
        return vector

    model = vit()
    held = [flat(model)]
    with pytest.raises(UnsupportedModelError, match=r"cls_token|weight is a part of a tensor of shape .* then flatten"):
        anypatch.adapt(model, 32)
    assert model.patch_embed.proj.weight.untyped_storage().data_ptr() == held[0].untyped_storage().data_ptr()
    anypatch.adapt(model, 16)
    held.clear()  # nobody steps or reduces it as a whole
    anypatch.adapt(model, 32)
    model(torch.zeros(1, 3, 64, 64))


def test_parameters_in_one_memory_stay_in_one() -> None:
    """Two blocks that share their table by its memory, not as one object."""
    sizes = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}
    model = timm.create_model("beit_base_patch16_224", **sizes)
    first, second = (block.attn.relative_position_bias_table for block in model.blocks)
    second.data = first.data
    anypatch.adapt(model, image_size=96)
    assert second.data_ptr() == first.data_ptr()
    assert second.shape == (11**2 + 3, 3)


# -- who else holds a parameter ----------------------------------------------------------------------------


def test_a_parameter_of_another_model_is_not_changed_under_it() -> None:
    teacher, student = vit(), vit()
    student.patch_embed.proj.weight = teacher.patch_embed.proj.weight
    before = teacher.patch_embed.proj.weight.detach().clone()
    with pytest.raises(
        UnsupportedModelError, match=r"patch_embed\.proj.weight is also a parameter of a Conv2d outside"
    ):
        anypatch.adapt(student, 32)
    assert torch.equal(teacher.patch_embed.proj.weight, before)
    assert student.patch_embed.proj.kernel_size == (16, 16)
    anypatch.adapt(copy.deepcopy(student), 32)


def test_a_model_inside_a_larger_one_that_shares_the_table_with_a_sibling() -> None:
    whole = nn.ModuleDict({"encoder": vit(), "decoder": nn.Module()})
    whole["decoder"].pos = whole["encoder"].pos_embed
    with pytest.raises(UnsupportedModelError, match="pos_embed is also a parameter of a Module outside"):
        anypatch.adapt(whole["encoder"], image_size=128)


def test_who_else_may_hold_the_model() -> None:
    model = vit()
    gone = vit()
    gone.patch_embed.proj.weight = model.patch_embed.proj.weight
    gone.myself = [gone]  # a cycle: alive until it is collected
    del gone
    holder = nn.Sequential(nn.Identity(), model)
    shallow = copy.copy(model)
    everything = [model, dict(model.named_parameters()), list(model.parameters())]
    optimizer = torch.optim.AdamW(model.parameters())
    averaged = torch.optim.swa_utils.AveragedModel(model)
    weight = model.patch_embed.proj.weight
    anypatch.adapt(model, 32)
    assert weight.shape[-1] == 32
    assert holder[1].patch_embed.proj.weight is weight
    assert averaged.module.patch_embed.proj.weight.shape[-1] == 16
    assert all(holder is not None for holder in (everything, optimizer, shallow))


def test_blocks_that_share_parameters_with_each_other_stay_tied() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, window_size=7, depths=(2, 1))
    first, second = (block.attn for block in model.layers[0].blocks)
    second.relative_position_bias_table = first.relative_position_bias_table
    anypatch.adapt(model, image_size=112)
    assert second.relative_position_bias_table is first.relative_position_bias_table


# -- offloaded and distributed weights ---------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cpu", "disk", "device_map"])
def test_offloaded_weights_are_refused(how: str, tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = transformers_model(num_hidden_layers=2, image_size=64, patch_size=16)
    if how == "cpu":
        model = accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "disk":
        model = accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        places = {"embeddings": "disk", "layers": "cpu", "layernorm": "cpu", "pooler": "cpu"}
        model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    size = anypatch.geometry(model)
    for ask in ({"image_size": (32, 128)}, {"patch_size": 32}):
        with pytest.raises(UnsupportedModelError, match="before offloading"):
            anypatch.adapt(model, **ask)
    assert anypatch.geometry(model) == size
    model(torch.randn(1, 3, 64, 64))


def test_blocks_alone_offloaded_go_on_working() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = transformers_model(num_hidden_layers=2, image_size=64, patch_size=16)
    model = copy.deepcopy(plain)
    for layer in model.layers if hasattr(model, "layers") else model.encoder.layer:
        accelerate.cpu_offload(layer, execution_device="cpu")
    for m in (plain, model):
        anypatch.adapt(m, 32, image_size=128)
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(plain(x).last_hidden_state, model(x).last_hidden_state)


@pytest.fixture
def group(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_models_are_refused(group: None) -> None:
    wrapped = nn.parallel.DistributedDataParallel(vit())
    for model in (wrapped, wrapped.module, nn.Sequential(nn.Identity(), wrapped)):
        with pytest.raises(UnsupportedModelError, match="adapt the model inside it, then wrap it"):
            anypatch.adapt(model, 32, keep="grid")
    wrapped(torch.randn(2, 3, 64, 64)).sum().backward()


def test_sharded_models_are_refused_and_sharded_blocks_work(group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    whole = fully_shard(vit(), mesh=mesh)
    with pytest.raises(UnsupportedModelError, match="then shard it"):
        anypatch.adapt(whole, 32, keep="grid")
    model = vit()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    with pytest.raises(UnsupportedModelError, match="then shard it"):
        anypatch.check(model, 32)
    anypatch.adapt(model, 32, keep="grid")
    model(torch.randn(2, 3, 128, 128)).sum().backward()


def _sharded_block(block: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(block, mesh=mesh)


def _replicated_block(block: nn.Module, mesh: Any) -> None:
    from torch.distributed._composable import replicate

    replicate(block)


@pytest.mark.parametrize("spread", [_sharded_block, _replicated_block])
@pytest.mark.parametrize("recorded", [True, False])
def test_sharded_blocks_of_a_model_of_no_library_work(group: None, spread: Any, recorded: bool) -> None:
    """torch puts a class in the place of theirs that refuses copies, of which a hand-made model's twins are made."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    model, plain = vit(), vit()
    plain.load_state_dict(model.state_dict())
    for live in (model, plain):
        live.pretrained_cfg = live.pretrained_cfg if recorded else {}
    for block in model.blocks:
        spread(block, mesh)
    for live in (model, plain):
        anypatch.adapt(live, 32, image_size=192)
    x = torch.randn(2, 3, 192, 192)
    torch.testing.assert_close(model(x), plain(x))
    model(x).sum().backward()


class Reshaping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = vit()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vit.forward_features(x)[:, 1:].unflatten(1, (4, 4))


@pytest.mark.parametrize("spread", [_sharded_block, _replicated_block])
def test_numbers_in_code_are_seen_where_blocks_are_sharded(group: None, spread: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    model = Reshaping().eval()
    for block in model.vit.blocks:
        spread(block, init_device_mesh("cpu", (1,)))
    with pytest.raises(UnsupportedModelError, match=r"the number 4 in Reshaping\.forward"):
        anypatch.adapt(model, image_size=128)


def _sharded_projection(model: Any, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.patch_embed, mesh=mesh, reshard_after_forward=False)
    model(torch.randn(1, 3, 64, 64))  # whole now, and the shards are elsewhere


def _replicated_projection(model: Any, mesh: Any) -> None:
    from torch.distributed._composable import replicate

    replicate(model.patch_embed)


def _distributed_projection(model: Any, mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    projection = model.patch_embed.proj
    projection.weight = nn.Parameter(distribute_tensor(projection.weight.data, mesh, [Shard(0)]))


@pytest.mark.parametrize("shard", [_sharded_projection, _replicated_projection, _distributed_projection])
def test_a_projection_that_is_sharded_or_replicated_on_its_own_is_refused(group: None, shard: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    model = vit(embed_dim=48)
    shard(model, init_device_mesh("cpu", (1,)))
    with pytest.raises(UnsupportedModelError, match=r"adapt the model, then (shard|replicate) it"):
        anypatch.adapt(model, 32, keep="grid")
    assert model.patch_embed.proj.kernel_size == (16, 16)
    assert model.patch_embed.proj.weight.shape == (48, 3, 16, 16)


@pytest.mark.parametrize("verb", [anypatch.adapt, anypatch.at, anypatch.check, lambda m, p: anypatch.flexible(m, [p])])
@pytest.mark.parametrize("held", [False, True])
def test_a_layer_that_waits_for_its_first_input_is_said(held: bool, verb: Any) -> None:
    model = nn.Sequential(vit(num_classes=0), nn.LazyLinear(3)).eval() if held else vit()
    if not held:
        model.head = nn.LazyLinear(3)
    with pytest.raises(UnsupportedModelError, match=r"has not been fed yet.*: run the model once before adapting"):
        verb(model, 32)
    model(torch.rand(1, 3, 64, 64))
    verb(model, 32)


# -- threads -----------------------------------------------------------------------------------------------


def _under_load(rounds: int, tmp_path) -> None:
    """Eight threads adapt; four build layers, load weights, draw numbers and read files; each as it would be alone."""
    from safetensors.torch import load_file, save_file

    save_file({"weight": torch.arange(64.0).reshape(8, 8), "bias": torch.ones(8)}, tmp_path / "w.safetensors")
    models = [vit() for _ in range(4)] + [MODELS["rotary"]() for _ in range(4)]
    expected = []
    for model in models:
        alone = copy.deepcopy(model)
        anypatch.adapt(alone, 28, keep="grid")
        expected.append(alone)
    faults: list[str] = []
    stop = threading.Event()

    def adapt(model: nn.Module, alone: nn.Module) -> None:
        for _ in range(rounds):
            copied = copy.deepcopy(model)
            anypatch.adapt(copied, 28, keep="grid")
            if not same(copied, alone):
                faults.append("another result")

    def build() -> None:
        while not stop.is_set():
            layer = nn.Linear(8, 8)
            if layer.weight.device.type != "cpu" or not layer.weight.abs().max() > 0:
                faults.append("built otherwise")
            layer.load_state_dict(load_file(tmp_path / "w.safetensors"))
            if not torch.equal(layer.weight, torch.arange(64.0).reshape(8, 8)):
                faults.append("loaded otherwise")

    def pretrained() -> None:
        source = vit()
        torch.save(source.state_dict(), tmp_path / "vit.pt")
        while not stop.is_set():
            overlay = {"file": str(tmp_path / "vit.pt")}
            found = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, pretrained=True,
                                      pretrained_cfg_overlay=overlay)  # fmt: skip
            if not same(found, source):
                faults.append("random instead of pretrained")

    def draw() -> None:
        seen = set()
        while not stop.is_set():
            number = torch.rand(4, dtype=torch.float64).sum().item()
            if number in seen:
                faults.append("a number drawn twice")
            seen.add(number)

    others = [threading.Thread(target=f) for f in (build, build, pretrained, draw)]
    threads = [threading.Thread(target=adapt, args=pair) for pair in zip(models, expected, strict=True)]
    for thread in (*others, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    for thread in others:
        thread.join()
    assert not faults, set(faults)
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_threads(tmp_path) -> None:
    _under_load(2, tmp_path)


@pytest.mark.long
def test_threads_a_thousand_rounds(tmp_path) -> None:
    _under_load(125, tmp_path)  # by eight


def test_draws_of_the_process_are_those_of_a_process_that_adapts_nothing() -> None:
    model = vit()
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    anypatch.adapt(model, 32)
    anypatch.check(model, 64)
    inspect(model)
    assert torch.equal(torch.rand(5), expected)


def test_a_layer_of_another_model_is_not_changed_under_it() -> None:
    """Of a model that takes any image size, the other would run with the new stem and its own old positions."""
    model, other = vit(dynamic_img_size=True), vit(dynamic_img_size=True)
    other.patch_embed = model.patch_embed
    parts = nn.Sequential(model.patch_embed, nn.Flatten())
    with pytest.raises(UnsupportedModelError, match="patch_embed is also a layer of a VisionTransformer outside"):
        anypatch.adapt(model, 32)
    other.patch_embed = copy.deepcopy(model.patch_embed)
    everything = nn.ParameterList(model.parameters())
    anypatch.adapt(model, 32)
    assert parts[0].proj.kernel_size == (32, 32)
    assert any(parameter is model.pos_embed for parameter in everything)


def test_wrappers_of_one_class_around_one_model() -> None:
    class Task(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone, self.temperature = backbone, nn.Parameter(torch.ones(1))

    first = Task(vit())
    second = Task(first.backbone)
    anypatch.adapt(first, 32)
    assert second.backbone.patch_embed.proj.kernel_size == (32, 32)


def test_a_layer_of_another_rotary_model_is_not_changed_under_it() -> None:
    """A model without tables has nothing but its layers to be told by."""

    def rotary() -> nn.Module:
        options = {"img_size": 64, "patch_size": 16, "depth": 1, "embed_dim": 48, "num_heads": 3}
        return timm.create_model(
            "eva02_tiny_patch14_224", **options, use_abs_pos_emb=False, class_token=False, global_pool="avg"
        )

    model, other = rotary(), rotary()
    other.patch_embed = model.patch_embed
    with pytest.raises(UnsupportedModelError, match="patch_embed is also a layer of a Eva outside"):
        anypatch.adapt(model, 32)
    assert model.patch_embed.proj.kernel_size == (16, 16)
    wrapper, beside = nn.Sequential(model), nn.Sequential(model)
    del other
    anypatch.adapt(wrapper, 32)
    assert beside[0].patch_embed.proj.kernel_size == (32, 32)


def test_a_view_may_be_taken_whoever_else_holds_the_parameters(group: None) -> None:
    """It reads them, and exchanges none."""
    model, other = vit(), vit()
    other.patch_embed = model.patch_embed
    assert anypatch.at(model, 32).patch_embed.proj.weight.shape[-1] == 32
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert anypatch.at(model, 32).patch_embed.proj.weight.shape[-1] == 32
    with pytest.raises(UnsupportedModelError, match="take the view of DistributedDataParallel's module"):
        anypatch.at(wrapped, 32)


def test_towers_that_share_layers_are_told_how_to_go_on() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = vit(), vit()
            self.teacher.patch_embed = self.student.patch_embed

    pair = Pair()
    with pytest.raises(UnsupportedModelError, match=r"share parameters .*copy\.deepcopy.*adapt each"):
        anypatch.adapt(pair, 32)
    pair.teacher.patch_embed = copy.deepcopy(pair.student.patch_embed)
    with pytest.raises(UnsupportedModelError, match=r"\(student, teacher\): adapt each on its own"):
        anypatch.adapt(pair, 32)
    for tower in (pair.student, pair.teacher):
        anypatch.adapt(tower, 32)


class Held(Tensor):
    """A tensor that keeps its values in another, as quantized ones do."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values: Tensor) -> None:
        self.values_ = values

    @classmethod
    def __torch_dispatch__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values_)
        raise NotImplementedError(f"no {func} of such tensors")


FORMS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "fake": (lambda t: FakeTensorMode().from_tensor(t), "is a FakeTensor"),
    "sparse": (Tensor.to_sparse, r"is stored as torch.sparse_coo: .* dense"),
    "mkldnn": (Tensor.to_mkldnn, r"is stored as torch._mkldnn: .* dense"),
    "held": (Held, "is a Held, which keeps its values in other tensors"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "pos_embed"])
def test_tensors_without_plain_values_are_refused(form: str, name: str) -> None:
    model = vit(embed_dim=48)
    owner = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    convert, match = FORMS[form]
    setattr(owner, leaf, nn.Parameter(convert(getattr(owner, leaf).detach()), requires_grad=False))
    for change in (anypatch.adapt, anypatch.at, anypatch.check):
        with pytest.raises(UnsupportedModelError, match=match):
            change(model, 32)
    assert model.patch_embed.proj.kernel_size == (16, 16)


# -- saving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", AMBIENT)
@pytest.mark.parametrize("kind", ["plain", "adapters", "weight norm"])
def test_what_is_written_is_the_same_under(around: str, kind: str, tmp_path) -> None:
    model = vit()
    if kind == "adapters":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    if kind == "weight norm":
        torch.nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.fc1)
    anypatch.save(model, tmp_path / "plain")
    with AMBIENT[around]():
        anypatch.save(model, tmp_path / "under")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "under").iterdir())
    for name in names:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "under" / name).read_bytes(), name
