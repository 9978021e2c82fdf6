"""Scores of 0: a mask of units that all score 0 is refused; a mask with some of them draws a warning."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import delfast
from delfast import InputError, Mask
from delfast.localization import Granularity, Scores
from delfast.ops import BACKEND
from tests import cases

GRANULARITIES: tuple[Granularity, ...] = ("channel", "param")


def known_by_heart() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network whose softmax is exactly 1 at the label of every example."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    images = torch.randn(20, 6, generator=generator)
    with torch.no_grad():
        model[2].weight *= 1e5
        labels = model(images).argmax(dim=1)
    return model, images, labels


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_a_set_known_by_heart_is_refused(granularity: Granularity, budget: float) -> None:
    model, images, labels = known_by_heart()
    for criterion in ("weighted_grad", "grad"):
        for per_example in (False, True):
            with pytest.raises(InputError, match=r"that scores above 0 .* every gradient of the set is zero") as caught:
                delfast.localize(
                    model, [(images, labels)], budget, criterion=criterion, granularity=granularity,
                    per_example=per_example,
                )  # fmt: skip
            assert "\n" not in str(caught.value)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(InputError, match="that scores above 0 by 'weight', got 0 for all"):
        delfast.score(model, criterion="weight").select(budget, granularity)


def test_critmem_of_a_network_that_is_always_wrong_is_refused() -> None:
    model = cases.SmallNet().eval()
    batches = [(images, (model(images).argmax(dim=1) + 1) % 3) for images, _ in cases.image_batches(12)]
    with pytest.raises(InputError, match="by 'critmem', got 0 for all: the network gets no example right"):
        delfast.localize(model, batches, criterion="critmem")


def warned(select: Callable[[], Mask]) -> tuple[Mask, list[tuple[int, int]]]:
    """Return the mask, and for every warning how many units score 0 of how many selected."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mask = select()
    texts = [str(each.message) for each in caught]
    assert all("score 0" in text and each.filename == __file__ for text, each in zip(texts, caught, strict=True)), texts
    return mask, [(int(text.split()[0]), int(text.split()[3])) for text in texts]


@given(
    st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3), min_size=1, max_size=5),
    st.floats(0.05, 1.0),
    st.floats(0.0, 1.0),
    st.sampled_from(["weighted_grad", "grad", "weight"]),
    st.sampled_from([("channel", "whole"), ("channel", "exact"), ("param", "whole")]),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_number_of_zeros_is_that_of_a_count(
    shapes: list[list[int]], budget: float, dead: float, criterion: Any, how: Any, transposed: bool, seed: int
) -> None:
    """Gradients with any share of zero rows and zero elements."""
    generator = torch.Generator().manual_seed(seed)
    parameters, gradients = {}, {}
    for number, shape in enumerate(shapes):
        alive = (torch.rand(shape, generator=generator) > dead) & (
            torch.rand(shape[:1], generator=generator) > dead
        ).view(-1, *[1] * (len(shape) - 1))
        values = [torch.randn(shape, generator=generator), torch.randn(shape, generator=generator) * alive]
        if criterion == "weight":
            values.reverse()
        if transposed and len(shape) > 1:
            values = [value.transpose(0, 1).contiguous().transpose(0, 1) for value in values]
        parameters[f"p{number}"], gradients[f"p{number}"] = values
    granularity, policy = how
    scores = Scores(parameters, None if criterion == "weight" else gradients, criterion, 1)
    try:
        mask, found = warned(lambda: scores.select(budget, granularity, policy=policy))
    except InputError as error:
        units = scores.channel_scores() if granularity == "channel" else torch.zeros(0)
        assert "above 0" not in str(error) or not units.any()
        assert "above 0" in str(error) or "budget that holds" in str(error) or not scores.total
        return
    zeros = selected = at = 0
    units = scores.channel_scores()
    for name, part in mask.parameters.items():
        value = {"weight": parameters, "grad": gradients}.get(criterion, {})
        each = value[name].abs() if value else (parameters[name] * gradients[name]).abs()
        if granularity == "channel":
            rows = part.dense().flatten(1).any(dim=1) if len(part.shape) > 1 else part.flags
            rows = rows if part.numel else rows[:0]
            zeros += int((units[at : at + len(rows)][rows] == 0).sum())
            selected += int(rows.sum())
            at += len(rows)
        else:
            zeros += int((each[part.dense()] == 0).sum())
            selected += part.selected
    assert found == ([(zeros, selected)] if zeros else [])


