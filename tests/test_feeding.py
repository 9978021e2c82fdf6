"""Batches for a device: read by index or copied there, they are the loader's own, drawn in the same order."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import delfast
from delfast import InputError, feeding
from delfast.batches import Indexed, cut, detached, examples_in, map_tensors, move, plain, split_batch
from delfast.evaluation import kl_to_oracle, outputs, predictions
from delfast.experiments.datasets import Batches, Examples
from delfast.feeding import Feed, feed, fits
from delfast.localization import critical_channels, critmem, gradient, signed_channels
from delfast.localization.per_example import channels
from delfast.unlearning import loop, one_shot, steps, train
from delfast.unlearning.loaders import generators, set_epoch
from tests.conftest import seed_all

CPU = torch.device("cpu")
COLUMNS: list[Callable[[int], Tensor]] = [
    lambda n: torch.randint(0, 256, (n, 3, 2, 2), dtype=torch.uint8),
    lambda n: torch.randn(n, 4).to(torch.bfloat16),
    lambda n: torch.randn(3, n).T,  # strides of a transpose
    lambda n: torch.randn(n, 2, 2, 3).movedim(-1, 1),
    lambda n: torch.randint(0, 3, (n,)),
    lambda n: torch.randint(0, 2, (n, 1)).bool(),
    lambda n: torch.randn(1, 2).expand(n, 2),
    lambda n: torch.randn(n, 0),
]


def indexed(loader: Iterable[Any]) -> Feed:
    """Feed a loader on the CPU as on a CUDA device whose memory holds the examples."""
    found = feed(loader, CPU, resident=True)
    assert isinstance(found, Feed)
    return found


@contextmanager
def as_copies() -> Iterator[None]:
    """Take no tensor to be on the device yet, so that the examples are copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feeding, "_is_on", lambda tensor, device: False)
        yield


def states(loader: Any) -> list[Any]:
    """Return the states of the global generators and of the loader's own."""
    own = [generator.get_state().tolist() for generator in generators([loader])]
    return [torch.get_rng_state().tolist(), str(numpy.random.get_state()), random.getstate(), own]


