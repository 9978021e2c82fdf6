"""The whole calls that benchmarks.gpu times: localization, per-example scores, training steps, and a whole DEL job.

Each section yields its cases; the most important come first, since a section has a time limit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delfast
from benchmarks import naive
from benchmarks.baselines import channel_scores, double_argsort, expanded
from benchmarks.gpu_measure import Captured, Case, Effort, Marginal, Whole, autocast, delfast_keywords
from benchmarks.gpu_networks import Batch, Workload, workloads
from benchmarks.job import images_of
from delfast.evaluation import accuracy_and_loss
from delfast.experiments.datasets import Batches
from delfast.localization.criteria import resolve_top_h
from delfast.unlearning import TrainingOptions

BUDGET = 0.3
MIN_OVERLAP = {"fp32": 0.95, "tf32": 0.95, "bf16": 0.8}  # of two masks
MIN_TINY_OVERLAP = 0.5  # the other side cuts its last channel, which is a large part of a small mask
ONCE = Effort(least=1, most=1, warm_up=False)
LR = 1e-5  # of single steps: on random images a larger one may diverge within a benchmark


@dataclass(frozen=True)
class Setup:
    """The device, the modes, and whether networks and sets are small enough for the CPU."""

    device: torch.device
    modes: Sequence[str]
    tiny: bool = False

    def side_marginal(self, make: Callable[[], Callable[[int], Any]], is_captured: bool) -> Marginal:
        return Marginal(make, is_captured, *((1, 2) if self.tiny else (2, 6)))

    @property
    def effort(self) -> Effort:
        return ONCE if self.tiny else Effort()


# ---- localize


def localize(setup: Setup) -> Iterator[Case]:
    """Localize 5,000 images, the first call for a network: a capture is part of the time."""
    workload = next(workloads(setup.tiny))
    network = workload.network(setup.device).eval()
    batches = _batches(workload, 38 if setup.tiny else 5000, setup.device)
    for mode in setup.modes:
        yield _localization(setup, workload.on, network, batches, mode)


def _localization(setup: Setup, on: str, network: nn.Module, batches: Sequence[Batch], mode: str) -> Case:
    examples = sum(len(targets) for _, targets in batches)

    def usual(is_captured: bool) -> Callable[[], dict[str, Tensor]]:
        return partial(usual_loop, copy.deepcopy(network), batches, examples, setup.device, mode, is_captured)

    def ours(is_captured: bool) -> Callable[[], delfast.Mask]:
        model = copy.deepcopy(network)  # a graph of an earlier call is of another model
        settings = delfast_keywords(delfast.localize, setup.device, mode, "auto" if is_captured else False)
        return partial(delfast.localize, model, batches, BUDGET, **settings)

    def same_mask() -> dict[str, Any]:
        overlap = jaccard(ours(True)(), usual(False)())
        least = MIN_TINY_OVERLAP if setup.tiny else MIN_OVERLAP[mode]
        assert overlap >= least, f"the masks overlap by {overlap:.3f}, expected {least}"
        return {"overlap": overlap}

    sides = {
        "usual loop": Whole(partial(usual, False)),
        "usual loop, captured": Whole(partial(usual, True), captured=True),
        "delfast": Whole(partial(ours, False)),
        "delfast, captured": Whole(partial(ours, True), captured=True),
    }
    ratios = (("delfast, captured", "usual loop"), ("delfast, captured", "usual loop, captured"))
    return Case(f"localize {examples:,} images, first call", on, mode, sides, ratios, same_mask)


def _batches(workload: Workload, examples: int, device: torch.device) -> list[Batch]:
    """Return random examples in batches on the device; the last one may be short."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(examples, *workload.shape, generator=generator).to(device)
    targets = torch.randint(0, workload.classes, (examples,), generator=generator).to(device)
    parts = zip(images.split(workload.batch_size), targets.split(workload.batch_size), strict=True)
    return [(inputs.contiguous(memory_format=torch.channels_last), labels) for inputs, labels in parts]


