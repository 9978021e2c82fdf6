"""The section "bandwidth" of benchmarks.gpu: kernels against the GPU's own copy, and against those of an older commit.

On 1.07 G parameters (the linear layers of a language model: 16 blocks of seven weights) with parameters in bfloat16 and
in float32, on ResNet-18, and on the layers of three networks for the per-example sums. Each op is verified, on one
block against the CPU's kernels or on a layer against float32, and then timed: one replay of a CUDA graph, caches cold.
``BEFORE`` keeps the times of the older kernels on a GPU, by which a speedup is known on that GPU alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_kernels import Clock, copy_rate, graph_of
from benchmarks.gpu_measure import captures, profile_call
from benchmarks.per_example_variants import (
    KINDS,
    TIMES,
    Layer,
    accumulate,
    check_sums,
    empty_sums,
    expected_sums,
    operands,
    tf32,
)
from delfast.errors import one_line
from delfast.experiments.networks import build
from delfast.files import read_json
from delfast.localization.criteria import resolve_top_h
from delfast.localization.scores import Scores
from delfast.mask import Mask
from delfast.ops.layout import pack
from delfast.optim import MaskedAdamW, MaskedSGD
from delfast.parameter_mask import ParameterMask

BEFORE = Path(__file__).parent / "results/gpu_before.json"
BUDGET = 0.3
BLOCKS, WIDTH = 16, 2048
LARGE = "1.07 G parameters"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NETWORKS = {"ResNet-18": 128, "ResNet-50": 64, "ViT-B": 64}  # how the measured layers' names begin; examples
UPDATES: tuple[tuple[str, Any, int, dict[str, Any]], ...] = (
    ("masked SGD", MaskedSGD, 1, {"momentum": 0.9}),
    ("masked AdamW", MaskedAdamW, 2, {"weight_decay": 0.0}),
)


@dataclass(frozen=True)
class Timed:
    """A call to time. ``moved``: the bytes that it has to read and write, None where that says little.

    ``verify`` raises AssertionError unless the call computes what it should. ``by_events``: timed by the profiler, as
    the sum of its kernels' times, because it reads its answer on the host and cannot be captured.
    """

    name: str
    on: str
    call: Callable[[], Any]
    verify: Callable[[], None]
    moved: int | None = None
    by_events: bool = False


def bandwidth(device: torch.device, tiny: bool, seconds: float) -> dict[str, Any]:
    """Verify and time every case until ``seconds`` are over; cases without time are named in "skipped"."""
    began = time.perf_counter()
    clock = Clock(device)
    found: dict[str, Any] = {"copy_gb_per_s": copy_rate(clock, device), "results": [], "failures": [], "skipped": []}
    cases = _cases(device, tiny)
    while (case := next(cases, None)) is not None:
        if time.perf_counter() - began > seconds:
            found["skipped"].append(f"{case.name} on {case.on}")
            continue
        try:
            case.verify()
            found["results"].append(_measured(case, clock, found["copy_gb_per_s"], device))
            print(" | ".join(row(found["results"][-1])), flush=True)
        except (AssertionError, RuntimeError) as error:
            found["failures"].append(f"{case.name} on {case.on}: {one_line(error)}")
    return found


def _cases(device: torch.device, tiny: bool) -> Iterator[Timed]:
    model = build("resnet18-thin" if tiny else "resnet18", 10, 3, 32).to(device)
    yield from _cases_of({n: p.detach() for n, p in model.named_parameters()}, "resnet18, float32", device, few=None)
    for kind, dtype in DTYPES.items():
        yield from _cases_of(_large(dtype, device, tiny), f"{LARGE}, {kind}", device, few=1 if tiny else 7)

    layers = read_json(TIMES)["layers"]
    for network, examples in NETWORKS.items():
        chosen = [layer for layer in layers if layer["name"].startswith(network)]
        if tiny:
            chosen = [{**layer, "examples": 2, "in_channels": 8, "out_channels": 8} for layer in chosen[-1:]]
        for kind in KINDS:
            yield _sums(chosen, f"{network}'s layers, batch {examples}", kind, device)


def _sums(layers: list[Layer], on: str, kind: str, device: torch.device) -> Timed:
    """Return the per-example sums of all these layers, one after the other."""
    made = [(layer, empty_sums(layer, device), operands(layer, KINDS[kind], device)) for layer in layers]

    def call() -> None:
        with tf32(True):
            for layer, sums, (inputs, output_grad) in made:
                accumulate(layer, sums, inputs, output_grad)

    def verify() -> None:
        for _, sums, _ in made:
            sums.zero_()
        call()
        for layer, sums, (inputs, output_grad) in made:
            check_sums(layer, kind, sums, expected_sums(layer, inputs, output_grad), "the measured variant")

    return Timed(f"per-example sums, {kind}", on, call, verify)


def _large(dtype: torch.dtype, device: torch.device, tiny: bool) -> dict[str, Tensor]:
    width, blocks = (64, 1) if tiny else (WIDTH, BLOCKS)
    shapes = [(width, width)] * 4 + [(4 * width, width)] * 2 + [(width, 4 * width)]
    generator = torch.Generator(device).manual_seed(0)
    return {
        f"{block}.{number}": torch.randn(shape, generator=generator, device=device, dtype=dtype) * 0.02
        for block in range(blocks)
        for number, shape in enumerate(shapes)
    }


def _cases_of(theta: dict[str, Tensor], on: str, device: torch.device, few: int | None) -> Iterator[Timed]:
    """Yield the ops on these parameters. ``few``: of them are verified against the CPU's kernels; None: all."""
    generator = torch.Generator(device).manual_seed(1)
    grad = {n: torch.randn(t.shape, generator=generator, device=device) * 1e-3 for n, t in theta.items()}
    yield from _localization(theta, grad, on, few)
    mask = Mask(
        {
            n: ParameterMask(
                tuple(t.shape), "row", pack(torch.rand(len(t), generator=generator, device=device) < BUDGET)
            )
            for n, t in theta.items()
        },
        {},
    )
    for name, make, states, settings in UPDATES:
        yield _update(name, make, states, settings, theta, grad, mask, on, few)
    if few is None:
        elements = Scores(theta, grad, "weighted_grad", 1).select(BUDGET, granularity="param")
        for name, make, states, settings in UPDATES:
            yield _update(f"{name} by elements", make, states, settings, theta, grad, elements, on, few)


