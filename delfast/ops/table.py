"""The op table: schema, fake kernel and PyTorch twin of every op, side by side.

The native kernels (csrc/bindings) register themselves for a device when the extension loads; the twin serves every
device that has none. ``torch.ops.delfast.NAME`` is the way to call an op; what it computes is its twin's docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from delfast.ops.layout import packed_bytes, unit_count
from delfast.ops.reference.criticality import criticality
from delfast.ops.reference.gather import gather_columns
from delfast.ops.reference.masked_update import masked_adamw_, masked_reset_, masked_sgd_
from delfast.ops.reference.per_example import channel_dot, per_example_accumulate_
from delfast.ops.reference.selection import select_elements, select_units


@dataclass(frozen=True)
class Op:
    """One op: ``schema`` in torch.library's language, ``fake`` (shapes and dtypes only), ``reference`` (the twin).

    ``natively_on``: devices that the extension may have a kernel for; elsewhere the twin is as fast.
    """

    schema: str
    fake: Callable[..., Any]
    reference: Callable[..., Any]
    natively_on: tuple[str, ...] = ("CPU", "CUDA")

    @property
    def name(self) -> str:
        return self.schema.split("(", 1)[0]


def _device(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


def _fake_criticality(
    theta: Sequence[Tensor], grad: Sequence[Tensor], criterion: str, aggregate: str, top_h: Sequence[int]
) -> Tensor:
    return torch.empty(sum(unit_count(t.shape) for t in theta), device=_device(theta))


def _fake_select_elements(
    theta: Sequence[Tensor], grad: Sequence[Tensor], criterion: str, k: int
) -> tuple[Tensor, Tensor]:
    device = _device(theta)
    bits = torch.empty(sum(packed_bytes(t.numel()) for t in theta), dtype=torch.uint8, device=device)
    return bits, torch.empty((), dtype=torch.int64, device=device)


def _fake_select_units(
    scores: Tensor, counts: Sequence[int], lengths: Sequence[int], k: int, cut_last: bool
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(sum(packed_bytes(count) for count in counts), dtype=torch.uint8, device=scores.device),
        torch.empty(3, dtype=torch.int64, device=scores.device),
    )


def _fake_channel_dot(deltas: Tensor, values: Tensor | None) -> Tensor:
    wide = torch.promote_types(deltas.dtype, torch.float32)
    return torch.empty(deltas.shape[:2], dtype=wide, device=deltas.device)


def _fake_gather_columns(source: Tensor, columns: Tensor) -> Tensor:
    return source.new_empty((source.shape[0], columns.shape[0]))


def _fake_in_place(*args: object, **kwargs: object) -> None:
    """An op that changes its arguments and returns nothing has no shapes to infer."""


OPS = (
    Op(
        "criticality(Tensor[] theta, Tensor[] grad, str criterion, str aggregate, int[] top_h) -> Tensor",
        _fake_criticality,
        criticality,
    ),
    Op(
        "select_elements(Tensor[] theta, Tensor[] grad, str criterion, SymInt k) -> (Tensor, Tensor)",
        _fake_select_elements,
        select_elements,
    ),
    Op(
        "select_units(Tensor scores, int[] counts, int[] lengths, SymInt k, bool cut_last) -> (Tensor, Tensor)",
        _fake_select_units,
        select_units,
    ),
    Op(
        "masked_reset_(Tensor(a!)[] params, Tensor[] fresh, Tensor bits, bool[] by_row) -> ()",
        _fake_in_place,
        masked_reset_,
    ),
    Op(
        "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) state, Tensor(c!) steps, "
        "Tensor bits, bool[] by_row, *, float lr, float momentum, float dampening, float weight_decay, bool nesterov, "
        "bool maximize, Tensor? grad_scale, Tensor? found_inf, Tensor? lr_tensor=None) -> ()",
        _fake_in_place,
        masked_sgd_,
    ),
    Op(
        "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) state, Tensor(c!) steps, "
        "Tensor bits, bool[] by_row, *, float lr, float beta1, float beta2, float eps, float weight_decay, "
        "bool maximize, Tensor? grad_scale, Tensor? found_inf, Tensor? lr_tensor=None) -> ()",
        _fake_in_place,
        masked_adamw_,
    ),
    Op(
        "per_example_accumulate_(Tensor(a!) sums, Tensor inputs, Tensor deltas, int[] stride, int[] padding, "
        "int[] dilation, int groups, str epilogue) -> ()",
        _fake_in_place,
        per_example_accumulate_,
    ),
    Op("channel_dot(Tensor deltas, Tensor? values) -> Tensor", _fake_channel_dot, channel_dot),
    Op("gather_columns(Tensor source, Tensor columns) -> Tensor", _fake_gather_columns, gather_columns, ("CPU",)),
)

# lives as long as the process: dropping it would drop the ops
_library: Any = torch.library.Library("delfast", "DEF")  # type: ignore[no-untyped-call]


def define_ops(native_devices: Sequence[str]) -> None:
    """Define every op; the twin becomes the kernel of each device ("CPU", "CUDA") without a native one."""
    for op in OPS:
        _library.define(op.schema)
        torch.library.register_fake(f"delfast::{op.name}", op.fake, lib=_library)
        for device in ("CPU", "CUDA"):
            if device not in native_devices or device not in op.natively_on:
                _library.impl(op.name, op.reference, device)
