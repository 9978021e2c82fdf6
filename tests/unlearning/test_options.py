"""The keywords of ``unlearn``: hyperparameters of any method, options of the loop, and former keywords."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import delfast
from delfast import InputError, TrainingOptions
from delfast.files import load_archive
from delfast.unlearning import METHODS, EarlyStop, make_method
from delfast.unlearning.method import Method
from tests import cases

FORGET, RETAIN = cases.image_batches(8, seed=1), cases.image_batches(16, seed=2)
FORMER: dict[str, Any] = {
    "precision": "bf16", "batchnorm": "frozen", "dense": ["head.weight"], "validation": cases.image_batches(8, seed=3),
    "patience": 2, "config": {"batch_size": 8}, "progress": lambda batches, description, total: batches,
}  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    return cases.SmallNet()


def run(**options: Any) -> tuple[Any, Tensor]:
    model = network()
    result = delfast.unlearn(
        model, **{"forget": FORGET, "retain": RETAIN, "method": "finetune", "epochs": 1, **options}
    )
    return result, torch.cat([value.detach().double().flatten() for value in model.state_dict().values()])


def test_the_signature_has_options_and_hyperparameters() -> None:
    parameters = inspect.signature(delfast.unlearn).parameters
    assert list(parameters) == [
        "model", "retain", "forget", "mask", "budget", "strategy", "init", "method", "head", "loss_fn", "seed",
        "training", "checkpoint", "resume", "group", "hyperparameters",
    ]  # fmt: skip
    assert {field.name for field in fields(TrainingOptions)} - {"channels_last", "cuda_graphs"} == FORMER.keys()
    assert delfast.TrainingOptions is delfast.unlearning.TrainingOptions


def test_former_keywords_train_the_same_under_one_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected, weights = run(training=TrainingOptions(**FORMER), checkpoint=tmp_path / "new.pt")
    with pytest.warns(DeprecationWarning, match=r"training=TrainingOptions\(.*patience=\.\.\.") as caught:
        result, same = run(**FORMER, checkpoint=tmp_path / "old.pt")
    assert len(caught) == 1 and caught[0].filename == __file__
    assert torch.equal(weights, same) and (result.losses, result.validation) == (expected.losses, expected.validation)
    configs = [load_archive(tmp_path / name)["config"] for name in ("new.pt", "old.pt")]
    assert configs[0] == configs[1] and list(configs[0]) == list(configs[1])
    with pytest.warns(DeprecationWarning):  # the checkpoint of the new keywords is accepted
        assert run(**FORMER, checkpoint=tmp_path / "new.pt", resume=True)[0].resumed_from == 1


def test_the_settings_of_a_checkpoint_keep_their_names(tmp_path: Path) -> None:
    """A checkpoint of an earlier version is compared by these settings."""
    run(checkpoint=tmp_path / "c.pt", training=TrainingOptions(config={"batch_size": 8}))
    config = load_archive(tmp_path / "c.pt")["config"]
    assert config == {
        "epochs": 1, "lr": 0.01, "momentum": 0.9, "weight_decay": 0.0, "schedule": "cosine", "method": "finetune",
        "mask": config["mask"], "head": None, "seed": 0, "precision": "fp32", "batchnorm": "train", "patience": None,
        "batch_size": 8,
    }  # fmt: skip
    run(checkpoint=tmp_path / "d.pt", training=TrainingOptions(dense=("head.weight", "head.bias")))
    assert load_archive(tmp_path / "d.pt")["config"]["dense"] == ["head.bias", "head.weight"]


@pytest.mark.parametrize("name", FORMER)
def test_a_former_keyword_beside_training_is_refused(name: str) -> None:
    message = rf"'{name}' in training= alone, got it beside training=; pass TrainingOptions\({name}="
    for training in (TrainingOptions(), TrainingOptions(**FORMER)):
        with pytest.raises(InputError, match=message):
            run(training=training, **{name: FORMER[name]})


@pytest.mark.parametrize("name", METHODS)
def test_every_hyperparameter_is_a_keyword(name: str) -> None:
    """Pass every hyperparameter with another value than the default; the result equals ``make_method``'s."""
    changes: dict[str, Any] = {}
    for field in fields(METHODS[name]):
        if field.name == "schedule":
            changes[field.name] = "constant"
        elif field.name != "epochs":
            changes[field.name] = field.default * 2 if isinstance(field.default, int) else field.default / 2
    training = make_method(name, {}).epochs > 0
    if training:
        changes["epochs"] = 1
    else:
        changes = {key: value for key, value in changes.items() if key not in {f.name for f in fields(Method)}}
    mask = {} if name == "retrain" else {"mask": delfast.score(network(), criterion="weight").select(0.2)}
    options = {"retain": RETAIN * 8, "init": cases.SmallNet, **mask, "method": name}
    result, _ = run(**{**options, **({} if training else {"epochs": None}), **changes})
    assert result.method == make_method(name, changes)


def test_none_keeps_the_methods_own_value() -> None:
    result, _ = run(method=make_method("finetune", {"lr": 0.02}), lr=None, momentum=None)
    assert (result.method.lr, result.method.momentum) == (0.02, 0.9)


@pytest.mark.parametrize("value", [1, None])
def test_an_unknown_keyword_is_refused_with_what_there_is(value: Any) -> None:
    message = (
        "unlearn has no parameter 'epoch', and 'neggrad+' no such hyperparameter: it has alpha, epochs, lr, momentum, "
        "schedule, weight_decay; options of the training loop are fields of TrainingOptions"
    )
    with pytest.raises(InputError) as caught:
        run(method="neggrad+", epoch=value)
    assert str(caught.value) == message
    with pytest.raises(InputError, match="no parameter 'alpha', and 'finetune' no such hyperparameter"):
        run(alpha=0.5)


def test_subclasses_with_names_of_before_are_refused() -> None:
    """Nothing reads ``layout`` or calls ``look`` any more: such a subclass would train on another set."""
    with pytest.raises(TypeError, match="'layout' is now 'step_plan'"):
        type("Old", (Method,), {"layout": "forget"})
    with pytest.raises(TypeError, match="'look' is now 'update'"):
        type("Old", (EarlyStop,), {"look": lambda self, model: None})
