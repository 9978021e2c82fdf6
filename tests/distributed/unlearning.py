"""Networks, sets and the run of one process for the tests of unlearning by several processes."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

import delfast
from delfast.optim import MaskedSGD
from delfast.unlearning import METHODS, make_method, train
from delfast.unlearning.api import full_mask
from delfast.unlearning.method import UnlearningTask
from delfast.unlearning.steps import Steps

EPOCHS, CLASSES, TOKENS = 3, 3, 11
TRAINED = sorted(name for name, method in METHODS.items() if method().epochs)
SETTINGS = {name: {"epochs": EPOCHS, "lr": 0.05} for name in TRAINED}
SETTINGS["scrub"] |= {"max_epochs": 1, "alpha": 0.5}
SETTINGS["neggrad+"] |= {"alpha": 0.8}
SETTINGS["l1-sparse"] |= {"gamma": 1e-2}
SHARDED = ("del", "finetune", "gradient-ascent", "neggrad+", "relabel")  # those for FSDP2


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def with_batchnorm():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


def examples(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 5, generator=generator)
    return TensorDataset(inputs, torch.randint(0, CLASSES, (count,), generator=generator))


def retained(rank=0):
    """A shuffled loader of 7 batches, the last of 2 examples; each process has seeded it differently."""
    generator = torch.Generator().manual_seed(7 + rank)
    return DataLoader(examples(26), batch_size=4, shuffle=True, generator=generator)


def forgotten():
    """A list of 3 batches, the last of 1 example."""
    return list(DataLoader(examples(9, seed=1), batch_size=4))


def few(rank):
    """One batch: all processes but the first have none."""
    return [tuple(examples(4).tensors)]


def sampled(rank, count, size=24, *, drop_last=False, **order):
    data = examples(size)
    sampler = DistributedSampler(data, count, rank, **{"shuffle": False} | order)
    return DataLoader(data, batch_size=4, sampler=sampler, drop_last=drop_last)


def own(rank, seed=0):
    """A share that no attribute shows."""
    count = dist.get_world_size()
    return DataLoader(Subset(examples(24, seed), range(rank, 24, count)), batch_size=4)


class Decoder(nn.Module):
    """A language model of single tokens, called by keywords as those of transformers are."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(TOKENS, 6), nn.Linear(6, 8), nn.Linear(8, TOKENS)

    def forward(self, input_ids):
        return self.head(self.mix(self.embed(input_ids)).tanh())


def decoder():
    torch.manual_seed(1)
    return Decoder()


def texts(count, seed, rank=0):
    """A shuffled loader of dicts, in batches of at most 4; labels of another number of tokens count in each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, TOKENS, (count, 5), generator=generator)
    labels = [row.masked_fill(torch.arange(5) > 2 + place % 3, -100) for place, row in enumerate(ids)]
    data = [{"input_ids": row, "labels": of} for row, of in zip(ids, labels, strict=True)]
    return DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(seed + rank))


def parallel(model):
    return DistributedDataParallel(model)


def fully_sharded(model, **options):
    """Apply FSDP2 to a layer and to the network; HSDP with four processes."""
    count = dist.get_world_size()
    mesh = init_device_mesh("cpu", (count,))
    if count == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(list(model.children())[2], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def gathered(model):
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }


# Runs


def unlearned(name, rank, retain=None, forget=None, *, make=network, wrap=parallel, **options):
    """Return the state, the losses and the mask's digest of a run on all processes; by one process without a rank.

    Outside of the mask nothing has changed.
    """
    model, begun = make(), make().state_dict()
    alone = rank is None
    result = delfast.unlearn(
        model if alone else wrap(model),
        retain=retained(rank or 0) if retain is None else retain,
        forget=forgotten() if forget is None else forget,
        init=make,
        method=name,
        seed=3,
        group=None if alone else dist.group.WORLD,
        **SETTINGS[name] | options,
    )
    ended = gathered(model)
    for key, part in result.mask.parameters.items():
        assert torch.equal(begun[key][~part.dense()], ended[key][~part.dense()]), key
    return ended, result.losses, result.mask.digest


def run(model, rank, method="finetune", *, group=True, **options):
    options = {"retain": retained(rank), "forget": forgotten(), "init": network, "epochs": 1, "lr": 0.1} | options
    if method in ("influence", "ssd"):
        options.pop("epochs"), options.pop("lr")
    return delfast.unlearn(model, method=method, group=dist.group.WORLD if group else None, **options)


class Grouped:
    """The steps of one process, W at a time."""

    def __init__(self, steps, size):
        self.steps, self.size = steps, size

    def set_epoch(self, epoch):
        self.steps.set_epoch(epoch)

    def __len__(self):
        return -(-len(self.steps) // self.size)

    def __iter__(self):
        group = []
        for step in self.steps:
            group.append(step)
            if len(group) == self.size:
                yield group
                group = []
        if group:
            yield group


def expected(name, size, retain=None, forget=None, *, make=network, head="4", loss_fn=None):
    """Return the state and the losses of one process whose every step is the mean of W steps."""
    model, retain = make(), retained() if retain is None else retain
    forget = forgotten() if forget is None else forget
    method = make_method(name, SETTINGS[name])
    mask = narrow = full_mask(model)
    if method.localizes:
        narrow = delfast.localize(model, forget, loss_fn=loss_fn)
        heads = {key: p.shape for key, p in model.named_parameters() if key.startswith(f"{head}.")}
        mask = narrow.widen(list(heads), heads)
    task = UnlearningTask(
        model, model, retain, forget, narrow, make, 3, loss_fn, copy.deepcopy(model).eval(), classes=CLASSES
    )
    steps = Steps(method.step_plan, retain=retain, forget=forget, forget_epochs=method.forget_epochs)
    steps.values = functools.partial(method.values, task)
    task.mask = mask if method.localizes else narrow
    seen = []

    def loss(_, group):
        losses = torch.stack([method.loss(task, step) for step in group])
        seen.extend((group[0]["epoch"], float(each)) for each in losses.detach())
        return losses.mean().reshape(1)

    task.mask = narrow
    method.prepare(task)
    optimizer = MaskedSGD(model.named_parameters(), mask, lr=method.lr, momentum=method.momentum)
    train(model, Grouped(steps, size), optimizer, epochs=EPOCHS, schedule=method.schedule, loss_fn=loss)
    means = [[value for epoch, value in seen if epoch == number] for number in range(EPOCHS)]
    return state(model), [sum(values) / len(values) for values in means], mask.digest


def same_as(found, reference, what, rtol=2e-4):
    """Every process has the same state, to the bit, and the state and losses of the reference."""
    weights, losses, digest = reference
    for own_weights, own_losses, own_digest in found:
        assert own_digest == digest, what
        assert all(torch.equal(value, found[0][0][name]) for name, value in own_weights.items()), what
        torch.testing.assert_close(own_weights, weights, rtol=rtol, atol=rtol / 100, msg=lambda m: f"{what}: {m}")
        assert own_losses == found[0][1] == pytest.approx(losses, rel=rtol / 2), what
