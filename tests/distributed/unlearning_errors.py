"""Calls of ``unlearn`` that all processes refuse, and errors of one process that all of them raise."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

import delfast
from delfast.optim import MaskedSGD
from delfast.unlearning import EarlyStop, train
from delfast.unlearning.api import full_mask
from delfast.unlearning.data_parallel import averaging_processes
from delfast.unlearning.shared_steps import SharedSteps
from tests.distributed.spawning import error_of
from tests.distributed.unlearning import (
    CLASSES,
    decoder,
    examples,
    forgotten,
    gathered,
    network,
    own,
    parallel,
    retained,
    run,
    sampled,
    state,
    texts,
    unlearned,
    with_batchnorm,
)  # fmt: skip


def refused(rank):
    """Return the errors of calls that would leave the processes with different networks; nothing is changed."""
    model, count = network(), dist.get_world_size()
    ddp = parallel(model)
    one, two = (dist.new_group([number]) for number in (0, 1))
    own_mask = delfast.localize(network(), own(rank, seed=5), budget=0.3)
    before = state(model)
    found = {
        "share": error_of(lambda: run(ddp, rank, "del", group=False, forget=own(rank, seed=5))),
        "mask": error_of(lambda: run(ddp, rank, group=False, mask=own_mask)),
        "settings": error_of(lambda: run(ddp, rank, group=False, lr=0.1 + rank)),
        "argument": error_of(lambda: run(ddp, rank, group=False, lr=-1.0 if rank else 1.0)),
        "sampler": error_of(lambda: run(ddp, rank, "del", group=False, forget=sampled(rank, count))),
        "own retain": error_of(lambda: run(ddp, rank, retain=own(rank))),
        "own list": error_of(lambda: run(ddp, rank, retain=list(own(rank)))),
        "own forget": error_of(lambda: run(ddp, rank, "neggrad+", forget=own(rank))),
        "half": error_of(lambda: run(ddp, rank, "neggrad+", forget=sampled(rank, count))),
        "own order": error_of(lambda: run(ddp, rank, retain=sampled(rank, count, shuffle=True, seed=rank))),
        "own draws": error_of(lambda: run(ddp, rank, retain=DataLoader(
            examples(24), batch_sampler=Drawing(count, rank)))),
        "plain": error_of(lambda: run(network(), rank)),
        "group": error_of(lambda: delfast.unlearn(
            ddp, retain=retained(), method="finetune", group=(one, two)[rank])),
        "one-shot": error_of(lambda: run(ddp, rank, "ssd")),
        "unsynchronized": error_of(lambda: without_sync(ddp, rank)),
        "graphs": error_of(lambda: run(ddp, rank, training=delfast.TrainingOptions(cuda_graphs=True))),
        "synchronized": error_of(lambda: SharedSteps(  # DistributedDataParallel takes the layer on GPUs alone
            "retain", averaging_processes(ddp), retain=retained(), forget=()).check(nn.SyncBatchNorm(3))),
    }  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    reading = parallel(decoder())
    before = state(reading)
    found |= {name: error_of(lambda g=given: run(reading, rank, "neggrad+", loss_fn=delfast.causal_lm_loss, **g))
              for name, given in own_texts(rank).items()}  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in reading.state_dict().items())
    found["one-shot shares"] = error_of(
        lambda: run(
            parallel(network()), rank, "ssd", group=False, retain=own(rank), forget=own(rank, seed=5), alpha=1.0
        )
    )
    found["init"] = error_of(
        lambda: run(parallel(network()), rank, "del", group=False, init=lambda: scaled(network(), 1 + rank))
    )
    return found


def own_texts(rank):
    """Return loaders of dicts that differ in one place between the processes: what ``run`` gets."""
    whole = {"retain": texts(9, 1), "forget": list(texts(5, 2))}
    labels, keys, words = list(texts(5, 2)), list(texts(5, 2)), list(texts(5, 2))
    labels[0]["labels"][0, 1] = rank
    keys[0]["attention_mask" if rank else "mask"] = torch.ones(4, 5)
    words[0]["name"] = ["a", "b", "c", str(rank)]
    data = [{"input_ids": torch.tensor([1, 2, 3 + rank])}, {"input_ids": torch.tensor([1, 2, 3])}]
    return {
        "labels": whole | {"forget": labels}, "keys": whole | {"forget": keys}, "words": whole | {"forget": words},
        "dicts": whole | {"retain": DataLoader(data, batch_size=2)},
    }  # fmt: skip


class Drawing:
    """A batch sampler of a share, which draws with replacement."""

    def __init__(self, count, rank):
        self.num_replicas, self.rank = count, rank

    def __iter__(self):
        yield from torch.randint(24, (3, 8), generator=torch.Generator().manual_seed(self.rank)).tolist()

    def __len__(self):
        return 3


def without_sync(ddp, rank):
    with ddp.no_sync():
        run(ddp, rank)


def scaled(model, factor):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


REFUSED = {
    "share": ("InputError", "expected the same mask on every process, got different ones"),
    "mask": ("InputError", "expected the same mask on every process, got different ones"),
    "settings": ("InputError", "expected the same method, head, seed and options on every process"),
    "argument": ("InputError", "(on rank 1)"),
    "sampler": ("InputError", "expected a loader of the whole set, got one whose DistributedSampler"),
    "own retain": ("InputError", "expected the same retain set on every process"),
    "own list": ("InputError", "expected the same retain set on every process"),
    "own forget": ("InputError", "expected the same forget set on every process"),
    "half": ("InputError", "expected both sets sharded by their samplers or none, got the retain set whole"),
    "labels": ("InputError", "expected the same forget set on every process"),
    "keys": ("InputError", "expected the same forget set on every process"),
    "words": ("InputError", "expected the same forget set on every process"),
    "dicts": ("InputError", "expected the same retain set on every process"),
    "own order": ("InputError", "expected each example of the retain set at most once on all processes together"),
    "own draws": ("InputError", "of 24 more often: the sampler repeats some"),
    "plain": ("InputError", "expected model within DistributedDataParallel for group=, got Sequential"),
    "group": ("InputError", "expected group to be the 2 processes over which DistributedDataParallel averages"),
    "unsynchronized": ("InputError", "expected gradients averaged in every backward pass"),
    "one-shot": ("InputError", "expected no group for 'ssd'"),
    "graphs": ("InputError", "expected cuda_graphs="),
    "synchronized": ("InputError", "expected as many batches on every process for the SyncBatchNorm ''"),
    "one-shot shares": ("InputError", "expected the same values of '0.weight' on every process"),
    "init": ("InputError", "expected the same values of '0.weight' on every process"),
}


def sharded_refused(rank):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fully_shard(network(), mesh=mesh)
    part = network()
    fully_shard(part, mesh=mesh, ignored_params={part[0].bias})
    scaling = fully_shard(network(), mesh=mesh)
    scaling.set_gradient_divide_factor(1.0)
    waiting = fully_shard(network(), mesh=mesh)
    waiting.set_requires_gradient_sync(False)
    parallelized = parallelize_module(network(), mesh, {"0": ColwiseParallel()})
    before = gathered(model)
    found = {
        "without": error_of(lambda: run(model, rank, group=False)),
        **{name: error_of(lambda n=name: run(model, rank, n)) for name in ("l1-sparse", "scrub", "retrain", "ssd")},
        "checkpoint": error_of(lambda: run(model, rank, checkpoint=f"{rank}.pt")),
        "trained": error_of(lambda: train(
            model, retained(), MaskedSGD(model.named_parameters(), full_mask(model)), epochs=1, checkpoint="any.pt")),
        "ignored": error_of(lambda: run(part, rank)),
        "factor": error_of(lambda: run(scaling, rank)),
        "waiting": error_of(lambda: run(waiting, rank)),
        "parallel": error_of(lambda: run(parallelized, rank)),
        "mask": error_of(lambda: run(
            model, rank, mask=delfast.localize(network(), own(rank, seed=5), budget=0.3))),
    }  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in gathered(model).items())
    return found


SHARDED_REFUSED = {
    "without": "over which fully_shard adds gradients, ranks 0, 1, got none",
    "l1-sparse": "for FSDP2, got 'l1-sparse'",
    "scrub": "for FSDP2, got 'scrub'",
    "retrain": "for FSDP2, got 'retrain'",
    "ssd": "expected no group for 'ssd'",
    "checkpoint": "expected no checkpoint= for a network of DTensors",
    "trained": "expected no checkpoint= for a network of DTensors",
    "ignored": "to exchange the gradients of all parameters for unlearn, got '0.bias'",
    "factor": "expected FSDP2 to average gradients, got a divide factor of 1.0",
    "waiting": "expected FSDP2 to reduce gradients in every backward pass",
    "parallel": "to exchange the gradients of all parameters for unlearn, got '0.weight'",
    "mask": "expected the same mask on every process",
}


# Errors of one process


class FailingLater(nn.Module):
    """A network whose forward pass fails on one process from its third pass in training on."""

    def __init__(self, fails):
        super().__init__()
        self.inner, self.fails, self.passes = with_batchnorm(), fails, 0

    def forward(self, inputs):
        self.passes += self.training
        if self.fails and self.passes > 2:
            raise ZeroDivisionError("the network")
        return self.inner(inputs)


class FailingLoss:
    """A loss that fails on one process before the network runs."""

    def __init__(self, fails, calls=2):
        self.fails, self.left = fails, calls

    def __call__(self, model, batch):
        self.left -= model.training
        if self.fails and self.left < 0:
            raise KeyError("labels")
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


class NanLoss(FailingLoss):
    """A loss that is not finite on one process."""

    def __call__(self, model, batch):
        fails, self.fails = self.fails, False
        losses = super().__call__(model, batch)
        self.fails = fails
        return losses * torch.nan if fails else losses


class FailingSet(TensorDataset):
    """A copy of the data set; one process cannot read some of its examples."""

    fails = False

    def __getitem__(self, index):
        if self.fails and index > 20:
            raise OSError("no such file")
        return super().__getitem__(index)


def failing(rank):
    """Return the errors that one process has, on both, and then a whole run."""
    alone = rank == 1
    data = FailingSet(*examples(26).tensors)
    data.fails = alone
    retain = DataLoader(data, batch_size=4)
    held = [(torch.randn(2, 5), torch.tensor([0, CLASSES if alone else 1]))]  # a label out of range
    return {
        "network": error_of(lambda: run(parallel(FailingLater(alone)), rank)),
        "loss": error_of(lambda: run(parallel(with_batchnorm()), rank, loss_fn=FailingLoss(alone))),
        "pairs": error_of(lambda: run(  # between the two forward passes of a step
            parallel(with_batchnorm()), rank, "neggrad+", forget=forgotten()[:2], loss_fn=FailingLoss(alone, 3))),
        "loader": error_of(lambda: run(parallel(with_batchnorm()), rank, retain=retain)),
        "validation": error_of(lambda: EarlyStop(held, 1, None).update(parallel(with_batchnorm()))),
        "validation of FSDP2": error_of(lambda: EarlyStop(held, 1, None).update(fully_shard(network()))),
        "diverged": error_of(lambda: run(parallel(network()), rank, group=False, loss_fn=NanLoss(alone))),
        "diverged together": error_of(lambda: run(parallel(network()), rank, loss_fn=NanLoss(alone))),
    }, unlearned("finetune", rank)  # fmt: skip


FAILING = {
    "network": ("RuntimeError", "ZeroDivisionError: the network (on rank 1)"),
    "loss": ("RuntimeError", "KeyError: 'labels' (on rank 1)"),
    "pairs": ("RuntimeError", "KeyError: 'labels' (on rank 1)"),
    "loader": ("RuntimeError", "OSError: no such file (on rank 1)"),
    "validation": ("InputError", "expected labels in [0, 3)"),
    "validation of FSDP2": ("InputError", "expected labels in [0, 3)"),
    "diverged": ("Diverged", "the loss of epoch"),
    "diverged together": ("Diverged", "the loss of epoch"),
}
