"""Memory of the finetune beside that in plain PyTorch (``naive``): the process's peak, and the optimizer's state."""

from __future__ import annotations

import copy
import statistics
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

import delfast
from benchmarks import naive
from benchmarks.conftest import Versus
from benchmarks.job import FORGET, LAYOUT, MODELS, TRAIN, batches, data, part
from benchmarks.memory import added_peak, print_added_peak
from delfast.experiments.networks import factory

BUDGET, LR = 0.3, 0.02
PROCESSES = 3  # of each side: where an allocator puts things moves a peak by a tenth


def finetune_once(name: str, side: str, examples: int) -> None:
    """Run one epoch of finetuning, as this side does it."""
    train_set, _, mean, std = data()
    torch.manual_seed(0)
    model = factory(name, 10, 3, 32)()
    some = part(train_set, slice(examples))
    if side == "naive":
        sets = {"retain": naive.dataset(some, mean, std)}
        mask = naive.localize(model, sets["retain"], BUDGET)
        naive.finetune(model, mask, sets, 1, LR)
    else:
        model = model.to(memory_format=LAYOUT[name])
        mask = delfast.localize(model, batches(some), BUDGET)
        delfast.unlearn(model, retain=batches(some), mask=mask, init=copy.deepcopy(model), epochs=1, lr=LR)


def print_peak(name: str, side: str) -> None:
    data()
    print_added_peak(partial(finetune_once, name, side, 4), partial(finetune_once, name, side, TRAIN - FORGET))


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak from /proc")
@pytest.mark.parametrize("name", MODELS)
def test_peak_memory_of_the_finetune(name: str, versus: Versus) -> None:
    found: dict[str, list[float]] = {"ours": [], "naive": []}

    def processes() -> None:
        for _ in range(PROCESSES):
            for side, peaks in found.items():
                peaks.append(added_peak("benchmarks.test_memory", name, side) / 2**20)

    versus.benchmark.pedantic(processes, rounds=1)
    ours, theirs = map(statistics.median, found.values())
    spread = ", ".join(f"{side} {min(peaks):.0f} to {max(peaks):.0f} MiB" for side, peaks in found.items())
    versus.report(f"{ours / theirs:.2f} x the naive loop's, of {PROCESSES} processes each ({spread})", "<= 0.9 x")


@pytest.mark.parametrize("name", MODELS)
def test_optimizer_state(name: str, versus: Versus) -> None:
    torch.manual_seed(0)
    model = factory(name, 10, 3, 32)()
    images, targets = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    mask = delfast.localize(model, [(images, targets)], BUDGET)

    def state(compact: bool) -> int:
        network = copy.deepcopy(model)
        with delfast.compact(network, mask) if compact else nullcontext():
            optimizer = torch.optim.SGD((p for p in network.parameters() if p.requires_grad), lr=1e-4, momentum=0.9)
            cross_entropy(network(images), targets).backward()
            optimizer.step()
        return sum(held["momentum_buffer"].numel() for held in optimizer.state.values())

    ours, theirs = versus.once(lambda: state(True), lambda: state(False))
    versus.report(f"{ours / theirs:.3f} x dense", "<= 0.35 x")
