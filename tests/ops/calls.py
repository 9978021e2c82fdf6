"""Sample calls of every op, and the lists that tests of ops share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from delfast.ops import BACKEND, OPS
from delfast.ops.layout import pack, padded_state, unit_count
from delfast.parameter_mask import ParameterMask
from tests import cases

REFERENCE = {op.name: op.reference for op in OPS}
NATIVE = torch.ops.delfast
CRITERIA = ["weighted_grad", "grad", "weight"]
AGGREGATES = ["topk_mean", "mean", "sum", "max"]
needs_native = pytest.mark.skipif(BACKEND.module is None, reason=f"no native kernels: {BACKEND.reason}")
HYPER = {
    "masked_sgd_": [
        dict(lr=0.1, momentum=0.9, dampening=0.0, weight_decay=5e-4, nesterov=True, maximize=False),
        dict(lr=0.1, momentum=0.5, dampening=0.3, weight_decay=0.0, nesterov=False, maximize=True),
        dict(lr=0.1, momentum=0.0, dampening=0.0, weight_decay=0.1, nesterov=False, maximize=False),
    ],
    "masked_adamw_": [
        dict(lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, maximize=False),
        dict(lr=0.01, beta1=0.5, beta2=0.9, eps=1e-3, weight_decay=0.0, maximize=True),
    ],
}


STATES = {"masked_reset_": 0, "masked_sgd_": 1, "masked_adamw_": 2}


def masked_arguments(tensors: list[Tensor], op: str, momentum: float = 1.0, by_rows: bool = True) -> dict[str, Any]:
    """bits, by_row, state and steps for these parameters: about a third of each selected, and which that is."""
    parts, chosen = [], []
    for i, t in enumerate(tensors):
        units = unit_count(t.shape) if by_rows else t.numel()
        flags = torch.arange(units) % 3 == i % 3
        parts.append(ParameterMask(tuple(t.shape), "row" if by_rows else "element", pack(flags)))
        chosen.append(parts[-1].dense())
    count = STATES[op] if momentum else 0
    return {
        "bits": torch.cat([torch.empty(0, dtype=torch.uint8), *(part.bits for part in parts)]),
        "by_row": [part.by_row for part in parts],
        "state": torch.zeros(sum(padded_state(count * part.selected) for part in parts)),
        "steps": torch.zeros(len(tensors)),
        "chosen": chosen,
    }


def run_update(
    function: Any, params: list[Tensor], grads: list[Tensor], arguments: dict[str, Any], hyper: Any, **amp: Any
) -> None:
    names = ("state", "steps", "bits", "by_row")
    amp = {"grad_scale": None, "found_inf": None} | amp
    function(params, grads, *(arguments[name] for name in names), **hyper, **amp)


def sample_calls() -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """One ordinary call of every op."""
    theta, grad = cases.parameters()
    theta, grad = theta[3:11], grad[3:11]
    scores = NATIVE.criticality(theta, grad, "weighted_grad", "mean", cases.top_h(theta))
    sgd, adamw = masked_arguments(theta, "masked_sgd_"), masked_arguments(theta, "masked_adamw_")
    amp = {"grad_scale": torch.tensor(2.0), "found_inf": None}
    layer = cases.LAYERS["odd"]
    sums, inputs, output_grad = layer.operands()
    channels = output_grad.shape[1]
    return [
        (NATIVE.criticality, (theta, grad, "weighted_grad", "topk_mean", cases.top_h(theta)), {}),
        (NATIVE.select_elements, (theta, grad, "weighted_grad", 100), {}),
        (NATIVE.select_units, (scores, [len(scores) - 3, 3], [2, 1], 5, True), {}),
        (NATIVE.masked_plan, (theta, sgd["bits"], sgd["by_row"]), {}),
        (NATIVE.masked_reset_, (theta, grad, sgd["bits"], sgd["by_row"]), {}),
        (
            NATIVE.masked_sgd_,
            (theta, grad, sgd["state"], sgd["steps"], sgd["bits"], sgd["by_row"]),
            HYPER["masked_sgd_"][0] | amp,
        ),
        (
            NATIVE.masked_adamw_,
            (theta, grad, adamw["state"], adamw["steps"], adamw["bits"], adamw["by_row"]),
            HYPER["masked_adamw_"][0] | amp,
        ),
        (NATIVE.per_example_accumulate_, (sums, inputs, output_grad, *layer.settings, "abs"), {}),
        (NATIVE.channel_dot, (output_grad, output_grad + 1), {}),
        (
            NATIVE.channel_sums_,
            (
                [torch.zeros(channels), torch.zeros(channels)],
                output_grad,
                output_grad + 1,
                torch.rand(channels),
                torch.rand(channels),
                1e-5,
                "abs",
            ),
            {},
        ),
        (NATIVE.gather_columns, (scores.view(1, -1).repeat(3, 1), torch.tensor([0, 2, 7])), {}),
        (
            NATIVE.write_rows_,
            (
                [grad[0], torch.zeros(3, 5)],
                [theta[0][:1], torch.ones(3, 2)],
                [torch.tensor([0]), torch.tensor([4, 1])],
                [0, 1],
            ),
            {},
        ),
    ]


def calls_on(shapes: list[tuple[int, int]]) -> dict[str, Callable[[], Any]]:
    """A call of every op that takes lists, on these shapes, with nothing left to do in Python but the call."""
    theta, grad = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    sgd, adamw = masked_arguments(theta, "masked_sgd_"), masked_arguments(theta, "masked_adamw_")
    h, amp = cases.top_h(theta), {"grad_scale": None, "found_inf": None}
    counts, lengths = [t.shape[0] for t in theta], [t.shape[1] for t in theta]
    names = ("state", "steps", "bits", "by_row")
    return {
        "criticality": partial(NATIVE.criticality, theta, grad, "weighted_grad", "topk_mean", h),
        "select_elements": partial(NATIVE.select_elements, theta, grad, "weighted_grad", 100),
        "select_units": partial(NATIVE.select_units, torch.rand(sum(counts)), counts, lengths, 50, True),
        "masked_plan": partial(NATIVE.masked_plan, theta, sgd["bits"], sgd["by_row"]),
        "masked_reset_": partial(NATIVE.masked_reset_, theta, grad, sgd["bits"], sgd["by_row"]),
        "masked_sgd_": partial(
            NATIVE.masked_sgd_, theta, grad, *(sgd[n] for n in names), **HYPER["masked_sgd_"][0], **amp
        ),
        "masked_adamw_": partial(
            NATIVE.masked_adamw_, theta, grad, *(adamw[n] for n in names), **HYPER["masked_adamw_"][0], **amp
        ),
        "write_rows_": partial(
            NATIVE.write_rows_, theta, [g[::2] for g in grad], [torch.arange(0, n, 2) for n in counts], [0] * len(theta)
        ),
    }


# calls on one layer's tensors each: see test_per_example.py and test_steps.py
OF_ONE_LAYER = ("per_example_accumulate_", "channel_dot", "channel_sums_", "gather_columns")
