"""Relearning of a network that has the answer behind a wrong bias, and of networks that never saw it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from delfast.evaluation import Audit, Reference, Relearning, RelearningCurve, audit
from delfast.evaluation.relearning import Course, _counted, curve_of

INPUTS, CLASSES = 40, 5
SETTINGS = Relearning(steps=40, lr=0.02, batch_size=20, every=10)


def examples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random labels: an example tells nothing about another, so that all there is to know is memory."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, INPUTS, generator=generator), torch.randint(CLASSES, (count,), generator=generator)


def fitted(sets: list[tuple[Tensor, Tensor]], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, CLASSES))
    inputs, targets = (torch.cat(column) for column in zip(*sets, strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for _ in range(80):
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model


class Lab:
    """Forget, retain and test sets, and networks with and without the forget set."""

    def __init__(self) -> None:
        self.forget, self.retain, self.test = examples(60, 0), examples(150, 1), examples(100, 2)
        self.original = fitted([self.forget, self.retain], 0)
        self.never_seen = [fitted([self.retain], seed) for seed in range(1, 5)]

    def audit(self, model: nn.Module, never_seen: Any, settings: Relearning = SETTINGS, **arguments: Any) -> Audit:
        sets = {"forget": [self.forget], "retain": [self.retain], "test": [self.test]}
        return audit(model, **sets, never_seen=never_seen, relearn=settings, **arguments)  # type: ignore[arg-type]

    def hidden(self) -> nn.Module:
        """Change the bias of the last layer alone: nearly all is called the first class."""
        model = copy.deepcopy(self.original)
        with torch.no_grad():
            model[3].bias[0] += 12
        return model


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab()


def test_one_example_is_named_in_the_singular() -> None:
    assert _counted(1) == "1 forget example is" and _counted(60) == "60 forget examples are"


def curves(found: Audit) -> dict[str, RelearningCurve]:
    return {name: curve for name, curve in found.relearning.items() if isinstance(curve, RelearningCurve)}


def test_what_is_hidden_comes_back_and_what_was_never_there_does_not(lab: Lab) -> None:
    hidden = lab.audit(lab.hidden(), lab.never_seen)
    assert hidden.sets["forget"].accuracy is not None and hidden.sets["forget"].accuracy.value < 35
    for curve in curves(hidden).values():
        assert curve.accuracy is not None and curve.accuracy[0] < 35 and curve.accuracy[-1] > 80
        assert all(control[-1] < 50 for control in curve.control)
    assert hidden.relearn_ratio is not None and hidden.relearn_ratio.low is not None
    assert hidden.relearn_ratio.value > 20 and hidden.relearn_ratio.low > 5
    assert hidden.relearning["forget 1 %"] == "1 % of 60 forget examples are less than one example"


def test_what_was_not_unlearned_is_found_too(lab: Lab) -> None:
    ratio = lab.audit(lab.original, lab.never_seen).relearn_ratio
    assert ratio is not None and ratio.low is not None and ratio.low > 5


@pytest.mark.long
def test_a_network_that_never_saw_it_has_1_in_its_interval(lab: Lab) -> None:
    for k, network in enumerate(lab.never_seen):
        found = lab.audit(network, [other for other in lab.never_seen if other is not network])
        for curve in curves(found).values():
            assert curve.ratio is not None and curve.ratio.low is not None and curve.ratio.high is not None, k
            assert curve.ratio.low < 1 < curve.ratio.high and curve.ratio.value < 3
    # beside itself the ratio is 1, to the bit
    same = lab.audit(lab.never_seen[0], [lab.never_seen[0]]).relearn_ratio
    assert same is not None and same.value == 1 and same.low is not None and same.low < 1


@pytest.mark.long
def test_references_are_compared_on_what_they_did_not_know(lab: Lab) -> None:
    """Each reference was trained on half of the forget examples: it knows these, and they do not count."""
    inputs, targets = lab.forget
    references = []
    for seed in range(4):
        knew = torch.rand(60, generator=torch.Generator().manual_seed(seed)) < 0.5
        references.append(Reference(fitted([(inputs[knew], targets[knew]), lab.retain], seed), {"forget": knew}))
    found = lab.audit(lab.hidden(), None, references=references)
    assert found.relearn_ratio is not None and found.relearn_ratio.low is not None and found.relearn_ratio.low > 2
    oracle = lab.audit(lab.never_seen[0], None, references=references).relearn_ratio
    assert oracle is not None and oracle.low is not None and oracle.low < 1 and oracle.value < 3
    curve = found.relearning["retain"]
    assert isinstance(curve, RelearningCurve) and all(control[0] < 50 for control in curve.control)


def test_the_forget_examples_that_are_trained_on_are_not_measured(lab: Lab) -> None:
    """All measured ones have a label that no trained one has: nobody can learn them from these."""
    settings = Relearning(steps=5, lr=0.05, batch_size=20, every=5, fractions=(0.5,), max_examples=10)
    curve = lab.audit(lab.never_seen[0], [lab.never_seen[1]], settings).relearning["forget 50 %"]
    assert isinstance(curve, RelearningCurve) and (curve.trained_on, curve.measured) == (30, 10)
    more = Relearning(steps=120, lr=0.1, batch_size=60, every=120, fractions=(0.5,))
    curve = lab.audit(lab.never_seen[0], [lab.never_seen[1]], more).relearning["forget 50 %"]
    assert isinstance(curve, RelearningCurve) and curve.accuracy is not None
    assert curve.measured == 30 and curve.accuracy[-1] < 60  # those that were trained on are known by then


def test_a_finetuning_that_diverges_is_left_out_by_name(lab: Lab) -> None:
    found = lab.audit(lab.original, lab.never_seen, Relearning(steps=30, lr=1e20, batch_size=20, every=10))
    reason = found.relearning["retain"]
    assert isinstance(reason, str) and reason.startswith("finetuning the model with lr 1e+20 diverged in step")
    assert found.relearn_ratio is None


def test_a_network_that_is_worse_in_general_has_an_advantage_below_1() -> None:
    right = (torch.arange(100) < 50).double()
    everywhere = torch.ones(100, dtype=torch.bool)
    worse, better = (
        Course(right.expand(2, -1), right.expand(2, -1), (torch.arange(100) < count).double(), everywhere)
        for count in (50, 90)
    )
    found = curve_of([worse, better, better], 0, Relearning(steps=1))
    assert isinstance(found, RelearningCurve) and found.advantage is not None and found.ratio is not None
    assert found.advantage.value == pytest.approx(50.5 / 50.5 / (90.5 / 10.5))
    assert found.advantage.high is not None and found.advantage.high < 1
    assert found.ratio.value == 1, "a disadvantage is not added"
