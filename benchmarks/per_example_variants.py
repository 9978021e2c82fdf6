"""The fastest way to use tensor cores for each layer's per-example sums, by GPU.

``python -m benchmarks.per_example_variants`` writes csrc/cuda/per_example_variants.inc, from which the launcher of the
kernels chooses, from the times in benchmarks/results/per_example_variants.json. With ``--measure`` it first times every
variant on every layer on this machine's GPU and keeps the times there; a variant whose sums are wrong is an error. The
table counts when the extension is built again. tests/packaging/test_per_example_variants.py holds table and times
together.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
TIMES = ROOT / "benchmarks" / "results" / "per_example_variants.json"
TABLE = ROOT / "csrc" / "cuda" / "per_example_variants.inc"

VARIANTS = ("wmma", "64x64", "64x128", "128x128", "64x192")  # csrc/cuda/per_example_variants.h: kVariantNames
TOLERANCE = {"bfloat16": 3e-5, "tf32": 3e-3}  # of the sums, relative, in the Euclidean norm, by kind of operands
KINDS = {"bfloat16": torch.bfloat16, "tf32": torch.float32}  # the operands of each kind
DATA = 150 << 20  # bytes of different operands that successive launches read, more than a GPU's L2 cache holds
Layer = dict[str, Any]
Times = dict[str, Any]


def table(times: Times) -> str:
    """Return the text of the table: a line for each GPU, kind of operands and layer, which names the fastest."""
    layers = {layer["name"]: layer for layer in times["layers"]}
    lines = ["// Written by `python -m benchmarks.per_example_variants` from measured times: do not edit."]
    for card in times["cards"]:
        for kind, by_layer in card["milliseconds"].items():
            for name, by_variant in by_layer.items():
                layer = layers[name]
                fastest = min(by_variant, key=by_variant.__getitem__)
                member = fastest if fastest == "wmma" else f"tile_{fastest}"
                columns = layer["in_channels"] * math.prod(layer["kernel"])
                sizes = f"{layer['out_channels']}, {columns}, {math.prod(out_sizes(layer))}"
                flags = f"{str(kind == 'bfloat16').lower()}, {str(is_direct(layer)).lower()}"
                lines.append(f'{{"{card["card"]}", {flags}, {sizes}, Variant::{member}}},  // {name}')
    return "\n".join([*lines, ""])


def out_sizes(layer: Layer) -> list[int]:
    """Return the sizes of the layer's output (its dilation is 1)."""
    return [
        (size + 2 * padding - kernel) // stride + 1
        for size, kernel, stride, padding in zip(
            *(layer[key] for key in ("in", "kernel", "stride", "padding")), strict=True
        )
    ]


def is_direct(layer: Layer) -> bool:
    """Return whether every output position reads the input's position of the same number."""
    return math.prod(layer["kernel"]) == 1 and out_sizes(layer) == layer["in"]


def dump(times: Times) -> str:
    """Return the times as JSON with a line for each layer and each layer's times."""

    def block(rows: list[str], indent: str, ends: str) -> str:
        return f"{ends[0]}\n" + ",\n".join(f"{indent}  {row}" for row in rows) + f"\n{indent}{ends[1]}"

    def of_card(card: dict[str, Any]) -> str:
        kinds = [
            f"{json.dumps(kind)}: "
            + block([f"{json.dumps(name)}: {json.dumps(ms)}" for name, ms in by_layer.items()], "        ", "{}")
            for kind, by_layer in card["milliseconds"].items()
        ]
        rows = [f"{json.dumps(key)}: {json.dumps(card[key])}" for key in ("card", "provenance")]
        return block([*rows, f'"milliseconds": {block(kinds, "      ", "{}")}'], "    ", "{}")

    layers = block([json.dumps(layer) for layer in times["layers"]], "  ", "[]")
    return (
        block([f'"layers": {layers}', f'"cards": {block([of_card(c) for c in times["cards"]], "  ", "[]")}'], "", "{}")
        + "\n"
    )


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let the ops round float32 operands to tf32, or not, inside the context."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def forced(variant: str) -> Iterator[None]:
    """Let the op use this variant inside the context, and what was measured afterwards."""
    from delfast.ops import BACKEND

    assert BACKEND.module is not None
    BACKEND.module.force_per_example_variant(variant)
    try:
        yield
    finally:
        BACKEND.module.force_per_example_variant("measured")


