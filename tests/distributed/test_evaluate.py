"""Evaluation by several processes returns what one process returns, on every layout.

The layers that tensor parallelism splits have small integers, so that sums over processes are exact in any order.
"""

from __future__ import annotations

import functools
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import delfast
from delfast.evaluation import accuracy_and_loss, kl_to_oracle, predictions
from delfast.sharding import is_dtensor
from tests.distributed.spawning import error_of, run_in_processes

FEATURES, HIDDEN, OUTPUTS, CLASSES, WORDS = 6, 10, 7, 3, 11


class Network(nn.Module):
    """Rows that two and three processes do not divide, and buffers."""

    def __init__(self, seed):
        super().__init__()
        self.up = nn.Linear(FEATURES, HIDDEN)
        self.down = nn.Linear(HIDDEN, OUTPUTS)
        self.norm = nn.BatchNorm1d(OUTPUTS)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(OUTPUTS, CLASSES)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (*self.up.parameters(), *self.down.parameters()):
                parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=generator))
            for parameter in self.head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
            self.norm.running_mean.copy_(torch.randn(OUTPUTS, generator=generator))
            self.norm.running_var.fill_(30)

    def forward(self, inputs):
        return self.head(self.drop(self.norm(self.down(self.up(inputs).relu()))))


class Bigrams(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.table = nn.Embedding(WORDS, WORDS)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(seed)))

    def forward(self, input_ids, attention_mask=None):
        return self.table(input_ids)


# Layouts: each returns (model, group) for a network


def alone(model):
    return model, None


def ddp(model):
    return DistributedDataParallel(model), dist.group.WORLD


def fsdp(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, child in model.named_children():
        if name == "up":
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh), mesh


def tensor_parallel(model):
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan), None


def with_split_outputs(model):
    """A head whose outputs are DTensors."""
    plan = {"head" if isinstance(model, Network) else "table": ColwiseParallel(use_local_output=False)}
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan), None


# Sets


def examples(count, seed=5):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(-2, 3, (count, FEATURES), generator=generator).float()
    return TensorDataset(inputs, torch.randint(CLASSES, (count,), generator=generator))


def batches(count, size=8, seed=5):
    return DataLoader(examples(count, seed), batch_size=size)


def texts(count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (count, 9), generator=generator)
    attended = (torch.arange(9) < torch.randint(2, 10, (count, 1), generator=generator)).long()
    data = [{"input_ids": a, "attention_mask": b} for a, b in zip(ids, attended, strict=True)]
    return DataLoader(data, batch_size=size)


# Results


def measured(layout, rank=None):
    """Return everything that is measured; sets of 101 examples, of fewer batches than processes, and of equal shares.

    The model is left as it was.
    """
    model, group = layout(Network(3))
    metrics = delfast.evaluate(model, batches(5, seed=1), batches(101), batches(24, 4, seed=2), group=group)
    oracle, _ = layout(Network(4))
    found = {
        "metrics": asdict(metrics),
        "deltas": asdict(
            delfast.evaluate(model, batches(5), batches(9), batches(24), oracle=metrics, mia=False, group=group)
        ),
        "set": accuracy_and_loss(model, batches(101), group=group),
        "predictions": predictions(model, batches(101), group=group),
        "divergence": kl_to_oracle(model, oracle, batches(101), group=group),
        "few": kl_to_oracle(model, oracle, batches(5), group=group),
    }
    assert model.training and all(module.training for module in model.modules())
    if layout is fsdp:
        assert all(map(is_dtensor, model.parameters()))
    return found


def of_texts(layout, rank=None):
    model, group = layout(Bigrams(0))
    return {
        "metrics": asdict(delfast.evaluate(model, texts(3, 4, 1), texts(101, 8, 2), texts(23, 3, 3), group=group)),
        "set": accuracy_and_loss(model, texts(101, 8, 2), group=group),
    }


measured_alone = functools.cache(functools.partial(measured, alone))
texts_alone = functools.cache(functools.partial(of_texts, alone))


def is_same(found, expected):
    """Return whether two results are equal to the bit."""
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(is_same(found[key], expected[key]) for key in expected)
    if isinstance(expected, tuple):
        return len(found) == len(expected) and all(map(is_same, found, expected))
    return is_same(vars(found), vars(expected)) if hasattr(expected, "confidences") else found == expected


def of_outputs(layout, rank=None):
    """Return the losses and the masks of a classifier, and of a language model."""
    (model, _), (texted, _) = layout(Network(3)), layout(Bigrams(0))
    masks = (
        delfast.localize(model, batches(23)),
        delfast.localize(texted, texts(23, 3, 3), loss_fn=delfast.causal_lm_loss),
    )
    losses = accuracy_and_loss(model, batches(23)).loss, accuracy_and_loss(texted, texts(23, 3, 3)).loss
    return losses, [mask.digest for mask in masks]


# Loaders of 101 examples


def listed(rank, count):
    return list(batches(101))


