"""per_example_accumulate_ and channel_dot: native kernels against their references, references against formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from delfast.ops import BACKEND, OPS
from tests import cases
from tests.tolerances import assert_l2_within_budget, relative_l2

REFERENCE = {op.name: op.reference for op in OPS}
NATIVE = torch.ops.delfast
TRANSFORMS = ["abs", "square"]

needs_native = pytest.mark.skipif(BACKEND.module is None, reason=f"no native kernels: {BACKEND.reason}")
all_layers = pytest.mark.parametrize("layer", cases.LAYERS.values(), ids=cases.LAYERS.keys())


def accumulated(function: Any, sums: Tensor, *arguments: Any) -> Tensor:
    """The sums after the op, in the memory of the ones given."""
    function(sums, *arguments)
    return sums


def by_formula(layer: cases.Layer, sums: Tensor, inputs: Tensor, output_grad: Tensor, transform: str) -> Tensor:
    """Every example's gradient at once: patches (by indexing, dimension after dimension), then one einsum."""
    groups, missing = layer.groups, 3 - len(layer.size)
    stride, padding, dilation = ([1] * missing + list(s) for s in layer.settings[:3])
    padding[:missing] = [0] * missing
    kernel, out = [1] * missing + list(layer.kernel), [1] * missing + layer.out
    size = [1] * missing + list(layer.size)
    patches = inputs.reshape(len(inputs), groups, layer.in_channels // groups, *size)
    patches = torch.nn.functional.pad(patches, [p for pad in reversed(padding) for p in (pad, pad)])
    for i in range(3):  # (..., size, ...) to (..., out, kernel, ...)
        index = stride[i] * torch.arange(out[i])[:, None] + dilation[i] * torch.arange(kernel[i])
        patches = patches.index_select(3 + 2 * i, index.flatten()).unflatten(3 + 2 * i, index.shape)
    gradient = torch.einsum(
        "ngcaxbyez,ngmabe->ngmcxyz",
        patches,
        output_grad.reshape(len(output_grad), groups, layer.out_channels // groups, *out),
    )
    return sums + (gradient.abs() if transform == "abs" else gradient**2).sum(dim=0).reshape(sums.shape)


@pytest.mark.parametrize("transform", TRANSFORMS)
@all_layers
def test_reference_is_the_formula(layer: cases.Layer, transform: str) -> None:
    sums, inputs, output_grad = layer.operands(torch.float64)
    expected = by_formula(layer, sums, inputs, output_grad, transform)
    arguments = (sums.clone(), inputs, output_grad, *layer.settings, transform)
    assert relative_l2(accumulated(REFERENCE["per_example_accumulate_"], *arguments), expected) <= 1e-12


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@all_layers
def test_accumulate_within_budget(isa: str, layer: cases.Layer, transform: str, dtype: torch.dtype) -> None:
    sums, inputs, output_grad = layer.operands(dtype)
    sums.zero_()  # so that every error shows
    rest = (*layer.settings, transform)
    result = accumulated(NATIVE.per_example_accumulate_, sums.clone(), inputs, output_grad, *rest)
    reference = accumulated(REFERENCE["per_example_accumulate_"], sums.clone(), inputs, output_grad, *rest)
    exact = by_formula(layer, sums.double(), inputs.double(), output_grad.double(), transform)
    assert_l2_within_budget(result, exact, reference)


@pytest.mark.parametrize("size", [(4096,), (64, 80)])
def test_long_sums_stay_within_budget(isa: str, size: tuple[int, ...]) -> None:
    layer = cases.Layer(20, 15, size, (3,) * len(size), padding=(1,) * len(size))
    test_accumulate_within_budget(isa, layer, "abs", torch.float32)


def test_dtypes_may_differ(isa: str) -> None:
    layer = cases.LAYERS["3x3"]
    sums, inputs, output_grad = layer.operands()
    for a in cases.DTYPES:
        for d in cases.DTYPES:
            narrow = inputs.to(a), output_grad.to(d)
            result = accumulated(NATIVE.per_example_accumulate_, sums.clone(), *narrow, *layer.settings, "abs")
            exact = by_formula(layer, sums.double(), *(t.double() for t in narrow), "abs")
            assert relative_l2(result, exact) <= 1e-6


@pytest.mark.parametrize("transform", TRANSFORMS)
@all_layers
def test_accumulate_in_any_strides(isa: str, layer: cases.Layer, transform: str) -> None:
    operands = list(layer.operands())
    expected = accumulated(NATIVE.per_example_accumulate_, *(t.clone() for t in operands), *layer.settings, transform)
    for name, others in cases.strided(operands):
        for changed in (others, [others[0], *operands[1:]], [operands[0].clone(), *others[1:]]):
            sums = changed[0].clone(memory_format=torch.preserve_format)
            result = accumulated(NATIVE.per_example_accumulate_, sums, *changed[1:], *layer.settings, transform)
            assert torch.equal(result, expected), name


@needs_native
@all_layers
def test_bit_identical_on_any_thread_count(isa: str, layer: cases.Layer, one_and_two_threads: tuple[int, int]) -> None:
    sums, inputs, output_grad = layer.operands()
    dots, results = [], []
    for threads in one_and_two_threads:
        torch.set_num_threads(threads)
        results.append(
            accumulated(NATIVE.per_example_accumulate_, sums.clone(), inputs, output_grad, *layer.settings, "abs")
        )
        dots.append(NATIVE.channel_dot(output_grad, output_grad))
    assert torch.equal(*results) and torch.equal(*dots)


@needs_native
def test_bit_identical_where_threads_share_the_work(one_and_two_threads: tuple[int, int]) -> None:
    layer = cases.Layer(64, 100, (24, 24), (3, 3), padding=(1, 1), examples=12)
    for dtype in (torch.float32, torch.bfloat16):
        test_bit_identical_on_any_thread_count("", layer, one_and_two_threads)
        sums, inputs, output_grad = layer.operands(dtype)
        results = []
        for threads in one_and_two_threads:
            torch.set_num_threads(threads)
            results.append(
                accumulated(
                    NATIVE.per_example_accumulate_, sums.clone(), inputs, output_grad, *layer.settings, "square"
                )
            )
        assert torch.equal(*results)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_one_position_has_no_use_for_signs(isa: str, transform: str) -> None:
    """|Σ over t of δ a| of a single t is |δ| |a|: for all examples together a product of matrices."""
    inputs, output_grad = torch.randn(50, 30, 1), torch.randn(50, 20, 1)
    sums = accumulated(
        NATIVE.per_example_accumulate_, torch.zeros(20, 30, 1), inputs, output_grad, [1], [0], [1], 1, transform
    )
    power = 1 if transform == "abs" else 2
    expected = (output_grad[:, :, 0].double().abs() ** power).T @ (inputs[:, :, 0].double().abs() ** power)
    assert relative_l2(sums[:, :, 0], expected) <= 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["3x3", "linear, one position", "depthwise", "stem"])
def test_a_nonfinite_gradient_shows(isa: str, bad: float, name: str) -> None:
    layer = cases.LAYERS[name]
    sums, inputs, output_grad = layer.operands()
    output_grad[1, 4].view(-1)[0] = bad
    NATIVE.per_example_accumulate_(sums, inputs, output_grad, *layer.settings, "abs")
    finite = sums.isfinite().flatten(1)
    assert not finite[4].all() and bool(finite[:4].all()) and bool(finite[5:].all())


def test_accumulate_bumps_the_version_counter() -> None:
    for name in ("odd", "no examples"):
        sums, inputs, output_grad = cases.LAYERS[name].operands()
        before = sums._version
        NATIVE.per_example_accumulate_(sums, inputs, output_grad, *cases.LAYERS[name].settings, "abs")
        assert sums._version > before


# channel_dot

SHAPES = [(3, 5), (0, 5), (2, 0, 3), (2, 5, 0), (3, 17, 1), (2, 64, 100), (2, 33, 7, 9), (2, 20, 3, 4, 5), (1, 3, 5000)]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_channel_dot_within_budget(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    output_grad, values = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    for other in (values, values.float(), None):
        exact = REFERENCE["channel_dot"](output_grad.double(), None if other is None else other.double())
        reference = REFERENCE["channel_dot"](output_grad, other)
        layouts = dict(cases.strided([output_grad] if other is None else [output_grad, other]))
        for tensors in layouts.values():
            result = NATIVE.channel_dot(tensors[0], tensors[1] if other is not None else None)
            assert result.dtype == torch.float32
            assert_l2_within_budget(result, exact, reference)
        if other is not None:  # the two laid out differently
            mixed = NATIVE.channel_dot(layouts["channels_last"][0], layouts["sliced"][1])
            assert_l2_within_budget(mixed, exact, reference)


def test_channel_dot_is_the_channels_part_of_the_loss() -> None:
    """Σ_j θ_ij g_ij(x) of a convolution, from weight gradients; the bias adds no part to it."""
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    images = torch.randn(5, 4, 7, 7, dtype=torch.float64)
    z = torch.nn.functional.conv2d(images, weight, stride=2, padding=1)
    z.retain_grad()
    z.tanh().sum().backward(retain_graph=True)
    assert z.grad is not None
    result = REFERENCE["channel_dot"](z.grad, z)
    for x in range(5):
        (gradient,) = torch.autograd.grad(z[x].tanh().sum(), weight, retain_graph=True)
        torch.testing.assert_close(result[x], (weight * gradient).flatten(1).sum(dim=1))


# errors


@needs_native
def test_errors_say_what_was_expected_and_what_came() -> None:
    sums, inputs, output_grad = torch.rand(6, 4, 3, 3), torch.rand(2, 8, 5, 5), torch.rand(2, 6, 5, 5)
    good: dict[str, Any] = {
        "sums": sums, "inputs": inputs, "output_grad": output_grad, "stride": [1, 1], "padding": [1, 1],
        "dilation": [1, 1], "groups": 2, "transform": "abs",
    }  # fmt: skip
    before = sums.clone()
    for change, message in (
        ({"transform": "cube"}, "expected transform 'abs' or 'square', got 'cube'"),
        ({"stride": [1]}, "expected 2 values each of stride, padding and dilation, got 1, 2 and 2"),
        ({"stride": [0, 1]}, r"stride and dilation >= 1 and padding >= 0 in dimension 0, got 0, 1 and 1"),
        ({"padding": [1, 2]}, r"expected output_grad of 7 positions in dimension 1.*got \(2, 6, 5, 5\)"),
        ({"groups": 4}, "expected groups to divide 8 input and 6 output channels, got 4"),
        ({"groups": 0}, "expected groups to divide"),
        (
            {"output_grad": torch.rand(3, 6, 5, 5)},
            r"expected output_grad of 2 examples.*got output_grad \(3, 6, 5, 5\)",
        ),
        ({"groups": 1}, r"sums \(6, 8, \*kernel\), got output_grad \(2, 6, 5, 5\) and sums \(6, 4, 3, 3\)"),
        ({"inputs": inputs[0]}, r"of 1 to 3 spatial dimensions, got \(8, 5, 5\)"),
        ({"output_grad": output_grad.flatten(1)}, r"got \(2, 8, 5, 5\), \(2, 150\) and"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            NATIVE.per_example_accumulate_(**(good | change))
        assert "\n" not in str(caught.value)
    for change, message in (
        ({"inputs": inputs.double()}, "expected inputs to be float32, bfloat16 or float16, got Double"),
        ({"output_grad": output_grad.long()}, "expected output_grad to be float32, bfloat16 or float16, got Long"),
        ({"sums": sums.bfloat16()}, "expected sums to be float32, got BFloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            NATIVE.per_example_accumulate_(**(good | change))
    assert torch.equal(sums, before)
    with pytest.raises(ValueError, match=r"values of shape \(2, 6, 5, 5\) like output_grad, got \(2, 8, 5, 5\)"):
        NATIVE.channel_dot(output_grad, inputs)
    with pytest.raises(ValueError, match=r"expected output_grad \(N, C, \*positions\), got \(6\)"):
        NATIVE.channel_dot(torch.rand(6), None)
    with pytest.raises(ValueError, match="expected values to be float32, bfloat16 or float16, got Double"):
        NATIVE.channel_dot(output_grad, output_grad.double())
