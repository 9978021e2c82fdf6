"""Anytime localization of data sets of any kind, and of loaders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

import delfast
from delfast import InputError
from tests import cases
from tests.cases import by_key

X, Y = cases.EIGHT


class Items:
    """A data set that is no torch Dataset."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        return X[i], Y[i]


class Dicts(Items, Dataset):  # type: ignore[type-arg]
    def __getitem__(self, i: int) -> Any:
        return {"image": X[i], "label": Y[i]}


def paired(items: list[Any]) -> Any:
    return torch.stack([item["image"] for item in items]), torch.stack([item["label"] for item in items])


def test_anytime_localization_of_data_sets_of_any_kind() -> None:
    model = cases.SmallNet()
    expected = delfast.localize(model, TensorDataset(X, Y), stop_when_stable=1.0, batch_size=2)
    listed = list(zip(X, Y, strict=True))
    for data in (Items(), listed, tuple(listed), Subset(TensorDataset(X, Y), range(8)), Subset(listed, range(8))):
        found = delfast.localize(model, data, stop_when_stable=1.0, batch_size=2)
        assert found.digest == expected.digest and found.metadata == expected.metadata
    for loader in (
        DataLoader(TensorDataset(X, Y), batch_size=2),
        DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True, drop_last=True),
        DataLoader(Dicts(), batch_size=2, collate_fn=paired),
        DataLoader(Dicts(), batch_size=2, collate_fn=paired, num_workers=1),
    ):
        found = delfast.localize(model, loader, stop_when_stable=1.0)
        assert found.digest == expected.digest and found.metadata == expected.metadata
    assert delfast.localize(
        model, DataLoader(Dicts(), batch_size=3, collate_fn=paired), stop_when_stable=1.0, batch_size=2
    ).digest == expected.digest  # fmt: skip


@pytest.mark.slow
def test_anytime_localization_of_a_hugging_face_data_set() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"image": X.tolist(), "label": Y.tolist()}).with_format("torch")
    model = cases.SmallNet()
    expected = delfast.localize(model, TensorDataset(X, Y), stop_when_stable=1.0, batch_size=2)
    assert delfast.localize(model, data, stop_when_stable=1.0, batch_size=2, loss_fn=by_key).digest == expected.digest
    loader = DataLoader(data, batch_size=2, collate_fn=paired)
    assert delfast.localize(model, loader, stop_when_stable=1.0).digest == expected.digest


def test_anytime_localization_leaves_torchs_generator_alone_and_takes_no_example_twice() -> None:
    taken: list[int] = []

    class Seen(Items):
        def __getitem__(self, i: int) -> Any:
            taken.append(i)
            return X[i], Y[i]

    def all_but_the_first(items: list[Any]) -> Any:
        images, labels = zip(*items, strict=True)
        return torch.stack(images)[1:], torch.stack(labels)[1:]

    loader = DataLoader(Seen(), batch_size=2, collate_fn=all_but_the_first)  # type: ignore[arg-type]
    model = cases.SmallNet()
    before = torch.get_rng_state()
    mask = delfast.localize(model, loader, stop_when_stable=1.0)
    assert sorted(taken) == list(range(8)) and mask.metadata["examples"] == 4
    assert torch.equal(before, torch.get_rng_state())


def test_anytime_localization_refuses_loaders_that_choose_examples() -> None:
    dataset, model = TensorDataset(X, Y), cases.SmallNet()
    for loader, message in (
        (DataLoader(dataset, sampler=WeightedRandomSampler([1.0] * 8, 8)), "draws with replacement"),
        (DataLoader(dataset, sampler=SubsetRandomSampler(range(5))), "draws 5 of its data set's 8 examples"),
        (DataLoader(dataset, batch_sampler=[[0, 1], [2, 3]]), "has no batch_size"),
        (DataLoader(dataset, batch_size=None), "has no batch_size"),
    ):
        with pytest.raises(InputError, match=rf"each example once for stop_when_stable, got one that {message}"):
            delfast.localize(model, loader, stop_when_stable=0.9)
    for data in (5, "ab", {"x": X}, iter([(X, Y)]), None):
        with pytest.raises(InputError, match="map-style Dataset for stop_when_stable, got"):
            delfast.localize(model, data, stop_when_stable=0.9)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a data set of examples for stop_when_stable, got a list of batches"):
        delfast.localize(model, [(X, Y), (X, Y)], stop_when_stable=0.9)