def test_a_large_parameter_of_zeros_does_not_hide_the_others() -> None:
    """Unused embedding rows: the sample of the largest parameters sees zeros only, the count is still exact."""
    table, head = torch.randn(40_000, 4), torch.randn(9, 4)
    gradients = {"table": torch.zeros(40_000, 4), "head": torch.randn(9, 4)}
    gradients["table"][:5] = 1.0
    scores = Scores({"table": table, "head": head}, gradients, "weighted_grad", 1)
    _, found = warned(lambda: scores.select(50 / scores.total, "param"))
    assert found == []
    _, found = warned(lambda: scores.select(100 / scores.total, "param"))
    assert found == [(100 - 20 - 36, 100)]
    _, found = warned(lambda: scores.select(100 / scores.total))
    assert found == [(25 - 5 - 9, 25)]


def test_dead_units_unused_rows_and_a_full_budget_go_on_working() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 4), nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[2].bias[1] = -1e3  # a unit that is never active
    batches = [(torch.randint(0, 10, (8, 3)), torch.randint(0, 3, (8,))) for _ in range(2)]
    scores = delfast.score(model, batches)
    units = scores.channel_scores()
    live = int((units > 0).sum())
    assert live < len(units) - 40
    small, found = warned(lambda: scores.select(0.1))
    assert found == [] and small.selected
    whole, found = warned(lambda: scores.select(1.0))
    assert found == [(len(units) - live, len(units))] and whole.selected == whole.total
    whole, found = warned(lambda: scores.select(1.0, "param"))
    assert len(found) == 1 and whole.selected == whole.total and found[0][1] == whole.total
    assert warned(lambda: delfast.score(model, criterion="random").select(1.0))[1] == []
    assert warned(lambda: delfast.score(model, criterion="random").select(1.0, "param"))[1] == []


def test_localization_until_stable_warns_once_and_goes_past_batches_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, labels = known_by_heart()
    data = TensorDataset(images, labels)
    with pytest.raises(InputError, match="got 0 for all"):
        delfast.localize(model, data, 0.3, stop_when_stable=0.5, batch_size=2)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    labels = labels.clone()
    labels[order[8:]] = (labels[order[8:]] + 1) % 3  # the first two masks, of 4 and 8 examples, are of zeros alone
    data = TensorDataset(images, labels)
    mask = delfast.localize(model, data, 0.3, stop_when_stable=0.5, batch_size=4)
    assert mask.metadata["examples"] > 8
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        delfast.localize(model, data, 1.0, stop_when_stable=1.0, batch_size=4)
    assert len([each for each in caught if "score 0" in str(each.message)]) <= 1


@pytest.mark.skipif(BACKEND.module is None, reason="the PyTorch references of the ops read for themselves")
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("policy", ["whole", "exact"])
def test_selecting_reads_the_device_once(
    granularity: Granularity, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = delfast.score(cases.SmallNet(), cases.image_batches(12))
    reads: list[str] = []
    for name in ("item", "tolist", "__int__", "__bool__", "__float__", "__index__", "numpy", "cpu", "nonzero"):
        original = getattr(torch.Tensor, name)

        def counted(self: Any, *arguments: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            reads.append(name)
            return original(self, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, counted)
    scores.select(0.3, granularity, policy=policy)
    assert reads == ["tolist"]


@pytest.mark.parametrize("criterion", ["weighted_grad", "random", "critmem", "shallowest", "weight"])
def test_copies_of_scores_go_on_selecting(criterion: Any) -> None:
    torch.manual_seed(0)
    model = cases.SmallNet()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0)  # versions above 0
    batches = cases.image_batches(12)
    if criterion == "critmem":  # which needs examples that the network gets right
        batches = [(images, model(images).argmax(dim=1)) for images, _ in batches]
    scores = delfast.score(model, batches, criterion)
    expected = scores.select(0.5).digest
    copies = [copy.deepcopy(scores), pickle.loads(pickle.dumps(scores)), copy.copy(scores)]
    copies += [copy.deepcopy(copies[1]), copy.deepcopy({"model": model, "scores": scores})["scores"]]
    for each in copies:
        assert each.select(0.5).digest == expected
    with torch.no_grad():
        copies[0].parameters["head.weight"].add_(1)
        next(model.parameters()).add_(1)
    for each in (copies[0], scores, copies[2], copy.deepcopy(scores), pickle.loads(pickle.dumps(copies[0]))):
        with pytest.raises(InputError, match="has changed since it was scored"):
            each.select(0.5)
    assert copies[1].select(0.5).digest == expected  # its parameters are its own


@pytest.mark.parametrize("settings", [{}, {"stop_when_stable": 0.5, "batch_size": 2}])
def test_localize_warns_of_its_callers_line(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].bias[:2] = -100.0  # two channels of the first layer are dead
    data = torch.utils.data.TensorDataset(torch.randn(8, 2), torch.arange(8) % 3)
    loader = data if settings else torch.utils.data.DataLoader(data, 4)
    _, found = warned(lambda: delfast.localize(model, loader, budget=1.0, **settings))
    assert found
