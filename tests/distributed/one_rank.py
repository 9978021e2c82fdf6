"""Faults of one of two processes: each scenario returns the errors of both, or what must be the same on both.

Their tests run them in the processes that those start anyway.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import threading

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, TensorDataset

import delfast
from delfast.evaluation import accuracy_and_loss, predictions
from delfast.optim import MaskedSGD
from delfast.processes import Processes
from delfast.sole_use import sole_use
from delfast.unlearning.shared_steps import SharedSteps
from tests.distributed.spawning import error_of

WIDTH, CLASSES = 6, 3


def network(batchnorm=False):
    torch.manual_seed(0)
    norm = [nn.BatchNorm1d(16)] if batchnorm else []
    return nn.Sequential(nn.Linear(WIDTH, 16), *norm, nn.ReLU(), nn.Linear(16, CLASSES))


def examples(count=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, WIDTH, generator=generator), torch.arange(count) % CLASSES)


def batches(count=24):
    return list(DataLoader(examples(count), batch_size=4))


class Failing:
    """Batches; one batch cannot be read."""

    def __init__(self, count, at):
        self.batches, self.at = batches(count), at

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for place, batch in enumerate(self.batches):
            if place == self.at:
                raise OSError("broken disk")
            yield batch


def losses_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def labels_missing(model, batch):
    raise KeyError("labels")


labels_missing.__qualname__ = losses_of.__qualname__  # so that the processes make the same call


# Errors of one process in unlearn


def unlearned(model, group, **options):
    options = {"retain": batches(), "init": network, "seed": 1, "epochs": 1} | options
    return delfast.unlearn(model, group=group, **options)


def broken_unlearn(folder, rank):
    """Return the errors of ``unlearn`` under DDP and FSDP2."""
    world, mesh = dist.group.WORLD, init_device_mesh("cpu", (2,))
    forget = batches(8)
    mask = delfast.localize(network(), forget)
    paths = [folder / f"{place}" for place in range(2)]
    paths[0].mkdir(exist_ok=True)

    def ddp():
        return DistributedDataParallel(network())

    def fsdp():
        return fully_shard(network(), mesh=mesh)

    def progress(steps, description, total):
        yield from steps
        if rank:
            raise ValueError("progress bar")

    mine = network if rank == 0 else None
    own = {"retain": Failing(24, 0 if rank else None), "forget": forget}
    at_end = {"mask": mask, "retain": Failing(16, None if rank else 3)}
    bar = {"method": "finetune", "training": delfast.TrainingOptions(progress=progress)}
    loss = {"method": "finetune", "loss_fn": labels_missing if rank else losses_of}
    file = {"forget": forget, "checkpoint": paths[rank] / "file.pt"}
    return {
        "loader": error_of(lambda: unlearned(ddp(), world, **own)),
        "init": error_of(lambda: unlearned(ddp(), world, forget=forget, init=mine)),
        "batch of no use here": error_of(lambda: unlearned(ddp(), world, **at_end)),
        "after the last step": error_of(lambda: unlearned(ddp(), world, **bar)),
        "folder": error_of(lambda: unlearned(ddp(), world, **file)),
        "folder, own sets": error_of(lambda: unlearned(ddp(), None, **file)),
        "sharded loader": error_of(lambda: unlearned(fsdp(), mesh, **own)),
        "sharded init": error_of(lambda: unlearned(fsdp(), mesh, forget=forget, init=mine)),
        "sharded loss": error_of(lambda: unlearned(fsdp(), mesh, **loss)),
        "keyword": error_of(lambda: unlearned(ddp(), world, **({"speed": 1} if rank else {}), method="finetune")),
        "works": unlearned(fsdp(), mesh, forget=forget).losses == unlearned(fsdp(), mesh, forget=forget).losses,
    }  # fmt: skip


BROKEN_UNLEARN = {
    "loader": "OSError: broken disk (on rank 1)",
    "init": "expected init= for 'del', got none; pass a function that returns a newly initialized network (on rank 1)",
    "batch of no use here": "OSError: broken disk (on rank 0)",
    "after the last step": "ValueError: progress bar (on rank 1)",
    "folder": "expected the directory of checkpoint",
    "folder, own sets": "expected the directory of checkpoint",
    "sharded loader": "OSError: broken disk (on rank 1)",
    "sharded init": "got none; pass a function that returns a newly initialized network (on rank 1)",
    "sharded loss": "KeyError: 'labels' (on rank 1)",
    "keyword": "unlearn has no parameter 'speed'",
}


# Errors of one process elsewhere, and differences between processes


class WithBuffer(nn.Module):
    def __init__(self, buffer):
        super().__init__()
        self.inner = network()
        self.register_buffer("buffer", buffer)

    def forward(self, inputs):
        return self.inner(inputs) * self.buffer.sum()


class OwnShare(Dataset):
    """The files of this node: a share of the set that no attribute shows."""

    def __init__(self, rank):
        self.examples = Subset(examples(), range(rank, 24, 2))

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


def flipped(model):
    """Reverse a layer's rows, which keeps the sum of all bits."""
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias):
            parameter.copy_(parameter.flip(0))
    return model