def usual_loop(
    model: nn.Module, batches: Sequence[Batch], examples: int, device: torch.device, mode: str, is_captured: bool
) -> dict[str, Tensor]:
    """Localize as people write it: backward into ``.grad``, sums in a dict, topk, double argsort; name -> bool mask.

    ``is_captured``: the passes of whole batches by a CUDA graph, which is made in this call.
    """
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}

    def add(inputs: Tensor, targets: Tensor) -> None:
        model.zero_grad()
        with autocast(device, mode):
            loss = cross_entropy(model(inputs).float(), targets, reduction="sum") / examples
        loss.backward()
        for name, parameter in parameters.items():
            sums[name] += parameter.grad

    inputs, targets = (tensor.clone() for tensor in batches[0])
    replay = Captured(partial(add, inputs, targets), device) if is_captured else None
    for total in sums.values():
        total.zero_()  # the warm-up has added to it
    for batch_inputs, batch_targets in batches:
        if replay is not None and len(batch_inputs) == len(inputs):
            inputs.copy_(batch_inputs)
            targets.copy_(batch_targets)
            replay()
        else:
            add(batch_inputs, batch_targets)
    model.zero_grad()
    theta = [parameter.detach() for parameter in parameters.values()]
    scores = channel_scores(theta, list(sums.values()), [resolve_top_h(0.1, t.shape) for t in theta])
    count = int(BUDGET * sum(t.numel() for t in theta))
    parts = double_argsort(expanded(scores, theta), count).split([t.numel() for t in theta])
    return {name: part.view(t.shape) for name, part, t in zip(parameters, parts, theta, strict=True)}


def jaccard(mask: delfast.Mask, other: dict[str, Tensor]) -> float:
    """Return |A ∩ B| / |A ∪ B| of a mask and a dense mask of every parameter."""
    both = either = 0
    for name, flags in other.items():
        ours, theirs = mask.parameters[name].dense(), flags.cpu()
        both += int((ours & theirs).sum())
        either += int((ours | theirs).sum())
    return both / either


# ---- per_example


def per_example(setup: Setup) -> Iterator[Case]:
    """Per-example scores of one more batch, beside an ordinary forward and backward pass."""
    device = setup.device
    for mode in setup.modes:
        for workload in workloads(setup.tiny):
            network, batch = workload.network(device).eval(), workload.batch(device)
            ours, plain = (
                {is_captured: partial(make, network, batch, setup, mode, is_captured) for is_captured in (False, True)}
                for make in (_scores, _forward_backward)
            )
            yield Case(
                "per-example scores, one more batch",
                workload.on,
                mode,
                {
                    "forward + backward": setup.side_marginal(plain[False], False),
                    "forward + backward, captured": setup.side_marginal(plain[True], True),
                    "per-example": setup.side_marginal(ours[False], False),
                    "per-example, captured": setup.side_marginal(ours[True], True),
                },
                (
                    ("per-example", "forward + backward"),
                    ("per-example, captured", "forward + backward, captured"),
                ),
            )


def _scores(network: nn.Module, batch: Batch, setup: Setup, mode: str, is_captured: bool) -> Callable[[int], Any]:
    settings = delfast_keywords(delfast.score, setup.device, mode, is_captured)
    return lambda count: delfast.score(network, [batch] * count, "grad", per_example=True, **settings)


def _forward_backward(
    network: nn.Module, batch: Batch, setup: Setup, mode: str, is_captured: bool
) -> Callable[[int], Any]:
    parameters = list(network.parameters())

    def one() -> None:
        with autocast(setup.device, mode):
            loss = cross_entropy(network(batch[0]).float(), batch[1], reduction="sum")
        torch.autograd.grad(loss, parameters)

    return _repeated(one, setup.device, is_captured)


def _repeated(one: Callable[[], Any], device: torch.device, is_captured: bool) -> Callable[[int], None]:
    """Return a function that runs ``one`` a number of times, or its graph."""
    run = Captured(one, device) if is_captured else one

    def times(count: int) -> None:
        for _ in range(count):
            run()

    return times


