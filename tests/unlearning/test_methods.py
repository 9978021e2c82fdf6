"""Every unlearning method against a transcription of its formula, in float64, and rules that hold for all methods."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import delfast
from delfast import InputError, TrainingOptions
from delfast.mask import Mask
from delfast.unlearning import METHODS, make_method, one_shot
from delfast.unlearning.api import full_mask
from delfast.unlearning.method import Method, UnlearningTask
from delfast.unlearning.steps import Steps

BOUND = 1e-10
TRAINING = [name for name, kind in METHODS.items() if kind().epochs]


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def batches(seed: int, *sizes: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 4, generator=generator).to(dtype), torch.randint(0, 3, (n,), generator=generator))
        for n in sizes
    ]


def task(seed: int = 0, mask: Mask | None = None) -> UnlearningTask:
    torch.manual_seed(1)
    model, teacher = make_model().double(), make_model().double()  # a teacher that differs: KL's gradient is not 0
    retain, forget = batches(2, 5, 3), batches(3, 4)
    return UnlearningTask(
        model, model, retain, forget, full_mask(model) if mask is None else mask, make_model, seed, None, teacher
    )


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def near(result: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 0
    assert float((result - expected).norm() / expected.norm()) <= BOUND


def gradient(method: Method, task: UnlearningTask, step: dict[str, Any]) -> Tensor:
    parameters = list(task.network.parameters())
    return flat(torch.autograd.grad(method.loss(task, {"epoch": 0, "step": 0, **step}), parameters))


def by_hand(task: UnlearningTask, loss: Tensor) -> Tensor:
    return flat(torch.autograd.grad(loss, list(task.network.parameters())))


def ce(task: UnlearningTask, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy, written out."""
    logits = task.model(batch[0])
    return (logits.exp().sum(1).log() - logits[torch.arange(len(logits)), batch[1]]).mean()


# ---- losses


@pytest.mark.parametrize("name", ["finetune", "del", "retrain"])
def test_finetuning_descends_on_the_retain_set(name: str) -> None:
    work = task()
    near(gradient(METHODS[name](), work, {"retain": work.retain[0]}), by_hand(work, ce(work, work.retain[0])))


def test_gradient_ascent() -> None:
    work = task()
    near(
        gradient(METHODS["gradient-ascent"](), work, {"forget": work.forget[0]}),
        -by_hand(work, ce(work, work.forget[0])),
    )


def test_neggrad_plus() -> None:
    work = task()
    expected = 0.99 * by_hand(work, ce(work, work.retain[0])) - 0.01 * by_hand(work, ce(work, work.forget[0]))
    near(gradient(METHODS["neggrad+"](), work, {"retain": work.retain[0], "forget": work.forget[0]}), expected)


