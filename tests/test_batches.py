"""Batches of any form, and loaders that hide examples."""

from __future__ import annotations

import copy
import sys
import warnings
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator, MutableMapping
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import delfast
from delfast import InputError
from delfast.arguments import check_loader
from delfast.batches import cut, examples_in, map_tensors, split_batch, warn_about_loader
from delfast.contents import signature_of
from delfast.evaluation import kl_to_oracle, predictions
from delfast.localization import signed_channels
from delfast.unlearning.head import find_head
from tests import cases
from tests.cases import FORMS, Encoding, Pair, ReadOnly, losses_of
from tests.networks import Tokens

X, Y = cases.EIGHT
Triple = namedtuple("Triple", "ids mask labels")


# Three parts


def test_three_parts_are_index_input_and_target_only_where_the_first_is_n_integers() -> None:
    good = (torch.arange(8), torch.arange(8, dtype=torch.uint8), list(range(8)), tuple(range(8)), numpy.arange(8))
    for index in (*good, [numpy.int64(i) for i in range(8)]):
        assert split_batch((index, X, Y))[1:] == (X, Y) and split_batch([index, X, Y])[0] is index
    assert split_batch((X, Y)) == (None, X, Y)
    bad = (
        torch.arange(8)[:, None], torch.arange(7), torch.arange(8.0), torch.ones(8, dtype=torch.bool),
        torch.ones(8, dtype=torch.complex64), torch.tensor(8), list(range(7)), [0.5] * 8, [True] * 8, ["a"] * 8,
        numpy.arange(8.0), numpy.arange(16).reshape(8, 2), None, "12345678",
    )  # fmt: skip
    for index in bad:
        with pytest.raises(InputError, match=r"\(index, input, target\), the index N integers.*pass loss_fn"):
            split_batch((index, X, Y))
    for batch in (X, (X,), (X, Y, Y, Y), {"x": X}, 5, "xy"):
        with pytest.raises(InputError, match=r"expected batches \(input, target\).*pass loss_fn"):
            split_batch(batch)
    with pytest.raises(InputError, match="a tensor of targets, got list; pass loss_fn"):
        split_batch((X, Y.tolist()))


DTYPES = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16, torch.complex64)


@given(st.integers(0, 4), st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_an_index_is_one_integer_for_each_target(count: int, shape: list[int], dtype: torch.dtype) -> None:
    index, targets = torch.zeros(shape, dtype=dtype), torch.zeros(count, dtype=torch.int64)
    fits = dtype in (torch.int64, torch.int32, torch.uint8) and shape == [count]
    for form in (index, index.tolist()) if dtype is not torch.bfloat16 else (index,):
        fits_as_list = fits or (form is not index and form == [] and count == 0)  # an empty list has no type
        try:
            assert split_batch((form, X, targets))[0] is form and fits_as_list
        except InputError:
            assert not fits_as_list


def test_the_form_is_decided_without_reading_a_device() -> None:
    """Tensors on the meta device have a shape and a dtype, and no values."""
    index, inputs, targets = (t.to("meta") for t in (torch.arange(8), X, Y))
    assert split_batch((index, inputs, targets))[0] is index
    with pytest.raises(InputError, match="pass loss_fn"):
        split_batch((inputs, inputs, targets))


def test_tokens_mask_and_labels_are_refused_at_every_entry() -> None:
    ids, labels = torch.arange(20).reshape(4, 5) % 11, torch.arange(4) % 3
    batch, model = (ids, torch.ones_like(ids), labels), Tokens()
    good = [(ids, labels)]
    mask = delfast.localize(model, good)
    before = copy.deepcopy(model.state_dict())
    init: Any = {"init": Tokens, "epochs": 1}
    calls: dict[str, Callable[[], object]] = {
        "score": lambda: delfast.score(model, [batch]),
        "per example": lambda: delfast.score(model, [batch], per_example=True),
        "localize": lambda: delfast.localize(model, [batch]),
        "anytime": lambda: delfast.localize(model, list(zip(*batch, strict=True)), stop_when_stable=0.9),
        "signed_channels": lambda: signed_channels(model, [batch]),
        "critmem": lambda: delfast.critmem(model, [batch]),
        "evaluate": lambda: delfast.evaluate(model, good, [batch], [*good], mia=False),
        "predictions": lambda: predictions(model, [batch]),
        "kl_to_oracle": lambda: kl_to_oracle(model, Tokens(), [batch]),
        "find_head": lambda: find_head(model, batch),
        "unlearn, localizes": lambda: delfast.unlearn(model, forget=[batch], retain=good, **init),
        "unlearn, trains": lambda: delfast.unlearn(model, mask=mask, retain=[batch], **init),
        "scrub": lambda: delfast.unlearn(model, forget=[batch], retain=good, method="scrub", epochs=1),
        "ssd": lambda: delfast.unlearn(model, forget=[batch], retain=good, method="ssd"),
        "influence": lambda: delfast.unlearn(model, forget=[batch], retain=good, method="influence"),
    }
    for name, call in calls.items():
        with pytest.raises(
            InputError, match=r"the index N integers.*int64 \(4, 5\) for targets \(4,\); drop the first"
        ):
            call()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), name


