"""The host's part of every pass: on a GPU, an operation costs a launch, and a read of a value empties the queue.

The inputs are so small that the arithmetic takes no time: one more batch of a thin ResNet-18, channels-last, beside a
plain forward and backward pass of the same batch.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import delfast
from delfast.evaluation import accuracy_and_loss, kl_to_oracle, predictions
from delfast.experiments.networks import build
from delfast.localization.criteria import Granularity, Policy
from delfast.unlearning import METHODS, train
from tests.dispatch import Dispatched, per_batch

MAX_LOCALIZATION = 1.10  # operations of one more batch, as a multiple of a forward and backward pass
Batch = tuple[Tensor, Tensor]


@functools.cache
def network() -> nn.Module:
    torch.manual_seed(0)
    return build("resnet18-thin", 10, 3, 32).eval().to(memory_format=torch.channels_last)


def batches(count: int) -> list[Batch]:
    torch.manual_seed(1)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    return [(x, torch.tensor([1, 2]))] * count


@functools.cache
def forward_and_backward() -> int:
    ((inputs, targets),) = batches(1)
    with Dispatched() as found:
        loss = functional.cross_entropy(network()(inputs), targets, reduction="sum")
        torch.autograd.grad(loss, list(network().parameters()))
    return found.total


def test_localization_adds_few_operations_and_reads_nothing() -> None:
    operations, reads = per_batch(lambda count: delfast.score(network(), batches(count)))
    assert not reads and operations <= MAX_LOCALIZATION * forward_and_backward()


@pytest.mark.parametrize("granularity", ["channel", "param"])
@pytest.mark.parametrize("policy", ["whole", "exact"])
def test_a_selection_reads_one_tensor(
    granularity: Granularity, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = delfast.score(network(), batches(1))
    lists: list[torch.Size] = []
    tolist = Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        lists.append(tensor.shape)
        return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", counted)
    with Dispatched() as found:
        scores.select(0.3, granularity, policy=policy)
    channels = granularity == "channel"
    assert lists == [(5 if channels else 2,)] and not found.reads
    expected = {"delfast.select_elements.default": 1, "aten.split_with_sizes.default": 1}
    if channels:
        expected = {"delfast.criticality.default": 1, "delfast.select_units.default": 1} | expected
        del expected["delfast.select_elements.default"]
    if channels and policy == "exact":  # and the bits of the one parameter whose last channel is cut
        assert expected.items() <= found.counts.items() and found.total <= 30
    else:
        assert found.counts == expected


PASSES: dict[str, Callable[[list[Batch]], Any]] = {
    "score, per example": lambda found: delfast.score(network(), found, "grad", per_example=True),
    "score, Fisher": lambda found: delfast.score(network(), found, "squared_grad", per_example=True),
    "score, bf16": lambda found: delfast.score(network(), found, precision="bf16"),
    "signed_channels": lambda found: delfast.signed_channels(network(), found),
    "predictions": lambda found: predictions(network(), found),
    "accuracy_and_loss": lambda found: accuracy_and_loss(network(), found),
    "evaluate": lambda found: delfast.evaluate(network(), found, found[:], found[:], mia=False),
    "kl_to_oracle": lambda found: kl_to_oracle(network(), network(), found),
    "clipped training": lambda found: train(
        (model := copy.deepcopy(network())), found, torch.optim.SGD(model.parameters(), 0.1), epochs=1, max_norm=1.0
    ),
}


@pytest.mark.parametrize("name", PASSES)
def test_no_pass_reads_values_in_the_middle(name: str) -> None:
    _, reads = per_batch(lambda count: PASSES[name](batches(count)))
    assert not reads


@pytest.mark.parametrize("method", sorted(name for name, method in METHODS.items() if method().epochs))
def test_no_method_reads_values_in_the_middle(method: str) -> None:
    mask = delfast.localize(network(), batches(1), 0.3)

    def run(count: int) -> None:
        found = batches(count)
        make: Any = functools.partial(build, "resnet18-thin", 10, 3, 32)
        delfast.unlearn(
            copy.deepcopy(network()),
            retain=found,
            forget=[*found],
            mask=None if method == "retrain" else mask,
            init=make if method in ("del", "retrain") else None,
            method=method,
            seed=1,
            training=delfast.TrainingOptions(validation=[*found], patience=2),
            epochs=1,
        )

    assert not per_batch(run)[1]
