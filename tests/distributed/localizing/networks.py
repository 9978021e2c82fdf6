"""The network, the sets and the layouts of all themes.

The values are small integers, so that sums over examples and processes are exact in float32, in any order.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import delfast

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


def salun(model, loader, **options):
    return delfast.localize(model, loader, 0.3, strategy="salloc", loss_fn=loss_fn, **options)


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


LAYOUTS = {
    1: (ddp, fsdp),
    2: (ddp, fsdp, fsdp_of_some, tensor_parallel),
    3: (ddp, fsdp),
    4: (fsdp, hsdp, fsdp_and_tensor_parallel, ddp_and_tensor_parallel),
}
