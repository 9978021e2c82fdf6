"""Unlearning by several processes, under DDP and FSDP2: a step is the mean of W steps of one process."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

import delfast
from delfast.optim import MaskedSGD
from delfast.unlearning import METHODS, EarlyStop, make_method, train
from delfast.unlearning.api import full_mask
from delfast.unlearning.data_parallel import averaging_processes
from delfast.unlearning.method import UnlearningTask
from delfast.unlearning.shared_steps import SharedSteps
from delfast.unlearning.steps import Steps
from tests.distributed.spawning import error_of, run_in_processes

EPOCHS, CLASSES = 3, 3
TRAINED = sorted(name for name, method in METHODS.items() if method().epochs)
SETTINGS = {name: {"epochs": EPOCHS, "lr": 0.05} for name in TRAINED}
SETTINGS["scrub"] |= {"max_epochs": 1, "alpha": 0.5}
SETTINGS["neggrad+"] |= {"alpha": 0.8}
SETTINGS["l1-sparse"] |= {"gamma": 1e-2}


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


def parallel(model):
    return DistributedDataParallel(model)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# The methods


def unlearned(name, rank, retain=None, forget=None, model=None, **options):
    """Return the state, the losses and the mask's digest of a run on all processes; by one process without a rank."""
    model = network() if model is None else model
    alone = rank is None
    result = delfast.unlearn(
        model if alone else parallel(model),
        retain=retained(rank or 0) if retain is None else retain,
        forget=forgotten() if forget is None else forget,
        init=network,
        method=name,
        seed=3,
        group=None if alone else dist.group.WORLD,
        **SETTINGS[name] | options,
    )
    return state(model), result.losses, result.mask.digest


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


def expected(name, size, retain=None):
    """Return the state and the losses of one process whose every step is the mean of W steps."""
    model, retain = network(), retained() if retain is None else retain
    method = make_method(name, SETTINGS[name])
    mask = narrow = full_mask(model)
    if method.localizes:
        narrow = delfast.localize(model, forgotten())
        mask = narrow.widen(["4.weight", "4.bias"], {"4.weight": (CLASSES, 6), "4.bias": (CLASSES,)})
    task = UnlearningTask(
        model, model, retain, forgotten(), narrow, network, 3, teacher=copy.deepcopy(model).eval(), classes=CLASSES
    )
    steps = Steps(method.step_plan, retain=retain, forget=forgotten(), forget_epochs=method.forget_epochs)
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


def few(rank):
    """One batch: all processes but the first have none."""
    return [tuple(examples(4).tensors)]


def sampled(rank, count, size=24, *, drop_last=False, **order):
    data = examples(size)
    sampler = DistributedSampler(data, count, rank, **{"shuffle": False} | order)
    return DataLoader(data, batch_size=4, sampler=sampler, drop_last=drop_last)


def of_few(rank):
    return unlearned("finetune", rank, retain=few(rank))


def of_sampler(rank):
    return unlearned("finetune", rank, retain=sampled(rank, dist.get_world_size()))


def of_padded(rank):
    """Return the losses of shares with repeats at the end, in another order in each epoch, and with omissions."""
    count = dist.get_world_size()
    orders = [{"size": 23}, {"size": 23, "shuffle": True, "seed": 4}, {"size": 31, "drop_last": True, "shuffle": True}]
    return [unlearned("finetune", rank, retain=sampled(rank, count, **order))[1] for order in orders]


def of_batchnorm(rank):
    """Return the state, whose running statistics are the first process's."""
    return unlearned("finetune", rank, model=with_batchnorm())[0]


# FSDP2


SHARDED = ("del", "finetune", "gradient-ascent", "neggrad+", "relabel")


def gathered(model):
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }


def sharded(name, rank):
    """Return what ``unlearned`` returns, of FSDP2, and of HSDP with four processes; the state gathered."""
    count = dist.get_world_size()
    mesh = init_device_mesh("cpu", (count,))
    if count == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = network()
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
    result = delfast.unlearn(
        model, retain=retained(rank), forget=forgotten(), init=network, method=name, seed=3, group=dist.group.WORLD,
        **SETTINGS[name],
    )  # fmt: skip
    begun, ended = network().state_dict(), gathered(model)
    for key, part in result.mask.parameters.items():
        assert not (begun[key] != ended[key])[~part.dense()].any(), key
    return ended, result.losses, result.mask.digest


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


# Refused


def run(model, rank, method="finetune", *, group=True, **options):
    options = {"retain": retained(rank), "forget": forgotten(), "init": network, "epochs": 1, "lr": 0.1} | options
    if method in ("influence", "ssd"):
        options.pop("epochs"), options.pop("lr")
    return delfast.unlearn(model, method=method, group=dist.group.WORLD if group else None, **options)


def own(rank, seed=0):
    """A share that no attribute shows."""
    count = dist.get_world_size()
    return DataLoader(Subset(examples(24, seed), range(rank, 24, count)), batch_size=4)


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
    found["one-shot shares"] = error_of(
        lambda: run(
            parallel(network()), rank, "ssd", group=False, retain=own(rank), forget=own(rank, seed=5), alpha=1.0
        )
    )
    found["init"] = error_of(
        lambda: run(parallel(network()), rank, "del", group=False, init=lambda: scaled(network(), 1 + rank))
    )
    return found


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
    """The same data set; one process cannot read some examples."""

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


