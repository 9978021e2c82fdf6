"""Networks that keep computed tensors: copied where a copy is needed, refused where a copy is not enough."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import delfast
from delfast import InputError, TrainingOptions
from delfast.copies import copy_of
from tests import cases

NORMS = [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm]
pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")


def network(norm: Callable[..., Any]) -> nn.Module:
    """Its first layer's weight is computed by a hook, and kept by the module; a pass with gradients has been made."""
    model = nn.Sequential(norm(nn.Conv2d(3, 6, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    model.zero_grad()
    assert not model[0].weight.is_leaf
    return model


@pytest.mark.parametrize("norm", NORMS)
def test_a_copy_computes_the_same_by_weights_of_its_own(norm: Callable[..., Any]) -> None:
    model = network(norm).eval()
    copied, x = copy_of(model), torch.randn(2, 3, 8, 8)
    assert torch.equal(copied(x), model(x))
    own = {id(p) for p in model.parameters()}
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), model.parameters(), strict=True))
    assert not own & {id(p) for p in copied.parameters()}
    expected = model(x)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
    assert torch.equal(model(x), expected) and not torch.equal(copied(x), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_scrub_has_its_teacher(norm: Callable[..., Any]) -> None:
    model, batches = network(norm), cases.image_batches()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    delfast.unlearn(model, forget=batches[:1], retain=batches[1:], method="scrub", epochs=1, lr=0.1)
    assert all(bool((p != before[name]).any()) for name, p in model.named_parameters())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("entry", ["reset_", "unlearn"])
def test_reset_parameters_that_would_not_reset_them_is_refused(norm: Callable[..., Any], entry: str) -> None:
    model, batches = network(norm), cases.image_batches()
    mask = delfast.score(model, criterion="weight").select(1.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"reset_parameters\(\) of the Conv2d to reset '0.weight_\w+', it does not"):
        if entry == "reset_":
            delfast.reset_(model, mask, "reset_parameters")
        else:
            frozen = TrainingOptions(batchnorm="frozen")
            delfast.unlearn(model, retain=batches, mask=mask, init="reset_parameters", training=frozen)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Partial(nn.Module):
    """A layer whose reset_parameters() resets the weight and not the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.ones(4))

    def reset_parameters(self) -> None:
        self.weight.data.uniform_(-1, 1)


def test_a_module_that_resets_a_part_of_itself() -> None:
    model = nn.Sequential(Partial())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def mask_of(*names: str) -> delfast.Mask:
        return delfast.Mask.from_dense({n: torch.full(p.shape, n in names) for n, p in model.named_parameters()})

    with pytest.raises(InputError, match=r"of the Partial to reset '0.scale', it does not"):
        delfast.reset_(model, mask_of("0.weight", "0.scale"), "reset_parameters")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    delfast.reset_(model, mask_of("0.weight"), "reset_parameters", seed=3)
    torch.manual_seed(3)
    assert torch.equal(model[0].weight, torch.empty(4, 3).uniform_(-1, 1))


class Keeps(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.head, self.kept = nn.Linear(3, 10), [what]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.mean((2, 3)))


@pytest.mark.parametrize("what", [torch.ones(1, requires_grad=True) * 2, threading.Lock()], ids=["computed", "lock"])
def test_what_cannot_be_copied_is_named_in_one_line(what: Any) -> None:
    model, batches = Keeps(what), cases.image_batches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        InputError, match=r"copy.deepcopy can copy, got one that it cannot \(.*\); delete attr"
    ) as raised:
        delfast.unlearn(model, forget=batches, retain=[*batches], method="scrub", epochs=1)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