def accumulate(layer: Layer, sums: Tensor, inputs: Tensor, output_grad: Tensor) -> None:
    """Add the absolute value of each example's gradient of the layer's weight to the sums, by the op."""
    dilation = [1] * len(layer["kernel"])
    geometry = layer["stride"], layer["padding"], dilation, 1
    torch.ops.delfast.per_example_accumulate_(sums, inputs, output_grad, *geometry, "abs")


def operands(layer: Layer, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return random inputs and output gradients of the layer, channels-last."""
    sides = (layer["in"], layer["in_channels"]), (out_sizes(layer), layer["out_channels"])
    inputs, output_grad = (
        torch.randn(layer["examples"], *sizes, channels, dtype=dtype, device=device).movedim(-1, 1)
        for sizes, channels in sides
    )
    return inputs, output_grad


def empty_sums(layer: Layer, device: torch.device) -> Tensor:
    shape = layer["out_channels"], *layer["kernel"], layer["in_channels"]
    return torch.zeros(shape, device=device).movedim(-1, 1)


def expected_sums(layer: Layer, inputs: Tensor, output_grad: Tensor) -> Tensor:
    """Return the sums of the same operands in float32."""
    expected = empty_sums(layer, inputs.device)
    with tf32(False):
        accumulate(layer, expected, inputs.float(), output_grad.float())
    return expected


def check_sums(layer: Layer, kind: str, sums: Tensor, expected: Tensor, variant: str) -> None:
    """Raise RuntimeError if the sums are further from the expected ones than ``TOLERANCE`` allows."""
    error = float((sums - expected).norm() / expected.norm())
    if not error < TOLERANCE[kind]:
        raise RuntimeError(
            f"expected {variant}'s sums of {layer['name']} within {TOLERANCE[kind]}, got {error:.1e}; "
            "the kernel is wrong on this GPU"
        )


def time_layer(layer: Layer, kind: str, device: torch.device) -> dict[str, float]:
    """Return each variant's time in milliseconds: of 9 calls the median, after 3 more. Wrong sums raise."""
    first = operands(layer, KINDS[kind], device)
    copies = 1 + min(7, DATA // sum(t.numel() * t.element_size() for t in first))
    data = [first, *(tuple(t.clone() for t in first) for _ in range(copies - 1))]
    expected = expected_sums(layer, *first)
    found = {}
    for variant in VARIANTS:
        with forced(variant), tf32(True):
            sums = torch.zeros_like(expected)
            accumulate(layer, sums, *first)
            check_sums(layer, kind, sums, expected, variant)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(13)]
            events[0].record()
            for n, event in enumerate(events[1:]):
                accumulate(layer, sums, *data[n % copies])
                event.record()
            torch.cuda.synchronize()
            found[variant] = round(statistics.median(a.elapsed_time(b) for a, b in pairwise(events[3:])), 4)
    return found


def measure(times: Times) -> None:
    """Time every layer on the current GPU and put the times in place of those it had."""
    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    milliseconds = {
        kind: {layer["name"]: time_layer(layer, kind, device) for layer in times["layers"]} for kind in TOLERANCE
    }
    new = {
        "card": name,
        "provenance": f"this script with --measure, torch {torch.__version__}: medians of 9 calls",
        "milliseconds": milliseconds,
    }
    cards = [card for card in times["cards"] if card["card"] != name]
    at = next((n for n, card in enumerate(times["cards"]) if card["card"] == name), len(cards))
    times["cards"] = [*cards[:at], new, *cards[at:]]  # GPUs that are not in the table use the first one's lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="time the variants on this machine's GPU first")
    arguments = parser.parse_args()
    times = json.loads(TIMES.read_text(encoding="utf-8"))
    if arguments.measure:
        measure(times)
        TIMES.write_text(dump(times), encoding="utf-8")
    TABLE.write_text(table(times), encoding="utf-8")
    print(f"wrote {TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
