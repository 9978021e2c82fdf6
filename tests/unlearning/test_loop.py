"""Frozen BatchNorm and early stopping in the training loop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import delfast
from delfast import InputError, TrainingOptions
from delfast.unlearning import EarlyStop, train
from tests import cases

FORGET, RETAIN = cases.image_batches(12, seed=1), cases.image_batches(40, seed=2)
HELD_OUT = cases.image_batches(16, seed=3)


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return cases.SmallNet()


def run(model: nn.Module, **changes: Any) -> Any:
    settings: dict[str, Any] = dict(forget=FORGET, retain=RETAIN, init=cases.SmallNet, epochs=2, lr=0.05)
    return delfast.unlearn(model, **{**settings, **changes})


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


def test_frozen_batchnorm_keeps_every_buffer_to_the_bit() -> None:
    model = fresh()
    before, modes = buffers(model), [module.training for module in model.modules()]
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    run(model, training=TrainingOptions(batchnorm="frozen"))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert [module.training for module in model.modules()] == modes
    run(model)
    assert any(not torch.equal(value, before[name]) for name, value in model.named_buffers())
    with pytest.raises(InputError, match="expected batchnorm to be one of train, frozen; got 'off'"):
        run(model, training=TrainingOptions(batchnorm="off"))  # type: ignore[arg-type]


class Scripted(EarlyStop):
    """An early stop with given losses, independent of the network."""

    def __init__(self, losses: list[float], patience: int) -> None:
        super().__init__(HELD_OUT, patience, None)
        self.script = losses

    def _loss(self, model: nn.Module) -> float:
        return self.script[len(self.losses)]


def trained(epochs: int, stop: EarlyStop | None = None, **options: Any) -> tuple[nn.Module, Any]:
    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, train(model, RETAIN, optimizer, epochs=epochs, schedule="constant", early_stop=stop, **options)


@pytest.mark.parametrize(
    ("script", "patience", "ran", "best"),
    [
        ([3, 2, 2.5, 2.2, 1], 2, 4, 2),  # two epochs in a row are no better than the second
        ([3, 2, 2.5, 1, 1, 1], 2, 6, 4),  # an equal loss is not lower
        ([3, 2, 1], 1, 3, 3),  # to the end
        ([1, float("inf")], 1, 2, 1),
    ],
)
def test_early_stop_ends_at_the_best_epoch(script: list[float], patience: int, ran: int, best: int) -> None:
    model, result = trained(len(script), Scripted(script, patience))
    assert len(result.losses) == len(result.validation) == ran
    expected, _ = trained(best)
    for (name, value), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_early_stop_measures_the_mean_loss_on_what_is_held_out() -> None:
    model, result = trained(1, EarlyStop(HELD_OUT, 1, None))
    model.eval()
    images, targets = (torch.cat(parts) for parts in zip(*HELD_OUT, strict=True))
    expected = nn.functional.cross_entropy(model(images), targets)
    assert abs(result.validation[0] - float(expected)) < 1e-6
    with pytest.raises(InputError, match="at least one example, got none"):
        trained(1, EarlyStop([], 1, None))
    with pytest.raises(InputError, match="patience of at least 1 epoch, got 0"):
        EarlyStop(HELD_OUT, 0, None)


def test_a_resumed_run_stops_where_it_would_have(tmp_path: Path) -> None:
    script = [3, 2, 2.5, 2.2, 1]
    expected, _ = trained(5, Scripted(script, 2))

    def interrupt(batches: Any, description: str, total: int) -> Any:
        if description.startswith("epoch 4/"):
            raise KeyboardInterrupt
        return batches

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        trained(5, Scripted(script, 2), checkpoint=path, progress=interrupt)
    for _ in range(2):  # at the second resumption the run has stopped already
        model, result = trained(5, Scripted(script, 2), checkpoint=path, resume=True)
        assert len(result.losses) == 4
        for (name, value), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
            assert torch.equal(value, other), name


def test_an_early_stop_can_be_used_again() -> None:
    stop = EarlyStop(HELD_OUT, 1, None)
    for _ in range(2):
        _, result = trained(2, stop)
        assert result.losses and len(result.validation) == len(result.losses)


def test_unlearn_stops_early_and_keeps_to_its_mask() -> None:
    model = fresh()
    mask = delfast.localize(model, FORGET)
    before = copy.deepcopy(model.state_dict())
    training = TrainingOptions(validation=HELD_OUT, patience=1)
    result = run(model, mask=mask, epochs=6, lr=0.5, training=training)
    assert len(result.validation) == len(result.losses) <= 6
    dense = result.mask.to_dense()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter[~dense[name]], before[name][~dense[name]]), name
    with pytest.raises(InputError, match="validation= and patience= together"):
        run(model, training=TrainingOptions(patience=2))
