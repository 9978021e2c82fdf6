"""Epochs and interruptions: a run that is stopped and resumed draws the same as an uninterrupted one."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

import delfast
from delfast import InputError, TrainingOptions
from delfast.experiments.datasets import Batches
from delfast.unlearning import EarlyStop, make_method, train
from delfast.unlearning.loaders import generators, preserved, set_epoch

EXAMPLES = 24  # so that no configuration has a last batch of one, which BatchNorm cannot train on


class Interrupted(Exception):
    pass


def stop_before(epoch: int) -> Any:
    def stop(batches: Any, description: str, total: int) -> Any:
        if description.startswith(f"epoch {epoch}/"):
            raise Interrupted
        return batches

    return stop


# ---- the parts of a loader, each with generators of its own; "global" ones draw from torch, numpy and Python

GLOBAL_NUMPY = numpy.random.default_rng(11)  # a global of this module, which functions refer to by name


def torchs(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Shift:
    """A transform with a generator."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __call__(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.draw()


class Compose:
    def __init__(self, *transforms: Any) -> None:
        self.transforms = list(transforms)

    def __call__(self, x: Tensor) -> Tensor:
        for transform in self.transforms:
            x = transform(x)
        return x


def from_global(x: Tensor) -> Tensor:
    return x + 0.3 * GLOBAL_NUMPY.random()


def augmenting(kind: str) -> Any:
    """Return a random transform that draws from a generator of this kind."""
    generator = torchs(1)
    legacy, rng, bits = numpy.random.RandomState(2), numpy.random.default_rng(3), numpy.random.Philox(4)
    return {
        "none": None,
        "global torch": Shift(lambda: float(torch.rand(()))),
        "global numpy": Shift(lambda: float(numpy.random.rand())),
        "global python": Shift(lambda: random.random()),
        "torch": Shift(lambda: float(torch.rand((), generator=generator))),
        "RandomState": Compose(Compose(Shift(legacy.rand))),
        "numpy": Compose(Shift(rng.random), nn.Identity()),
        "Philox": partial(lambda x, source: x + 0.3 * (source.random_raw() % 7) / 7, source=bits),
        "python": Shift(random.Random(5).random),
        "module": from_global,
    }[kind]


TRANSFORMS = [
    "none", "global torch", "global numpy", "global python", "torch", "RandomState", "numpy", "Philox", "python",
    "module",
]  # fmt: skip
SAMPLERS = ["in order", "shuffle", "shuffle, own", "sampler", "weighted", "subset", "batch sampler", "distributed"]


class Points(Dataset[Any]):
    def __init__(self, seed: int, transform: Any) -> None:
        source = torchs(seed)
        self.x, self.y = torch.randn(EXAMPLES, 4, generator=source), torch.randint(0, 3, (EXAMPLES,), generator=source)
        self.transform = transform

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, i: int) -> Any:
        return (self.x[i] if self.transform is None else self.transform(self.x[i])), self.y[i]


def loader(sampling: str, augmentation: str, nested: str, seed: int, workers: int = 0) -> Any:
    """Return a loader as a new process builds it."""
    data: Any = Points(seed, augmenting(augmentation))
    if nested == "subset":
        data = Subset(Subset(data, range(20)), range(18))
    elif nested == "concat":
        data = ConcatDataset([Subset(data, range(9)), Subset(Points(seed + 1, augmenting(augmentation)), range(9))])
    count = len(data)
    options: dict[str, Any] = {
        "in order": {},
        "shuffle": {"shuffle": True},
        "shuffle, own": {"shuffle": True, "generator": torchs(6)},
        "sampler": {"sampler": RandomSampler(data, generator=torchs(7))},
        "weighted": {"sampler": WeightedRandomSampler([1.0] * count, count, generator=torchs(8))},
        "subset": {"sampler": SubsetRandomSampler(range(count - 4), generator=torchs(9))},
        "distributed": {"sampler": DistributedSampler(data, num_replicas=2, rank=0)},
        "batch sampler": {"batch_sampler": BatchSampler(RandomSampler(data, generator=torchs(10)), 5, False)},
    }[sampling]
    batch_size = 1 if sampling == "batch sampler" else 5
    return DataLoader(data, batch_size, num_workers=workers, **options)


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 3))


def seed_everything(seed: int) -> None:
    global GLOBAL_NUMPY
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)
    GLOBAL_NUMPY = numpy.random.default_rng(seed)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([value.detach().double().flatten() for value in model.state_dict().values()])


def check_resumed(method: str, make: Callable[[], dict[str, Any]], stop: int, epochs: int = 3) -> None:
    """Check that a run that stops before epoch ``stop`` and resumes in another process ends with equal weights."""
    chosen = make_method(method, {"epochs": epochs, "lr": 0.05})

    def run(progress: Any = None, **options: Any) -> nn.Module:
        model, sets = network(), make()
        early = {name: sets.pop(name) for name in ("validation", "patience") if name in sets}
        training = TrainingOptions(progress=progress, **early)
        delfast.unlearn(model, **sets, method=chosen, init=partial(network, 5), training=training, **options)
        return model

    with TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        seed_everything(1)
        whole = run()
        seed_everything(1)
        with pytest.raises(Interrupted):
            run(checkpoint=path, progress=stop_before(stop))
        seed_everything(2)
        assert torch.equal(flat(run(checkpoint=path, resume=True)), flat(whole))


