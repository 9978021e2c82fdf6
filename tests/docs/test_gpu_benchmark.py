"""The GPU benchmark without a GPU: cases give the same results on the CPU, every section runs, errors are a line."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

import delfast
from benchmarks import gpu, gpu_bandwidth, gpu_calls, gpu_kernels, gpu_measure, gpu_report, naive
from benchmarks.gpu_cases import cases
from benchmarks.gpu_measure import Captured, Effort, Marginal, Whole, arithmetic, delfast_keywords, keywords
from benchmarks.gpu_networks import Workload
from benchmarks.job import images_of
from delfast.errors import InputError
from delfast.experiments.networks import build
from delfast.files import read_json
from delfast.unlearning import TrainingOptions

CPU = torch.device("cpu")
SECTIONS = [section.__name__ for section in gpu_calls.SECTIONS]
HAS_KEYWORDS = {"precision", "cuda_graphs"} <= inspect.signature(delfast.localize).parameters.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_case_is_verified_and_every_baseline_runs(dtype: torch.dtype) -> None:
    seen = []
    for case in cases("resnet18-thin", build("resnet18-thin", 10, 3, 32), dtype, "cpu"):
        case.verify()
        for _ in range(
            3 if "whole call" in case.name else 20
        ):  # as when it is timed: the next case must be right all the same
            case.ours()
        for run in (*case.others.values(), *case.compiles.values()):
            run()
        assert case.moved > 0 and case.others
        seen.append(case.name)
    assert len(seen) == len(set(seen)) == 10


def test_a_wrong_result_is_noticed() -> None:
    network = build("resnet18-thin", 10, 3, 32)
    for case in cases("resnet18-thin", network, torch.float32, "cpu"):
        if case.name == "masked SGD with momentum":
            case.ours.__self__.param_groups[0]["lr"] = 1.0  # type: ignore[attr-defined]
            with pytest.raises(AssertionError):
                case.verify()
            return
    raise AssertionError("expected a case for masked SGD")


# ---- the command


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the benchmark in this process; return its exit code and the JSON's sections."""
    output = tmp_path / "gpu.json"
    code = gpu.main([*arguments, "--tiny", "--output", str(output)])
    return code, json.loads(output.read_text(encoding="utf-8"))["sections"]


def check_sections(found: dict[str, Any], *, captures: bool) -> None:
    for name in SECTIONS:
        assert found[name]["captures"] is captures and not found[name]["skipped"]
        for result in found[name]["results"]:
            assert any(side["captured"] for side in result["sides"].values()) is captures
            assert result["ratios"] and all(side["wall_ms"] for side in result["sides"].values())


