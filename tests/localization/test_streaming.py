"""A set of one batch: channels are scored during the backward pass, with the bits of ``score``."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

import delfast
from delfast.execution import DEFAULT_EXECUTION
from delfast.localization import strategies, streaming
from tests import cases

BATCH = next(iter(cases.image_batches()))


def channels_last() -> nn.Module:
    return cases.SmallNet().to(memory_format=torch.channels_last)


def half() -> nn.Module:
    return cases.SmallNet().bfloat16()


class Unused(nn.Module):
    """A network with a parameter that the loss does not depend on, and one that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.network = cases.SmallNet()
        self.unused = nn.Linear(3, 3)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits = self.network(inputs)
        return logits + self.second(self.first(inputs.flatten(1)[:, :4])).sum(1, keepdim=True)


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch[-2:]
    return nn.functional.cross_entropy(
        model(inputs.to(next(model.parameters()).dtype)).float(), targets, reduction="none"
    )


@pytest.mark.parametrize("piece_bytes", [64, streaming.CPU_PIECE_BYTES])
@pytest.mark.parametrize("make", [cases.SmallNet, channels_last, half, Unused])
def test_the_mask_is_that_of_score(make, piece_bytes, monkeypatch) -> None:
    monkeypatch.setattr(streaming, "CPU_PIECE_BYTES", piece_bytes)
    model = make()
    for criterion, aggregate, policy in product(
        ("weighted_grad", "grad"), ("topk_mean", "mean", "max", "sum"), ("whole", "exact")
    ):
        scores = delfast.score(model, [BATCH], criterion, loss_fn=loss_fn)
        options = {"aggregate": aggregate, "policy": policy, "top_h": 0.3}
        expected = scores.select(0.2, **options)
        units = (aggregate, 0.3)
        streamed = streaming.streamed_scores(model, [BATCH], criterion, units, loss_fn, 0, DEFAULT_EXECUTION, {})
        assert streamed is not None and streamed.gradients is None
        assert torch.equal(streamed.channel_scores(), scores.channel_scores(aggregate, 0.3))
        with monkeypatch.context() as patch:
            patch.setattr(strategies, "score", None)  # is not called
            mask = delfast.localize(model, [BATCH], 0.2, criterion=criterion, loss_fn=loss_fn, **options)
        assert mask.digest == expected.digest
        assert mask.metadata.items() >= expected.metadata.items()
    assert all(p.grad is None for p in model.parameters())


class WrongLength(list):
    def __len__(self) -> int:
        return 1


def test_what_cannot_be_streamed_is_computed_as_a_whole() -> None:
    model = cases.SmallNet()
    two = list(cases.image_batches())[:2]
    expected = delfast.score(model, two).select(0.3)
    assert len(two) == 2 and delfast.localize(model, WrongLength(two), 0.3).digest == expected.digest
    wide = cases.SmallNet().double()
    batch = (BATCH[-2].double(), BATCH[-1])
    assert delfast.localize(wide, [batch], 0.3).digest == delfast.score(wide, [batch]).select(0.3).digest


def test_errors_are_those_of_score() -> None:
    model = cases.SmallNet()
    assert delfast.localize(model, None, 0.3, criterion="weight").selected
    with pytest.raises(
        delfast.InputError, match="expected the loader to be a DataLoader or another iterable of batches"
    ):
        delfast.localize(model, {"input_ids": BATCH[-2]}, 0.3)
    with pytest.raises(delfast.InputError, match="at least one example"):
        delfast.localize(model, [(BATCH[-2][:0], BATCH[-1][:0])], 0.3)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(delfast.InputError, match="expected finite scores"):
        delfast.localize(model, [BATCH], 0.3)
