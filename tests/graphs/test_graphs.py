"""The engine of captured passes: what it captures, what it refuses, and that a wrong replay does not count."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import delfast
from delfast import InputError, feeding
from delfast.evaluation import accuracy_and_loss, kl_to_oracle, predictions
from delfast.graphs import MAX_SHAPES, Graphed
from delfast.loaders import MIN_BATCHES, is_frequent
from tests.cases import everything_batches, image_batches, resnet18
from tests.graphs.double import Double

CPU = torch.device("cpu")


class Sum:
    """A function that adds its batches to a sum, and counts how often Python runs it."""

    def __init__(self, **options: Any) -> None:
        self.total, self.calls = torch.zeros(3), 0
        self.backend = Double(CPU)
        self.graphed = Graphed(self.run, self.backend, state=lambda: {0: self.total}, **options)

    def run(self, batch: Any) -> Any:
        self.calls += 1
        self.total += batch["x"].sum(dim=0)
        return {"mean": batch["x"].mean()}


def test_python_runs_for_the_first_batch_of_a_shape_alone() -> None:
    add, expected = Sum(), torch.zeros(3)
    for number, size in enumerate([4, 4, 2, 4, 2, 4]):
        x = torch.randn(size, 3)
        found = add.graphed({"x": x})
        expected += x.sum(dim=0)
        assert torch.equal(add.total, expected) and torch.equal(found["mean"], x.mean())
        assert add.calls == (3 if number < 2 else 6)
    assert (add.backend.captures, add.backend.replays) == (2, 6)


def test_results_are_not_overwritten_by_the_next_replay() -> None:
    add = Sum()
    found = [add.graphed({"x": torch.full((2, 3), float(value))})["mean"] for value in range(4)]
    assert torch.stack(found).tolist() == [0, 1, 2, 3]


def test_only_frequent_shapes_are_captured() -> None:
    loader = [(torch.zeros(4, 2), torch.zeros(4)) for _ in range(MIN_BATCHES)] + [(torch.zeros(3, 2), torch.zeros(3))]
    for epochs, expected in ((1, [True, False]), (MIN_BATCHES, [True, True])):
        frequent = is_frequent(loader, epochs, "auto")
        assert [frequent(loader[0]), frequent(loader[-1])] == expected
    assert not is_frequent(loader[2:], 1, "auto")(loader[2]) and is_frequent(loader[2:], 1, True)(loader[2])
    assert not is_frequent(None, 1, "auto")(loader[0]) and not is_frequent(iter(loader), 1, "auto")(loader[0])
    torchs = torch.utils.data.DataLoader(range(4 * MIN_BATCHES + 3), batch_size=4)  # type: ignore[arg-type]
    frequent = is_frequent(torchs, 1, "auto")
    assert [frequent((torch.zeros(n), torch.zeros(n))) for n in (4, 3)] == [True, False]


def function(change: Callable[[Any, Any], Any]) -> tuple[Graphed, list[Tensor], Double]:
    state, outside = [torch.zeros(2)], torch.zeros(2)
    backend = Double(CPU)
    return (
        Graphed(lambda batch: change(state[0], (batch, outside)), backend, state=lambda: dict(enumerate(state))),
        state,
        backend,
    )


def drawn(state: Tensor, batch: Any) -> Tensor:
    random.random()
    return state.add_(1)


REFUSED: dict[str, tuple[Callable[[Tensor, Any], Any], str]] = {
    "a tensor that is not its state": (
        lambda s, b: b[1].add_(1),
        "changes a tensor that is not part of its known state",
    ),
    "a read": (lambda s, b: s.add_(float(b[0][0].sum())), "reads values on the host"),
    "a shape that depends on values": (lambda s, b: s.add_(len(b[0][0].nonzero())), "reads values on the host"),
    "a mask": (lambda s, b: s.index_put_([b[0][0][0] > 0], s.new_ones(())), "reads values on the host"),
    "a choice": (lambda s, b: s.add_(1) if b[0][1]["step"] % 2 else s.mul_(2), "operations change from step to step"),
    "a number": (lambda s, b: s.add_(b[0][1]["step"]), "the arguments of aten.add_.Tensor change"),
    "another tensor": (lambda s, b: s.add_(TABLE[b[0][1]["step"]]), "the arguments of aten.add_.Tensor change"),
    "Python's generator": (drawn, "draws from Python's or numpy's generator"),
}
TABLE = list(torch.arange(8.0))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_replay_would_repeat_wrongly_is_refused(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    change, reason = REFUSED[kind]
    graphed, state, backend = function(change)
    plain = torch.zeros(2)
    outside = torch.zeros(2)
    with caplog.at_level(logging.WARNING, "delfast"):
        for step in range(4):
            batch = (torch.ones(2, 2), {"step": step})
            graphed(batch)
            change(plain, (batch, outside))
    assert torch.equal(state[0], plain) and not backend.captures
    assert reason in caplog.text and len(caplog.records) == 1  # said once


def test_batches_whose_tensors_cannot_be_found_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    class Bag:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    graphed, state, backend = function(lambda s, b: s.add_(b[0][0].x))
    with caplog.at_level(logging.WARNING, "delfast"):
        for value in (1.0, 2.0):
            graphed((Bag(torch.full((2,), value)), torch.zeros(1)))
    assert state[0].tolist() == [3, 3] and "batches with parts of type Bag" in caplog.text and not backend.captures


def test_a_wrong_replay_is_found_and_does_not_count(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add = Sum()
    monkeypatch.setattr(Double, "capture", lambda self, function: (lambda: None, function()))
    with caplog.at_level(logging.WARNING, "delfast"):
        for _ in range(3):
            add.graphed({"x": torch.ones(4, 3)})
    assert add.total.tolist() == [12, 12, 12]
    assert "a replay differs from the run that it was captured from" in caplog.text


def test_a_capture_that_fails_leaves_the_run_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: Double, function: Any) -> Any:
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Double, "capture", fail)
    add = Sum()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, "delfast"):
        for _ in range(3):
            add.graphed({"x": torch.ones(4, 3)})
    assert add.total.tolist() == [12, 12, 12] and torch.equal(torch.get_rng_state(), before)
    assert "the capture failed (operation not permitted when stream is capturing" in caplog.text


def test_a_stop_during_a_capture_leaves_the_state_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Double, function: Any) -> Any:
        function()
        raise KeyboardInterrupt

    monkeypatch.setattr(Double, "capture", stop)
    add = Sum()
    with pytest.raises(KeyboardInterrupt):
        add.graphed({"x": torch.ones(4, 3)})
    assert add.total.tolist() == [0, 0, 0]


def test_many_shapes_are_not_all_captured() -> None:
    add = Sum()
    for size in [*range(1, MAX_SHAPES + 4), MAX_SHAPES + 3]:
        add.graphed({"x": torch.ones(size, 3)})
    assert add.backend.captures == MAX_SHAPES
    assert add.total[0] == sum(range(1, MAX_SHAPES + 4)) + MAX_SHAPES + 3


def test_random_numbers_are_drawn_again_in_every_replay() -> None:
    graphed, state, backend = function(lambda s, b: s.add_(torch.rand(2)))
    torch.manual_seed(0)
    for _ in range(4):
        graphed((torch.ones(2),))
    found, after = state[0].clone(), torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(found, torch.zeros(2) + torch.rand(2) + torch.rand(2) + torch.rand(2) + torch.rand(2))
    assert backend.replays == 4 and torch.equal(after, torch.get_rng_state())


def test_localization_is_captured(backends: list[Double]) -> None:
    model, batches = resnet18().eval(), image_batches(80, 8)
    expected = delfast.localize(model, batches, 0.3, cuda_graphs=False)
    mask = delfast.localize(model, batches, 0.3)  # "auto": ten batches of a shape
    assert mask.digest == expected.digest and backends[0].replays == len(batches)
    delfast.localize(model, batches[:7], 0.3)
    assert not backends[1].captures


def test_evaluation_is_captured(backends: list[Double]) -> None:
    model, other, batches = resnet18(), resnet18(), image_batches(80, 8)
    for measure in (
        lambda **options: predictions(model, batches, **options)[0],
        lambda **options: accuracy_and_loss(model, batches, **options).confidences,
        lambda **options: torch.tensor(
            list(delfast.evaluate(model, *(batches[:] for _ in range(3)), **options).as_dict().values())
        ),
    ):
        count = len(backends)
        assert torch.equal(measure(cuda_graphs="auto"), measure(cuda_graphs=False))
        assert len(backends) > count and all(backend.replays == len(batches) for backend in backends[count:])
    assert kl_to_oracle(model, other, batches) > 0 and backends[-1].replays == len(batches)


def test_a_callers_loss_is_captured_where_they_say_that_it_is_pure(backends: list[Double]) -> None:
    def loss_fn(network: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(network(batch[0]), batch[1], reduction="none")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    batches = [(torch.randn(4, 4), torch.arange(4) % 3) for _ in range(9)]
    expected = delfast.localize(model, batches, 0.5, loss_fn=loss_fn)
    assert not backends
    assert delfast.localize(model, batches, 0.5, loss_fn=loss_fn, cuda_graphs=True).digest == expected.digest
    assert backends[0].replays == 9


@pytest.mark.skipif(torch.cuda.is_available(), reason="names the device of a machine without a GPU")
def test_true_is_refused_without_a_gpu() -> None:
    batches = everything_batches()
    with pytest.raises(InputError, match="expected a model on a CUDA device for cuda_graphs=True, got cpu"):
        delfast.score(resnet18(), image_batches(), cuda_graphs=True)
    for value in ("yes", 1, None):
        with pytest.raises(InputError, match="expected cuda_graphs to be 'auto', True or False"):
            delfast.score(resnet18(), batches, cuda_graphs=value)  # type: ignore[arg-type]


def test_examples_on_the_device_are_read_inside_the_graph(
    backends: list[Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches by index: the graph's only input is the index; every method and pass gives the same bits."""
    x, y = image_batches(80, 80)[0]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    model = resnet18().eval()
    expected = delfast.localize(model, loader, 0.3, cuda_graphs=False)
    accuracy = accuracy_and_loss(model, loader, cuda_graphs=False)
    for name in ("delfast.localization.gradient", "delfast.evaluation.outputs"):
        monkeypatch.setattr(f"{name}.feed", lambda loader, device: feeding.feed(loader, device, resident=True))
    assert delfast.localize(model, loader, 0.3).digest == expected.digest and backends[-1].replays == 10
    found = accuracy_and_loss(model, loader)
    assert found.loss == accuracy.loss and torch.equal(found.confidences, accuracy.confidences)
    assert backends[-1].replays == 10