def test_every_section_runs_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where this delfast lacks a keyword, only the cases that need it fail, and name it."""
    code, found = run(tmp_path, "--device", "cpu", "--modes", "fp32,bf16", *SECTIONS)
    check_sections(found, captures=False)
    failures = [failure for name in SECTIONS for failure in found[name]["failures"]]
    modes = {(name, result["mode"]) for name in SECTIONS for result in found[name]["results"]}
    assert {("localize", "fp32"), ("per_example", "fp32"), ("step", "fp32"), ("step", "bf16")} <= modes
    if HAS_KEYWORDS:
        assert code == 0 and not failures
    else:
        assert code == 1 and all("to have the keyword 'precision'" in failure for failure in failures)
    printed = capsys.readouterr()
    assert "localize: CPU, nothing captured" in printed.out
    assert all(f"gpu: error: {name}: " in printed.err for name in SECTIONS if found[name]["failures"])


def test_the_job_runs_on_the_cpu(tmp_path: Path) -> None:
    code, found = run(tmp_path, "--device", "cpu", "--modes", "fp32", "job")
    (result,) = found["job"]["results"]
    assert code == 0 and set(result["test_accuracy"]) == {"naive, fp32", "delfast, fp32"}
    assert set(result["ratios"]) == {"delfast, fp32 / naive, fp32"}


def test_kernels_are_verified_before_they_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found = run(tmp_path, "--device", "cpu", "bandwidth")
    results = found["bandwidth"]["results"]
    assert code == 0 and all(result["us"] > 0 and result["speedup"] is None for result in results)
    named = {(result["name"], result["on"]) for result in results}
    assert {(target.name, target.on) for target in gpu_report.KERNEL_TARGETS} <= named
    original = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: original(a, b) and a.ndim != 1)
    code, found = run(tmp_path, "--device", "cpu", "bandwidth")
    assert code == 1 and "criticality, mean on resnet18, float32" in found["bandwidth"]["failures"][0]


def test_a_speedup_is_kept_for_the_gpu_of_the_kept_times_alone() -> None:
    kept = read_json(gpu_bandwidth.BEFORE)
    assert gpu_bandwidth.before_us(kept["device"], "criticality, mean", "resnet18, float32") == 52.4
    assert gpu_bandwidth.before_us("another GPU", "criticality, mean", "resnet18, float32") is None


def test_kernel_targets_show_what_was_measured_and_the_prototype() -> None:
    kept = read_json(gpu_bandwidth.BEFORE)
    target = gpu_report.KERNEL_TARGETS[0]
    section = {"results": [{"name": target.name, "on": target.on, "of_copy": 0.5}]}
    first, second, *_ = gpu_report.kernel_goal_rows(section, kept)
    assert first == [target.name, target.on, "0.50", ">= 0.95 of the GPU's copy", "0.99"]
    assert second[2] == gpu_report.NOT_HERE
    assert all(cells[2] == gpu_report.NO_GPU for cells in gpu_report.kernel_goal_rows(None, kept))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
def test_every_section_runs_and_captures_on_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu.BUILT, "1")
    code, found = run(tmp_path, "--modes", "fp32,tf32,bf16", *SECTIONS, "kernels", "bandwidth")
    check_sections(found, captures=True)
    assert code == 0, [section["failures"] for section in found.values()]
    for result in found["step"]["results"]:
        assert all(side["launches"] > 0 and side["busy_ms"] > 0 for side in result["sides"].values())


def test_sections_that_are_not_run_are_kept(tmp_path: Path) -> None:
    before = {"device": "a card", "copy_gb_per_s": 1.0, "results": [{"name": "x"}], "failures": []}
    (tmp_path / "gpu.json").write_text(json.dumps(before), encoding="utf-8")  # of the form before there were sections
    code, found = run(tmp_path, "--device", "cpu", "--modes", "fp32", "--sections", "localize")
    assert code == 0 and found["kernels"] == before and set(found) == {"kernels", "localize"}


def test_kernels_are_timed_until_the_time_is_over(tmp_path: Path) -> None:
    code, found = run(tmp_path, "--device", "cpu", "--seconds", "0.2", "kernels")
    section = found["kernels"]
    names = [result["name"] for result in section["results"]]
    assert code == 0 and names[0] == "criticality, mean of the top tenth"
    assert names + [name.rpartition(" on ")[0] for name in section["skipped"]] == [
        case.name for case in cases("resnet18-thin", build("resnet18-thin", 10, 3, 32), torch.float32, "cpu")
    ]


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["steps"])
    assert ended.value.code == 2
    expected = f"expected a section {', '.join(gpu.SECONDS)}, got 'steps'"
    assert expected in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_device_it_fails_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == (
        "gpu: error: expected a CUDA device, found none; run this on a machine with a GPU\n"
    )


def test_a_case_that_fails_its_check_is_named_and_the_exit_code_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_calls, "MIN_TINY_OVERLAP", 1.1)
    code, found = run(tmp_path, "--device", "cpu", "--modes", "fp32", "localize", "step")
    assert code == 1 and not found["localize"]["results"] and found["step"]["results"]  # the others go on
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpu: error: localize: localize 38 images, first call") and "the masks overlap by" in line


# ---- measurements


def test_a_missing_keyword_is_refused_by_name() -> None:
    def function(budget: float) -> None: ...

    assert keywords(function, budget=0.3) == {"budget": 0.3}
    with pytest.raises(InputError, match="function to have the keyword 'cuda_graphs', it has not; run a version"):
        keywords(function, budget=0.3, cuda_graphs=True)


@pytest.mark.skipif(not HAS_KEYWORDS, reason="this delfast captures no passes")
@pytest.mark.parametrize("function", [delfast.localize, delfast.score, TrainingOptions])
def test_every_call_on_a_card_has_its_keywords(function: Callable[..., Any]) -> None:
    expected = {"precision": "bf16", "cuda_graphs": True}
    assert delfast_keywords(function, torch.device("cuda"), "bf16", True) == expected


def test_arithmetic_is_restored() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    for mode, expected in (("fp32", (False, True)), ("tf32", (True, True)), ("bf16", (False, True))):
        with pytest.raises(KeyError), arithmetic(mode):
            assert (matmul.allow_tf32, cudnn.allow_tf32) == expected
            raise KeyError
        assert (matmul.allow_tf32, cudnn.allow_tf32) == before


def test_a_batch_costs_the_difference_of_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    clock = [0.0]

    def count_batches(count: int) -> None:
        seen.append(count)
        clock[0] += 5.0 + 0.25 * count  # seconds: 5 once, a quarter each

    monkeypatch.setattr(gpu_measure.time, "perf_counter", lambda: clock[0])
    figures = gpu_measure.measure(Marginal(lambda: count_batches, few=2, many=6), CPU, Effort(least=2, most=3))
    assert figures["wall_ms"] == pytest.approx(250) and figures["rounds"] == 2
    assert seen == [2, 2, 2, 6, 6, 6]  # a warm-up and two rounds of each
    assert (figures["busy_ms"], figures["launches"], figures["peak_mib"], figures["captured"]) == (None,) * 3 + (False,)


def test_what_prepares_a_call_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def advance(seconds: float) -> None:
        clock[0] += seconds

    def prepare() -> Callable[[], None]:
        advance(100)
        return lambda: advance(0.125)

    monkeypatch.setattr(gpu_measure.time, "perf_counter", lambda: clock[0])
    assert gpu_measure.measure(Whole(prepare), CPU, Effort(least=1, most=3, seconds=0.2))["wall_ms"] == 125


def test_the_profile_adds_up_what_a_device_has_run() -> None:
    """Here the CPU's events stand for a card's kernels."""
    recorded = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with recorded as profile, torch.profiler.record_function("a span of kernels, not one"):
        torch.ones(8) + 1
    milliseconds, count = gpu_measure.busy(profile.events(), DeviceType.CPU)
    assert milliseconds > 0 and count == len([event for event in profile.events() if event.name.startswith("aten::")])
    assert gpu_measure.busy(profile.events(), DeviceType.CUDA) == (None, None)


def test_without_a_card_a_captured_step_is_the_step() -> None:
    calls: list[int] = []
    step = Captured(lambda: calls.append(1), CPU)
    assert not calls
    step()
    assert calls == [1]


def test_both_sides_read_the_same_batches() -> None:
    """The naive loop's images on a card are those of its DataLoader."""
    images, _, mean, std = images_of(20, 8, 8)
    expected, _ = naive.dataset(images, mean, std).tensors
    found = torch.cat([batch for batch, _ in naive.CardImages(images, mean, std)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    shuffled = list(naive.batches_of(naive.CardImages(images, mean, std), shuffle=True))
    assert sorted(torch.cat([targets for _, targets in shuffled]).tolist()) == sorted(images[1].tolist())
    network = gpu_calls.workloads(True).__next__().network(CPU)
    both = (naive.dataset(images, mean, std), naive.CardImages(images, mean, std))
    dense, card = (naive.localize(network, data, 0.3) for data in both)
    assert all(torch.equal(dense[name], card[name]) for name in dense)
    assert naive.accuracy(network, both[0]) == naive.accuracy(network, both[1])


@pytest.mark.slow
@pytest.mark.parametrize("workload", list(gpu_calls.workloads(False)), ids=lambda workload: workload.name)
def test_every_network_can_be_scored_and_trained(workload: Workload) -> None:
    """In batches of two; on a card an error here would cost its time."""
    few = replace(workload, batch_size=2)
    network, batch = few.network(CPU), few.batch(CPU)
    assert delfast.score(network, [batch], "grad", per_example=True).examples == 2
    mask = delfast.localize(network, [batch], gpu_calls.BUDGET)  # refused where there is no gradient
    delfast.unlearn(network, retain=[batch], method="finetune", mask=mask, epochs=1, lr=gpu_calls.LR)


# ---- the report


def test_a_row_shows_times_rates_and_ratios() -> None:
    result = {"name": "x", "on": "y", "graph_us": None, "call_us": 20.0, "gb_per_s": 1234.5, "of_copy": 0.61}
    expected = ["x", "y", "", "20.0", "1234", "0.61", "eager 2.5"]
    assert gpu_kernels.row(result | {"others_us": {"eager": 50.0}}) == expected


def test_every_target_names_a_case_of_its_section() -> None:
    """On the sections' own names: a target of another name would never be measured."""
    setup = gpu_calls.Setup(CPU, ["fp32", "bf16"], tiny=True)
    for section in gpu_calls.SECTIONS:
        pairs = {pair for case in section(setup) for pair in case.ratios}
        targets = [target for target in gpu_report.TARGETS if target.section == section.__name__]
        assert targets and {(target.ours, target.other) for target in targets} <= pairs
    names = {workload.on for workload in gpu_calls.workloads(False)} | {"resnet18, batch 128"}
    assert {target.on for target in gpu_report.TARGETS} <= names


def test_targets_are_measured_or_not_measured() -> None:
    target = gpu_report.TARGETS[0]
    result: dict[str, Any] = {"on": target.on, "mode": target.mode}
    result["ratios"] = {f"{target.ours} / {target.other}": {"wall": 0.5}}
    for warnings, measured in (([], "0.50"), (["no CUDA graph is used: hooks"], "0.50 (see its warnings)")):
        result["sides"] = {target.ours: {"warnings": warnings}, target.other: {"warnings": []}}
        rows = list(gpu_report.goal_rows({target.section: {"results": [result]}}))
        assert rows[0] == [target.text, measured, "<= 0.6"]
        assert all(each == gpu_report.NOT_MEASURED for _, each, _ in rows[1:])


class Graph:
    """Stands for torch's graph of a card."""

    def replay(self) -> None:
        pass


def test_a_side_that_was_not_captured_is_not_reported_as_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """delfast logs a warning of what it cannot capture; a function that ignores the keyword replays nothing."""
    monkeypatch.setattr(gpu_measure, "captures", lambda device: True)
    monkeypatch.setattr(gpu_measure, "profile_call", lambda call, device: (None, None))
    monkeypatch.setattr(gpu_measure, "_wait", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("empty_cache", "reset_peak_memory_stats", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 2**20)

    def measured(call: Callable[[], Any], is_captured: bool) -> tuple[bool, list[str]]:
        figures = gpu_measure.measure(Whole(lambda: call, captured=is_captured), CPU, Effort(least=2, most=2))
        assert figures["peak_mib"] == 1
        return figures["captured"], figures["warnings"]

    message = "no CUDA graph is used, each step is launched by the host: foreign hooks"
    warn = partial(logging.getLogger("delfast").warning, message)
    assert measured(warn, True) == (False, [message, gpu_measure.NO_GRAPH])
    assert measured(list, True) == (False, [gpu_measure.NO_GRAPH])
    assert measured(list, False) == (False, [])
    assert measured(lambda: Graph().replay(), True) == (True, [])