def test_an_index_as_a_list_is_left_out_where_examples_are_taken_alone() -> None:
    """Four of the eight examples make the trial: a list of eight would no longer fit."""
    model = cases.SmallNet().eval()
    expected = signed_channels(model, [(X, Y)])
    for index in (list(range(3, 11)), torch.arange(3, 11)):
        found = signed_channels(model, [(index, X, Y)])
        numpy.testing.assert_array_equal(found.matrix, expected.matrix)
        assert found.examples.tolist() == list(range(3, 11))
        assert [e.example for e in delfast.critmem(model, [(index, X, Y)]).examples] == list(range(3, 11))
    assert examples_in({"input_ids": Y[:2, None], "labels": Y[:2, None]}, None) == 2
    assert examples_in(([1, 2], X[:2], Y[:2]), None) == 2 and len(cut(([1, 2], X[:2], Y[:2]), [0], None)[0]) == 1


# Other forms, with a loss_fn


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_example", [False, True])
def test_batches_of_any_form_give_the_mask_of_pairs(form: str, per_example: bool) -> None:
    batch, loss_fn = FORMS[form]
    model = cases.SmallNet()
    expected = delfast.localize(model, [(X, Y)], per_example=per_example).digest
    assert delfast.localize(model, [batch], loss_fn=loss_fn, per_example=per_example).digest == expected


def test_every_tensor_moves_and_everything_keeps_its_type() -> None:
    """The meta device stands for a GPU: what is moved there is seen by its device."""
    packed = pack_sequence([torch.ones(1, 2), torch.ones(3, 2)], enforce_sorted=False)
    encoding, listed = Encoding({"x": X}, ["a"]), type("Listed", (list,), {})([X])
    listed.note = 5
    batch = (Pair(X, {"y": [Y]}), encoding, ReadOnly({"x": X}), OrderedDict(x=X), listed, packed, torch.Size([2]), 3)
    moved = delfast.batches.move(batch, torch.device("meta"))
    pair, new, mapping, ordered, same_list, sequence, size, number = moved
    assert type(pair) is Pair and pair.image.is_meta and pair.label["y"][0].is_meta
    assert type(new) is Encoding and new["x"].is_meta and new.tokens == ["a"] and not encoding["x"].is_meta
    assert mapping["x"].is_meta and type(ordered) is OrderedDict and ordered["x"].is_meta
    assert type(same_list) is type(listed) and same_list.note == 5 and same_list[0].is_meta and not X.is_meta
    assert type(sequence) is PackedSequence and sequence.data.is_meta and not sequence.batch_sizes.is_meta
    assert size == torch.Size([2]) and number == 3 and batch[0].image is X
    back = map_tensors(packed, lambda t: t)
    assert torch.equal(back.data, packed.data) and torch.equal(back.unsorted_indices, packed.unsorted_indices)


@pytest.mark.slow
def test_transformers_batch_encoding() -> None:
    transformers = pytest.importorskip("transformers")
    ids, labels = torch.arange(20).reshape(4, 5) % 11, torch.arange(4) % 3
    batch = transformers.BatchEncoding({"input_ids": ids, "labels": labels})
    loss_fn = losses_of(lambda b: b.input_ids, lambda b: b.labels)
    model = Tokens()
    assert delfast.localize(model, [batch], loss_fn=loss_fn).digest == delfast.localize(model, [(ids, labels)]).digest
    assert type(delfast.batches.move(batch, torch.device("meta"))) is transformers.BatchEncoding
    assert not batch["input_ids"].is_meta


class Inner(MutableMapping):  # type: ignore[type-arg]
    """A mapping whose copies share its data."""

    def __init__(self, **data: Any) -> None:
        self.data = data

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.data[key] = value

    def __delitem__(self, key: str) -> None:
        del self.data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)


def test_the_callers_batch_stays_as_it_is() -> None:
    for kind in (Inner, dict, UserDict, list, tuple):
        x, y = X.clone(), Y.clone()
        batch: Any = kind((x, y)) if kind in (list, tuple) else kind(x=x, y=y)
        keys = range(2) if kind in (list, tuple) else "xy"
        changed = map_tensors(batch, lambda t: t + 1)
        assert type(changed) is (dict if kind is Inner else kind)
        assert [batch[key] is value for key, value in zip(keys, (x, y), strict=True)] == [True, True], kind
        assert all(torch.equal(changed[key], value + 1) for key, value in zip(keys, (x, y), strict=True))
    model = cases.SmallNet()
    loader = [Inner(x=X[:4], y=Y[:4]), Inner(x=X[4:], y=Y[4:])]
    losses = losses_of(lambda b: b["x"], lambda b: b["y"])
    for per_example in (False, True):
        found = delfast.localize(model, loader, loss_fn=losses, per_example=per_example)
        assert found.digest == delfast.localize(model, [(X[:4], Y[:4]), (X[4:], Y[4:])], per_example=per_example).digest