@pytest.mark.parametrize("criterion", ["grad", "squared_grad"])
def test_per_example_passes_are_captured_after_their_trial(criterion: Any, backends: list[Double]) -> None:
    model, batches = resnet18().eval(), image_batches(84, 8)
    expected = delfast.score(model, batches, criterion, per_example=True, cuda_graphs=False)
    found = delfast.score(model, batches, criterion, per_example=True)
    assert expected.gradients is not None and found.gradients is not None
    assert all(torch.equal(found.gradients[name], value) for name, value in expected.gradients.items())
    assert backends[0].replays == 9  # ten of a shape; the trial's is not one, and the last batch is shorter


def test_signed_channels_are_captured(backends: list[Double]) -> None:
    model, batches = resnet18().eval(), image_batches(84, 8)
    expected = delfast.signed_channels(model, batches, cuda_graphs=False)
    found = delfast.signed_channels(model, batches)
    assert (found.matrix == expected.matrix).all() and found.layers == expected.layers
    assert backends[0].replays == 9


def test_per_example_passes_that_depend_on_values_are_not_captured(backends: list[Double]) -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.one(x[x.sum(dim=1).argsort()]).tanh())

    torch.manual_seed(0)
    model = Routed().eval()
    batches = [(torch.randn(8, 4), torch.arange(8) % 3) for _ in range(9)]
    expected = delfast.score(model, batches, "grad", per_example=True, cuda_graphs=False)
    found = delfast.score(model, batches, "grad", per_example=True, cuda_graphs=True)
    assert expected.gradients is not None and found.gradients is not None
    assert all(torch.equal(found.gradients[name], value) for name, value in expected.gradients.items())
    assert not backends[0].captures


def test_per_example_passes_read_by_index_are_captured(backends: list[Double], monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = image_batches(80, 80)[0]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    model = resnet18().eval()
    expected = delfast.score(model, loader, "grad", per_example=True, cuda_graphs=False)
    monkeypatch.setattr(
        "delfast.localization.gradient.feed", lambda loader, device: feeding.feed(loader, device, resident=True)
    )
    found = delfast.score(model, loader, "grad", per_example=True)
    assert expected.gradients is not None and found.gradients is not None
    assert all(torch.equal(found.gradients[name], value) for name, value in expected.gradients.items())
    assert backends[0].replays == 9
