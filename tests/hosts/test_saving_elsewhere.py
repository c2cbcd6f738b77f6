"""A model whose values are not here whole (sharded, offloaded, empty) is refused by name before anything is written;
what the message says to do first works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

import anypatch
from anypatch import UnsupportedModelError
from tests.builders import transformers_model


def _torchvision() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64).eval()


def _timm() -> nn.Module:
    return timm.create_model("test_vit").eval()


MAKES = {"timm": _timm, "transformers": transformers_model, "torchvision": _torchvision}


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (1,))


def _last(model: nn.Module) -> Any:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]


def _whole(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=_mesh())
    return model


def _one_layer(model: nn.Module) -> nn.Module:
    _whole(_last(model))
    return model


def _one_tensor(model: nn.Module) -> nn.Module:
    from torch.distributed.tensor import Shard, distribute_tensor

    layer = _last(model)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), _mesh(), [Shard(0)]))
    return model


def _flat(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def _replicated(model: nn.Module) -> nn.Module:
    from torch.distributed._composable import replicate

    replicate(model)
    return model


def _refused(model: nn.Module, place: Path, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        anypatch.save(model, place / "new" / "out")
    assert not (place / "new").exists()


@pytest.mark.siblings(fast=3)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize(
    ("shard", "match"),
    [
        (_one_tensor, r"weight is sharded over a device mesh \(DTensor\): gather its values"),
        (_one_layer, r"\w is sharded \(FSDP.*Linear\): gather its values"),
        (_whole, r"the model is sharded \(FSDP.*\): gather its values"),
        (_flat, r"the model is sharded \(FullyShardedDataParallel\): gather its values"),
        (_replicated, r"the model is a DDP.*, which its library does not build"),
    ],
)
def test_sharded_models(
    tmp_path: Path, group: None, make: Callable[[], nn.Module], shard: Callable[[Any], nn.Module], match: str
) -> None:
    _refused(shard(make()), tmp_path, match)


def test_gathered_values_are_saved(tmp_path: Path, group: None) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model, pixels = transformers_model(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = model(pixels).last_hidden_state
        _refused(_whole(model), tmp_path, "get_model_state_dict with full_state_dict=True")
        gathered = transformers_model()
        gathered.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
        anypatch.save(gathered, tmp_path / "out")
        found = transformers.ViTModel.from_pretrained(tmp_path / "out").eval()(pixels).last_hidden_state
    torch.testing.assert_close(found, wanted)


def _empty(model: nn.Module) -> nn.Module:
    return model.to("meta")


def _empty_layer(model: nn.Module) -> nn.Module:
    _last(model).to("meta")
    return model


def _fake(model: nn.Module) -> nn.Module:
    from torch._subclasses import FakeTensorMode

    layer = _last(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer.weight = nn.Parameter(mode.from_tensor(layer.weight.detach()))
    return model


def _sparse(model: nn.Module) -> nn.Module:
    layer = _last(model)
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse())
    return model


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_empty, r"token is on the meta device, .*: bring the model into memory"),
        (_empty_layer, r"weight is on the meta device, .*: bring the model into memory"),
        (_fake, r"weight is a FakeTensor, which has no values"),
        (_sparse, r"weight is stored as torch.sparse_coo, .*to_dense"),
    ],
)
def test_values_that_are_not_there(
    tmp_path: Path, make: Callable[[], nn.Module], change: Callable[[nn.Module], nn.Module], match: str
) -> None:
    _refused(change(make()), tmp_path, match)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloaded_models_once_their_hooks_are_off(tmp_path: Path, make: Callable[[], nn.Module], how: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = make()
    wanted = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    if how == "cpu":
        model = accelerate.cpu_offload(plain, execution_device="cpu")
    else:
        model = accelerate.disk_offload(plain, str(tmp_path / "disk"), execution_device="cpu")
    _refused(model, tmp_path, r"token is offloaded, .*remove_hook_from_module\(model, recurse=True\)")
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    anypatch.save(model, tmp_path / "out")
    found = anypatch.load(tmp_path / "out").state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_what_transformers_loaded_to_a_disk_it_writes_itself(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    plain = transformers_model()
    plain.save_pretrained(tmp_path / "in")
    places = {"": "disk"}
    model = transformers.ViTModel.from_pretrained(tmp_path / "in", device_map=places, offload_folder=tmp_path / "disk")
    assert all(parameter.is_meta for parameter in model.parameters())
    anypatch.save(model, tmp_path / "out")
    found = transformers.ViTModel.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.state_dict().items())
