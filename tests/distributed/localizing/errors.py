"""The error of one process, and wrong calls, are raised by all processes."""

from __future__ import annotations

import copy
import functools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import delfast
from tests.distributed.localizing.masks import few_alone
from tests.distributed.localizing.networks import (
    FEATURES,
    Network,
    batches,
    ddp,
    ddp_and_tensor_parallel,
    examples,
    fsdp,
    fsdp_and_tensor_parallel,
    hsdp,
    loss_fn,
    network,
    salun,
    tensor_parallel,
)
from tests.distributed.spawning import error_of


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
    return found, salun(model, batches(5), group=group).digest


def failing_after(model, batch):
    loss_fn(model, batch)
    raise ZeroDivisionError("the loss")


def failing_before(model, batch):
    raise KeyError("labels")


def of_modules(model, batch):
    return model.late(model.early(batch[0])).sum(1)


def failing_form(model, batch):
    return loss_fn(model, batch).sum()


def stopping(model, batch):
    return next(iter([]))


for function in (failing_after, failing_before, failing_form, of_modules, stopping):
    function.__qualname__ = loss_fn.__qualname__  # so that the processes make the same call


class Failing(TensorDataset):
    """A copy of the data set with one example that cannot be read in this process."""

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


# Errors before a forward pass


def failing_early(rank):
    """Return the errors of processes whose partner fails before its forward pass, by networks that exchange in it."""
    loss = failing_before if rank == 1 else loss_fn
    mesh = init_device_mesh("cpu", (2,))
    twice = fully_shard(Twice(), mesh=mesh)
    return [
        error_of(lambda: salun_by(twice, loss, group=mesh)),
        error_of(lambda: salun_by(tensor_parallel()[0], loss)),
        error_of(lambda: salun_by(twice, failing_before if rank == 1 else of_modules, group=mesh)),
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


# Wrong calls


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
    "arguments": "expected the same granularity on every process, got 'channel' on the first and another one on rank 1",
    "criterion": "expected the same call on every process",
    "copy": "expected scores of whole parameters to copy, got those of DTensors",
}


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
        "flattened": salun(replicated, batches(5), group=mesh._flatten("all")).digest,
        "loss": error_of(lambda: salun(parallel, AloneFailing(rank), group=parallel_dp)),
        "after": salun(model, batches(5), group=dp).digest,
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


# Scenarios and their checks

FAILING = {
    2: [(kind, layout) for kind in ERRORS for layout in (ddp, fsdp)],
    3: [],
    4: [(kind, layout) for kind in ERRORS if kind != "loader" for layout in (hsdp, fsdp_and_tensor_parallel)],
}  # of four processes, another one than rank 1 reads the example that "loader" lacks


def scenarios(count):
    found = {f"{kind}, {f.__name__}": functools.partial(failing, kind, f) for kind, f in FAILING[count]}
    if count == 2:
        found |= {"misused": misused, "early": failing_early}
    return found | ({"meshes": misused_meshes} if count == 4 else {})


def check(count, all_ranks):
    for kind, layout in FAILING[count]:
        first, *others = all_ranks(f"{kind}, {layout.__name__}")
        error, text = ERRORS[kind]
        assert others == [first] * (count - 1), (kind, layout, first, others)
        assert first[0] is not None and first[0][0] == error and text in first[0][1], (kind, layout, first)
        assert first[1] == few_alone(2)["param"]
    if count == 2:
        for found in all_ranks("misused"):
            for name, text in MISUSED.items():
                assert found[name] is not None and found[name][0] == "InputError" and text in found[name][1], found
        for found in all_ranks("early"):
            assert [text.partition(":")[0] for _, text in found] == [
                "KeyError",
                "KeyError",
                "KeyError",
                "StopIteration",
            ], found
            assert all(text.endswith("(on rank 1)") for _, text in found)
    if count == 4:
        for found in all_ranks("meshes"):
            assert found.pop("flattened") == found.pop("after") == few_alone(2)["param"]
            assert all(text in found[name][1] for name, text in MISUSED_MESHES.items()), found
