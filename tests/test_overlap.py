"""Sets that have examples in common are refused by name, where their loaders show it."""

from __future__ import annotations

import time
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

import delfast
from delfast import InputError
from delfast.evaluation import audit
from delfast.overlap import check_disjoint

COUNT = 24
INPUTS, LABELS = torch.randn(COUNT, 4, generator=torch.Generator().manual_seed(0)), torch.arange(COUNT) % 3
DATA = TensorDataset(INPUTS, LABELS)


class Own(Dataset[Any]):
    """A data set of a user's class, which shares nothing that can be compared except itself."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, place: int) -> Any:
        return DATA[place]


OWN = Own()


def nested(base: Any, places: list[int]) -> Any:
    """A Subset of a Subset: the inner one reversed, with an index that counts from the end."""
    inner = [place - COUNT if place % 2 else place for place in reversed(range(COUNT))]
    return Subset(Subset(base, inner), [COUNT - 1 - place for place in places])


def joined(base: Any, places: list[int]) -> Any:
    """Both halves of a data set, the second first."""
    whole = ConcatDataset([Subset(base, range(COUNT // 2, COUNT)), Subset(base, range(COUNT // 2))])
    return Subset(whole, [(place + COUNT // 2) % COUNT for place in places])


def slices(_: Any, places: list[int]) -> Any:
    """Views of the tensors, a data set for each example."""
    return ConcatDataset([TensorDataset(INPUTS[i : i + 1], LABELS[i : i + 1]) for i in places])


def loaders(base: Any, places: list[int]) -> dict[str, Any]:
    """Loaders of these examples, in every form that is compared."""
    subset = Subset(base, places)
    found = {
        "subset": DataLoader(subset, batch_size=4),
        "tensor": DataLoader(Subset(base, torch.tensor(places, dtype=torch.int64)), batch_size=4),  # type: ignore[arg-type]
        "array": DataLoader(Subset(base, numpy.array(places, dtype=numpy.int64)), batch_size=4),  # type: ignore[arg-type]
        "shuffled": DataLoader(subset, batch_size=4, shuffle=bool(places)),
        "nested": DataLoader(nested(base, places), batch_size=4),
        "joined": DataLoader(joined(base, places), batch_size=4),
        "sampler": DataLoader(base, sampler=SubsetRandomSampler(places), batch_size=4),
        "list": DataLoader(base, sampler=places, batch_size=4),
        "batches": DataLoader(base, batch_sampler=[places]),
        "plain": DataLoader(base, batch_sampler=BatchSampler(SubsetRandomSampler(places), 4, False)),
        "processes": DataLoader(subset, sampler=DistributedSampler(subset, 2, 1), batch_size=4),
    }
    if base is DATA and places:
        found["slices"] = DataLoader(slices(base, places), batch_size=4)
    return found


@given(st.lists(st.integers(0, 2), min_size=COUNT, max_size=COUNT), st.data(), st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_common_example_is_found_in_every_form(owner: list[int], data: st.DataObject, own: bool) -> None:
    """Every example belongs to the first set, the second or neither; some of the first are put into both."""
    first = [place for place in range(COUNT) if owner[place] == 0]
    both = data.draw(st.lists(st.sampled_from(first), unique=True, max_size=3)) if first else []
    second = [place for place in range(COUNT) if owner[place] == 1] + both
    base = OWN if own else DATA
    forms = [loaders(base, places) for places in (first, second)]
    name, other = (data.draw(st.sampled_from(sorted(form))) for form in forms)
    sets = ({"forget": forms[0][name]}, {"retain": forms[1][other]})
    if not both:
        check_disjoint(*sets)
        return
    with pytest.raises(InputError, match=f"a retain set without examples of the forget set, got {len(both)} that both"):
        check_disjoint(*sets)


def test_examples_that_cannot_be_compared_or_differ_pass() -> None:
    relabelled = TensorDataset(INPUTS, (LABELS + 1) % 3)
    forget = DataLoader(Subset(DATA, range(4)), batch_size=4)
    for retain in (
        DataLoader(relabelled, batch_size=4),  # the same images with other labels
        DataLoader(TensorDataset(INPUTS.clone(), LABELS.clone()), batch_size=4),  # equal contents
        DataLoader(DATA, sampler=WeightedRandomSampler([0.0] * 4 + [1.0] * 20, 20), batch_size=4),
        DataLoader(OWN, batch_size=4),
        [(INPUTS, LABELS)],
        iter([(INPUTS, LABELS)]),
        None,
    ):
        check_disjoint({"forget": forget}, {"retain": retain})


@pytest.mark.parametrize("one", [[(INPUTS, LABELS)], iter([(INPUTS, LABELS)]), DataLoader(OWN)])
def test_one_object_is_no_two_sets(one: Any) -> None:
    with pytest.raises(InputError, match="a retain set without examples of the forget set, got"):
        check_disjoint({"forget": one}, {"retain": one})
    check_disjoint({"forget": [(INPUTS, LABELS)]}, {"retain": [(INPUTS, LABELS)]})
    check_disjoint({"forget": None}, {"retain": None})


@pytest.mark.parametrize("base", [DATA, OWN])
@pytest.mark.parametrize(
    "options",
    [
        {"sampler": SequentialSampler(range(4))},
        {"sampler": RandomSampler(range(4))},
        {"sampler": DistributedSampler(range(4), 2, 0)},  # type: ignore[arg-type]
        {"batch_sampler": BatchSampler(SequentialSampler(range(4)), 2, False)},
    ],
)
def test_a_sampler_draws_the_positions_of_its_own_source(base: Any, options: dict[str, Any]) -> None:
    forget = {"forget": DataLoader(base, **options)}
    check_disjoint(forget, {"retain": DataLoader(Subset(base, range(4, COUNT)))})
    with pytest.raises(InputError, match="got 1 that both have"):
        check_disjoint(forget, {"retain": DataLoader(Subset(base, range(3, COUNT)))})


@pytest.mark.parametrize("options", [{"sampler": [-1, -2]}, {"batch_sampler": [[-1], [-2]]}])
@pytest.mark.parametrize("base", [DATA, OWN])
def test_positions_that_count_from_the_end_are_found(base: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="got 2 that both have"):
        check_disjoint({"forget": DataLoader(base, **options)}, {"retain": DataLoader(Subset(base, [COUNT - 1, 22]))})


def test_many_earlier_sets_take_no_time_beside_a_large_one() -> None:
    """The large set is not sorted for each of them: that took 0.2 s for each."""
    large = TensorDataset(torch.zeros(400_000, 1))
    earlier = {str(first): DataLoader(Subset(large, range(first, first + 50))) for first in range(0, 1000, 50)}
    begin = time.process_time()
    check_disjoint(earlier, {"retain": DataLoader(large, sampler=range(1000, 400_000))})
    assert time.process_time() - begin < 1


def loader(*places: int) -> DataLoader[Any]:
    return DataLoader(Subset(DATA, places), batch_size=4)


PAIRS = [(INPUTS, LABELS)]
FORGET, RETAIN, TEST = loader(*range(4)), loader(*range(4, 16)), loader(*range(16, 24))
WHOLE = DataLoader(DATA, batch_size=4, shuffle=True)


def call(function: str, model: nn.Module, **replaced: Any) -> None:
    sets = {"forget": FORGET, "retain": RETAIN, "test": TEST, **replaced}
    if function == "evaluate":
        delfast.evaluate(model, **sets, mia=False)
    elif function == "audit":
        audit(model, **sets, relearn=None)
    else:
        options = delfast.TrainingOptions(validation=sets["test"], patience=1)
        delfast.unlearn(
            model,
            forget=sets["forget"],
            retain=sets["retain"],
            init=lambda: nn.Linear(4, 3),
            seed=1,
            epochs=1,
            lr=0.1,
            training=options,
        )


@pytest.mark.parametrize(
    ("function", "replaced", "message"),
    [
        ("unlearn", {"retain": WHOLE}, "a retain set without examples of the forget set, got 4 that both have"),
        ("unlearn", {"test": loader(1, 17)}, "a validation set without examples of the forget set, got 1 that"),
        ("evaluate", {"retain": WHOLE}, "a retain set without examples of the forget set, got 4"),
        ("evaluate", {"test": loader(3, 17)}, "a test set without examples of the forget set, got 1"),
        ("evaluate", {"test": loader(4, 17)}, "a test set without examples of the retain set, got 1"),
        ("audit", {"retain": WHOLE}, "a retain set without examples of the forget set, got 4"),
        ("audit", {"earlier": {"first": loader(5)}}, "a retain set without examples of the first set, got 1"),
        ("audit", {"control": loader(0, 16)}, "a control set without examples of the forget set, got 1"),
        ("unlearn", {"forget": PAIRS, "retain": PAIRS}, "a retain set without .* the forget set, got one object"),
        ("unlearn", {"forget": PAIRS, "test": PAIRS}, "a validation set without .* the forget set, got one object"),
        ("unlearn", {"retain": PAIRS, "test": PAIRS}, "a validation set without .* the retain set, got one object"),
        ("evaluate", {"forget": PAIRS, "retain": PAIRS}, "a retain set without .* the forget set, got one object"),
        ("evaluate", {"retain": PAIRS, "test": PAIRS}, "a test set without .* the retain set, got one object"),
        ("audit", {"forget": PAIRS, "test": PAIRS}, "a test set without .* the forget set, got one object"),
        ("audit", {"retain": PAIRS, "earlier": {"first": PAIRS}}, "a retain set without .* the first set, got one"),
    ],
)
def test_each_call_refuses_sets_that_overlap_and_changes_nothing(
    function: str, replaced: dict[str, Any], message: str
) -> None:
    model = nn.Linear(4, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        call(function, model, **replaced)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    call(function, model)
