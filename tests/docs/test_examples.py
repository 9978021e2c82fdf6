"""Every example runs, is short, forgets the wrong labels, and changes nothing outside the mask."""

import os
import subprocess
import sys

import pytest

from tests import ROOT, cases

EXAMPLES = ROOT / "examples"
NEEDS = {
    "plain_pytorch": "sklearn",
    "lightning_job": "lightning",
    "hf_trainer": "transformers",
    "accelerate_job": "accelerate",
}


@pytest.mark.parametrize("name", NEEDS)
def test_example(name):
    pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed: pip install -r requirements-dev.txt")
    path = EXAMPLES / f"{name}.py"
    source = path.read_text()
    assert len(source.splitlines()) < 60 and "Callback" not in source
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, env=environment, timeout=cases.PATIENCE
    )
    assert result.returncode == 0, result.stderr
    *_, before, after, changed = result.stdout.splitlines()
    assert changed == "changed outside the mask: 0"
    remembered = [int(line.split()[1]) for line in (before, after)]
    assert remembered[0] >= 30 and remembered[1] <= 10


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NEEDS, "common"}
