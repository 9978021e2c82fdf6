"""Whole calls and kernels on the GPU that is here: `python -m benchmarks.gpu`. Its limits add up to six minutes.

Builds the extension for this GPU, then runs sections, all of them or those that are named:

- ``localize``: 5,000 images, the first call for a network, beside the usual loop.
- ``per_example``: per-example scores of one more batch, beside an ordinary forward and backward pass.
- ``step``: a training step of ``unlearn``, dense and compact, beside torch's dense step with a fused optimizer.
- ``job``: a whole DEL job, beside ``benchmarks/naive.py`` on the same GPU.
- ``kernels``: every op, verified and timed beside what people write (``benchmarks/gpu_kernels.py``).
- ``bandwidth``: the kernels on 1.07 G parameters and on single layers, beside the GPU's own copy and the kernels of an
  older commit (``benchmarks/gpu_bandwidth.py``).

Both sides run as they are and captured in CUDA graphs. Wall: the median of whole calls; busy: the sum of the times of
kernels and copies; launches: their number, both by torch.profiler in a call of its own; peak: the most memory that
torch's allocator reserved. Each section has a time limit: the cases that it leaves out are named, and so are those that
fail. The JSON keeps the sections of earlier runs that were not run again. Exit code 1 without a device or on a
failure.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from delfast.errors import InputError, one_line

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/gpu.json"
BUILT = "DELFAST_BENCHMARK_BUILT"  # set for the process that measures, once the build is done
SECONDS = {
    "localize": 30,
    "per_example": 60,
    "step": 60,
    "job": 75,
    "kernels": 45,
    "bandwidth": 45,
}  # at most, and one case more
# without these, profiling a process that replays CUDA graphs can fail when the profiler is started a second time
PROFILER = {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}


def build() -> None:
    """Build the extension in place, for this GPU alone. CalledProcessError if that fails."""
    major, minor = torch.cuda.get_device_capability()
    environment = {**os.environ, "DELFAST_NATIVE": "1", "DELFAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True)


def run_section(name: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run one section for at most ``seconds`` and a case; return its results, failures and what was skipped."""
    from benchmarks import gpu_calls
    from benchmarks.gpu_bandwidth import bandwidth
    from benchmarks.gpu_kernels import kernels
    from benchmarks.gpu_measure import MODE_ORDER, MODES
    from delfast.provenance import provenance

    device, began = torch.device(options.device), time.perf_counter()
    if name == "kernels":
        found = kernels(device, options.tiny, options.quick, seconds)
    elif name == "bandwidth":
        found = bandwidth(device, options.tiny, seconds)
    else:
        modes = [mode for mode in MODE_ORDER if mode in options.modes]
        setup = gpu_calls.Setup(device, modes, options.tiny)
        sections = {section.__name__: section for section in gpu_calls.SECTIONS}
        found = _run_cases(sections[name](setup), setup, began + seconds)
        found["modes"] = {mode: MODES[mode] for mode in modes}
    return {**_facts(device), "provenance": provenance(cuda=torch.version.cuda), **found,
            "seconds": time.perf_counter() - began}  # fmt: skip


def _run_cases(cases: Iterator[Any], setup: Any, deadline: float) -> dict[str, Any]:
    from benchmarks.gpu_measure import row_of

    found: dict[str, Any] = {"results": [], "failures": [], "skipped": []}
    name = "the section's beginning"
    while True:
        try:
            if (case := next(cases, None)) is None:
                return found
            name = case.name
            if time.perf_counter() > deadline:
                found["skipped"].append(name)
                continue
            found["results"].append(row_of(case, setup.device, setup.effort))
            print(f"{name}: {_in_short(found['results'][-1])}", flush=True)
        except (AssertionError, RuntimeError, InputError) as error:  # the next case may run
            found["failures"].append(f"{name}: {one_line(error)}")


def _in_short(result: dict[str, Any]) -> str:
    sides = [f"{name} {side['wall_ms']:.2f} ms" for name, side in result["sides"].items()]
    return ", ".join(sides) + (f", overlap {result['overlap']:.3f}" if "overlap" in result else "")