def test_relabel_trains_on_labels_that_are_wrong_and_a_function_of_seed_and_step() -> None:
    work, method = task(), METHODS["relabel"]()
    near(gradient(method, work, {"retain": work.retain[0]}), by_hand(work, ce(work, work.retain[0])))
    inputs, targets = batches(4, 600)[0]
    seen = set()
    for epoch, number in ((0, 0), (0, 1), (1, 0)):
        step = {"forget": (inputs, targets), "epoch": epoch, "step": number}
        wrong = method.labels(work, step, targets, 3)  # type: ignore[attr-defined]
        assert torch.equal(wrong, method.labels(work, step, targets, 3))  # type: ignore[attr-defined]
        counts = torch.bincount((wrong - targets) % 3, minlength=3)
        assert counts[0] == 0 and 200 < counts[1] < 400  # every other class equally often
        near(gradient(method, work, step), by_hand(work, ce(work, (inputs, wrong))))
        seen.add(tuple(wrong.tolist()))
    other = method.labels(task(seed=1), {"epoch": 0, "step": 0}, targets, 3)  # type: ignore[attr-defined]
    assert len(seen | {tuple(other.tolist())}) == 4
    with pytest.raises(InputError, match="at least 2 classes"):
        method.labels(work, {"epoch": 0, "step": 0}, targets, 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("epoch", [0, 3])
def test_l1_sparse_falls_linearly_and_covers_what_may_change(epoch: int) -> None:
    work = task()
    work.mask = Mask({"0.weight": full_mask(work.network)["0.weight"]})
    parameters = dict(work.network.named_parameters())
    penalty = 7e-5 * (1 - epoch / 10) * parameters["0.weight"].abs().sum()
    result = gradient(METHODS["l1-sparse"](), work, {"retain": work.retain[0], "epoch": epoch})
    near(result, by_hand(work, ce(work, work.retain[0]) + penalty))


def test_scrub_leaves_the_teacher_on_the_forget_set_and_keeps_to_it_elsewhere() -> None:
    work = task()
    assert work.teacher is not None

    def divergence(batch: tuple[Tensor, Tensor]) -> Tensor:
        student, teacher = (torch.softmax(model(batch[0]) / 4, dim=1) for model in (work.model, work.teacher))
        teacher = teacher.detach()
        return 16 * (teacher * (teacher.log() - student.log())).sum() / len(batch[0])

    method = METHODS["scrub"]()
    near(gradient(method, work, {"forget": work.forget[0]}), -by_hand(work, divergence(work.forget[0])))
    expected = by_hand(work, 0.001 * divergence(work.retain[0]) + 0.99 * ce(work, work.retain[0]))
    near(gradient(method, work, {"retain": work.retain[0]}), expected)


# ---- one-shot methods


def example_gradients(work: UnlearningTask, loader: Any) -> Tensor:
    """Return the gradients (N, P) of the examples' losses."""
    examples = [(x[i : i + 1], y[i : i + 1]) for x, y in loader for i in range(len(x))]
    return torch.stack([by_hand(work, ce(work, example)) for example in examples])


def some_mask(model: nn.Module) -> Mask:
    flags = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    flags["0.weight"][1::2] = True
    flags["2.weight"][0, ::2] = True
    flags["2.bias"][1] = True
    return Mask.from_dense(flags)


@pytest.mark.parametrize("masked", [False, True])
def test_ssd_dampens_what_matters_more_to_the_forget_set(masked: bool) -> None:
    work = task()
    if masked:
        work.mask = some_mask(work.network)
    before = flat(work.network.parameters())
    squares = [example_gradients(work, loader) ** 2 for loader in (work.forget, [*work.forget, *work.retain])]
    of_forget, of_all = (each.mean(dim=0) for each in squares)
    chosen = dense(work)
    alpha, dampening = 1.05, 0.8
    hit = (of_forget > alpha * of_all) & chosen
    expected = torch.where(hit, before * (dampening * of_all / of_forget).clamp_max(1), before)
    assert 0 < hit.sum() < len(hit)
    make_method("ssd", {"alpha": alpha, "dampening": dampening}).prepare(work)
    near(flat(work.network.parameters()), expected)
    assert torch.equal(flat(work.network.parameters())[~hit], before[~hit])


def test_ssd_refuses_an_alpha_that_nothing_can_reach() -> None:
    work = task()
    before = flat(work.network.parameters())
    forgotten, retained = (sum(len(targets) for _, targets in loader) for loader in (work.forget, work.retain))
    most = (forgotten + retained) / forgotten
    with pytest.raises(InputError, match=f"expected alpha below {most:g} .* got {most:g}, .*; lower alpha"):
        make_method("ssd", {"alpha": most}).prepare(work)
    assert torch.equal(flat(work.network.parameters()), before)


@pytest.mark.parametrize("masked", [False, True])
def test_influence_takes_a_newton_step_with_the_dense_fisher(masked: bool) -> None:
    work = task()
    if masked:
        work.mask = some_mask(work.network)
    before, chosen = flat(work.network.parameters()), dense(work)
    retained = example_gradients(work, work.retain)
    samples = retained[:6, chosen]
    fisher = 0.5 * torch.eye(int(chosen.sum()), dtype=torch.float64) + samples.T @ samples / 6
    forgotten = example_gradients(work, work.forget)
    count = len(forgotten) + len(retained)  # weight 1 / count on all examples, minus 1 / |R| on the retain set
    v = forgotten.sum(dim=0) / count + retained.sum(dim=0) * (1 / count - 1 / len(retained))
    v = v[chosen]
    expected = before.clone()
    expected[chosen] += 2 * torch.linalg.solve(fisher, v)
    make_method("influence", {"alpha": 2.0, "damping": 0.5, "samples": 6}).prepare(work)
    near(flat(work.network.parameters()) - before, expected - before)


def dense(work: UnlearningTask) -> Tensor:
    """Return the flags (P,) of the elements that may change."""
    flags = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in work.network.named_parameters()}
    return torch.cat([{**flags, **work.mask.to_dense()}[name].flatten() for name in flags])