def _localization(theta: dict[str, Tensor], grad: dict[str, Tensor], on: str, few: int | None) -> Iterator[Timed]:
    ops, read = torch.ops.delfast, sum(t.nbytes for t in (*theta.values(), *grad.values()))

    def verified(call: Callable[[list[Tensor], list[Tensor]], Any]) -> tuple[Callable[[], Any], Callable[[], None]]:
        values, gradients = list(theta.values()), list(grad.values())

        def verify() -> None:
            found = call(values[:few], gradients[:few])
            expected = call([t.cpu() for t in values[:few]], [t.cpu() for t in gradients[:few]])
            for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
                assert torch.equal(a.cpu(), b), "the result differs from the CPU kernels'"

        return (lambda: call(values, gradients)), verify

    def of(aggregate: str) -> Callable[[list[Tensor], list[Tensor]], Any]:
        return lambda values, gradients: ops.criticality(
            values, gradients, "weighted_grad", aggregate, [resolve_top_h(0.1, t.shape) for t in values]
        )

    def elements(values: list[Tensor], gradients: list[Tensor]) -> Any:
        return ops.select_elements(values, gradients, "weighted_grad", int(BUDGET * sum(t.numel() for t in values)))

    yield Timed("criticality, mean", on, *verified(of("mean")), read)
    yield Timed("criticality, mean of the top tenth", on, *verified(of("topk_mean")), read)
    yield Timed("selection of elements", on, *verified(elements), read)
    if few is None:
        scores, host = (
            Scores(*({n: place(t) for n, t in each.items()} for each in (theta, grad)), "weighted_grad", 1)
            for place in (lambda t: t, lambda t: t.cpu())
        )

        def verify() -> None:
            assert scores.select(BUDGET).digest == host.select(BUDGET).digest, "the mask differs from the CPU's"

        yield Timed("a channel mask after the gradients", on, lambda: scores.select(BUDGET), verify, by_events=True)


