"""Every way to use tensor cores for per-example sums, on a GPU. Without one, test_cpp.py runs them on the CPU."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import delfast
from benchmarks import per_example_variants as variants
from delfast.ops import BACKEND, OPS
from tests.cases import Layer
from tests.tolerances import relative_l2

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
    pytest.mark.skipif("CUDA" not in BACKEND.devices, reason=f"no CUDA kernels: {delfast.status()['cuda']}"),
]
REFERENCE = next(op.reference for op in OPS if op.name == "per_example_accumulate_")
LAYERS = {  # channels in packs of 8; positions of the last product that are none
    "3x3": Layer(24, 136, (3, 6), (3, 3), padding=(1, 1), examples=5),
    "linear": Layer(72, 40, (17,), (1,), examples=7),
}
OPERANDS = {
    "bfloat16": (torch.bfloat16, variants.TOLERANCE["bfloat16"]),
    "float16": (torch.float16, variants.TOLERANCE["bfloat16"]),
    "tf32": (torch.float32, variants.TOLERANCE["tf32"]),
}
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def exact_sums(layer: Layer, inputs: Tensor, output_grad: Tensor) -> Tensor:
    sums = torch.zeros_like(layer.operands()[0], dtype=torch.float64)
    REFERENCE(sums, inputs.cpu().double(), output_grad.cpu().double(), *layer.settings, "abs")
    return sums


def accumulated(layer: Layer, inputs: Tensor, output_grad: Tensor, captured: bool = False) -> Tensor:
    """The op's sums, on the CPU; ``captured``: as a CUDA graph's first replay gives them."""
    sums = torch.zeros_like(layer.operands()[0], device=inputs.device)
    graph = torch.cuda.CUDAGraph() if captured else None
    with torch.cuda.graph(graph) if graph else nullcontext():
        torch.ops.delfast.per_example_accumulate_(sums, inputs, output_grad, *layer.settings, "abs")
    if graph:
        graph.replay()
    return sums.cpu()


def check_sums(layer: Layer, dtype: torch.dtype, tolerance: float, device: str) -> None:
    torch.manual_seed(0)
    inputs, output_grad = (operand.to(device) for operand in layer.operands(dtype)[1:])
    sums = accumulated(layer, inputs, output_grad)
    assert relative_l2(sums, exact_sums(layer, inputs, output_grad)) <= tolerance
    assert torch.equal(accumulated(layer, inputs, output_grad), sums)
    if device == "cuda":
        assert torch.equal(accumulated(layer, inputs, output_grad, captured=True), sums)
    for number in range(2):
        for bits in (torch.iinfo(BITS[dtype]).max, -1):  # NaNs of only ones, of both signs
            operands = [inputs.clone(), output_grad.clone()]
            operands[number].view(BITS[dtype])[1, 3] = bits  # a channel of an example
            found = accumulated(layer, *operands).isnan()
            assert found.any() and torch.equal(found, exact_sums(layer, *operands).isnan())


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_sums_of_every_variant(variant: str, kind: str, layer: Layer) -> None:
    """Near float64's, with the same bits in every run and in a graph, and NaN where an operand is."""
    with variants.forced(variant), variants.tf32(True):
        check_sums(layer, *OPERANDS[kind], "cuda")
