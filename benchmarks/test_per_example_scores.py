"""Per-example scores of whole networks, beside an ordinary backward pass and the ways there were before.

Forward and backward are in every figure, and all sides see the same examples in the same layout and dtype. A set is
of four batches of 64; of one batch alone the trial, which every set begins with, is a larger part.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delfast
from benchmarks.conftest import Versus
from benchmarks.memory import added_peak, print_added_peak
from delfast.experiments.networks import build

BATCH, BATCHES = 64, 4
MODULE = "benchmarks.test_per_example_scores"
Sums = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
MAX_RATIO = {"resnet18": "<= 1.15 x", "vit": "<= 1.5 x"}  # the ViT's class token, position embedding, … included
SETS = {"4 batches": BATCHES, "1 batch": 1}
DTYPES = {"float32": torch.float32, "bfloat16 autocast": torch.bfloat16}


def job(name: str, examples: int = BATCH) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = build(name, 10, 3, 32).eval()
    images, targets = torch.randn(examples, 3, 32, 32), torch.randint(0, 10, (examples,))
    if name == "resnet18":  # as oneDNN has it fastest
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    return model, (images, targets)


def backward(model: nn.Module, batches: list[Batch]) -> None:
    """The ordinary one: the gradient of the batch."""
    for images, targets in batches:
        torch.autograd.grad(cross_entropy(model(images), targets, reduction="sum"), list(model.parameters()))


def scored(model: nn.Module, batches: list[Batch]) -> Sums:
    gradients = delfast.score(model, batches, per_example=True).gradients
    assert gradients is not None
    return gradients


def by_loop(model: nn.Module, batch: Batch) -> Sums:
    """Mean |g| the plain way: example by example."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for image, target in zip(*batch, strict=True):
        loss = cross_entropy(model(image[None]), target[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += gradient.abs()
    return {name: total / len(batch[1]) for name, total in sums.items()}


def by_vmap(model: nn.Module, batch: Batch) -> Sums:
    """torch.func: every example's gradient at once."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(values: Sums, image: Tensor, target: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (values, buffers), (image[None],))
        return cross_entropy(logits, target[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, *batch)
    return {name: gradient.abs().mean(dim=0) for name, gradient in gradients.items()}


def by_opacus(model: nn.Module, batch: Batch) -> Sums:
    """Opacus: hooks that keep every example's gradient in ``grad_sample``; in train mode alone."""
    opacus = pytest.importorskip("opacus", reason="Opacus is not installed: pip install -r requirements-dev.txt")
    wrapped = opacus.GradSampleModule(
        model, strict=False, loss_reduction="sum"
    )  # strict refuses BatchNorm, even in eval
    model.train()  # the ViT computes the same, without dropout and BatchNorm
    try:
        cross_entropy(wrapped(batch[0]), batch[1], reduction="sum").backward()
        return {name: p.grad_sample.abs().mean(dim=0) for name, p in model.named_parameters()}
    finally:
        wrapped.to_standard_module()
        model.eval()
        for parameter in model.parameters():
            parameter.grad = None


OTHERS = {
    "loop": (by_loop, 16),
    "vmap": (by_vmap, 32),
    "opacus": (by_opacus, 32),
}  # and how many examples it is timed on
LEAST = {"loop": ">= 1.8 x", "vmap": ">= 5 x", "opacus": "none"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SETS)
@pytest.mark.parametrize("name", MAX_RATIO)
def test_scores_against_a_batched_backward(versus: Versus, name: str, size: str, dtype: str) -> None:
    model, batch = job(name)
    batches = [batch] * SETS[size]
    with torch.autocast("cpu", DTYPES[dtype], enabled=DTYPES[dtype] is not torch.float32):
        ratio = 1 / versus(partial(scored, model, batches), partial(backward, model, batches), rounds=7)
    versus.report(f"{ratio:.2f} x a batched forward and backward", MAX_RATIO[name])


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", MAX_RATIO)
def test_scores_against_other_ways(versus: Versus, name: str, other: str) -> None:
    function, examples = OTHERS[other]
    model, batch = job(name)
    few = (batch[0][:examples], batch[1][:examples])
    try:
        expected = function(model, few)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        if other != "opacus":
            raise
        pytest.skip(f"Opacus does not run on {name}: {str(error).splitlines()[0]}")
    for parameter, result in scored(model, [few]).items():
        difference = (result - expected[parameter]).norm() / expected[parameter].norm()
        assert difference < 1e-4, f"{parameter}: {difference:.2g}"
    ratio = versus(partial(scored, model, [batch] * BATCHES), partial(function, model, few), rounds=3)
    per_example = ratio * BATCH * BATCHES / examples
    versus.report(f"{per_example:.1f} x as fast an example as {other}, which was timed on {examples}", LEAST[other])


@pytest.mark.parametrize("size", SETS)
@pytest.mark.parametrize("name", MAX_RATIO)
def test_signed_channels_against_a_batched_backward(versus: Versus, name: str, size: str) -> None:
    model, batch = job(name)
    batches = [batch] * SETS[size]
    ratio = 1 / versus(partial(delfast.signed_channels, model, batches), partial(backward, model, batches), rounds=7)
    versus.report(f"{ratio:.2f} x a batched forward and backward", "<= 0.8 x")


# ---- memory: each side in a process of its own, since a process keeps its peak


def print_peak(name: str, side: str) -> None:
    model, batch = job(name)
    sides: dict[str, Callable[..., Any]] = {"ours": scored, "backward": backward}
    few = (batch[0][:2], batch[1][:2])
    print_added_peak(lambda: sides[side](model, [few]), lambda: sides[side](model, [batch]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak from /proc")
@pytest.mark.parametrize("name", MAX_RATIO)
def test_peak_memory_against_a_batched_backward(versus: Versus, name: str) -> None:
    ours, theirs = versus.once(partial(added_peak, MODULE, name, "ours"), partial(added_peak, MODULE, name, "backward"))
    versus.report(f"{ours / theirs:.2f} x a batched backward's, {ours / 2**20:.0f} MiB", "<= 1.3 x")
