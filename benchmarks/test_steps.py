"""Compact training of a masked model beside the dense step that it replaces: ResNet-18 (CIFAR stem) and the ViT.

Weight gradients are timed alone, on the inputs and output gradients of a real backward pass, for the whole network;
steps are forward, backward and the optimizer's. The dense side is an ordinary step, without any mask. Both sides see
the same layout, precision and threads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delfast
from benchmarks.conftest import Versus
from benchmarks.job import LAYOUT, MODELS, forget_set, original, precision_of, retain_set
from delfast.compaction.gradients import convolution_rows_gradient, linear_rows_gradient
from delfast.compaction.layers import CompactLayer
from delfast.mask import Mask

LAST = {"resnet18": "layer4.", "vit": "transformer.layers.3."}
MASKS = ("DEL 0.1", "DEL 0.3", "last stage", "whole")
PRECISIONS = ("fp32", "bf16")
Batch = tuple[Tensor, Tensor]


def job(name: str) -> tuple[nn.Module, Batch]:
    """A trained network, and a batch."""
    _, images, targets = next(iter(retain_set()))
    return copy.deepcopy(original(name)), (images.to(memory_format=LAYOUT[name]), targets)


def mask_of(kind: str, name: str, model: nn.Module) -> Mask:
    if kind.startswith("DEL"):
        return delfast.localize(model, forget_set(), float(kind.split()[1]))
    parameters = model.named_parameters()
    return Mask.from_dense({n: torch.full(p.shape, kind == "whole" or n.startswith(LAST[name])) for n, p in parameters})


def operands(model: nn.Module, batch: Batch, precision: str) -> dict[str, tuple[nn.Module, Tensor, Tensor, Tensor]]:
    """name -> layer, what it multiplies, its output's gradient and its weight, of every Linear and convolution."""
    found: dict[str, list[Any]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            found[name] = [module]
            handles.append(module.register_forward_hook(lambda _, x, __, n=name: found[n].append(x[0].detach())))
            handles.append(
                module.register_full_backward_hook(lambda _, __, delta, n=name: found[n].append(delta[0].detach()))
            )
    with precision_of(precision):
        loss = cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {
        name: (layer, x.to(delta.dtype), delta, layer.weight.detach().to(delta.dtype))
        for name, (layer, x, delta) in found.items()
    }


def dense_gradient(layer: nn.Module, x: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return delta.reshape(-1, delta.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return torch.ops.aten.convolution_backward(
        delta, x, weight, None, *geometry_of(layer), layer.groups, [False, True, False]
    )[1]


def geometry_of(layer: Any) -> tuple[Any, ...]:
    return (layer.stride, layer.padding, layer.dilation, False, (0, 0))


def row_gradient(layer: Any, x: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return linear_rows_gradient(
            x.flatten(0, -2), delta.flatten(0, -2), layer.row_plan.gathered, layer.row_plan.kept
        )
    return convolution_rows_gradient(x, delta, weight, layer.row_plan, geometry_of(layer))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", MASKS[:-1])
@pytest.mark.parametrize("name", MODELS)
def test_weight_gradients(name: str, kind: str, precision: str, versus: Versus) -> None:
    model, batch = job(name)
    mask = mask_of(kind, name, model)
    dense = operands(model, batch, precision)
    work = {n: delta.numel() * layer.weight[0].numel() for n, (layer, _, delta, _) in dense.items()}
    parts = {n: mask.parameters[f"{n}.weight"] for n in dense}
    share = sum(work[n] * parts[n].selected / parts[n].numel for n in dense) / sum(work.values())
    expected = {n: dense_gradient(*dense[n])[parts[n].flags] for n in dense if parts[n].selected}
    with delfast.compact(model, mask):
        trained = [n for n in dense if parts[n].selected]

        def ours() -> dict[str, Tensor]:
            return {
                n: (row_gradient if isinstance(dense[n][0], CompactLayer) else dense_gradient)(*dense[n])
                for n in trained
            }

        for n, gradient in ours().items():
            torch.testing.assert_close(gradient, expected[n], rtol=2e-2, atol=2e-2 * float(expected[n].abs().max()))
        ratio = versus(ours, lambda: [dense_gradient(*each) for each in dense.values()], rounds=7)
    versus.report(f"{1 / ratio:.2f} of the dense time; share of the work {share:.2f}", "<= share + 0.12")


def stepper(model: nn.Module, parameters: Any, batch: Batch, precision: str) -> Callable[[], None]:
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with precision_of(precision):
            loss = cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", MODELS)
def test_whole_step(name: str, kind: str, precision: str, versus: Versus) -> None:
    model, batch = job(name)
    dense = copy.deepcopy(model)
    handle = delfast.compact(model, mask_of(kind, name, model))
    ours = stepper(model, handle.parameters(), batch, precision)
    rounds = 15 if kind == "whole" else 7  # the two sides are then nearly the same, and 1.02 is near
    ratio = versus(ours, stepper(dense, dense.parameters(), batch, precision), rounds=rounds)
    handle.undo()
    versus.report(f"{1 / ratio:.2f} of the dense step", "<= 1.02")
