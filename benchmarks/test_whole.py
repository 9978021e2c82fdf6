"""A whole DEL job - localize, reset, finetune, evaluate - beside the same job in plain PyTorch (``naive``).

500 examples to forget, 4,500 to retain, 1,000 to test on, 2 epochs in batches of 128. The images are made here, classes
of noise around a pattern of their own, so that nothing is downloaded: the work is that of CIFAR-10.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import delfast
from benchmarks import naive
from benchmarks.conftest import Versus
from benchmarks.memory import added_peak, print_added_peak
from benchmarks.test_compact import precision_of
from delfast.data import Batches
from delfast.models import factory
from delfast.unlearn import train

MODELS = ("resnet18", "vit")
LAYOUT = {"resnet18": torch.channels_last, "vit": torch.contiguous_format}
FORGET, TRAIN, TEST, BATCH, EPOCHS, BUDGET, LR, SEEDS = 500, 5000, 1000, 128, 2, 0.3, 0.02, 3
MOST = {"fp32": 0.68, "bf16": 0.38}
Images = tuple[Tensor, Tensor]


@lru_cache
def data() -> tuple[Images, Images, Tensor, Tensor]:
    """Training and test images (N, 3, 32, 32) uint8 with targets, and the training set's mean and deviation."""
    generator = torch.Generator().manual_seed(0)
    patterns = interpolate(torch.randn(10, 3, 8, 8, generator=generator), scale_factor=4)

    def images(count: int) -> Images:
        targets = torch.randint(0, 10, (count,), generator=generator)
        noise = 2 * torch.randn(count, 3, 32, 32, generator=generator)
        return (128 + 32 * (patterns[targets] + noise)).clamp(0, 255).to(torch.uint8), targets

    train_set, test_set = images(TRAIN), images(TEST)
    scaled = train_set[0].float() / 255
    return train_set, test_set, scaled.mean((0, 2, 3)), scaled.std((0, 2, 3))


def batches(images: Images, batch_size: int = BATCH, **options: Any) -> Batches:
    *_, mean, std = data()
    return Batches(*images, mean, std, batch_size=batch_size, **options)


def part(images: Images, where: slice) -> Images:
    return images[0][where], images[1][where]


@lru_cache
def original(name: str) -> nn.Module:
    """Trained on all training images, as fast as it goes."""
    torch.manual_seed(0)
    model = factory(name, 10, 3, 32)().to(memory_format=LAYOUT[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, batches(data()[0], shuffle=True), optimizer, epochs=2, precision="bf16")
    return model


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
    train_set, test_set, *_ = data()
    model = copy.deepcopy(original(name))
    started = time.perf_counter()
    forget = batches(part(train_set, slice(FORGET)))
    retain = batches(part(train_set, slice(FORGET, None)), shuffle=True, seed=seed)
    with precision_of(precision):
        mask = delfast.localize(model, forget, BUDGET)
    delfast.unlearn(
        model, retain=retain, mask=mask, init=factory(name, 10, 3, 32), epochs=EPOCHS, lr=LR, seed=seed + 100,
        precision=precision,  # type: ignore[arg-type]
    )  # fmt: skip
    with precision_of(precision):
        accuracy = delfast.evaluate.accuracy_and_loss(model, batches(test_set, 512)).accuracy
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
    versus = Versus(benchmark, f"test_whole_job[{name}]")
    for side, most in MOST.items():
        text = f"{side}: {seconds[side] / seconds['naive']:.2f} of {seconds['naive']:.0f} s, "
        text += f"accuracy {accuracy[side]:.1f} for {accuracy['naive']:.1f}"
        versus.report(text, f"<= {most}, within a point")


# ---- where the saving comes from: each cause alone, in seconds of the whole job


def step_seconds(step: Callable[[], None], rounds: int = 3) -> float:
    step()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@pytest.mark.parametrize("name", MODELS)
def test_saving_by_cause(name: str, benchmark: Any) -> None:
    train_set, test_set, mean, std = data()
    steps = EPOCHS * -(-(TRAIN - FORGET) // BATCH)
    model, tensors = original(name), naive.dataset(part(train_set, slice(FORGET, None)), mean, std)
    mask = delfast.localize(model, batches(part(train_set, slice(FORGET))), BUDGET)
    dense_mask = mask.to_dense(torch.float32)
    inputs, targets = tensors[:BATCH]

    def step(layout: Any, precision: str, compact: bool, masked: bool) -> Callable[[], None]:
        network = copy.deepcopy(model).to(memory_format=layout)
        x = inputs.to(memory_format=layout)
        handle = delfast.compact(network, mask) if compact else None
        if masked:
            our_mask = mask if handle is None else handle.mask
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
    seconds = {cause: steps * step_seconds(run) for cause, run in chain.items()}
    causes = list(chain)
    saved = {cause: seconds[before] - seconds[cause] for before, cause in itertools.pairwise(causes)}
    loaders = [iter(naive.DataLoader(tensors, batch_size=BATCH, shuffle=True)), iter(batches(train_set, shuffle=True))]
    theirs, ours = (step_seconds(lambda source=source: next(source), rounds=9) for source in loaders)
    saved["data"] = steps * (theirs - ours)
    test = naive.dataset(part(test_set, slice(256)), mean, std)
    plain = copy.deepcopy(model).to(memory_format=contiguous)
    an_image = step_seconds(lambda: naive.accuracy(plain, test)) / 256
    saved["evaluation"] = an_image * (EPOCHS * (TRAIN + TEST) - TEST)
    benchmark.pedantic(chain["precision"], rounds=1)
    whole = seconds["naive"] + an_image * EPOCHS * (TRAIN + TEST)
    versus = Versus(benchmark, f"test_saving_by_cause[{name}]")
    benchmark.extra_info["saved_seconds"] = saved
    for cause, value in saved.items():
        versus.report(f"{cause}: {100 * value / whole:.0f} % of the naive job's {whole:.0f} s", "none")


# ---- memory


def finetune_once(name: str, side: str, examples: int) -> None:
    """An epoch of a finetune, as each side does it."""
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
        delfast.unlearn(model, retain=batches(some), mask=mask, init=model, epochs=1, lr=LR)


def print_peak(name: str, side: str) -> None:
    data()
    print_added_peak(partial(finetune_once, name, side, 4), partial(finetune_once, name, side, TRAIN - FORGET))


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak from /proc")
@pytest.mark.parametrize("name", MODELS)
def test_peak_memory_of_the_finetune(name: str, versus: Versus) -> None:
    module = "benchmarks.test_whole"
    ours, theirs = versus.once(partial(added_peak, module, name, "ours"), partial(added_peak, module, name, "naive"))
    versus.report(f"{ours / theirs:.2f} x the naive loop's, {ours / 2**20:.0f} MiB", "<= 0.9 x")


@pytest.mark.parametrize("name", MODELS)
def test_optimizer_state(name: str, versus: Versus) -> None:
    torch.manual_seed(0)
    model = factory(name, 10, 3, 32)()
    images, targets = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    mask = delfast.localize(model, [(images, targets)], BUDGET)

    def state(compact: bool) -> int:
        network = copy.deepcopy(model)
        parameters = delfast.compact(network, mask).parameters() if compact else network.parameters()
        optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
        cross_entropy(network(images), targets).backward()
        optimizer.step()
        return sum(held["momentum_buffer"].numel() for held in optimizer.state.values())

    ours, theirs = versus.once(lambda: state(True), lambda: state(False))
    versus.report(f"{ours / theirs:.3f} x dense", "<= 0.35 x")