def normalized():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    return parallelize_module(model, init_device_mesh("cpu", (2,)), {"2": ColwiseParallel(), "4": RowwiseParallel()})


def with_own_norm(rank):
    model = normalized()
    with torch.no_grad():
        model[1].weight.mul_(1 + rank)
    return model


def long_text(model, batch):
    raise ValueError("é" * 5000)


def file_of_no_encoding(model, batch):
    raise OSError("image\udce9.png")


def scaled_losses(model, batch, scale=1.0):
    return losses_of(model, batch) * scale


long_text.__qualname__ = file_of_no_encoding.__qualname__ = losses_of.__qualname__


def in_autocast(rank, function):
    with torch.autocast("cpu", torch.bfloat16) if rank else contextlib.nullcontext():
        return function()


@contextlib.contextmanager
def held_elsewhere(model, rank):
    """Let another thread of one process use the model."""
    ready, done = threading.Event(), threading.Event()

    def hold():
        with sole_use(model):
            ready.set()
            done.wait()

    thread = threading.Thread(target=hold)
    if rank:
        thread.start()
        ready.wait()
    try:
        yield model
    finally:
        done.set()
        if rank:
            thread.join()


def localized_while_held(model, group, rank):
    with held_elsewhere(model, rank):
        return delfast.localize(model, batches(), group=group)


def own_seed(rank):
    data = examples()
    return DataLoader(data, batch_size=4, sampler=DistributedSampler(data, seed=rank))


def synchronized():
    """Check steps of two sets, 12 and 4 batches; the last epochs use 11 batches."""
    model = nn.Sequential(nn.Linear(WIDTH, 4), nn.SyncBatchNorm(4))
    processes = Processes(dist.group.WORLD, dict(model.named_parameters()))
    sets = {"retain": batches(44), "forget": batches(4)}
    SharedSteps("forget first", processes, **sets, forget_epochs=1).check(model)


