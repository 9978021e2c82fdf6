"""The training loop, the head, and unlearn: changes within the mask, resumption, bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import delfast
from delfast import InputError, TrainingOptions
from delfast.experiments.networks import build
from delfast.unlearning import train
from delfast.unlearning.head import find_head
from tests import cases

FORGET, RETAIN = cases.image_batches(12, seed=1), cases.image_batches(40, seed=2)


def run(model: nn.Module, **changes: Any) -> Any:
    settings: dict[str, Any] = dict(forget=FORGET, retain=RETAIN, init=cases.SmallNet, epochs=2, lr=0.05)
    return delfast.unlearn(model, **{**settings, **changes})


@pytest.mark.parametrize("granularity", ["channel", "param"])
def test_only_the_mask_and_the_head_change(granularity: Any) -> None:
    torch.manual_seed(0)
    model = cases.SmallNet()
    before = copy.deepcopy(model.state_dict())
    mask = delfast.score(model, FORGET).select(0.3, granularity)
    result = run(model, mask=mask, weight_decay=5e-4)
    assert result.head == "head" and set(result.seconds) == {"prepare", "finetune"} and len(result.losses) == 2
    dense = result.mask.to_dense()
    assert bool(dense["head.weight"].all()) and bool(dense["head.bias"].all())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter[~dense[name]], before[name][~dense[name]]), name
    assert not torch.equal(model.head.weight, before["head.weight"])
    assert all(p.grad is None for p in model.parameters()) and model.training


def test_without_a_mask_the_forget_set_is_localized() -> None:
    torch.manual_seed(0)
    model = cases.SmallNet()
    expected = delfast.localize(model, FORGET)
    result = run(model)
    assert result.mask.intersection(expected).digest == delfast.Mask(expected.parameters).digest


def test_same_seed_same_weights() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = cases.SmallNet()
        run(model, seed=seed)
        states.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_head_is_the_layer_that_makes_the_output() -> None:
    batch = (torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    assert find_head(build("resnet18-thin", 10, 3, 32), batch) == "fc"
    assert find_head(build("vit", 10, 3, 32), batch).startswith("mlp_head")
    assert find_head(cases.Everything(), cases.everything_batches()[0]) == "head"
    assert find_head(nn.Sequential(nn.Conv2d(3, 10, 32), nn.Flatten()), batch) == "0"
    with pytest.raises(InputError, match="name the classifier head"):
        find_head(nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(10)), batch)


LINEAR = [(torch.ones(2, 4), torch.tensor([0, 1]))]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_resume_ends_with_the_same_weights(tmp_path: Path, stop_after: int) -> None:
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return cases.SmallNet()

    mask = delfast.localize(fresh(), FORGET)
    expected = fresh()
    run(expected, mask=mask, epochs=3)

    def stop(batches: Any, description: str, total: int) -> Any:
        if description.startswith(f"epoch {stop_after + 1}/"):
            raise Interrupted
        return batches

    model, path = fresh(), tmp_path / "checkpoint.pt"
    with pytest.raises(Interrupted):
        run(model, mask=mask, epochs=3, checkpoint=path, training=TrainingOptions(progress=stop))
    assert path.is_file() == (stop_after > 0)
    again = fresh()
    result = run(again, mask=mask, epochs=3, checkpoint=path, resume=True)
    assert result.resumed_from == stop_after and len(result.losses) == 3
    for (name, a), b in zip(again.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    run(cases.SmallNet(), epochs=1, checkpoint=path)
    with pytest.raises(InputError, match=r"a run with other settings \(.*lr"):
        run(cases.SmallNet(), epochs=1, lr=0.01, checkpoint=path, resume=True)
    other, plain = nn.Linear(4, 3), tmp_path / "plain.pt"
    one_epoch: dict[str, Any] = {"epochs": 1, "checkpoint": plain}
    train(nn.Linear(4, 5), LINEAR, torch.optim.SGD(nn.Linear(4, 5).parameters()), **one_epoch)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(InputError, match="is of a run with another network"):
        train(other, LINEAR, torch.optim.SGD(other.parameters()), **one_epoch, resume=True)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        run(cases.SmallNet(), epochs=1, checkpoint=path, resume=True)


@pytest.mark.long
def test_train_learns_and_follows_the_cosine() -> None:
    torch.manual_seed(0)
    model = cases.SmallNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rates = []
    optimizer.register_step_post_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    result = train(model, RETAIN, optimizer, epochs=80, max_norm=5.0)
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert rates[0] == 0.1 and abs(optimizer.param_groups[0]["lr"] - 0.001) < 1e-9
    assert rates == sorted(rates, reverse=True)


def test_train_refuses_bad_arguments_and_stops_at_nan() -> None:
    model = cases.SmallNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for loader, settings, message in (
        (RETAIN, {"epochs": 0}, "epochs >= 1, got 0"),
        ([], {"epochs": 1}, "at least one batch"),
        (iter(RETAIN), {"epochs": 1}, "a training set with a length"),
        (RETAIN, {"epochs": 1, "schedule": "step"}, "schedule 'cosine' or 'constant', got 'step'"),
    ):
        with pytest.raises(InputError, match=message):
            train(model, loader, optimizer, **settings)  # type: ignore[arg-type]
    images, targets = RETAIN[0]
    with pytest.raises(RuntimeError, match="lower the learning rate"):
        train(model, [(images * float("nan"), targets)], optimizer, epochs=1)


def test_unlearn_refuses_before_anything_changes() -> None:
    model = cases.SmallNet()
    before = copy.deepcopy(model.state_dict())
    for changes, message in (
        ({"method": "magic"}, "expected method to be one of del, .*; got 'magic'"),
        ({"epochs": 0}, "epochs >= 1"),
        ({"lr": 0.0}, "lr > 0"),
        ({"forget": None}, "expected a mask, or the forget set"),
        ({"head": "classifier"}, "head to be a module of the model, got 'classifier'"),
        (
            {"mask": delfast.score(cases.Everything(), criterion="weight").select(1.0)},
            "mask for 'head.weight' has shape",
        ),
        ({"init": cases.Everything}, "init has none"),
        ({"retain": []}, "retain set of at least one batch"),
    ):
        with pytest.raises(InputError, match=message):
            run(model, **changes)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_forget_set_of_a_whole_class_and_of_one_example() -> None:
    images, targets = (torch.cat(parts) for parts in zip(*RETAIN, strict=True))
    for chosen in (targets == 3, torch.arange(len(targets)) == 0):
        model = cases.SmallNet()
        result = run(model, forget=[(images[chosen], targets[chosen])], retain=[(images[~chosen], targets[~chosen])])
        assert result.mask.selected > 0


def test_refusals_that_only_training_can_make_come_before_the_reset(tmp_path: Path) -> None:
    done = tmp_path / "checkpoint.pt"
    run(cases.SmallNet(), epochs=2, checkpoint=done)
    plain = tmp_path / "plain.pt"
    torch.save({"weight": torch.ones(2)}, plain)
    model = cases.SmallNet()
    before = copy.deepcopy(model.state_dict())
    for changes, message in (
        ({"checkpoint": done, "resume": True, "epochs": 1}, "has 2 epochs, more than 1"),
        ({"checkpoint": plain, "resume": True}, "no checkpoint of this loop"),
        ({"checkpoint": tmp_path / "absent" / "c.pt"}, "the directory of checkpoint"),
        ({"retain": (batch for batch in RETAIN)}, "a retain set with a length"),
        ({"lr": float("inf")}, "lr > 0"),
    ):
        with pytest.raises(InputError, match=message):
            run(model, **changes)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loaders_own_generator_resumes_too(tmp_path: Path) -> None:
    from torch.utils.data import DataLoader, TensorDataset

    images, targets = (torch.cat(parts) for parts in zip(*RETAIN, strict=True))

    def loader() -> Any:
        return DataLoader(TensorDataset(images, targets), 8, shuffle=True, generator=torch.Generator().manual_seed(7))

    def stop(batches: Any, description: str, total: int) -> Any:
        if description.startswith("epoch 3/"):
            raise Interrupted
        return batches

    states = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        model, path = cases.SmallNet(), tmp_path / f"{interrupted}.pt"
        if interrupted:
            with pytest.raises(Interrupted):
                training = TrainingOptions(progress=stop)
                run(copy.deepcopy(model), retain=loader(), epochs=4, head="head", checkpoint=path, training=training)
        run(model, retain=loader(), epochs=4, head="head", checkpoint=path, resume=True)
        states.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(states[0], states[1])
    torch.manual_seed(0)
    model = cases.SmallNet()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="is of a run with another number of generators in the loader"):
        run(model, epochs=4, head="head", checkpoint=path, resume=True)  # mask and settings are the same
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_batch_norm_set_to_eval_stays_frozen_and_no_grad_callers_are_served() -> None:
    model = cases.SmallNet()
    model.features[1].eval()
    before = model.features[1].running_mean.clone()
    with torch.no_grad():
        run(model)
    assert torch.equal(model.features[1].running_mean, before) and not model.features[1].training and model.training


@pytest.mark.parametrize("channels_last", [False, True])
def test_bfloat16_trains_float32_parameters_to_nearly_the_same(channels_last: bool) -> None:
    trained = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = cases.SmallNet()
        if channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        seen: set[torch.dtype] = set()
        model.head.register_forward_hook(lambda _, inputs, output, seen=seen: seen.add(output.dtype))
        result = run(model, training=TrainingOptions(precision=precision))  # type: ignore[arg-type]
        trained[precision] = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert torch.bfloat16 in seen or precision == "fp32"
        assert all(p.dtype == torch.float32 for p in model.parameters()) and result.losses
    difference = (trained["bf16"] - trained["fp32"]).norm() / trained["fp32"].norm()
    assert 0 < difference < 0.05
    with pytest.raises(InputError, match="expected precision to be one of fp32, bf16"):
        run(cases.SmallNet(), training=TrainingOptions(precision="fp8"))  # type: ignore[arg-type]
