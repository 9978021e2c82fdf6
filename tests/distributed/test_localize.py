"""Localization by several processes selects the mask of one process, to the digest, on every layout.

The networks and inputs are small integers, so that sums over examples and processes are exact in float32, in any order.
"""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import delfast
from tests.distributed.spawning import run_in_processes

AGGREGATES = ("topk_mean", "mean", "max", "sum")
FEATURES, HIDDEN, OUTPUTS, CLASSES = 6, 10, 7, 3


class Network(nn.Module):
    """Rows that two, three and four processes do not divide; four processes leave parts of the head empty."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, HIDDEN)
        self.down = nn.Linear(HIDDEN, OUTPUTS)
        self.head = nn.Linear(OUTPUTS, CLASSES)
        self.scale = nn.Parameter(torch.empty(CLASSES))

    def forward(self, inputs):
        return self.head(self.down(self.up(inputs).relu()).relu()) * self.scale


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


LAYOUTS = {
    2: (ddp, fsdp, tensor_parallel),
    3: (ddp, fsdp),
    4: (fsdp, hsdp, fsdp_and_tensor_parallel, ddp_and_tensor_parallel),
}


@pytest.mark.parametrize("count", [2, 3, 4])
def test_processes(count, tmp_path):
    scenarios = {layout.__name__: functools.partial(digests_of, layout) for layout in LAYOUTS[count]}
    results = run_in_processes(count, scenarios, tmp_path)
    for name in scenarios:
        for rank in range(count):
            different = {key for key, value in of_one_process().items() if results[rank][name][key] != value}
            assert not different, (name, rank, different)
