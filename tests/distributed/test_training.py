"""Reset, masked steps and checkpoints of sharded models: bit for bit those of one process, for every layout."""

from __future__ import annotations

import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional

import delfast
from delfast import InputError, Mask
from delfast.files import save_state
from delfast.naming import model_parameters
from delfast.optim import MaskedAdamW, MaskedSGD
from delfast.sharding import is_dtensor, local_part, part_of
from tests.groups import gloo_group

SECONDS = 300  # of a job of several processes, after which it has failed
LAYOUTS = {
    2: ("fsdp", "rows", "columns", "mixed"), 3: ("fsdp", "mixed"), 4: ("fsdp", "hsdp", "fsdp + rows and columns")
}  # fmt: skip
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": lambda named, mask: MaskedSGD(named, mask, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda named, mask: MaskedAdamW(named, mask, lr=torch.tensor(0.05), weight_decay=0.1),
}


class Turned(nn.Module):
    """A layer whose weight is (in, out), as transformers' Conv1D has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Net(nn.Module):
    """A network of odd sizes, with parameters of fewer rows than there are processes, and with a zero below 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.turned = nn.Linear(6, 7), nn.Linear(7, 5), Turned()
        self.conv, self.last = nn.Conv2d(1, 5, (1, 3)), nn.Linear(20, 2)
        with torch.no_grad():
            self.first.weight[0, 0] = -0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.turned(self.second(self.first(x).relu()).relu())
        return self.last(self.conv(x[:, None, None]).flatten(1))


def network(seed: int = 1) -> Net:
    torch.manual_seed(seed)
    return Net()


def masks() -> dict[str, Mask]:
    """Return a mask of rows and one of elements: all of the last layer, and no entry of one weight and one bias."""
    torch.manual_seed(3)
    dense: dict[str, dict[str, Tensor]] = {"rows": {}, "elements": {}}
    for name, p in Net().named_parameters():
        dim = 1 if name == "turned.weight" else 0
        rows = torch.arange(p.shape[dim]) % 2 == 0
        rows = (rows if dim == 1 else rows.reshape(-1, *[1] * (p.ndim - 1))).expand(p.shape)
        for kind, flags in (("rows", rows), ("elements", torch.rand(p.shape) < 0.4)):
            all_or_none = {"second.weight": flags & False, "second.bias": flags & False, "last.weight": flags | True}
            dense[kind][name] = all_or_none.get(name, flags)
    return {kind: Mask.from_dense(flags, dims={"turned.weight": 1}) for kind, flags in dense.items()}


def sharded(layout: str, model: nn.Module) -> nn.Module:
    """Shard a model that every process has a copy of."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    processes = torch.distributed.get_world_size()

    def split(columns: Callable[[str], bool]) -> Any:
        def along(name: str, module: nn.Module, mesh: Any) -> None:
            for key, p in list(module.named_parameters(recurse=False)):
                place = [Shard(0)] if p.ndim < 2 or not columns(name) else [Shard(1)]
                if p.ndim < 2 and columns(name):
                    place = [Replicate()]  # type: ignore[list-item]
                module.register_parameter(key, nn.Parameter(distribute_tensor(p, mesh, place)))

        return along

    if layout in ("rows", "columns"):
        mesh = init_device_mesh("cpu", (processes,))
        return distribute_module(model, mesh, split(lambda _: layout == "columns"))
    if layout == "mixed":  # plain parameters beside DTensors
        return fully_shard(model, ignored_params={*model.first.parameters(), *model.turned.parameters()})  # type: ignore[union-attr]
    if layout == "fsdp":
        for module in (model.first, model.last):
            fully_shard(module)  # type: ignore[arg-type]
        return fully_shard(model)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    if layout == "hsdp":
        return fully_shard(model, mesh=mesh)
    distribute_module(model, mesh["inner"], split(lambda name: name in ("second", "last")))
    return fully_shard(model, mesh=mesh["outer"])


Named = nn.Module | list[tuple[str, Any]]


def give_gradients(named: Named, step: int, *, replicated: bool = False, edge: float | None = None) -> None:
    """Give every parameter its gradient of this step; ``edge``: the last value of the first weight's."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    for name, p in named.named_parameters() if isinstance(named, nn.Module) else named:
        torch.manual_seed(zlib.crc32(name.encode()) + step)
        gradient = torch.randn(p.shape)
        if edge is not None and name == "first.weight":
            gradient[-1, -1] = edge
        if is_dtensor(p):
            place = [Replicate()] * p.device_mesh.ndim if replicated else p.placements
            gradient = distribute_tensor(gradient, p.device_mesh, place, src_data_rank=None)
        p.grad = gradient


