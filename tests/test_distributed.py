"""The methods under DistributedDataParallel: two processes, each with its half of the data, end with one network."""

import os
import sys

import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import start_processes

import delfast
from delfast.mask import Mask
from delfast.unlearning import METHODS
from tests.groups import gloo_group

TRAINED = sorted(name for name, method in METHODS.items() if method().epochs)


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def batches(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 1, 6, 6, generator=generator), torch.randint(0, 3, (6,), generator=generator))
        for _ in range(count)
    ]


def half_of_the_rows():
    return Mask.from_dense(
        {
            name: (torch.arange(len(p)) % 2 == 0).reshape(-1, *[1] * (p.ndim - 1)).expand(p.shape)
            for name, p in network().named_parameters()
        }
    )


def unlearn_in_one_of(rank, processes, store, results):
    torch.set_num_threads(1)
    with gloo_group(store, rank, processes):
        for name in TRAINED:
            torch.save(unlearned(name, rank), f"{results}/{name}-{rank}.pt")
        torch.save(trained_compact(rank), f"{results}/compact-{rank}.pt")


def unlearned(name, rank):
    model = network()
    mask = None if name == "retrain" else delfast.localize(model, batches(0, 2), budget=0.3)
    wrapped = nn.parallel.DistributedDataParallel(model)
    delfast.unlearn(
        wrapped, retain=batches(10 + rank, 3), forget=batches(20 + rank, 2), mask=mask, method=name, init=network,
        epochs=2, lr=0.01,
    )  # fmt: skip
    return dict(model.named_parameters())


def trained_compact(rank):
    model = network()
    with delfast.compact(model, half_of_the_rows()) as handle:
        assert handle.modes["0.weight"] == handle.modes["5.weight"] == "rows"
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for inputs, targets in batches(10 + rank, 3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(wrapped(inputs), targets).backward()
            optimizer.step()
    return dict(model.named_parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="gloo by a shared file is tested on Linux")
def test_two_processes_end_with_the_same_network(tmp_path):
    if os.listdir("/sys/class/net") == []:
        pytest.skip("gloo needs a network interface, be it the loopback, and there is none")
    start_processes(unlearn_in_one_of, (2, tmp_path / "store", tmp_path), nprocs=2, start_method="spawn")
    mask = half_of_the_rows()
    for name in (*TRAINED, "compact"):
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
        begun = dict(network().named_parameters())
        assert all(torch.equal(first[key], second[key]) for key in first), name
        assert any(not torch.equal(first[key], begun[key]) for key in first), name
        if name == "compact":
            for key, part in mask.parameters.items():
                changed = first[key] != begun[key]
                assert not changed[~part.dense()].any() and (changed.any() or not part.selected), key
