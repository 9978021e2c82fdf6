"""A model whose parameters lie on several devices in one process: the meta device stands for a second one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import delfast
from delfast import InputError, Mask
from delfast.optim import MaskedAdamW, MaskedSGD

BATCHES = [(torch.ones(4, 4), torch.arange(4) % 3)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def split() -> nn.Sequential:
    model = network()
    model[2].to("meta")
    return model


def masks() -> list[Mask]:
    torch.manual_seed(1)
    rows = {name: (torch.rand(len(p)) < 0.5).view(-1, *[1] * (p.ndim - 1)) for name, p in network().named_parameters()}
    elements = {name: torch.rand(p.shape) < 0.5 for name, p in network().named_parameters()}
    whole = {name: rows[name].expand(p.shape) for name, p in network().named_parameters()}
    return [Mask.from_dense(whole), Mask.from_dense(elements)]


@pytest.mark.parametrize("mask", masks(), ids=["rows", "elements"])
@pytest.mark.parametrize("make", [MaskedSGD, MaskedAdamW])
def test_reset_and_steps_are_those_of_one_device(mask: Mask, make: Callable[..., Any]) -> None:
    one, model = network(), split()
    for each in (one, model):
        delfast.reset_(each, mask, network, seed=3)
        optimizer = make(each.named_parameters(), mask, lr=0.1)
        for _ in range(2):
            for parameter in each.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    for name in ("0.weight", "0.bias"):
        assert torch.equal(model.get_parameter(name), one.get_parameter(name))
    assert [p.device.type for p in model.parameters()] == ["cpu", "cpu", "meta", "meta"]


@pytest.mark.parametrize("mask", masks(), ids=["rows", "elements"])
def test_compact_trains_each_parameter_on_its_device(mask: Mask) -> None:
    one, model = network(), split()
    for each in (one, model):
        with delfast.compact(each, mask) as handle:
            optimizer = MaskedSGD(handle.named_parameters(), handle.mask, lr=0.1)
            for parameter in handle.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    for name in ("0.weight", "0.bias"):
        assert torch.equal(model.get_parameter(name), one.get_parameter(name))
    assert [p.device.type for p in model.parameters()] == ["cpu", "cpu", "meta", "meta"]


@pytest.mark.parametrize("criterion", ["weighted_grad", "weight", "random", "deepest", "critmem"])
def test_scores_of_several_devices_are_refused_by_name(criterion: Any) -> None:
    message = r"on one device, got '0.weight' on cpu, '2.weight' on meta; score a copy of the model on one device"
    with pytest.raises(InputError, match=message):
        delfast.localize(split(), BATCHES, 0.5, criterion=criterion)


def test_parameters_that_do_not_compete_may_be_elsewhere() -> None:
    mask = delfast.score(split(), criterion="weight", include="0.*").select(0.5)
    assert set(mask.names) == {"0.weight", "0.bias"}