def assert_equal_parts(model: nn.Module, expected: nn.Module) -> None:
    """The part of every parameter that this process holds, to the bit: the sign of a zero counts."""
    whole = dict(expected.named_parameters())
    for name, p in model_parameters(model, sharded=True).items():
        part, held = part_of(whole[name], p), local_part(p)
        assert part.shape == held.shape, name
        assert torch.equal(part.contiguous().view(torch.int32), held.contiguous().view(torch.int32)), name


# What the processes of one job check, layout by layout


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
    assert not all(map(is_dtensor, model.parameters()))
    late = OPTIMIZERS["sgd"](model.named_parameters(), mask)
    delfast.reset_(model, mask, Net, seed=9)
    delfast.reset_(one, mask, Net, seed=9)
    assert_equal_parts(model, one)
    with pytest.raises(InputError, match="the DTensor that FSDP2 shards, got the copy that it gathers"):
        late.step()
    torch.testing.assert_close(model(inputs), one(inputs))
    assert not all(map(is_dtensor, model.parameters()))
    give_gradients(named, 0)
    give_gradients(one, 0)
    ours.step()
    theirs.step()
    assert_equal_parts(model, one)


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


def check_checkpoints(layout: str, folder: Path) -> None:
    """Three steps by two processes, then three by these; the checkpoint's own step changes nothing."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    for (kind, mask), (name, make) in zip(masks().items(), OPTIMIZERS.items(), strict=True):
        one, path = network(), folder / f"{name}-{kind}"
        theirs = make(one.named_parameters(), mask)
        if not (path / ".metadata").exists():
            model = sharded(layout, network())
            ours = make(model.named_parameters(), mask)
            take_steps(model, ours, range(3))
            parts = dict(zip(("model", "optimizer"), get_state_dict(model, ours), strict=True))
            checkpoint.save(parts, checkpoint_id=path)
        model = sharded(layout, network())
        ours = make(model.named_parameters(), mask)
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, ours), strict=True))
        assert_equal_parts(model, one)
        state = parts["optimizer"]["state"]
        assert state.keys() == dict(one.named_parameters()).keys()
        for key, entry in state.items():
            assert entry.pop("step") == 0 and bool(entry) == bool(mask[key].selected)
            parameter = model.get_parameter(key)
            for value in entry.values():
                assert value.shape == parameter.shape and is_dtensor(value) == is_dtensor(parameter)
                assert not is_dtensor(value) or value.placements == parameter.placements  # type: ignore[attr-defined]
            entry["step"] = torch.zeros(())
        checkpoint.load(parts, checkpoint_id=path)
        set_state_dict(model, ours, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
        take_steps(one, theirs, range(3))
        for key, entry in ours.state_dict()["state"].items():
            part = mask[one_name(ours, key)]
            assert entry["step"] == (3 if part.selected else 0)
            for value in entry.values():
                assert not value.ndim or not local_part(value)[~part.part_of(value).dense()].any()
                assert not value.ndim or value.shape == part.shape
        for net, optimizer in ((one, theirs), (model, ours)):
            take_steps(net, optimizer, range(3, 6))
        assert_equal_parts(model, one)


def take_steps(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        optimizer.step()


def one_name(optimizer: Any, index: int) -> str:
    return optimizer.param_groups[0]["param_names"][index]


def check_other_forms_of_state(layout: str) -> None:
    """Check state that is gathered, flattened, or of one process: each goes on bit for bit."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    for mask, make in zip(masks().values(), OPTIMIZERS.values(), strict=True):
        one, model = network(), sharded(layout, network())
        ours, theirs = make(model.named_parameters(), mask), make(one.named_parameters(), mask)
        take_steps(one, theirs, range(2))
        take_steps(model, ours, range(2))
        forms = [StateDictOptions(flatten_optimizer_state_dict=True)]
        if "+" not in layout:  # torch itself cannot split a gathered state along two mesh dimensions (2.14)
            forms.insert(0, StateDictOptions(full_state_dict=True))
        for options in forms:
            state = get_optimizer_state_dict(model, ours, options=options)
            ours = make(model.named_parameters(), mask)
            set_optimizer_state_dict(model, ours, state, options=options)
            if options.full_state_dict:
                theirs = make(one.named_parameters(), mask)
                set_optimizer_state_dict(one, theirs, state, options=StateDictOptions(strict=False))
            for net, optimizer in ((one, theirs), (model, ours)):
                take_steps(net, optimizer, range(2, 3))
            assert_equal_parts(model, one)
        ours = make(model.named_parameters(), mask)
        ours.load_state_dict(theirs.state_dict())
        for net, optimizer in ((one, theirs), (model, ours)):
            take_steps(net, optimizer, range(3, 4))
        assert_equal_parts(model, one)


