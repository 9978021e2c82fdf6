"""channel_sums_: the native kernel against its reference, the reference against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from delfast.ops import BACKEND, OPS
from tests import cases
from tests.tolerances import assert_l2_within_budget, relative_l2

REFERENCE = {op.name: op.reference for op in OPS}["channel_sums_"]
NATIVE = torch.ops.delfast.channel_sums_
TRANSFORMS = ["abs", "square"]
SHAPES = [
    *((3, 5), (0, 5), (2, 0, 3), (2, 5, 0), (70, 17, 1), (2, 64, 100), (2, 33, 7, 9), (2, 20, 3, 4, 5)),
    *((1, 3, 5000), (100, 20, 4)),
]

needs_native = pytest.mark.skipif(BACKEND.module is None, reason=f"no native kernels: {BACKEND.reason}")


def accumulated(function: Any, sums: list[Tensor], *arguments: Any) -> Tensor:
    """Return the sums after the op, one after another."""
    sums = [total.clone() for total in sums]
    function(sums, *arguments)
    return torch.cat([total.flatten() for total in sums])


def doubled(values: Any) -> Any:
    if isinstance(values, list):
        return [doubled(value) for value in values]
    return values.double() if isinstance(values, Tensor) else values


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_reference_is_the_gradient_of_batch_norm(transform: str) -> None:
    inputs, mean = torch.randn(5, 4, 3, 2).double() + 3, torch.randn(4).double()
    variance, eps = torch.rand(4).double() + 0.1, 1e-3
    weight, bias = (torch.randn(4).double().requires_grad_() for _ in range(2))
    output_grad, expected = torch.randn(5, 4, 3, 2).double(), torch.zeros(8).double()
    for x in range(5):
        output = functional.batch_norm(inputs[x : x + 1], mean, variance, weight, bias, eps=eps)
        gradients = torch.autograd.grad((output * output_grad[x]).sum(), (weight, bias))
        expected += torch.cat([g.abs() if transform == "abs" else g**2 for g in gradients])
    zeros = [torch.zeros(4).double() for _ in range(2)]
    result = accumulated(REFERENCE, zeros, output_grad, inputs, mean, variance, eps, transform)
    assert relative_l2(result, expected) <= 1e-12


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_within_budget(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    channels = shape[1]
    output_grad, values = torch.randn(shape).to(dtype), (torch.randn(shape) + 2).to(dtype)
    mean, variance = torch.randn(channels), torch.rand(channels) + 0.1
    for others in (
        (None, None, None),
        (values, None, None),
        (values, mean, variance),
        (values.float(), mean, variance),
    ):
        for transform in TRANSFORMS:
            sums = [torch.zeros(channels) for _ in range(1 if others[0] is None else 2)]
            rest = (1e-5, transform)
            exact = accumulated(REFERENCE, doubled(sums), *(doubled(t) for t in (output_grad, *others)), *rest)
            reference = accumulated(REFERENCE, sums, output_grad, *others, *rest)
            tensors = [output_grad] if others[0] is None else [output_grad, others[0]]
            for _, (laid, *more) in cases.strided(tensors):
                result = accumulated(NATIVE, sums, laid, *(more or [None]), *others[1:], *rest)
                assert_l2_within_budget(result, exact, reference)


def test_a_mean_that_is_large_does_not_cancel(isa: str) -> None:
    output_grad, values = torch.randn(4, 8, 200), torch.randn(4, 8, 200) + 1000
    mean, variance = torch.full((8,), 1000.0), torch.ones(8)
    arguments = (output_grad, values, mean, variance, 0.0, "abs")
    exact = accumulated(REFERENCE, [torch.zeros(8).double()], *(doubled(value) for value in arguments))
    assert relative_l2(accumulated(NATIVE, [torch.zeros(8)], *arguments), exact) <= 1e-6


def test_sums_in_any_strides_and_shapes(isa: str) -> None:
    output_grad = torch.randn(3, 6, 5)
    expected = accumulated(NATIVE, [torch.ones(6)], output_grad, None, None, None, 0.0, "abs")
    for sums in (torch.ones(2, 3), torch.ones(3, 2).t(), torch.ones(12)[::2]):
        assert torch.equal(accumulated(NATIVE, [sums], output_grad, None, None, None, 0.0, "abs"), expected)
        before = sums._version
        NATIVE([sums], output_grad, None, None, None, 0.0, "abs")
        assert torch.equal(sums.flatten(), expected) and sums._version > before


@needs_native
def test_bit_identical_on_any_thread_count(isa: str, one_and_two_threads: tuple[int, int]) -> None:
    output_grad, values = torch.randn(40, 40, 30, 30), torch.randn(40, 40, 30, 30)
    mean, variance = torch.randn(40), torch.rand(40) + 0.1
    for layout in (torch.contiguous_format, torch.channels_last):
        operands = [t.contiguous(memory_format=layout) for t in (output_grad, values)]
        results = []
        for threads in one_and_two_threads:
            torch.set_num_threads(threads)
            sums = [torch.zeros(40), torch.zeros(40)]
            results.append(accumulated(NATIVE, sums, *operands, mean, variance, 1e-5, "square"))
        assert torch.equal(*results)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nonfinite_gradient_shows_in_its_channel(isa: str, bad: float) -> None:
    output_grad = torch.randn(3, 20, 7)
    output_grad[1, 4, 2] = bad
    sums = [torch.zeros(20), torch.zeros(20)]
    NATIVE(sums, output_grad, torch.randn(3, 20, 7), None, None, 0.0, "abs")
    for total in sums:
        assert total.isfinite().tolist() == [channel != 4 for channel in range(20)]


def test_what_is_refused() -> None:
    sums, output_grad = torch.zeros(6), torch.rand(2, 6, 5)
    good: dict[str, Any] = {
        "sums": [sums], "output_grad": output_grad, "values": output_grad + 1, "mean": torch.rand(6),
        "variance": torch.rand(6), "eps": 1e-5, "transform": "abs",
    }  # fmt: skip
    for change, message in (
        ({"transform": "cube"}, "expected transform 'abs' or 'square', got 'cube'"),
        ({"sums": []}, "expected one tensor of sums, or two with values, got 0"),
        ({"sums": [sums] * 3}, "expected one tensor of sums, or two with values, got 3"),
        ({"sums": [sums] * 2, "values": None, "mean": None, "variance": None}, "or two with values, got 2"),
        ({"sums": [torch.zeros(5)]}, r"expected sums #0 of 6 channels, got \(5\)"),
        ({"mean": None}, "expected mean and variance together and with values"),
        ({"values": None}, "expected mean and variance together and with values"),
        ({"variance": torch.rand(5)}, r"expected variance of 6 channels, got \(5\)"),
        ({"values": output_grad[:1]}, r"expected values of shape \(2, 6, 5\) like output_grad, got \(1, 6, 5\)"),
        ({"output_grad": output_grad[0, 0]}, r"expected output_grad \(N, C, \*positions\), got \(5\)"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            NATIVE(**(good | change))
        assert "\n" not in str(caught.value)
    for change in ({"output_grad": output_grad.long()}, {"sums": [sums.bfloat16()]}):
        with pytest.raises(ValueError, match="float32"):
            NATIVE(**(good | change))
    assert not sums.any()
