"""Arguments of a wrong type: one line that names the argument, before anything is computed or changed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import delfast
from delfast import InputError, Mask
from delfast.arguments import check_flag, describe
from delfast.localization import signed_channels
from delfast.optim import MaskedAdamW, MaskedSGD
from delfast.unlearning import Diverged, Finetune, Scrub, make_method, train
from tests import cases

EVALUATE: Any = delfast.evaluation
BATCHES = cases.image_batches(12, 4)
FORGET, RETAIN = BATCHES[:1], BATCHES[1:]
TEST = [*RETAIN]
STATE = cases.SmallNet().state_dict()
LOGITS = torch.randn(6, 3).log_softmax(1)
LABELS = torch.arange(6) % 3


def small() -> cases.SmallNet:
    model = cases.SmallNet()
    model.load_state_dict(STATE)
    return model


MASK = delfast.localize(small(), FORGET)
SCORES = delfast.score(small(), FORGET)
METRICS = delfast.evaluate(small(), FORGET, RETAIN, TEST, mia=False)


def losses(model: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def logits(model: Any, batch: Any) -> Any:
    return model(batch[0]), batch[1]


class Opaque:
    """A value of no use anywhere."""


WRONG: dict[str, Any] = {
    "None": None, "True": True, "5": 5, "-1": -1, "2**64": 2**64, "10**400": 10**400, "0.5": 0.5, "nan": math.nan,
    "inf": math.inf, "'0.3'": "0.3", "''": "", "'\\0'": "\0", "bytes": b"0.3", "object": Opaque(), "class": dict,
    "[]": [], "[1]": [1], "['a']": ["a"], "[None]": [None], "{}": {}, "{'a': 1}": {"a": 1}, "set": {1}, "complex": 1j,
    "tensor": torch.ones(2), "0-d tensor": torch.tensor(0.5), "array": numpy.ones(2), "float32": numpy.float32(0.5),
    "int64": numpy.int64(3), "layer": nn.Linear(2, 2), "to 5": lambda *_, **__: 5, "to None": lambda *_, **__: None,
    "dtype": torch.float16, "path": Path("absent", "file"),
}  # fmt: skip

Case = tuple[Callable[..., Any], dict[str, Any]]  # a function of the model and keyword arguments, and good ones

UNLEARN: dict[str, Any] = {
    "forget": FORGET,
    "retain": RETAIN,
    "mask": MASK,
    "method": "del",
    "init": cases.SmallNet,
    "epochs": 1,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "seed": 1,
    "head": None,
    "loss_fn": None,
    "checkpoint": None,
    "resume": False,
}
OPTIONS: dict[str, Any] = {
    "precision": "fp32", "batchnorm": "train", "dense": [], "validation": [*FORGET], "patience": 1, "config": None,
    "progress": None,
}  # fmt: skip
SELECT: dict[str, Any] = {"granularity": "channel", "aggregate": "mean", "top_h": 0.1, "policy": "whole"}
SCORE: dict[str, Any] = {"criterion": "grad", "per_example": False, "loss_fn": None, "seed": 1}


def with_options(model: nn.Module, **options: Any) -> object:
    return delfast.unlearn(model, **UNLEARN, training=delfast.TrainingOptions(**options))


def scrub(model: nn.Module, **hyperparameters: Any) -> object:
    return delfast.unlearn(model, forget=FORGET, retain=RETAIN, method=Scrub(epochs=1, **hyperparameters))


def given_model(call: Callable[..., Any], name: str = "model") -> Callable[..., Any]:
    """``model`` may be replaced too."""
    return lambda network, /, **arguments: call(**{name: network, **arguments})


def function(call: Callable[..., Any]) -> Callable[..., Any]:
    """For calls that take no model."""
    return lambda _, **arguments: call(**arguments)


def masked(kind: Any) -> Callable[..., Any]:
    return lambda model, **arguments: kind(**{"named_parameters": model.named_parameters(), **arguments})


CASES: dict[str, Case] = {
    "score": (given_model(delfast.score), {"model": ..., "forget": FORGET, "max_channels": 3, **SCORE}),
    "critmem by score": (given_model(delfast.score), {"forget": FORGET, "max_channels": 3, "criterion": "critmem"}),
    "select": (function(SCORES.select), {"budget": 0.3, **SELECT}),
    "channel_scores": (function(SCORES.channel_scores), {"aggregate": "mean", "top_h": 0.1}),
    "localize": (
        given_model(delfast.localize),
        {
            "model": ..., "forget": FORGET, "budget": 0.3, "strategy": "del", "preset": "paper", "batch_size": 4,
            **SCORE, **SELECT,
        },
    ),
    "anytime": (
        given_model(delfast.localize),
        {"forget": list(zip(*FORGET[0], strict=True)), "stop_when_stable": 0.9, "batch_size": 4, "seed": 1},
    ),
    "signed_channels": (
        given_model(signed_channels), {"model": ..., "loader": FORGET, "loss_fn": None, "path": None},
    ),
    "critmem": (
        given_model(delfast.critmem),
        {
            "model": ..., "loader": FORGET, "max_channels": 2, "preserve": 0.5, "include_head": False,
            "logits_fn": logits,
        },
    ),
    "reset_": (given_model(delfast.reset_), {"model": ..., "mask": MASK, "init": cases.SmallNet, "seed": 1}),
    "compact": (given_model(delfast.compact), {"model": ..., "mask": MASK, "dense": []}),
    "unlearn": (given_model(delfast.unlearn), {"model": ..., "training": delfast.TrainingOptions(), **UNLEARN}),
    "unlearn, options": (with_options, OPTIONS),
    "unlearn in one shot": (
        given_model(delfast.unlearn), {"forget": FORGET, "retain": RETAIN * 8, "method": "ssd", "mask": MASK, "seed": 1}
    ),
    "scrub": (scrub, {"alpha": 0.1, "gamma": 0.9, "temperature": 4.0, "max_epochs": 1, "schedule": "constant"}),
    "evaluate": (
        given_model(delfast.evaluate),
        {"model": ..., "forget": FORGET, "retain": RETAIN, "test": TEST, "oracle": METRICS, "seed": 1, "mia": False},
    ),
    "accuracy_and_loss": (given_model(EVALUATE.accuracy_and_loss), {"model": ..., "loader": FORGET}),
    "predictions": (given_model(EVALUATE.predictions), {"model": ..., "loader": FORGET}),
    "kl_to_oracle": (given_model(EVALUATE.kl_to_oracle), {"model": ..., "oracle": small(), "loader": FORGET}),
    "kl_divergence": (
        function(EVALUATE.kl_divergence), {"log_probabilities": LOGITS, "oracle_log_probabilities": LOGITS},
    ),
    "gaps": (function(EVALUATE.gaps), {"metrics": METRICS, "oracle": METRICS}),
    "logit_confidences": (
        function(EVALUATE.logit_confidences), {"log_probabilities": LOGITS, "targets": LABELS},
    ),
    "modified_entropy": (function(EVALUATE.modified_entropy), {"log_probabilities": LOGITS, "targets": LABELS}),
    "membership_inference": (
        function(EVALUATE.membership_inference),
        {
            "retain_confidences": torch.rand(5), "test_confidences": torch.rand(5), "forget_confidences": torch.rand(5),
            "seed": 1,
        },
    ),
    "svc_attacks": (
        function(EVALUATE.svc_attacks),
        {"retain": (LOGITS, LABELS), "test": (LOGITS, LABELS), "forget": (LOGITS, LABELS), "seed": 1},
    ),
    "u_lira": (
        function(EVALUATE.u_lira),
        {
            "unlearned": LOGITS, "retrained": LOGITS, "attacked_unlearned": LOGITS[0], "attacked_retrained": LOGITS[0],
            "fixed_variance": False, "fpr": 1.0,
        },
    ),
    "u_lira_leave_one_out": (
        function(EVALUATE.u_lira_leave_one_out),
        {"unlearned": LOGITS, "retrained": LOGITS, "fixed_variance": False, "fpr": 1.0},
    ),
    "tpr_at_fpr": (function(EVALUATE.tpr_at_fpr), {"positives": LOGITS, "negatives": LOGITS, "fpr": 1.0}),
    "relative_time": (function(EVALUATE.relative_time), {"seconds": 1.0, "retrain_seconds": 2.0}),
    "changed_fraction": (
        function(EVALUATE.changed_fraction), {"before": STATE, "after": STATE, "names": ["head.bias"]},
    ),
    "Mask.union": (function(MASK.union), {"other": MASK}),
    "Mask.intersection": (function(MASK.intersection), {"other": MASK}),
    "Mask.jaccard": (function(MASK.jaccard), {"other": MASK}),
    "Mask.widen": (function(MASK.widen), {"names": ["head.bias"], "shapes": {"head.bias": (10,)}}),
    "Mask.to": (function(MASK.to), {"device": "cpu"}),
    "Mask.to_dense": (function(MASK.to_dense), {"dtype": torch.bool}),
    "Mask.match": (function(MASK.match), {"named": dict(small().named_parameters())}),
    "Mask.__contains__": (function(MASK.__contains__), {"name": "head.bias"}),
    "Mask.load": (function(Mask.load), {"path": None}),
    "SignedChannels.load": (function(delfast.SignedChannels.load), {"path": None}),
    "MaskedSGD": (
        masked(MaskedSGD),
        {
            "named_parameters": ..., "mask": MASK, "lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0,
            "nesterov": False, "maximize": False,
        },
    ),
    "MaskedAdamW": (
        masked(MaskedAdamW),
        {
            "named_parameters": ..., "mask": MASK, "lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.0,
            "maximize": False,
        },
    ),
}  # fmt: skip
ARGUMENTS = [(case, argument) for case, (_, good) in CASES.items() for argument in good]


def state_of(model: nn.Module) -> list[Any]:
    """The state that a refusal must not change: values by their bytes, modes, flags, gradients, torch's generator."""
    values = [value.numpy().tobytes() for value in model.state_dict().values()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    gradients = [parameter.grad is None for parameter in model.parameters()]
    modes = [(type(module), module.training) for module in model.modules()]
    return [values, flags, gradients, modes, torch.get_rng_state().tolist()]


# A function of the user's may raise what it likes, and so may the network: it gets what a loader yields.
FUNCTIONS = {"loss_fn", "logits_fn", "progress", "init"}
OWN_ERRORS = {(name, wrong) for name in FUNCTIONS for wrong in ("class", "layer")} | {
    ("progress", "to 5"), ("progress", "to None"), ("oracle", "layer"), ("model", "layer"),
    ("anytime", "forget", "[None]"), ("anytime", "stop_when_stable", "None"),
}  # fmt: skip


def attempt(case: str, argument: str, wrong: str) -> None:
    """The call works, or is refused in one line with nothing changed."""
    if (argument, wrong) in OWN_ERRORS or (case, argument, wrong) in OWN_ERRORS:
        return
    call, good = CASES[case]
    model = small()
    arguments = {name: value for name, value in good.items() if value is not ...}
    before = state_of(model)
    with TemporaryDirectory() as directory:
        here = os.getcwd()
        os.chdir(directory)  # paths that work are written here
        try:
            call(model, **{**arguments, argument: WRONG[wrong]})
        except InputError as error:
            assert "\n" not in str(error) and str(error) and len(str(error)) < 600, error
            if argument != "validation":  # its first batch is read after the first epoch
                assert state_of(model) == before, (case, argument, wrong)
            assert not list(Path(directory).iterdir()), (case, argument, wrong)
        except Diverged:  # a rate of 2**64 is a number
            assert argument in {"lr", "weight_decay", "alpha", "gamma", "temperature"}
        finally:
            os.chdir(here)


@pytest.mark.parametrize(
    ("case", "argument", "wrong", "message"),
    [
        ("localize", "budget", "'0.3'", "expected budget to be a number, got '0.3'"),
        ("select", "budget", "True", "expected budget to be a number, got True"),
        ("select", "budget", "nan", r"expected a budget in \(0, 1\], got nan"),
        ("reset_", "seed", "2**64", r"expected seed to be an int in \[0, 2\*\*64\), got 18446744073709551616"),
        ("unlearn", "seed", "-1", r"expected seed to be an int in \[0, 2\*\*64\), got -1"),
        ("evaluate", "seed", "0.5", "expected seed to be an int .* got 0.5"),
        ("score", "seed", "'0.3'", "expected seed to be an int .* got '0.3'"),
        ("score", "forget", "5", "expected the forget set to be a DataLoader or another iterable .* got 5"),
        ("critmem", "loader", "class", "the loader .* got the class"),
        ("evaluate", "test", "5", "expected the test set to be a DataLoader .* got 5"),
        ("unlearn", "retain", "0-d tensor", "expected the retain set to be a DataLoader .* got Tensor"),
        ("score", "model", "5", "expected model to be a torch.nn.Module, got int"),
        ("reset_", "mask", "None", "expected mask to be a delfast.Mask, got None"),
        ("unlearn", "epochs", "'0.3'", "expected epochs to be an int, got '0.3'"),
        ("unlearn", "checkpoint", "''", "expected checkpoint to be a file, got the directory ''"),
        ("scrub", "alpha", "inf", "expected alpha finite for 'scrub', got inf"),
        ("Mask.jaccard", "other", "5", "expected the other mask to be a delfast.Mask, got 5"),
        ("MaskedSGD", "lr", "'0.3'", "expected lr to be a number, got '0.3'"),
    ],
)
def test_the_message_names_the_argument(case: str, argument: str, wrong: str, message: str) -> None:
    call, good = CASES[case]
    arguments = {name: value for name, value in good.items() if value is not ...}
    with pytest.raises(InputError, match=message):
        call(small(), **{**arguments, argument: WRONG[wrong]})


LOADERS = [each for each in ARGUMENTS if each[1] in {"forget", "retain", "test", "loader", "validation"}]
UNREAD = {"unlearn", "unlearn, options", "critmem"}  # a mask is given; no patience; logits_fn reads any batch
EXAMPLES: Any = TensorDataset(FORGET[0][0], FORGET[0][1])


@pytest.mark.parametrize(("case", "argument"), [each for each in LOADERS if each[0] not in ("anytime", "svc_attacks")])
def test_a_data_set_in_place_of_a_loader_is_refused_by_name(case: str, argument: str) -> None:
    call, good = CASES[case]
    model = small()
    before = state_of(model)
    arguments = {name: value for name, value in good.items() if value is not ...}
    given = {"got the data set TensorDataset": EXAMPLES}
    if case not in UNREAD:
        given["got a single example"] = list(EXAMPLES)
    for got, examples in given.items():
        with pytest.raises(InputError, match=f"{got}.*DataLoader"):
            call(model, **{**arguments, argument: examples})
        assert state_of(model) == before


def test_training_and_an_audit_refuse_a_data_set_by_name() -> None:
    model = small()
    with pytest.raises(InputError, match=r"training set .* got the data set TensorDataset"):
        train(model, EXAMPLES, torch.optim.SGD(model.parameters()), epochs=1)
    for name in ("forget", "retain", "test", "control"):
        with pytest.raises(InputError, match=f"expected the {name} set .* got the data set TensorDataset"):
            EVALUATE.audit(model, **{"forget": FORGET, "retain": RETAIN, "test": TEST, name: EXAMPLES})


def test_losses_without_a_parameter_are_refused() -> None:
    """At every entry that takes gradients of a loss_fn: constant losses, detached ones, of a network that is frozen."""

    def constant(model: Any, batch: Any) -> Tensor:
        return batch[0].flatten(1).mean(1)

    def detached(model: Any, batch: Any) -> Tensor:
        return losses(model, batch).detach()

    for loss_fn in (constant, detached):
        model = small()
        before = state_of(model)
        for call in (
            lambda f=loss_fn, m=model: delfast.score(m, FORGET, loss_fn=f),
            lambda f=loss_fn, m=model: delfast.score(m, FORGET, loss_fn=f, per_example=True),
            lambda f=loss_fn, m=model: delfast.localize(m, FORGET, loss_fn=f),
            lambda f=loss_fn, m=model: delfast.unlearn(m, forget=FORGET, retain=RETAIN, init=small, loss_fn=f),
        ):
            with pytest.raises(InputError, match="expected losses that depend on the model's trainable parameters"):
                call()
            assert state_of(model) == before
    model = small()
    with pytest.raises(InputError, match=r"losses (that depend on|of a model with a convolution or linear layer)"):
        signed_channels(model, FORGET, loss_fn=constant)
    with pytest.raises(InputError, match="losses that depend on"):
        train(model, RETAIN, torch.optim.SGD(model.parameters()), epochs=1, loss_fn=detached)


def test_numpy_scalars_become_plain_numbers(tmp_path: Path) -> None:
    settings: Any = {"seed": numpy.int64(1), "top_h": numpy.int32(2)}
    expected = delfast.localize(small(), FORGET, 0.25, seed=1, top_h=2)
    examples = list(zip(*FORGET[0], strict=True))
    stable = delfast.localize(small(), examples, stop_when_stable=numpy.float32(0.5), batch_size=numpy.int64(2))
    for mask in (delfast.localize(small(), FORGET, numpy.float32(0.25), **settings), stable):
        assert not any(isinstance(value, numpy.generic) for value in mask.metadata.values())
        mask.save(tmp_path / "mask.safetensors")
        assert Mask.load(tmp_path / "mask.safetensors").metadata == mask.metadata
    found = delfast.localize(small(), FORGET, numpy.float32(0.25), **settings)
    assert found.digest == expected.digest and found.metadata == expected.metadata
    fresh = [small(), small()]
    delfast.reset_(fresh[0], MASK, cases.SmallNet, seed=numpy.uint64(3))
    delfast.reset_(fresh[1], MASK, cases.SmallNet, seed=3)
    assert state_of(fresh[0]) == state_of(fresh[1])
    large = [delfast.score(small(), criterion="random", seed=2**64 - i).select(0.3).digest for i in (1, 2, 2**63)]
    assert len(set(large)) == 3
    for seed in (0, 2**64 - 1):
        delfast.reset_(small(), MASK, cases.SmallNet, seed=seed)


@pytest.mark.long
@given(st.sampled_from(ARGUMENTS), st.sampled_from(list(WRONG)))
@settings(max_examples=200, deadline=None, derandomize=True)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wrong_types_are_refused_in_one_line(place: tuple[str, str], wrong: str) -> None:
    attempt(*place, wrong)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_every_wrong_type_for_every_argument(case: str) -> None:
    for argument in CASES[case][1]:
        for wrong in WRONG:
            attempt(case, argument, wrong)


def test_numpys_bool_is_a_flag_and_is_told_from_pythons() -> None:
    assert check_flag("x", numpy.bool_(True)) is True and check_flag("x", numpy.bool_(False)) is False
    assert describe(numpy.bool_(True)) == "True (numpy.bool)"


def test_a_method_may_have_fields_that_it_sets_itself() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Own(Finetune):
        twice: float = field(init=False, default=0.0)

        def __post_init__(self) -> None:
            object.__setattr__(self, "twice", 2 * self.lr)

    assert make_method(Own(), {"lr": 0.5}).twice == 1.0  # type: ignore[attr-defined]
