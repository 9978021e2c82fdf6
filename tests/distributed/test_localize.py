"""Localization by several processes selects the mask of one process, to the digest, on every layout.

The networks and inputs are small integers, so that sums over examples and processes are exact in float32, in any order.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset, TensorDataset

import delfast
from tests.distributed import one_rank
from tests.distributed.spawning import error_of, run_in_processes

AGGREGATES = ("topk_mean", "mean", "max", "sum")
FEATURES, HIDDEN, OUTPUTS, CLASSES = 6, 10, 7, 3


class Mix(nn.Module):
    """A layer that stores its weight as (in, out), so that processes that split dim 0 hold parts of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(FEATURES, FEATURES))

    def forward(self, inputs):
        return inputs @ self.weight


delfast.register_layer(Mix, output_dim=1)


class Network(nn.Module):
    """Rows that two, three and four processes do not divide; four processes leave parts of the head empty."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = Mix()
        self.up = nn.Linear(FEATURES, HIDDEN)
        self.down = nn.Linear(HIDDEN, OUTPUTS)
        self.head = nn.Linear(OUTPUTS, CLASSES)
        self.scale = nn.Parameter(torch.empty(CLASSES))

    def forward(self, inputs):
        return self.head(self.down(self.up(self.mix(inputs)).relu()).relu()) * self.scale


def network():
    model = Network()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=generator))
    return model


def loss_fn(model, batch):
    inputs, weights = batch
    return (model(inputs) * weights).sum(1)


def examples(count, seed=5):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(-2, 3, (count, FEATURES), generator=generator).float()
    return TensorDataset(inputs, torch.randint(-2, 3, (count, CLASSES), generator=generator).float())


def batches(count=23, size=3):
    return DataLoader(examples(count), batch_size=size)


SELECTIONS = {
    f"{granularity} {aggregate} {policy} {budget}": {
        "granularity": granularity, "aggregate": aggregate, "policy": policy, "budget": budget
    }
    for granularity, aggregate, policy in (
        *(("channel", aggregate, "whole") for aggregate in AGGREGATES),
        ("channel", "topk_mean", "exact"),
        ("channel", "max", "exact"),
        ("param", "max", "whole"),
    )
    for budget in (0.25, 0.5, 1.0)
}  # fmt: skip


def digests(model, loader=None, **options):
    """Return the digest of every selection, by every criterion."""
    found = {}
    for criterion in ("weighted_grad", "grad", "weight", "random", "shallowest", "deepest"):
        gradient = criterion in ("weighted_grad", "grad")
        scores = delfast.score(
            model, (loader or batches()) if gradient else None, criterion, loss_fn=loss_fn if gradient else None,
            **options,
        )  # fmt: skip
        for name, settings in SELECTIONS.items():
            if criterion in ("shallowest", "deepest") and settings["granularity"] == "param":
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # units that score 0
                found[f"{criterion} {name}"] = scores.select(**settings).digest
    return found


@functools.cache
def of_one_process():
    return digests(network())


# Layouts: each returns (model, group)


def ddp():
    return DistributedDataParallel(network()), dist.group.WORLD


def fsdp():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = network()
    fully_shard(model.up, mesh=mesh)
    return fully_shard(model, mesh=mesh), mesh


def fsdp_of_some():
    """FSDP2 with parameters that it does not shard: their gradients are added over the data group."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = network()
    ignored = {model.scale, model.mix.weight}
    return fully_shard(model, mesh=mesh, ignored_params=ignored), mesh


def hsdp():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = network()
    fully_shard(model.up, mesh=mesh)
    return fully_shard(model, mesh=mesh), dist.group.WORLD


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def tensor_parallel():
    return parallelize_module(network(), init_device_mesh("cpu", (2,)), PLAN), None


