"""localize: the precedence of presets, strategies and arguments, and former names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import delfast
from delfast import InputError, Mask
from delfast.localization import STRATEGIES, WHOLE_TRAINING_SET
from delfast.localization.strategies import PRESETS
from tests import cases

MODEL = cases.SmallNet()
BATCHES = cases.image_batches(6)
SCORES = {name: delfast.score(MODEL, BATCHES, name) for name in ("weighted_grad", "grad", "weight")}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    strategy=st.sampled_from(["del", "salloc", "weight", "channel-unweighted", "weighted-grad-all"]),
    preset=st.sampled_from([None, "paper", "published-code"]),
    criterion=st.sampled_from([None, "weighted_grad", "grad", "weight"]),
    granularity=st.sampled_from([None, "channel", "param"]),
    aggregate=st.sampled_from([None, "topk_mean", "mean", "sum", "max"]),
    top_h=st.sampled_from([None, 2, 0.5, "published"]),
    policy=st.sampled_from([None, "whole", "exact"]),
)
def test_arguments_replace_the_strategys_which_replace_the_presets(
    strategy: str, preset: Any, criterion: Any, granularity: Any, **chosen: Any
) -> None:
    given_arguments = {"criterion": criterion, "granularity": granularity, **chosen}
    expected = {**PRESETS[preset or "paper"], **STRATEGIES[strategy]}
    expected |= {name: value for name, value in given_arguments.items() if value is not None}
    mask = delfast.localize(MODEL, BATCHES, strategy=strategy, preset=preset, **given_arguments)
    selection = {name: value for name, value in expected.items() if name != "criterion"}
    assert mask.digest == SCORES[expected["criterion"]].select(0.3, **selection).digest
    assert mask.metadata["preset"] == (preset or "paper") and mask.metadata["criterion"] == expected["criterion"]
    for name in ("granularity", "aggregate", "top_h", "policy"):
        assert mask.metadata.get(name, expected[name]) == expected[name]
    assert mask.metadata.get("strategy") == (strategy if criterion is granularity is None else None)


def test_a_digest_does_not_depend_on_the_strategys_name() -> None:
    model, batches = cases.SmallNet(), cases.image_batches()
    named = delfast.localize(model, batches, strategy="weighted-grad-all")
    spelled = delfast.localize(model, batches, criterion="weighted_grad", granularity="channel")
    assert named.metadata == {**spelled.metadata, "strategy": "weighted-grad-all"}
    assert named.digest == spelled.digest
    assert STRATEGIES.keys() >= WHOLE_TRAINING_SET


@pytest.mark.parametrize("strategy", ["luck", None, 5, ["del"], "weighted_grad_all"])
def test_an_unknown_strategy_is_refused_with_the_choices(strategy: Any) -> None:
    with pytest.raises(InputError, match=r"expected strategy to be one of del, salloc, .*critmem; got"):
        delfast.localize(cases.SmallNet(), cases.image_batches(), strategy=strategy)


def test_the_former_keyword_is_accepted_with_a_warning() -> None:
    model, batches = cases.SmallNet(), cases.image_batches()
    call: Any = delfast.localize
    with pytest.warns(DeprecationWarning, match="'forget_loader' is now 'forget'"):
        assert call(model, forget_loader=batches).digest == delfast.localize(model, batches).digest
    with pytest.raises(InputError, match="weighted-grad-all"):  # now the strategy "weighted-grad-all"
        call(model, batches, criterion="weighted_grad_all")


def test_score_accepts_its_former_keyword_and_warns_at_the_caller() -> None:
    model, batches = cases.SmallNet(), cases.image_batches()
    call: Any = delfast.score
    with pytest.warns(DeprecationWarning, match="'loader' is now 'forget'") as caught:
        assert call(model, loader=batches).select(0.3).digest == delfast.score(model, batches).select(0.3).digest
    images, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    with pytest.warns(UserWarning, match="drops its last short batch") as dropped:
        delfast.score(model, DataLoader(TensorDataset(images, targets), batch_size=len(images) - 1, drop_last=True))
    assert [each.filename for each in (*caught, *dropped)] == [__file__, __file__]


def test_masks_of_the_former_criterion_still_load(tmp_path: Path) -> None:
    """The digest and the metadata of a file that names "weighted_grad_all" are those it was written with."""
    mask = delfast.localize(cases.SmallNet(), cases.image_batches())
    Mask(mask.parameters, {**mask.metadata, "criterion": "weighted_grad_all"}).save(tmp_path / "mask.safetensors")
    loaded = Mask.load(tmp_path / "mask.safetensors")
    assert loaded.digest == mask.digest and loaded.metadata["criterion"] == "weighted_grad_all"


def test_a_batch_size_that_is_passed_replaces_a_loaders_own() -> None:
    images, targets = cases.image_batches(12, 12)[0]
    dataset = TensorDataset(images, targets)
    loader = DataLoader(dataset, batch_size=2)
    sizes: list[int] = []

    def losses(model: nn.Module, batch: Any) -> torch.Tensor:
        sizes.append(len(batch[1]))
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    for passed, first in (({}, 2), ({"batch_size": 128}, 12), ({"batch_size": 3}, 3)):
        sizes.clear()
        delfast.localize(cases.SmallNet(), loader, stop_when_stable=1.0, loss_fn=losses, **passed)
        assert sizes[0] == first
    sizes.clear()
    delfast.localize(cases.SmallNet(), dataset, stop_when_stable=1.0, loss_fn=losses)
    assert sizes == [12]


def test_the_former_criterion_is_refused_with_what_replaces_it() -> None:
    for call in (delfast.localize, delfast.score):
        with pytest.raises(InputError, match="pass strategy='weighted-grad-all'"):
            call(cases.SmallNet(), cases.image_batches(12, 12), criterion="weighted_grad_all")  # type: ignore[operator]
