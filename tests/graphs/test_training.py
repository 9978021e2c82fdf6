"""Captured training steps: the same bits as steps that Python runs."""

from __future__ import annotations

import copy
import functools
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import delfast
from delfast import TrainingOptions, feeding
from delfast.graphs import Graphed
from delfast.ops.layout import pack
from delfast.parameter_mask import ParameterMask
from delfast.recording import Recorder
from delfast.unlearning import METHODS, Method, train
from tests.graphs.double import Double

TRAINED = sorted(name for name, method in METHODS.items() if method().epochs)


def make_model(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


def batches(count: int, seed: int, last: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [6] * (count - 1) + [last]
    return [(torch.randn(n, 2, 4, 4, generator=generator), torch.randint(4, (n,), generator=generator)) for n in sizes]


def unlearned(method: str | Method, captured: bool, **options: Any) -> dict[str, Any]:
    model = make_model()
    init = lambda: make_model(7)  # noqa: E731
    needs = (METHODS[method] if isinstance(method, str) else type(method)).needs
    torch.manual_seed(5)  # of the dropout
    hyperparameters = {"epochs": 3} | ({} if isinstance(method, Method) else options.pop("hyperparameters", {}))
    result = delfast.unlearn(
        model,
        retain=batches(4, seed=1),
        forget=batches(3, seed=2),
        init=init if {"init", "everything"} & needs else None,
        method=method,
        seed=1,
        training=TrainingOptions(cuda_graphs=captured, **options.pop("training", {})),
        **hyperparameters,
        **options,
    )
    return {**model.state_dict(), "losses": torch.tensor(result.losses, dtype=torch.float64)}


def equal(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_gives_the_same_bits_captured(method: str, backends: list[Double]) -> None:
    expected = unlearned(method, captured=False)
    assert not backends
    found = unlearned(method, captured=True)
    assert equal(found, expected)
    assert sum(backend.replays for backend in backends) > sum(backend.captures for backend in backends) >= 2


class Stopped(Exception):
    pass


@pytest.mark.parametrize("method", ["del", "relabel", "l1-sparse", "scrub"])
def test_a_resumed_run_gives_the_same_bits_captured(method: str, backends: list[Double], tmp_path: Path) -> None:
    def stop(found: Any, description: str, total: int) -> Any:
        if description.startswith("epoch 3/"):
            raise Stopped
        return found

    expected = unlearned(method, captured=True)
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(Stopped):
        unlearned(method, captured=True, checkpoint=path, training={"progress": stop})
    count = len(backends)
    assert equal(unlearned(method, captured=True, checkpoint=path, resume=True), expected)
    assert len(backends) > count and backends[-1].replays


def trained(make: Callable[[nn.Module], torch.optim.Optimizer], captured: bool, **options: Any) -> dict[str, Tensor]:
    model = make_model()
    torch.manual_seed(5)
    train(model, batches(4, seed=1), make(model), epochs=3, cuda_graphs=captured, **options)
    return model.state_dict()


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "MaskedSGD": lambda m: delfast.optim.MaskedSGD(
        m.named_parameters(), delfast.unlearning.api.full_mask(m), lr=0.1, momentum=0.9, weight_decay=1e-3
    ),
    "MaskedAdamW": lambda m: delfast.optim.MaskedAdamW(m.named_parameters(), delfast.unlearning.api.full_mask(m)),
    "fused SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.125, momentum=0.9, fused=True),
    "fused AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.125, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_that_read_their_rate_on_the_device(name: str, backends: list[Double]) -> None:
    options: dict[str, Any] = {"max_norm": 1.0}
    if "fused" in name:
        options["schedule"] = "constant"  # float32 holds the rate
    expected = trained(OPTIMIZERS[name], captured=False, **options)
    found = trained(OPTIMIZERS[name], captured=True, **options)
    assert backends[0].replays == 12 and equal(found, expected)


HOST_RATES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "SGD foreach": functools.partial(torch.optim.SGD, foreach=True, momentum=0.9),
    "Adam foreach": functools.partial(torch.optim.Adam, foreach=True),
    "NAdam": torch.optim.NAdam,
}


@pytest.mark.parametrize("name", HOST_RATES)
def test_optimizers_that_read_their_rate_on_the_host_are_not_captured(
    name: str, backends: list[Double], caplog: pytest.LogCaptureFixture
) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return HOST_RATES[name](model.parameters(), lr=0.1)

    with caplog.at_level(logging.WARNING, "delfast"):
        found = trained(make, captured=True)
    assert not backends[0].captures and equal(found, trained(make, captured=False))
    assert "reads its learning rate on the host" in caplog.text and len(caplog.records) == 1


def test_a_baked_rate_is_found(caplog: pytest.LogCaptureFixture) -> None:
    """A rate that Python passes to the optimizer's operations differs between the recorded runs."""
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.125)

    def step(batch: Tensor) -> Tensor:
        layer.zero_grad()
        layer(batch).sum().backward()
        optimizer.step()
        return batch.sum()

    def vary() -> None:
        optimizer.param_groups[0]["lr"] /= 2

    backend = Double(torch.device("cpu"))
    graphed = Graphed(step, backend, state=lambda: dict(layer.named_parameters()), vary=vary, watched=(layer,))
    with caplog.at_level(logging.WARNING, "delfast"):
        graphed(torch.ones(4, 3))
    assert not backend.captures and "the arguments of aten.add_.Tensor change" in caplog.text


def test_a_module_that_counts_or_draws_is_not_captured_and_runs_once_a_step(
    backends: list[Double], caplog: pytest.LogCaptureFixture
) -> None:
    class Counts(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.count, self.how, self.generator = 0, how, torch.Generator().manual_seed(0)

        def forward(self, x: Tensor) -> Tensor:
            if self.how == "count":
                self.count += 1
                return x * self.count
            if self.how == "generator":
                return x * torch.rand((), generator=self.generator)
            return x * random.random()

    for how, reason in (
        ("count", "changes the attribute 'count' of a Counts"),
        ("generator", "draws from a module's generator"),
        ("python", "draws from Python's or numpy's generator"),
    ):
        states = []
        for captured in (False, True):
            model = nn.Sequential(make_model(), Counts(how))
            torch.manual_seed(5)
            random.seed(5)
            with caplog.at_level(logging.WARNING, "delfast"):
                train(model, batches(4, 1), OPTIMIZERS["MaskedSGD"](model), epochs=2, cuda_graphs=captured)
            states.append(model.state_dict())
        assert equal(*states) and reason in caplog.text and not backends[-1].captures


def test_attributes_that_change_between_epochs_are_captured_again(backends: list[Double]) -> None:
    class Scaled(nn.Module):
        scale = 1.0

        def __init__(self) -> None:
            super().__init__()
            self.scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    states = []
    for captured in (False, True):
        model = nn.Sequential(make_model(), Scaled())

        def progress(found: Any, description: str, total: int, of: Any = model) -> Any:
            of[1].scale, of[0][1].momentum = 1.0 + int(description[6]), 0.1 * int(description[6])
            return found

        torch.manual_seed(5)
        train(model, batches(4, 1), OPTIMIZERS["MaskedSGD"](model), epochs=3, cuda_graphs=captured, progress=progress)
        states.append(model.state_dict())
    assert equal(*states) and backends[0].captures == 6 and backends[0].replays == 12


def test_a_weight_that_is_changed_between_epochs_keeps_the_change_in_compact_training(backends: list[Double]) -> None:
    states = []
    for captured in (False, True):
        model = make_model()

        def progress(found: Any, description: str, total: int, of: Any = model) -> Any:
            with torch.no_grad():
                of[0].weight.clamp_(-0.1, 0.1)
            return found

        torch.manual_seed(5)
        delfast.unlearn(
            model, retain=batches(4, 1), forget=batches(3, 2), method="finetune", epochs=3,
            mask=delfast.localize(make_model(), batches(3, 2), 0.3),
            training=TrainingOptions(cuda_graphs=captured, progress=progress),
        )  # fmt: skip
        states.append(model.state_dict())
    assert equal(*states) and backends[-1].replays == 12


def test_precision_and_frozen_statistics(backends: list[Double]) -> None:
    options = {"training": {"precision": "bf16", "batchnorm": "frozen"}}
    assert equal(unlearned("finetune", True, **copy.deepcopy(options)), unlearned("finetune", False, **options))


@dataclass(frozen=True, kw_only=True)
class DrawsLabels(Method):
    """A method that draws labels in its loss."""

    name: ClassVar[str] = "draws-labels"

    def loss(self, task: Any, step: Any) -> Tensor:
        generator = torch.Generator().manual_seed(step["step"])
        _, logits, targets = task.logits(step["retain"])
        return functional.cross_entropy(logits, torch.randint(4, targets.shape, generator=generator))


@dataclass(frozen=True, kw_only=True)
class Falls(Method):
    """A method whose loss has a weight that Python changes with the epoch."""

    name: ClassVar[str] = "falls"

    def loss(self, task: Any, step: Any) -> Tensor:
        loss: Tensor = task.loss(step["retain"]) * (1 - step["epoch"] / 10)
        return loss


@dataclass(frozen=True, kw_only=True)
class Constant(Method):
    """A method that makes a tensor of a Python value."""

    name: ClassVar[str] = "constant"

    def loss(self, task: Any, step: Any) -> Tensor:
        loss: Tensor = task.loss(step["retain"]) * torch.tensor(0.5)
        return loss


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (DrawsLabels(), "draws from a generator of its own"),
        (Falls(), "the arguments of aten.mul.Tensor change from step to step"),
        (Constant(), "makes tensors of Python's values"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_python_values_in_a_loss_are_found(
    method: Method, reason: str, backends: list[Double], caplog: pytest.LogCaptureFixture
) -> None:
    expected = unlearned(method, captured=False)
    with caplog.at_level(logging.WARNING, "delfast"):
        assert equal(unlearned(method, captured=True), expected)
    assert reason in caplog.text
    assert not sum(backend.captures for backend in backends)


def test_foreign_hooks_switch_capture_off_by_name(backends: list[Double], caplog: pytest.LogCaptureFixture) -> None:
    model, calls = make_model(), []
    model[4].register_forward_hook(lambda *_: calls.append(1))
    with caplog.at_level(logging.WARNING, "delfast"):
        train(model, batches(4, 1), OPTIMIZERS["MaskedSGD"](model), epochs=2, cuda_graphs=True)
    assert len(calls) == 8 and not backends[0].captures
    assert "a hook of module '4'" in caplog.text and len(caplog.records) == 1


def test_a_hook_that_comes_later_drops_the_graphs(backends: list[Double]) -> None:
    model, calls = make_model(), []

    def progress(found: Any, description: str, total: int) -> Any:
        if description.startswith("epoch 2/"):
            model[4].weight.register_hook(lambda g: calls.append(1))
        return found

    train(model, batches(4, 1), OPTIMIZERS["MaskedSGD"](model), epochs=3, cuda_graphs=True, progress=progress)
    assert backends[0].replays == 4 and len(calls) == 8


def test_version_counters_move_with_every_replay(backends: list[Double]) -> None:
    model = make_model()
    scores = delfast.score(model, batches(2, 1))
    versions: list[int] = []

    def progress(found: Any, description: str, total: int) -> Any:
        for batch in found:
            versions.append(model[0].weight._version)
            yield batch

    train(model, batches(4, 1), OPTIMIZERS["MaskedSGD"](model), epochs=1, cuda_graphs=True, progress=progress)
    assert sorted(set(versions)) == versions
    with pytest.raises(delfast.InputError, match="changed"):
        scores.select(0.3)


def test_a_state_that_is_replaced_is_captured_again(backends: list[Double]) -> None:
    states: list[dict[str, Tensor]] = []
    for captured in (False, True):
        model = make_model()
        optimizer = OPTIMIZERS["MaskedSGD"](model)

        def progress(found: Any, description: str, total: int, of: Any = optimizer) -> Any:
            if description.startswith("epoch 2/"):
                of.load_state_dict(copy.deepcopy(of.state_dict()))
            return found

        torch.manual_seed(5)
        train(model, batches(4, 1), optimizer, epochs=3, cuda_graphs=captured, progress=progress)
        states.append(model.state_dict())
    assert equal(*states) and backends[0].captures == 4 and backends[0].replays == 12


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_mask_that_is_replaced_and_put_back_is_captured_again(momentum: float, backends: list[Double]) -> None:
    """The plan that the captured step reads is freed with the first mask, and no state need have changed since."""
    model = make_model()
    first, second = (delfast.score(model, criterion="weight").select(budget) for budget in (0.5, 0.9))
    states: list[dict[str, Tensor]] = []
    for captured in (False, True):
        model = make_model()
        optimizer = delfast.optim.MaskedSGD(model.named_parameters(), first, lr=0.1, momentum=momentum)

        def progress(found: Any, description: str, total: int, of: Any = optimizer) -> Any:
            if description.startswith("epoch 2/"):
                of.replace_mask(second)
                of.replace_mask(first)
            return found

        torch.manual_seed(5)
        train(model, batches(4, 1), optimizer, epochs=3, cuda_graphs=captured, progress=progress)
        states.append(model.state_dict())
    assert equal(*states) and backends[0].captures == 4 and backends[0].replays == 12


@pytest.mark.parametrize("method", TRAINED)
def test_examples_on_the_device_give_the_same_bits(
    method: str, backends: list[Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaders of resident examples: batches by index, in an order that is shuffled in each epoch."""

    def run(captured: bool) -> dict[str, Any]:
        sets = [torch.cat(parts) for parts in zip(*batches(5, seed=1), strict=True)]
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*sets), 6, shuffle=True, generator=torch.Generator().manual_seed(2)
        )
        model = make_model()
        torch.manual_seed(5)
        needs = METHODS[method].needs
        init = (lambda: make_model(7)) if {"init", "everything"} & needs else None
        training = TrainingOptions(cuda_graphs=captured)
        forget = batches(3, seed=2)
        delfast.unlearn(
            model, retain=loader, forget=forget, init=init, method=method, seed=1, training=training, epochs=3
        )
        return model.state_dict()

    expected = run(captured=False)
    monkeypatch.setattr(
        "delfast.unlearning.steps.feed", lambda loader, device: feeding.feed(loader, device, resident=True)
    )
    assert equal(run(captured=True), expected)
    assert sum(backend.captures for backend in backends) < sum(backend.replays for backend in backends)


def test_a_mask_by_input_channels_is_captured(backends: list[Double]) -> None:
    """Channels along another dimension become elements once, where the mask is given, and not in a captured step."""
    found = []
    for captured in (False, True):
        model = make_model()
        parts = {
            name: ParameterMask(tuple(p.shape), "row", pack(torch.arange(p.shape[1]) % 2 == 0), dim=1)
            for name, p in model.named_parameters()
            if p.ndim > 1
        }
        optimizer = delfast.optim.MaskedSGD(model.named_parameters(), delfast.Mask(parts), lr=0.1, momentum=0.9)
        torch.manual_seed(5)
        train(model, batches(4, seed=1), optimizer, epochs=3, cuda_graphs=captured)
        found.append(model.state_dict())
    assert equal(*found) and backends[0].captures == 2 and backends[0].replays == 12


@pytest.mark.parametrize("dim", [0, 1])
def test_the_first_step_with_a_mask_of_the_host_computes_on_the_device_alone(dim: int) -> None:
    weight = nn.Parameter(torch.zeros(8, 6, device="meta"))
    weight.grad = torch.zeros_like(weight)
    mask = delfast.Mask({"weight": ParameterMask((8, 6), "row", torch.tensor([0b101], dtype=torch.uint8), dim)})
    optimizer = delfast.optim.MaskedAdamW([("weight", weight)], mask)
    recorder = Recorder([weight], weight.device)
    with recorder:
        optimizer.step()
    assert recorder.reason is None and optimizer.state[weight]["step"].device == weight.device
