"""Batches whose examples do not lie along the trial's axis: always detected, whatever moves them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import delfast
from delfast.experiments.networks import build
from delfast.localization.critical_channels import critmem
from delfast.localization.per_example import PerExampleGradients, passes
from delfast.localization.per_example.layers import BatchAxis, ExampleAxis
from delfast.naming import trainable_parameters
from tests import cases
from tests.localization.critmem_loop import as_found, loop
from tests.localization.per_example.loop import assert_parity, example_gradients, in_double, summed
from tests.localization.per_example.routing import ROUTED, experts, losses_of, pooled, routed


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows by one for every batch with a second backward pass."""
    made: list[Any] = []

    class Counted(passes.Comparison):
        def __init__(self, *args: Any) -> None:
            made.append(args)
            super().__init__(*args)

    monkeypatch.setattr(passes, "Comparison", Counted)
    return made


def assert_right(model: nn.Module, batches: list[Any]) -> None:
    """Compare Σ |g| and signed channels with the loop over examples. The latter also depend on the examples' order."""
    gradients = example_gradients(model, batches, losses_of)
    sums = PerExampleGradients(model, trainable_parameters(model), losses_of, "abs")
    assert sum(sums.add(batch) for batch in batches) == len(gradients)
    for name, expected in summed(gradients, "abs").items():
        error = (sums.sums[name] - expected).norm() / expected.norm().clamp_min(1e-300)
        assert error <= 1e-12, f"{name}: relative error {float(error):.3g}"
    channels = delfast.signed_channels(model, batches, loss_fn=losses_of)
    for name in channels.layers:
        weight = dict(model.named_parameters())[name].detach()
        exact = torch.stack([(weight * g[name]).flatten(1).sum(dim=1) for g in gradients]).numpy()
        numpy.testing.assert_allclose(
            channels[name], exact, rtol=1e-6, atol=1e-6 * numpy.abs(exact).max(), err_msg=name
        )
    assert channels.layers


class Scattered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.fc.weight)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros(mask.shape).masked_scatter(mask, self.fc(x[mask]).flatten()).sum(dim=1)


def test_as_many_tokens_in_all_but_not_of_each() -> None:
    model = Scattered()
    ones = torch.ones(2, 3, 1)
    batches = [
        (ones, torch.tensor([[1, 1, 0], [1, 1, 0]]).bool(), torch.tensor([1.0, 1.0])),
        (ones, torch.tensor([[1, 1, 1], [1, 0, 0]]).bool(), torch.tensor([1.0, -1.0])),
    ]
    options: dict[str, Any] = {"loss_fn": lambda model, batch: model(batch[0], batch[1]) * batch[2]}
    scores = delfast.score(model, batches, "grad", per_example=True, **options)
    assert scores.gradients is not None and float(scores.gradients["fc.weight"]) * 4 == 8
    channels = delfast.signed_channels(model, batches, **options)
    assert channels["fc.weight"][:, 0].tolist() == [2, 2, 3, -1]


