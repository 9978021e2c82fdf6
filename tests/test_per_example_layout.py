"""Examples that lie otherwise in a later batch than in the trial's: found out, whatever moves them; 0 wrong."""

from __future__ import annotations

import logging
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import delfast
from delfast.localize.per_example import passes
from tests.per_example import assert_parity, example_gradients
from tests.routing import ROUTED, losses_of, routed


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one for every batch that takes a second backward pass."""
    made: list[Any] = []

    class Counted(passes.Comparison):
        def __init__(self, *args: Any) -> None:
            made.append(args)
            super().__init__(*args)

    monkeypatch.setattr(passes, "Comparison", Counted)
    return made


def assert_right(model: nn.Module, batches: list[Any]) -> None:
    """|g|, g² and signed channels against the loop over single examples."""
    assert_parity(model, batches, losses_of, unknown=None)
    gradients = example_gradients(model, batches, losses_of)
    channels = delfast.signed_channels(model, batches, loss_fn=losses_of)
    for name in channels.layers:
        weight = dict(model.named_parameters())[name].detach()
        exact = torch.stack([(weight * g[name]).flatten(1).sum(dim=1) for g in gradients]).numpy()
        numpy.testing.assert_allclose(
            channels[name], exact, rtol=1e-6, atol=1e-6 * numpy.abs(exact).max(), err_msg=name
        )
    assert channels.layers


class Scattered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.fc.weight)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros(mask.shape).masked_scatter(mask, self.fc(x[mask]).flatten()).sum(dim=1)


def test_as_many_tokens_in_all_but_not_of_each() -> None:
    model = Scattered()
    ones = torch.ones(2, 3, 1)
    batches = [
        (ones, torch.tensor([[1, 1, 0], [1, 1, 0]]).bool(), torch.tensor([1.0, 1.0])),
        (ones, torch.tensor([[1, 1, 1], [1, 0, 0]]).bool(), torch.tensor([1.0, -1.0])),
    ]
    options: dict[str, Any] = {"loss_fn": lambda model, batch: model(batch[0], batch[1]) * batch[2]}
    scores = delfast.score(model, batches, "grad", per_example=True, **options)
    assert scores.gradients is not None and float(scores.gradients["fc.weight"]) * 4 == 8
    channels = delfast.signed_channels(model, batches, **options)
    assert channels["fc.weight"][:, 0].tolist() == [2, 2, 3, -1]


@pytest.mark.parametrize("name", ROUTED)
def test_routed_networks(name: str) -> None:
    for seed in range(2):
        assert_right(*routed(name, seed))


def test_a_batch_of_another_layout_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "delfast")
    model, batches = routed("shuffled values", 0)
    delfast.score(model, batches, per_example=True, loss_fn=losses_of)
    text = "'layer.bias', 'layer.weight' (each has the examples in another order than in the trial"
    assert [text in record.message for record in caplog.records].count(True) <= 1
    assert 1 <= len(caplog.records) <= 2
