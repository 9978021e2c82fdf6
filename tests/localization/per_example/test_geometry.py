"""per_example_accumulate_ on layers drawn at random, on every instruction set, against the float64 loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delfast.experiments.networks import build
from delfast.localization.per_example import PerExampleGradients
from delfast.naming import trainable_parameters
from delfast.ops import BACKEND
from delfast.ops.reference.per_example import per_example_accumulate_ as reference
from tests import cases
from tests.tolerances import relative_l2

pytestmark = pytest.mark.skipif(BACKEND.module is None, reason=f"no native kernels: {BACKEND.reason}")


@st.composite
def layers(draw: Any) -> cases.Layer:
    """Every third layer reads maps of one pixel by a kernel of one tap, where the kernels join the examples."""
    dims = draw(st.integers(1, 3))
    one_pixel = draw(st.integers(0, 2)) == 0
    axes = []
    for _ in range(dims):
        kernel = 1 if one_pixel else draw(st.integers(1, 5))
        dilation = draw(st.integers(1, 3))
        padding = 0 if one_pixel else draw(st.integers(0, 3))
        least = max(1, dilation * (kernel - 1) + 1 - 2 * padding)
        size = 1 if one_pixel else draw(st.integers(least, max(least, 9)))
        axes.append((size, kernel, draw(st.integers(1, 3)), padding, dilation))
    groups = draw(st.sampled_from([1, 1, 2, 5]))
    channels = [groups * draw(st.integers(1, 20 // groups)) for _ in range(2)]
    return cases.Layer(*channels, *zip(*axes, strict=True), groups=groups, examples=draw(st.integers(0, 9)))  # type: ignore[arg-type]


def check_layer(layer: cases.Layer, dtype: torch.dtype, transform: str, layout: str) -> None:
    assert BACKEND.module is not None
    sums, inputs, output_grad = layer.operands(dtype)
    exact = sums.double()
    reference(exact, inputs.double(), output_grad.double(), *layer.settings, transform)
    sums, inputs, output_grad = dict(cases.strided([sums, inputs, output_grad]))[layout]
    before = BACKEND.module.isa()
    try:
        for isa in BACKEND.module.isas():
            BACKEND.module.force_isa(isa)
            result = sums.clone()
            torch.ops.delfast.per_example_accumulate_(result, inputs, output_grad, *layer.settings, transform)
            assert relative_l2(result, exact) <= 1e-5, isa  # products of 16-bit values are exact in float32
    finally:
        BACKEND.module.force_isa(before)


DRAWN = given(
    layers(),
    st.sampled_from(cases.DTYPES),
    st.sampled_from(["abs", "square"]),
    st.sampled_from(["contiguous", "channels_last", "sliced", "transposed"]),
)


@settings(max_examples=120, derandomize=True, deadline=None, database=None)
@DRAWN
def test_any_geometry(layer: cases.Layer, dtype: torch.dtype, transform: str, layout: str) -> None:
    check_layer(layer, dtype, transform, layout)


@pytest.mark.slow
@settings(max_examples=5000, derandomize=True, deadline=None, database=None)
@DRAWN
def test_any_geometry_at_length(layer: cases.Layer, dtype: torch.dtype, transform: str, layout: str) -> None:
    check_layer(layer, dtype, transform, layout)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_examples_are_joined_whatever_the_stride(isa: str, stride: int) -> None:
    """Σ_n |d_n| |x_n| of every example, not of every second."""
    x, d, s = torch.randn(6, 4, 1), torch.randn(6, 3, 1), torch.zeros(3, 4, 1)
    torch.ops.delfast.per_example_accumulate_(s, x, d, [stride], [0], [1], 1, "abs")
    expected = d[:, :, 0].double().abs().T @ x[:, :, 0].double().abs()
    torch.testing.assert_close(s[:, :, 0].double(), expected, rtol=1e-6, atol=1e-6)


def test_a_downsampling_layer_of_one_pixel_counts_every_example() -> None:
    """ResNet-18 on images of 4 x 4: layer4's downsampling convolution reads one pixel with a stride of 2."""
    model = build("resnet18-thin", 5, 3, 4).eval()
    batch = (torch.randn(6, 3, 4, 4), torch.arange(6) % 5)
    single = PerExampleGradients(model, trainable_parameters(model), None, "abs")
    single.add(batch)
    model.double()
    double = PerExampleGradients(model, trainable_parameters(model), None, "abs")
    double.add((batch[0].double(), batch[1]))
    for name, exact in double.sums.items():
        assert relative_l2(single.sums[name], exact) <= 1e-4, name
