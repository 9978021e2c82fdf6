"""Speed of the native kernels. Every result is compared with the reference, or the baseline, before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import delfast
from benchmarks.baselines import channel_scores, double_argsort, element_scores, expanded
from benchmarks.conftest import Versus
from benchmarks.stream import load_stream
from delfast.experiments.networks import build
from delfast.localization.criteria import resolve_top_h
from delfast.localization.scores import Scores
from delfast.ops import OPS
from delfast.ops.layout import row_length, unit_count, unpack
from delfast.optim import MaskedSGD
from tests.localization.published import published_mask

REFERENCE = {op.name: op.reference for op in OPS}
NATIVE = torch.ops.delfast


@pytest.fixture(scope="module")
def stream() -> Callable[[Tensor, Tensor], float]:
    return load_stream()


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def weights(request: pytest.FixtureRequest) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    theta = [p.detach() for p in build(request.param, 10, 3, 32).parameters()]
    return theta, [torch.randn_like(t) * 1e-3 for t in theta]


@pytest.mark.parametrize(
    ("aggregate", "isa", "least"),
    [(aggregate, "avx512", 0.8) for aggregate in ("mean", "sum", "max")]
    + [("topk_mean", "avx512", 0.5), ("topk_mean", "avx2", 0.3)],
)
def test_criticality_against_a_stream(
    versus: Versus, weights: Any, stream: Any, force_isa: Any, aggregate: str, isa: str, least: float
) -> None:
    force_isa(isa)
    theta, grad = weights
    h = [resolve_top_h(0.1, t.shape) for t in theta]
    result = NATIVE.criticality(theta, grad, "weighted_grad", aggregate, h)
    expected = REFERENCE["criticality"](theta, grad, "weighted_grad", aggregate, h)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=0)
    a, b = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (theta, grad))
    fraction = versus(
        lambda: NATIVE.criticality(theta, grad, "weighted_grad", aggregate, h), lambda: stream(a, b), rounds=41
    )
    gigabytes = 8 * a.numel() / versus.benchmark.stats.stats.median / 1e9
    versus.report(f"{fraction:.2f} of a stream's bandwidth ({gigabytes:.1f} GB/s)", f">= {least}")


@pytest.fixture(scope="module")
def scored() -> Scores:
    torch.manual_seed(0)
    model = build("resnet18", 10, 3, 32)
    return Scores(
        dict(model.named_parameters()),
        {name: torch.randn_like(p) * 1e-3 for name, p in model.named_parameters()},
        "weighted_grad",
        1,
    )


def test_selection_of_elements(versus: Versus, scored: Scores) -> None:
    k = int(0.3 * scored.total)
    theta, grad = list(scored.parameters.values()), list(scored.gradients.values())
    expected = published_mask(scored.parameters, scored.gradients, "weighted_grad", "param", 0.3)
    bits, _ = NATIVE.select_elements(theta, grad, "weighted_grad", k)
    assert torch.equal(unpack(bits, scored.total), torch.cat([m.reshape(-1) for m in expected.values()]))  # whole bytes
    ratio = versus(
        lambda: NATIVE.select_elements(theta, grad, "weighted_grad", k),
        lambda: double_argsort(element_scores(theta, grad), k),
        rounds=7,
    )
    versus.report(f"{ratio:.0f} x as fast as the double argsort", ">= 40 x")


def test_selection_of_channels_whole_call(versus: Versus, scored: Scores) -> None:
    theta, grad = list(scored.parameters.values()), list(scored.gradients.values())
    h = [resolve_top_h("published", t.shape) for t in theta]

    def baseline() -> Tensor:
        return double_argsort(expanded(channel_scores(theta, grad, h), theta), int(0.3 * scored.total))

    mask = scored.select(0.3, top_h="published", policy="exact")
    expected = published_mask(scored.parameters, scored.gradients, "weighted_grad", "channel", 0.3)
    assert mask.digest == delfast.Mask.from_dense(expected).digest
    ratio = versus(lambda: scored.select(0.3, top_h="published", policy="exact"), baseline, rounds=7)
    versus.report(f"{ratio:.0f} x as fast as the double argsort", ">= 50 x")


def test_selection_of_channels_ranking(versus: Versus, scored: Scores) -> None:
    scores = scored.channel_scores()
    counts = [unit_count(t.shape) for t in scored.parameters.values()]
    lengths = [row_length(t.shape) for t in scored.parameters.values()]
    elements = scores.repeat_interleave(torch.tensor(lengths).repeat_interleave(torch.tensor(counts)))
    arguments = (scores, counts, lengths, int(0.3 * scored.total), True)
    result, expected = NATIVE.select_units(*arguments), REFERENCE["select_units"](*arguments)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    ratio = versus(lambda: NATIVE.select_units(*arguments), lambda: double_argsort([elements], arguments[3]), rounds=7)
    versus.report(f"{ratio:.0f} x as fast as the double argsort", ">= 300 x")


def test_masked_sgd_against_masked_gradients(versus: Versus, scored: Scores) -> None:
    settings: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4}
    mask = scored.select(0.3)
    ours = nn.ParameterList([nn.Parameter(t.clone()) for t in scored.parameters.values()])
    theirs = nn.ParameterList([nn.Parameter(t.clone()) for t in scored.parameters.values()])
    dense = [part.dense().float() for part in mask.parameters.values()]
    optimizer = MaskedSGD(list(zip(scored.parameters, ours, strict=True)), mask=mask, **settings)
    baseline = torch.optim.SGD(theirs, foreach=True, **(settings | {"weight_decay": 0.0}))

    def masked_then_sgd() -> None:
        torch._foreach_mul_([p.grad for p in theirs], dense)
        baseline.step()

    for a, b, gradient in zip(ours, theirs, scored.gradients.values(), strict=True):
        a.grad, b.grad = gradient.clone(), gradient.clone()
    optimizer.param_groups[0]["weight_decay"] = 0.0  # with decay the baseline would move what it must not
    optimizer.step()
    masked_then_sgd()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    ratio = 1 / versus(optimizer.step, masked_then_sgd, rounds=31)
    versus.report(f"{ratio:.2f} x the time of mask, then SGD(foreach)", "<= 0.4 x")
