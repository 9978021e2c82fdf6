"""A whole DEL job - localize, reset, finetune for 2 epochs, evaluate - beside the same in plain PyTorch (``naive``).

The naive job evaluates its three sets after each epoch, 12,000 images in all; ours the test set's 1,000, at the end.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import delfast
from benchmarks import naive
from benchmarks.conftest import Versus
from benchmarks.job import (
    BATCH,
    FORGET,
    LAYOUT,
    MODELS,
    TEST,
    TRAIN,
    batches,
    data,
    forget_set,
    original,
    part,
    precision_of,
    retain_set,
)
from delfast import TrainingOptions
from delfast.compaction import Compact
from delfast.evaluation import accuracy_and_loss
from delfast.experiments.networks import factory

EPOCHS, BUDGET, LR, SEEDS = 2, 0.3, 0.02, 3
MOST = {"fp32": 0.68, "bf16": 0.38}


def naive_job(name: str, seed: int) -> dict[str, float]:
    train_set, test_set, mean, std = data()
    model = copy.deepcopy(original(name)).to(memory_format=torch.contiguous_format)
    torch.manual_seed(seed)
    started = time.perf_counter()
    sets = {"retain": part(train_set, slice(FORGET, None)), "forget": part(train_set, slice(FORGET)), "test": test_set}
    tensors = {key: naive.dataset(images, mean, std) for key, images in sets.items()}
    mask = naive.localize(model, tensors["forget"], BUDGET)
    naive.reset(model, mask, factory(name, 10, 3, 32))
    found = naive.finetune(model, mask, tensors, EPOCHS, LR)
    return {"seconds": time.perf_counter() - started, "accuracy": found["test"]}


def our_job(name: str, seed: int, precision: str) -> dict[str, float]:
    test_set = data()[1]
    model = copy.deepcopy(original(name))
    started = time.perf_counter()
    retain = retain_set(shuffle=True, seed=seed)
    with precision_of(precision):
        mask = delfast.localize(model, forget_set(), BUDGET)
    delfast.unlearn(
        model, retain=retain, mask=mask, init=factory(name, 10, 3, 32), epochs=EPOCHS, lr=LR, seed=seed + 100,
        training=TrainingOptions(precision=precision),  # type: ignore[arg-type]
    )  # fmt: skip
    with precision_of(precision):
        accuracy = accuracy_and_loss(model, batches(test_set, 512)).accuracy
    return {"seconds": time.perf_counter() - started, "accuracy": accuracy}


@pytest.mark.parametrize("name", MODELS)
def test_whole_job(name: str, benchmark: Any) -> None:
    original(name)
    sides: dict[str, Callable[[int], dict[str, float]]] = {
        "naive": partial(naive_job, name),
        "fp32": lambda seed: our_job(name, seed, "fp32"),
        "bf16": lambda seed: our_job(name, seed, "bf16"),
    }
    found = {side: [] for side in sides}  # type: dict[str, list[dict[str, float]]]
    for seed in range(SEEDS):  # by turns
        for side, job in sides.items():
            found[side].append(job(seed))
    seconds = {side: statistics.median(run["seconds"] for run in runs) for side, runs in found.items()}
    accuracy = {side: statistics.mean(run["accuracy"] for run in runs) for side, runs in found.items()}
    benchmark.pedantic(lambda: None, rounds=1)
    text = "; ".join(f"{side} {seconds[side] / seconds['naive']:.2f}, accuracy {accuracy[side]:.1f}" for side in MOST)
    text += f"; naive: {seconds['naive']:.0f} s, accuracy {accuracy['naive']:.1f}"
    target = ", ".join(f"{side} <= {most}" for side, most in MOST.items())
    Versus(benchmark, f"test_whole_job[{name}]").report(text, f"{target}, accuracies within a point")


# ---- where the saving comes from: each cause added to those before it, in seconds of the whole job


def medians(sides: dict[str, Callable[[], Any]], rounds: int = 5) -> dict[str, float]:
    """Return the seconds of each, measured in alternation."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, run in sides.items():
            started = time.perf_counter()
            run()
            if number:  # the first is to warm up
                times[side].append(time.perf_counter() - started)
    return {side: statistics.median(found) for side, found in times.items()}


@pytest.mark.parametrize("name", MODELS)
def test_saving_by_cause(name: str, benchmark: Any) -> None:
    train_set, test_set, mean, std = data()
    steps = EPOCHS * -(-(TRAIN - FORGET) // BATCH)
    model, tensors = original(name), naive.dataset(part(train_set, slice(FORGET, None)), mean, std)
    mask = delfast.localize(model, forget_set(), BUDGET)
    inputs, targets = tensors[:BATCH]
    handles: list[Compact] = []

    def step(layout: Any, precision: str, compact: bool, masked: bool) -> Callable[[], None]:
        network = copy.deepcopy(model).to(memory_format=layout)
        x = inputs.to(memory_format=layout)
        dense_mask = {
            key: torch.empty_like(p).copy_(mask.parameters[key].dense()) for key, p in network.named_parameters()
        }
        if compact:
            handles.append(delfast.compact(network, mask))
        if masked:
            our_mask = handles[-1].mask if compact else mask
            optimizer: Any = delfast.optim.MaskedSGD(network.named_parameters(), our_mask, lr=1e-4, momentum=0.9)
        else:
            optimizer = naive.optimizer_for(network, 1e-4)

        def run() -> None:
            optimizer.zero_grad()
            with precision_of(precision):
                loss = cross_entropy(network(x), targets)
            loss.backward()
            if not masked:
                for key, parameter in network.named_parameters():
                    parameter.grad *= dense_mask[key]
            optimizer.step()

        return run

    contiguous, layout = torch.contiguous_format, LAYOUT[name]
    chain = {
        "naive": step(contiguous, "fp32", False, False),
        "layout": step(layout, "fp32", False, False),
        "optimizer": step(layout, "fp32", False, True),
        "sparse gradient": step(layout, "fp32", True, True),
        "precision": step(layout, "bf16", True, True),
    }
    loaders = [iter(naive.DataLoader(tensors, batch_size=BATCH, shuffle=True)), iter(retain_set(shuffle=True))]
    test = naive.dataset(part(test_set, slice(256)), mean, std)
    plain = copy.deepcopy(model).to(memory_format=contiguous)
    others: dict[str, Callable[[], Any]] = {
        "their batch": lambda: next(loaders[0]),
        "our batch": lambda: next(loaders[1]),
        "evaluation": lambda: naive.accuracy(plain, test),
    }
    found = medians(chain | others)
    benchmark.pedantic(chain["precision"], rounds=1)
    for handle in handles:
        handle.undo()
    saved = {cause: steps * (found[before] - found[cause]) for before, cause in itertools.pairwise(chain)}
    saved["data"] = steps * (found["their batch"] - found["our batch"])
    an_image = found["evaluation"] / len(test)
    saved["evaluation"] = an_image * (EPOCHS * (TRAIN + TEST) - TEST)
    whole = steps * found["naive"] + an_image * EPOCHS * (TRAIN + TEST)
    benchmark.extra_info["saved_seconds"] = saved
    text = ", ".join(f"{cause} {100 * value / whole:.0f} %" for cause, value in saved.items())
    Versus(benchmark, f"test_saving_by_cause[{name}]").report(
        f"{text} of {whole:.0f} s of naive steps and evaluations", "none"
    )
