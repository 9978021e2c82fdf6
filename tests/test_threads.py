"""Several threads at once, each with a model of its own: everything is as in one thread, and others notice nothing."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delfast
from delfast import InputError
from delfast.compaction import guard
from delfast.evaluation import predictions
from delfast.seeding import seeded
from delfast.unlearning import train
from tests import cases

THREADS = 4


class Net(nn.Module):
    """Rows, norms and biases to guard, a shared layer, and a truncated normal initialization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8, 16)
        self.head = nn.Linear(16, 10)
        nn.init.trunc_normal_(self.hidden.weight, std=0.3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.hidden(self.norm(self.conv(images)).relu().mean((2, 3))).relu())


def job(number: int) -> list[Tensor]:
    """Per-example sums, then the state after each of: compact training, a reset, unlearning by two methods.

    number: of the data and the seed.
    """
    batches, states = cases.image_batches(seed=number), []
    with seeded(number):
        model = Net()

    def note() -> None:
        states.extend(value.clone() for value in model.state_dict().values())

    sums = delfast.score(model, batches[:1], per_example=True).gradients
    assert sums is not None
    states.extend(sums.values())
    mask = delfast.localize(model, batches[:1], budget=0.4)
    with delfast.compact(model, mask) as handle:
        optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01, weight_decay=0.1)
        for images, targets in batches:
            optimizer.zero_grad()
            cross_entropy(model(images), targets).backward()
            optimizer.step()
    note()
    delfast.reset_(model, mask, init=Net, seed=number + 3)
    note()
    for method in ("del", "relabel"):
        delfast.unlearn(
            model, forget=batches[:1], retain=batches[1:], mask=mask, method=method, init=Net, seed=number, epochs=1,
            lr=0.01,
        )  # fmt: skip
        note()
    return states


def numbers() -> Iterator[Tensor]:
    """Draw from torch's own generator, from its present state on."""
    while True:
        yield torch.randn(7)


def plain_adam() -> Iterator[Tensor]:
    """The weights of a model that has nothing to do with delfast, step by step."""
    with seeded(9):
        model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    while True:
        for images, targets in cases.image_batches(seed=9):
            optimizer.zero_grad()
            cross_entropy(model(images), targets).backward()
            optimizer.step()
            yield model.hidden.weight.detach().clone()


def until(stop: threading.Event, source: Callable[[], Iterator[Tensor]]) -> list[Tensor]:
    found = []
    for value in source():
        found.append(value)
        if stop.wait(1e-3):  # leaves the others most of the time
            return found
    raise AssertionError("expected a source without an end")


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns every 0.1 ms, 50 times as often as usual, each with one thread for its arithmetic."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.long
@pytest.mark.parametrize("runs", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_threads_end_with_the_bits_of_one_thread_and_disturb_no_other(runs: int, often: None) -> None:
    expected = [job(number) for number in range(THREADS)]
    torch.manual_seed(7)
    stop = threading.Event()
    with ThreadPoolExecutor(THREADS + 2) as pool:
        others = [(source, pool.submit(until, stop, source)) for source in (numbers, plain_adam)]
        try:
            futures = [pool.submit(lambda n=n: [job(n) for _ in range(runs)]) for n in range(THREADS)]
            results = [future.result() for future in futures]
        finally:
            stop.set()
        found = [(source, future.result()) for source, future in others]
    for of_thread, once in zip(results, expected, strict=True):
        assert all(equal(run, once) for run in of_thread)
    torch.manual_seed(7)
    for source, values in found:
        assert equal(values, [value for value, _ in zip(source(), values, strict=False)]), source.__name__


# The hooks


def half_of_the_rows(model: nn.Module) -> delfast.Mask:
    return delfast.Mask.from_dense(
        {
            name: (torch.arange(len(p)) % 2 == 0).reshape(-1, *[1] * (p.ndim - 1)).expand(p.shape)
            for name, p in model.named_parameters()
        }
    )


def test_nothing_keeps_a_compact_model_alive() -> None:
    model = Net()
    delfast.compact(model, half_of_the_rows(model))  # the handle is not kept: the model is protected all the same
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    before = model.norm.weight.detach().clone()
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert torch.equal(model.norm.weight[1::2], before[1::2]) and not torch.equal(model.norm.weight, before)
    watched = {id(parameter) for parameter in model.parameters()}
    assert watched <= guard._registry.guards.keys()
    gone = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert gone() is None and not watched & guard._registry.guards.keys()


def test_one_pair_of_hooks_and_none_of_it_for_optimizers_of_other_models() -> None:
    module = sys.modules["torch.optim.optimizer"]
    hooks = module._global_optimizer_pre_hooks, module._global_optimizer_post_hooks
    before = [list(each.values()) for each in hooks]

    class Odd(torch.optim.SGD):
        """An optimizer whose attributes must not be read more often than is needed."""

        def __hash__(self) -> int:
            raise AssertionError

        def __eq__(self, other: object) -> bool:
            raise AssertionError

    model, other = Net(), nn.Linear(2, 2)
    foreign = Odd(other.parameters(), lr=0.1)
    with delfast.compact(model, half_of_the_rows(model)):
        assert [list(each.values()) for each in hooks] == before
        other(torch.ones(1, 2)).sum().backward()
        foreign.step()
        assert guard._steps.running == []


@pytest.mark.long
def test_the_end_of_the_interpreter_is_quiet() -> None:
    """Parameters may outlive the module that guards them."""
    code = """
import builtins, torch, delfast
builtins.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
delfast.compact(model, delfast.score(model, criterion="weight").select(0.5))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


class Stops(torch.optim.SGD):
    """An optimizer whose step may raise, after a nested step of its parent class's."""

    fails = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)
        if self.fails:
            raise MemoryError


