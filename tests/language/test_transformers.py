"""Whole calls on tiny models of transformers: Conv1D, tied embeddings, LoRA, checkpointing, accumulation, bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import delfast
from delfast import causal_lm_loss
from tests.graphs.double import Double
from tests.language import models

FORGET, RETAIN = models.sets()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_conv1d_is_scored_by_its_outputs() -> None:
    model = models.gpt2()
    scores = delfast.score(model, FORGET, loss_fn=causal_lm_loss, include="*.c_fc.weight")
    assert scores.gradients is not None
    for aggregate, reduce in (("max", Tensor.amax), ("sum", Tensor.sum)):
        columns = [reduce((scores.parameters[n] * g).abs(), 0) for n, g in scores.gradients.items()]
        assert [len(each) for each in columns] == [128, 128]
        torch.testing.assert_close(scores.channel_scores(aggregate), torch.cat(columns))
    mask = scores.select(0.3)
    assert {part.dim for part in mask.parameters.values()} == {1} and mask.selected == 32 * mask.channels


def test_a_tied_embedding_competes_once_and_is_found_under_both_names() -> None:
    model = models.gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    every = delfast.localize(model, FORGET, loss_fn=causal_lm_loss)
    assert "transformer.wte.weight" in every and "lm_head.weight" not in every.names
    assert every.total == sum(parameter.numel() for parameter in model.parameters())
    for pattern in ("lm_head.weight", "*.wte.*"):
        assert delfast.localize(model, FORGET, loss_fn=causal_lm_loss, include=pattern).names == every.names[:1]
        assert delfast.localize(model, FORGET, loss_fn=causal_lm_loss, exclude=pattern).names == every.names[1:]


def test_adapters_compete_and_the_base_stays_bit_identical() -> None:
    model = models.llama_with_lora()
    before = state(model)
    mask = delfast.localize(model, FORGET, 0.3, loss_fn=causal_lm_loss)
    assert len(mask.names) == 8 and all(name.endswith(("down.weight", "up.weight")) for name in mask.names)
    result = delfast.unlearn(
        model,
        **{"retain": RETAIN, "forget": FORGET, "loss_fn": causal_lm_loss, "init": models.llama_with_lora, "seed": 1},
        **{"epochs": 2, "lr": 0.1},
    )
    assert result.mask.digest == mask.digest  # the frozen head is not added
    flags = mask.to_dense()
    for name, value in model.state_dict().items():
        same = value == before[name]
        assert same.all() if name not in flags else same[~flags[name]].all()
    assert any(not torch.equal(model.state_dict()[name], before[name]) for name in flags)


class Checkpointed(nn.Module):
    """A layer of a model, recomputed in the backward pass, in eval mode as well."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.layer, *args, use_reentrant=False, **kwargs)


def _with_checkpoints(model: Any) -> None:
    model.transformer.h = nn.ModuleList(map(Checkpointed, model.transformer.h))


def _with_transformers_checkpoints(model: Any) -> None:
    model.activation_checkpointing_enable({"use_reentrant": False})


@pytest.mark.parametrize("change", [_with_checkpoints, _with_transformers_checkpoints])
def test_checkpointing_gives_the_same_scores_bit_for_bit(change: Callable[[Any], None]) -> None:
    model, other = models.gpt2(), models.gpt2()
    change(other)
    expected, found = (delfast.score(each, FORGET, loss_fn=causal_lm_loss) for each in (model, other))
    assert expected.gradients is not None and found.gradients is not None
    assert all(map(torch.equal, expected.gradients.values(), found.gradients.values()))
    assert torch.equal(expected.channel_scores(), found.channel_scores())


