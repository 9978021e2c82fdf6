"""Checks of every op's arguments, for the fake kernels and the references; csrc/bindings has those of the kernels.

Each function has the arguments of its op. It raises ValueError, in one line, for tensors on several
devices, sizes that do not fit each other, and numbers out of range. Only the ops themselves read values of tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from delfast.ops.layout import packed_bytes, plan_bytes, unit_count

CRITERIA = ("weighted_grad", "grad", "weight")
AGGREGATES = ("topk_mean", "mean", "sum", "max")
TRANSFORMS = ("abs", "square")
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_GEOMETRY = 2**31 - 1  # maximum stride, padding, dilation and kernel size: no product of two overflows 64 bits


def check_criticality(
    theta: Sequence[Tensor], grad: Sequence[Tensor], criterion: str, aggregate: str, top_h: Sequence[int]
) -> None:
    """Raise ValueError for arguments that ``criticality`` refuses."""
    _check_choice("criterion", criterion, CRITERIA)
    _check_choice("aggregate", aggregate, AGGREGATES)
    _check_scored(theta, grad, criterion)
    if len(top_h) != len(theta):
        raise ValueError(
            f"expected one top_h per parameter, got {len(theta)} parameters and {len(top_h)} values; "
            "pass one count each"
        )
    for index, (parameter, h) in enumerate(zip(theta, top_h, strict=True)):
        units = unit_count(parameter.shape)
        length = parameter.numel() // units if units else 0
        if units and not 1 <= h <= length:
            raise ValueError(f"expected top_h of parameter #{index} in [1, {length}], got {h}; clip it to the row")


def check_select_elements(theta: Sequence[Tensor], grad: Sequence[Tensor], criterion: str, k: int) -> None:
    """Raise ValueError for arguments that ``select_elements`` refuses."""
    _check_budget(k)
    _check_choice("criterion", criterion, CRITERIA)
    _check_scored(theta, grad, criterion)


def check_select_units(scores: Tensor, counts: Sequence[int], lengths: Sequence[int], k: int, cut_last: bool) -> None:
    """Raise ValueError for arguments that ``select_units`` refuses."""
    _check_budget(k)
    if len(counts) != len(lengths):
        raise ValueError(
            f"expected one count and one length per parameter, got {len(counts)} and {len(lengths)}; "
            "pass lists of equal length"
        )
    what = "pass what criticality returns for these parameters"
    if scores.ndim != 1 or scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected scores float32 or float64 (units,), got {scores.dtype} {_shape(scores)}; {what}")
    sizes = "pass the parameters' unit counts and row lengths"
    left, elements = scores.numel(), 0
    for index, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        if count < 0 or length < 0:
            raise ValueError(
                f"expected counts and lengths >= 0, got {count} of {length} for parameter #{index}; {sizes}"
            )
        elements += count * length
        if elements >= 2**63:
            raise ValueError(
                f"expected fewer than 2^63 elements in all, got {count} units of {length} for parameter "
                f"#{index}; {sizes}"
            )
        if count > left:
            raise ValueError(
                f"expected counts that sum to the {scores.numel()} scores, got {count} for parameter #{index} where "
                f"{left} are left; {what}"
            )
        left -= count
    if left:
        raise ValueError(
            f"expected counts that sum to the {scores.numel()} scores, got {scores.numel() - left}; {what}"
        )


def check_masked_plan(params: Sequence[Tensor], bits: Tensor, by_row: Sequence[bool]) -> None:
    """Raise ValueError for arguments that ``masked_plan`` refuses."""
    _check_no_more_bits(_check_bits(params, params, bits, by_row), params)


def check_masked_reset(params: Sequence[Tensor], fresh: Sequence[Tensor], bits: Tensor, by_row: Sequence[bool]) -> None:
    """Raise ValueError for arguments that ``masked_reset_`` refuses."""
    _check_updates(params, fresh, bits, by_row)


def check_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Tensor,
    steps: Tensor,
    bits: Tensor,
    by_row: Sequence[bool],
    *,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lr_tensor: Tensor | None = None,
    **settings: object,
) -> None:
    """Raise ValueError for arguments that ``masked_sgd_`` and ``masked_adamw_`` refuse."""
    _check_updates(params, grads, bits, by_row)
    device = params[0].device if params else bits.device
    _check_device(device, state, "state")
    _check_device(device, steps, "steps")
    wide = torch.float64 if any(param.dtype == torch.float64 for param in params) else torch.float32
    if state.dtype != wide or state.ndim != 1 or not state.is_contiguous():
        raise ValueError(
            f"expected state to be contiguous {_name(wide)} (values,), got {state.dtype} {_shape(state)}; "
            "the optimizer state is of another mask"
        )
    if steps.dtype != torch.float32 or steps.shape != (len(params),) or not steps.is_contiguous():
        raise ValueError(
            f"expected steps to be contiguous float32 ({len(params)},), got {steps.dtype} {_shape(steps)}; "
            "pass one counter per parameter"
        )
    for name, number in (("grad_scale", grad_scale), ("found_inf", found_inf), ("lr_tensor", lr_tensor)):
        if number is None:
            continue
        _check_device(device, number, name)
        if number.numel() != 1:
            raise ValueError(
                f"expected {name} to be one number, got shape {_shape(number)}; pass a tensor of one element"
            )


def check_per_example(
    sums: Tensor,
    inputs: Tensor,
    output_grad: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transform: str,
    allow_tf32: bool = False,
) -> None:
    """Raise ValueError for arguments that ``per_example_accumulate_`` refuses."""
    _check_device(sums.device, inputs, "inputs")
    _check_device(sums.device, output_grad, "output_grad")
    _check_choice("transform", transform, TRANSFORMS)
    allowed = FLOATING if sums.dtype == torch.float64 else FLOATING[:3]
    _check_dtype(inputs, "inputs", allowed)
    _check_dtype(output_grad, "output_grad", allowed)
    if sums.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected sums to be float32 or float64, got {sums.dtype}; pass zeros of the weight's shape")
    layer = "pass the layer's input, its output's gradient and sums like its weight"
    dims = inputs.ndim - 2
    if dims not in (1, 2, 3) or not output_grad.ndim == sums.ndim == inputs.ndim:
        raise ValueError(
            "expected inputs (N, C, *in), output_grad (N, M, *out) and sums (M, C / groups, *kernel) of 1 to 3 spatial "
            f"dimensions, got {_shape(inputs)}, {_shape(output_grad)} and {_shape(sums)}; {layer}"
        )
    if not len(stride) == len(padding) == len(dilation) == dims:
        raise ValueError(
            f"expected {dims} values each of stride, padding and dilation, got {len(stride)}, {len(padding)} and "
            f"{len(dilation)}; pass one for each spatial dimension"
        )
    _check_own_memory(sums)
    (examples, channels), outputs = inputs.shape[:2], output_grad.shape[1]
    if groups < 1 or channels % groups or outputs % groups:
        raise ValueError(
            f"expected groups to divide {channels} input and {outputs} output channels, got {groups}; "
            "pass the layer's groups"
        )
    if output_grad.shape[0] != examples or sums.shape[:2] != (outputs, channels // groups):
        raise ValueError(
            f"expected output_grad of {examples} examples and sums ({outputs}, {channels // groups}, *kernel), got "
            f"output_grad {_shape(output_grad)} and sums {_shape(sums)}; {layer}"
        )
    for i, (s, p, d) in enumerate(zip(stride, padding, dilation, strict=True)):
        kernel = sums.shape[2 + i]
        if s < 1 or p < 0 or d < 1:
            raise ValueError(
                f"expected stride and dilation >= 1 and padding >= 0 in dimension {i}, got {s}, {d} and {p}; "
                "pass the layer's"
            )
        if max(s, p, d, kernel) > MAX_GEOMETRY:
            raise ValueError(
                f"expected stride, dilation, padding and kernel below 2^31 in dimension {i}, got {s}, {d}, {p} and "
                f"{kernel}; pass the layer's"
            )
        span = inputs.shape[2 + i] + 2 * p - d * (kernel - 1) - 1
        out = span // s + 1 if span >= 0 else 0
        if kernel < 1 or out != output_grad.shape[2 + i]:
            raise ValueError(
                f"expected output_grad of {out} positions in dimension {i}, given inputs {_shape(inputs)} and sums "
                f"{_shape(sums)}, got {_shape(output_grad)}; pass the layer's stride, padding and dilation"
            )


def check_channel_dot(output_grad: Tensor, values: Tensor | None) -> None:
    """Raise ValueError for arguments that ``channel_dot`` refuses."""
    if output_grad.ndim < 2:
        raise ValueError(
            f"expected output_grad (N, C, *positions), got {_shape(output_grad)}; pass the gradient of a layer's output"
        )
    _check_dtype(output_grad, "output_grad", FLOATING)
    if values is None:
        return
    _check_device(output_grad.device, values, "values")
    if values.shape != output_grad.shape:
        raise ValueError(
            f"expected values of shape {_shape(output_grad)} like output_grad, got {_shape(values)}; "
            "pass what the gradient is of"
        )
    _check_dtype(values, "values", FLOATING if output_grad.dtype == torch.float64 else FLOATING[:3])


def check_channel_sums(
    sums: Sequence[Tensor],
    output_grad: Tensor,
    values: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    transform: str,
) -> None:
    """Raise ValueError for arguments that ``channel_sums_`` refuses."""
    if not 1 <= len(sums) <= (1 if values is None else 2):
        raise ValueError(
            f"expected one tensor of sums, or two with values, got {len(sums)}; pass those of the weight and the bias"
        )
    if (mean is None) != (variance is None) or (values is None and mean is not None):
        raise ValueError("expected mean and variance together and with values; pass both or neither")
    totals = [(f"sums #{index}", total) for index, total in enumerate(sums)]
    statistics = [(name, t) for name, t in (("mean", mean), ("variance", variance)) if t is not None]
    data = [("output_grad", output_grad)] if values is None else [("output_grad", output_grad), ("values", values)]
    for name, tensor in (*totals, *data, *statistics):
        _check_device(sums[0].device, tensor, name)
    check_channel_dot(output_grad, values)
    _check_choice("transform", transform, TRANSFORMS)
    channels, wide = output_grad.shape[1], sums[0].dtype
    for name, total in totals:
        if total.dtype not in (torch.float32, torch.float64) or total.dtype != wide:
            raise ValueError(f"expected {name} in float32, or in float64 as all are, got {total.dtype}; pass zeros")
        if total.numel() != channels:
            raise ValueError(
                f"expected {name} of {channels} channels, got {_shape(total)}; pass zeros of the parameter's shape"
            )
        _check_own_memory(total)
    for name, tensor in (*data, *statistics):
        _check_dtype(tensor, name, FLOATING if wide == torch.float64 else FLOATING[:3])
    for name, statistic in statistics:
        if statistic.shape != (channels,):
            raise ValueError(f"expected {name} of {channels} channels, got {_shape(statistic)}; pass the layer's")


def check_gather_columns(source: Tensor, columns: Tensor) -> None:
    """Raise ValueError for arguments that ``gather_columns`` refuses."""
    if source.ndim != 2 or not source.is_contiguous():
        raise ValueError(f"expected source to be a contiguous matrix, got {_shape(source)}; flatten it first")
    if columns.ndim != 1 or columns.dtype != torch.int64 or not columns.is_contiguous():
        raise ValueError(
            f"expected columns to be contiguous int64 (n,), got {columns.dtype} {_shape(columns)}; "
            "pass the selected columns' numbers"
        )
    _check_device(source.device, columns, "columns")
    if source.element_size() not in (2, 4, 8):
        raise ValueError(f"expected elements of 2, 4 or 8 bytes, got {source.dtype}; convert the source")


def check_write_rows(
    weights: Sequence[Tensor], rows: Sequence[Tensor], indices: Sequence[Tensor], dims: Sequence[int]
) -> None:
    """Raise ValueError for arguments that ``write_rows_`` refuses."""
    for name, tensors in (("weight", weights), ("rows", rows), ("index", indices)):
        for number, tensor in enumerate(tensors):
            _check_device((weights or rows or indices)[0].device, tensor, f"{name} #{number}")
    if not len(weights) == len(rows) == len(indices) == len(dims):
        raise ValueError(
            f"expected lists of equal length, got {len(weights)} weights, {len(rows)} rows, {len(indices)} indices and "
            f"{len(dims)} dims; pass one each"
        )
    for number, (weight, source, index, dim) in enumerate(zip(weights, rows, indices, dims, strict=True)):
        if not 0 <= dim < weight.ndim:
            raise ValueError(
                f"expected dim of weight #{number} in [0, {weight.ndim}), got {dim}; pass the dimension of its rows"
            )
        if index.ndim != 1 or index.dtype != torch.int64 or not index.is_contiguous():
            raise ValueError(
                f"expected index #{number} to be contiguous int64 (n,), got {index.dtype} {_shape(index)}; "
                "pass the rows' numbers"
            )
        if source.dtype != weight.dtype:
            raise ValueError(
                f"expected rows #{number} to be {weight.dtype} like their weight, got {source.dtype}; convert the rows"
            )
        shape = (*weight.shape[:dim], index.shape[0], *weight.shape[dim + 1 :])
        if source.shape != shape:
            raise ValueError(
                f"expected rows #{number} of shape ({', '.join(map(str, shape))}), got {_shape(source)}; "
                "pass one row for each index"
            )
        _check_own_memory(weight)


def _check_scored(theta: Sequence[Tensor], grad: Sequence[Tensor], criterion: str) -> None:
    _check_devices(theta, grad)
    if len(grad) != len(theta) and (grad or criterion != "weight"):
        raise ValueError(
            f"expected one gradient per parameter, got {len(theta)} parameters and {len(grad)} gradients; "
            "pass a zero gradient for a parameter that the loss does not use"
        )
    _check_dtypes(theta, grad)
    for index, (parameter, gradient) in enumerate(zip(theta, grad, strict=False)):
        if gradient.shape != parameter.shape:
            raise ValueError(
                f"expected gradient #{index} to have shape {_shape(parameter)} like its parameter, got "
                f"{_shape(gradient)}; pass the gradients in the parameters' order"
            )


def _check_updates(params: Sequence[Tensor], sources: Sequence[Tensor], bits: Tensor, by_row: Sequence[bool]) -> None:
    left = _check_bits(params, sources, bits, by_row)
    if left and bits.numel() != plan_bytes([param.shape for param in params], by_row):
        _check_no_more_bits(left, params)
    for param in params:
        _check_own_memory(param)


def _check_bits(params: Sequence[Tensor], sources: Sequence[Tensor], bits: Tensor, by_row: Sequence[bool]) -> int:
    """Return the number of bytes that follow the bits of the last parameter."""
    _check_devices(params, sources)
    _check_device(params[0].device if params else bits.device, bits, "bits")
    if not len(params) == len(sources) == len(by_row):
        raise ValueError(
            f"expected lists of equal length, got {len(params)} parameters, {len(sources)} gradients (or fresh values) "
            f"and {len(by_row)} values of by_row; pass one each"
        )
    if bits.dtype != torch.uint8 or bits.ndim != 1 or not bits.is_contiguous():
        raise ValueError(
            f"expected bits to be contiguous uint8 (bytes,), got {bits.dtype} {_shape(bits)}; "
            "concatenate the masks' packed bits"
        )
    _check_dtypes(params, sources)
    left = bits.numel()
    for index, (param, source, rows) in enumerate(zip(params, sources, by_row, strict=True)):
        if source.shape != param.shape:
            raise ValueError(
                f"expected values for parameter #{index} of shape {_shape(param)}, got {_shape(source)}; "
                "pass them in the parameters' order"
            )
        size = packed_bytes(unit_count(param.shape) if rows else param.numel())
        if size > left:
            raise ValueError(
                f"expected {size} bytes of bits for parameter #{index}, got {left}; the mask is of other parameters"
            )
        left -= size
    return left


def _check_no_more_bits(left: int, params: Sequence[Tensor]) -> None:
    if left:
        raise ValueError(
            f"expected bits for {len(params)} parameters, got {left} bytes more; the mask is of other parameters"
        )


def _check_devices(params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for name, tensors in (("parameter", params), ("gradient", gradients)):
        for index, tensor in enumerate(tensors):
            _check_device((params or gradients)[0].device, tensor, f"{name} #{index}")


def _check_device(device: torch.device, tensor: Tensor, name: str) -> None:
    if tensor.device != device:
        raise ValueError(f"expected {name} on {device}, got it on {tensor.device}; move all tensors to one device")


def _check_own_memory(written: Tensor) -> None:
    if torch._debug_has_internal_overlap(written) == 1:  # 1: some elements share memory; 2: that is not known
        raise ValueError(
            f"expected elements to write in memory of their own, got shape {_shape(written)} with strides "
            f"{written.stride()}; clone() the expanded tensor"
        )


def _check_dtypes(params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Allow float64 gradients only in lists with float64 parameters, which the references compute."""
    allowed = FLOATING if any(param.dtype == torch.float64 for param in params) else FLOATING[:3]
    for name, tensors in (("parameter", params), ("gradient", gradients)):
        for index, tensor in enumerate(tensors):
            _check_dtype(tensor, f"{name} #{index}", allowed)


def _check_dtype(tensor: Tensor, name: str, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        *first, last = map(_name, allowed)
        raise ValueError(
            f"expected {name} to be {', '.join(first)} or {last}, got {tensor.dtype}; convert the model (model.float())"
        )


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    *first, last = [f"'{choice}'" for choice in choices]
    if value not in choices:
        raise ValueError(f"expected {name} {', '.join(first)} or {last}, got '{value}'; pass one of these")


def _check_budget(k: int) -> None:
    if k < 0:
        raise ValueError(f"expected k >= 0 elements to select, got {k}; pass a non-negative count")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"
