"""Parameters by name: the wrappers people use, for real."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import delfast
from delfast import InputError
from delfast.experiments.verification import compare
from delfast.naming import plain_name, unique_parameters, unwrap
from tests import cases, groups


@pytest.fixture
def fake_group() -> Iterator[None]:
    """A group of this process alone that exchanges nothing: enough for a DTensor, on any machine."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def gloo_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone that DDP can train with."""
    with ExitStack() as stack:
        try:
            stack.enter_context(groups.gloo_group(tmp_path / "store"))
        except RuntimeError as error:
            if "Unable to find interface" not in str(error):
                raise
            pytest.skip("gloo needs a network interface, be it the loopback, and there is none")
        yield


def test_plain_name_removes_leading_wrappers_only() -> None:
    assert plain_name("module._orig_mod.conv.weight") == "conv.weight"
    assert plain_name("_orig_mod.module.conv.weight") == "conv.weight"
    assert plain_name("blocks.0._checkpoint_wrapped_module.weight") == "blocks.0.weight"
    assert plain_name("block.module.weight") == "block.module.weight"
    assert plain_name("module") == "module"


@pytest.mark.long
def test_ddp_and_compile_are_seen_through(gloo_group: None) -> None:
    model = cases.SmallNet()
    plain = delfast.localize(model, cases.image_batches(), budget=0.4)
    wrapped = torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager")
    assert unwrap(wrapped) is model
    assert delfast.localize(wrapped, cases.image_batches(), budget=0.4).digest == plain.digest
    result = delfast.unlearn(wrapped, retain=cases.image_batches(), mask=plain, init=cases.SmallNet, epochs=1, lr=0.1)
    assert result.head == "head"


def test_a_dtensor_is_refused_by_name_where_it_cannot_be_used(fake_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))

    def shard(name: str, module: nn.Module, mesh: object) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(key, nn.Parameter(distribute_tensor(parameter, mesh, [Replicate()])))

    model = distribute_module(nn.Sequential(nn.Linear(3, 2)), mesh, shard)
    with pytest.raises(InputError, match=r"whole parameters for per_example, got '0.weight' as a DTensor"):
        delfast.score(model, [], per_example=True)
    with pytest.raises(InputError, match=r"whole parameters for criterion 'critmem', got '0.weight' as a DTensor"):
        delfast.score(model, [], "critmem")
    mask = delfast.score(model, criterion="weight").select(1.0)
    with pytest.raises(InputError, match=r"whole parameters for this call, got '0.weight' as a DTensor"):
        delfast.compact(model, mask)


def test_tied_parameters_count_once_under_their_first_name() -> None:
    names = [name for name, _ in unique_parameters(cases.Everything().named_parameters(remove_duplicate=False))]
    assert "first.weight" in names and "second.weight" not in names
    with pytest.raises(InputError, match="got 'weight' twice"):
        list(unique_parameters([("module.weight", torch.ones(1)), ("weight", torch.ones(1))]))


def test_a_users_own_wrapper_is_not_stripped() -> None:
    class Normalized(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.module((images - 1) * 100)

    model = cases.SmallNet()
    assert unwrap(Normalized(model)) is not model
    own, bare = (delfast.score(m, cases.image_batches()).gradients for m in (Normalized(model), model))
    assert own is not None and bare is not None and not torch.equal(own["head.weight"], bare["head.weight"])


def test_compiled_blocks_match_too() -> None:
    model = cases.SmallNet()
    mask = delfast.localize(model, cases.image_batches())
    model.features = torch.compile(model.features, backend="eager")  # type: ignore[assignment]
    assert delfast.localize(model, cases.image_batches()).digest == mask.digest


def checkpointed(model: nn.Module, *names: str) -> nn.Module:
    """Wrap blocks of a model for activation checkpointing, as recipes for FSDP2 do."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for name in names:
        model.set_submodule(name, checkpoint_wrapper(model.get_submodule(name)))
    return model


def test_checkpointed_blocks_match_the_network_without_them() -> None:
    batches = cases.image_batches()
    model, wrapped = (cases.SmallNet() for _ in range(2))
    wrapped.load_state_dict(model.state_dict())
    checkpointed(wrapped, "features.0", "features.3", "head")  # not BatchNorm, whose statistics count each pass
    assert any("_checkpoint_wrapped_module" in name for name, _ in wrapped.named_parameters())
    mask = delfast.localize(model, batches, budget=0.4)
    assert delfast.localize(wrapped, batches, budget=0.4).digest == mask.digest
    both = [delfast.localize(each, batches, budget=0.4, per_example=True).digest for each in (model, wrapped)]
    assert both[0] == both[1]
    states = []
    for each in (model, wrapped):
        before = {name: value.clone() for name, value in each.state_dict().items()}
        delfast.reset_(each, mask, init=cases.SmallNet, seed=1)
        optimizer = delfast.optim.MaskedAdamW(each.named_parameters(), mask, lr=0.1)
        nn.functional.cross_entropy(each(batches[0][0]), batches[0][1]).backward()
        optimizer.step()
        assert compare(before, each.state_dict(), mask).outside == 0
        result = delfast.unlearn(each, retain=batches, mask=mask, init=cases.SmallNet, seed=2, epochs=1, lr=0.1)
        assert result.head == "head"
        states.append(each.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_an_averaged_model_has_the_names_of_its_network() -> None:
    model = cases.SmallNet()
    average = torch.optim.swa_utils.AveragedModel(model)
    mask = delfast.localize(model, cases.image_batches(), budget=0.4)
    assert delfast.localize(average, cases.image_batches(), budget=0.4).digest == mask.digest
    delfast.reset_(average, mask, init=cases.SmallNet, seed=1)
    delfast.reset_(model, mask, init=cases.SmallNet, seed=1)
    assert all(torch.equal(p, dict(model.named_parameters())[plain_name(n)]) for n, p in average.named_parameters())


def test_a_parametrized_weight_keeps_its_own_names() -> None:
    """Its parameters are others: the norms and directions of weight_norm, for example."""
    model = cases.SmallNet()
    torch.nn.utils.parametrizations.weight_norm(model.head)
    mask = delfast.localize(model, cases.image_batches(), budget=0.9)
    assert "head.parametrizations.weight.original1" in mask
    with pytest.raises(
        InputError, match=r"for 'head.parametrizations.weight.original\d', init has none; .* parametrized"
    ):
        delfast.reset_(model, mask, init=cases.SmallNet)
