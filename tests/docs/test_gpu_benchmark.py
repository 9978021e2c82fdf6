"""The GPU benchmark without a GPU: its cases give the same results on the CPU, and errors are one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_cases import cases
from delfast.experiments.networks import build


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_device_it_fails_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == (
        "gpu: error: expected a CUDA device, found none; run this on a machine with a GPU\n"
    )


def test_a_case_that_fails_its_check_is_named_and_the_exit_code_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = {"device": "a card", "copy_gb_per_s": 1.0, "results": [], "failures": ["masked AdamW: off"]}
    monkeypatch.setenv(gpu.BUILT, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "measure", lambda quick: results)
    assert gpu.main(["--output", str(tmp_path / "gpu.json")]) == 1
    assert capsys.readouterr().err == "gpu: error: masked AdamW: off\n"


def test_a_row_shows_times_rates_and_ratios() -> None:
    result = {"name": "x", "on": "y", "graph_us": None, "call_us": 20.0, "gb_per_s": 1234.5, "of_copy": 0.61}
    assert gpu.row(result | {"others_us": {"eager": 50.0}}) == ["x", "y", "", "20.0", "1234", "0.61", "eager 2.5"]