# ---- step


def step(setup: Setup) -> Iterator[Case]:
    """One more training step of ``unlearn``, dense and compact, beside torch's dense step with a fused optimizer."""
    device = setup.device
    for mode in setup.modes:
        for workload in workloads(setup.tiny):
            network, batch = workload.network(device), workload.batch(device)
            mask = delfast.localize(network, [batch], BUDGET)
            sides: dict[str, Marginal] = {}
            for suffix, is_captured in (("", False), (", captured", True)):
                plain = partial(_torch_step, network, batch, setup, mode, is_captured)
                sides[f"torch, dense{suffix}"] = setup.side_marginal(plain, is_captured)
                for what, within in (("dense", None), ("compact", mask)):
                    ours = partial(_unlearning_step, network, batch, within, setup, mode, is_captured)
                    sides[f"delfast, {what}{suffix}"] = setup.side_marginal(ours, is_captured)
            yield Case(
                f"training step, compact within {BUDGET:g} of the parameters",
                workload.on,
                mode,
                sides,
                (
                    ("delfast, compact, captured", "torch, dense"),
                    ("delfast, compact, captured", "torch, dense, captured"),
                    ("delfast, compact, captured", "delfast, dense, captured"),
                    ("delfast, compact", "delfast, dense"),
                ),
            )


def _torch_step(network: nn.Module, batch: Batch, setup: Setup, mode: str, is_captured: bool) -> Callable[[int], Any]:
    model = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, fused=True)

    def one() -> None:
        optimizer.zero_grad()
        with autocast(setup.device, mode):
            loss = cross_entropy(model(batch[0]).float(), batch[1])
        loss.backward()
        optimizer.step()

    return _repeated(one, setup.device, is_captured)


def _unlearning_step(
    network: nn.Module, batch: Batch, mask: delfast.Mask | None, setup: Setup, mode: str, is_captured: bool
) -> Callable[[int], Any]:
    model = copy.deepcopy(network)
    options = TrainingOptions(**delfast_keywords(TrainingOptions, setup.device, mode, is_captured))
    return lambda count: delfast.unlearn(
        model, retain=[batch] * count, method="finetune", mask=mask, epochs=1, lr=LR, training=options
    )


# ---- job


@dataclass(frozen=True)
class Job:
    """A DEL job on the GPU: a trained network, its images there as uint8, and how many of them to forget."""

    name: str
    network: nn.Module
    factory: Callable[[], nn.Module]
    train_set: naive.Images
    test_set: naive.Images
    mean: Tensor
    std: Tensor
    forget: int

    def smaller(self, retain: int) -> Job:
        """Return the job with as few images to retain, to forget and to test on."""
        sets = [tuple(tensor[: 2 * retain] for tensor in self.train_set), tuple(t[:retain] for t in self.test_set)]
        return Job(self.name, self.network, self.factory, *sets, self.mean, self.std, retain)  # type: ignore[arg-type]

    def parts(self) -> dict[str, naive.Images]:
        images, targets = self.train_set
        parts = {
            "retain": (images[self.forget :], targets[self.forget :]),
            "forget": (images[: self.forget], targets[: self.forget]),
        }
        return {**parts, "test": self.test_set}


