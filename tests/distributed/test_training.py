"""Reset, masked steps and checkpoints of sharded models: bit for bit those of one process, for every layout."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import delfast
from delfast import InputError, Mask
from delfast.files import save_state
from delfast.naming import model_parameters
from delfast.optim import MaskedSGD
from delfast.sharding import is_dtensor, local_part, part_of
from tests.distributed.layouts import (
    OPTIMIZERS,
    Net,
    assert_equal_parts,
    give_gradients,
    masks,
    network,
    sharded,
)  # fmt: skip
from tests.distributed.spawning import run_in_processes
from tests.distributed.training_states import check_checkpoints, check_other_forms_of_state, check_whole_job
from tests.groups import gloo_group

LAYOUTS = {
    2: ("fsdp", "rows", "columns", "mixed"), 3: ("fsdp", "mixed"), 4: ("fsdp", "hsdp", "fsdp + rows and columns")
}  # fmt: skip


# Checks by the processes of one job, layout by layout


def check_parts_of_masks(layout: str) -> None:
    model = sharded(layout, network())
    for kind, mask in masks().items():
        for name, p in model_parameters(model, sharded=True).items():
            part = mask[name].part_of(p)
            assert part.shape == local_part(p).shape and part.unit == mask[name].unit, (kind, name)
            assert torch.equal(part.dense(), part_of(mask[name].dense(), p)), (kind, name)
        gathered = Mask.from_dense(
            {n: p.detach() == p.detach() for n, p in model_parameters(model, sharded=True).items()}
        )
        assert gathered.selected == gathered.total == mask.total
        assert [name for name, _, _ in mask.match(model_parameters(model, sharded=True))] == [
            name for name in mask.names if mask[name].selected
        ]


def check_reset(layout: str, folder: Path) -> None:
    from torch.distributed.tensor import Replicate

    path = folder / f"fresh-{torch.distributed.get_rank()}.safetensors"
    fresh = network(9)
    save_state(path, {f"module.{name}": p for name, p in fresh.state_dict().items()})
    other = sharded(layout, network(9))
    gathered = {
        name: p.redistribute(placements=[Replicate()] * p.device_mesh.ndim) if is_dtensor(p) else p  # type: ignore[attr-defined]
        for name, p in sharded(layout, network(9)).named_parameters()
    }
    sources = [Net, fresh, fresh.state_dict(), other, other.state_dict(), gathered, path, str(path)]
    for mask in masks().values():
        expected = network()
        delfast.reset_(expected, mask, Net, seed=9)
        for number, init in enumerate(sources):
            model = sharded(layout, network())
            versions = [p._version for p in model.parameters()]
            delfast.reset_(model, mask, init, seed=9)  # type: ignore[arg-type]
            assert_equal_parts(model, expected)
            for (name, p), version in zip(model.named_parameters(), versions, strict=True):
                assert (p._version > version) == bool(mask[name].selected), (number, name)


def check_steps(layout: str) -> None:
    for kind, mask in masks().items():
        for make in OPTIMIZERS.values():
            one, model = network(), sharded(layout, network())
            ours, theirs = make(model.named_parameters(), mask), make(one.named_parameters(), mask)
            for step in range(3):
                give_gradients(model, step, replicated=step == 1 and layout in ("fsdp", "hsdp", "rows"))
                give_gradients(one, step)
                versions = [p._version for p in model.parameters()]
                ours.step()
                theirs.step()
                for (name, p), version in zip(model.named_parameters(), versions, strict=True):
                    assert (p._version > version) == bool(mask[name].selected), (kind, name)
            assert_equal_parts(model, one)


def check_a_mask_that_is_replaced(layout: str) -> None:
    first, second = masks().values()
    for make in OPTIMIZERS.values():
        one, model = network(), sharded(layout, network())
        ours, theirs = make(model.named_parameters(), first), make(one.named_parameters(), first)
        for step, mask in enumerate((first, second, first)):
            for optimizer in (ours, theirs):
                optimizer.replace_mask(mask)
            give_gradients(model, step)
            give_gradients(one, step)
            ours.step()
            theirs.step()
        assert_equal_parts(model, one)


def check_gathered_parameters(layout: str) -> None:
    """FSDP2 leaves its gathered copies in place after a forward pass without a backward one."""
    if layout != "fsdp":
        return
    mask, inputs = masks()["rows"], torch.ones(3, 6)
    one, model = network(), sharded(layout, network())
    ours, theirs = OPTIMIZERS["sgd"](model.named_parameters(), mask), OPTIMIZERS["sgd"](one.named_parameters(), mask)
    named = list(model.named_parameters())
    model(inputs)
    copies = list(model.named_parameters())
    assert not all(is_dtensor(p) for _, p in copies)
    with pytest.MonkeyPatch.context() as patch:  # a torch that does not show whose copies they are
        patch.setattr("torch.distributed._composable_state._module_state_mapping", {})
        unknown = OPTIMIZERS["sgd"](copies, mask)
    delfast.reset_(model, mask, Net, seed=9)
    delfast.reset_(one, mask, Net, seed=9)
    assert_equal_parts(model, one)
    with pytest.raises(InputError, match="the DTensor that FSDP2 shards, got the copy that it gathers"):
        unknown.step()
    torch.testing.assert_close(model(inputs), one(inputs))
    assert not all(map(is_dtensor, model.parameters()))
    give_gradients(named, 0)
    give_gradients(one, 0)
    ours.step()
    theirs.step()
    assert_equal_parts(model, one)


def check_an_optimizer_made_after_an_evaluation(layout: str) -> None:
    """The optimizer takes the parameters, and not the copies that an evaluation has left of any module."""
    if layout != "fsdp":
        return
    from torch.distributed.fsdp import fully_shard

    mask, inputs, targets = masks()["rows"], torch.ones(3, 6), torch.tensor([0, 1, 0])
    one, model = network(), network()
    fully_shard(model.last, reshard_after_forward=False)
    fully_shard(model)
    theirs = OPTIMIZERS["sgd"](one.named_parameters(), mask)
    for form in (list, lambda named: [{"params": list(named)}]):
        with torch.no_grad():
            model(inputs)
        copies = list(model.named_parameters())
        assert not any(is_dtensor(p) for name, p in copies if name.startswith("last."))
        ours = OPTIMIZERS["sgd"](form(copies), mask)
        assert all(map(is_dtensor, model.parameters()))
        assert [id(p) for group in ours.param_groups for p in group["params"]] == list(map(id, model.parameters()))
    for net, optimizer in ((one, theirs), (model, ours)):
        functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(local_part(p), part_of(one.get_parameter(name), p))


def check_scaler_and_clipping(layout: str) -> None:
    """The second step has an infinite gradient, in one process only, and is skipped by all."""
    mask, edges = masks()["elements"], (1.0, float("inf"), 1.0)
    one, model = network(), sharded(layout, network())
    scaled = []
    for net in (one, model):
        optimizer = OPTIMIZERS["adamw"](net.named_parameters(), mask)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
        scaler.scale(torch.ones(1))
        for step, edge in enumerate(edges):
            give_gradients(net, step, edge=edge)
            scaler.step(optimizer)
            scaler.update()
        scaled.append(scaler.get_scale())
    assert scaled == [16.0, 16.0]
    assert_equal_parts(model, one)
    if layout == "columns":  # torch would ask the other processes only if the first gradient is split
        optimizer = MaskedSGD(reversed(list(model.named_parameters())), mask)
        with pytest.raises(
            InputError, match=r"got 'last.weight' split along a mesh dimension .* of 'last.bias', is not"
        ):
            scaler.step(optimizer)
    give_gradients(one, 0)
    give_gradients(model, 0)
    expected, norm = (nn.utils.clip_grad_norm_(net.parameters(), 0.5) for net in (one, model))
    torch.testing.assert_close(norm.full_tensor(), expected)  # type: ignore[attr-defined]
    for name, p in one.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad.full_tensor(), p.grad)  # type: ignore[union-attr]


def check_tensor_parallel_training(layout: str) -> None:
    """Forward and backward passes of FSDP2 and tensor parallelism together; the gradients differ by rounding."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if "+" not in layout:
        return
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 5)))
    one, model = nets
    mask = Mask.from_dense({name: torch.rand(p.shape) < 0.5 for name, p in one.named_parameters()})
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    parallelize_module(model, mesh["model"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    for net in nets:
        optimizer = OPTIMIZERS["sgd"](net.named_parameters(), mask)
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            functional.cross_entropy(net(torch.randn(8, 6)), torch.arange(8) % 5).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
    for name, p in model_parameters(model, sharded=True).items():
        torch.testing.assert_close(local_part(p), part_of(one.get_parameter(name), p))


def check_sources_of_one_process(layout: str, folder: Path) -> None:
    """Check that a source that one process lacks, or has otherwise, changes the model in none of them."""
    if layout not in ("fsdp", "mixed"):
        return
    rank, processes, mask = torch.distributed.get_rank(), torch.distributed.get_world_size(), masks()["rows"]
    only = Mask.from_dense({n: torch.full(p.shape, n.startswith("first")) for n, p in Net().named_parameters()})

    def failing() -> nn.Module:
        if rank:
            raise OSError("no memory")
        return Net()

    own = folder / f"own-{layout}-{processes}-{rank}.safetensors"
    if rank == 0:
        save_state(own, network(9).state_dict())
    model = sharded(layout, network())
    for missing in (own, str(own)):
        with pytest.raises(InputError, match=r"there is none; check the path \(on rank 1\)"):
            delfast.reset_(model, mask, missing)
    save_state(own, network(9 + rank).state_dict())
    with pytest.raises(OSError if rank == 1 else RuntimeError, match=r"no memory"):
        delfast.reset_(model, mask, failing)
    with pytest.raises(InputError, match="pass the same seed, model, state dict or file everywhere"):
        delfast.reset_(model, mask, own)
    for chosen in (mask, only):  # of a mixed layout, the second selects plain parameters alone
        with pytest.raises(InputError, match="expected the same fresh values on every process"):
            delfast.reset_(model, chosen, Net, seed=rank)
    with pytest.raises(InputError, match=r"seed .* \(on rank 1\)"):
        delfast.reset_(model, mask, Net, seed=-rank)
    own_values: list[Any] = [model, lambda: model, model.state_dict()]
    for values in own_values:
        with pytest.raises(InputError, match="newly initialized network, it returned the model itself"):
            delfast.reset_(model, mask, values)
    assert_equal_parts(model, network())


def check_what_is_refused(layout: str) -> None:
    """Check what every process refuses at once, so that none waits for another."""
    if layout != "fsdp":
        return
    rank, (rows, elements) = torch.distributed.get_rank(), masks().values()
    model, before = sharded(layout, network()), network()
    other = elements if rank == 0 else rows
    with pytest.raises(InputError, match="expected the same mask on every process"):
        delfast.reset_(model, other, Net)
    with pytest.raises(InputError, match="expected the same mask on every process"):
        OPTIMIZERS["sgd"](model.named_parameters(), other)
    with pytest.raises(InputError, match="expected the same fresh values on every process"):
        delfast.reset_(model, rows, Net, seed=rank)
    with pytest.raises(InputError, match=r"another init than 'reset_parameters' for the sharded 'first.weight'"):
        delfast.reset_(model, rows, "reset_parameters")
    with pytest.raises(InputError, match=r"got 'first.weight' as a DTensor"):
        delfast.compact(model, rows)
    first, second = (OPTIMIZERS["sgd"](model.named_parameters(), mask) for mask in (rows, elements))
    with pytest.raises(InputError, match="build the optimizer with the mask it was saved with"):
        first.load_state_dict(second.state_dict())
    wrong = first.state_dict()
    wrong["state"][0]["momentum_buffer"] = wrong["state"][4]["momentum_buffer"]
    with pytest.raises(InputError, match=r"'momentum_buffer' of shape \(7, 6\) for 'first.weight', got \(5, 6\)"):
        first.load_state_dict(wrong)
    assert_equal_parts(model, before)


SCENARIOS: dict[str, Callable[..., None]] = {
    "parts": check_parts_of_masks,
    "reset": check_reset,
    "steps": check_steps,
    "replace": check_a_mask_that_is_replaced,
    "gathered": check_gathered_parameters,
    "late": check_an_optimizer_made_after_an_evaluation,
    "scaler": check_scaler_and_clipping,
    "checkpoints": check_checkpoints,
    "forms": check_other_forms_of_state,
    "job": check_whole_job,
    "passes": check_tensor_parallel_training,
    "refused": check_what_is_refused,
    "sources": check_sources_of_one_process,
}
MIXED = (
    "reset",
    "steps",
    "replace",
    "checkpoints",
    "forms",
    "sources",
)  # scenarios of the layout with plain parameters


def checked(name: str, layout: str, folder: Path, rank: int) -> None:
    check = SCENARIOS[name]
    check(*(layout, folder)[: check.__code__.co_argcount])


def run(processes: int, folder: Path) -> None:
    """Check all layouts in one job of several processes, whose files are in ``folder``."""
    jobs = {
        f"{name}, {layout}": functools.partial(checked, name, layout, folder)
        for layout in LAYOUTS[processes]
        for name in SCENARIOS
        if layout != "mixed" or name in MIXED
    }
    own = folder / f"{processes} processes"
    own.mkdir()
    run_in_processes(processes, jobs, own)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that two processes have written; the jobs of three and four processes go on from there."""
    folder = tmp_path_factory.mktemp("jobs")
    run(2, folder)
    return folder


@pytest.mark.parametrize("processes", [3, 4])
def test_more_processes_go_on_bit_for_bit(processes: int, folder: Path) -> None:
    run(processes, folder)


# Checks that need one process alone


needs_gloo = pytest.mark.skipif(sys.platform != "linux", reason="gloo by a shared file is tested on Linux")


@needs_gloo
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_is_refused_by_name(use_orig_params: bool, tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with gloo_group(tmp_path / "store"):
        model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
        assert_refused(model, r"got '\S+' flattened by FSDP1 \(FullyShardedDataParallel\); use FSDP2")
        with pytest.raises(InputError, match="flattened by FSDP1"):
            delfast.reset_(network(), masks()["rows"], model)


def test_zero_3_is_refused_by_name() -> None:
    model = network()
    for p in model.parameters():
        p.ds_id = 0  # type: ignore[attr-defined]
    assert_refused(model, "got 'first.weight' partitioned by DeepSpeed ZeRO-3; use FSDP2")


def assert_refused(model: nn.Module, message: str) -> None:
    mask, batches = masks()["rows"], [(torch.ones(2, 6), torch.tensor([0, 1]))]
    calls: list[Callable[[], Any]] = [
        lambda: delfast.localize(model, batches, 0.5),
        lambda: delfast.score(model, batches),
        lambda: delfast.reset_(model, mask, Net),
        lambda: delfast.compact(model, mask),
        lambda: delfast.unlearn(model, retain=batches, forget=[*batches], mask=mask, init=Net),
        *(lambda make=make: make(model.named_parameters(), mask) for make in OPTIMIZERS.values()),  # type: ignore[misc]
    ]
    for call in calls:
        with pytest.raises(InputError, match=message):
            call()


@needs_gloo
def test_a_compact_model_that_is_sharded_is_refused_at_the_first_step(tmp_path: Path) -> None:
    with gloo_group(tmp_path / "store"):
        steps = sharded("fsdp", network())
        give_gradients(steps, 0)
        for kind, mask in masks().items():
            model = network()
            handle = delfast.compact(model, mask)
            torch.optim.SGD(steps.parameters(), lr=0.1).step()  # another model may be sharded
            model = sharded("fsdp", model)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
            before = [local_part(p).clone() for p in model.parameters()]
            with pytest.raises(InputError, match=r"got a model whose '\S+' was replaced since, by fully_shard"):
                model(torch.ones(2, 6)).sum().backward()
                assert kind == "elements"  # a layer that is trained by rows has noticed it
                optimizer.step()
            after = model_parameters(model, sharded=True).values()
            assert all(torch.equal(a, local_part(p)) for a, p in zip(before, after, strict=True))
            with pytest.raises(InputError, match="was replaced since, by fully_shard"):
                handle.undo()
