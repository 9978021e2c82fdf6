"""Shares of a set: those that are shared out, and those that every process refuses because they are not the set."""

from __future__ import annotations

import warnings

import numpy
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

import delfast
from delfast.batches import sampler_of, tensors_of
from delfast.contents import signature_of
from delfast.errors import InputError
from delfast.joint_errors import encoded
from delfast.processes import Processes
from delfast.shares import share
from delfast.unlearning import shared_steps
from tests.distributed.spawning import error_of, run_in_processes
from tests.groups import gloo_group

SIZE = 101


def whole_set(size=SIZE):
    return TensorDataset(torch.arange(size))


class RandomFlip:
    """A transform that augments at random, by its name."""


def own_seed(rank):
    data = whole_set()
    return DataLoader(data, 7, sampler=DistributedSampler(data, shuffle=True, seed=rank))


def own_epoch(rank):
    data = whole_set()
    sampler = DistributedSampler(data, shuffle=True)
    if rank:
        sampler.set_epoch(1)
    return DataLoader(data, 7, sampler=sampler)


def own_indices(rank, size=100):
    return DataLoader(whole_set(size), 7, sampler=SubsetRandomSampler(range(rank, size, 2)))


def objects(rank):
    return DataLoader([{"text": f"{rank}"}, {"text": "b"}, {"text": "c"}])


REFUSED = {
    "own seed": (own_seed, "examples of the data set, each once, got 101 on all processes together"),
    "own epoch": (own_epoch, "examples of the data set, each once, got 101 on all processes together"),
    "own indices": (own_indices, "expected the same data set on every process"),
    "uneven indices": (lambda rank: own_indices(rank, SIZE), "expected the same data set on every process"),
    "replacement": (
        lambda rank: DataLoader(whole_set(), sampler=torch.utils.data.RandomSampler(range(SIZE), replacement=True)),
        "the loader has drop_last=True, or the sampler repeats or omits some",
    ),
    "own list": (
        lambda rank: DataLoader([(torch.tensor(rank), 0), (torch.tensor(5), 1)]), "expected the same data set"
    ),
    "own texts": (objects, "expected the same data set on every process"),
    "batches of text": (lambda rank: [[f"{rank}", "b"], ["c"]], "expected the same batches on every process"),
    "arrays": (lambda rank: [numpy.arange(3) + rank], "expected the same batches on every process"),
    "keys": (lambda rank: DataLoader({"a": 1}, sampler=["a"]), "expected a sampler of integer indices, got str"),
}  # fmt: skip


def long_arrays(rank):
    """Two processes draw batches of more indices than numpy prints, which differ in the middle alone."""
    order = numpy.arange(4000)
    if rank:
        order[[1000, 2500]] = order[[2500, 1000]]
    return DataLoader(whole_set(4000), batch_sampler=[order[:2000], order[2000:]])


def of_a_subset(rank):
    sampler = SubsetRandomSampler(range(0, SIZE, 2), generator=torch.Generator().manual_seed(rank))
    return DataLoader(whole_set(), batch_sampler=BatchSampler(sampler, 7, drop_last=False))


SHARED = {
    "long": (long_arrays, range(4000)),
    "subset": (of_a_subset, range(0, SIZE, 2)),
    "batches": (
        lambda rank: DataLoader(whole_set(), batch_sampler=BatchSampler(SequentialSampler(range(SIZE)), 7, False)),
        range(SIZE),
    ),
    "sharded": (
        lambda rank: DataLoader(whole_set(), 7, sampler=DistributedSampler(whole_set(), shuffle=True, seed=3)),
        range(SIZE),
    ),
}


def shared_of(loader):
    return share(loader, Processes(dist.group.WORLD, {}), None)


def refused(rank):
    return {name: error_of(lambda f=loader_of: shared_of(f(rank))) for name, (loader_of, _) in REFUSED.items()}


def drawn(rank):
    """Return the examples of this process's share of each loader."""
    return {
        name: [int(i) for batch in shared_of(loader_of(rank)).batches for t in tensors_of(batch) for i in t.flatten()]
        for name, (loader_of, _) in SHARED.items()
    }


