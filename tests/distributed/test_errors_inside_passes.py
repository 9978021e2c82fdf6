"""An error inside a forward or backward pass of a sharded network: its process raises it at once, and waits for nobody.

Each case has a group of its own with a short timeout: the processes cannot use a group after a pass that one of them
has left.
"""

from __future__ import annotations

import datetime
import functools
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import delfast
from delfast.joint_errors import NOTE
from tests.distributed.one_rank import CLASSES, WIDTH, batches, losses_of
from tests.distributed.spawning import run_in_processes

WAIT_S = 3.0  # of one exchange
AT_ONCE_S = 2.0  # between an error and the caller, on cores that others use too


class Memory(torch.OutOfMemoryError):
    """The error of a layer whose memory does not suffice."""


class Broken(torch.autograd.Function):
    """The identity, whose backward pass fails."""

    @staticmethod
    def forward(ctx, inputs):
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise failure()


class Layer(nn.Module):
    """A layer without parameters that fails on rank 1 from its n-th pass on."""

    def __init__(self, where="forward", after=0):
        super().__init__()
        self.where, self.left = where, after

    def forward(self, inputs):
        self.left -= 1
        if dist.get_rank() == 0 or self.left >= 0:
            return inputs
        if self.where == "backward":
            return Broken.apply(inputs)
        raise failure()


raised_at = [0.0]


def failure():
    raised_at[0] = time.monotonic()
    return Memory("no memory for 3 GiB")


def network(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 16), *layers, nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def own_mesh():
    group = dist.new_group(range(2), timeout=datetime.timedelta(seconds=WAIT_S))
    # a name of its own: torch takes meshes of equal names and ranks for the same one, and keeps the group of the first
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=(group.group_name,))


def fsdp(layer):
    mesh = own_mesh()
    model = network(layer)
    fully_shard(model[3], mesh=mesh)
    return fully_shard(model, mesh=mesh), mesh


def localized(layer):
    model, mesh = fsdp(layer)
    return delfast.localize(model, batches(), group=mesh)


def localized_by_tensor_parallelism(layer):
    model = parallelize_module(network(layer), own_mesh(), {"3": ColwiseParallel(), "5": RowwiseParallel()})
    return delfast.localize(model, batches())


def evaluated(layer):
    model, mesh = fsdp(layer)
    return delfast.evaluate(model, batches(8), batches(8), batches(8), mia=False, group=mesh)


def unlearned(layer, **options):
    model, mesh = fsdp(layer)
    return delfast.unlearn(
        model, retain=batches(), forget=batches(8), init=network, seed=1, epochs=1, head="5", group=mesh, **options
    )


def in_parts(model, batch):
    """Compute losses by the modules of a network, which fails between two of them."""
    hidden = model[0](batch[0])
    if dist.get_rank() == 1:
        raise failure()
    return nn.functional.cross_entropy(model[2](hidden.relu()), batch[1], reduction="none")


def localized_in_parts(_):
    mesh, model = own_mesh(), nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return delfast.localize(fully_shard(model, mesh=mesh), batches(), loss_fn=in_parts, group=mesh)


CASES = {
    "localize, forward": (localized, Layer),
    "localize, second batch": (localized, functools.partial(Layer, after=1)),
    "localize, backward": (localized, functools.partial(Layer, "backward")),
    "localize, tensor parallelism": (localized_by_tensor_parallelism, Layer),
    "localize, between modules": (localized_in_parts, Layer),
    "evaluate": (evaluated, Layer),
    "unlearn, first pass": (unlearned, Layer),
    "unlearn, first pass of a loss": (functools.partial(unlearned, loss_fn=losses_of), Layer),
    "unlearn, backward": (functools.partial(unlearned, method="finetune"), functools.partial(Layer, "backward", 1)),
}


def outcome(call, make_layer, rank):
    """Return the error's type, text and notes, and how long it took to arrive: from where it was raised, or in all."""
    dist.barrier()  # the process that fails does not wait for the other
    begin = raised_at[0] = time.monotonic()
    try:
        call(make_layer())
    except Exception as error:
        since = raised_at[0] if rank else begin
        return type(error).__name__, str(error), getattr(error, "__notes__", [NOTE]), time.monotonic() - since
    return "none", "", [], 0.0


def in_ddp(rank):
    """Return the error of localize of a network that every process has a copy of: no tensor is exchanged in a pass."""
    return outcome(lambda layer: delfast.localize(network(layer), batches(), group=dist.group.WORLD), Layer, rank)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    scenarios = {name: functools.partial(outcome, *case) for name, case in CASES.items()}
    return run_in_processes(2, {"ddp": in_ddp, **scenarios}, tmp_path_factory.mktemp("job"))


@pytest.mark.parametrize("case", CASES)
def test_the_process_raises_its_own_error_at_once(outcomes, case):
    (other, _, _, waited), (name, text, notes, seconds) = (found[case] for found in outcomes)
    assert (name, text) == ("Memory", "no memory for 3 GiB")
    assert seconds < AT_ONCE_S
    assert len(notes) == 1 and NOTE in notes[0]
    assert other == "RuntimeError"
    assert waited < 3 * WAIT_S  # with the start: it waits once, not again in each of the four contexts around


def test_an_error_in_a_layer_of_a_whole_network_is_raised_by_all(outcomes):
    (other, text, *_), (name, _, _, seconds) = (found["ddp"] for found in outcomes)
    assert name == "Memory" and seconds < AT_ONCE_S
    assert other == "RuntimeError" and text == "Memory: no memory for 3 GiB (on rank 1)"