def _facts(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": "CPU, nothing captured", "captures": False}
    capability = list(torch.cuda.get_device_capability(device))
    return {"device": torch.cuda.get_device_name(device), "captures": True, "capability": capability}


def print_section(name: str, section: dict[str, Any]) -> None:
    from benchmarks import gpu_bandwidth, gpu_kernels
    from benchmarks.gpu_report import RATIOS, SIDES, ratio_rows, side_rows
    from delfast.experiments.reports import markdown_table

    print(f"\n{name}: {section['device']}, {section['seconds']:.0f} s\n")
    if name in ("kernels", "bandwidth"):
        made = gpu_kernels if name == "kernels" else gpu_bandwidth
        print(f"copy {section['copy_gb_per_s']:.0f} GB/s\n")
        print(markdown_table(made.COLUMNS, [made.row(result) for result in section["results"]]))
    else:
        print(markdown_table(SIDES, list(side_rows(section))))
        print(markdown_table(RATIOS, list(ratio_rows(section))))
    for each in section["skipped"]:
        print(f"skipped because the time limit was reached: {each}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Time whole calls and CUDA kernels.")
    parser.add_argument("names", nargs="*", metavar="SECTION", help=f"{', '.join(SECONDS)} (default: all)")
    parser.add_argument("--sections", default="", help="the same, separated by commas")
    parser.add_argument("--modes", default="bf16,fp32,tf32", help="of the whole calls, separated by commas")
    parser.add_argument("--seconds", type=float, help="limit of each section (default: its own)")
    parser.add_argument("--output", type=Path, help=f"the JSON to write (default on a GPU: {RESULTS.name})")
    parser.add_argument("--quick", action="store_true", help="kernels: one network in float32 alone")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the code: nothing is captured there")
    parser.add_argument("--tiny", action="store_true", help="networks and sets of a test, to try the code")
    options = parser.parse_args(arguments)
    options.modes = [mode for mode in options.modes.split(",") if mode]
    chosen = [*options.names, *(name for name in options.sections.split(",") if name)]
    for what, given, known in (("section", chosen, [*SECONDS]), ("mode", options.modes, ["bf16", "fp32", "tf32"])):
        for each in given:
            if each not in known:
                parser.error(f"expected a {what} {', '.join(known)}, got '{each}'")
    options.sections = [name for name in SECONDS if not chosen or name in chosen]
    if options.output is None and options.device == "cuda" and not options.tiny:
        options.output = RESULTS
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    on_card = torch.device(options.device).type == "cuda"
    if on_card and not torch.cuda.is_available():
        print("gpu: error: expected a CUDA device, found none; run this on a machine with a GPU", file=sys.stderr)
        return 1
    if on_card and BUILT not in os.environ:
        return _build_and_run(sys.argv[1:] if arguments is None else arguments, options)

    from benchmarks.gpu_measure import warm_up_profiler
    from benchmarks.gpu_report import read_kept
    from delfast.files import write_json

    warm_up_profiler(torch.device(options.device))
    output: Path | None = options.output
    sections = read_kept(output) if output is not None and output.is_file() else {}
    failures = []
    for name in options.sections:
        limit = SECONDS[name] if options.seconds is None else options.seconds
        sections[name] = section = run_section(name, options, limit)
        failures += [f"{name}: {failure}" for failure in section["failures"]]
        if output is not None:
            write_json(output, {"sections": sections})  # after each: a run that is cut off keeps what it has
        print_section(name, section)
    for failure in failures:
        print(f"gpu: error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _build_and_run(arguments: list[str], options: argparse.Namespace) -> int:
    """Build, then run each section in a process of its own.

    This process may have loaded the extension as it was, and an error of the GPU in one section ends its process.
    """
    try:
        build()
    except subprocess.CalledProcessError as error:
        print(f"gpu: error: the build failed, see above: {error}", file=sys.stderr)
        return 1
    environment = {**os.environ, **PROFILER, BUILT: "1", "DELFAST_BACKEND": "native"}
    others = [each for each in arguments if each not in options.names]
    codes = []
    for name in options.sections:
        command = [sys.executable, "-m", "benchmarks.gpu", *others, f"--sections={name}"]
        codes.append(subprocess.run(command, cwd=ROOT, env=environment).returncode)
        if codes[-1] not in (0, 1):
            print(f"gpu: error: {name} ended with exit code {codes[-1]}", file=sys.stderr)
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