# Loaders


def test_samplers_that_repeat_or_leave_out_draw_a_warning() -> None:
    dataset = TensorDataset(X, Y)

    class Half(Sampler[int]):
        def __init__(self) -> None:
            pass

        def __iter__(self) -> Any:
            return iter(range(4))

        def __len__(self) -> int:
            return 4

    weighted = WeightedRandomSampler([1.0] * 8, 8)
    for sampler, message in (
        (weighted, r"replacement \(WeightedRandomSampler\)"),
        (WeightedRandomSampler([1.0] * 8, 5, replacement=False), r"draws 5 of .* 8 examples \(WeightedRandomSampler"),
        (RandomSampler(dataset, replacement=True), r"replacement \(RandomSampler\)"),
        (RandomSampler(dataset, num_samples=3), r"draws 3 of .* 8 examples"),
        (RandomSampler(dataset, num_samples=20), r"draws 20 of .* 8 examples"),
        (SubsetRandomSampler([0, 1, 1, 4]), r"draws 4 of .* 8 examples \(SubsetRandomSampler\)"),
        (DistributedSampler(dataset, num_replicas=2, rank=0), r"draws 4 of .* 8 examples \(DistributedSampler\)"),
        (Half(), r"draws 4 of .* 8 examples \(Half\)"),
    ):
        alone = DataLoader(dataset, batch_size=3, sampler=sampler)
        batched = DataLoader(dataset, batch_sampler=BatchSampler(sampler, 3, drop_last=False))
        for loader in (alone, batched):
            with pytest.warns(UserWarning, match=f"the forget set's loader {'.*'}{message}"):
                warn_about_loader(loader, "forget set")
    model = cases.SmallNet()
    for call in (delfast.score, delfast.localize, delfast.critmem, signed_channels):
        with pytest.warns(UserWarning, match="replacement"):
            call(model, DataLoader(dataset, sampler=weighted))  # type: ignore[operator]
    with pytest.warns(UserWarning, match="drops its last short batch"):
        warn_about_loader(DataLoader(dataset, batch_sampler=BatchSampler(range(8), 3, drop_last=True)), "forget set")


def test_samplers_that_give_each_example_once_draw_none() -> None:
    dataset = TensorDataset(X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loader in (
            DataLoader(dataset, batch_size=3),
            DataLoader(dataset, batch_size=3, shuffle=True),
            DataLoader(dataset, batch_sampler=BatchSampler(SequentialSampler(dataset), 3, drop_last=False)),
            DataLoader(dataset, batch_sampler=[[0, 1], [2, 3]]),
            DataLoader(dataset, batch_size=None),
            DataLoader(dataset, batch_size=3, sampler=SubsetRandomSampler(range(5))),  # as Subset chooses
            DataLoader(dataset, batch_size=3, sampler=SubsetRandomSampler(torch.tensor([4, 1]))),  # type: ignore[arg-type]
            [(X, Y)],
            iter([(X, Y)]),
        ):
            warn_about_loader(loader, "forget set")


# Data sets in place of loaders


class Stream(IterableDataset[Any]):
    """A data set that yields batches."""

    def __iter__(self) -> Iterator[Any]:
        return iter([(X, Y)])


@pytest.mark.parametrize("has_class", [True, False])
def test_a_users_own_module_datasets_is_not_hugging_faces(monkeypatch: pytest.MonkeyPatch, has_class: bool) -> None:
    module = ModuleType("datasets")
    if has_class:
        module.Dataset = Dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.delitem(sys.modules, "datasets.arrow_dataset", raising=False)
    for loader in ([(X, Y)], Stream()):
        check_loader(loader, "loader")
    assert signature_of(DataLoader(TensorDataset(X, Y))).startswith("TensorDataset of 8; torch.float32")


class Chunks(Dataset[Any]):
    """A data set whose items are batches."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, place: int) -> Any:
        return X.flatten(1)[4 * place : 4 * place + 4], Y[4 * place : 4 * place + 4]


def test_a_data_set_of_whole_batches_is_refused_with_the_loader_that_works() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(X[0].numel(), 8), torch.nn.ReLU(), torch.nn.Linear(8, 7))
    flat = TensorDataset(X.flatten(1), Y)
    with pytest.raises(InputError, match=r"got the data set Chunks; pass .*DataLoader of it, with batch_size=None if"):
        delfast.localize(model, Chunks())
    found = [
        delfast.localize(model, loader, budget=0.3).digest
        for loader in (DataLoader(Chunks(), batch_size=None), DataLoader(flat, batch_size=4))
    ]
    assert found[0] == found[1]