def test_a_step_that_raises_leaves_nothing_behind() -> None:
    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask = half_of_the_rows(model)
    with delfast.compact(model, mask) as handle:
        torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)  # from now on the parent class's step has hooks too
        optimizer = Stops(handle.parameters(), lr=0.1, weight_decay=0.1)
        for fails in (False, True, True, True, False):
            optimizer.fails = fails
            model.zero_grad()
            model(torch.randn(4, 3, 8, 8)).sum().backward()
            if fails:
                kept = {name: p.detach().clone() for name, p in model.named_parameters()}
                with pytest.raises(MemoryError):
                    optimizer.step()
                assert len(guard._steps.running) == 1
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        parameter.copy_(kept[name])
            else:
                optimizer.step()
                assert guard._steps.running == []
    for name, flags in mask.to_dense().items():
        now = dict(model.named_parameters())[name]
        assert torch.equal(now[~flags], before[name][~flags]) and (now != before[name])[flags].any(), name


def test_what_a_raising_step_left_is_not_restored_after_undo() -> None:
    model = Net()
    with delfast.compact(model, half_of_the_rows(model)):
        optimizer = Stops(model.parameters(), lr=0.1)
        optimizer.fails = True
        with pytest.raises(MemoryError):
            optimizer.step()
    optimizer.fails = False
    before = model.norm.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.norm.weight, before * 0.9)


class Decays(torch.optim.SGD):
    """An optimizer that changes everything before its parent class's step, and may call another's or raise after it."""

    inner: torch.optim.Optimizer | None = None
    fails = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)
        if self.inner is not None:
            self.inner.step()
        super().step(closure)
        if self.fails:
            raise MemoryError


ACTIONS = ["plain", "adam", "masked", "decays", "nested", "fails inside", "undo and redo", "other", "before any step"]


@pytest.mark.long
@settings(max_examples=20)
@given(st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=8))
def test_in_any_order_of_steps_only_the_mask_moves(actions: list[str]) -> None:
    with seeded(1):
        model, other = Net(), Net()
    images, targets = cases.image_batches()[0]
    mask = half_of_the_rows(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)  # from now on the parent class's step has hooks too
    guard._steps.running.clear()  # of a step that raised in the last example
    with delfast.compact(model, mask) as handle:
        foreign = torch.optim.SGD(other.parameters(), lr=0.1)
        optimizers = {
            "plain": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
            "adam": torch.optim.AdamW(handle.parameters(), lr=0.01, weight_decay=0.1),
            "masked": delfast.optim.MaskedSGD(model.named_parameters(), handle.mask, lr=0.1),
            "decays": Decays(handle.parameters(), lr=0.1),
        }
        nested, failing = Decays(handle.parameters(), lr=0.1), Decays(handle.parameters(), lr=0.1)
        nested.inner, failing.fails = optimizers["adam"], True
        for action in actions:
            for network in (model, other):
                network.zero_grad()
                cross_entropy(network(images), targets).backward()
            held = {name: p.detach().clone() for name, p in model.named_parameters()}
            if action in optimizers:
                optimizers[action].step()
            elif action == "nested":
                nested.step()
            elif action == "fails inside":
                with pytest.raises(MemoryError):
                    failing.step()
                with torch.no_grad():  # a step that raises is not repaired: its caller has the model of before
                    for name, parameter in model.named_parameters():
                        parameter.copy_(held[name])
            elif action == "undo and redo":
                handle.undo()
                handle.redo()
            elif action == "other":
                foreign.step()
            assert len(guard._steps.running) <= ("fails inside" in actions)
            now = model.state_dict()
            for name, flags in mask.to_dense().items():
                assert torch.equal(now[name][~flags], before[name][~flags]), (name, action)
    if {"plain", "adam", "masked", "decays", "nested"} & set(actions):
        flags = mask.to_dense()["head.weight"]
        assert (model.head.weight != before["head.weight"])[flags].any()


# One model, two threads


def test_a_model_that_another_thread_uses_is_refused() -> None:
    model, batches = Net(), cases.image_batches()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    calls = {
        "score": lambda m: delfast.score(m, batches),
        "per example": lambda m: delfast.score(m, batches[:1], per_example=True),
        "predictions": lambda m: predictions(m, batches),
        "unlearn": lambda m: delfast.unlearn(m, retain=batches, method="finetune", epochs=1),
        "train": lambda m: train(m, batches, torch.optim.SGD(m.parameters()), epochs=1),
    }

    def loss(model: nn.Module, batch: Any) -> Tensor:
        """Meanwhile, in another thread, everything else."""
        for name, call in calls.items():
            with ThreadPoolExecutor(1) as pool:
                error = pool.submit(call, model).exception()
            assert isinstance(error, InputError), name
            assert "another thread" in str(error) and "\n" not in str(error), name
        seen.append(batch)
        return cross_entropy(model(batch[0]), batch[1], reduction="none")

    seen: list[Any] = []
    delfast.score(model, batches[:1], loss_fn=loss)
    assert len(seen) == 1 and model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for call in calls.values():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(call, model).result()  # one after the other