def warned(rank):
    data = whole_set()
    data.transform = RandomFlip()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for sampler in (None, DistributedSampler(data)):
            shared_of(DataLoader(data, sampler=sampler))
        shared_of(DataLoader(whole_set(), sampler=DistributedSampler(data)))
    return [str(each.message) for each in found if "augments at random" in str(each.message)], len(found)


def empty(rank):
    return error_of(shared_of(DataLoader(whole_set(0))).stand_in)


def test_shares(tmp_path):
    scenarios = {"refused": refused, "drawn": drawn, "warned": warned, "empty": empty}
    results = run_in_processes(2, scenarios, tmp_path)
    for found in results:
        for name, (_, text) in REFUSED.items():
            assert found["refused"][name] is not None, name
            assert found["refused"][name][0] == "InputError" and text in found["refused"][name][1], (name, found)
        assert len(found["warned"][0]) == found["warned"][1] == 2
        assert found["empty"][0] == "InputError" and "at least one example on every process" in found["empty"][1]
    for name, (_, expected) in SHARED.items():
        assert sorted(i for found in results for i in found["drawn"][name]) == list(expected), name


def signature(dataset):
    return signature_of(DataLoader(dataset))


def test_data_sets_of_hugging_face_are_compared_by_their_rows():
    """A fingerprint is random after a function that cannot be pickled; transforms and formats may be random too."""
    datasets = pytest.importorskip("datasets", reason="datasets is missing: pip install -r requirements-dev.txt")
    datasets.disable_progress_bars()
    text = datasets.Dataset.from_dict({"text": [f"example {number}" for number in range(SIZE)]})
    no_pickle = (number for number in range(SIZE))
    one, other = (text.map(lambda row: {"size": len(row["text"]) if no_pickle else 0}) for _ in range(2))
    assert one._fingerprint != other._fingerprint
    random = other.with_transform(lambda rows: {"value": torch.rand(len(rows["text"]))})
    assert signature(one) == signature(other) == signature(random) == signature(one.with_format("torch"))
    assert signature(Subset(one, [3, 4])) == signature(Subset(other, [3, 4])) != signature(Subset(one, [3, 5]))
    for different in (one.shuffle(seed=1), one.shard(2, 0), one.remove_columns("size"), text):
        assert signature(different) != signature(one)
    assert signature(text.shard(2, 0, contiguous=True)) != signature(text.shard(2, 1, contiguous=True))
    assert signature(text.select([])) == signature(text.select([]))


# Values that a check reads


class Counted(Dataset):
    def __init__(self):
        self.loaded = []

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        self.loaded.append(index)
        return torch.rand(2)


def test_ends_are_loaded_once_and_no_generator_of_a_gpu_is_set(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the seed of the GPUs was set"))
    dataset, before = Counted(), torch.get_rng_state()
    assert signature(dataset) == signature(dataset)
    assert dataset.loaded == [0, SIZE - 1] * 2
    assert torch.equal(torch.get_rng_state(), before)


def test_shares_of_the_first_epoch_are_checked_once(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(shared_steps, "refuse_overlap", lambda loader, *_: checked.append(sampler_of(loader).epoch))
    with gloo_group(tmp_path / "store"):
        data = whole_set()
        loader = DataLoader(data, 7, sampler=DistributedSampler(data))
        processes = Processes(dist.group.WORLD, {})
        steps = shared_steps.SharedSteps("retain", processes, retain=loader, forget=())
        steps.check(torch.nn.Identity())
        for epoch in range(3):
            steps.set_epoch(epoch)
            list(steps)
    assert checked == [0, 1, 2]


class NoText(Exception):
    def __str__(self):
        raise KeyError


def test_an_error_without_a_text_reaches_the_others_by_its_name():
    assert encoded(NoText(), 1) == b"NoText (on rank 1)"


def test_a_wrapper_whose_group_was_destroyed_is_refused(tmp_path):
    network = torch.nn.Linear(2, 2)
    with gloo_group(tmp_path / "store"):
        wrapped = torch.nn.parallel.DistributedDataParallel(network)
    mask = delfast.localize(wrapped, None, 1.0, criterion="weight")
    with pytest.raises(InputError, match=r"one that was destroyed; pass model\.module"):
        delfast.reset_(wrapped, mask, "reset_parameters")