def test_influence_refuses_what_it_cannot_hold_or_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    work = task()
    work.retain = [{"image": torch.zeros(2, 4, dtype=torch.float64)}]
    work.loss_fn = lambda model, batch: model(batch[0] if isinstance(batch, tuple) else batch["image"]).sum(dim=1)
    monkeypatch.setattr(one_shot, "examples_in", lambda *_: None)
    with pytest.raises(InputError, match="expected batches of tensors with the examples along dim 0 for 'influence'"):
        METHODS["influence"]().prepare(work)
    monkeypatch.setattr(one_shot, "MAX_BYTES", 100)
    with pytest.raises(InputError, match=r"got 2 of 51 parameters; set samples to 0 at most"):
        METHODS["influence"]().prepare(work)
    work = task()
    before = flat(work.network.parameters())
    monkeypatch.undo()
    work.retain = iter(work.retain)
    with pytest.raises(InputError, match="give its 8 examples a second time, got 0"):
        METHODS["influence"]().prepare(work)
    assert torch.equal(flat(work.network.parameters()), before)


# ---- through the loop


@pytest.mark.parametrize("plan", ["retain", "forget", "pairs", "mixed", "forget first"])
def test_steps_follow_their_plan(plan: Any) -> None:
    steps = Steps(plan, ["r0", "r1", "r2", "r3"], ["f0", "f1"], forget_epochs=1)
    names = [[step.get("retain", "") + step.get("forget", "") for step in steps]]
    steps.set_epoch(1)
    names.append([step.get("retain", "") + step.get("forget", "") for step in steps])
    retain, forget = ["r0", "r1", "r2", "r3"], ["f0", "f1"]
    expected = {
        "retain": [retain] * 2,
        "forget": [forget, []],
        "pairs": [["r0f0", "r1f1", "r2f0", "r3f1"]] * 2,
        "mixed": [["r0", "f0", "r1", "r2", "f1", "r3"]] * 2,
        "forget first": [forget + retain, retain],
    }[plan]
    assert names == expected and len(steps) == len(expected[0])
    assert [(step["epoch"], step["step"]) for step in steps] == [(1, step) for step in range(len(expected[1]))]


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return make_model()


SETS: dict[str, Any] = {
    "retain": batches(2, 5, 3, dtype=torch.float32),
    "forget": batches(3, 4, dtype=torch.float32),
    "init": make_model,
}


@pytest.mark.parametrize("name", METHODS)
def test_entries_outside_the_mask_stay_as_they_are(name: str, network: nn.Module) -> None:
    mask = some_mask(network)
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    if name == "retrain":
        with pytest.raises(InputError, match="expected no mask for 'retrain', which changes everything"):
            delfast.unlearn(network, **SETS, mask=mask, method=name)
        return
    changes: dict[str, Any] = {"lr": 0.1, "epochs": 2}
    changes = {"ssd": {"alpha": 0.5, "dampening": 0.1}, "influence": {}}.get(name, changes)
    result = delfast.unlearn(network, **SETS, mask=mask, method=make_method(name, changes))
    flags = result.mask.to_dense()
    changed = 0
    for n, p in network.named_parameters():
        inside = flags.get(n, torch.zeros_like(p, dtype=torch.bool))
        assert torch.equal(p[~inside], before[n][~inside]), n
        changed += int((p[inside] != before[n][inside]).sum())
    assert changed > 0 and (result.head == "2") == (name == "del")