def test_accumulated_gradients_step_as_those_of_one_batch() -> None:
    one = models.gpt2(attn_pdrop=0, embd_pdrop=0, resid_pdrop=0).double()
    two, before = copy.deepcopy(one), state(one)
    mask = delfast.localize(one, FORGET, 0.3, loss_fn=causal_lm_loss, exclude=["*.wte.*", "*.wpe.*"])
    whole = RETAIN[0]
    halves = [{name: value[rows] for name, value in whole.items()} for rows in (slice(0, 2), slice(2, 4))]
    for model, batches in ((one, [whole]), (two, halves)):
        optimizer = delfast.optim.MaskedAdamW(model.named_parameters(), mask, lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            for batch in batches:
                (causal_lm_loss(model, batch).sum() / 4).backward()
            optimizer.step()
    flags = mask.to_dense()
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(parameter, two.get_parameter(name))
        outside = ~flags[name] if name in flags else torch.ones_like(parameter, dtype=torch.bool)
        assert torch.equal(parameter[outside], before[name][outside])
        assert outside.all() or not torch.equal(parameter, before[name])


def test_gradients_of_bfloat16_parameters_are_summed_in_float32() -> None:
    model = models.llama().bfloat16()
    scores = delfast.score(model, FORGET, loss_fn=causal_lm_loss)
    sums = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
    model.eval()
    for batch in FORGET:
        losses = causal_lm_loss(model, batch)
        for name, gradient in zip(sums, torch.autograd.grad(losses.sum(), list(model.parameters())), strict=True):
            assert gradient.dtype is torch.bfloat16
            sums[name] += gradient
    assert scores.gradients is not None
    for name, gradient in scores.gradients.items():
        assert gradient.dtype is torch.float32 and torch.equal(gradient, sums[name] / 5)
    mask = scores.select(0.3)
    delfast.reset_(model, mask, init=models.llama, seed=1)
    before, optimizer = state(model), delfast.optim.MaskedAdamW(model.named_parameters(), mask, lr=1e-2)
    causal_lm_loss(model, RETAIN[0]).mean().backward()
    optimizer.step()
    for name, flags in mask.to_dense().items():
        after = model.get_parameter(name)
        assert torch.equal(after[~flags], before[name][~flags]) and (not flags.any() or (after != before[name]).any())


def test_the_loss_is_captured_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    backends: list[Double] = []

    def make(device: torch.device) -> Double:
        backends.append(Double(device))
        return backends[-1]

    monkeypatch.setitem(delfast.graphs.BACKENDS, "cpu", make)
    # with "sdpa" transformers reads the attention mask on the host, so that nothing is captured
    model = models.gpt2(attn_implementation="eager")
    forget = [models.batch((12, 5, 3), seed=seed) for seed in range(8)]
    expected = delfast.localize(model, forget, loss_fn=causal_lm_loss, cuda_graphs=False)
    assert delfast.localize(model, forget, loss_fn=causal_lm_loss).digest == expected.digest
    assert backends[-1].replays == len(forget)
    sets = (forget, list(forget), list(forget))
    metrics = [delfast.evaluate(model, *sets, mia=False, cuda_graphs=each) for each in (False, "auto")]
    assert metrics[0] == metrics[1] and backends[-1].replays == len(forget)


@pytest.mark.parametrize("make", [models.gpt2, models.llama])
def test_unlearn_changes_nothing_that_does_not_compete(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = state(model)
    result = delfast.unlearn(
        model,
        retain=RETAIN,
        mask=delfast.localize(model, FORGET, loss_fn=causal_lm_loss, include="*.mlp.*"),
        **{"loss_fn": causal_lm_loss, "init": make, "seed": 1, "epochs": 1, "lr": 0.1},
    )
    assert result.head == "lm_head" and all(".mlp." in name for name in result.mask.names)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".mlp." in name for name in changed)


def test_examples_have_gradients_of_their_own() -> None:
    model = models.gpt2().double()
    found = delfast.score(model, FORGET, per_example=True, loss_fn=causal_lm_loss, include="*.mlp.*")
    sums = [torch.zeros_like(parameter) for parameter in found.parameters.values()]
    wanted = [model.get_parameter(name) for name in found.parameters]
    model.eval()
    for batch in FORGET:
        for loss in causal_lm_loss(model, batch):
            for total, each in zip(sums, torch.autograd.grad(loss, wanted, retain_graph=True), strict=True):
                total += each.abs()
    assert found.gradients is not None
    for total, gradient in zip(sums, found.gradients.values(), strict=True):
        torch.testing.assert_close(gradient, total / 5)