def job(setup: Setup) -> Iterator[Case]:
    """Localize 5,000 images, reset, and finetune on 45,000 for five epochs, beside ``naive`` on the same GPU."""
    forget, retain, epochs = (32, 1088, 1) if setup.tiny else (5000, 45000, 5)
    whole = _trained_job(setup, forget, retain)
    few = whole.smaller(32 if setup.tiny else 4500)
    accuracies: dict[str, float] = {}

    def run(name: str, of: Job, epochs: int) -> None:
        side, mode = name.split(", ")
        accuracy = (naive_job if side == "naive" else delfast_job)(of, mode, epochs, setup.device)
        if of is whole:
            accuracies[name] = accuracy

    def side(name: str) -> Whole:
        prepare, shorter = (lambda: partial(run, name, whole, epochs)), (lambda: partial(run, name, few, 1))
        return Whole(prepare, captured=name.startswith("delfast"), profiled=shorter)

    def warm_up() -> dict[str, Any]:
        """Run a small job on each side: libraries load and choose. The whole job is timed once."""
        for name in names:
            run(name, few, 1)
        return {"test_accuracy": accuracies}  # which the sides fill

    modes = [mode for mode in setup.modes if mode != "tf32"]
    names = [f"{side}, {mode}" for mode in modes for side in ("naive", "delfast")]
    ratios = [(f"delfast, {mode}", f"naive, {mode}") for mode in modes]
    if {"fp32", "bf16"} <= set(modes):
        ratios.append(("delfast, bf16", "naive, fp32"))
    what = f"localize {forget:,}, reset, finetune {retain:,} images, epochs: {epochs}"
    sides = {name: side(name) for name in names}
    yield Case(what, f"{whole.name}, batch {naive.BATCH}", "of the side", sides, tuple(ratios), warm_up, ONCE)


def _trained_job(setup: Setup, forget: int, retain: int) -> Job:
    """Make the images and train the network for two epochs by a captured step of torch, in seconds."""
    device, workload = setup.device, next(workloads(setup.tiny))
    *images, mean, std = images_of(forget + retain, retain if setup.tiny else 10000, workload.shape[-1])
    sets = [tuple(tensor.to(device) for tensor in each) for each in images]
    model = workload.network(device)
    batches = naive.CardImages(sets[0], mean.to(device), std.to(device), shuffle=True)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    inputs, targets = (tensor.clone() for tensor in next(iter(batches)))

    def one() -> None:
        optimizer.zero_grad()
        with autocast(device, "bf16"):
            loss = cross_entropy(model(inputs).float(), targets)
        loss.backward()
        optimizer.step()

    replay = Captured(one, device)
    for _ in range(1 if setup.tiny else 2):
        for batch in batches:
            if len(batch[0]) == len(inputs):
                inputs.copy_(batch[0])
                targets.copy_(batch[1])
                replay()
    model.zero_grad(set_to_none=True)
    return Job(workload.name, model, workload.make, *sets, mean.to(device), std.to(device), forget)  # type: ignore[arg-type]


def naive_job(job: Job, mode: str, epochs: int, device: torch.device) -> float:
    """Run the job as it is commonly written, channels-last; return the accuracy on the test set, in percent."""
    torch.manual_seed(1)
    model, bf16 = copy.deepcopy(job.network), mode == "bf16"
    parts = job.parts()
    sets = {name: naive.CardImages(images, job.mean, job.std) for name, images in parts.items()}
    mask = naive.localize(model, sets["forget"], BUDGET, bf16=bf16)
    naive.reset(model, mask, job.factory)
    return naive.finetune(model, mask, sets, epochs, 0.015, bf16=bf16)["test"]


def delfast_job(job: Job, mode: str, epochs: int, device: torch.device) -> float:
    """Run the job by delfast, captured on a GPU; return the accuracy on the test set, in percent."""
    model, parts = copy.deepcopy(job.network), job.parts()
    sets = {
        name: Batches(*images, job.mean, job.std, batch_size=naive.BATCH, shuffle=name == "retain")
        for name, images in parts.items()
    }
    settings = delfast_keywords(delfast.localize, device, mode, "auto")
    mask = delfast.localize(model, sets["forget"], BUDGET, **settings)
    options = TrainingOptions(**delfast_keywords(TrainingOptions, device, mode, "auto"))
    delfast.unlearn(
        model, retain=sets["retain"], mask=mask, init=job.factory, epochs=epochs, lr=0.015, seed=1, training=options
    )
    with autocast(device, mode):
        return accuracy_and_loss(model, sets["test"]).accuracy


SECTIONS = (localize, per_example, step, job)