@pytest.mark.parametrize("name", ROUTED)
def test_routed_networks(name: str) -> None:
    assert_right(*routed(name, 0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("name", ROUTED)
def test_routed_networks_of_many_seeds(name: str, seed: int) -> None:
    assert_right(*routed(name, seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("count", [2, 3, 4, 6, 8])
def test_routed_experts_of_many_seeds(count: int, top: int, seed: int) -> None:
    torch.manual_seed(seed)
    by = ("looped", "sorted", "masked", "checkpoint")[seed % 4]
    assert_right(*in_double(*experts(count, top, by, n=4 + seed % 3, t=1 + seed % 4)))


class Graphs(nn.Module):
    """A graph network: rows are the nodes of all graphs; messages along edges, and one sum a graph, by index_add."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.message, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.shift = nn.Parameter(torch.randn(5))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.first(batch["nodes"]).tanh()
        source, target = batch["edges"]
        x = (x.index_add(0, target, self.message(x[source])) + self.shift).tanh()
        count = len(batch["labels"])
        return self.head(x.new_zeros(count, 5).index_add(0, batch["graph"], x))


def graphs(sizes: list[int]) -> dict[str, Tensor]:
    graph = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    source = torch.arange(len(graph))
    target = torch.cat([part.roll(1) for part in source.split(sizes)])
    nodes, labels = torch.randn(len(graph), 4).double(), torch.randint(0, 3, (len(sizes),))
    return {"nodes": nodes, "edges": torch.stack((source, target)), "graph": graph, "labels": labels}


def graph(batch: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    own = batch["graph"] == number
    first = int(own.nonzero()[0])
    edges = batch["edges"][:, own[batch["edges"][0]]] - first
    zeros = torch.zeros(int(own.sum()), dtype=torch.int64)
    return {"nodes": batch["nodes"][own], "edges": edges, "graph": zeros, "labels": batch["labels"][number, None]}


@pytest.mark.parametrize("seed", [0, pytest.param(range(1, 41), marks=pytest.mark.slow)], ids=["one seed", "forty"])
def test_graph_networks(seed: int | range) -> None:
    def losses(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch), batch["labels"], reduction="none")

    for number in [seed] if isinstance(seed, int) else seed:
        torch.manual_seed(number)
        model = Graphs().double().eval()
        batches = [
            graphs(sizes) for sizes in ([3, 3, 3, 3], [2, 4, 3, 3], [5, 1, 2, 4, 3], [3, 3, 3, 3], [4], [2, 1, 6])
        ]
        parameters = trainable_parameters(model)
        sums = PerExampleGradients(model, parameters, losses, "abs")
        expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for batch in batches:
            sums.add(batch)
            for number in range(len(batch["labels"])):
                gradients = torch.autograd.grad(losses(model, graph(batch, number)).sum(), list(parameters.values()))
                for total, gradient in zip(expected.values(), gradients, strict=True):
                    total += gradient.abs()
        for name, total in expected.items():
            assert float((sums.sums[name] - total).norm() / total.norm()) <= 1e-12, name


# Any order


class Moved(nn.Module):
    """A layer between moves of rows and their inverses."""

    def __init__(self, moves: list[str]) -> None:
        super().__init__()
        self.moves = moves
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
        self.shift = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:  # (N, T, 3)
        back: list[Any] = []
        for move in self.moves:
            x, inverse = MOVES[move](x)
            back.append(inverse)
        x = (self.layer(x) + self.shift).tanh()
        for inverse in reversed(back):
            x = inverse(x)
        return self.head(x.sum(dim=1))


def by_index(x: Tensor, order: Tensor) -> tuple[Tensor, Any]:
    return x[order], lambda y: y[order.argsort()]


def regrouped(x: Tensor) -> tuple[Tensor, Any]:
    if len(x) % 2:
        return x, lambda y: y
    half = len(x) // 2
    return x.view(2, half, *x.shape[1:]).transpose(0, 1).reshape(
        x.shape
    ), lambda y: y.view(half, 2, *y.shape[1:]).transpose(0, 1).reshape(y.shape)


def sorted_within(x: Tensor) -> tuple[Tensor, Any]:
    order = x.sum(dim=2, keepdim=True).argsort(dim=1).expand_as(x)
    return x.gather(1, order), lambda y: y.gather(1, order.argsort(dim=1))


MOVES: dict[str, Any] = {
    "transpose": lambda x: (x.transpose(0, 1), lambda y: y.transpose(0, 1)),
    "flip": lambda x: (x.flip(0), lambda y: y.flip(0)),
    "roll": lambda x: (x.roll(1, 0), lambda y: y.roll(-1, 0)),
    "roll by the size": lambda x: (x.roll(len(x) - 4, 0), lambda y: y.roll(4 - len(x), 0)),
    "at random": lambda x: by_index(x, torch.randperm(len(x))),
    "by value": lambda x: by_index(x, x.sum(dim=(1, 2)).argsort()),
    "within": sorted_within,
    "regroup": regrouped,
    "in halves": lambda x: (
        torch.cat((x[len(x) // 2 :], x[: len(x) // 2])),
        lambda y: torch.cat((y[len(y) - len(y) // 2 :], y[: len(y) - len(y) // 2])),
    ),
    "flip if": lambda x: (x.flip(0), lambda y: y.flip(0)) if float(x.sum()) > 0 else (x, lambda y: y),
    "rows if": lambda x: (
        (x.flatten(0, 1).roll(1, 0).view(x.shape), lambda y: y.flatten(0, 1).roll(-1, 0).view(y.shape))
        if float(x.sum()) > 0
        else (x, lambda y: y)
    ),
    "merge": lambda x: (x.flatten(0, 1).unsqueeze(0), lambda y: y.view(x.shape)),
}


def check_moves(moves: list[str], sizes: list[int], tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    batches = [(torch.randn(n, tokens, 3), torch.randint(0, 3, (n,))) for n in sizes]
    assert_right(*in_double(Moved(moves), batches))


DRAWN = {
    "moves": st.lists(st.sampled_from(list(MOVES)), min_size=1, max_size=2),
    "sizes": st.lists(st.integers(1, 9), min_size=2, max_size=3),
    "tokens": st.integers(1, 4),
    "seed": st.integers(0, 2**16),
}


@pytest.mark.long
@settings(max_examples=30, deadline=None, derandomize=True)
@given(**DRAWN)
def test_rows_in_any_order(moves: list[str], sizes: list[int], tokens: int, seed: int) -> None:
    check_moves(moves, sizes, tokens, seed)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, derandomize=True)
@given(**DRAWN)
def test_rows_in_any_order_at_length(moves: list[str], sizes: list[int], tokens: int, seed: int) -> None:
    check_moves(moves, sizes, tokens, seed)


# The second pass


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.integers(2, 300),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_any_two_examples_that_change_places_are_found(count: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    output_grad = torch.randn(count, 3, 4, generator=generator).to(dtype)
    comparison = passes.Comparison(torch.zeros(count), [dtype], seed)
    whose = torch.arange(count)
    swapped = torch.randperm(count, generator=generator)[:2]
    whose[swapped] = whose[swapped.flip(0)]
    mixed = int(swapped[0])
    places = {name: BatchAxis(ExampleAxis(), count) for name in ("right", "moved", "mixed")}
    for weights in comparison.weights:
        w = weights.to(dtype).view(-1, 1, 1)
        added = output_grad * w
        added[mixed] += (output_grad * w)[int(swapped[1])]
        for name, weighted in (("right", output_grad * w), ("moved", output_grad * w[whose]), ("mixed", added)):
            comparison.keep(name, weighted, {name: places[name]})
    total = output_grad.clone()
    total[mixed] += output_grad[int(swapped[1])]
    for name, own in (("right", output_grad), ("moved", output_grad), ("mixed", total)):
        comparison.compare(name, own, {name: places[name]})
    assert comparison.wrong() == ["moved", "mixed"]


def test_what_is_not_finite_is_nowhere_right() -> None:
    comparison = passes.Comparison(torch.zeros(3), [torch.float32], 0)
    output_grad = torch.ones(3, 2)
    output_grad[1, 0] = float("nan")
    comparison.keep("tap", output_grad, {"layer": BatchAxis(ExampleAxis(), 3)})
    comparison.compare("tap", output_grad, {"layer": BatchAxis(ExampleAxis(), 3)})
    assert comparison.wrong() == ["layer"]


# Cases that stay fast


class Cached(nn.Module):
    """A network that makes its mask in the first forward pass and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.ones(x.shape[1], 1, dtype=x.dtype).cumsum(0) / x.shape[1]
        return self.head((self.layer(x) * self.mask).tanh().mean(dim=1))


@pytest.mark.long
def test_ordinary_networks_take_one_pass(compared: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "delfast")
    for name, size in (("resnet18-thin", 8), ("vit", 8)):
        model = build(name, 10, 3, size)
        batches = [(torch.randn(n, 3, size, size), torch.randint(0, 10, (n,))) for n in (5, 2, 1)]
        delfast.score(model, batches, per_example=True)
        delfast.signed_channels(model, batches)
    model, batches = in_double(cases.Everything(), cases.everything_batches(8, 8))
    assert_parity(model, [*batches, tuple(t[:5] for t in batches[0])])
    assert not compared and not caplog.records


@pytest.mark.parametrize("by", ["last", "clip", "first"])
def test_picks_of_a_token_of_each_example_take_one_pass(
    by: str, compared: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "delfast")
    torch.manual_seed(0)
    model, batches = in_double(*pooled(by, n=6))  # the last ones are shorter, a trial of their own
    assert_right(model, batches)
    assert not compared and not caplog.records


def test_what_a_first_pass_makes_and_keeps_costs_one_more_pass(compared: list[Any]) -> None:
    model, [batch] = in_double(Cached(), [(torch.randn(8, 3, 4), torch.randint(0, 3, (8,)))])
    sums = PerExampleGradients(model, trainable_parameters(model), None, "abs")
    for _ in range(4):
        sums.add(batch)
    assert len(compared) == 1


@pytest.mark.slow
def test_classifiers_of_transformers_take_one_pass(compared: list[Any]) -> None:
    hub = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"vocab_size": 50, "num_labels": 2, "pad_token_id": 0}
    bert = {
        **sizes, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 20,
    }  # fmt: skip
    gpt2 = {**sizes, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20}
    batches = []
    for n, t in ((6, 8), (6, 8), (3, 8), (6, 7)):
        mask = (torch.arange(t) < torch.randint(2, t + 1, (n, 1))).long()
        batches.append((torch.randint(1, 50, (n, t)) * mask, mask, torch.randint(0, 2, (n,))))

    def losses(model: nn.Module, batch: Any) -> Tensor:
        logits = model(input_ids=batch[0], attention_mask=batch[1]).logits
        return nn.functional.cross_entropy(logits, batch[2], reduction="none")

    for model in (
        hub.BertForSequenceClassification(hub.BertConfig(**bert)),
        hub.RobertaForSequenceClassification(hub.RobertaConfig(**bert)),
        hub.LlamaForSequenceClassification(hub.LlamaConfig(**bert)),
        hub.GPT2ForSequenceClassification(hub.GPT2Config(**gpt2)),
    ):
        delfast.score(model, batches, per_example=True, loss_fn=losses)
        assert not compared, type(model)


# CritMem


@pytest.mark.parametrize("name", ["experts looped", "shuffled values", "shuffled swap"])
def test_critmem_of_routed_networks(name: str) -> None:
    model, batches = routed(name, 1)
    for parameter_name, parameter in model.named_parameters():  # an expert is not used by every example
        parameter.requires_grad_(not parameter_name.startswith("experts"))
    batches = [(x, model(x).argmax(dim=1)) for x, _ in batches[:4]]
    found = loop(model, batches, 3)
    assert as_found(critmem(model, batches, max_channels=3)) == found
    assert sum(len(channels) for channels, _ in found) > len(found)


def test_a_batch_of_another_layout_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "delfast")
    model, batches = routed("shuffled values", 0)
    delfast.score(model, [*batches, *batches], per_example=True, loss_fn=losses_of)
    logged = [name for record in caplog.records for name in model.state_dict() if f"'{name}'" in record.getMessage()]
    assert sorted(logged) == ["layer.bias", "layer.weight"]


class ScaledByNumpy(nn.Module):
    """Attention with one head, with NumPy scalars in place of Python numbers."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        super().__init__()
        self.make = make
        self.query, self.key, self.head = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2) / self.make(x.shape[-1])
        return self.head((scores.softmax(dim=-1) @ x).mean(dim=1))


@pytest.mark.parametrize("make", [numpy.sqrt, numpy.float32, numpy.int64, lambda n: torch.as_tensor(numpy.array(n))])
def test_numpys_scalars_are_plain_numbers_and_its_arrays_are_not(make: Any, compared: list[Any]) -> None:
    batches = [(torch.randn(n, 5, 4, dtype=torch.float64), torch.arange(n) % 3) for n in (8, 6)]
    assert_right(ScaledByNumpy(make).double(), batches)
    assert bool(compared) == isinstance(make(4), Tensor)
