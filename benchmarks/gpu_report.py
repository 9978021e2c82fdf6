"""The results of benchmarks.gpu: the kept JSON, tables of it, and the targets of the whole calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delfast.files import read_json

SIDES = ("case", "on", "mode", "side", "wall, ms", "busy, ms", "launches", "peak, MiB")
RATIOS = ("case", "on", "mode", "sides", "wall", "busy")
GOALS = ("whole call", "measured", "target")
NOT_MEASURED = "not measured since passes are captured: no GPU could be started"
NO_GPU = "not measured: no GPU could be started"
NOT_HERE = "not measured on this GPU"


@dataclass(frozen=True)
class Target:
    """The largest ratio of two sides' wall times that was aimed at, in one section, network and mode."""

    text: str
    section: str
    on: str
    mode: str
    ours: str
    other: str
    most: float


_R18, _R50, _VIT = "resnet18, 32 px, batch 128", "resnet50, 224 px, batch 64", "vit_b_16, 224 px, batch 64"
_BOTH = ("per-example, captured", "forward + backward, captured")
_COMPACT = ("delfast, compact, captured", "delfast, dense, captured")
TARGETS = (
    Target("localize 5,000 images, captured, of the usual loop's time, float32", "localize", _R18, "fp32",
           "delfast, captured", "usual loop", 0.6),
    Target("the same in bfloat16", "localize", _R18, "bf16", "delfast, captured", "usual loop", 0.4),
    Target("per-example scores of a batch, of forward + backward, both captured, bfloat16, ResNet-18", "per_example",
           _R18, "bf16", *_BOTH, 1.4),
    Target("the same, ResNet-50", "per_example", _R50, "bf16", *_BOTH, 1.4),
    Target("the same, ViT-B/16", "per_example", _VIT, "bf16", *_BOTH, 0.9),
    Target("a captured step of `unlearn`, of torch's eager dense step, bfloat16, ResNet-18", "step", _R18, "bf16",
           "delfast, compact, captured", "torch, dense", 0.4),
    Target("compact, of the dense step, both captured, bfloat16, ResNet-18", "step", _R18, "bf16", *_COMPACT, 1.05),
    Target("the same, ResNet-50", "step", _R50, "bf16", *_COMPACT, 1.05),
    Target("the same, ViT-B/16", "step", _VIT, "bf16", *_COMPACT, 0.88),
    Target("a whole job in bfloat16, of the naive float32 loop", "job", "resnet18, batch 128", "of the side",
           "delfast, bf16", "naive, fp32", 0.25),
    Target("the same, of the naive bfloat16 loop", "job", "resnet18, batch 128", "of the side",
           "delfast, bf16", "naive, bf16", 0.5),
)  # fmt: skip


@dataclass(frozen=True)
class KernelTarget:
    """A figure of the section "bandwidth" and the value that was aimed at: the least, or for "us" the most."""

    name: str
    on: str
    figure: str
    aim: float

    @property
    def text(self) -> str:
        unit = {"of_copy": "of the GPU's copy", "speedup": "x the speed of the older kernels", "us": "µs"}[self.figure]
        return f"{'<=' if self.figure == 'us' else '>='} {self.aim:g} {unit}"


_LARGE = [f"1.07 G parameters, {dtype}" for dtype in ("bfloat16", "float32")]
_SMALL = "resnet18, float32"
KERNEL_TARGETS = (
    *(KernelTarget("criticality, mean", on, "of_copy", 0.95) for on in _LARGE),
    *(KernelTarget("criticality, mean of the top tenth", on, "of_copy", 0.88) for on in _LARGE),
    *(KernelTarget("selection of elements", on, "speedup", 3) for on in _LARGE),
    *(KernelTarget("masked SGD", on, "of_copy", 0.88) for on in _LARGE),
    *(KernelTarget("masked AdamW", on, "of_copy", 0.88) for on in _LARGE),
    KernelTarget("criticality, mean of the top tenth", _SMALL, "speedup", 2),
    KernelTarget("selection of elements", _SMALL, "speedup", 1.25),
    KernelTarget("masked SGD", _SMALL, "speedup", 1),
    KernelTarget("masked AdamW", _SMALL, "speedup", 1),
    KernelTarget("a channel mask after the gradients", _SMALL, "us", 80),
)
_LAYERS = {
    "ResNet-18's layers, batch 128": (2.2, 2.0),
    "ResNet-50's layers, batch 64": (2.2, 2.0),
    "ViT-B's layers, batch 64": (3.4, 2.8),
}
KERNEL_TARGETS += tuple(
    KernelTarget(f"per-example sums, {kind}", on, "speedup", aim)
    for on, aims in _LAYERS.items()
    for kind, aim in zip(("bfloat16", "tf32"), aims, strict=True)
)
LEFT_OUT = (
    "layers, each as often as the network has it",
    *("older, ms", "mma.sync, ms", "wgmma, ms", "wgmma saves, of a pass", "three tf32 products, of float32's time"),
)
KERNEL_GOALS = ("kernel", "on", "measured", "target", "a prototype")


