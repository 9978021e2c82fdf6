"""The audit: figures against other functions', what it leaves as it was, and what it refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import delfast
from delfast.errors import InputError
from delfast.evaluation import (
    Reference,
    Relearning,
    accuracy_and_loss,
    audit,
    kl_to_oracle,
    logit_confidences,
    offline_lira,
    predictions,
)
from delfast.evaluation.intervals import proportion
from tests.evaluation.samples import batches, make_model

QUICK = Relearning(steps=4, lr=0.05, batch_size=8, every=2)
Batches = list[tuple[Tensor, ...]]


@pytest.fixture
def sets() -> dict[str, Any]:
    return {"forget": batches(30, seed=1), "retain": batches(60, seed=2), "test": batches(40, seed=3)}


def references(count: int, forget: int) -> list[Reference]:
    generator = torch.Generator().manual_seed(0)
    return [
        Reference(make_model(10 + k), {"forget": torch.rand(forget, generator=generator) < 0.5}) for k in range(count)
    ]


def test_figures_are_those_of_the_functions_that_measure_one_thing(sets: dict[str, Any]) -> None:
    model, oracle, earlier = make_model(0), make_model(1), batches(20, seed=4)
    found = audit(model, **sets, earlier={"first": earlier}, oracle=oracle, relearn=None)
    assert list(found.sets) == ["forget", "first", "retain", "test", "control"]
    for name, loader in {**sets, "first": earlier, "control": sets["test"]}.items():
        expected, figures = accuracy_and_loss(model, loader), found.sets[name]
        assert figures.accuracy is not None and figures.kl is not None
        assert figures.accuracy.value == pytest.approx(expected.accuracy)
        assert figures.loss.value == pytest.approx(expected.loss)
        assert figures.kl.value == pytest.approx(kl_to_oracle(model, oracle, loader))
        right = round(expected.accuracy * figures.count / 100)
        assert figures.accuracy == proportion(right, figures.count).scaled(100)
        assert figures.loss.low is not None and figures.loss.low < figures.loss.value
        assert (figures.attack_advantage is not None) == (name in ("forget", "first"))
        assert found.oracle is not None and found.oracle[name].accuracy is not None
        assert found.oracle[name].accuracy.value == pytest.approx(accuracy_and_loss(oracle, loader).accuracy)
        assert found.oracle[name].kl is None
    assert found.relearning == {} and found.relearn_ratio is None


def test_classes_have_accuracies_of_their_own(sets: dict[str, Any]) -> None:
    model = make_model(0)
    sets["test"] = [(x[y != 2], y[y != 2]) for x, y in sets["test"]]
    found = audit(model, **sets, relearn=None).classes
    assert found is not None and found["test"][2] is None
    log_probabilities, targets = predictions(model, sets["retain"])
    for label, figure in enumerate(found["retain"]):
        own = targets == label
        right = int((log_probabilities[own].argmax(1) == label).sum())
        assert figure == proportion(right, int(own.sum())).scaled(100)


def test_lira_is_the_attack_of_offline_lira(sets: dict[str, Any]) -> None:
    model, known = make_model(0), references(6, 30)
    for reference in known:
        reference.members["forget"][3] = True  # type: ignore[index]
    found = audit(model, **sets, references=known, relearn=None).sets["forget"].lira
    assert found is not None and found.left_out >= 1 and found.examples + found.left_out == 30

    def confidences(network: nn.Module) -> Tensor:
        return logit_confidences(*predictions(network, sets["forget"]))

    values = torch.stack([confidences(reference.model) for reference in known])  # type: ignore[arg-type]
    scores = offline_lira(confidences(model), values, torch.stack([each.members["forget"] for each in known]))
    control = torch.stack([logit_confidences(*predictions(r.model, sets["test"])) for r in known])  # type: ignore[arg-type]
    others = offline_lira(logit_confidences(*predictions(model, sets["test"])), control)
    used = scores[~scores.isnan()]
    assert found.auc is not None and found.auc.value == pytest.approx((used[:, None] > others).double().mean().item())


def test_what_is_left_out_for_lack_of_references_is_counted(sets: dict[str, Any]) -> None:
    knew = torch.ones(30, dtype=torch.bool)
    known = [Reference(make_model(k), {"forget": knew}) for k in range(3)]
    found = audit(make_model(0), **sets, references=known, relearn=QUICK).as_dict()
    assert found["sets"]["forget"]["lira"] == {"auc": None, "tpr_at_1_percent": None, "examples": 0, "left_out": 30}
    curve = found["relearning"]["retain"]
    assert curve["ratio"] is None and curve["compared_on"] == [0, 0, 0]
    assert curve["ratio_left_out"] == (
        "none of 3 never-seen networks has 2 measured forget examples that it was not trained on"
    )
    knew = torch.arange(30) >= 12
    known = [Reference(make_model(k), {"forget": each}) for k, each in enumerate([knew, knew | True])]
    curve = audit(make_model(0), **sets, references=known, relearn=QUICK).as_dict()["relearning"]["retain"]
    assert curve["ratio"] is not None and curve["compared_on"] == [12, 0] and curve["ratio_left_out"] is None
    alone = audit(make_model(0), **sets, relearn=QUICK).as_dict()["relearning"]["retain"]
    assert alone["ratio_left_out"] == "there is no never-seen network to compare with"
    one = {**sets, "forget": batches(1)}
    curve = audit(make_model(0), **one, oracle=make_model(1), relearn=QUICK).as_dict()["relearning"]["retain"]
    assert curve["ratio_left_out"] == "1 measured forget example: a variance needs 2"


def test_one_network_at_a_time_may_be_loaded(sets: dict[str, Any]) -> None:
    known, calls = references(3, 30), []

    def loading(network: nn.Module) -> Callable[[], nn.Module]:
        def load() -> nn.Module:
            calls.append(network)
            return network

        return load

    lazy = [Reference(loading(each.model), each.members) for each in known]  # type: ignore[arg-type]
    first, second = (audit(make_model(0), **sets, references=each, relearn=QUICK).as_dict() for each in (known, lazy))
    first.pop("seconds"), second.pop("seconds")
    assert first == second and len(calls) == 6  # once for LiRA, once for relearning
    with pytest.raises(InputError, match=r"expected references\[0\].model to be a function that returns"):
        audit(make_model(0), **sets, references=[Reference(lambda: 3, known[0].members)], relearn=None)  # type: ignore[arg-type, return-value]


def test_every_network_is_left_as_it_was_and_figures_repeat(sets: dict[str, Any]) -> None:
    model, oracle, known = make_model(0).train(), make_model(1).eval(), references(3, 30)
    model[1].eval()
    model[3].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    networks: list[Any] = [model, oracle, *(reference.model for reference in known)]
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    modes = [[module.training for module in network.modules()] for network in networks]
    state = torch.get_rng_state()
    results = []
    for _ in range(2):
        found = audit(model, **sets, oracle=oracle, references=known, relearn=QUICK, seed=5).as_dict()
        found.pop("seconds")
        results.append(found)
        for network, values, mode in zip(networks, before, modes, strict=True):
            assert all(torch.equal(values[name], value) for name, value in network.state_dict().items())
            assert [module.training for module in network.modules()] == mode
        assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
        assert all(p.grad is None for network in networks for p in network.parameters() if p is not model[0].weight)
        assert [p.requires_grad for p in model.parameters()].count(False) == 1
        assert torch.equal(torch.get_rng_state(), state)
    assert results[0] == results[1]
    other = audit(model, **sets, oracle=oracle, references=known, relearn=QUICK, seed=6).as_dict()
    assert other["relearning"] != results[0]["relearning"]


def test_the_result_prints_as_a_table_with_a_reason_for_what_is_left_out(sets: dict[str, Any]) -> None:
    found = audit(make_model(0), **sets, oracle=make_model(1), references=references(3, 30), relearn=QUICK)
    lines = str(found).splitlines()
    assert lines[0].split("  ")[0] == "set" and "attack" in lines[0] and "KL (nats)" in lines[0]
    accuracy = found.sets["forget"].accuracy
    assert accuracy is not None and accuracy.low is not None
    assert lines[1].startswith("forget ") and f"{accuracy.value:.1f} ({accuracy.low:.1f} to " in lines[1]
    assert len({len(line) for line in lines[: 1 + 2 * 3]}) == 1  # the columns are aligned
    assert "relearning, forget 1 %: left out: 1 % of 30 forget examples are less than one example" in lines
    assert lines[-1].startswith("relearning ratio: ") and "e-" not in str(found)
    alone = str(audit(make_model(0), **sets, relearn=QUICK))
    assert "no ratio: there is no never-seen network to compare with" in alone and "oracle" not in alone


def test_the_result_is_plain_json_of_the_documented_form(sets: dict[str, Any]) -> None:
    known = references(3, 30)
    found = audit(make_model(0), **sets, oracle=make_model(1), references=known, relearn=QUICK).as_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))
    assert list(found) == ["sets", "classes", "relearning", "relearn_ratio", "oracle", "seconds", "settings"]
    assert list(found["sets"]["forget"]) == [
        "count", "accuracy", "loss", "attack_advantage", "attack_left_out", "lira", "kl",
    ]  # fmt: skip
    assert list(found["relearning"]) == ["retain", "forget 1 %", "forget 10 %"]
    assert found["relearning"]["forget 1 %"] == {"left_out": "1 % of 30 forget examples are less than one example"}
    curve = found["relearning"]["forget 10 %"]
    assert curve["steps"] == [0, 2, 4] and len(curve["accuracy"]) == len(curve["control"][0]) == 3
    assert (curve["trained_on"], curve["measured"]) == (3, 27)
    ratios = [each["ratio"] for each in found["relearning"].values() if "ratio" in each]
    assert found["relearn_ratio"] == max(ratios, key=lambda ratio: ratio["low"])
    assert set(found["seconds"]) == {"inference", "lira", "relearning"}
    assert audit(make_model(0), **sets, relearn=QUICK).as_dict()["relearn_ratio"] is None


def test_the_control_is_weighted_to_the_forget_sets_labels(sets: dict[str, Any]) -> None:
    forget = [(x[y != 3], y[y != 3]) for x, y in sets["forget"]]
    control = [(x[y > 1], y[y > 1]) for x, y in sets["test"]]
    found = audit(make_model(0), **{**sets, "forget": forget}, control=control, relearn=None).sets["forget"]
    assert found.attack_left_out == sum(int((y < 2).sum()) for _, y in forget)
    none = [(x[y == 0], y[y == 0]) for x, y in sets["test"]]
    only = [(x[y == 1], y[y == 1]) for x, y in sets["forget"]]
    found = audit(make_model(0), **{**sets, "forget": only}, control=none, relearn=None).sets["forget"]
    assert found.attack_advantage is None and found.attack_left_out == found.count


def squared(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean(1)


def test_a_loss_of_the_callers_gives_losses_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    sets = {
        name: [{"x": torch.randn(12, 4, generator=generator), "y": torch.randn(12, 2, generator=generator)}] * 2
        for name in ("forget", "retain", "test")
    }
    torch.manual_seed(0)
    model, known = nn.Linear(4, 2), [nn.Linear(4, 2) for _ in range(3)]
    loader = {name: list(parts) for name, parts in sets.items()}
    found = audit(
        model,
        **loader,
        loss_fn=squared,
        references=[Reference(network, {"forget": torch.zeros(24, dtype=torch.bool)}) for network in known],
        relearn=Relearning(steps=3, every=1, batch_size=4, fractions=(0.1,)),
    )
    expected = squared(model, sets["forget"][0]).mean().item()
    assert found.sets["forget"].accuracy is None and found.sets["forget"].loss.value == pytest.approx(expected)
    assert found.classes is None and found.sets["forget"].lira is not None
    assert found.sets["forget"].attack_advantage is not None
    curve = found.relearning["forget 10 %"]
    assert not isinstance(curve, str) and curve.accuracy is None and curve.ratio is not None
    own, others = (torch.tensor(values)[..., 1:].mean(-1) for values in (curve.loss, curve.control))
    level = others.log().mean() - own.log()
    start = torch.tensor(curve.control)[:, 0].log().mean() - torch.tensor(curve.loss)[0].log()
    expected_log = level - min(float(start), 0.0)
    assert expected_log <= 0 or curve.ratio.value <= expected_log.exp().item() + 1e-6


def test_texts_beside_tensors_stay_with_their_examples() -> None:
    """torch's collate function makes lists of texts."""
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(30, 4, generator=generator) for name in ("forget", "retain", "test")}
    names = {f"{float(row[0]):.6f}": row for rows in inputs.values() for row in rows}

    def loader(rows: Tensor) -> list[dict[str, Any]]:
        parts = rows.split(7)
        return [{"name": [f"{float(row[0]):.6f}" for row in part], "more": {"x": part}} for part in parts]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x = batch["more"]["x"]
        assert torch.equal(torch.stack([names[name] for name in batch["name"]]), x)
        return model(x).square().mean(1)

    torch.manual_seed(0)
    found = audit(
        nn.Linear(4, 2),
        **{name: loader(rows) for name, rows in inputs.items()},
        loss_fn=loss,
        never_seen=[nn.Linear(4, 2)],
        relearn=Relearning(steps=3, every=1, batch_size=4, fractions=(0.1,)),
    )
    curves = found.relearning.values()
    assert all(not isinstance(curve, str) and curve.ratio is not None for curve in curves), found.relearning