def check_whole_job(layout: str, folder: Path) -> None:
    """Mask, reset, three epochs with clipping; resumed by more processes. No entry outside the mask has changed."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    if layout not in ("fsdp", "hsdp"):
        return
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shared, own = folder / "mask.safetensors", folder / f"mask-{rank}.safetensors"
    for path in (shared, own):  # all processes write the one, at the same time
        masks()["elements"].save(path)
    mask = Mask.load(shared)
    assert shared.read_bytes() == own.read_bytes()
    model, begun, job = sharded(layout, network()), network(), folder / "checkpoint"
    optimizer = OPTIMIZERS["adamw"](model.named_parameters(), mask)
    if processes == 2:
        delfast.reset_(model, mask, Net, seed=4)
    else:
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.load(parts, checkpoint_id=job)
        set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    for epoch in range(3):
        torch.manual_seed(10 * epoch + rank)
        optimizer.zero_grad()
        functional.cross_entropy(model(torch.randn(5, 6)), torch.arange(5) % 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    for name, p in model_parameters(model, sharded=True).items():
        chosen, old = (part_of(value, p) for value in (mask[name].dense(), begun.get_parameter(name)))
        held = local_part(p)
        assert torch.equal(held[~chosen].view(torch.int32), old[~chosen].view(torch.int32)), name
        assert bool((held[chosen] != old[chosen]).any()) == bool(chosen.any()), name
    if processes == 2:
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.save(parts, checkpoint_id=job)


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
    with pytest.raises(RuntimeError, match=r"OSError: no memory \(on rank 1\)"):
        delfast.reset_(model, mask, failing)
    with pytest.raises(InputError, match="pass the same seed, model, state dict or file everywhere"):
        delfast.reset_(model, mask, own)
    for chosen in (mask, only):  # of a mixed layout, the second selects plain parameters alone
        with pytest.raises(InputError, match="expected the same fresh values in all processes"):
            delfast.reset_(model, chosen, Net, seed=rank)
    with pytest.raises(InputError, match=r"seed .* \(on rank 1\)"):
        delfast.reset_(model, mask, Net, seed=-rank)
    assert_equal_parts(model, network())


def check_what_is_refused(layout: str) -> None:
    """Check what every process refuses at once, so that none waits for another."""
    if layout != "fsdp":
        return
    rank, (rows, elements) = torch.distributed.get_rank(), masks().values()
    model, before = sharded(layout, network()), network()
    other = elements if rank == 0 else rows
    with pytest.raises(InputError, match="expected the same mask in all processes"):
        delfast.reset_(model, other, Net)
    with pytest.raises(InputError, match="expected the same mask in all processes"):
        OPTIMIZERS["sgd"](model.named_parameters(), other)
    with pytest.raises(InputError, match="expected the same fresh values in all processes"):
        delfast.reset_(model, rows, Net, seed=rank)
    with pytest.raises(InputError, match=r"another init than 'reset_parameters' for the sharded 'first.weight'"):
        delfast.reset_(model, rows, "reset_parameters")
    with pytest.raises(InputError, match=r"a plain tensor for 'first.weight', got a DTensor"):
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


def job(rank: int, processes: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with gloo_group(folder / f"store-{processes}", rank, processes):
        for layout in LAYOUTS[processes]:
            for name, check in SCENARIOS.items():
                if layout == "mixed" and name not in MIXED:
                    continue
                began = time.perf_counter()
                try:
                    check(*(layout, folder)[: check.__code__.co_argcount])
                except Exception as error:
                    raise AssertionError(f"{name}, {layout}, process {rank} of {processes}") from error
                if rank == 0:
                    print(f"{processes} {layout}: {name} {time.perf_counter() - began:.2f} s", flush=True)


def run(processes: int, folder: Path) -> None:
    """Run a job of several processes; fail if one of them fails, or if they take too long."""
    context = start_processes(job, (processes, folder), nprocs=processes, join=False, start_method="spawn")
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"{processes} processes took more than {SECONDS} s"
    finally:
        for process in context.processes:
            process.kill()


needs_gloo = pytest.mark.skipif(sys.platform != "linux", reason="gloo by a shared file is tested on Linux")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files that two processes have written; the jobs of three and four processes go on from there."""
    if os.listdir("/sys/class/net") == []:
        pytest.skip("gloo needs a network interface, be it the loopback, and there is none")
    folder = tmp_path_factory.mktemp("jobs")
    run(2, folder)
    yield folder


@needs_gloo
@pytest.mark.parametrize("processes", [3, 4])
def test_more_processes_go_on_bit_for_bit(processes: int, folder: Path) -> None:
    run(processes, folder)


# What one process can check


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
        lambda: delfast.unlearn(model, retain=batches, forget=batches, mask=mask, init=Net),
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