def fsdp_and_tensor_parallel():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(network(), mesh["tp"], PLAN)
    fully_shard(model.up, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"]), mesh["dp"]


def ddp_and_tensor_parallel():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return parallelize_module(network(), mesh["tp"], PLAN), mesh["dp"]


def digests_of(layout, rank):
    model, group = layout()
    return digests(model, group=group)


# Parameters that compete, of a network with others that do not


PATTERNS = {
    "sharded left out": {"exclude": ["up.*", "head.bias"]},
    "sharded alone": {"include": ["up.*"]},
    "whole alone": {"include": ["scale", "mix.*"]},  # of fsdp_of_some the ones that are not sharded
}


def by_patterns(layout, rank):
    """Return digests; gradients and hooks of parameters that do not compete stay as they are."""
    model, group = layout()
    called = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(called.append)
    found = {name: salun(model, batches(), group=group, **options).digest for name, options in PATTERNS.items()}
    assert not called and all(parameter.grad is None for parameter in model.parameters())
    return found


@functools.cache
def by_patterns_of_one():
    return {name: salun(network(), batches(), **options).digest for name, options in PATTERNS.items()}


# Loaders of 101 examples


class Recorded(TensorDataset):
    """A data set that remembers which examples were read."""

    def __init__(self, count):
        super().__init__(*examples(count).tensors)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(examples(101))


class OneShare:
    """A sampler of one process's share that no attribute shows."""

    def __init__(self, rank, count):
        self.indices = range(rank, 101, count)

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


def salun(model, loader, **options):
    return delfast.localize(model, loader, 0.3, strategy="salloc", loss_fn=loss_fn, **options)


@functools.cache
def of_101():
    return salun(network(), DataLoader(examples(101), batch_size=7)).digest


def counted(loader_of, layout, rank):
    """Return digest, number of examples, and examples read by this process."""
    model, group = layout()
    loader = loader_of(rank, dist.get_world_size())
    mask = salun(model, loader, group=group)
    assert mask.metadata["processes"] == dist.get_world_size()
    return mask.digest, mask.metadata["examples"], getattr(getattr(loader, "dataset", None), "read", None)


def plain_loader(rank, count):
    return DataLoader(Recorded(101), batch_size=7)


def shuffled(rank, count):
    return DataLoader(examples(101), batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(rank))


def unbatched(rank, count):
    return DataLoader([tuple(t[i : i + 9] for t in examples(101).tensors) for i in range(0, 101, 9)], batch_size=None)


def listed(rank, count):
    return list(DataLoader(examples(101), batch_size=7))


def streamed(rank, count):
    return DataLoader(Stream(), batch_size=7)


def sampled(rank, count, **options):
    data = Recorded(101)
    return DataLoader(data, batch_size=7, sampler=DistributedSampler(data, count, rank, **options))


def shuffled_sampled(rank, count):
    return sampled(rank, count, shuffle=True, seed=4)


def accelerate_uneven(rank, count):
    return of_accelerate(rank, count, even_batches=False)


HAS_ACCELERATE = importlib.util.find_spec("accelerate") is not None
LOADERS = (plain_loader, shuffled, unbatched, listed, streamed, sampled, shuffled_sampled)
LOADERS += (accelerate_uneven,) if HAS_ACCELERATE else ()


def of_accelerate(rank, count, even_batches=True):
    from accelerate.data_loader import BatchSamplerShard as shard

    plain = DataLoader(examples(101), batch_size=8)
    batch_sampler = shard(plain.batch_sampler, count, rank, even_batches=even_batches)
    return DataLoader(examples(101), batch_sampler=batch_sampler)


def own_subset(rank, count):
    return DataLoader(Subset(examples(100), range(rank, 100, count)), batch_size=7)


def own_part(rank, count):
    tensors = examples(100).tensors
    return DataLoader(TensorDataset(*(t[rank : rank + 50] for t in tensors)), batch_size=7)


def own_sampler(rank, count):
    return DataLoader(examples(101), batch_size=7, sampler=OneShare(rank, count))


def own_list(rank, count):
    return listed(rank, count)[rank::count]


def other_rank(rank, count):
    return sampled((rank + 1) % count, count)


def dropping(rank, count):
    return sampled(rank, count, drop_last=True)


REFUSED = {
    **({of_accelerate: "examples of the data set, each once, got"} if HAS_ACCELERATE else {}),
    own_subset: "the same data set on every process",
    own_part: "the same data set on every process",
    own_sampler: "examples of the data set, each once, got",
    own_list: "the same batches on every process",
    other_rank: "expected a DistributedSampler for rank 0 of the group's",
    dropping: "examples of the data set, each once, got",
}


def refused(loader_of, rank):
    model, group = ddp()
    return error_of(lambda: salun(model, loader_of(rank, dist.get_world_size()), group=group))


def refused_without_a_group(rank):
    count = dist.get_world_size()
    loaders = {"sampler": sampled} | ({"accelerate": of_accelerate} if HAS_ACCELERATE else {})
    return {name: error_of(lambda f=f: salun(ddp()[0], f(rank, count))) for name, f in loaders.items()}


# Few batches: some processes have none


def two_batches(layout, rank):
    model, group = layout()
    return salun(model, DataLoader(examples(5), batch_size=3), group=group).digest


@functools.cache
def of_two_batches():
    return salun(network(), DataLoader(examples(5), batch_size=3)).digest


# Errors


def failing(kind, layout, rank):
    """Return the error of a process whose partner fails, and whether the next call is right."""
    model, group = layout()
    loader, loss, budget = batches(), loss_fn, 0.3
    alone = rank == 1
    if kind == "nan":
        data = examples(23)
        data.tensors[1][4] = torch.nan  # in the second batch, rank 1's
        loader = DataLoader(data, batch_size=3)
    if kind == "budget":
        budget = 0.0001
    if kind == "loss":
        loss = failing_after if alone else loss_fn
    if kind == "loss before":
        loss = failing_before if alone else loss_fn
    if kind == "form":
        loss = failing_form if alone else loss_fn
    if kind == "loader":
        loader = DataLoader(Failing() if alone else examples(23), batch_size=3)
    found = error_of(lambda: delfast.localize(model, loader, budget, loss_fn=loss, group=group))
    return found, salun(model, DataLoader(examples(5), batch_size=3), group=group).digest


def failing_after(model, batch):
    loss_fn(model, batch)
    raise ZeroDivisionError("the loss")


def failing_before(model, batch):
    raise KeyError("labels")


def failing_form(model, batch):
    return loss_fn(model, batch).sum()


def stopping(model, batch):
    return next(iter([]))


for function in (failing_after, failing_before, failing_form, stopping):
    function.__qualname__ = loss_fn.__qualname__  # so that the processes make the same call


class Failing(TensorDataset):
    """The same data set with one example that cannot be read in this process."""

    def __init__(self):
        super().__init__(*examples(23).tensors)

    def __getitem__(self, index):
        if index == 11:  # in the fourth batch: rank 1's of two processes
            raise OSError("no such file")
        return super().__getitem__(index)


Failing.__qualname__ = "TensorDataset"
ERRORS = {
    "nan": ("InputError", "expected finite scores, got NaN or infinity for"),
    "budget": ("InputError", "expected a budget that holds the first channel"),
    "loss": ("RuntimeError", "ZeroDivisionError: the loss (on rank 1)"),
    "loss before": ("RuntimeError", "KeyError: 'labels' (on rank 1)"),
    "form": (
        "InputError",
        "per-example losses (N,), got (); use reduction='none' (on rank 1)",
    ),
    "loader": ("RuntimeError", "OSError: no such file (on rank 1)"),
}


def misused(rank):
    """Return the errors of calls that a single process or another layout accepts."""
    model, group = ddp()
    other = network()
    if rank:
        with torch.no_grad():
            other.up.weight.mul_(2)
    thinner = network() if rank else nn.Sequential(nn.Linear(2, 2))
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    sharded, _ = fsdp()
    parallel, _ = tensor_parallel()
    return {
        "critmem": error_of(lambda: delfast.localize(model, batches(), strategy="critmem", group=group)),
        "stable": error_of(lambda: salun(model, examples(23), stop_when_stable=0.9, group=group)),
        "weights": error_of(lambda: salun(other, batches(), group=group) and delfast.localize(
            other, batches(), loss_fn=loss_fn, group=group)),
        "networks": error_of(lambda: salun(thinner, batches(), group=group)),
        "mesh": error_of(lambda: salun(model, batches(), group=mesh)),
        "type": error_of(lambda: salun(model, batches(), group="world")),
        "fsdp without": error_of(lambda: salun(sharded, batches())),
        "per_example": error_of(lambda: salun(sharded, batches(), per_example=True, group=group)),
        "float64": error_of(lambda: salun(sharded, batches(), sum_dtype=torch.float64, group=group)),
        "peers": error_of(lambda: salun(parallel, batches(), group=group)),
        "arguments": error_of(lambda: salun(sharded, batches(), group=group, granularity=("channel", "param")[rank])),
        "criterion": error_of(lambda: salun(model, batches(), group=group, criterion=("grad", "weighted_grad")[rank])),
        "copy": error_of(lambda: copy.deepcopy(delfast.score(sharded, criterion="weight"))),
    }  # fmt: skip


MISUSED = {
    "critmem": "expected no group for criterion 'critmem'",
    "stable": "expected neither group nor sum_dtype with stop_when_stable",
    "weights": "expected the same values of 'up.weight' on every process",
    "networks": "expected the same call on every process, on a model of the same trainable parameters",
    "mesh": "expected group to be a DeviceMesh of one dimension, got one of 2",
    "type": "expected group to be a ProcessGroup or a DeviceMesh of one dimension, got str",
    "fsdp without": "over which fully_shard adds gradients, ranks 0, 1, got none; pass the mesh",
    "per_example": "whole parameters for per_example, got 'scale' as a DTensor",
    "float64": "expected no sum_dtype for FSDP2",
    "peers": "expected group to be processes over which 'up.weight' is not laid out",
    "arguments": "expected the same arguments on every process",
    "criterion": "expected the same call on every process",
    "copy": "expected scores of whole parameters to copy, got those of DTensors",
}


# What a user's training finds afterwards


def untouched(rank):
    """Localize between a forward pass, hooks and gradients of the user's, and return the gradients of a later step."""
    found = []
    for localizes in (False, True):
        model, mesh = fsdp()
        called = []
        model.scale.register_post_accumulate_grad_hook(lambda p, called=called: called.append(1))
        inputs, weights = examples(4, seed=rank).tensors
        loss_fn(model, (inputs, weights)).sum().backward()
        before = {name: p.grad.to_local().clone() for name, p in model.named_parameters()}
        model.up.set_gradient_divide_factor(3.0)
        model.up.set_force_sum_reduction_for_comms(True)  # or gloo refuses the factor
        model.train()
        with torch.no_grad():
            model(inputs)  # the root's parameters are gathered and stay so
        if localizes:
            assert salun(model, DataLoader(examples(5), batch_size=3), group=mesh).digest == of_two_batches()
            assert all(torch.equal(before[name], p.grad.to_local()) for name, p in model.named_parameters())
            assert model.training and len(called) == 1
        loss_fn(model, (inputs, weights)).sum().backward()
        assert len(called) == 2
        found.append({name: p.grad.to_local().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    waiting, mesh = fsdp()
    waiting.set_requires_gradient_sync(False)
    loss_fn(waiting, (inputs, weights)).sum().backward()
    return error_of(lambda: salun(waiting, batches(), group=mesh))


# Real numbers


def real_gradients(rank=0, sum_dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    data = TensorDataset(torch.randn(300, 20), torch.randint(0, 4, (300,)))
    return delfast.score(model, DataLoader(data, batch_size=8), sum_dtype=sum_dtype, **options).gradients


def real_gradients_of_group(rank):
    return real_gradients(group=dist.group.WORLD)


def per_example(rank):
    model, group = ddp()
    return {
        criterion: salun(model, batches(), criterion=criterion, per_example=True, group=group).digest
        for criterion in ("weighted_grad", "squared_grad")
    }


@functools.cache
def per_example_of_one():
    return {
        criterion: salun(network(), batches(), criterion=criterion, per_example=True).digest
        for criterion in ("weighted_grad", "squared_grad")
    }


class Normalized(Network):
    """A network whose result depends on buffers, which each process of DDP has of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(FEATURES))

    def forward(self, inputs):
        return super().forward(inputs + self.shift)


def normalized(rank=0):
    model = Normalized()
    model.load_state_dict(network().state_dict(), strict=False)
    model.shift += 1 + rank
    return model


def of_peers(rank):
    """Return digests under tensor parallelism whose layers do not compete, of a loader that each process shuffles."""
    found = []
    for kind in ("excluded", "frozen"):
        model, _ = tensor_parallel()
        if kind == "frozen":
            model.up.requires_grad_(False), model.down.requires_grad_(False)
        loader = DataLoader(examples(23), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(rank))
        found.append(salun(model, loader, **({"exclude": PEERS} if kind == "excluded" else {})).digest)
    return found


PEERS = ["up.*", "down.*"]


def failing_early(rank):
    """Return the errors of processes whose partner fails before its forward pass, by networks that exchange in it."""
    loss = failing_before if rank == 1 else loss_fn
    mesh = init_device_mesh("cpu", (2,))
    twice = fully_shard(Twice(), mesh=mesh)
    return [
        error_of(lambda: salun_by(twice, loss, group=mesh)),
        error_of(lambda: salun_by(tensor_parallel()[0], loss)),
        error_of(lambda: salun_by(fsdp()[0], stopping if rank == 1 else loss_fn, group=mesh)),
    ]


def salun_by(model, loss, **options):
    return delfast.localize(model, batches(), 0.3, strategy="salloc", loss_fn=loss, **options)


class Twice(Network):
    """A network with a sharded module that runs twice, before another that was registered earlier."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.early = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        fully_shard(self.late, mesh=(mesh := init_device_mesh("cpu", (dist.get_world_size(),))))
        fully_shard(self.early, mesh=mesh)

    def forward(self, inputs):
        return super().forward(self.late(self.early(self.early(inputs))))


def own_buffers(rank):
    """Return digests by buffers that differ between the processes, which keep them."""
    model, sharded = normalized(rank), normalized(rank)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(sharded, mesh=mesh)
    found = [salun(each, batches(), group=mesh).digest for each in (model, sharded)]
    assert all(torch.equal(each.shift, torch.full((FEATURES,), 1.0 + rank)) for each in (model, sharded))
    return found


def other_dtypes(rank):
    """Return digests of float64 under FSDP2, and of bfloat16 under DDP, whose sums are in float32."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    wide = fully_shard(network().double(), mesh=mesh)
    return {**in_dtype(wide, torch.float64, group=mesh), **in_dtype(network().bfloat16(), torch.bfloat16, group=mesh)}


def in_dtype(model, dtype, **options):
    tensors = (tensor.to(dtype) for tensor in examples(23).tensors)
    loader = DataLoader(TensorDataset(*tensors), batch_size=3)
    scores = delfast.score(model, loader, loss_fn=loss_fn, **options)
    return {f"{dtype} {name}": scores.select(0.4, name).digest for name in ("channel", "param")}


def misused_meshes(rank):
    """Return the errors of groups that do not fit a mesh of two dimensions, and the digest of one that does."""
    model, dp = fsdp_and_tensor_parallel()
    parallel, parallel_dp = ddp_and_tensor_parallel()
    replicated, _ = hsdp()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    crossed = [dist.new_group([0, 3]), dist.new_group([1, 2])][rank in (1, 2)]
    return {
        "crossed": error_of(lambda: salun(parallel, batches(), group=crossed)),
        "all": error_of(lambda: salun(model, batches(), group=dist.group.WORLD)),
        "ddp": error_of(
            lambda: salun(
                DistributedDataParallel(ddp_and_tensor_parallel()[0], device_mesh=mesh["a"]), batches(), group=mesh["a"]
            )
        ),
        "other": error_of(lambda: salun(model, batches(), group=mesh["b"])),
        "both": error_of(lambda: salun(parallel, batches(), group=dist.group.WORLD)),
        "half": error_of(lambda: salun(replicated, batches(), group=mesh["b"])),
        "flattened": salun(replicated, DataLoader(examples(5), batch_size=3), group=mesh._flatten("all")).digest,
        "loss": error_of(lambda: salun(parallel, AloneFailing(rank), group=parallel_dp)),
        "after": salun(model, DataLoader(examples(5), batch_size=3), group=dp).digest,
    }


class AloneFailing:
    """Batches whose third is missing on rank 2."""

    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        for number, batch in enumerate(batches()):
            if (number, self.rank) == (2, 2):
                raise OSError("no such file")
            yield batch


MISUSED_MESHES = {
    "crossed": "expected group to be processes that hold the same parts of the parameters",
    "ddp": "as the local part that DistributedDataParallel leaves of tensor parallelism",
    "all": "expected group to be the 2 processes over which fully_shard adds gradients",
    "other": "expected group to be the 2 processes over which fully_shard adds gradients",
    "both": "expected group to be processes over which 'up.weight' is not laid out",
    "half": "expected group to be the 4 processes over which fully_shard adds gradients, ranks 0, 1, 2, 3",
    "loss": "OSError: no such file (on rank 2)",
}


class Weighted(nn.Module):
    """Weights of features; with a mesh, each process computes a part of the examples, as in sequence parallelism."""

    def __init__(self, mesh=None):
        super().__init__()
        self.mesh = mesh
        weight = torch.arange(1.0, 1 + FEATURES)
        self.weight = nn.Parameter(weight if mesh is None else distribute_tensor(weight, mesh, [Replicate()]))

    def forward(self, inputs):
        if self.mesh is None:
            return inputs * self.weight
        return (distribute_tensor(inputs, self.mesh, [Shard(0)]) * self.weight).full_tensor()


def weighted(rank=None):
    """Return the gradient of a parameter that is whole on every process, while each computes a summand."""
    model = Weighted(None if rank is None else init_device_mesh("cpu", (2,)))
    scores = delfast.score(model, batches(), "grad", loss_fn=lambda model, batch: model(batch[0]).square().sum(1))
    return scores.gradients["weight"], scores.select(0.5).digest


def exchanged(rank):
    """Return the bytes that a process gives to all-reduces while it selects channels, and elements."""
    model, mesh = fsdp()
    scores = delfast.score(model, batches(), loss_fn=loss_fn, group=mesh)
    all_reduce, found = dist.all_reduce, []

    def counting(tensor, *args, **kwargs):
        found[-1] += tensor.nbytes
        return all_reduce(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counting)
        for granularity in ("channel", "param"):
            found.append(0)
            scores.select(0.5, granularity)
    return found


CHECKS = 64 + 8 + 64  # bytes of any selection: digests of arguments, another process's error, digests of masks
ERROR = 8  # bytes before every exchange: whether another process has failed
HISTOGRAMS = 8 * (2**11 + 2**11 + 2**9)  # of the 31 bits of a score


def bytes_to_select(shapes):
    """Return the bytes of all channels' scores, and of what decides on elements unless ties in a parameter do."""
    units = sum(shape[0] for shape in shapes)
    bits = sum((math.prod(shape) + 7) // 8 for shape in shapes)
    return CHECKS + 4 * ERROR + 4 * units, CHECKS + 8 * ERROR + HISTOGRAMS + 9 * len(shapes) + bits


def test_bytes_to_select_for_llama_2_7b():
    layer = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)] + [(4096,)] * 2
    shapes = [(32000, 4096), *layer * 32, (4096,), (32000, 4096)]
    assert sum(map(math.prod, shapes)) == 6_738_415_616
    channels, elements = (count / 2**20 for count in bytes_to_select(shapes))
    print(f"{channels:.1f} MiB for channels, {elements:.0f} MiB for elements")
    assert channels == pytest.approx(6.4, abs=0.06)
    assert elements == pytest.approx(803, abs=1)  # the mask itself, one bit an element


LAYOUTS = {
    2: (ddp, fsdp, fsdp_of_some, tensor_parallel),
    3: (ddp, fsdp),
    4: (fsdp, hsdp, fsdp_and_tensor_parallel, ddp_and_tensor_parallel),
}


@pytest.mark.parametrize("count", [2, 3, 4])
def test_processes(count, tmp_path):
    scenarios = {layout.__name__: functools.partial(digests_of, layout) for layout in LAYOUTS[count]}
    scenarios |= {f.__name__: functools.partial(counted, f, ddp) for f in LOADERS}
    scenarios |= {f"fsdp {f.__name__}": functools.partial(counted, f, fsdp) for f in (plain_loader, listed, sampled)}
    scenarios |= {f"few {f.__name__}": functools.partial(two_batches, f) for f in (ddp, fsdp)}
    if count == 2:
        scenarios |= {f"patterns {f.__name__}": functools.partial(by_patterns, f) for f in (ddp, fsdp, fsdp_of_some)}
    scenarios["real"] = real_gradients_of_group
    scenarios["buffers"] = own_buffers
    scenarios["dtypes"] = other_dtypes
    if count == 4:
        scenarios["meshes"] = misused_meshes
    if count == 2:
        scenarios |= {f"refused {f.__name__}": functools.partial(refused, f) for f in REFUSED}
        scenarios["no group"] = refused_without_a_group
        scenarios |= {
            f"{kind}, {f.__name__}": functools.partial(failing, kind, f) for kind in ERRORS for f in (ddp, fsdp)
        }
        scenarios |= {"misused": misused, "untouched": untouched, "per example": per_example}
        scenarios |= {"accepted": one_rank.accepted, "broken": functools.partial(one_rank.broken_calls, tmp_path)}
        scenarios |= {"exchanged": exchanged, "weighted": weighted, "peers": of_peers, "early": failing_early}
    results = run_in_processes(count, scenarios, tmp_path)

    def all_ranks(name):
        return [result[name] for result in results]

    for layout in LAYOUTS[count]:
        for rank, found in enumerate(all_ranks(layout.__name__)):
            different = {key for key, value in of_one_process().items() if found[key] != value}
            assert not different, (layout, rank, different)
    for name in [f.__name__ for f in LOADERS] + ["fsdp plain_loader", "fsdp listed", "fsdp sampled"]:
        assert [found[:2] for found in all_ranks(name)] == [(of_101(), 101)] * count, name
    for name in ("plain_loader", "sampled"):
        assert sorted(i for found in all_ranks(name) for i in found[2]) == list(range(101)), name
    for layout in ("ddp", "fsdp"):
        assert all_ranks(f"few {layout}") == [of_two_batches()] * count
    assert all_ranks("buffers") == [[salun(normalized(), batches()).digest] * 2] * count
    for found in all_ranks("real"):
        assert all(torch.equal(found[name], value) for name, value in real_gradients().items())
    wide = in_dtype(network().double(), torch.float64) | in_dtype(network().bfloat16(), torch.bfloat16)
    assert all_ranks("dtypes") == [wide] * count
    if count == 4:
        for found in all_ranks("meshes"):
            assert found.pop("flattened") == found.pop("after") == of_two_batches()
            assert all(text in found[name][1] for name, text in MISUSED_MESHES.items()), found
    if count != 2:
        return
    for layout in ("ddp", "fsdp", "fsdp_of_some"):
        assert all_ranks(f"patterns {layout}") == [by_patterns_of_one()] * count, layout
    for loader_of, text in REFUSED.items():
        first, *others = all_ranks(f"refused {loader_of.__name__}")
        assert first is not None and first[0] == "InputError" and text in first[1], (loader_of, first)
        assert others == [first]
    for found in all_ranks("no group"):
        assert all(kind == "InputError" and "pass group=" in text for kind, text in found.values())
    for kind, (error, text) in ERRORS.items():
        for layout in ("ddp", "fsdp"):
            first, second = all_ranks(f"{kind}, {layout}")
            assert first == second
            assert first[0] is not None and first[0][0] == error and text in first[0][1], (kind, layout, first)
            assert first[1] == of_two_batches()
    for found in all_ranks("misused"):
        for name, text in MISUSED.items():
            assert found[name] is not None and found[name][0] == "InputError" and text in found[name][1], (name, found)
    assert all("expected no gradients that wait for their reduction" in found[1] for found in all_ranks("untouched"))
    shapes = [tuple(p.shape) for p in network().parameters()]
    in_layers = [(shape[1], shape[0]) if shape == (FEATURES, FEATURES) else shape for shape in shapes]
    channels, elements = bytes_to_select(in_layers)
    for found in all_ranks("exchanged"):
        ties = found[1] - elements  # those of the last parameter are ranked by their indices
        assert found[0] == channels and 0 <= ties <= 2**11 * 8 + ERROR, (found, channels, elements)
    expected = salun(network(), batches(), exclude=PEERS).digest
    assert all_ranks("peers") == [[expected] * 2] * count
    one_rank.check(all_ranks("broken"), one_rank.BROKEN_CALLS)
    alone = one_rank.accepted_by_one()
    for found in all_ranks("accepted"):
        assert torch.equal(found.pop("blocks"), alone["blocks"])
        assert found.items() <= alone.items()
    for found in all_ranks("early"):
        assert [text.partition(":")[0] for _, text in found] == ["KeyError", "KeyError", "StopIteration"], found
        assert all(text.endswith("(on rank 1)") for _, text in found)
    for gradient, digest in all_ranks("weighted"):
        assert torch.equal(gradient, weighted()[0]) and digest == weighted()[1]
    assert all_ranks("per example") == [per_example_of_one()] * count
