"""The op table: name, checks, fake kernel and PyTorch reference of every op, side by side; its schema is in schemas.py.

Call an op as ``torch.ops.delfast.NAME``; the docstring of its reference documents arguments and result.

============================ =========================================================================================
Op                           Result
============================ =========================================================================================
``criticality``              A score per unit: an aggregate over the unit of ``|θ g|``, ``|g|`` or ``|θ|``.
``select_elements``          Packed bits of the k elements with the highest scores.
``select_units``             Packed bits of the units with the highest scores that fit into k elements.
``masked_plan``              Packed bits and a list of what they mask, for many steps of one mask.
``masked_reset_``            Masked elements replaced by new values, in place.
``masked_sgd_``              One step of SGD on the masked elements, in place.
``masked_adamw_``            One step of AdamW on the masked elements, in place.
``per_example_accumulate_``  Sums over examples of ``|g_x|`` or ``g_x²``, with g_x the weight gradient of one example.
``channel_dot``              Sum over positions of gradient times value, per example and channel.
``channel_sums_``            Sums over examples of ``|g_x|`` or ``g_x²``, for the gradients of a norm's weight and bias.
``gather_columns``           Selected columns of a matrix.
``write_rows_``              Rows written into many weights, in place.
============================ =========================================================================================

The native kernels (csrc/bindings) register themselves for a device when their library is loaded. The reference serves
every device without native kernels, and float64 tensors on every device: a native kernel forwards these to
``torch.ops.delfast_python.NAME`` (csrc/bindings/serving.h).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from delfast.ops import checks
from delfast.ops.layout import packed_bytes, plan_bytes, unit_count
from delfast.ops.reference.criticality import criticality
from delfast.ops.reference.gather import gather_columns
from delfast.ops.reference.masked_update import masked_adamw_, masked_plan, masked_reset_, masked_sgd_
from delfast.ops.reference.per_example import channel_dot, channel_sums_, per_example_accumulate_
from delfast.ops.reference.selection import select_elements, select_units
from delfast.ops.reference.write_rows import write_rows_
from delfast.ops.schemas import CALLED_BY_KERNELS, SCHEMAS


@dataclass(frozen=True)
class Op:
    """One op and all of its parts in Python.

    Parameters
    ----------
    name : str
        The op's name in ``torch.ops.delfast``.
    check : callable
        Raises for arguments that all kernels of the op refuse. It runs before ``fake`` and ``reference``.
    fake : callable
        Returns empty tensors of the result's shape and dtype.
    reference : callable
        Defines the op in PyTorch.
    natively_on : tuple of str
        Devices for which the extension may have a kernel; on others the reference is as fast.
    """

    name: str
    check: Callable[..., None]
    fake: Callable[..., Any]
    reference: Callable[..., Any]
    natively_on: tuple[str, ...] = ("CPU", "CUDA")

    @property
    def schema(self) -> str:
        """Name, arguments and results in torch.library's language."""
        return SCHEMAS[self.name]


def _device(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


def _fake_criticality(
    theta: Sequence[Tensor], grad: Sequence[Tensor], criterion: str, aggregate: str, top_h: Sequence[int]
) -> Tensor:
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in theta) else torch.float32
    return torch.empty(sum(unit_count(t.shape) for t in theta), dtype=dtype, device=_device(theta))


def _fake_select_elements(
    theta: Sequence[Tensor], grad: Sequence[Tensor], criterion: str, k: int
) -> tuple[Tensor, Tensor]:
    device = _device(theta)
    bits = torch.empty(sum(packed_bytes(t.numel()) for t in theta), dtype=torch.uint8, device=device)
    return bits, torch.empty(2, dtype=torch.int64, device=device)


def _fake_select_units(
    scores: Tensor, counts: Sequence[int], lengths: Sequence[int], k: int, cut_last: bool
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(sum(packed_bytes(count) for count in counts), dtype=torch.uint8, device=scores.device),
        torch.empty(5, dtype=torch.int64, device=scores.device),
    )


def _fake_masked_plan(params: Sequence[Tensor], bits: Tensor, by_row: Sequence[bool]) -> Tensor:
    return bits.new_empty(plan_bytes([param.shape for param in params], by_row))


def _fake_channel_dot(output_grad: Tensor, values: Tensor | None) -> Tensor:
    wide = torch.promote_types(output_grad.dtype, torch.float32)
    return torch.empty(output_grad.shape[:2], dtype=wide, device=output_grad.device)


def _fake_gather_columns(source: Tensor, columns: Tensor) -> Tensor:
    return source.new_empty((source.shape[0], columns.shape[0]))


def _fake_in_place(*args: object, **kwargs: object) -> None:
    """Infer nothing: an op that changes its arguments in place returns no tensor."""


OPS = (
    Op("criticality", checks.check_criticality, _fake_criticality, criticality),
    Op("select_elements", checks.check_select_elements, _fake_select_elements, select_elements),
    Op("select_units", checks.check_select_units, _fake_select_units, select_units),
    Op("masked_plan", checks.check_masked_plan, _fake_masked_plan, masked_plan),
    Op("masked_reset_", checks.check_masked_reset, _fake_in_place, masked_reset_),
    Op("masked_sgd_", checks.check_step, _fake_in_place, masked_sgd_),
    Op("masked_adamw_", checks.check_step, _fake_in_place, masked_adamw_),
    Op("per_example_accumulate_", checks.check_per_example, _fake_in_place, per_example_accumulate_),
    Op("channel_dot", checks.check_channel_dot, _fake_channel_dot, channel_dot),
    Op("channel_sums_", checks.check_channel_sums, _fake_in_place, channel_sums_),
    Op("gather_columns", checks.check_gather_columns, _fake_gather_columns, gather_columns, ("CPU",)),
    Op("write_rows_", checks.check_write_rows, _fake_in_place, write_rows_),
)

# kept for the life of the process, because deleting a library removes its ops
_library: Any = torch.library.Library("delfast", "DEF")  # type: ignore[no-untyped-call]
_python: Any = torch.library.Library("delfast_python", "DEF")  # type: ignore[no-untyped-call]


def define_ops(native: ModuleType | None, native_devices: Sequence[str]) -> None:
    """Define every op; its reference becomes the kernel of each device ("CPU", "CUDA") without a native kernel.

    ``native`` is ``delfast._C``, which keeps what a reference raises under a native kernel (csrc/bindings/module.cpp).
    """
    for op in OPS:
        reference = _checked(op.check, op.reference)
        _library.define(op.schema)
        if native:
            _python.define(op.schema)
        torch.library.register_fake(f"delfast::{op.name}", _checked(op.check, op.fake), lib=_library)
        for device in ("CPU", "CUDA"):
            if native and device in native_devices and device in op.natively_on:
                _python.impl(op.name, native.noted(reference), device)
            else:
                _library.impl(op.name, reference, device)
    if native:
        # neither runs bytecode of Python's, before which a signal's handler could run, and raise
        functions = {"increment_versions": torch._C._increment_version, "last_error": native.last_error}
        for name, schema in CALLED_BY_KERNELS.items():
            _python.define(schema)
            _python.impl(name, functions[name], "CompositeImplicitAutograd")


def _checked(check: Callable[..., None], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ``check`` and then ``kernel`` with its arguments."""

    @functools.wraps(kernel)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return kernel(*args, **kwargs)

    return checked