def broken_calls(rank):
    """Return the errors of calls that differ between the processes, or fail on one."""
    world, mesh = dist.group.WORLD, init_device_mesh("cpu", (2,))
    model, ddp = network(), DistributedDataParallel(network())
    sets = (batches(8), batches(8), batches(8))
    own = DataLoader(OwnShare(rank), batch_size=4)
    mask, sharded = delfast.localize(model, batches()), fully_shard(network(), mesh=mesh)
    parts = delfast.score(sharded, criterion="weight", group=mesh)
    loss = functools.partial(scaled_losses, scale=1.0 + rank)
    mine, ours = (long_text if rank else losses_of), (None if rank else batches())
    return {
        "long": error_of(lambda: delfast.localize(model, batches(), loss_fn=mine, group=world)),
        "encoding": error_of(lambda: delfast.localize(
            model, batches(), loss_fn=file_of_no_encoding if rank else losses_of, group=world)),
        "no batch": error_of(lambda: delfast.score(sharded, [None, *batches()][rank:], group=mesh)),
        "no batch, measured": error_of(lambda: accuracy_and_loss(sharded, [*batches(), None], group=mesh)),
        "rate": error_of(lambda: MaskedSGD(sharded.named_parameters(), mask, lr=-0.1 if rank else 0.1)),
        "no mask": error_of(lambda: MaskedSGD(sharded.named_parameters(), None if rank else mask)),
        "none": error_of(lambda: MaskedSGD([*sharded.named_parameters(), ("x", None)], mask)),
        "argument": error_of(lambda: delfast.score(model, ours, group=world)),
        "budget": error_of(lambda: delfast.localize(model, batches(), 2.0 if rank else 0.3, group=world)),
        "evaluate": error_of(lambda: delfast.evaluate(model, ours, *sets[1:], mia=False, group=world)),
        "predictions": error_of(lambda: predictions(model, ours, group=world)),
        "held": error_of(lambda: localized_while_held(network(batchnorm=True), world, rank)),
        "own share": error_of(lambda: delfast.score(model, own, group=world)),
        "own share, measured": error_of(lambda: accuracy_and_loss(model, own, group=world)),
        "own share, trained": error_of(
            lambda: delfast.unlearn(ddp, retain=own, method="finetune", epochs=1, group=world)),
        "own seed, trained": error_of(
            lambda: delfast.unlearn(ddp, retain=own_seed(rank), method="finetune", epochs=1, group=world)),
        "reset": error_of(lambda: delfast.reset_(ddp, mask, "reset_parameters", seed=rank)),
        "order": error_of(lambda: accuracy_and_loss(flipped(network()) if rank else network(), batches(), group=world)),
        "buffer": error_of(lambda: delfast.score(WithBuffer(torch.ones(4 + 4 * rank)), batches(), group=world)),
        "fewer": error_of(lambda: delfast.score(WithBuffer(torch.ones(8 - 4 * rank)), batches(), group=world)),
        "tensor parallelism": error_of(lambda: delfast.score(with_own_norm(rank), batches())),
        "autocast": error_of(lambda: in_autocast(rank, lambda: delfast.localize(model, batches(), group=world))),
        "autocast, measured": error_of(
            lambda: in_autocast(rank, lambda: accuracy_and_loss(model, batches(), group=world))),
        "loss": error_of(lambda: delfast.localize(model, batches(), loss_fn=loss, group=world)),
        "synchronized": error_of(synchronized),
        "selection": error_of(lambda: parts.select(2.0 if rank else 0.3)),
        "aggregate": error_of(lambda: parts.channel_scores("median" if rank else "max")),
        "sharded": error_of(lambda: delfast.score(fully_shard(network(), mesh=mesh), ours, group=mesh)),
    }  # fmt: skip


BROKEN_CALLS = {
    "long": "é (on rank 1)",
    "encoding": r"image\udce9.png (on rank 1)",
    "no batch": "expected the same batches on every process",
    "no batch, measured": "got NoneType",
    "rate": "expected lr >= 0, got -0.1",
    "no mask": "expected mask to be a delfast.Mask",
    "none": "can only optimize Tensors, but one of the params is NoneType",
    "argument": "expected a forget set for criterion 'weighted_grad', got none; pass forget= (on rank 1)",
    "budget": "expected a budget in (0, 1], got 2.0",
    "evaluate": "(on rank 1)",
    "predictions": "(on rank 1)",
    "held": "expected a model that no other thread uses meanwhile",
    "own share": "expected the same data set on every process",
    "own share, measured": "expected the same data set on every process",
    "own share, trained": "expected the same retain set on every process",
    "own seed, trained": "expected each example of the retain set at most once",
    "reset": "expected the same fresh values on every process",
    "order": "expected the same values of '0.weight' on every process",
    "buffer": "expected the same buffers on every process",
    "fewer": "expected the same buffers on every process",
    "tensor parallelism": "expected the same values of '1.weight' on every process",
    "autocast": "expected the same call on every process",
    "autocast, measured": "expected the same call on every process",
    "loss": "expected the same call on every process",
    "synchronized": "for the SyncBatchNorm '1', got 11 steps",
    "selection": "expected a budget in (0, 1], got 2.0",
    "aggregate": "expected aggregate to be",
    "sharded": "expected a forget set for criterion 'weighted_grad', got none; pass forget= (on rank 1)",
}


# Calls that must not be refused


