"""MaskedSGD and MaskedAdamW: torch's results on the mask, and not one bit anywhere else."""

from __future__ import annotations

import copy
import io
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn

import delfast
from delfast import InputError, Mask
from delfast.masked_optimizer import OpPart
from delfast.optim import MaskedAdamW, MaskedSGD
from delfast.parameter_mask import ParameterMask
from tests import cases

SGD = dict(lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
OPTIMIZERS = [
    (MaskedSGD, torch.optim.SGD, SGD),
    (MaskedSGD, torch.optim.SGD, dict(lr=0.05, momentum=0.5, dampening=0.2)),
    (MaskedSGD, torch.optim.SGD, dict(lr=0.05, weight_decay=0.1, maximize=True)),
    (MaskedAdamW, torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1)),
    (MaskedAdamW, torch.optim.AdamW, dict(lr=0.01, betas=(0.5, 0.9), eps=1e-4, maximize=True)),
]


def scaled_loss(model: nn.Module, step: int) -> torch.Tensor:
    images, targets = cases.image_batches(seed=step)[0]
    return nn.functional.cross_entropy(model(images), targets)


@pytest.mark.parametrize(("masked", "dense", "settings"), OPTIMIZERS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_everything_selected_is_torchs_optimizer(masked: Any, dense: Any, settings: Any, channels_last: bool) -> None:
    """Compare to rounding in float64 (the references), within float32's precision in float32 (the kernels)."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        torch.manual_seed(0)
        one = cases.SmallNet().to(dtype)
        one = one.to(memory_format=torch.channels_last) if channels_last else one
        two = copy.deepcopy(one)
        mask = delfast.score(one, criterion="random").select(1.0)
        if dtype == torch.float64:  # the native op takes 16 and 32 bits; the references define it for 64
            continue_with_references(one, two, mask, masked, dense, settings, tolerance)
            continue
        step_both(
            one, two, masked(one.named_parameters(), mask, **settings), dense(two.parameters(), **settings), dtype
        )
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 0.1)


def continue_with_references(
    one: nn.Module, two: nn.Module, mask: Mask, masked: Any, dense: Any, settings: Any, tol: float
) -> None:
    from delfast.ops import OPS

    references = {op.name: op.reference for op in OPS}
    original = torch.ops.delfast
    optimizer = masked(one.named_parameters(), mask, **settings)
    name = "masked_sgd_" if masked is MaskedSGD else "masked_adamw_"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(original, name, references[name])
        step_both(one, two, optimizer, dense(two.parameters(), **settings), torch.float64)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def step_both(one: nn.Module, two: nn.Module, first: Any, second: Any, dtype: torch.dtype) -> None:
    for step in range(4):
        images, targets = cases.image_batches(seed=step)[0]
        for model, optimizer in ((one, first), (two, second)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images.to(dtype)), targets).backward()
            optimizer.step()


@pytest.mark.parametrize(("granularity", "budget"), [("channel", 0.3), ("param", 0.3), ("channel", 1.0)])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_untouched_parameters_are_bit_identical_after_50_hard_steps(granularity: Any, budget: float, kind: str) -> None:
    """Weight decay, momentum, Nesterov, clipping, a GradScaler that skips a step, a save and load in between."""
    torch.manual_seed(0)
    model = cases.SmallNet()
    mask = delfast.score(model, cases.image_batches()).select(budget, granularity)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def make() -> Any:
        if kind == "sgd":
            return MaskedSGD(model.named_parameters(), mask, **SGD)
        return MaskedAdamW(model.named_parameters(), mask, lr=0.01, weight_decay=5e-4)

    optimizer, scaler, skipped = make(), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10), 0
    for step in range(50):
        optimizer.zero_grad()
        loss = scaled_loss(model, step)
        scaler.scale(loss * (float("inf") if step == 20 else 1.0)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        at_step = {name: p.detach().clone() for name, p in model.named_parameters()}
        scaler.step(optimizer)
        if step == 20:
            assert all(torch.equal(p, at_step[name]) for name, p in model.named_parameters())
        scale = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < scale
        if step == 30:
            stream = io.BytesIO()
            torch.save(optimizer.state_dict(), stream)
            stream.seek(0)
            optimizer = make()
            optimizer.load_state_dict(torch.load(stream, weights_only=True))
    assert skipped == 1
    for name, chosen in mask.to_dense().items():
        now = dict(model.named_parameters())[name]
        assert torch.equal(now[~chosen], before[name][~chosen]), name
    changed = sum(int((p != before[name]).sum()) for name, p in model.named_parameters())
    assert changed > 0.9 * mask.selected


def test_grad_scaler_inside_the_kernel_equals_no_scaler() -> None:
    results = []
    for use_scaler in (False, True):
        torch.manual_seed(0)
        model = cases.SmallNet()
        mask = delfast.score(model, cases.image_batches()).select(0.5)
        optimizer = MaskedSGD(model.named_parameters(), mask, **SGD)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=use_scaler)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(scaled_loss(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("granularity", ["channel", "param"])
def test_state_is_compact(granularity: Any) -> None:
    def state_bytes(optimizer: torch.optim.Optimizer) -> int:
        return sum(
            t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)
        )

    model = cases.resnet18()
    mask = delfast.score(model, criterion="weight").select(0.3, granularity)
    for masked, dense, settings in ((MaskedSGD, torch.optim.SGD, SGD), (MaskedAdamW, torch.optim.AdamW, {"lr": 1e-3})):
        ours, theirs = masked(model.named_parameters(), mask, **settings), dense(model.parameters(), **settings)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        ours.step()
        theirs.step()
        ratio = state_bytes(ours) / state_bytes(theirs)
        print(f"{masked.__name__} {granularity}: {ratio:.4f} of the dense state")
        assert ratio <= 0.35


@pytest.mark.parametrize("kind", [MaskedSGD, MaskedAdamW])
@pytest.mark.parametrize("granularity", ["channel", "param"])
def test_a_mask_is_planned_once_and_each_state_begins_at_16_bytes(
    kind: Any, granularity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = cases.SmallNet()
    scores = delfast.score(model, cases.image_batches())
    masks = [scores.select(budget, granularity) for budget in (0.3, 0.5)]
    plans = []

    def counted(*arguments: Any, plan: Any = torch.ops.delfast.masked_plan) -> torch.Tensor:
        plans.append(plan(*arguments))
        return plans[-1]

    monkeypatch.setattr(torch.ops.delfast, "masked_plan", counted)
    settings = dict(momentum=0.9) if kind is MaskedSGD else {}
    optimizer = kind(model.named_parameters(), masks[0], **settings)
    for mask in masks:
        optimizer.replace_mask(mask)
        for step in range(3):
            optimizer.zero_grad()
            scaled_loss(model, step).backward()
            optimizer.step()
        states = [state[optimizer.state_name] for state in optimizer.state.values()]
        assert all(state.data_ptr() % 16 == states[0].data_ptr() % 16 for state in states)
        assert any(state.numel() % 4 for state in states)
    assert len(plans) == 2 and plans[0].numel() == plans[1].numel()


def test_state_of_another_mask_is_refused_and_changes_nothing() -> None:
    model = cases.SmallNet()
    scores = delfast.score(model, cases.image_batches())
    first = MaskedSGD(model.named_parameters(), scores.select(0.3), lr=0.1, momentum=0.9)
    second = MaskedSGD(model.named_parameters(), scores.select(0.5), lr=0.2, momentum=0.9)
    with pytest.raises(InputError, match="build the optimizer with the mask it was saved with"):
        second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["lr"] == 0.2
    with pytest.raises(InputError, match="got that of None"):
        second.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())


@pytest.mark.parametrize("kind", [MaskedSGD, MaskedAdamW])
def test_state_of_another_size_is_refused_and_changes_nothing(kind: Any) -> None:
    torch.manual_seed(0)
    model = cases.SmallNet()
    mask = delfast.score(model, criterion="random").select(0.5, "param")
    settings = dict(lr=0.1, momentum=0.9) if kind is MaskedSGD else dict(lr=0.1)
    optimizer = kind(model.named_parameters(), mask, **settings)
    take_steps(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    name, last = list(zip(optimizer.param_groups[0]["param_names"], model.parameters(), strict=True))[-1]
    for change in (lambda values: values[:-1], lambda values: values.repeat(2)):
        wrong = copy.deepcopy(before)
        wrong["param_groups"][0]["lr"] = 0.5
        entry = wrong["state"][max(wrong["state"])]
        entry[kind.state_name] = change(entry[kind.state_name])
        count = optimizer.state[last][kind.state_name].numel()
        expected = f"expected {count} values of state for '{name}', got {entry[kind.state_name].numel()}"
        with pytest.raises(InputError, match=f"{re.escape(expected)}; the optimizer state is of another mask"):
            optimizer.load_state_dict(wrong)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for index, values in before["state"].items():
            assert all(torch.equal(after["state"][index][key], value) for key, value in values.items())
    optimizer.load_state_dict(before)
    take_steps(model, optimizer, range(1))


def test_state_stays_float32_for_16_bit_parameters() -> None:
    model = cases.SmallNet().bfloat16()
    mask = delfast.score(model, criterion="weight").select(0.5)
    optimizer = MaskedAdamW(model.named_parameters(), mask, lr=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    for index, entry in state["state"].items():
        for name, value in entry.items():
            now = optimizer.state_dict()["state"][index][name]
            assert now.dtype == torch.float32 and torch.equal(now, value)


def test_groups_closures_schedulers_and_pickles() -> None:
    model = cases.SmallNet()
    mask = delfast.score(model, cases.image_batches()).select(0.5)
    groups: list[dict[str, Any]] = [
        {"params": list(model.features.named_parameters(prefix="features")), "lr": 0.1},
        {"params": list(model.head.named_parameters(prefix="head")), "weight_decay": 0.0},
    ]
    optimizer = MaskedSGD(groups, mask, lr=0.01, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = scaled_loss(model, 0)
        loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05 and float(closure().detach()) < first
    restored = pickle.loads(pickle.dumps(optimizer))
    assert restored.mask.digest == mask.digest
    assert restored.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_pickles_of_earlier_versions_find_the_parts_of_an_op() -> None:
    assert delfast.optim.OpPart is OpPart


def test_bad_input() -> None:
    model = cases.SmallNet()
    mask = delfast.score(model, criterion="weight").select(0.5)
    other = delfast.score(cases.Everything(), criterion="weight").select(1.0)
    for make, message in (
        (lambda: MaskedSGD(model.parameters(), mask, lr=0.1), "pass model.named_parameters"),
        (lambda: MaskedSGD(model.named_parameters(), other, lr=0.1), "which the model does not have"),
        (lambda: MaskedSGD(model.named_parameters(), mask, lr=-1), "expected lr >= 0, got -1"),
        (lambda: MaskedSGD(model.named_parameters(), mask, lr=0.1, nesterov=True), "momentum > 0"),
        (lambda: MaskedAdamW(model.named_parameters(), mask, betas=(0.9, 1.0)), r"betas in \[0, 1\)"),
    ):
        with pytest.raises(InputError, match=message):
            make()
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = MaskedSGD(
        embedding.named_parameters(), delfast.score(embedding, criterion="weight").select(1.0), lr=0.1
    )
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InputError, match="dense gradient for 'weight', got a sparse one"):
        optimizer.step()


def momentum_sgd(model: nn.Module, mask: Mask) -> MaskedSGD:
    return MaskedSGD(model.named_parameters(), mask, lr=0.05, momentum=0.9)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        scaled_loss(model, step).backward()
        optimizer.step()


def test_a_model_that_changes_its_memory_format_midway_keeps_its_momentum() -> None:
    one, mask = cases.SmallNet(), delfast.score(cases.SmallNet(), criterion="random").select(1.0)
    two = copy.deepcopy(one)
    ours, theirs = momentum_sgd(one, mask), torch.optim.SGD(two.parameters(), lr=0.05, momentum=0.9)
    for model, optimizer in ((one, ours), (two, theirs)):
        take_steps(model, optimizer, range(2))
    one.to(memory_format=torch.channels_last)
    for model, optimizer in ((one, ours), (two, theirs)):
        take_steps(model, optimizer, range(2, 5))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("before", [0, 2])
def test_a_copied_optimizer_goes_on_as_the_original(before: int) -> None:
    model = cases.SmallNet()
    optimizer = momentum_sgd(model, delfast.score(model, criterion="weight").select(0.5))
    take_steps(model, optimizer, range(before))
    other_model, other = copy.deepcopy((model, optimizer))
    take_steps(model, optimizer, range(before, before + 3))
    take_steps(other_model, other, range(before, before + 3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other_model.parameters(), strict=True))


def test_groups_with_their_own_momentum_and_generators_of_parameters() -> None:
    model = cases.SmallNet()
    mask = delfast.score(model, criterion="weight").select(0.5)
    expected = copy.deepcopy(model)
    take_steps(model, MaskedSGD([{"params": model.named_parameters(), "momentum": 0.9}], mask, lr=0.05), range(3))
    take_steps(expected, momentum_sgd(expected, mask), range(3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_momentum_that_a_schedule_raises_from_zero() -> None:
    one, mask = cases.SmallNet(), delfast.score(cases.SmallNet(), criterion="random").select(1.0)
    two = copy.deepcopy(one)
    pairs = (
        (one, MaskedSGD(one.named_parameters(), mask, lr=0.01)),
        (two, torch.optim.SGD(two.parameters(), lr=0.01)),
    )
    for step, momentum in enumerate((0.0, 0.0, 0.9, 0.9, 0.0, 0.5)):
        for model, optimizer in pairs:
            optimizer.param_groups[0]["momentum"] = momentum
            optimizer.zero_grad()
            scaled_loss(model, step).backward()
            optimizer.step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_parameter_without_gradient_in_one_step_keeps_its_own_count() -> None:
    one, mask = cases.SmallNet(), delfast.score(cases.SmallNet(), criterion="random").select(1.0)
    two = copy.deepcopy(one)
    pairs = (
        (one, MaskedAdamW(one.named_parameters(), mask, lr=0.01)),
        (two, torch.optim.AdamW(two.parameters(), lr=0.01)),
    )
    for step in range(4):
        for model, optimizer in pairs:
            optimizer.zero_grad()
            scaled_loss(model, step).backward()
            if step == 1:
                model.head.weight.grad = None
            optimizer.step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_frozen_selected_parameter_is_refused() -> None:
    model = cases.SmallNet()
    mask = delfast.score(model, criterion="weight").select(1.0)
    model.head.requires_grad_(False)
    for use in (lambda: momentum_sgd(model, mask), lambda: delfast.reset_(model, mask, cases.SmallNet)):
        with pytest.raises(InputError, match=r"'head.weight', which is frozen"):
            use()


@pytest.mark.parametrize(("old", "new"), [("channel", "channel"), ("channel", "param"), ("param", "channel")])
@pytest.mark.parametrize("kind", [MaskedSGD, MaskedAdamW])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_replaced_mask_keeps_the_state_of_what_stays(kind: Any, old: Any, new: Any, channels_last: bool) -> None:
    """Compare with an optimizer of the whole network whose state is cleared outside the old mask."""
    torch.manual_seed(0)
    model = cases.SmallNet()
    model = model.to(memory_format=torch.channels_last) if channels_last else model  # type: ignore[call-overload]
    scores = delfast.score(model, cases.image_batches())
    first, second = scores.select(0.4, old), scores.select(0.6, new)
    settings: dict[str, Any] = {"lr": 0.01} if kind is MaskedAdamW else {"lr": 0.05, "momentum": 0.9}
    dense = {MaskedSGD: torch.optim.SGD, MaskedAdamW: torch.optim.AdamW}[kind]
    reference = copy.deepcopy(model)
    ours, theirs = kind(model.named_parameters(), first, **settings), dense(reference.parameters(), **settings)
    for step in range(6):
        mask = first if step < 3 else second
        if step == 3:
            ours.replace_mask(second)
            for name, parameter in reference.named_parameters():
                for value in theirs.state[parameter].values():
                    if value.ndim:
                        value[~(first.to_dense()[name] & second.to_dense()[name])] = 0
        before = copy.deepcopy(reference.state_dict())
        for net, optimizer in ((model, ours), (reference, theirs)):
            optimizer.zero_grad()
            scaled_loss(net, step).backward()
            optimizer.step()
        for name, parameter in reference.named_parameters():
            with torch.no_grad():
                parameter.copy_(torch.where(mask.to_dense()[name], parameter, before[name]))
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        touched = first.to_dense()[name].any()  # of others Adam counts the steps from the new mask on
        if kind is MaskedSGD or touched:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    held = sum(state[kind.state_name].numel() for state in ours.state.values())
    assert held == (2 if kind is MaskedAdamW else 1) * second.selected
    again = kind(model.named_parameters(), second, **settings)
    again.load_state_dict(ours.state_dict())


def test_a_replaced_mask_of_another_architecture_is_refused() -> None:
    model = cases.SmallNet()
    mask = delfast.localize(model, cases.image_batches(), budget=0.4)
    optimizer = MaskedSGD(model.named_parameters(), mask, lr=0.1, momentum=0.9)
    with pytest.raises(InputError, match=r"does not have|has shape"):
        optimizer.replace_mask(delfast.score(cases.Everything(), criterion="weight").select(1.0))
    assert optimizer.mask is mask


@pytest.mark.parametrize("kind", [MaskedSGD, MaskedAdamW])
def test_a_rate_in_a_tensor_is_the_rate(kind: Any) -> None:
    """Bit for bit, through a schedule, which changes the tensor in place."""
    torch.manual_seed(0)
    one = cases.SmallNet()
    two = copy.deepcopy(one)
    mask = delfast.localize(one, cases.image_batches(), budget=0.4)
    lr = torch.tensor(0.0625)
    optimizers = [kind(one.named_parameters(), mask, lr=0.0625), kind(two.named_parameters(), mask, lr=lr)]
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5) for optimizer in optimizers]
    for step in range(3):
        for net, optimizer, schedule in zip((one, two), optimizers, schedules, strict=True):
            optimizer.zero_grad()
            scaled_loss(net, step).backward()
            optimizer.step()
            schedule.step()
    assert optimizers[1].param_groups[0]["lr"] is lr and float(lr) == 0.0625 / 8
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    with pytest.raises(InputError, match="lr >= 0"):
        kind(one.named_parameters(), mask, lr=torch.tensor(-1.0))


def test_a_parameter_that_moves_to_another_device_is_stepped_there() -> None:
    weight = nn.Parameter(torch.zeros(8, 6, device="meta"))
    mask = Mask({"weight": ParameterMask((8, 6), "row", torch.tensor([0b101], dtype=torch.uint8))})
    optimizer = MaskedSGD([("weight", weight)], mask, lr=0.5, momentum=0.9)
    optimizer.replace_mask(mask)
    assert optimizer._parts["weight"].bits.device == weight.device
    layer = nn.Linear(6, 8, bias=False)
    optimizer = MaskedSGD(layer.named_parameters(), mask, lr=0.5, momentum=0.9)
    layer.to("meta")  # which makes another Parameter; from device to device it would be the same
    optimizer.param_groups[0]["params"] = [layer.weight]
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    state = optimizer.state[layer.weight]
    assert optimizer._parts["weight"].bits.device == state["momentum_buffer"].device == torch.device("meta")