def test_parts_without_a_row_for_each_example_are_refused_by_name() -> None:
    sets = {name: [{"x": torch.randn(5, 4), "part": None}] for name in ("forget", "retain", "test")}
    for part in (3, None, ["a"] * 4, torch.ones(4), torch.tensor(1)):
        for each in sets.values():
            each[0]["part"] = part
        found = audit(
            nn.Linear(4, 2), **sets, loss_fn=lambda model, batch: model(batch["x"]).mean(1), relearn=QUICK,
        )  # fmt: skip
        reason = found.relearning["retain"]
        assert isinstance(reason, str) and "with a row for each example, got" in reason


def test_token_batches_count_tokens() -> None:
    torch.manual_seed(0)

    class Bigrams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 7)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.table(input_ids)

    sets = {name: [{"input_ids": torch.randint(7, (10, 6))} for _ in range(2)] for name in ("forget", "retain", "test")}
    model = Bigrams()
    found = audit(model, **sets, oracle=Bigrams(), relearn=Relearning(steps=2, every=1, batch_size=4))
    metrics = delfast.evaluate(model, **sets, mia=False)
    figures = found.sets["forget"]
    assert figures.accuracy is not None and figures.accuracy.value == pytest.approx(metrics.forget_acc)
    assert figures.loss.value == pytest.approx(metrics.forget_loss) and figures.kl is None
    curve = found.relearning["forget 10 %"]
    assert not isinstance(curve, str) and curve.accuracy is not None and curve.trained_on == 2


