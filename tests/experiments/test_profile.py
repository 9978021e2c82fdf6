"""``delfast bench``: every stage is timed, for a preset and for a run of one's own."""

import json

import pytest
from PIL import Image

from delfast.cli import main
from delfast.experiments import profile
from delfast.ops import BACKEND

QUICK = ["--repeats", "1", "--threads", "1"]


def run(*arguments, expect=0):
    assert main(["bench", *map(str, arguments)]) == expect


def test_a_preset(tmp_path, capsys):
    run("--model", "resnet18-thin", "--batch-size", 4, *QUICK, "--output-dir", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    variants = {f"{precision}, {name}" for precision in ("fp32", "bf16") for name in {BACKEND.name, "torch"}}
    assert set(summary["seconds"]) == variants and summary["options"]["channels_last"] is True
    for seconds in summary["seconds"].values():
        assert set(seconds) == set(profile.STAGES) > set(profile.STEP) and min(seconds.values()) >= 0
        assert all(seconds[stage] > 0 for stage in ("load", "forward", "backward", "step", "score", "select", "reset"))
    table = capsys.readouterr().out
    assert all(stage in table for stage in profile.STAGES) and "a step within the mask" in table
    assert Image.open(tmp_path / "stages.png").size[0] > 500


@pytest.mark.slow
def test_a_run_of_one_s_own(tmp_path, capsys):
    assert main(["train", "--epochs", "1", "--lr", "0.05", "--output-dir", str(tmp_path / "run")]) == 0
    run(tmp_path / "run", "--batch-size", 16, "--budget", 0.2, *QUICK, "--output-dir", tmp_path / "bench")
    assert json.loads((tmp_path / "bench" / "summary.json").read_text())["options"]["run_dir"] == str(tmp_path / "run")
    run(tmp_path / "nowhere", *QUICK, "--output-dir", tmp_path / "b", expect=2)
    assert "expected a run directory" in capsys.readouterr().err
    run("--model", "alexnet", *QUICK, "--output-dir", tmp_path / "b", expect=2)
    assert "expected a model" in capsys.readouterr().err


def test_a_variant_that_fails_says_why(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profile, "as_arguments", lambda request: ["-c", "raise SystemExit('no such stage')"])
    run("--model", "resnet18-thin", *QUICK, "--output-dir", tmp_path, expect=1)
    assert "cannot be timed: no such stage" in capsys.readouterr().err