def sampled(rank, count, **options):
    data = examples(101)
    return DataLoader(data, batch_size=7, sampler=DistributedSampler(data, count, rank, shuffle=False, **options))


def of_accelerate(rank, count, **options):
    shard = pytest.importorskip("accelerate.data_loader").BatchSamplerShard
    return DataLoader(examples(101), batch_sampler=shard(batches(101).batch_sampler, count, rank, **options))


def uneven(rank, count):
    return of_accelerate(rank, count, even_batches=False)


def loaded(loader_of, layout, rank):
    model, group = layout(Network(3))
    return accuracy_and_loss(model, loader_of(rank, dist.get_world_size()), group=group)


def shuffled(rank):
    """Return the accuracy of a loader whose order each process draws itself."""
    model, group = ddp(Network(3))
    loader = DataLoader(examples(101), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(rank))
    result = accuracy_and_loss(model, loader, group=group)
    return result.accuracy, result.confidences


# Errors


class Failing(TensorDataset):
    """A copy of the data set with one example that cannot be read in this process, or is of another form."""

    def __init__(self, example):
        super().__init__(*examples(23).tensors)
        self.example = example

    def __getitem__(self, index):
        if index != 11:  # in the fourth batch: rank 1's of two processes
            return super().__getitem__(index)
        if self.example is None:
            raise OSError("no such file")
        return self.example


Failing.__qualname__ = "TensorDataset"


def as_tokens(items):
    """Collate examples; in place of a batch with an example of another form, return that example."""
    odd = [item for item in items if not isinstance(item, tuple)]
    return odd[0] if odd else torch.utils.data.default_collate(items)


ERRORS = {
    "loader": (None, "RuntimeError", "OSError: no such file (on rank 1)"),
    "form": ("text", "InputError", "data set: expected batches (input, target) or (index, input, target), got str"),
    "network": (
        [torch.zeros(2, FEATURES + 1), torch.zeros(2, dtype=torch.int64)], "RuntimeError", "(on rank 1)"
    ),
    "label": (
        [torch.zeros(2, FEATURES), torch.tensor([0, CLASSES])], "InputError", "data set: expected "
    ),
    "nan": (
        [torch.full((2, FEATURES), torch.nan), torch.tensor([0, 0])], "InputError",
        "data set: expected finite outputs of the model, got NaN",
    ),
}  # fmt: skip


def failing(kind, layout, rank):
    """Return the error of a process whose partner fails, and whether the next call is right."""
    model, group = layout(Network(3))
    data = Failing(ERRORS[kind][0]) if rank == 1 else examples(23)
    loader = DataLoader(data, batch_size=3, collate_fn=as_tokens)
    found = error_of(lambda: accuracy_and_loss(model, loader, group=group))
    assert all(module.training for module in model.modules())
    return found, kl_to_oracle(model, layout(Network(4))[0], batches(5), group=group)


def refused(rank):
    count = dist.get_world_size()
    model, group = ddp(Network(3))
    sharded, _ = fsdp(Network(3))
    other = Network(3 + rank)
    divided = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    sets = batches(5), batches(5), batches(5)
    words = torch.arange(WORDS)
    calls = {
        "sampler": lambda: accuracy_and_loss(model, sampled(rank, count)),
        "predictions": lambda: predictions(model, sampled(rank, count)),
        "fsdp without": lambda: accuracy_and_loss(sharded, batches(5)),
        "fsdp evaluate": lambda: delfast.evaluate(sharded, *sets, mia=False),
        "padded": lambda: accuracy_and_loss(model, of_accelerate(rank, count), group=group),
        "dropping": lambda: accuracy_and_loss(model, sampled(rank, count, drop_last=True), group=group),
        "share": lambda: accuracy_and_loss(model, listed(rank, count)[rank::count], group=group),
        "parameters": lambda: accuracy_and_loss(other, batches(5), group=group),
        "oracle": lambda: kl_to_oracle(model, other, batches(5), group=group),
        "arguments": lambda: delfast.evaluate(model, *sets, seed=rank, mia=False, group=group),
        "empty": lambda: accuracy_and_loss(model, [], group=group),
        "empty fsdp": lambda: accuracy_and_loss(sharded, [], group=group),
        "mesh": lambda: accuracy_and_loss(model, batches(5), group=divided),
        "mixed": lambda: accuracy_and_loss(Bigrams(0), [*texts(4, 4, 0), (words, words)], group=group),
    }
    return {name: error_of(call) for name, call in calls.items()}