configurations = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["finetune", "neggrad+", "relabel", "scrub", "gradient-ascent", "retrain"]),
        "retain": st.tuples(
            st.sampled_from(SAMPLERS), st.sampled_from(TRANSFORMS), st.sampled_from(["", "subset", "concat"])
        ),
        "forget": st.tuples(st.sampled_from(SAMPLERS), st.sampled_from(TRANSFORMS), st.just("")),
        "validation": st.none() | st.tuples(st.sampled_from(SAMPLERS), st.sampled_from(TRANSFORMS), st.just("")),
        "stop": st.integers(2, 3),
    }
)


def check_configuration(configuration: dict[str, Any]) -> None:
    def make() -> dict[str, Any]:
        sets: dict[str, Any] = {
            "retain": loader(*configuration["retain"], seed=1),
            "forget": loader(*configuration["forget"], seed=3),
        }
        if configuration["validation"] is not None:
            sets |= {"validation": loader(*configuration["validation"], seed=5), "patience": 3}
        return sets

    check_resumed(configuration["method"], make, configuration["stop"])


@pytest.mark.long
@given(configurations)
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
def test_interrupted_and_resumed_equals_uninterrupted(configuration: dict[str, Any]) -> None:
    check_configuration(configuration)


@pytest.mark.slow
@given(configurations)
@settings(max_examples=600, deadline=None, derandomize=True)
def test_interrupted_and_resumed_equals_uninterrupted_widely(configuration: dict[str, Any]) -> None:
    check_configuration(configuration)


@pytest.mark.slow
@pytest.mark.parametrize("augmentation", TRANSFORMS)
def test_resumed_with_workers(augmentation: str) -> None:
    if augmentation in ("Philox", "module"):
        augmentation = "none"
    check_resumed("finetune", lambda: {"retain": loader("batch sampler", augmentation, "", 1, workers=2)}, 2)


def test_two_cases_that_resumed_to_other_weights() -> None:
    """A generator in ``batch_sampler.sampler``, and a generator that a transform in a nested Subset holds."""
    check_resumed("finetune", lambda: {"retain": loader("batch sampler", "none", "", 1)}, 2)
    check_resumed("finetune", lambda: {"retain": loader("in order", "numpy", "subset", 1)}, 3)


