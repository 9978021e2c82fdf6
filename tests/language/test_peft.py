"""LoRA by peft: the adapters compete, are reset and trained; the base stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import delfast
from delfast import InputError, causal_lm_loss
from tests.distributed.spawning import run_in_processes
from tests.language import models

# a warning of transformers, about a name that peft reads
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

FORGET, RETAIN = models.sets()
LLAMA: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
GPT2: dict[str, Any] = {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}  # Conv1D


def fresh(make: Callable[[], nn.Module] = models.llama, **settings: Any) -> Any:
    """Return a base with adapters as peft initializes them: the second matrix of each is 0."""
    base = make().eval()  # without GPT-2's dropout
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **{**LLAMA, **settings}))


def trained(make: Callable[[], nn.Module] = models.llama, **settings: Any) -> Any:
    """Return a model whose adapters have other values than fresh ones."""
    model = fresh(make, **settings)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed_in_the_mask_alone(model: nn.Module, before: dict[str, Tensor], mask: delfast.Mask) -> bool:
    """Return whether elements of the mask differ from those before, and no others."""
    flags = mask.to_dense()
    differs = {name: value != before[name] for name, value in model.state_dict().items()}
    outside = [each & ~flags[name] if name in flags else each for name, each in differs.items()]
    return not any(each.any() for each in outside) and any(each.any() for each in differs.values())


@pytest.mark.parametrize(("make", "settings"), [(models.llama, LLAMA), (models.gpt2, GPT2)])
def test_the_base_stays_bit_identical_through_a_whole_job(make, settings) -> None:
    model = trained(make, **settings)
    before = state(model)
    mask = delfast.localize(model, FORGET, 0.3, loss_fn=causal_lm_loss)
    assert mask.names == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".lora_A." in name or ".lora_B." in name for name in mask.names)
    assert delfast.localize(model, FORGET, 0.3, loss_fn=causal_lm_loss, include="*lora*").digest == mask.digest

    reset = copy.deepcopy(model)
    delfast.reset_(reset, mask, init=lambda: fresh(make, **settings), seed=1)
    assert changed_in_the_mask_alone(reset, before, mask)
    for name, flags in mask.to_dense().items():
        assert ".lora_B." not in name or not reset.get_parameter(name)[flags].any()

    result = delfast.unlearn(
        model,
        **{"retain": RETAIN, "forget": FORGET, "loss_fn": causal_lm_loss, "seed": 1, "epochs": 2, "lr": 0.1},
        init=lambda: fresh(make, **settings),
    )
    assert result.mask.digest == mask.digest and changed_in_the_mask_alone(model, before, mask)
    assert delfast.evaluate(model, FORGET, list(FORGET), list(FORGET), mia=False).forget_perplexity > 0


def test_of_fresh_adapters_the_first_matrix_has_no_gradient() -> None:
    gradients = delfast.score(fresh(), FORGET, loss_fn=causal_lm_loss).gradients
    assert gradients is not None
    assert all(bool(gradient.any()) is (".lora_B." in name) for name, gradient in gradients.items())


def test_a_head_that_is_saved_with_the_adapters_is_trained_in_full() -> None:
    settings = {"modules_to_save": ["lm_head"]}
    model = trained(**settings)
    before = state(model)
    result = delfast.unlearn(
        model,
        **{"retain": RETAIN, "forget": FORGET, "loss_fn": causal_lm_loss, "seed": 1, "epochs": 1, "lr": 0.1},
        init=lambda: fresh(**settings),
    )
    assert result.head == "base_model.model.lm_head.modules_to_save.default"
    assert result.mask.to_dense()[f"{result.head}.weight"].all()
    assert changed_in_the_mask_alone(model, before, result.mask)


def test_fresh_values_are_those_of_the_adapters() -> None:
    model = trained()
    mask = delfast.localize(model, FORGET, loss_fn=causal_lm_loss, budget=1.0)
    before, trainable = state(model), [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(InputError, match="belongs to a LoRA layer, which does not initialize it by reset_parameters"):
        delfast.reset_(model, mask, init="reset_parameters")
    without_data = {name: torch.empty_like(before[name], device="meta") for name in mask.names}
    with pytest.raises(InputError, match="got a tensor without data"):
        delfast.reset_(model, mask, init=without_data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    # the way of the guide, which makes no second base
    model.add_adapter("fresh", model.peft_config["default"])
    values = {n.replace(".fresh.", ".default."): p for n, p in model.named_parameters() if ".fresh." in n}
    model.delete_adapter("fresh")
    delfast.reset_(model, mask, init=values)
    assert set(values) == set(mask.names) and list(model.state_dict()) == list(before)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    for name, value in model.state_dict().items():
        assert torch.equal(value, values.get(name, before[name]))
        assert ".lora_B." not in name or not value.any()


@pytest.mark.parametrize(("make", "settings"), [(models.llama, LLAMA), (models.gpt2, GPT2)])
def test_compact_training_is_masked_training(make, settings) -> None:
    one = trained(make, **settings).double()
    two, before = copy.deepcopy(one), state(one)
    mask = delfast.localize(one, FORGET, 0.3, loss_fn=causal_lm_loss)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for batch in RETAIN:
            optimizer.zero_grad()
            causal_lm_loss(model, batch).mean().backward()
            optimizer.step()

    train(one, delfast.optim.MaskedSGD(one.named_parameters(), mask, **options))
    with delfast.compact(two, mask) as handle:
        assert "rows" in handle.modes.values()
        train(two, torch.optim.SGD(handle.parameters(), **options))
    assert changed_in_the_mask_alone(two, before, mask)
    for name, value in two.state_dict().items():
        torch.testing.assert_close(value, one.state_dict()[name])


def test_examples_have_gradients_of_their_own() -> None:
    model = trained().double()
    found = delfast.score(model, FORGET, per_example=True, loss_fn=causal_lm_loss).gradients
    assert found is not None
    sums = {name: torch.zeros_like(gradient) for name, gradient in found.items()}
    for batch in FORGET:
        for loss in causal_lm_loss(model, batch):
            wanted = [model.get_parameter(name) for name in sums]
            for total, each in zip(sums.values(), torch.autograd.grad(loss, wanted, retain_graph=True), strict=True):
                total += each.abs()
    for name, total in sums.items():
        torch.testing.assert_close(found[name], total / 5)


def test_the_base_keeps_no_keys_and_values() -> None:
    model, seen = trained(), {}
    layers = model.get_base_model().model
    layers.register_forward_pre_hook(lambda *call: seen.update(call[-1]), with_kwargs=True)
    causal_lm_loss(model, FORGET[0])
    assert seen["use_cache"] is False


def test_adapters_that_are_merged_are_refused() -> None:
    """Only one is: the losses still depend on the others, and its own gradient would be 0."""
    model = trained()
    mask = delfast.localize(model, FORGET, 0.3, loss_fn=causal_lm_loss)
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    layer.merge()
    before, options = state(model), {"loss_fn": causal_lm_loss, "init": fresh, "epochs": 1, "lr": 0.1}
    for call in (
        lambda: delfast.localize(model, FORGET, 0.3, loss_fn=causal_lm_loss),
        lambda: delfast.reset_(model, mask, init=fresh),
        lambda: delfast.unlearn(model, retain=RETAIN, mask=mask, **options),
        lambda: delfast.compact(model, mask),
    ):
        with pytest.raises(InputError, match=r"'.*layers.1.self_attn.q_proj' merged; call unmerge_adapter\(\)"):
            call()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    layer.unmerge()
    assert delfast.localize(model, FORGET, 0.3, loss_fn=causal_lm_loss).names == mask.names


def test_what_cannot_be_scored_is_refused() -> None:
    model = trained()
    with model.disable_adapter(), pytest.raises(InputError, match="a model with trainable parameters, got none"):
        delfast.localize(model, FORGET, loss_fn=causal_lm_loss)
    with pytest.raises(InputError, match="a forward pass that only reads the parameters"):
        delfast.localize(trained(target_parameters=["mlp.gate_proj.weight"]), FORGET, loss_fn=causal_lm_loss)


def sharded_job(rank: int) -> tuple[str, bool]:
    """Return the digest under FSDP2, and whether ``unlearn`` changes the mask alone."""
    mesh, model = init_device_mesh("cpu", (2,)), trained()
    before = state(model)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    mask = delfast.localize(model, FORGET, 0.3, loss_fn=causal_lm_loss, group=mesh)
    options = {"loss_fn": causal_lm_loss, "init": fresh, "seed": 1, "epochs": 2, "lr": 0.1, "group": mesh}
    delfast.unlearn(model, retain=RETAIN, mask=mask, **options)
    after = trained()
    after.load_state_dict({name: value.full_tensor() for name, value in model.state_dict().items()})
    return mask.digest, changed_in_the_mask_alone(after, before, mask)


@pytest.mark.slow
def test_adapters_under_fsdp2(tmp_path: Path) -> None:
    expected = delfast.localize(trained(), FORGET, 0.3, loss_fn=causal_lm_loss).digest
    results = run_in_processes(2, {"job": sharded_job}, tmp_path)
    assert [found["job"] for found in results] == [(expected, True)] * 2
