"""Every example runs, is short, forgets the wrong labels, and changes nothing outside the mask."""

import json
import os
import subprocess
import sys

import pytest

from tests import ROOT, cases

EXAMPLES = ROOT / "examples"
NEEDS = {
    "plain_pytorch": "sklearn",
    "torchrun_fsdp2": "sklearn",
    "lightning_job": "lightning",
    "hf_trainer": "transformers",
    "accelerate_job": "accelerate",
}


LAUNCH = {"torchrun_fsdp2": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}


@pytest.mark.parametrize("name", NEEDS)
def test_example(name):
    pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed: pip install -r requirements-dev.txt")
    path = EXAMPLES / f"{name}.py"
    source = path.read_text()
    assert len(source.splitlines()) < 60 and "Callback" not in source
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *LAUNCH.get(name, []), path],
        **{"capture_output": True, "text": True, "env": environment, "timeout": cases.PATIENCE},
    )
    assert result.returncode == 0, result.stderr
    *_, before, after, changed = result.stdout.splitlines()
    assert changed == "changed outside the mask: 0"
    remembered = [int(line.split()[1]) for line in (before, after)]
    assert remembered[0] >= 30 and remembered[1] <= 10


def test_the_language_model_example(tmp_path):
    """The original has memorised the passages, the oracle has not; unlearning changes the mask alone."""
    pytest.importorskip("transformers", reason="transformers is missing: pip install -r requirements-dev.txt")
    result = subprocess.run(
        [sys.executable, EXAMPLES / "causal_lm.py", "--fast", "--json", tmp_path / "result.json"],
        **{"capture_output": True, "text": True, "timeout": cases.PATIENCE},
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    _, *rows, changed = result.stdout.splitlines()
    models = json.loads((tmp_path / "result.json").read_text())["models"]
    assert changed == "changed outside the mask: 0" and [row.split()[0] for row in rows] == list(models)
    original, unlearned, oracle = (models[name] for name in ("original", "unlearned", "oracle"))
    assert original["exposure"] > 5 and oracle["exposure"] < 3 and original["exposure"] >= unlearned["exposure"]
    assert original["forget_loss"] < unlearned["forget_loss"] < oracle["forget_loss"]


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NEEDS, "causal_lm", "common"}
