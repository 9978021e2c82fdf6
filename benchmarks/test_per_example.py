"""Speed of the per-example sums beside the ordinary weight gradient of the whole batch, which needs as many products:
oneDNN's for convolutions (channels-last), a product of matrices for linear layers; and beside sgemm. Batches of 64."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Versus
from delfast.ops import OPS
from tests.cases import Layer
from tests.tolerances import relative_l2

REFERENCE = {op.name: op.reference for op in OPS}
NATIVE = torch.ops.delfast
EXAMPLES = 64


def conv(in_channels: int, out_channels: int, size: int, kernel: int, stride: int = 1) -> Layer:
    pair = (stride, stride), (kernel // 2, kernel // 2)
    return Layer(in_channels, out_channels, (size, size), (kernel, kernel), *pair, examples=EXAMPLES)


def linear(in_features: int, out_features: int, tokens: int = 17) -> Layer:
    return Layer(in_features, out_features, (tokens,), (1,), examples=EXAMPLES)


STAGES = {
    "64 at 32x32": conv(64, 64, 32, 3),
    "128 at 16x16": conv(128, 128, 16, 3),
    "256 at 8x8": conv(256, 256, 8, 3),
    "512 at 4x4": conv(512, 512, 4, 3),
}
CONVOLUTIONS = STAGES | {
    "3 to 64 at 32x32": conv(3, 64, 32, 3),
    "64 to 128, stride 2": conv(64, 128, 32, 3, 2),
    "128 to 256, stride 2": conv(128, 256, 16, 3, 2),
    "256 to 512, stride 2": conv(256, 512, 8, 3, 2),
    "64 to 128, 1x1, stride 2": conv(64, 128, 32, 1, 2),
    "128 to 256, 1x1, stride 2": conv(128, 256, 16, 1, 2),
    "256 to 512, 1x1, stride 2": conv(256, 512, 8, 1, 2),
}
LINEAR = {
    "17 tokens, 512 to 512": linear(512, 512),
    "17 tokens, 512 to 1536": linear(512, 1536),
    "17 tokens, 1536 to 512": linear(1536, 512),
    "1 token, 512 to 10": linear(512, 10, 1),
}


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def median_seconds(call: Callable[[], Any], rounds: int = 9) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def verified(layer: Layer, dtype: torch.dtype, transform: str = "abs") -> tuple[Tensor, Tensor, Tensor]:
    """Return (sums, inputs, output_grad) of the layer, channels-last; the kernel's sums are near the reference's."""
    sums, inputs, output_grad = (channels_last(t) for t in layer.operands(dtype))
    few = inputs[:4], output_grad[:4]
    result, expected = sums.clone().zero_(), sums.double().zero_()
    NATIVE.per_example_accumulate_(result, *few, *layer.settings, transform)
    REFERENCE["per_example_accumulate_"](expected, *(t.double() for t in few), *layer.settings, transform)
    assert relative_l2(result, expected) <= 1e-6
    return sums, inputs, output_grad


def report(versus: Versus, layer: Layer, ratio: float, baseline: str, target: str) -> None:
    """Return GFLOP/s, counting the products of the whole kernel at every position, padding included, as is usual."""
    sums, _, output_grad = layer.operands()
    operations = 2 * output_grad.numel() * sums[0].numel() / 1e9
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    sgemm = 2 * 1.024**3 / median_seconds(lambda: a @ b)
    seconds = versus.benchmark.stats.stats.median
    versus.report(
        f"{ratio:.2f} x {baseline} ({operations / seconds:.0f} of {operations / seconds / ratio:.0f} GFLOP/s; "
        f"sgemm {sgemm:.0f})",
        target,
    )


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_per_example_convolutions(versus: Versus, name: str) -> None:
    layer = CONVOLUTIONS[name]
    sums, inputs, output_grad = verified(layer, torch.float32)
    stride, padding, dilation, groups = layer.settings
    rest = (None, stride, padding, dilation, False, [0, 0], groups, [False, True, False])
    ratio = versus(
        partial(NATIVE.per_example_accumulate_, sums, inputs, output_grad, *layer.settings, "abs"),
        lambda: torch.ops.aten.convolution_backward(output_grad, inputs, sums, *rest),
        rounds=21,
    )
    report(versus, layer, ratio, "oneDNN", ">= 0.85 x" if name in STAGES else "none")


@pytest.mark.parametrize("transform", ["abs", "square"])
@pytest.mark.parametrize("name", LINEAR)
def test_per_example_linear(versus: Versus, name: str, transform: str) -> None:
    layer = LINEAR[name]
    sums, inputs, output_grad = verified(layer, torch.float32, transform)
    rows, columns = (t.movedim(1, -1).flatten(0, 1) for t in (output_grad, inputs))
    ratio = versus(
        partial(NATIVE.per_example_accumulate_, sums, inputs, output_grad, *layer.settings, transform),
        lambda: rows.T @ columns,
        rounds=41,
    )
    report(versus, layer, ratio, "sgemm of the batch", "none")


@pytest.mark.parametrize("name", STAGES)
def test_per_example_bfloat16(versus: Versus, name: str) -> None:
    """Compare with our own float32: on some processors oneDNN's bfloat16 uses units that multiply whole tiles."""
    layer = STAGES[name]
    sums, inputs, output_grad = verified(layer, torch.bfloat16)
    wide = inputs.float(), output_grad.float()
    ratio = versus(
        partial(NATIVE.per_example_accumulate_, sums, inputs, output_grad, *layer.settings, "abs"),
        partial(NATIVE.per_example_accumulate_, sums.clone(), *wide, *layer.settings, "abs"),
        rounds=21,
    )
    report(versus, layer, ratio, "our float32", "none")


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("name", STAGES)
def test_channel_dot(versus: Versus, name: str, layout: str) -> None:
    output_grad = STAGES[name].operands()[2]
    values = torch.randn_like(output_grad)
    if layout == "channels-last":
        output_grad, values = channels_last(output_grad), channels_last(values)
    exact = REFERENCE["channel_dot"](output_grad.double(), values.double())
    assert relative_l2(NATIVE.channel_dot(output_grad, values), exact) <= 1e-6
    ratio = versus(
        lambda: NATIVE.channel_dot(output_grad, values),
        lambda: REFERENCE["channel_dot"](output_grad, values),
        rounds=41,
    )
    gigabytes = 8 * output_grad.numel() / versus.benchmark.stats.stats.median / 1e9
    versus.report(f"{ratio:.1f} x as fast as product, then sum ({gigabytes:.1f} GB/s)", "none")


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("name", STAGES)
def test_channel_sums(versus: Versus, name: str, layout: str) -> None:
    """Compare with the normalized input, two channel dots, and their absolute values summed over the examples."""
    output_grad = STAGES[name].operands()[2]
    inputs = torch.randn_like(output_grad)
    if layout == "channels-last":
        output_grad, inputs = channels_last(output_grad), channels_last(inputs)
    channels = output_grad.shape[1]
    mean, variance = torch.randn(channels), torch.rand(channels) + 0.1
    sums = [torch.zeros(channels), torch.zeros(channels)]
    exact = [total.double() for total in sums]
    statistics = (mean, variance, 1e-5, "abs")
    REFERENCE["channel_sums_"](exact, output_grad.double(), inputs.double(), *statistics)
    NATIVE.channel_sums_(sums, output_grad, inputs, *statistics)
    assert relative_l2(torch.cat(sums), torch.cat(exact)) <= 1e-6

    def apart() -> None:
        normalized = torch.nn.functional.batch_norm(inputs, mean, variance)
        for total, values in zip(sums, (normalized, None), strict=True):
            total.add_(NATIVE.channel_dot(output_grad, values).abs().sum(dim=0))

    ratio = versus(lambda: NATIVE.channel_sums_(sums, output_grad, inputs, *statistics), apart, rounds=41)
    gigabytes = 8 * output_grad.numel() / versus.benchmark.stats.stats.median / 1e9
    versus.report(f"{ratio:.1f} x as fast as the steps apart ({gigabytes:.1f} GB/s)", "none")