def read_kept(path: Path) -> dict[str, Any]:
    """Return name -> section of a kept JSON, each with its device and provenance.

    A file of the first form, without sections, is of the kernels alone.
    """
    kept = read_json(path)
    return dict(kept["sections"]) if "sections" in kept else {"kernels": kept}


def side_rows(section: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the cells of ``SIDES``."""
    for result in section["results"]:
        for name, side in result["sides"].items():
            figures = [f"{side['wall_ms']:.2f}", _number(side["busy_ms"], ".2f"), _number(side["launches"], "d")]
            label = name if not side["warnings"] else f"{name} ({'; '.join(side['warnings'])})"
            yield [result["what"], result["on"], result["mode"], label, *figures, _number(side["peak_mib"], ".0f")]


def ratio_rows(section: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the cells of ``RATIOS``."""
    for result in section["results"]:
        for sides, ratio in result["ratios"].items():
            cells = [_number(ratio["wall"], ".2f"), _number(ratio["busy"], ".2f")]
            yield [result["what"], result["on"], result["mode"], sides, *cells]


def goal_rows(sections: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the cells of ``GOALS`` for every target, measured or not."""
    for target in TARGETS:
        yield [target.text, _found(sections, target) or NOT_MEASURED, f"<= {target.most:g}"]


def _found(sections: Mapping[str, Any], target: Target) -> str | None:
    """Return the measured ratio, with a remark where a side has warnings, as of no capture; None without one."""
    for result in sections.get(target.section, {"results": []})["results"]:
        if (result["on"], result["mode"]) == (target.on, target.mode):
            ratio = result["ratios"][f"{target.ours} / {target.other}"]["wall"]
            warned = any(result["sides"][name]["warnings"] for name in (target.ours, target.other))
            return f"{ratio:.2f}{' (see its warnings)' if warned else ''}"
    return None


def kernel_goal_rows(section: Mapping[str, Any] | None, kept: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the cells of ``KERNEL_GOALS`` for every target. ``kept``: the older kernels' and the prototype's times."""
    measured = {} if section is None else {(r["name"], r["on"]): r for r in section["results"]}
    cases = {(case["name"], case["on"]): case for case in kept["cases"]}
    for target in KERNEL_TARGETS:
        result = measured.get((target.name, target.on), {})
        figure = _number(result.get(target.figure), ".2f") or (NO_GPU if section is None else NOT_HERE)
        case, prototype = cases.get((target.name, target.on)), None
        if case is not None and target.figure == "speedup":
            prototype = case["before_us"] / case["prototype_us"]
        elif case is not None and target.figure == "of_copy":
            prototype = case["prototype_gb_per_s"] / kept["copy_gb_per_s"]
        yield [target.name, target.on, figure, target.text, _number(prototype, ".2f")]


def left_out_rows(kept: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the cells of ``LEFT_OUT``: bfloat16, the fastest kernel of each kind or the older one for every layer.

    A pass that sums per example takes at least two thirds of an ordinary one, whose weight gradients it leaves out, and
    the sums. The last column compares three times the tf32 kernel with the float32 kernel.
    """
    for network in kept["networks"]:
        times = [(layer["count"], layer["bfloat16"]) for layer in network["layers"]]
        older = sum(count * ms["before_ms"] for count, ms in times)
        mma = sum(count * min(ms["before_ms"], ms["mma_ms"]) for count, ms in times)
        wgmma = sum(count * min(ms.values()) for count, ms in times)
        share = (mma - wgmma) / (2 / 3 * network["forward_backward_ms"] + mma)
        three = sum(3 * layer["count"] * layer["tf32"]["mma_ms"] for layer in network["layers"])
        one = sum(layer["count"] * layer["tf32"]["float32_ms"] for layer in network["layers"])
        cells = [f"{ms:.2f}" for ms in (older, mma, wgmma)]
        yield [network["on"], *cells, f"{100 * share:.0f} %", f"{three / one:.2f}"]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
