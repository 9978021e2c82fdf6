"""Nothing else moves: what the guard refuses and puts back."""

import copy

import pytest
import torch
from torch import nn

import delfast
from delfast.compaction import guard
from delfast.errors import InputError
from delfast.mask import Mask
from delfast.optim import MaskedAdamW, MaskedSGD
from delfast.unlearning.api import full_mask
from tests.compaction.references import (
    Net,
    all_but,
    cross_entropy,
    row_mask,
    step,
)


def test_an_optimizer_from_before_is_refused(net, data):
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    before = copy.deepcopy(net.state_dict())
    with delfast.compact(net, row_mask(net, 0.4)):
        cross_entropy(data)(net.eval()).backward()
        with pytest.raises(
            InputError, match=r"made after compact\(\), got one of 'stem.0.weight' without the 'stem.0.wei"
        ):
            optimizer.step()
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_what_is_not_selected_may_not_be_thawed(net, data):
    mask = row_mask(net, 0.4)
    mask = Mask({name: part for name, part in mask.parameters.items() if name.startswith("mix")})
    with delfast.compact(net, mask):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        cross_entropy(data)(net).backward()
        optimizer.step()
        net.requires_grad_(True)
        cross_entropy(data)(net).backward()
        with pytest.raises(
            InputError, match=r"expected no gradient of 'stem\.0\.weight', where the mask selects nothing"
        ):
            optimizer.step()


OPTIMIZERS = {
    "fused AdamW": lambda handle: torch.optim.AdamW(handle.parameters(), lr=0.01, weight_decay=0.1, fused=True),
    "foreach SGD, all parameters": lambda handle: torch.optim.SGD(
        handle.model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True
    ),
    "Adagrad": lambda handle: torch.optim.Adagrad(handle.parameters(), lr=0.01, weight_decay=0.1),
    "MaskedSGD": lambda handle: MaskedSGD(
        handle.model.named_parameters(), handle.mask, lr=0.1, momentum=0.9, weight_decay=0.1
    ),
    "MaskedAdamW": lambda handle: MaskedAdamW(handle.model.named_parameters(), handle.mask, lr=0.01),
}


@pytest.mark.parametrize("kind", ["rows", "elements", "whole and none"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_else_moves_by_a_bit(net, data, optimizer, kind):
    mask = row_mask(net, 0.4)
    if kind == "elements":
        generator = torch.Generator().manual_seed(1)
        mask = Mask.from_dense({n: torch.rand(p.shape, generator=generator) < 0.3 for n, p in net.named_parameters()})
    elif kind == "whole and none":
        mask = Mask.from_dense(
            {n: torch.full(p.shape, n.startswith(("mix", "norm"))) for n, p in net.named_parameters()}
        )
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=2)
    with delfast.compact(net, mask) as handle:
        steps = OPTIMIZERS[optimizer](handle)
        for step in range(6):
            steps.zero_grad()
            loss = cross_entropy(data)(net) * (float("inf") if step == 3 else 1)  # that step is skipped
            scaler.scale(loss).backward()
            scaler.unscale_(steps)
            nn.utils.clip_grad_norm_(handle.parameters(), 1.0)
            scaler.step(steps)
            scaler.update()
            outside, _ = all_but(mask, before, net) if step == 2 else (0, None)
            assert not outside
        saved = {name: value.clone() for name, value in net.state_dict().items()}
        assert saved.keys() == Net().state_dict().keys()
    outside, inside = all_but(mask, before, net)
    assert outside == 0 and inside
    assert all(torch.equal(saved[name], parameter) for name, parameter in net.named_parameters())


def test_a_gradient_from_before_moves_nothing(net, data):
    mask = row_mask(net, 0.4)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    cross_entropy(data)(net).backward()
    with delfast.compact(net, mask):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
        cross_entropy(data)(net).backward()  # no zero_grad before the first step
        optimizer.step()
    assert all_but(mask, before, net)[0] == 0


def test_a_masked_optimizer_of_another_mask_is_guarded_too(net, data):
    mask = row_mask(net, 0.4)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    with delfast.compact(net, mask) as handle:
        wide = full_mask(net)
        step(net, data, MaskedSGD(net.named_parameters(), wide, lr=0.1, weight_decay=0.5))
        assert wide.digest != handle.mask.digest
    assert all_but(mask, before, net)[0] == 0


def test_an_optimizer_within_an_optimizer(net, data):
    class Outer(torch.optim.SGD):
        def step(self, closure=None):
            inner.step()
            return super().step(closure)

    mask = row_mask(net, 0.4)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    with delfast.compact(net, mask) as handle:
        inner = torch.optim.SGD(handle.parameters(), lr=0.1, weight_decay=0.1)
        outer = Outer(handle.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(2):
            outer.zero_grad()
            cross_entropy(data)(net).backward()
            outer.step()
    assert all_but(mask, before, net) == (0, True)


def test_guarded_parameters_are_known_by_themselves_and_not_by_where_they_lay(net):
    with delfast.compact(net, row_mask(net, 0.4)) as handle:
        guarded = [name for name, mode in handle.modes.items() if mode == "guarded"]
        ids = {id(dict(net.named_parameters())[name]) for name in guarded}
        net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
        fresh = [nn.Parameter(torch.ones(3)) for _ in range(200)]
        assert not ids & guard._registry.guards.keys()
        others = [parameter for parameter in fresh if id(parameter) in ids]  # in the memory of the old ones
        before = [parameter.detach().clone() for parameter in others]
        for parameter in others:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(others, lr=0.1).step()
        assert all((parameter != old).all() for parameter, old in zip(others, before, strict=True))


def test_what_cannot_be_trained_by_rows_is_guarded(net, data):
    mask = row_mask(net, 0.4)

    class Own(nn.Linear):
        pass

    net.mix = Own(20, 24)
    with delfast.compact(net, mask, dense=["module.twice.weight"]) as handle:
        guarded = {name for name, mode in handle.modes.items() if mode == "guarded"}
        assert {"mix.weight", "twice.weight", "head.weight", "norm.weight"} <= guarded
        cross_entropy(data)(net).backward()
        outside = net.mix.weight.grad[~mask.parameters["mix.weight"].flags]
        assert not outside.any()