def test_persistent_workers_are_refused_where_a_checkpoint_is_written(tmp_path: Path) -> None:
    data = Points(1, augmenting("global torch"))
    kept = DataLoader(data, 5, num_workers=1, persistent_workers=True)
    plain = loader("in order", "none", "", 1)
    model = network()
    before = copy.deepcopy(model.state_dict())
    for resume in (False, True):
        for sets, name in (
            ({"retain": kept}, "retain"),
            ({"retain": plain, "training": TrainingOptions(validation=kept, patience=1)}, "validation"),
        ):
            with pytest.raises(InputError, match=f"a {name} set without persistent_workers"):
                delfast.unlearn(
                    model, **sets, method="finetune", epochs=1, checkpoint=tmp_path / "c.pt", resume=resume
                )  # fmt: skip
    with pytest.raises(InputError, match="a training set without persistent_workers"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, kept, optimizer, epochs=1, checkpoint=tmp_path / "c.pt", resume=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not (tmp_path / "c.pt").exists()


# ---- epochs


class Recorded(nn.Module):
    """A network that records the examples that it trains on, by their first feature, which is their number."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.seen = nn.Linear(1, 2), []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += x[:, 0].int().tolist()
        return self.fc(x / 100)


def numbered(where: str, count: int = 20) -> Any:
    """Return a loader for one of two processes, with its DistributedSampler at this depth."""
    data = [(torch.tensor([float(i)]), i % 2) for i in range(count)]
    sampler = DistributedSampler(data, num_replicas=2, rank=0)  # type: ignore[arg-type]
    if where == "sampler":
        return DataLoader(data, 4, sampler=sampler)  # type: ignore[arg-type]
    batches = BatchSampler(sampler, 4, False)
    if where == "batch_sampler":
        return DataLoader(data, batch_sampler=batches)  # type: ignore[arg-type]
    return DataLoader(data, batch_sampler=Wrapped(batches))  # type: ignore[arg-type]


class Wrapped:
    def __init__(self, batch_sampler: BatchSampler) -> None:
        self.batch_sampler = batch_sampler

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batch_sampler)

    def __len__(self) -> int:
        return len(self.batch_sampler)


@pytest.mark.parametrize(
    ("where", "method"),
    [
        *(("sampler", method) for method in ("finetune", "gradient-ascent", "neggrad+", "train")),
        *((where, "finetune") for where in ("batch_sampler", "wrapped")),
    ],
)
def test_a_distributed_sampler_is_given_the_epoch(where: str, method: str, tmp_path: Path) -> None:
    def run(progress: Any = None, **options: Any) -> tuple[list[list[int]], nn.Module]:
        torch.manual_seed(0)
        model = Recorded()
        if method == "train":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            train(model, numbered(where), optimizer, epochs=12, progress=progress, **options)
        else:
            options |= {"method": make_method(method, {"epochs": 12, "lr": 0.01})}
            training = TrainingOptions(progress=progress)
            delfast.unlearn(model, retain=numbered(where), forget=numbered(where), training=training, **options)
        per_epoch = 20 if method == "neggrad+" else 10
        return [sorted(model.seen[i : i + per_epoch]) for i in range(0, len(model.seen), per_epoch)], model

    epochs, whole = run()
    assert len(epochs) == 12 and len({tuple(epoch) for epoch in epochs}) == 12  # another share in every epoch
    assert {number for epoch in epochs for number in epoch} == set(range(20))
    path = tmp_path / "c.pt"
    with pytest.raises(Interrupted):
        run(checkpoint=path, progress=stop_before(4))
    rest, resumed = run(checkpoint=path, resume=True)
    assert rest == epochs[3:] and torch.equal(flat(resumed), flat(whole))


def test_set_epoch_reaches_the_data_set_too() -> None:
    class Epochs(Points):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    data = Epochs(0, None)
    set_epoch(DataLoader(Subset(data, range(3))), 7)
    assert data.epoch == 7
    set_epoch([1, 2], 3)  # a list has no epoch


# ---- generators


class Slotted:
    __slots__ = ("source",)

    def __init__(self, source: Any) -> None:
        self.source = source


class Shared(Points):
    source = numpy.random.default_rng(0)  # of the class


def test_every_generator_is_found_once_and_in_the_order_of_construction() -> None:
    own, other, legacy, python = torchs(0), torchs(1), numpy.random.RandomState(0), random.Random(0)
    data = Shared(0, Compose(Slotted(legacy), [{"a": (python.gauss,)}], partial(torch.rand, generator=other)))
    data.itself, data.samples = data, [(i, own) for i in range(10_001)]  # type: ignore[attr-defined]
    sampler = RandomSampler(data, generator=own)
    found = generators([DataLoader(data, 4, sampler=sampler, generator=own, collate_fn=lambda b: (b, python))])
    expected = [Shared.source, legacy, python, other, own]
    assert len(found) == len(expected) and {id(each) for each in found} == {id(each) for each in expected}
    again = generators([DataLoader(data, 4, sampler=sampler, generator=own, collate_fn=lambda b: (b, python))])
    assert [id(each) for each in again] == [id(each) for each in found]


@pytest.mark.parametrize("augmentation", TRANSFORMS)
def test_reading_first_batches_moves_no_generator(augmentation: str) -> None:
    def draws(read_first: bool) -> list[Tensor]:
        seed_everything(0)
        loaders = [loader("shuffle", augmentation, "subset", 0), loader("batch sampler", augmentation, "", 0)]
        if read_first:
            with preserved(loaders):
                for each in loaders:
                    next(iter(each))
            EarlyStop(loaders[0], 1, None)
        return [torch.cat([x for x, _ in each]) for each in loaders for _ in range(2)]

    assert all(torch.equal(a, b) for a, b in zip(draws(False), draws(True), strict=True))


def test_a_generator_that_is_made_in_an_epoch_is_refused(tmp_path: Path) -> None:
    class Late(Points):
        rng = None

        def __getitem__(self, i: int) -> Any:
            self.rng = self.rng or numpy.random.default_rng(0)
            return self.x[i], self.y[i]

    model = network()
    with pytest.raises(InputError, match=r"got .'Generator'. after"):
        train(
            model,
            DataLoader(Late(0, None), 6),
            torch.optim.SGD(model.parameters()),
            epochs=1,
            checkpoint=tmp_path / "c",
        )


def test_a_loader_with_an_attribute_sets_is_served(tmp_path: Path) -> None:
    class WithSets(list):  # type: ignore[type-arg]
        sets = ("a", "b")

    model, data = network(), WithSets([(torch.randn(6, 4), torch.arange(6) % 3)])
    train(model, data, torch.optim.SGD(model.parameters()), epochs=1, checkpoint=tmp_path / "c")
    assert (tmp_path / "c").exists()


def test_reading_a_batch_of_ours_leaves_the_generators_of_the_process_alone() -> None:
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    ours = Batches(images, torch.arange(4), torch.zeros(1), torch.ones(1), batch_size=2, shuffle=True)
    for loaders, moves in (([ours, [1, 2]], True), ([DataLoader([1, 2])], False)):  # type: ignore[arg-type]
        before = torch.get_rng_state()
        with preserved(loaders):
            next(iter(loaders[0]))
            torch.rand(1)  # outside Draws, as in another thread
        assert torch.equal(torch.get_rng_state(), before) is not moves


def test_the_search_for_generators_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generators.__globals__, "MAX_SEARCHED", 50)
    near, far = torchs(0), torchs(1)
    deep: Any = far
    for _ in range(100):
        deep = [deep]
    assert generators([[deep, near]]) == [near]