@pytest.mark.parametrize("name", TRAINING)
def test_one_step_is_sgds(name: str, network: nn.Module) -> None:
    sets = {**SETS, "retain": SETS["retain"][:1]}
    changes: dict[str, Any] = {"lr": 0.1, "epochs": 1, "momentum": 0.0, "schedule": "constant"}
    method = make_method(name, changes)
    teacher = copy.deepcopy(network)
    mask = full_mask(network)
    work = UnlearningTask(network, network, sets["retain"], sets["forget"], mask, make_model, 5, None, teacher)
    expected = copy.deepcopy(network)
    if name in ("del", "retrain"):
        torch.manual_seed(5)
        expected = make_model()
    work.model = work.network = expected
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for step in Steps(method.step_plan, sets["retain"], sets["forget"], method.forget_epochs):
        optimizer.zero_grad()
        method.loss(work, step).backward()
        optimizer.step()
    result = delfast.unlearn(network, **sets, method=method, mask=mask if name == "del" else None, seed=5)
    assert len(result.losses) == 1
    for p, q in zip(network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", TRAINING)
def test_a_resumed_run_ends_as_one_that_was_never_stopped(name: str, network: nn.Module, tmp_path: Path) -> None:
    mask = None if name == "retrain" else some_mask(network)
    other = copy.deepcopy(network)
    method = make_method(name, {"lr": 0.05, "epochs": 4})
    options: dict[str, Any] = {**SETS, "mask": mask, "method": method, "seed": 3}
    whole = delfast.unlearn(network, **options)

    def stop_after_two(batches: Any, description: str, total: int) -> Any:
        if description.startswith("epoch 3"):
            raise KeyboardInterrupt
        return batches

    first = copy.deepcopy(other)
    with pytest.raises(KeyboardInterrupt):
        training = TrainingOptions(progress=stop_after_two)
        delfast.unlearn(first, **options, checkpoint=tmp_path / "c.pt", training=training)
    resumed = delfast.unlearn(other, **options, checkpoint=tmp_path / "c.pt", resume=True)
    assert resumed.resumed_from == 2 and resumed.losses == whole.losses
    for p, q in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


# ---- bad input

EARLY = TrainingOptions(patience=1, validation=[*SETS["retain"]])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "wish"}, "expected method to be one of del, finetune"),
        ({"method": "scrub", "forget": None}, "expected forget= for 'scrub'"),
        ({"method": "retrain", "init": None}, "expected init= for 'retrain'"),
        ({"method": "retrain", "init": {"0.weight": torch.zeros(6, 4)}}, "a whole network, got dict"),
        ({"method": "relabel", "loss_fn": lambda m, b: m(b[0]).sum(1)}, "needs logits"),
        ({"method": "ssd", "epochs": 3}, "expected epochs = 0 for 'ssd', got 3"),
        (
            {"method": "ssd", "training": EARLY},
            "expected no patience for 'ssd'",
        ),
        ({"method": "ssd", "lr": 0.1}, "expected no lr= for 'ssd', which trains nothing, got 0.1; leave it out"),
        (
            {"training": TrainingOptions(patience=1, validation=[])},
            "expected a validation set of at least one example, got none",
        ),
        ({"method": "ssd", "training": TrainingOptions(precision="fp8")}, "expected precision"),  # type: ignore[arg-type]
        ({"method": "ssd", "training": TrainingOptions(dense=["0.weight"])}, "expected no dense= for 'ssd'"),
        (
            {"method": "ssd", "schedule": "constant"},
            "expected no schedule= for 'ssd', which trains nothing, got constant",
        ),
        ({"training": {"precision": "bf16"}}, "expected training to be a delfast.TrainingOptions, got dict"),
        ({"method": "finetune", "epochs": 0}, "expected epochs >= 1 for 'finetune', got 0"),
        ({"method": "finetune", "lr": -1.0}, "expected lr > 0 for 'finetune', got -1.0"),
        ({"method": "gradient-ascent", "forget": []}, "a forget set of at least one batch"),
        ({"method": "gradient-ascent", "forget": (b for b in [])}, "a forget set with a length"),
    ],
)
def test_bad_arguments_change_nothing(options: dict[str, Any], message: str, network: nn.Module) -> None:
    before = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(InputError, match=message):
        delfast.unlearn(network, **{**SETS, **options})
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("neggrad+", {"alpha": 1.5}, "expected alpha .*, got 1.5"),
        ("l1-sparse", {"gamma": -1.0}, "expected gamma .*, got -1.0"),
        ("scrub", {"temperature": 0.0}, "expected temperature .*, got 0.0"),
        ("scrub", {"max_epochs": -1}, "expected max_epochs .*, got -1"),
        ("ssd", {"alpha": 0.0}, "expected alpha .*, got 0.0"),
        ("influence", {"damping": 0.0}, "expected damping .*, got 0.0"),
        ("influence", {"samples": 0}, "expected samples .*, got 0"),
        ("finetune", {"alpha": 1}, "has no hyperparameter 'alpha'; it has epochs, lr"),
    ],
)
def test_hyperparameters_out_of_range_are_named(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_method(name, changes)