class Contiguous(DistributedSampler):
    """A sampler that gives each process a block of the set."""

    def __iter__(self):
        size = len(self.dataset) // self.num_replicas
        return iter(range(self.rank * size, (self.rank + 1) * size))


class Recorded(Dataset):
    """A set with an attribute by the name of a data set, which is none, or itself."""

    def __init__(self, dataset):
        self.dataset = self if dataset is None else dataset
        self.examples = examples()

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


class Noisy(Recorded):
    """A set that augments by a generator that each process has seeded differently."""

    def __init__(self, rank):
        super().__init__(None)
        self.generator = torch.Generator().manual_seed(rank)

    def __getitem__(self, index):
        inputs, target = self.examples[index]
        return inputs + torch.randn(WIDTH, generator=self.generator), target


def in_inference_mode(model, group):
    with torch.inference_mode():
        return delfast.localize(model, batches(), group=group).digest


def exception_of(fails, group, error):
    """Return the exception of a call whose loss raises an error, the second time; the same error is raised twice."""

    def loss_fn(model, batch):
        if fails:
            raise error
        return losses_of(model, batch)

    loss_fn.__qualname__ = losses_of.__qualname__
    found = []
    for _ in range(2):
        try:
            delfast.localize(network(), batches(), loss_fn=loss_fn, group=group)
        except Exception as raised:
            found.append(raised)
    return found[1]


def alone_then_together(rank):
    """Localize and select on one process, whose next exchange must be the caller's own; return its result."""
    ddp = DistributedDataParallel(network())
    scores = delfast.score(ddp, batches(), group=dist.group.WORLD)
    if rank == 0:
        delfast.localize(ddp, batches())
        scores.select(0.3)
    count = torch.tensor([100])
    dist.all_reduce(count)
    return int(count)


def accepted(rank):
    """Return digests and predictions that are those of one process."""
    world, mesh = dist.group.WORLD, init_device_mesh("cpu", (2,))
    buffers = [torch.arange(8.0).view(4, 2)[:, 0], torch.ones(1, 3).expand(4, 3), torch.ones(())]
    data = examples()
    blocks = DataLoader(data, batch_size=4, sampler=Contiguous(data, shuffle=False))
    noisy = delfast.score(network(), DataLoader(Noisy(rank), batch_size=4), group=world)
    groups = [dist.new_group([each]) for each in range(2)]
    own = [exception_of(rank, world, KeyError("labels")), exception_of(True, groups[rank], KeyError("labels"))]
    return {
        "own types": [type(each) for each in own] == [KeyError if rank else RuntimeError, KeyError],
        "alone": alone_then_together(rank),
        "views": [delfast.localize(WithBuffer(buffer), batches(), group=world).digest for buffer in buffers],
        "inference": in_inference_mode(fully_shard(network(), mesh=mesh), mesh),
        "path": [
            delfast.localize(network(), DataLoader(Recorded(each), batch_size=4), group=world).digest
            for each in (pathlib.Path("set"), None)
        ],
        "blocks": predictions(network(), blocks, group=world)[1],
        "noisy": noisy.examples,
    }


def accepted_by_one():
    buffers = [torch.arange(8.0).view(4, 2)[:, 0], torch.ones(1, 3).expand(4, 3), torch.ones(())]
    digest = delfast.localize(network(), batches()).digest
    return {
        "views": [delfast.localize(WithBuffer(buffer), batches()).digest for buffer in buffers],
        "inference": digest,
        "path": [digest, digest],
        "blocks": examples().tensors[1],
        "noisy": 24,
        "own types": True,
        "alone": 200,
    }


def check_errors(results, expected):
    """Both processes raise each error, the same."""
    first, second = results
    for name, text in expected.items():
        assert first[name] is not None and text in first[name][1], (name, first[name])
        assert first[name] == second[name], (name, first[name], second[name])


# As a theme of the localization's tests


def scenarios(count):
    return {"calls": broken_calls, "accepted": accepted} if count == 2 else {}


def check(count, all_ranks):
    if count != 2:
        return
    check_errors(all_ranks("calls"), BROKEN_CALLS)
    alone = accepted_by_one()
    for found in all_ranks("accepted"):
        assert torch.equal(found.pop("blocks"), alone["blocks"])
        assert found.items() <= alone.items()
