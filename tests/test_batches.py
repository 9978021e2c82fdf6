"""Batches of any form, loaders that hide examples, and networks that write their state as they run."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import delfast
from delfast import InputError
from delfast.batches import cut, evaluating, examples_in, map_tensors, split_batch, warn_about_loader
from delfast.evaluation import accuracy_and_loss, kl_to_oracle, predictions
from delfast.localization import signed_channels
from delfast.unlearning import METHODS
from delfast.unlearning.head import find_head
from tests import cases
from tests.cases import FORMS, Encoding, Pair, ReadOnly, by_key, losses_of
from tests.networks import Recurrent

X, Y = cases.image_batches(8, 8)[0]
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


class Tokens(nn.Module):
    """Classifies tokens (N, T), whose mask has the same shape and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).mean(1))


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
        "evaluate": lambda: delfast.evaluate(model, good, [batch], good, mia=False),
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
        with pytest.raises(InputError, match=r"the index N integers.*int64 \(4, 5\) for targets \(4,\).*loss_fn"):
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


# Networks that write as they run


class Written(nn.Module):
    """Writes a buffer, puts another tensor into the place of a second one, and adds a third."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(2))
        self.register_buffer("empty", None)
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        self.cache = ids.float().mean(1).detach()
        self.empty = torch.ones(3)
        self.register_buffer("added", torch.ones(1))
        return self.head(self.hidden(self.norm(self.embedding(ids).mean(1))))


class MaxNorm(Written):
    def __init__(self, bag: bool = False) -> None:
        super().__init__()
        self.bag = bag
        self.embedding = (nn.EmbeddingBag if bag else nn.Embedding)(11, 6, max_norm=0.1)  # type: ignore[operator]

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.embedding(ids)
        return self.head(rows if self.bag else rows.mean(1))


IDS, LABELS = torch.arange(20).reshape(4, 5) % 11, torch.arange(4) % 3
SETS: Any = {"forget": [(IDS, LABELS)], "retain": [(IDS + 0, (LABELS + 1) % 3)] * 12}


def entries(model: nn.Module, make: Any) -> dict[str, Callable[[], object]]:
    """Every public function that runs the model or trains it."""
    forget, retain = SETS["forget"], SETS["retain"]
    dataset = TensorDataset(IDS, LABELS)
    full = delfast.score(model, criterion="weight").select(1.0)
    calls: dict[str, Callable[[], object]] = {
        "score": lambda: delfast.score(model, forget),
        "per example": lambda: delfast.score(model, forget, per_example=True),
        "critmem": lambda: delfast.critmem(model, forget),
        "signed_channels": lambda: signed_channels(model, forget),
        "localize": lambda: delfast.localize(model, forget),
        "anytime": lambda: delfast.localize(model, dataset, stop_when_stable=0.9, batch_size=1),
        "evaluate": lambda: delfast.evaluate(model, forget, retain, forget, mia=False),
        "accuracy_and_loss": lambda: accuracy_and_loss(model, forget),
        "predictions": lambda: predictions(model, forget),
        "kl_to_oracle": lambda: kl_to_oracle(copy.deepcopy(model), model, forget),
        "find_head": lambda: find_head(model, forget[0]),
    }
    training: dict[str, Callable[[], object]] = {
        "compact": lambda: delfast.compact(model, full).undo(),
    }
    needs = {"del": {"init": make, "mask": full}, "retrain": {"init": make}, "finetune": {"mask": full}}
    for method in METHODS:
        settings: Any = {**needs.get(method, {}), **({} if method in ("ssd", "influence") else {"epochs": 1})}
        training[f"unlearn, {method}"] = lambda m=method, s=settings: delfast.unlearn(model, method=m, **SETS, **s)
    return {**calls, **{f"trains: {name}": call for name, call in training.items()}}


@pytest.mark.parametrize("bag", [False, True])
def test_layers_that_write_their_weights_are_refused_by_name_everywhere(bag: bool) -> None:
    model = MaxNorm(bag)
    before = copy.deepcopy(model.state_dict())
    for name, call in entries(model, lambda: MaxNorm(bag)).items():
        with pytest.raises(InputError, match=r"'embedding.weight' changes its weights as it reads them \(max_norm\)"):
            call()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), name
        assert model.training


def test_the_advice_for_max_norm_leaves_the_network_what_it_computed() -> None:
    model = MaxNorm()
    changed = copy.deepcopy(model)
    with pytest.raises(InputError, match=r"weight.data.renorm_\(2, 0, 0.1\), and set the layer's max_norm to None"):
        delfast.localize(changed, SETS["forget"])
    changed.embedding.weight.data.renorm_(2, 0, 0.1)
    changed.embedding.max_norm = None
    torch.testing.assert_close(changed(IDS), model(IDS), rtol=0, atol=1e-6)
    delfast.localize(changed, SETS["forget"])


def test_buffers_that_a_forward_pass_writes_are_put_back() -> None:
    model = Written()
    buffers = dict(model._buffers)
    before = copy.deepcopy(model.state_dict())
    for name, call in entries(model, Written).items():
        if name.startswith("trains: "):
            continue  # in training, buffers move
        call()
        assert dict(model._buffers).keys() == buffers.keys() and model.empty is None, name
        assert all(model._buffers[key] is value for key, value in buffers.items()), name
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), name


class Clamped(Tokens):
    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            self.head.weight.clamp_(-0.01, 0.01)
        return super().forward(ids)


def test_other_parameters_that_a_forward_pass_writes_are_named() -> None:
    for name, call in entries(Clamped(), Clamped).items():
        if name.startswith("trains: "):
            continue
        with pytest.raises(InputError, match=r"'head.weight' (was written in it|is used where gradients are switched)"):
            call()


def test_spectral_norm_of_either_kind_leaves_its_power_iteration_alone() -> None:
    for wrap in (nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm):
        model = nn.Sequential(wrap(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 3))
        model.train()(torch.randn(4, 5)).sum().backward()
        before = copy.deepcopy(model.state_dict())
        delfast.localize(model, [(torch.randn(4, 5), LABELS)])
        predictions(model, [(torch.randn(4, 5), LABELS)])
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_lazy_modules_are_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 3))
    with pytest.raises(InputError, match=r"'0.weight' to have a shape, its module is lazy; run a forward pass first"):
        predictions(model, [(torch.randn(4, 5), LABELS)])


def test_a_compact_model_can_be_evaluated_between_steps() -> None:
    """Its forward pass puts the trained rows into the weights, which is no writing by the network."""
    model = cases.SmallNet()
    mask = delfast.localize(model, [(X, Y)])
    with delfast.compact(model, mask) as handle:
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
        for _ in range(2):
            functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
            accuracy_and_loss(model, [(X, Y)])


# RNNs: on a GPU their gradients need training mode


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("training", [False, True])
def test_where_gradients_are_taken_rnns_compute_as_in_eval_mode(kind: type[nn.RNNBase], training: bool) -> None:
    model = Recurrent(kind).train(training)
    x, y = torch.randn(7, 4, 6), torch.arange(7) % 3

    def outputs_and_gradients() -> list[Tensor]:
        logits = model(x)
        gradients = torch.autograd.grad(functional.cross_entropy(logits, y), list(model.parameters()))
        return [logits.detach(), *gradients]

    with evaluating(model):
        expected = outputs_and_gradients()
    with evaluating(model, gradients=True):
        found = outputs_and_gradients()
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    assert model.modes == [(False, False, 0.5), (True, False, 0.0)]
    assert model.rnn.dropout == 0.5 and model.rnn.training is training and model.dropout.training is training


def test_rnns_are_in_training_mode_only_where_gradients_are_taken() -> None:
    model = Recurrent(nn.LSTM)
    batches: Any = [(torch.randn(7, 4, 6), torch.arange(7) % 3)]
    dataset = TensorDataset(*batches[0])
    sets: Any = {"forget": batches, "retain": batches * 12}
    for gradients, call in (
        (True, lambda: delfast.score(model, batches)),
        (True, lambda: delfast.score(model, batches, per_example=True)),
        (True, lambda: delfast.critmem(model, batches)),
        (True, lambda: signed_channels(model, batches)),
        (True, lambda: delfast.localize(model, dataset, stop_when_stable=0.9)),
        (True, lambda: delfast.unlearn(model, method="influence", **sets)),
        (True, lambda: delfast.unlearn(model, method="ssd", **sets)),
        (False, lambda: delfast.evaluate(model, batches, batches, batches, mia=False)),
        (False, lambda: predictions(model, batches)),
        (False, lambda: kl_to_oracle(model, copy.deepcopy(model), batches)),
        (False, lambda: find_head(model, batches[0])),
    ):
        model.modes.clear()
        call()
        assert set(model.modes) == {(gradients, False, 0.0 if gradients else 0.5)}


def test_an_rnn_with_a_forward_pass_of_its_own_stays_in_eval_mode() -> None:
    class Dropped(nn.LSTM):
        def forward(self, x: Any, *arguments: Any) -> Any:
            return super().forward(functional.dropout(x, 0.5, self.training), *arguments)

    model = Dropped(6, 5)
    with evaluating(model, gradients=True):
        assert not model.training


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


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_script_modules_are_evaluated_localized_and_unlearned() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    scripted, x = torch.jit.script(copy.deepcopy(model)), torch.randn(8, 4)
    pairs = [(x, Y % 3)]
    assert torch.equal(predictions(scripted, pairs)[0], predictions(model, pairs)[0])
    assert delfast.localize(scripted, pairs).digest == delfast.localize(model, pairs).digest
    mask = delfast.localize(model, pairs)
    for each in (scripted, model):
        delfast.unlearn(each, retain=pairs, mask=mask, method="finetune", epochs=1)
    torch.testing.assert_close([*scripted.parameters()], [*model.parameters()])


class Codebook(nn.Module):
    """A parameter that its forward pass moves in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.book = nn.Linear(4, 3), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.book.mul_(0.9)
        return self.fc(x * self.book)


def test_unlearn_refuses_parameters_outside_the_mask_that_move_in_training_mode() -> None:
    pairs = [(torch.randn(8, 4), Y % 3)] * 2
    model = Codebook()
    mask = delfast.Mask({}).widen(["fc.weight"], {"fc.weight": (3, 4)})
    with pytest.raises(InputError, match="'book' was written in it"):
        delfast.unlearn(model, retain=pairs, mask=mask, method="finetune", epochs=1)
    delfast.unlearn(model, retain=pairs, method="finetune", epochs=1)  # everything may change


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


# Anytime localization: on data sets


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