def assert_same(batch: Any, expected: Any) -> None:
    """Compare two batches to the bit: the forms, and dtypes, strides and values of their tensors."""
    batch = plain(batch)
    assert type(batch) is type(expected) and len(batch) == len(expected)
    for part, other in zip(batch, expected, strict=True):
        assert (part.dtype, part.shape, part.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(part, other)


# The property: any loader


class Drawing:
    """A user's batch sampler, which draws from the global generators batch by batch, and repeats examples."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(3):
            yield [random.randrange(-self.count, self.count), *torch.randint(0, self.count, (self.size,)).tolist()]


@st.composite
def loaders(draw: st.DrawFn) -> Callable[[], DataLoader[Any]]:
    """Draw a function that makes equal loaders over TensorDatasets and nested Subsets, from the same generators."""
    base = count = draw(st.integers(1, 12))
    chosen = draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=3))
    subsets: list[Any] = []
    for _ in range(draw(st.integers(0, 2))):
        indices = draw(st.lists(st.integers(-count, count - 1), min_size=1, max_size=12))
        form = draw(st.sampled_from([list, tuple, torch.tensor, numpy.array, partial(torch.tensor, dtype=torch.int16)]))
        subsets.append((form, indices))
        count = len(indices)
    batch_size, drop_last = draw(st.integers(1, 5)), draw(st.booleans())
    sampler = draw(
        st.sampled_from(["none", "shuffle", "replacement", "many", "subset", "weighted", "distributed", "user's"])
    )
    has_generator, seed = draw(st.booleans()), draw(st.integers(0, 9))

    def make() -> DataLoader[Any]:
        torch.manual_seed(seed)
        data: Dataset[Any] = TensorDataset(*(column(base) for column in chosen))
        for form, indices in subsets:
            data = Subset(data, form(indices))
        generator = torch.Generator().manual_seed(seed) if has_generator else None
        options: dict[str, Any] = {"generator": generator}
        if sampler == "user's":
            return DataLoader(data, batch_sampler=Drawing(count, batch_size), **options)  # type: ignore[arg-type]
        samplers: dict[str, Callable[[], Any]] = {
            "replacement": lambda: RandomSampler(data, replacement=True, generator=generator),  # type: ignore[arg-type]
            "many": lambda: RandomSampler(data, num_samples=2 * count + 1, generator=generator),  # type: ignore[arg-type]
            "subset": lambda: SubsetRandomSampler(range(0, count, 2), generator=generator),
            "weighted": lambda: WeightedRandomSampler([1.0] * count, count, generator=generator),
            "distributed": lambda: DistributedSampler(data, num_replicas=2, rank=1, seed=seed),
        }
        options |= {"batch_size": batch_size, "drop_last": drop_last}
        if sampler in samplers:
            return DataLoader(data, sampler=samplers[sampler](), **options)
        return DataLoader(data, shuffle=sampler == "shuffle", **options)

    return make


jobs = given(loaders(), st.booleans(), st.lists(st.integers(0, 6), min_size=2, max_size=3))


@settings(max_examples=80)
@jobs
def test_batches_by_index_equal_the_loaders(make: Callable[[], DataLoader[Any]], copies: bool, ends: list[int]) -> None:
    """Over several epochs, left early or not, with other draws between the batches."""
    check_equality(make, copies, ends)


@pytest.mark.slow
@settings(max_examples=3000)
@jobs
def test_batches_of_many_loaders_equal_theirs(
    make: Callable[[], DataLoader[Any]], copies: bool, ends: list[int]
) -> None:
    check_equality(make, copies, ends)


def check_equality(make: Callable[[], DataLoader[Any]], copies: bool, ends: list[int]) -> None:
    """Compare the batches and the states of all generators; ``ends``: batches after which each epoch is left."""
    runs: list[list[Any]] = []
    for wrap in (lambda loader: loader, indexed):
        with as_copies() if copies else nullcontext():
            loader = make()
            seed_all()
            fed, run = wrap(loader), list[Any]()
            for epoch, end in enumerate(ends):
                set_epoch(fed, epoch)
                run.append(len(fed))
                passing = iter(fed)
                for _, batch in zip(range(end), passing, strict=False):
                    assert isinstance(batch, Indexed) is (wrap is indexed)
                    run.append((plain(batch), torch.rand(1).item(), random.random(), numpy.random.rand()))
                if end > 3:  # to the end of the pass
                    run += [(plain(batch), 0, 0, 0) for batch in passing]
                run.append(states(loader))
            runs.append(run)
    for expected, found in zip(*runs, strict=True):
        if isinstance(expected, tuple):
            assert found[1:] == expected[1:]
            assert_same(found[0], expected[0])
        else:
            assert found == expected


@settings(max_examples=40)
@given(
    st.integers(0, 9),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(0, 8), max_size=9),
)
def test_batches_of_ours_equal_their_own(
    count: int, batch_size: int, shuffle: bool, copies: bool, indices: list[int]
) -> None:
    images, targets = COLUMNS[0](9), torch.arange(9)
    mean, std = torch.rand(3), torch.rand(3) + 0.5
    chosen = None if count else torch.tensor(indices, dtype=torch.int64)
    ours = Batches(images, targets, mean, std, batch_size=batch_size, indices=chosen, shuffle=shuffle, seed=count)
    with as_copies() if copies else nullcontext():
        fed = indexed(ours)
        for epoch in (0, 3):
            set_epoch(fed, epoch)  # reaches the loader
            assert ours.epoch == epoch and len(fed) == len(ours)
            before = states(ours)
            found = list(fed)
            assert states(ours) == before and all(isinstance(batch, Indexed) for batch in found)
            for batch, expected in zip(found, ours, strict=True):
                assert_same(batch, expected)
        each = DataLoader(Subset(Examples(ours), range(len(ours.indices))), batch_size=2)
        for batch, expected in zip(indexed(each), each, strict=True):
            assert isinstance(batch, Indexed)
            assert_same(batch, expected)


def test_two_loaders_of_one_generator_draw_in_the_order_of_their_batches() -> None:
    def run(wrap: Callable[[Any], Any]) -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        sets = [TensorDataset(torch.arange(n)) for n in (5, 7)]
        first, second = (
            wrap(DataLoader(s, batch_size=2, shuffle=True, generator=generator if n else None))
            for n, s in enumerate(sets)
        )
        seed_all()
        passes = [iter(second), iter(first), iter(second)]
        order = [0, 2, 1, 1, 0, 2, 0, 2, 0, 2, 0]
        return [plain(next(passes[n], [torch.tensor(-1)]))[0].tolist() for n in order] + states(first)

    assert run(indexed) == run(lambda loader: loader)


# Data that are read by index


class Augmented(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        return tuple(t + 1 for t in super().__getitem__(index))


class Reversed(Subset[Any]):
    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(-1 - index)

    def __getitems__(self, indices: list[int]) -> Any:
        return [self[i] for i in indices]


class Ours(Batches):
    def __iter__(self) -> Iterator[Any]:
        return ((index, inputs + 1, targets) for index, inputs, targets in super().__iter__())


class Growing(list[int]):
    """Indices that differ from reading to reading."""

    def __getitem__(self, item: Any) -> Any:
        return (super().__getitem__(item) + random.randrange(2)) % 6


def own_subset() -> Subset[Any]:
    data = Subset(DATA, range(6))
    data.__getitems__ = lambda indices: [DATA[0] for _ in indices]  # type: ignore[method-assign]
    return data


def ragged() -> TensorDataset:
    data = TensorDataset(X, Y)
    data.tensors = (X, Y[:5])
    return data


X, Y = torch.arange(12.0).view(6, 2), torch.arange(6) % 3
DATA = TensorDataset(X, Y)
OTHERS: dict[str, Callable[[], Any]] = {
    "a subclass": lambda: DataLoader(Augmented(X, Y), batch_size=4),
    "a subclass of Subset": lambda: DataLoader(Reversed(DATA, range(6)), batch_size=4),
    "a subset with a function of its own": lambda: DataLoader(own_subset(), batch_size=4),
    "a collate_fn": lambda: DataLoader(DATA, batch_size=4, collate_fn=lambda rows: [torch.stack([x for x, _ in rows])]),
    "no batches": lambda: DataLoader(DATA, batch_size=None),
    "a list as data set": lambda: DataLoader([*zip(X, Y, strict=True)], batch_size=4),  # type: ignore[arg-type]
    "a loader's subclass": lambda: type("Mine", (DataLoader,), {})(DATA, batch_size=4),
    "flags as indices": lambda: DataLoader(Subset(DATA, [True, False]), batch_size=1),
    "indices out of range": lambda: DataLoader(Subset(DATA, [1, 7]), batch_size=1),
    "other indices": lambda: DataLoader(Subset(DATA, Growing(range(6))), batch_size=4),
    "gradients": lambda: DataLoader(TensorDataset(X.clone().requires_grad_(), Y), batch_size=4),
    "parameters": lambda: DataLoader(TensorDataset(nn.Parameter(X, requires_grad=False), Y), batch_size=4),
    "sparse": lambda: DataLoader(TensorDataset(X.to_sparse(), Y), batch_size=1),
    "our subclass": lambda: Ours(COLUMNS[0](4), Y[:4], torch.zeros(3), torch.ones(3), batch_size=4),
    "tensors of other lengths": lambda: DataLoader(ragged(), batch_size=4),
    "a list": lambda: [(X, Y), (X[:2], Y[:2])],
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_loaders_are_read_as_they_are(name: str) -> None:
    """Anything that may return other examples than the rows of its tensors."""
    loader = OTHERS[name]()
    results: list[Any] = []
    for each in (loader, indexed(loader)):
        seed_all()
        try:
            results.append(list(each))
        except Exception as error:  # a loader's own fault stays its own
            results.append((type(error), str(error)))
    if isinstance(results[0], tuple):
        assert results[0] == results[1]
    else:
        for batch, expected in zip(results[1], results[0], strict=True):
            assert not isinstance(batch, Indexed)
            for part, other in zip(batch, expected, strict=True):
                assert torch.equal(part.to_dense(), other.to_dense()) and part.requires_grad == other.requires_grad


def test_workers_are_left_to_their_loader() -> None:
    loader = DataLoader(DATA, batch_size=4, num_workers=1)
    assert feeding._examples(loader, CPU) is None and feeding._examples(DataLoader(DATA), CPU) is not None


def test_on_the_cpu_the_loader_itself_is_returned() -> None:
    loader = DataLoader(DATA, batch_size=4)
    assert feed(loader, CPU) is loader and feed(loader, CPU, resident=False) is loader
    fed = indexed(loader)
    assert feed(fed, CPU) is fed  # and a loader is fed once
    assert (fed.dataset, fed.batch_size, fed.batch_sampler) == (DATA, 4, loader.batch_sampler)
    assert type(copy.copy(fed)) is Feed
    with pytest.raises(AttributeError, match="epoch"):
        _ = fed.epoch
    with pytest.raises(TypeError, match="has no len"):
        len(feed((batch for batch in [(X, Y)]), CPU, resident=True))  # type: ignore[arg-type]


def test_examples_that_need_more_than_a_quarter_of_the_free_memory_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    size = X.nbytes + Y.nbytes
    for free, is_resident in ((4 * size, True), (4 * size - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * free))
        assert fits(size, torch.device("cuda")) is is_resident and fits(size, CPU)
        columns, rows = feeding._columns(Subset(DATA, range(6)), CPU) or pytest.fail("not read as rows")
        assert feeding.Resident.can_hold(columns, rows, torch.device("cuda")) is is_resident
    with as_copies():
        monkeypatch.setattr(feeding, "fits", lambda *_: False)
        assert not any(isinstance(batch, Indexed) for batch in indexed(DataLoader(DATA)))
    half = (X, Y.to("meta"))  # one tensor on the device, one not
    assert not feeding.Resident.can_hold(feeding.Columns(half, tuple), torch.arange(6), torch.device("meta"))


def test_only_the_rows_of_a_subset_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "CHUNK_BYTES", 16)  # two rows of X at a time
    with as_copies():
        fed = indexed(DataLoader(Subset(Subset(DATA, [5, 4, 3, 2]), [0, 0, -1]), batch_size=2))
        assert [plain(batch)[0].tolist() for batch in fed] == [X[[5, 5]].tolist(), X[[2]].tolist()]
        assert fed.resident is not None and [len(t) for t in fed.resident.source.tensors] == [3, 3]
    on_device = indexed(DataLoader(Subset(DATA, [5, 4]), batch_size=2))
    list(on_device)
    assert on_device.resident is not None and on_device.resident.source.tensors[0] is X  # nothing is copied


@pytest.mark.parametrize("bad", [[True, False], [0.0, 1.0], [[0, 1]]])
def test_a_batch_sampler_of_other_than_integers_is_refused(bad: Any) -> None:
    with pytest.raises(InputError, match="batch_sampler to yield integers"):
        list(indexed(DataLoader(DATA, batch_sampler=[bad])))
    for good in (
        [0, -1],
        torch.tensor([0, 5]),
        numpy.array([0, 5]),
        [torch.tensor(0), 5],
        numpy.array([0, 5], "uint8"),
    ):
        batch = next(iter(indexed(DataLoader(DATA, batch_sampler=[good]))))  # type: ignore[arg-type]
        assert_same(batch, [X[[0, 5]], Y[[0, 5]]])


def test_errors_of_the_sampler_reach_the_consumer_unchanged() -> None:
    class Failing(BatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            yield [0]
            raise OSError("the disk is gone")

    for wrap in (indexed, lambda loader: loader):
        passing = iter(wrap(DataLoader(DATA, batch_sampler=Failing([0], 1, False))))
        next(passing)
        with pytest.raises(OSError, match="disk is gone"):
            next(passing)
        with pytest.raises(IndexError, match="out of bounds"):
            list(wrap(DataLoader(DATA, batch_sampler=[[6]])))


# Changes of the data


def test_changed_examples_are_copied_again() -> None:
    """Between two passes and within one; into the same memory, which a graph may hold."""
    x, y = X.clone(), Y.clone()
    data = TensorDataset(x, y)
    loader = DataLoader(data, batch_size=2)
    with as_copies():
        fed = indexed(loader)
        assert_all_same(fed, loader)
        assert fed.resident is not None
        source = fed.resident.source
        memory = source.tensors[0].data_ptr()
        assert memory != x.data_ptr()
        x[3] = 7
        assert_all_same(fed, loader)
        y.add_(1)
        assert_all_same(fed, loader)
        for number, (batch, expected) in enumerate(zip(fed, loader, strict=True)):
            assert_same(batch, expected)
            x.mul_(-1)
            assert number < 3
        assert fed.resident.source is source and source.tensors[0].data_ptr() == memory
        data.tensors = (x.double(), y)  # another tensor
        assert_all_same(fed, loader)
        assert fed.resident.source is not source
        data.tensors = (x, y)
        assert_all_same(fed, loader)
        x.data = torch.zeros(6, 1)  # the same tensor, of another shape
        assert_all_same(fed, loader)
        x.data = torch.ones(6, 1)
        assert_all_same(fed, loader)


def assert_all_same(fed: Feed, loader: Iterable[Any]) -> None:
    for batch, expected in zip(fed, loader, strict=True):
        assert isinstance(batch, Indexed)
        assert_same(batch, expected)


@pytest.mark.parametrize("copies", [False, True])
def test_changed_indices_of_a_subset_are_seen(copies: bool) -> None:
    indices = [0, 1, 2]
    loader = DataLoader(Subset(DATA, indices), batch_size=2)
    with as_copies() if copies else nullcontext():
        fed = indexed(loader)
        assert_all_same(fed, loader)
        indices[1] = 5
        assert_all_same(fed, loader)
        indices[0] = 99  # out of range: the loader's own error
        with pytest.raises(IndexError):
            list(fed)


def test_the_copies_are_freed_with_the_iterable() -> None:
    with as_copies():
        fed = indexed(DataLoader(DATA, batch_size=4))
        passing = iter(fed)
        next(passing)
        assert fed.resident is not None
        gone: list[int] = []
        weakref.finalize(fed.resident.source, gone.append, 1)
        del fed, passing
        gc.collect()
        assert gone == [1]


# The batch


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_batch_is_read_by_operations_on_tensors_alone() -> None:
    """A CUDA graph can hold the reading: nothing is read by the host, and no tensor is made on the CPU."""
    ours = Batches(COLUMNS[0](9), torch.arange(9), torch.zeros(3), torch.ones(3), batch_size=4)
    for loader, expected in (
        (DataLoader(DATA, batch_size=4), ["index_select"] * 2),
        (ours, ["index_select"] * 3 + ["_to_copy", "div", "sub", "div"]),
    ):
        batch = next(iter(indexed(loader)))
        with Operations() as operations:
            batch.read()
        assert operations.names == expected


def test_an_indexed_batch_is_used_as_the_plain_one() -> None:
    batch = next(iter(indexed(DataLoader(DATA, batch_size=4))))
    inputs, targets = batch
    assert_same([inputs, targets], [X[:4], Y[:4]])
    assert len(batch) == 2 and torch.equal(batch[1], Y[:4])
    assert split_batch(batch)[0] is None and torch.equal(split_batch(batch)[1], X[:4])
    for loss_fn in (None, lambda model, batch: batch[0].sum(1)):
        assert examples_in(batch, loss_fn) == 4
        part = cut(batch, [3, 0], loss_fn)
        assert isinstance(part, Indexed)
        assert_same(part, [X[[3, 0]], Y[[3, 0]]])
    moved = map_tensors({"retain": batch}, lambda rows: rows.flip(0))["retain"]
    assert isinstance(moved, Indexed)
    assert_same(moved, [X[:4].flip(0), Y[:4].flip(0)])
    assert_same(move(batch, CPU), [X[:4], Y[:4]])
    with torch.inference_mode():
        made_inside = next(iter(indexed(DataLoader(DATA, batch_size=4))))
    assert not any(part.is_inference() for part in detached(made_inside))
    three = next(iter(indexed(DataLoader(TensorDataset(X, X, Y), batch_size=4))))
    with pytest.raises(InputError, match="the index N integers for N targets"):
        split_batch(three)


class Recorder:
    """A loss_fn that records its batches."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.batches.append(batch)
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def results(wrap: Callable[[Any], Any]) -> Iterator[Any]:
    """Yield what the library computes of a set's loaders."""

    def loader(shuffle: bool = False) -> Any:
        data = TensorDataset(torch.randn(9, 2, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3)
        return wrap(DataLoader(data, batch_size=4, shuffle=shuffle))

    seed_all()
    model, other, recorder = network(), network(), Recorder()
    for loss_fn in (None, recorder):
        for per_example in (False, True):
            yield from delfast.score(model, loader(), per_example=per_example, loss_fn=loss_fn).gradients.values()
        yield signed_channels(model, loader(), loss_fn=loss_fn).matrix
    yield [(example.example, example.channels) for example in critmem(model, loader()).examples]
    yield delfast.evaluate(model, loader(), loader(), loader(), mia=False).as_dict()
    yield predictions(model, loader())[0]
    yield kl_to_oracle(model, other, loader())
    train(model, loader(shuffle=True), torch.optim.SGD(model.parameters(), 0.1), epochs=2, loss_fn=recorder)
    yield from model.state_dict().values()
    for method in ("del", "relabel", "scrub", "neggrad+", "influence", "ssd"):
        model = network()
        options: dict[str, Any] = {"influence": {}, "ssd": {"alpha": 1.5}}.get(method, {"epochs": 2})
        init = {"init": network} if method == "del" else {}
        delfast.unlearn(model, retain=loader(True), forget=loader(True), method=method, seed=1, **init, **options)
        yield from model.state_dict().values()
    yield [type(batch) for batch in recorder.batches]


def test_the_library_computes_the_same_of_indexed_batches() -> None:
    by_index, by_loader = list(results(indexed)), list(results(lambda loader: loader))
    for found, expected in zip(by_index, by_loader, strict=True):
        if isinstance(expected, (Tensor, numpy.ndarray)):
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
        else:
            assert found == expected


def test_a_resumed_training_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """With the checkpoint of another kind of reading, too: it holds the generators of the loader itself."""

    def run(epochs: list[int], wraps: list[Callable[[Any], Any]], path: Path) -> dict[str, Tensor]:
        for count, wrap in zip(epochs, wraps, strict=True):
            torch.manual_seed(5)
            generator = torch.Generator().manual_seed(2)
            loader = DataLoader(DATA, batch_size=4, shuffle=True, generator=generator)
            model = network()
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            train(model, wrap(loader), optimizer, epochs=count, schedule="constant", checkpoint=path, resume=True)
        return model.state_dict()

    whole = run([3], [lambda loader: loader], tmp_path / "whole")
    for number, wraps in enumerate(([indexed, indexed], [indexed, lambda loader: loader])):
        parts = run([1, 3], wraps, tmp_path / f"parts{number}")
        assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_the_library_feeds_its_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every place that reads a set."""
    expected = list(results(lambda loader: loader))
    fed: list[str] = []

    for module in (channels, critical_channels, gradient, loop, one_shot, outputs, steps):

        def forced(loader: Any, device: torch.device, name: str = module.__name__) -> Feed:
            fed.append(name)
            return indexed(loader)

        monkeypatch.setattr(module, "feed", forced)
    for found, other in zip(results(lambda loader: loader), expected, strict=True):
        same = (
            torch.equal(torch.as_tensor(found), torch.as_tensor(other)) if hasattr(other, "dtype") else found == other
        )
        assert same
    assert len(set(fed)) == 7
