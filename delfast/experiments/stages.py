"""Time the stages of an unlearning job on one batch, in this process.

``delfast bench`` runs ``python -m delfast.experiments.stages`` in a process for each variant, because a process chooses
its backend once.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from delfast.compaction import compact
from delfast.copies import copy_of
from delfast.experiments.datasets import Batches
from delfast.experiments.interrupts import exit_after
from delfast.experiments.networks import factory
from delfast.experiments.run import choose_device, load_model, open_run
from delfast.localization import Scores, score
from delfast.optim import MaskedSGD
from delfast.reset import reset_
from delfast.seeding import seeded

CLASSES, CHANNELS, IMAGE_SIZE = 10, 3, 32  # of a preset's random images


@dataclass(frozen=True)
class Request:
    """The settings of a measurement. Without ``run_dir``, the network ``model`` on random images is timed."""

    run_dir: str | None
    data_dir: str | None
    model: str
    batch_size: int
    budget: float
    precision: str
    channels_last: bool
    device: str
    threads: int
    repeats: int


@dataclass(frozen=True)
class Workload:
    """A network, the batches of its training set, and a function that initializes it."""

    model: nn.Module
    batches: Batches
    init: Callable[[], nn.Module]


def measure(request: Request) -> dict[str, float]:
    """Median seconds of each stage on one batch:

    load: read a batch. forward, backward: of the loss, in training mode; the backward pass without weight gradients.
    weight gradient: the time that weight gradients add to the backward pass; "compact weight gradient": the same within
    the mask. step: MaskedSGD, compact. score: the forget set's gradient and every channel's score. select, reset.
    evaluate: the forward pass in eval mode.
    """
    torch.set_num_threads(request.threads)
    device = choose_device(request.device)
    work = _workload(request, device)
    model, batch = work.model, next(iter(work.batches))
    inputs = batch[1].to(device, memory_format=_layout(request)).requires_grad_()
    targets = batch[2].to(device)
    timed = _Timer(device, request.repeats)

    def precision() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=request.precision == "bf16")

    def forward() -> Tensor:
        with precision():
            return cross_entropy(model(inputs), targets)

    def score_batch() -> Scores:
        with precision():
            return score(model, [batch])

    def backward() -> float:
        model.zero_grad(set_to_none=True)
        inputs.grad = None
        loss = forward()
        return timed.once(loss.backward)

    def evaluate() -> None:
        with torch.inference_mode():
            forward()

    found = {"load": timed(lambda: next(iter(work.batches)))}
    found["score"], scores = timed(score_batch), score_batch()
    mask = scores.select(request.budget)
    found["select"] = timed(lambda: scores.select(request.budget))
    fresh = copy_of(model)
    found["reset"] = timed(lambda: reset_(model, mask, init=fresh))
    model.eval()
    found["evaluate"] = timed(evaluate)
    model.train()
    found["forward"] = timed(forward)
    dense = timed.all(backward)
    with compact(model, mask) as handle:
        optimizer = MaskedSGD(model.named_parameters(), handle.mask, lr=1e-6, momentum=0.9)
        within_mask = timed.all(backward)
        found["step"] = timed(optimizer.step)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    found["backward"] = timed.all(backward)
    found["weight gradient"] = max(0.0, dense - found["backward"])
    found["compact weight gradient"] = max(0.0, within_mask - found["backward"])
    return found


class _Timer:
    """Median seconds of calls, each until the device has finished; the first call is not counted."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def once(self, call: Callable[[], Any]) -> float:
        self._wait()
        started = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - started

    def __call__(self, call: Callable[[], Any]) -> float:
        return self.all(lambda: self.once(call))

    def all(self, timed_call: Callable[[], float]) -> float:
        """Median seconds of a call that returns its own time."""
        timed_call()
        return statistics.median(timed_call() for _ in range(self.repeats))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _layout(request: Request) -> torch.memory_format:
    return torch.channels_last if request.channels_last else torch.contiguous_format


def _workload(request: Request, device: torch.device) -> Workload:
    if request.run_dir is not None:
        run = open_run(Path(request.run_dir), device, None if request.data_dir is None else Path(request.data_dir))
        run = run.with_config(precision=request.precision, channels_last=request.channels_last)
        model = load_model(run, Path(request.run_dir))
        return Workload(model, run.batches(run.forget.retain, request.batch_size), run.factory)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (request.batch_size, CHANNELS, IMAGE_SIZE, IMAGE_SIZE), generator=generator)
    targets = torch.randint(0, CLASSES, (request.batch_size,), generator=generator)
    init = factory(request.model, CLASSES, CHANNELS, IMAGE_SIZE)
    with seeded(0):
        model = init().to(device).to(memory_format=_layout(request))
    half = torch.full((CHANNELS,), 0.5)
    return Workload(model, Batches(images.to(torch.uint8), targets, half, half, batch_size=request.batch_size), init)


def as_arguments(request: Request) -> list[str]:
    """The arguments of the Python interpreter that measure ``request`` and print JSON."""
    return ["-m", "delfast.experiments.stages", json.dumps(asdict(request))]


if __name__ == "__main__":
    exit_after(lambda: os.read(0, 1))
    print(json.dumps(measure(Request(**json.loads(sys.argv[1])))))