def _update(
    name: str,
    make: Any,
    states: int,
    settings: dict[str, Any],
    theta: dict[str, Tensor],
    grad: dict[str, Tensor],
    mask: Mask,
    on: str,
    few: int | None,
) -> Timed:
    names = list(theta)

    def optimizer(place: Callable[[Tensor], Tensor], count: int | None, lr: float) -> tuple[Any, list[Tensor]]:
        parameters = {n: nn.Parameter(place(theta[n])) for n in names[:count]}
        for n, parameter in parameters.items():
            parameter.grad_dtype = torch.float32
            parameter.grad = place(grad[n])
        part = Mask({n: mask.parameters[n] for n in parameters}, {})
        return make(parameters.items(), mask=part, lr=lr, **settings), list(parameters.values())

    def verify() -> None:
        """Take two steps that move the weights far, on the GPU and on the CPU, and compare weights and state."""
        places = (torch.clone, lambda t: t.cpu().clone())
        (here, found), (there, expected) = (optimizer(place, few, lr=0.1) for place in places)
        for _ in range(2):
            here.step()
            there.step()
        near = {"rtol": 0.0, "atol": 0.0} if states == 1 else {"rtol": 1e-5, "atol": 1e-6}  # of AdamW's powers
        for a, b in zip(found, expected, strict=True):
            rounding = torch.finfo(a.dtype).eps if states == 2 else 0.0
            torch.testing.assert_close(a.detach().cpu(), b, rtol=near["rtol"] + rounding, atol=near["atol"])
            for key, value in there.state[b].items():
                torch.testing.assert_close(here.state[a][key].cpu(), value, **near)

    whole: list[Any] = []

    def step() -> None:
        if not whole:
            whole.append(optimizer(lambda t: t, None, lr=1e-4)[0])
        whole[0].step()

    entry = sum(mask.parameters[n].selected * (2 * theta[n].element_size() + 4 + 8 * states) for n in names)
    return Timed(name, on, step, verify, entry)


def _measured(case: Timed, clock: Clock, copy: float, device: torch.device) -> dict[str, Any]:
    if case.by_events:
        case.call()
        milliseconds, _ = profile_call(case.call, device)
        us = clock(case.call) if milliseconds is None else 1e3 * milliseconds
    else:
        us = clock(graph_of(case.call), queued=True) if captures(device) else clock(case.call)
    rate = None if case.moved is None else case.moved / us / 1e3
    before = before_us(torch.cuda.get_device_name(device) if captures(device) else "CPU", case.name, case.on)
    return {
        "name": case.name, "on": case.on, "us": us, "gb_per_s": rate, "of_copy": None if rate is None else rate / copy,
        "speedup": None if before is None else before / us,
    }  # fmt: skip


def before_us(gpu: str, name: str, on: str) -> float | None:
    """Return the time that the older kernels took on this GPU, None where it is not known."""
    kept = read_json(BEFORE)
    found = [case["before_us"] for case in kept["cases"] if (case["name"], case["on"]) == (name, on)]
    return found[0] if found and gpu == kept["device"] else None


COLUMNS = ("kernel", "on", "µs", "GB/s", "of copy", "speedup")


def row(result: dict[str, Any]) -> list[str]:
    """Return the cells of ``COLUMNS``."""
    forms = {"us": ".1f", "gb_per_s": ".0f", "of_copy": ".2f", "speedup": ".2f"}
    cells = ["" if result[key] is None else format(result[key], form) for key, form in forms.items()]
    return [result["name"], result["on"], *cells]