# Early stopping and checkpoints


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


def checkpoints(folder, rank):
    """Return the results of an uninterrupted run, and of one that is interrupted after an epoch and resumed."""
    whole = unlearned("relabel", rank)
    path = folder / f"checkpoint-{rank}.pt"

    def interrupting(batches, description, total):
        if description.startswith("epoch 2"):
            raise ZeroDivisionError
        return batches

    options = {"checkpoint": path, "resume": True}
    stopped = error_of(lambda: unlearned(
        "relabel", rank, training=delfast.TrainingOptions(progress=interrupting), **options))  # fmt: skip
    assert stopped is not None and "ZeroDivisionError" in stopped[1]
    resumed = unlearned("relabel", rank, **options)
    one_file = error_of(lambda: unlearned("relabel", rank, checkpoint=folder / "one.pt"))
    if rank:
        path.unlink()
    missing = error_of(lambda: unlearned("relabel", rank, **options))
    return whole, resumed, one_file, missing


def two_dimensions(rank):
    """Return the error of FSDP2 within tensor parallelism."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(network(), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return error_of(lambda: delfast.unlearn(model, retain=retained(), method="finetune", group=mesh["dp"]))


@pytest.mark.slow
def test_four_processes_on_a_mesh_of_two_dimensions(tmp_path):
    scenarios = {name: functools.partial(sharded, name) for name in ("del", "neggrad+")}
    results = run_in_processes(4, {**scenarios, "tensor": two_dimensions}, tmp_path)
    for name in scenarios:
        same_as([result[name] for result in results], expected(name, 4), name)
    for result in results:
        assert result["tensor"][0] == "InputError" and "tensor parallelism" in result["tensor"][1], result["tensor"]


@pytest.mark.parametrize("count", [2, 3])
def test_processes(count, tmp_path):
    scenarios = {name: functools.partial(unlearned, name) for name in TRAINED}
    scenarios |= {
        "few": of_few,
        "sampled": of_sampler,
        "padded": of_padded,
        "batchnorm": of_batchnorm,
        "stopping": stopping,
    }
    scenarios |= {f"fsdp {name}": functools.partial(sharded, name) for name in SHARDED}
    scenarios["fsdp buffers"] = sharded_buffers
    if count == 2:
        scenarios["fsdp refused"] = sharded_refused
        scenarios |= {"refused": refused, "failing": failing, "resumed": functools.partial(checkpoints, tmp_path)}
    results = run_in_processes(count, scenarios, tmp_path)

    def all_ranks(name):
        return [result[name] for result in results]

    for name in TRAINED:
        reference = expected(name, count)
        same_as(all_ranks(name), reference, name)
        if name in SHARDED:
            same_as(all_ranks(f"fsdp {name}"), reference, f"fsdp {name}")
    same_as(all_ranks("few"), expected("finetune", count, few(0)), "few")
    together = DataLoader(examples(24), batch_size=4 * count)
    same_as(all_ranks("sampled"), expected("finetune", 1, together), "sampled")
    assert all(found == all_ranks("padded")[0] for found in all_ranks("padded"))
    for scenario in ("batchnorm", "fsdp buffers"):
        first, *others = all_ranks(scenario)
        assert all(torch.equal(first[name], other[name]) for other in others for name in first), scenario
    check_stopping(all_ranks("stopping"))
    if count != 2:
        return
    for found in all_ranks("refused"):
        for name, (kind, text) in REFUSED.items():
            assert found[name] is not None and found[name][0] == kind and text in found[name][1], (name, found[name])
    for found in all_ranks("fsdp refused"):
        for name, text in SHARDED_REFUSED.items():
            assert found[name] is not None and found[name][0] == "InputError" and text in found[name][1], (
                name, found[name]
            )  # fmt: skip
    for found, after in all_ranks("failing"):
        for name, (kind, text) in FAILING.items():
            assert found[name] is not None and found[name][0] == kind and text in found[name][1], (name, found[name])
        same_as([after], expected("finetune", count), "after errors")
    for whole, resumed, one_file, missing in all_ranks("resumed"):
        assert resumed[1:] == whole[1:] and all(torch.equal(resumed[0][name], whole[0][name]) for name in whole[0])
        assert "expected a checkpoint file for each process" in one_file[1]
        assert "expected checkpoints of as many epochs on every process" in missing[1]


def same_as(found, reference, what):
    """Every process has the same state, to the bit, and the state and losses of the reference."""
    weights, losses, digest = reference
    for own_weights, own_losses, own_digest in found:
        assert own_digest == digest, what
        assert all(torch.equal(value, found[0][0][name]) for name, value in own_weights.items()), what
        torch.testing.assert_close(own_weights, weights, rtol=2e-4, atol=2e-6, msg=lambda m: f"{what}: {m}")
        assert own_losses == found[0][1] == pytest.approx(losses, rel=1e-4), what


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
