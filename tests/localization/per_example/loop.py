"""The reference of the per-example tests: a plain loop over examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from delfast.localization.per_example import PerExampleGradients
from delfast.naming import trainable_parameters

Losses = Callable[[nn.Module, Any], Tensor]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def in_double(model: nn.Module, batches: Iterable[Any]) -> tuple[nn.Module, list[Any]]:
    return model.double().eval(), [
        tuple(t.double() if t.is_floating_point() else t for t in batch) for batch in batches
    ]


def example_gradients(
    model: nn.Module, batches: Iterable[Any], losses: Losses = cross_entropy
) -> list[dict[str, Tensor]]:
    """Return every example's gradient g(x) by its definition: from the loss of a batch with this example alone."""
    parameters = trainable_parameters(model)
    found = []
    for batch in batches:
        for x in range(len(batch[0])):
            loss = losses(model, tuple(t[x : x + 1] for t in batch)).sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            found.append(
                {
                    name: torch.zeros_like(p) if g is None else g
                    for (name, p), g in zip(parameters.items(), gradients, strict=True)
                }
            )
    return found


def summed(gradients: list[dict[str, Tensor]], transform: str) -> dict[str, Tensor]:
    return {
        name: sum(
            (g[name].abs() if transform == "abs" else g[name] ** 2 for g in gradients), start=0 * gradients[0][name]
        )
        for name in gradients[0]
    }


def assert_parity(
    model: nn.Module,
    batches: Iterable[Any],
    losses: Losses = cross_entropy,
    *,
    unknown: Iterable[str] = (),
    bound: float = 1e-12,
) -> PerExampleGradients:
    """Compare both transforms with the loop by relative L2 in float64. ``unknown``: parameters without a rule."""
    batches = list(batches)
    gradients = example_gradients(model, batches, losses)
    assert any(g.any() for g in gradients[0].values())
    for transform in ("abs", "square"):
        sums = PerExampleGradients(model, trainable_parameters(model), losses, transform)
        assert sum(sums.add(batch) for batch in batches) == len(gradients)
        for name, expected in summed(gradients, transform).items():
            error = (sums.sums[name] - expected).norm() / expected.norm().clamp_min(1e-300)
            assert error <= bound, f"{name}, {transform}: relative error {float(error):.3g}"
        assert set(sums.unknown) == set(unknown), sums.unknown
    return sums