REFUSED = {
    "sampler": "data set: expected a loader of the whole set, got one whose DistributedSampler yields the share of",
    "predictions": "pass group= so that the processes share the set",
    "fsdp without": "over which fully_shard adds gradients, ranks 0, 1, got none; pass the mesh",
    "fsdp evaluate": "over which fully_shard adds gradients, ranks 0, 1, got none; pass the mesh",
    "padded": "data set: expected the 101 examples of the data set, each once, got",
    "dropping": "data set: expected the 101 examples of the data set, each once, got",
    "share": "data set: expected the same batches on every process",
    "parameters": "expected the same values of 'up.weight' on every process, got others on some",
    "oracle": "expected the same values of 'oracle.up.weight' on every process, got others on some",
    "arguments": "expected the same call on every process",
    "empty": "data set: expected at least one example, got none",
    "empty fsdp": "data set: expected at least one example, got none",
    "mesh": "expected group to be a DeviceMesh of one dimension, got one of 2",
    "mixed": "data set: expected all batches with 'input_ids' or none, got both",
}


# State that a user's training finds afterwards


def own_buffers(rank):
    """Return results of buffers that differ between processes, as after training in DDP; they stay as they were."""
    found = []
    for layout in (ddp, fsdp):
        model, group = layout(Network(3))
        norm = (model.module if layout is ddp else model).norm
        norm.running_mean += rank
        norm.num_batches_tracked += rank
        before = norm.running_mean.clone()
        found.append(accuracy_and_loss(model, batches(101), group=group))
        assert torch.equal(norm.running_mean, before) and int(norm.num_batches_tracked) == rank
    return found


def while_gradients_wait(rank):
    """Evaluate between two backward passes without a reduction, and return the gradients of a later step."""
    found = []
    for evaluates in (False, True):
        model, mesh = fsdp(Network(3))
        inputs, targets = examples(8, seed=rank).tensors
        model.drop.p = 0.0
        for accumulates in (True, False):
            model.set_requires_gradient_sync(not accumulates)
            nn.functional.cross_entropy(model(inputs), targets).backward()
            if accumulates and evaluates:
                accuracy_and_loss(model, batches(5), group=mesh)
        found.append({name: p.grad.to_local().clone() for name, p in model.named_parameters()})
    return all(torch.equal(found[0][name], found[1][name]) for name in found[0])


LAYOUTS = {2: (ddp, fsdp, tensor_parallel), 3: (ddp, fsdp)}
LOADERS = (listed, sampled, uneven)


@pytest.mark.parametrize("count", [2, 3])
def test_processes(count, tmp_path):
    scenarios = {layout.__name__: functools.partial(measured, layout) for layout in LAYOUTS[count]}
    scenarios |= {f"texts {f.__name__}": functools.partial(of_texts, f) for f in (ddp, fsdp)}
    scenarios |= {
        f"{layout.__name__} {f.__name__}": functools.partial(loaded, f, layout)
        for f in LOADERS
        for layout in (ddp, fsdp)
    }
    scenarios["shuffled"] = shuffled
    if count == 2:
        scenarios |= {
            f"{kind}, {layout.__name__}": functools.partial(failing, kind, layout)
            for kind in ERRORS
            for layout in (ddp, fsdp)
        }
        scenarios["outputs"] = functools.partial(of_outputs, with_split_outputs)
        scenarios |= {"refused": refused, "buffers": own_buffers, "waiting": while_gradients_wait}
    results = run_in_processes(count, scenarios, tmp_path)

    def all_ranks(name):
        return [result[name] for result in results]

    for layout in LAYOUTS[count]:
        for found in all_ranks(layout.__name__):
            different = {key for key, value in measured_alone().items() if not is_same(found[key], value)}
            assert not different, (layout, different, found)
    for layout in ("ddp", "fsdp"):
        assert all(is_same(found, texts_alone()) for found in all_ranks(f"texts {layout}")), layout
    one = measured_alone()["set"]
    for layout in ("ddp", "fsdp"):
        for loader_of in LOADERS:
            for found in all_ranks(f"{layout} {loader_of.__name__}"):
                assert found.accuracy == one.accuracy and found.loss == pytest.approx(one.loss, rel=1e-6)
                torch.testing.assert_close(found.confidences, one.confidences)
        assert all(is_same(found, one) for found in all_ranks(f"{layout} listed"))
    for accuracy, confidences in all_ranks("shuffled"):
        assert accuracy == one.accuracy
        torch.testing.assert_close(confidences.sort().values, one.confidences.sort().values)
    if count != 2:
        return
    for kind, (_, error, text) in ERRORS.items():
        for layout in ("ddp", "fsdp"):
            first, second = all_ranks(f"{kind}, {layout}")
            assert first == second
            assert first[0] is not None and first[0][0] == error and text in first[0][1], (kind, layout, first)
            assert first[0][1].count("data set: ") <= 1 and first[0][1].count("on rank 1") == 1
            assert first[1] == measured_alone()["few"]
    for found in all_ranks("refused"):
        for name, text in REFUSED.items():
            assert found[name] is not None and found[name][0] == "InputError" and text in found[name][1], (name, found)
    assert all(is_same(found, one) for both in all_ranks("buffers") for found in both)
    assert all(all_ranks("waiting"))
    for losses, digests in all_ranks("outputs"):
        assert losses == pytest.approx(of_outputs(alone)[0]) and digests == of_outputs(alone)[1]
