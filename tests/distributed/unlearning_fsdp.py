"""Unlearning of networks that FSDP2 shards, and early stopping that all processes decide together."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.func import functional_call
from torch.utils.data import DataLoader, Subset

import delfast
from delfast.optim import MaskedSGD
from delfast.unlearning import EarlyStop, train
from delfast.unlearning.api import full_mask
from tests.distributed.spawning import error_of
from tests.distributed.unlearning import (
    examples,
    forgotten,
    fully_sharded,
    gathered,
    network,
    own,
    parallel,
    retained,
    run,
    state,
    unlearned,
    with_batchnorm,
)  # fmt: skip
from tests.distributed.unlearning_errors import FailingLoss

MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
OFFLOADED = CPUOffloadPolicy(pin_memory=False)  # pinned memory needs a GPU


def sharded(name, rank, **options):
    return unlearned(name, rank, wrap=fully_sharded, **options)


def rounded_loss(model, batch):
    """Compute in bfloat16: by FSDP2's policy, or by copies of the parameters, as FSDP2 makes them."""
    inputs = batch[0].bfloat16()
    if isinstance(model, FSDPModule):
        logits = model(inputs)
    else:
        copies = {name: parameter.bfloat16() for name, parameter in model.named_parameters()}
        logits = functional_call(model, copies, (inputs,))
    return nn.functional.cross_entropy(logits.float(), batch[1], reduction="none")


def bf16_loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0].bfloat16()).float(), batch[1], reduction="none")


def bf16_network():
    return network().bfloat16()


BF16 = {"loss_fn": rounded_loss, "make": bf16_network}
# name -> what ``unlearned`` and ``expected`` get
PRECISIONS = {
    "mixed": ({"wrap": functools.partial(fully_sharded, mp_policy=MIXED)}, {"loss_fn": rounded_loss}),
    "bf16": ({"wrap": fully_sharded}, BF16),
    "mixed bf16": ({"wrap": functools.partial(fully_sharded, mp_policy=MIXED)}, BF16),
    "ddp bf16": ({}, BF16 | {"loss_fn": bf16_loss}),
    "offloaded": ({"wrap": functools.partial(fully_sharded, offload_policy=OFFLOADED)}, {}),
}


def sharded_buffers(rank):
    """Return the state of a network of FSDP2 with running statistics, after another run has failed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fully_shard(with_batchnorm(), mesh=mesh)
    options = {"retain": retained(), "forget": forgotten()[:2], "epochs": 2, "lr": 0.1, "method": "neggrad+"}
    failing_loss = FailingLoss(rank == 1, 3)
    error = error_of(lambda: delfast.unlearn(model, group=mesh, loss_fn=failing_loss, **options))
    assert error == ("RuntimeError", "KeyError: 'labels' (on rank 1)"), error
    delfast.unlearn(model, group=mesh, **options)
    return gathered(model)


def two_dimensions(rank):
    """Return the error of FSDP2 within tensor parallelism."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(network(), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return error_of(lambda: delfast.unlearn(model, retain=retained(), method="finetune", group=mesh["dp"]))


# Early stopping


def held_out(rank):
    """Return a loader of this process's share of the examples held out, of at most 11 batches or of 1; its indices."""
    share = [rank, 22] if rank else [i for i in range(22) if not 1 <= i < dist.get_world_size()]
    return DataLoader(Subset(examples(23, seed=9), share), batch_size=2), share


def stopping(rank):
    """Stop early, on shares of different lengths held out, under a group and without, in a network with buffers.

    Under FSDP2 the network has none: outside of ``unlearn`` each process keeps its own.
    """
    validation, share = held_out(rank)
    training = delfast.TrainingOptions(validation=validation, patience=2)
    options = {"lr": 0.5, "epochs": 12}
    found = []
    for group, retain in ((True, retained()), (False, own(rank))):
        model = with_batchnorm()
        result = run(parallel(model), rank, group=group, training=training, retain=retain, **options)
        found.append((result.validation, result.losses, state(model)))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fully_shard(network(), mesh=mesh)
    result = delfast.unlearn(model, retain=retained(), method="finetune", training=training, group=mesh, **options)
    found.append((result.validation, result.losses, gathered(model)))
    model = fully_shard(network(), mesh=mesh)
    stop = EarlyStop(validation, 2, None)
    optimizer = MaskedSGD(model.named_parameters(), full_mask(model), lr=1.0)
    result = train(model, own(rank), optimizer, epochs=12, early_stop=stop, schedule="constant")
    found.append((result.validation, result.losses, gathered(model)))
    return found, share


def held_out_losses(rank):
    """Return the losses that four processes measure on layouts of two dimensions; each divides the set otherwise."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    both = parallelize_module(network(), mesh["tp"], plan)
    places = {
        "hsdp": (fully_sharded(network()), rank),
        "tensor": (parallelize_module(network(), mesh["tp"], plan), 0),
        "both": (fully_shard(both, mesh=mesh["dp"]), rank // 2),
    }
    data, losses = examples(23, seed=9), {}
    for name, (model, place) in places.items():
        shares = {"hsdp": [range(17), range(17, 23), range(17, 19), range(1)], "tensor": [range(23)]}
        share = shares.get(name, [range(20), range(20, 23)])[place]
        stop = EarlyStop(DataLoader(Subset(data, share), batch_size=2), 1, None)
        stop.update(model)
        stop.restore(model)
        losses[name] = stop.losses
    return losses


def check_held_out_losses(found):
    """All processes have the mean over all examples, however often one is held out."""
    counts = {"hsdp": [2, *[1] * 16, 2, 2, *[1] * 4], "tensor": [1] * 23, "both": [1] * 23}
    inputs, targets = examples(23, seed=9)[:]
    with torch.no_grad():
        losses = nn.functional.cross_entropy(network()(inputs), targets, reduction="none")
    for name, weights in counts.items():
        mean = float(losses @ torch.tensor(weights).float()) / sum(weights)
        assert all(each[name] == found[0][name] == pytest.approx([mean], rel=1e-5) for each in found), name


def check_stopping(found):
    """All processes stop at one epoch, with one loss, that of all examples held out."""
    shares = [share for _, share in found]
    data = examples(23, seed=9)
    for each in range(4):
        validation, losses, weights = found[0][0][each]
        assert 3 <= len(validation) < 12
        model = (with_batchnorm() if each < 2 else network()).eval()
        model.load_state_dict(weights)
        held = [index for share in shares for index in share]
        inputs, targets = data[held]
        with torch.no_grad():
            assert float(nn.functional.cross_entropy(model(inputs), targets)) == pytest.approx(
                min(validation), rel=1e-5
            )
        for runs, _ in found:
            assert runs[each][:2] == (validation, losses)
            assert all(torch.equal(value, weights[name]) for name, value in runs[each][2].items())