def test_a_set_that_changes_is_refused(sets: dict[str, Any]) -> None:
    inputs, targets = (torch.cat(column) for column in zip(*sets["forget"], strict=True))
    shuffled = DataLoader(TensorDataset(inputs, targets), batch_size=7, shuffle=True)
    with pytest.raises(InputError, match="forget set: expected the same examples in the same order in every pass"):
        audit(make_model(0), **{**sets, "forget": shuffled}, references=references(2, 30), relearn=None)


def test_bad_input_is_refused_by_name(sets: dict[str, Any]) -> None:
    model, known = make_model(0), references(2, 30)
    nan = make_model(0)
    with torch.no_grad():
        nan[3].bias[0] = float("nan")
    for change, message in (
        ({"forget": []}, "forget set: expected at least one example"),
        ({"retain": 3}, "expected the retain set to be a DataLoader"),
        ({"control": "test"}, "expected the control set to be a DataLoader"),
        ({"earlier": {"retain": sets["test"]}}, "expected names of earlier sets other than forget, retain, test, cont"),
        ({"earlier": {"one": []}}, "one set: expected at least one example"),
        (
            {"earlier": {"one": [*sets["test"]]}, "references": known},
            r"expected references\[0\].members\['one'\] to be",
        ),
        ({"references": references(2, 29)}, r"references\[0\].members\['forget'\] to be bool \(30,\), got torch.bool"),
        ({"references": [model]}, r"expected references\[0\] to be a Reference"),
        ({"never_seen": [3]}, r"expected never_seen\[0\] to be a torch.nn.Module or a function"),
        ({"never_seen": [nn.Module]}, r"expected never_seen\[0\] to be .* got the class Module"),
        ({"oracle": "it"}, "expected oracle to be a torch.nn.Module or None"),
        ({"model": nan}, "forget set: expected finite outputs"),
        ({"relearn": 3}, "expected relearn to be a Relearning"),
        ({"seed": -1}, "expected seed"),
        ({"loss_fn": 3}, "expected loss_fn"),
        ({"forget": [(torch.randn(3, 5), torch.tensor([0, 1, 9]))]}, "forget set: expected labels"),
        ({"loss_fn": lambda model, batch: model(batch[0]).mean(1)[:3]}, "forget set: expected a loss for each example"),
    ):
        arguments = {"model": model, **sets, "relearn": None, **change}
        with pytest.raises(InputError, match=message) as caught:
            audit(arguments.pop("model"), **arguments)
        assert "\n" not in str(caught.value)
    for change, message in (
        ({"steps": 0}, "steps"),
        ({"batch_size": 1}, "batch_size"),
        ({"lr": 0.0}, "expected lr to be finite and above 0"),
        ({"fractions": (1.0,)}, "fractions of the forget set between 0 and 1"),
        ({"fractions": 0.1}, "expected fractions to be a tuple"),
    ):
        with pytest.raises(InputError, match=message):
            Relearning(**change)  # type: ignore[arg-type]
